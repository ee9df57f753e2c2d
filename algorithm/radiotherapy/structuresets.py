"""RT structure sets: converts contours to masks and masks to contours, on the slices of a CT series.

A contour is a closed polygon in the plane of a slice. Several contours in one plane follow the even-odd rule, so that a
contour inside another one is a hole. Masks are shares from 0 to 1: the part of a voxel's cross-section that lies
inside.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import contourpy
import numpy as np
import pydicom
from jaxtyping import Bool, Float, Float32
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from ..errors import InputError
from ..geometry import Grid
from .dicomobjects import Reference, decimal, new_object, references

STRUCTURES = "1.2.840.10008.5.1.4.1.1.481.3"
FINER = 8
"""Number of sample points along each axis of a voxel that decide what lies inside."""
OFF_PLANE = 0.6
"""Maximum distance, in slices, of a contour from the nearest slice; beyond it, the contour belongs to another
series."""

Contour = Float[np.ndarray, "_ 3"]


@dataclass(frozen=True)
class Structure:
    """A region of interest: closed planar contours (mm, LPS)."""

    name: str
    contours: list[Contour]
    colour: list[int] | None = None
    kind: str = ""
    """RTROIInterpretedType: GTV, ORGAN, ..."""


@dataclass(frozen=True)
class StructureSet:
    """The structures of a file."""

    data: Dataset
    structures: list[Structure]
    frame: str
    """The UID of the frame of reference."""


def read_structures(path: Path) -> StructureSet:
    """The structures of a file; InputError if it is not a structure set, or has no closed planar contour."""
    try:
        data = pydicom.dcmread(path)
        names = {int(of.ROINumber): of for of in data.StructureSetROISequence}
        kinds = {
            int(of.ReferencedROINumber): str(of.get("RTROIInterpretedType") or "")
            for of in data.get("RTROIObservationsSequence", [])
        }
        structures = [
            Structure(
                str(names[int(of.ReferencedROINumber)].ROIName),
                [_points(one) for one in of.get("ContourSequence", []) if one.ContourGeometricType == "CLOSED_PLANAR"],
                [int(v) for v in of.ROIDisplayColor] if "ROIDisplayColor" in of else None,
                kinds.get(int(of.ReferencedROINumber), ""),
            )
            for of in data.ROIContourSequence
        ]
        frame = str(data.StructureSetROISequence[0].ReferencedFrameOfReferenceUID)
    except Exception as error:  # pydicom documents none for damaged files
        raise InputError(f"{path}: cannot be read as an RT structure set ({error}), expected one") from error
    if not any(of.contours for of in structures):
        raise InputError(f"{path}: has no closed planar contour, expected some")
    return StructureSet(data, structures, frame)


def _points(contour: Dataset) -> Contour:
    return np.array(contour.ContourData, float).reshape(-1, 3)


def shares(contours: list[Contour], grid: Grid) -> Float32[np.ndarray, "z y x"]:
    """The share of each voxel that lies inside the contours; InputError for a contour that lies in no plane of the
    grid."""
    nx, ny, nz = grid.size
    found = np.zeros(grid.shape, np.float32)
    planes: dict[int, list[np.ndarray]] = {}
    for contour in contours:
        index = grid.to_index(contour)
        plane = round(float(index[:, 2].mean()))
        if np.abs(index[:, 2] - plane).max() > OFF_PLANE or not 0 <= plane < nz:
            raise InputError("a contour lies in no slice of the series, expected the series that it was drawn on")
        planes.setdefault(plane, []).append(index[:, :2])
    for plane, polygons in planes.items():
        finer = [FINER * (polygon + 0.5) - 0.5 for polygon in polygons]
        inside = _even_odd(finer, FINER * ny, FINER * nx)
        found[plane] = inside.reshape(ny, FINER, nx, FINER).mean(axis=(1, 3))
    return found


def _even_odd(polygons: list[np.ndarray], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Which points (x, y) of a raster lie inside: an odd number of edges crosses their row to the left of them."""
    crossings = np.zeros((height, width + 1), np.int32)
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon.tolist(), np.roll(polygon, -1, axis=0).tolist(), strict=True):
            low, high = (min(max(math.ceil(y), 0), height) for y in sorted((y0, y1)))
            rows = np.arange(low, high)
            x = x0 + (rows - y0) * ((x1 - x0) / (y1 - y0)) if len(rows) else rows
            np.add.at(crossings, (rows, np.clip(np.ceil(x), 0, width).astype(int)), 1)
    inside: np.ndarray = np.cumsum(crossings, axis=1)[:, :-1] % 2 == 1
    return inside


def outlines(values: Float32[np.ndarray, "z y x"], grid: Grid) -> Iterator[tuple[int, Contour]]:
    """The slices, and the contours at a share of one half (mm, LPS), closed without repeating the first point."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    for plane in range(grid.size[2]):
        if padded[plane].max() <= 0.5:
            continue
        for line in contourpy.contour_generator(z=padded[plane]).lines(0.5):
            corners = np.asarray(line)[:-1] - 1
            if len(corners) >= 3:
                yield plane, grid.to_world(np.column_stack([corners, np.full(len(corners), plane)]))


def structure_set(structures: list[Structure], grid: Grid, instances: list[str], onto: Reference) -> Dataset:
    """An RT structure set on the slices of a series; ``instances`` are their SOP instance UIDs in the order of the
    grid."""
    data = new_object(onto, STRUCTURES, "RTSTRUCT", "Structures, carried over by deformable registration")
    data.StructureSetLabel, data.StructureSetDate, data.StructureSetTime = "carried", data.SeriesDate, data.SeriesTime
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = onto.frame, ""
    data.ReferencedFrameOfReferenceSequence = Sequence([_frame(onto)])
    data.StructureSetROISequence, data.ROIContourSequence = Sequence(), Sequence()
    data.RTROIObservationsSequence = Sequence()
    kinds = {uid: kind for kind, uid in onto.instances}
    for number, structure in enumerate(structures, start=1):
        region, drawn, observed = Dataset(), Dataset(), Dataset()
        region.ROINumber, region.ROIName, region.ReferencedFrameOfReferenceUID = number, structure.name, onto.frame
        region.ROIGenerationAlgorithm = "AUTOMATIC"
        drawn.ReferencedROINumber, drawn.ContourSequence = number, Sequence()
        if structure.colour is not None:
            drawn.ROIDisplayColor = structure.colour
        for contour in structure.contours:
            plane = round(float(grid.to_index(contour)[:, 2].mean()))
            item = Dataset()
            item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(contour)
            item.ContourData = [decimal(round(float(v), 4)) for v in contour.ravel()]
            item.ContourImageSequence = references([(kinds[instances[plane]], instances[plane])])
            drawn.ContourSequence.append(item)
        observed.ObservationNumber, observed.ReferencedROINumber = number, number
        observed.RTROIInterpretedType, observed.ROIInterpreter = structure.kind, ""
        data.StructureSetROISequence.append(region)
        data.ROIContourSequence.append(drawn)
        data.RTROIObservationsSequence.append(observed)
    return data


def _frame(of: Reference) -> Dataset:
    item, study, series = Dataset(), Dataset(), Dataset()
    item.FrameOfReferenceUID = of.frame
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", of.header.StudyInstanceUID
    series.SeriesInstanceUID = of.header.SeriesInstanceUID
    series.ContourImageSequence = references(of.instances)
    study.RTReferencedSeriesSequence = Sequence([series])
    item.RTReferencedStudySequence = Sequence([study])
    return item

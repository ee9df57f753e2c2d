"""``lungreg dicom``: writes a result as a Deformable Spatial Registration object, and maps dose to the other scan.

The object's equation (DICOM PS3.3, C.20.3.1) maps a point of the registered frame of reference (the fixed scan) to
the source frame of reference (the moving scan):

    x_source = M_post · (M_pre · x + Δ(M_pre · x))

A result is x ↦ affine(x + u(x)): M_pre is the identity, Δ is u on its grid, M_post is the affine map. Both use
mm along LPS.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float, Float32
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from .. import __version__
from ..errors import InputError
from ..files.dicom import find_series, holds_dicom
from ..files.writing import atomically
from ..geometry import Affine, Grid
from ..results.points import check_new
from ..results.result import Result, Scan

REGISTRATION = "1.2.840.10008.5.1.4.1.1.66.3"
DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
PATIENT = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
MAKER = {"Manufacturer": "lung-registration", "SoftwareVersions": __version__}


@dataclass(frozen=True)
class Reference:
    """The data of a series that an object refers to."""

    header: Dataset
    """The header of one slice, without its pixels."""
    instances: tuple[tuple[str, str], ...]
    """SOP class and instance UID of every slice."""

    @property
    def frame(self) -> str:
        """The UID of the frame of reference."""
        return str(self.header.FrameOfReferenceUID)


def read_reference(folder: Path) -> Reference:
    """The reference data of a DICOM series in a folder; InputError if there is no series, or if it has no frame of
    reference."""
    if not folder.is_dir() or not holds_dicom(folder):
        raise InputError(f"{folder}: is no folder with DICOM files, expected the series that was registered")
    paths = sorted({slice.path for slice in find_series(folder).slices})
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    if "FrameOfReferenceUID" not in headers[0]:
        raise InputError(f"{paths[0]}: has no FrameOfReferenceUID, expected a series with one")
    return Reference(headers[0], tuple((str(of.SOPClassUID), str(of.SOPInstanceUID)) for of in headers))


# --- the registration ------------------------------------------------------------------------------------------------


def registration_object(result: Result, fixed: Reference, moving: Reference) -> Dataset:
    """The registration object from the fixed scan's frame of reference to the moving one's, with the field of the
    result."""
    data = new_object(fixed, REGISTRATION, "REG", "Deformable registration of the lungs")
    data.ContentDate, data.ContentTime = data.SeriesDate, data.SeriesTime
    data.InstanceNumber, data.ContentLabel = 1, "LUNGS"
    data.ContentDescription, data.ContentCreatorName = "displacement of the lungs", ""
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = fixed.frame, ""
    source, registered = Dataset(), Dataset()
    source.SourceFrameOfReferenceUID, registered.SourceFrameOfReferenceUID = moving.frame, fixed.frame
    source.ReferencedImageSequence, registered.ReferencedImageSequence = (
        references(of.instances) for of in (moving, fixed)
    )
    source.RegistrationTypeCodeSequence = Sequence([_code("125024", "DCM", "Image Content-based Alignment")])
    registered.RegistrationTypeCodeSequence = Sequence([_code("125021", "DCM", "Frame of Reference Identity")])
    source.PreDeformationMatrixRegistrationSequence = Sequence([_matrix(Affine(), "RIGID")])
    source.PostDeformationMatrixRegistrationSequence = Sequence([_matrix(result.transform.affine, "AFFINE")])
    field = result.transform.displacement[0].permute(1, 2, 3, 0).contiguous().float().numpy()
    source.DeformableRegistrationGridSequence = Sequence([_grid(result.transform.grid, field)])
    data.DeformableRegistrationSequence = Sequence([registered, source])
    data.ReferencedSeriesSequence = Sequence([_series(of) for of in (fixed,)])
    data.StudiesContainingOtherReferencedInstancesSequence = Sequence([_study(moving)])
    return data


def _grid(grid: Grid, vectors: Float32[np.ndarray, "z y x 3"]) -> Dataset:
    """The grid of vectors: x, y, z for every voxel; x is the fastest axis."""
    direction, item = np.array(grid.direction), Dataset()
    if np.linalg.det(direction) < 0:
        raise InputError(
            "the field lies on a left-handed grid, which DICOM has no way to say, expected a right-handed one"
        )
    item.ImageOrientationPatient = [decimal(v) for v in direction[:, :2].T.ravel()]
    item.ImagePositionPatient = [decimal(v) for v in grid.origin]
    item.GridDimensions, item.GridResolution = list(grid.size), list(grid.spacing)
    item.add_new("VectorGridData", "OF", np.ascontiguousarray(vectors, "<f4").tobytes())
    return item


def _matrix(affine: Affine, kind: str) -> Dataset:
    item, whole = Dataset(), np.eye(4)
    whole[:3, :3], whole[:3, 3] = np.array(affine.matrix), np.array(affine.offset)
    item.FrameOfReferenceTransformationMatrixType = kind
    item.FrameOfReferenceTransformationMatrix = [decimal(v) for v in whole.ravel()]
    return item


def decimal(value: float) -> str:
    """The value as a decimal string, which has 16 characters at most."""
    return next(text for digits in range(16, 0, -1) if len(text := f"{value + 0.0:.{digits}g}") <= 16)


def mapped_by(data: Dataset, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
    """Points of the registered frame of reference mapped to the source frame with the values of the object; for a
    check.

    The nearest voxel of the grid is used; InputError for other kinds of objects.
    """
    items = [item for item in data.DeformableRegistrationSequence if "DeformableRegistrationGridSequence" in item]
    if len(items) != 1:
        raise InputError(f"the object has {len(items)} deformable registrations, expected one")
    before, after = (
        np.array(sequence[0].FrameOfReferenceTransformationMatrix, float).reshape(4, 4)
        for sequence in (
            items[0].PreDeformationMatrixRegistrationSequence,
            items[0].PostDeformationMatrixRegistrationSequence,
        )
    )
    of = items[0].DeformableRegistrationGridSequence[0]
    row, column = np.array(of.ImageOrientationPatient, float).reshape(2, 3)
    axes = np.stack([row, column, np.cross(row, column)], axis=1) * np.array(of.GridResolution)
    nx, ny, nz = of.GridDimensions
    vectors = np.frombuffer(of.VectorGridData, "<f4").reshape(nz, ny, nx, 3)
    there = points_mm @ before[:3, :3].T + before[:3, 3]
    index = np.rint((there - np.array(of.ImagePositionPatient, float)) @ np.linalg.inv(axes).T).astype(int)
    x, y, z = np.clip(index, 0, np.array([nx, ny, nz]) - 1).T
    mapped: np.ndarray = (there + vectors[z, y, x]) @ after[:3, :3].T + after[:3, 3]
    return mapped


# --- dose ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dose:
    """An RT Dose object: the dose in its units (GY), on its grid."""

    data: Dataset
    values: Float32[np.ndarray, "z y x"]
    grid: Grid


def read_dose(path: Path) -> Dose:
    """InputError where it is no dose on an evenly spaced grid."""
    try:
        data = pydicom.dcmread(path)
        row, column = np.array(data.ImageOrientationPatient, float).reshape(2, 3)
        offsets = np.array(data.GridFrameOffsetVector, float)
        values = data.pixel_array.astype(np.float64) * float(data.DoseGridScaling)
        rows, columns = (float(v) for v in data.PixelSpacing)
        position = np.array(data.ImagePositionPatient, float)
    except Exception as error:  # pydicom documents none for damaged files
        raise InputError(f"{path}: cannot be read as an RT Dose ({error}), expected one with a dose grid") from error
    steps = np.diff(offsets)
    if data.SOPClassUID != DOSE or values.ndim != 3 or len(steps) < 1 or np.ptp(steps) > 0.01 or abs(steps[0]) < 0.01:
        raise InputError(f"{path}: is no RT Dose of several evenly spaced planes, expected one")
    normal = np.cross(row, column)
    if abs(offsets[0]) > 0.01:  # then these are positions along z (PS3.3, C.8.8.3.2)
        offsets = offsets - offsets[0]
    if steps[0] < 0:
        values, position = values[::-1], position + normal * offsets[-1]
    direction = np.stack([row, column, normal], axis=1)
    a, b, c = ((float(r[0]), float(r[1]), float(r[2])) for r in direction)
    nz, ny, nx = values.shape
    x, y, z = position.tolist()
    grid = Grid((nx, ny, nz), (columns, rows, abs(float(steps[0]))), (x, y, z), (a, b, c))
    return Dose(data, np.ascontiguousarray(values, np.float32), grid)


def carried_dose(dose: Dose, values: Float32[np.ndarray, "z y x"], grid: Grid, onto: Reference) -> Dataset:
    """The dose ``values`` on ``grid``, in the frame of reference of the other scan. 32 bits keep the dose exact."""
    data = new_object(onto, DOSE, "RTDOSE", "Dose, carried over by deformable registration")
    for name in ("DoseUnits", "DoseSummationType", "TissueHeterogeneityCorrection"):
        if name in dose.data:
            setattr(data, name, dose.data.get(name))
    data.DoseType, data.DoseComment = (
        "EFFECTIVE" if dose.data.get("DoseType") == "EFFECTIVE" else "PHYSICAL",
        "deformed",
    )
    data.FrameOfReferenceUID, data.PositionReferenceIndicator, data.InstanceNumber = onto.frame, "", 1
    direction, (nx, ny, nz) = np.array(grid.direction), grid.size
    data.ImagePositionPatient = [decimal(v) for v in grid.origin]
    data.ImageOrientationPatient = [decimal(v) for v in direction[:, :2].T.ravel()]
    data.PixelSpacing = [decimal(grid.spacing[1]), decimal(grid.spacing[0])]
    data.SliceThickness = decimal(grid.spacing[2])
    data.GridFrameOffsetVector = [decimal(grid.spacing[2] * n) for n in range(nz)]
    data.Rows, data.Columns, data.NumberOfFrames = ny, nx, nz
    data.FrameIncrementPointer = 0x3004000C
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 32, 32, 31
    scaling = float(decimal(max(float(values.max()), 1e-6) / (2**32 - 2**10)))
    data.DoseGridScaling = decimal(scaling)
    stored = np.rint(np.maximum(values, 0).astype(np.float64) / scaling).clip(0, 2**32 - 1)
    data.PixelData = np.ascontiguousarray(stored, "<u4").tobytes()
    data["PixelData"].VR = "OW"
    return data


# --- what all objects have -------------------------------------------------------------------------------------------


def new_object(of: Reference, kind: str, modality: str, description: str) -> Dataset:
    """An object in the patient's study, in its own series."""
    data, now = Dataset(), datetime.datetime.now()
    for name in PATIENT:
        setattr(data, name, of.header.get(name, ""))
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = kind, generate_uid(), generate_uid()
    data.Modality, data.SeriesDescription, data.SeriesNumber = modality, description, 1
    data.SeriesDate, data.SeriesTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    data.InstanceCreationDate, data.InstanceCreationTime = data.SeriesDate, data.SeriesTime
    for name, value in MAKER.items():
        setattr(data, name, value)
    return data


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def references(instances: Iterable[tuple[str, str]]) -> Sequence:
    found = Sequence()
    for kind, uid in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, uid
        found.append(item)
    return found


def _series(of: Reference) -> Dataset:
    item = Dataset()
    item.SeriesInstanceUID = of.header.SeriesInstanceUID
    item.ReferencedInstanceSequence = references(of.instances)
    return item


def _study(of: Reference) -> Dataset:
    item = Dataset()
    item.StudyInstanceUID = of.header.StudyInstanceUID
    item.ReferencedSeriesSequence = Sequence([_series(of)])
    return item


def write_object(path: Path, data: Dataset, overwrite: bool = False) -> None:
    """Write a DICOM file, completely or not at all."""
    check_new(path, overwrite)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = data.SOPClassUID, data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    with atomically(path) as stream:
        pydicom.dcmwrite(stream, data, enforce_file_format=True)


def belongs_to(frame: str, fixed: Reference, moving: Reference, told: Scan | None, path: Path) -> Scan:
    """The scan that an object belongs to: ``told``, or the one with its frame of reference. InputError without ``told``
    if neither or both scans have this frame."""
    if told is not None:
        return told
    found: list[Scan] = [scan for scan, of in (("fixed", fixed), ("moving", moving)) if of.frame == frame]  # type: ignore[misc]
    if len(found) != 1:
        which = "both scans have" if found else "neither scan has"
        raise InputError(f"{path}: {which} its frame of reference, expected --of fixed or moving")
    return found[0]

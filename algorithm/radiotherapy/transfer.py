"""``lungreg dicom``: writes the registration as an object; maps RT structures and dose to the other scan."""

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files.dicom import Series, find_series
from ..files.images import read_grid
from ..geometry import Grid
from ..results.apply import Resampling, transform_onto
from ..results.result import Result, Scan, read_result
from ..results.scans import check_registered
from .dicomobjects import belongs_to, carried_dose, read_dose, read_reference, registration_object, write_object
from .structuresets import Structure, outlines, read_structures, shares, structure_set


def write_dicom(
    folder: Path, out: Path, fixed: Path, moving: Path, rtstruct: Path | None, rtdose: Path | None, of: Scan | None
) -> str:
    """Write registration.dcm, and structures.dcm and dose.dcm if wanted, into a new folder; returns a summary.

    InputError for mistakes that the user can correct, before anything is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already, expected a new folder, or an empty one")
    result = read_result(folder)
    series: dict[Scan, Path] = {"fixed": fixed, "moving": moving}
    for scan, place in series.items():
        check_registered(place, read_grid(place), result, scan)
    ends = read_reference(fixed), read_reference(moving)
    objects = {"registration.dcm": registration_object(result, *ends)}
    said = ["registration.dcm: from the fixed scan's frame of reference to the moving one's"]
    if rtstruct is not None:
        structures = read_structures(rtstruct)
        scan = belongs_to(structures.frame, *ends, of, rtstruct)
        carried, words = _carried(folder, result, structures.structures, scan, series)
        onto: Scan = "fixed" if scan == "moving" else "moving"
        there = find_series(series[onto])
        objects["structures.dcm"] = structure_set(
            carried, read_grid(series[onto]), _instances(there), ends[onto == "moving"]
        )
        said.append(f"structures.dcm: of the {scan} scan, on the {onto} one: {words}")
    if rtdose is not None:
        dose = read_dose(rtdose)
        scan = belongs_to(str(dose.data.FrameOfReferenceUID), *ends, of, rtdose)
        onto = "fixed" if scan == "moving" else "moving"
        target = _with_voxels(read_grid(series[onto]), dose.grid)
        resampling = Resampling(transform_onto(folder, result, onto), target, "linear", 0.0)
        objects["dose.dcm"] = carried_dose(dose, resampling(dose.values, dose.grid), target, ends[onto == "moving"])
        said.append(f"dose.dcm: of the {scan} scan, on the {onto} one, at most {float(dose.values.max()):.2f} before")
    out.mkdir(parents=True, exist_ok=True)
    for name, data in objects.items():
        write_object(out / name, data)
    return "\n".join(said)


def _instances(series: Series) -> list[str]:
    return [header.tags["0008|0018"] for header in series.slices]


def _carried(
    folder: Path, result: Result, structures: list[Structure], scan: Scan, series: dict[Scan, Path]
) -> tuple[list[Structure], str]:
    """The structures on the slices of the other scan, and text with their volumes before and after."""
    onto: Scan = "fixed" if scan == "moving" else "moving"
    source, target = read_grid(series[scan]), read_grid(series[onto])
    resampling = Resampling(transform_onto(folder, result, onto), target, "linear", 0.0)
    carried, words = [], []
    for structure in structures:
        before = shares(structure.contours, source)
        after = resampling(before, source).astype(np.float32)
        contours = [contour for _, contour in outlines(after, target)]
        carried.append(Structure(structure.name, contours, structure.colour, structure.kind))
        volumes = (float(of.sum() * np.prod(grid.spacing)) / 1000 for of, grid in ((before, source), (after, target)))
        words.append("{} {:.2f} → {:.2f} ml".format(structure.name, *volumes))
    return carried, "; ".join(words)


def _with_voxels(box: Grid, of: Grid) -> Grid:
    """The box of a scan, with the voxel size of the dose."""
    x, y, z = (max(2, round(extent / s)) for extent, s in zip(box.extent_mm, of.spacing, strict=True))
    return box.resized((x, y, z))

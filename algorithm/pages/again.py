"""``lungreg report``: report.html of a result that lies in a folder, made from its files and the two scans."""

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..fields.transform import Transform
from ..files.images import Image, canonical, read_image
from ..geometry import Affine, Grid, with_affine
from ..lungs import LungMask, lung_mask
from ..preparation.intensities import in_hounsfield_units
from ..preparation.subject import Subject
from ..results.outputs import sole_writer
from ..results.ownership import OWN_ENTRIES, PAGE, PAGE_MARK, check_page
from ..results.result import Result, Scan, read_result, scan_path
from ..results.texts import write_text
from .page import registration_page
from .view import Pair

SAME_VOXEL = 1e-2
"""So far apart, in voxels, a scan's voxels may lie from where results.json says; headers of NIfTI round."""


def write_page_again(folder: Path, fixed: Path | None = None, moving: Path | None = None) -> Path:
    """Writes report.html into the folder of a result, in place of an earlier one of ours; its path.

    ``fixed`` and ``moving`` are the scans, where they are not any more where the registration found them. InputError
    where the folder holds no result, the scans are missing or others, or a report.html that is none of ours is there.
    """
    result, page = read_result(folder), folder / PAGE
    if missing := OWN_ENTRIES - result.figures.keys():
        raise InputError(f"{folder}: results.json has no {', '.join(sorted(missing))}, expected that of a registration")
    fixed = scan_path(folder, result.figures, "fixed", fixed)
    moving = scan_path(folder, result.figures, "moving", moving)
    check_page(page, (fixed, moving))
    scans = (
        _subject(result, "fixed", fixed, result.fixed_lungs),
        _subject(result, "moving", moving, result.moving_lungs),
    )
    text = registration_page(Pair(*scans, _transform(result), result.expected), result.figures, PAGE_MARK)
    with sole_writer(folder):
        check_page(page, (fixed, moving))  # again: it may have come in the meantime
        write_text(page, text)
    return page


def _subject(result: Result, of: Scan, path: Path, lungs: LungMask | None) -> Subject:
    """A scan with the lungs that the result kept, or else those that its HU show."""
    read = read_image(path)
    _check_same(read, result.grid(of), of)
    image = in_hounsfield_units(canonical(read))
    return Subject(image, lungs or lung_mask(image.voxels, image.grid, str(path)))


def _check_same(image: Image, grid: Grid, of: Scan) -> None:
    """InputError where a scan does not lie where that of the registration did."""
    last = np.array(grid.size) - 1
    corners = np.array(list(np.ndindex(2, 2, 2))) * last
    apart = np.abs(image.grid.to_index(grid.to_world(corners)) - corners).max()
    if image.grid.size != grid.size or not apart <= SAME_VOXEL:
        raise InputError(
            f"{image.path}: has {image.grid.size} voxels of {image.grid.spacing} mm from {image.grid.origin} mm on, "
            f"expected the {of} scan, which had {grid.size} of {grid.spacing} mm from {grid.origin} mm on"
        )


def _transform(result: Result) -> Transform:
    """With the affine map of the pre-alignment apart also where only the whole field was kept: where the scans lie far
    apart, the page compares them after that."""
    transform, said = result.transform, result.figures.get("prealignment")
    if transform.affine != Affine() or said is None:
        return transform
    affine = Affine.from_arrays(np.array(said["matrix"]), np.array(said["offset"]))
    displacement = with_affine(transform.displacement, transform.grid, affine.inverse())
    return Transform(displacement, transform.grid, affine)

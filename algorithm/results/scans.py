"""The two scans of a result, read again."""

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files.images import canonical, read_image
from ..geometry import Grid
from ..preparation.intensities import in_hounsfield_units
from ..preparation.subject import Subject, find_lungs
from .result import Result, Scan, scan_path

SAME_MM = 0.01
"""Distance (mm) that the corners of a scan may have from where results.json says. Headers of NIfTI are rounded."""


def registered_scan(folder: Path, result: Result, of: Scan, given: Path | None, mask: Path | None = None) -> Subject:
    """One of the two scans in HU, with its lungs: from ``mask``, else as the result kept them, else from the HU.

    ``given`` is the scan where it is no longer at the place that results.json names. InputError where it is missing or
    is another scan.
    """
    image = read_image(scan_path(folder, result.figures, of, given))
    check_registered(image.path, image.grid, result, of)
    lungs = result.fixed_lungs if of == "fixed" else result.moving_lungs
    if mask is None and lungs is not None:
        return Subject(in_hounsfield_units(canonical(image)), lungs)
    return find_lungs(image, mask)


def check_registered(path: Path, grid: Grid, result: Result, of: Scan) -> None:
    """InputError where the scan at ``path`` does not lie where that of the registration did."""
    kept = result.grid(of)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(kept.size) - 1)
    if grid.size != kept.size or not np.abs(grid.to_world(corners) - kept.to_world(corners)).max() <= SAME_MM:
        raise InputError(
            f"{path}: lies on another grid than the {of} scan that was registered: {grid.size} voxels of "
            f"{grid.spacing} mm from {grid.origin} mm on, expected {kept.size} of {kept.spacing} mm from "
            f"{kept.origin} mm on"
        )

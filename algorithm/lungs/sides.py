"""Which lung is which: the mask of both, taken apart."""

import numpy as np
import torch
from jaxtyping import UInt8
from scipy import ndimage
from torch import Tensor

from .mask import LungMask

RIGHT, LEFT, UNKNOWN = 1, 2, 3
"""The patient's. UNKNOWN where there is but one part, which may be both lungs or one."""
STEP_MM, MOST_MM = 2.5, 15.0
"""So far the mask is eroded at most, step by step, until it comes apart."""
SMALLER = 0.15
"""A part counts as a lung from this share of all on."""


def left_and_right(lungs: LungMask) -> UInt8[Tensor, "1 1 z y x"]:
    """0 outside, RIGHT and LEFT (see there), on the grid of the mask.

    Where the lungs touch, the mask is eroded until two large parts are left; every voxel belongs to the nearer one.
    """
    mask = lungs.mask[0, 0].numpy()
    depth = ndimage.distance_transform_edt(mask, sampling=lungs.grid.spacing[::-1])
    labels = np.where(mask, UNKNOWN, 0).astype(np.uint8)
    for least in np.arange(0.0, MOST_MM, STEP_MM):
        parts, _ = ndimage.label(depth > least)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        second, first = np.argsort(sizes)[-2:] if len(sizes) > 2 else (0, 0)
        if sizes[second] > SMALLER * sizes.sum():
            labels = _nearest(lungs, parts, int(first), int(second))
            break
    return torch.from_numpy(labels)[None, None]


def _nearest(lungs: LungMask, parts: np.ndarray, first: int, second: int) -> np.ndarray:
    """By the nearer of two parts. To the patient's left, x grows."""
    grid = lungs.grid
    x = [grid.to_world(np.argwhere(parts == part).mean(axis=0)[::-1])[0] for part in (first, second)]
    right = first if x[0] < x[1] else second
    distances = [
        ndimage.distance_transform_edt(parts != part, sampling=grid.spacing[::-1])
        for part in (right, first + second - right)
    ]
    sides = np.where(distances[0] <= distances[1], RIGHT, LEFT).astype(np.uint8)
    return np.where(lungs.mask[0, 0].numpy(), sides, 0).astype(np.uint8)

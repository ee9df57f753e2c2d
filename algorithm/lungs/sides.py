"""Left and right lung: split the mask of both."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8
from scipy import ndimage
from torch import Tensor

from ..geometry import resample_image
from .mask import LungMask

RIGHT, LEFT, UNKNOWN = 1, 2, 3
"""Labels of the patient's right and left lung. UNKNOWN: the mask has only one part, which may be one lung or both."""
STEP_MM, MOST_MM = 2.5, 15.0
"""Step and maximum of the erosion that splits the mask."""
SMALLER = 0.15
"""Smallest share of the whole that counts as a lung."""
COUNT_MM = 3.0
"""Voxels in which lungs are counted."""


def left_and_right(lungs: LungMask) -> UInt8[Tensor, "1 1 z y x"]:
    """0 outside, `RIGHT`, `LEFT` or `UNKNOWN` inside, on the grid of the mask.

    If the lungs touch, the mask is eroded until it has two large parts. Then every voxel belongs to the nearer part.
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


def is_one_lung(lungs: LungMask) -> bool:
    """Whether a mask has only one large part, also when it is eroded; at about `COUNT_MM`, which is fast."""
    grid = lungs.grid
    sx, sy, sz = (max(1, int(COUNT_MM / 2 / voxel)) for voxel in grid.spacing)
    mask = lungs.mask[:, :, ::sz, ::sy, ::sx]
    nz, ny, nx = mask.shape[2:]
    dx, dy, dz = grid.spacing
    some = replace(grid, size=(nx, ny, nz), spacing=(sx * dx, sy * dy, sz * dz))
    x, y, z = (max(1, round(extent / COUNT_MM)) for extent in some.extent_mm)
    coarse = some.resized((x, y, z))
    closed = resample_image(mask, some, coarse, least=0.0, fill=0.0) > 0.5  # over the gaps between lobes
    return bool((left_and_right(LungMask(closed, coarse)) == UNKNOWN).any())


def _nearest(lungs: LungMask, parts: np.ndarray, first: int, second: int) -> np.ndarray:
    """Labels by the nearer of two parts. x grows towards the patient's left."""
    grid = lungs.grid
    x = [grid.to_world(np.argwhere(parts == part).mean(axis=0)[::-1])[0] for part in (first, second)]
    right = first if x[0] < x[1] else second
    distances = [
        ndimage.distance_transform_edt(parts != part, sampling=grid.spacing[::-1])
        for part in (right, first + second - right)
    ]
    sides = np.where(distances[0] <= distances[1], RIGHT, LEFT).astype(np.uint8)
    return np.where(lungs.mask[0, 0].numpy(), sides, 0).astype(np.uint8)

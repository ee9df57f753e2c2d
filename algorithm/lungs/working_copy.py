"""The scan on a grid of about 2.5 mm, in a storage order close to LPS."""

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..geometry import Grid, canonical_axes, resample, restored

WORKING_SPACING_MM = 2.5
GAS_HU = -960.0
"""Limit for the upper quartile of pure gas (bowel, outside air). Emphysema with a median of -950 has a higher one."""
Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
Walls = NDArray[np.int8]


def working_copy(voxels: Tensor, grid: Grid) -> tuple[Array, Mask, Grid]:
    """HU, padding and their isotropic grid in LPS order. Blocks are averaged first: the full scan is never float."""
    hu, grid = _block_means(voxels[0, 0].cpu().numpy(), grid)
    (hu, padding), grid = _in_lps_order([hu, _constant_air(hu).astype(np.float32)], grid)
    nx, ny, nz = (max(1, round(extent / WORKING_SPACING_MM)) for extent in grid.extent_mm)
    working = grid.resized((nx, ny, nz))
    both = resample(torch.from_numpy(np.stack([hu, padding])[None]), grid, working)[0].numpy()
    return both[0], both[1] > 0.5, working


def _block_means(voxels: NDArray, grid: Grid) -> tuple[Array, Grid]:
    """Mean HU of blocks not longer than the working spacing; an incomplete last block is left out.

    Values are first clipped to [-1024, 400]. Otherwise a mean of tissue and padding of -3024 would look like air.
    Clipping also makes every padding constant.
    """
    fx, fy, fz = (min(n, max(1, int(WORKING_SPACING_MM / s))) for n, s in zip(grid.size, grid.spacing, strict=True))
    nx, ny, nz = (n // f for n, f in zip(grid.size, (fx, fy, fz), strict=True))
    hu = np.zeros((nz, ny, nx), dtype=np.float32)
    for z, dz in itertools.product(range(nz), range(fz)):
        plane = np.clip(voxels[z * fz + dz, : ny * fy, : nx * fx], -1024, 400)
        for dy, dx in itertools.product(range(fy), range(fx)):
            hu[z] += plane[dy::fy, dx::fx]
    blocks = grid.cropped((0, 0, 0), (nx * fx, ny * fy, nz * fz)).resized((nx, ny, nz))
    return hu / np.float32(fx * fy * fz), blocks


def _constant_air(hu: Array) -> Mask:
    """Exactly constant air at the image border: padding, or outside air clipped to one value. Real air is noisy."""
    constant = hu < GAS_HU
    for axis in range(3):
        same = np.diff(hu, axis=axis) == 0
        ends = [(0, 0)] * 3
        ends[axis] = (1, 0)
        constant &= np.pad(same, ends, constant_values=True)
        ends[axis] = (0, 1)
        constant &= np.pad(same, ends, constant_values=True)
    regions, _ = ndimage.label(constant)
    at_border = np.zeros(regions.max() + 1, dtype=bool)
    for axis in range(3):
        at_border[np.take(regions, (0, -1), axis=axis)] = True
    padding = (np.bincount(regions.ravel()) >= 50) & at_border
    padding[0] = False
    grown = ndimage.binary_dilation(padding[regions])
    return np.asarray(grown & (hu < GAS_HU))


def _in_lps_order(volumes: list[Array], grid: Grid) -> tuple[list[Array], Grid]:
    """Permute and flip the index axes so that the direction is closest to the identity."""
    axes, flips = canonical_axes(grid)
    order = [2 - axes[a] for a in (2, 1, 0)]
    flipped = tuple(2 - a for a in range(3) if flips[a])
    stored = [np.ascontiguousarray(np.flip(volume.transpose(order), flipped)) for volume in volumes]
    return stored, restored(grid, axes, flips)


def voxels_in(mm: float, spacing: Spacing) -> int:
    """Number of voxels in a length; the working grid is isotropic to a few per cent."""
    return max(1, round(mm / min(spacing)))


def voxel_litres(spacing: Spacing) -> float:
    return float(np.prod(spacing)) * 1e-6

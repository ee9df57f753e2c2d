"""Values of a volume at positions in the world.

This is the only module that calls ``grid_sample``, always with ``align_corners=True``.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .grids import Affine, Grid, Size


def linear_index_map(
    matrix: Float[Tensor, "3 3"], offset: Float[Tensor, " 3"], shape: Size
) -> Float[Tensor, "1 z y x 3"]:
    """``matrix · (i, j, k) + offset`` for every voxel of a (z, y, x) shape; differentiable in both."""
    nz, ny, nx = shape
    i, j, k = (torch.arange(n, dtype=matrix.dtype, device=matrix.device) for n in (nx, ny, nz))
    step_x, step_y, step_z = matrix.unbind(1)
    plane = j[:, None, None] * step_y + i[None, :, None] * step_x + offset
    return (k[:, None, None, None] * step_z + plane)[None]


class IndexMap(NamedTuple):
    """Voxels of one grid → continuous indices of another: matrix · (i, j, k) + offset + steps · u, u in mm."""

    matrix: Float[np.ndarray, "3 3"]
    offset: Float[np.ndarray, " 3"]
    steps: Float[np.ndarray, "3 3"]


def index_map(grid: Grid, moving_grid: Grid, affine: Affine) -> IndexMap:
    """The moving indices of affine(x + u), x on ``grid``; float64."""
    steps = np.linalg.inv(moving_grid.axes) @ np.array(affine.matrix)
    return IndexMap(steps @ grid.axes, moving_grid.to_index(affine(np.array(grid.origin))), steps)


def moving_index(
    grid: Grid, moving_grid: Grid, displacement: Float[Tensor, "n 3 z y x"] | None, affine: Affine, like: Tensor
) -> Float[Tensor, "m zz yy xx 3"]:
    """Continuous moving indices of the points affine(x + u(x)), x on ``grid``. Linear parts are combined in float64."""
    return _mapped(index_map(grid, moving_grid, affine), displacement, grid, like)


def _mapped(
    index_map: IndexMap, displacement: Float[Tensor, "n 3 z y x"] | None, grid: Grid, like: Tensor
) -> Float[Tensor, "m zz yy xx 3"]:
    matrix, offset, steps = (as_tensor(part, like) for part in index_map)
    index = linear_index_map(matrix, offset, grid.shape)
    if displacement is None:
        return index
    return torch.einsum("ij,njzyx->nzyxi", steps, displacement).add_(index)


def sample(
    volume: Float[Tensor, "n c z y x"],
    index: Float[Tensor, "m zz yy xx 3"],
    fill: float | None = None,
    nearest: bool = False,
) -> Float[Tensor, "k c zz yy xx"]:
    """Values of ``volume`` at continuous indices (x, y, z), trilinear or nearest.

    Outside the volume, the value is the border value. With ``fill``, this holds up to half a voxel outside; farther
    out, the value is ``fill``. One of n and m may be 1.
    """
    to_position = as_tensor(_to_position(volume.shape[2:]), index)
    values = _sampled(volume, torch.addcmul(-torch.ones_like(to_position), index, to_position), nearest)
    if fill is None:
        return values
    return torch.where(inside(index, volume.shape[2:])[:, None], values, fill)


def _to_position(shape: Size | torch.Size) -> Float[np.ndarray, " 3"]:
    """Factors (x, y, z) for a (z, y, x) volume: voxel index times factor, minus 1, is the ``grid_sample`` position."""
    sizes = np.array(tuple(shape)[::-1], dtype=float)
    return np.asarray(2 / np.maximum(sizes - 1, 1))


def _sampled(volume: Tensor, position: Float[Tensor, "m zz yy xx 3"], nearest: bool) -> Tensor:
    """Values at ``grid_sample`` positions; one of the two batch sizes may be 1."""
    number = max(volume.shape[0], position.shape[0])
    volume, position = (part.expand(number, -1, -1, -1, -1) for part in (volume, position))
    return _grid_sample(volume, position, "nearest" if nearest else "bilinear")


def inside(index: Float[Tensor, "n z y x 3"], shape: Size | torch.Size) -> Bool[Tensor, "n z y x"]:
    """Whether continuous indices lie in a volume of (z, y, x) voxels. Each voxel is a box around its centre."""
    x, y, z = ((i >= -0.5) & (i < n - 0.5) for i, n in zip(index.unbind(-1), tuple(shape)[::-1], strict=True))
    return x & y & z


def _grid_sample(volume: Tensor, position: Tensor, mode: str) -> Tensor:
    """``grid_sample`` with the project's settings.

    The CPU kernel is parallel over the batch only, so z is split into a batch.
    """
    n, depth, height, width, _ = position.shape
    parts = math.gcd(depth, torch.get_num_threads()) if n == 1 and position.device.type == "cpu" else 1
    split = position.reshape(n * parts, depth // parts, height, width, 3)
    source = volume.expand(parts, -1, -1, -1, -1) if n == 1 else volume
    values = F.grid_sample(source, split, mode=mode, padding_mode="border", align_corners=True)
    channels = volume.shape[1]
    if parts == 1:
        return values
    return values.transpose(0, 1).reshape(1, channels, depth, height, width)


def validity(
    displacement: Float[Tensor, "n 3 z y x"],
    grid: Grid,
    moving_grid: Grid,
    *,
    affine: Affine = Affine(),
) -> Bool[Tensor, "n 1 z y x"]:
    """Whether affine(x + u(x)) lies inside the moving field of view."""
    return inside(moving_index(grid, moving_grid, displacement, affine, displacement), moving_grid.shape)[:, None]


def as_tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def check_shape(volume: Tensor, grid: Grid) -> None:
    if tuple(volume.shape[2:]) != grid.shape:
        raise ValueError(
            f"a volume of (z, y, x) = {tuple(volume.shape[2:])} voxels does not fit a grid of {grid.shape}"
        )

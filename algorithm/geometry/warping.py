"""Warping: the values of a volume at the positions that a displacement field points to."""

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..threads import even_parts, in_parts
from .grids import Affine, Grid, Size, are_parallel, index_steps
from .resampling import resample
from .sampling import check_shape, index_map, moving_index, sample

LEAST_VOXELS = 2**16
"""For fewer voxels the loop does not pay: it may have to be compiled first."""


def warp(
    moving: Float[Tensor, "n c zm ym xm"],
    moving_grid: Grid,
    displacement: Float[Tensor, "m 3 zu yu xu"] | None,
    grid: Grid,
    *,
    displacement_grid: Grid | None = None,
    affine: Affine = Affine(),
    fill: float | None = None,
    nearest: bool = False,
) -> Float[Tensor, "k c z y x"]:
    """``moving(affine(x + u(x)))`` for x on ``grid``; ``displacement`` None means u = 0. Outside: see `sample`.

    u lies on ``grid`` or on its own ``displacement_grid``; then it is interpolated as by `resample`.
    """
    u_grid = displacement_grid or grid
    check_shape(moving, moving_grid)
    if displacement is not None:
        check_shape(displacement, u_grid)
    if not nearest and _loop_does(moving, displacement, u_grid, grid):
        return _by_loop(moving, moving_grid, displacement, u_grid, grid, affine, fill)
    u = None if displacement is None else resample(displacement, u_grid, grid)
    return sample(moving, moving_index(grid, moving_grid, u, affine, moving), fill, nearest)


def _loop_does(moving: Tensor, displacement: Tensor | None, u_grid: Grid, grid: Grid) -> bool:
    """Whether the loop can warp this: batch of 1, float32, on the CPU, no gradient needed, and enough voxels."""
    volumes = [moving] if displacement is None else [moving, displacement]
    return (
        all(v.device.type == "cpu" and v.dtype == torch.float32 and len(v) == 1 for v in volumes)
        and not (torch.is_grad_enabled() and any(v.requires_grad for v in volumes))
        and int(np.prod(grid.size)) >= LEAST_VOXELS
        and are_parallel(u_grid, grid, Affine())
        and has_loop()
    )


@cache
def has_loop() -> bool:
    """Whether numba is installed. This call compiles the loop, or loads it."""
    try:
        from . import warp_loop  # noqa: F401
    except ImportError:
        return False
    return True


def _by_loop(
    moving: Float[Tensor, "1 c zm ym xm"],
    moving_grid: Grid,
    displacement: Float[Tensor, "1 3 zu yu xu"] | None,
    u_grid: Grid,
    grid: Grid,
    affine: Affine,
    fill: float | None,
) -> Float[Tensor, "1 c z y x"]:
    from .warp_loop import warp_rows

    u = np.zeros((3, *u_grid.shape), np.float32) if displacement is None else _array(displacement)
    volume, steps = _array(moving), [np.ascontiguousarray(part) for part in index_map(grid, moving_grid, affine)]
    warped = np.empty((len(volume), *grid.shape), np.float32)
    given: tuple[Any, ...] = (volume, u, *_places(u_grid, grid), *steps, fill is not None, fill or 0.0, warped)

    def rows(_: int, *part: int) -> None:
        warp_rows(*given, *part)

    in_parts(rows, even_parts(grid.size[2] * grid.size[1]))
    return torch.from_numpy(warped)[None]


def _places(source: Grid, target: Grid) -> list[np.ndarray]:
    """For z, y and x of parallel axes: the ``source`` voxel before each ``target`` voxel, and the weight of the next.

    Border values are repeated outside.
    """
    first, steps = source.to_index(np.array(target.origin)), np.diag(index_steps(source, target, Affine()))
    found = []
    for axis in (2, 1, 0):
        index = (first[axis] + steps[axis] * np.arange(target.size[axis])).clip(0, source.size[axis] - 1)
        found += [np.floor(index).astype(np.int64), (index % 1).astype(np.float32)]
    return found


def _array(volume: Float[Tensor, "1 c z y x"]) -> Float[np.ndarray, "c z y x"]:
    return np.ascontiguousarray(volume[0].detach().numpy())


def warp_image(
    image: Tensor, source: Grid, displacement: Float[Tensor, "1 3 z y x"], grid: Grid, *, fill: float
) -> Float[Tensor, "1 1 z y x"]:
    """An image (1 1 z y x, any type) at x + u(x). Like `warp`, but only the needed part is converted to float."""
    (x, y, z), size = _reached(source, displacement, grid)
    part = image[:, :, z : z + size[2], y : y + size[1], x : x + size[0]].float()
    return warp(part, source.cropped((x, y, z), size), displacement, grid, fill=fill)


def _reached(source: Grid, displacement: Float[Tensor, "1 3 z y x"], grid: Grid) -> tuple[Size, Size]:
    """First voxel and size of a part of ``source`` that contains all x + u(x) that lie in the source."""
    matrix, offset, steps = index_map(grid, source, Affine())
    ends = np.array([[torch.min(part), torch.max(part)] for part in displacement[0]]).T  # range of u along x, y, z
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.size) - 1)
    ways = offset + corners @ matrix.T
    moves = np.stack([steps * ends[0], steps * ends[1]])
    low = ways.min(axis=0) + moves.min(axis=0).sum(axis=1)
    high = ways.max(axis=0) + moves.max(axis=0).sum(axis=1)
    last = np.array(source.size) - 1
    x, y, z = np.clip(np.floor(low), 0, last).astype(int).tolist()
    x1, y1, z1 = (np.clip(np.ceil(high), 0, last).astype(int) + 1).tolist()
    return (x, y, z), (x1 - x, y1 - y, z1 - z)

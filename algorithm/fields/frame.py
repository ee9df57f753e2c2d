"""A transform that is defined everywhere: `transform.h5` for other programs.

The field u of a `Transform` lives in a box around the fixed lungs. Outside a field, ITK applies no displacement. So a
field that simply ends has a step at its border, and points outside lose the affine map, too. Here u continues into a
frame around the box and falls to zero in it. The affine map is stored separately. So the transform is continuous, and
outside the frame it is affine.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..geometry import (
    Grid,
    jacobian_determinant,
    resample,
)
from .transform import Transform

LEAST_FRAME_MM = 24.0
"""Minimum width of the frame."""
WIDTHS = 2.0
"""Minimum width of the frame, as a multiple of the largest displacement at its inner side. The slope of the falling
weight is at most 1.5 per width, so no length changes by more than three quarters."""
FRAME_ATTEMPTS = 3
"""Maximum number of attempts. If the field folds in the frame, the next frame is wider by a half."""
MOST_VOXELS = 1_500_000
"""Approximate maximum number of voxels of the grid of v. They take about a second."""


def framed(transform: Transform) -> Transform:
    """The same transform in the box of its field; in a frame around it, u falls to zero."""
    u = transform.displacement
    faces = [u.select(axis, end) for axis in (2, 3, 4) for end in (0, -1)]
    width = max(LEAST_FRAME_MM, WIDTHS * max(float(face.norm(dim=1).max()) for face in faces))
    for _ in range(FRAME_ATTEMPTS):
        displacement, grid = _framed(u, transform.grid, width)
        coarser = coarse(grid)
        if jacobian_determinant(resample(displacement, grid, coarser), coarser).min() > 0:
            break
        width *= 1.5
    return Transform(displacement, grid, transform.affine)


def _framed(u: Float[Tensor, "1 3 z y x"], grid: Grid, width_mm: float) -> tuple[Float[Tensor, "1 3 zf yf xf"], Grid]:
    """u on a grid with a frame of this width. In the frame it has its border values, times a falling weight."""
    x, y, z = (math.ceil(width_mm / spacing) for spacing in grid.spacing)
    nx, ny, nz = grid.size
    outer = grid.cropped((-x, -y, -z), (nx + 2 * x, ny + 2 * y, nz + 2 * z))
    result = F.pad(u, (x, x, y, y, z, z), mode="replicate")
    for axis, (n, frame) in enumerate(((nx, x), (ny, y), (nz, z))):
        along = [1] * 5
        along[4 - axis] = -1
        result *= _falling(n, frame).to(u).reshape(along)
    return result, outer


def _falling(n: int, frame: int) -> Float[Tensor, " m"]:
    """Weights: 1 for ``n`` voxels, and 1 - 3t² + 2t³ in the ``frame`` voxels on either side, 0 at the outermost."""
    t = torch.arange(1, frame + 1, dtype=torch.float64) / frame
    fall = 1 - t**2 * (3 - 2 * t)
    return torch.cat([fall.flip(0), torch.ones(n, dtype=torch.float64), fall])


def coarse(grid: Grid, most_voxels: int = MOST_VOXELS) -> Grid:
    """The grid, or about ``most_voxels`` voxels between the same outermost voxel centres."""
    factor = (math.prod(grid.size) / most_voxels) ** (1 / 3)
    return grid if factor <= 1 else in_steps(grid, [math.ceil((n - 1) / factor) for n in grid.size])


def in_steps(grid: Grid, steps: list[int]) -> Grid:
    """A grid with ``steps`` steps along each axis between the outermost voxel centres, which do not move."""
    x, y, z = steps
    sx, sy, sz = ((n - 1) * s / step for n, s, step in zip(grid.size, grid.spacing, steps, strict=True))
    return Grid((x + 1, y + 1, z + 1), (sx, sy, sz), grid.origin, grid.direction)

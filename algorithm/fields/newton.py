"""A displacement field at points and its derivative; the inverse at single points by Newton steps."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..geometry import Grid, displacement_at, sample

NEWTON_STEPS = 2
"""Newton steps for v. More steps would change only e."""
CLOSE_MM = 0.05
"""Maximum distance of a point from its target after the Newton steps."""
PARTS = 64
"""Number of parts along z in which points are looked up; `sample` shares them among the threads."""
MOST_DOUBLE = 2**26
"""Maximum number of values that are converted to double precision at once."""

Displacement = tuple[Float[Tensor, "1 3 _ _ _"], Grid]
"""In mm, on a grid."""


def displaced(
    points_mm: Float[np.ndarray, "p 3"], displacement: Float[Tensor, "1 3 z y x"], grid: Grid
) -> Float[np.ndarray, "p 3"]:
    """x + u(x), in double precision unless the field is too large (`MOST_DOUBLE`)."""
    points = torch.from_numpy(np.asarray(points_mm, np.float64))
    u = displacement if displacement.numel() > MOST_DOUBLE else displacement.double()
    result: np.ndarray = (points + displacement_at(points, u, grid)).numpy()
    return result


def undone(
    targets_mm: Float[Tensor, "p 3"],
    displacement: Displacement,
    slope: tuple[Float[Tensor, "1 9 _ _ _"], Grid],
    start_mm: Float[Tensor, "p 3"],
    steps: int = NEWTON_STEPS,
    close_mm: float = CLOSE_MM,
) -> Float[Tensor, "p 3"]:
    """The points p with p + u(p) = target, by Newton's method from ``start_mm``.

    ``slope`` is the `derivative`, on any grid: interpolated central differences. So each step leaves a small share of
    the error. Points that are not within ``close_mm`` after the last step start again with half-steps. These need more
    iterations, but they converge from anywhere where the eigenvalues of I + ∇u lie between 0 and 4.
    """
    points = start_mm
    for _ in range(steps):
        rest = targets_mm - points - at_points(points, *displacement)
        points = points + _solved(at_points(points, *slope).reshape(-1, 3, 3).to(rest), rest)
    rest = targets_mm - points - at_points(points, *displacement)
    astray = ~(rest.norm(dim=1) < close_mm)
    if astray.any():
        points[astray] = _by_half_steps(targets_mm[astray], displacement, close_mm)
    return points


def _by_half_steps(
    targets_mm: Float[Tensor, "p 3"], displacement: Displacement, close_mm: float, steps: int = 200
) -> Float[Tensor, "p 3"]:
    points = targets_mm
    for _ in range(steps):
        rest = targets_mm - points - at_points(points, *displacement)
        points = points + rest / 2
        if float(rest.norm(dim=1).max()) < close_mm:
            break
    return points


def derivative(u: Float[Tensor, "1 3 z y x"], grid: Grid) -> Float[Tensor, "1 9 z y x"]:
    """I + ∇u by central differences, with entries row by row: ∂x/∂x, ∂x/∂y, ..., ∂z/∂z."""
    by_index = torch.stack([torch.gradient(u, dim=dim)[0] for dim in (-1, -2, -3)], dim=2)
    to_index = torch.tensor(np.linalg.inv(grid.axes), dtype=u.dtype, device=u.device)
    derivative = torch.einsum("ncizyx,ij->ncjzyx", by_index, to_index)
    return (derivative + torch.eye(3).to(u).reshape(1, 3, 3, 1, 1, 1)).flatten(1, 2)


def at_points(points_mm: Float[Tensor, "p 3"], volume: Float[Tensor, "1 c z y x"], grid: Grid) -> Float[Tensor, "p c"]:
    """Trilinear values at world points."""
    to_index = torch.tensor(np.linalg.inv(grid.axes), dtype=torch.float64)
    index = ((points_mm.double() - torch.tensor(grid.origin, dtype=torch.float64)) @ to_index.T).to(volume)
    whole = F.pad(index, (0, 0, 0, -len(index) % PARTS))
    return sample(volume, whole.reshape(1, PARTS, 1, -1, 3))[0].flatten(1).T[: len(index)]


def _solved(matrices: Float[Tensor, "p 3 3"], right: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
    """Solutions of 3 × 3 systems by cross products, much faster than a factorisation of each."""
    a, b, c = matrices.unbind(1)
    bc, ca, ab = torch.cross(b, c, dim=1), torch.cross(c, a, dim=1), torch.cross(a, b, dim=1)
    determinant = (a * bc).sum(dim=1, keepdim=True)
    x, y, z = right.unbind(1)
    return (bc * x[:, None] + ca * y[:, None] + ab * z[:, None]) / determinant

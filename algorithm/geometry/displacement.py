"""Displacement fields: composition, inverse, Jacobian determinant."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .grids import Affine, Grid
from .sampling import as_tensor, sample
from .warping import warp


def compose(
    first: Float[Tensor, "n 3 z y x"], first_grid: Grid, then: Float[Tensor, "n 3 zt yt xt"], then_grid: Grid
) -> Float[Tensor, "n 3 z y x"]:
    """The field of x ↦ y + then(y), y = x + first(x), on ``first_grid``: first(x) + then(x + first(x)).

    In the cascade, ``then`` is the field of the levels before, and ``first`` is the prediction of the new level for the
    already warped image: warped(x + first(x)) = moving(x + first(x) + then(x + first(x))).
    """
    return first + warp(then, then_grid, first, first_grid)


def with_affine(displacement: Float[Tensor, "n 3 z y x"], grid: Grid, affine: Affine) -> Float[Tensor, "n 3 z y x"]:
    """The displacement affine(x + u(x)) - x of the whole transform."""
    growth = np.array(affine.matrix) - np.eye(3)
    start = growth @ np.array(grid.origin) + np.array(affine.offset)
    along_x, along_y, along_z = (
        as_tensor(np.outer(step, np.arange(n)), displacement)
        for step, n in zip((growth @ grid.axes).T, grid.size, strict=True)
    )
    plane = (along_y[:, :, None] + along_x[:, None, :] + as_tensor(start, displacement)[:, None, None])[:, None]
    return _apply(np.array(affine.matrix), displacement).add_(plane).add_(along_z[:, :, None, None])


def invert(
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    target: Grid,
    affine: Affine = Affine(),
    iterations: int = 30,
) -> Float[Tensor, "1 3 zt yt xt"]:
    """The field w on ``target`` for which x ↦ affine(x + w(x)) undoes y ↦ affine⁻¹(y + u(y)), u on ``grid``.

    With A the linear part, w(x) = -A⁻¹ u(affine(x + w(x))). This equation is solved by a fixed-point iteration with
    half-steps, which converges where the eigenvalues of I + ∇u lie between 0 and 4. Outside its grid, u has its border
    values.
    """
    back = np.linalg.inv(np.array(affine.matrix))
    inverse = torch.zeros(1, 3, *target.shape, dtype=displacement.dtype, device=displacement.device)
    for _ in range(iterations):
        inverse = (inverse - _apply(back, warp(displacement, grid, inverse, target, affine=affine))) / 2
    return inverse


def displacement_at(
    points_mm: Float[Tensor, "p 3"], displacement: Float[Tensor, "1 3 z y x"], grid: Grid
) -> Float[Tensor, "p 3"]:
    """u (mm) at world points (mm), trilinear; differentiable in the field."""
    index = torch.from_numpy(grid.to_index(points_mm.detach().cpu().numpy())).to(displacement)
    return sample(displacement, index[None, None, None])[0, :, 0, 0].T


def lengths(vectors: Float[Tensor, "n 3 z y x"]) -> Float[Tensor, "n 1 z y x"]:
    """Length of every vector, in the unit of its components. Much faster than ``norm``, which strides over memory."""
    x, y, z = vectors.split(1, dim=1)
    return torch.addcmul(torch.addcmul(x * x, y, y), z, z).sqrt()


def index_displacement(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """The same displacement in voxels along the index axes."""
    return _apply(np.linalg.inv(grid.axes), displacement)


def world_displacement(voxels: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """World displacements in mm, from displacements in voxels along the index axes."""
    return _apply(grid.axes, voxels)


def jacobian_determinant(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n z y x"]:
    """det(I + ∇u) at every voxel: central differences inside, one-sided at the border.

    It is computed in index space, where the direction matrix cancels: det(I + ∂v/∂i), with v the displacement in
    voxels. A folding is a value ≤ 0. Needs at least two voxels along each axis.
    """
    voxels = index_displacement(displacement, grid)
    # rows: derivatives along x, y, z; columns: components
    rows = [torch.gradient(voxels, dim=dim)[0] for dim in (-1, -2, -3)]
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(1) for row in rows)
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _apply(matrix: np.ndarray, vectors: Float[Tensor, "n 3 z y x"]) -> Float[Tensor, "n 3 z y x"]:
    return torch.einsum("ij,njzyx->nizyx", as_tensor(matrix, vectors), vectors)

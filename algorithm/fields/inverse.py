"""The inverse of a transform that is defined everywhere (`.frame`): `inverse.h5` for other programs.

The inverse of x ↦ A(x + u(x)) is y ↦ z + v(z), z = A⁻¹(y): v undoes u, in the same world and the same box. u is
trilinear, so it has edges (jumps of its derivative) at its voxels. The inverse has its edges where u carries these, and
no grid can follow them. So the inverse has two parts: first W, which undoes a smooth field s through the voxels of u,
then a displacement p of the points of the fixed world, where the edges lie on the grid of u.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry import (
    Affine,
    Grid,
    linear_index_map,
    resample,
    resample_image,
    warp,
    with_affine,
)
from ..lungs import LungMask
from .frame import coarse, in_steps
from .newton import Displacement, at_points, derivative, displaced, undone
from .transform import Transform

FINE_MM = 1.35
"""Approximate spacing of the grids of e and p, which subdivide the grids of v and u."""
SHARE = 0.6
"""Share of the error in the middle of a cell that is added at its corners."""
DEFECT_STEPS = 2

MOST_PROBES = 200_000
"""Approximate number of points in the lungs at which the residual is measured."""


@dataclass(frozen=True)
class Inverse:
    """y ↦ x + p(x), x = W(z), z = affine(y), from the moving to the fixed world; W(z) = z' + v(z') with z' = z + e(z).

    v undoes u at the voxels of a coarse grid. Between them it is trilinear, which leaves an error of a few tenths of a
    mm. e and p correct this error. They are zero except in the lungs, so they need little memory.
    """

    edges: Displacement
    """p."""
    rough: Displacement
    """v."""
    rest: Displacement
    """e."""
    affine: Affine
    """The inverse of the transform's affine map."""

    def field(self, grid: Grid) -> Float[Tensor, "1 3 z y x"]:
        """The displacement (mm) on any grid of the moving world."""
        forward = torch.tensor(np.linalg.inv(np.array(self.affine.matrix)), dtype=torch.float32)
        none = torch.zeros(1, 3, *grid.shape)
        found = none
        for displacement, its_grid in (self.rest, self.rough, self.edges):
            before = torch.einsum("ij,njzyx->nizyx", forward, found)  # the displacement before the affine map
            found = found + warp(displacement, its_grid, before, grid, affine=self.affine)
        return found + with_affine(none, grid, self.affine)

    def __call__(self, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
        """Map points of the moving scan to the fixed scan (mm, LPS)."""
        points = self.affine(points_mm)
        for part in (self.rest, self.rough, self.edges):
            points = displaced(points, *part)
        return points


def inverse(transform: Transform, lungs: LungMask) -> Inverse:
    """The inverse of a `framed` transform. It is most accurate in the moving ``lungs``."""
    return inverse_and_residual(transform, lungs)[0]


def inverse_and_residual(transform: Transform, lungs: LungMask) -> tuple[Inverse, Float[np.ndarray, " p"]]:
    """`inverse`, and its `residual_mm`."""
    smooth = _smooth(transform, lungs)
    rough = _rough(transform, smooth, lungs)
    rest = _rest(smooth, rough, lungs)
    found = Inverse(_edges(transform, smooth, rough, rest, lungs), rough, rest, transform.affine.inverse())
    return found, residual_mm(transform, found, lungs)


def _rough(transform: Transform, smooth: Transform, lungs: LungMask) -> Displacement:
    """v: it undoes u at the voxels of a coarse grid, but around the lungs it undoes s.

    This keeps e small, above all at its own edges.
    """
    u, grid = transform.displacement, transform.grid
    coarser = coarse(grid)
    points, there = _positions(coarser), resample(u, grid, coarser)
    slope = derivative(there, coarser), coarser
    undo = undone(points, (u, grid), slope, points - there[0].flatten(1).T)
    near = _near(lungs, coarser, transform.affine).flatten()
    undo[near] = undone(points[near], (smooth.displacement, smooth.grid), slope, undo[near])
    return (undo - points).T.reshape(1, 3, *coarser.shape), coarser


def _smooth(transform: Transform, lungs: LungMask) -> Transform:
    """The transform with s in place of u, on the subdivided part of its grid that contains the lungs.

    s is made of cubic splines through the voxels of u.
    """
    from scipy.interpolate import make_interp_spline  # takes half a second to load, and most runs need no inverse

    part = _part(transform.grid, _carried(lungs, transform))
    fine = _subdivided(part)
    u = resample(transform.displacement, transform.grid, part)
    x, y, z = (
        torch.from_numpy(make_interp_spline(np.arange(n), np.eye(n), k=3)(np.linspace(0, n - 1, m))).to(u)
        for n, m in zip(part.size, fine.size, strict=True)
    )
    return Transform(y @ torch.einsum("ts,ncsyx->nctyx", z, u) @ x.T, fine, transform.affine)


def _rest(smooth: Transform, rough: Displacement, lungs: LungMask) -> Displacement:
    """e, such that p = z + e(z) + v(z + e(z)) equals z - s(p) at the voxels around the lungs.

    The map from z to p + s(p) is nearly the identity. So the remaining error of a point is nearly the correction that
    it needs, and is added to e.
    """
    affine = smooth.affine
    grid = _subdivided(_part(rough[1], _near(lungs, rough[1], affine)))
    near = _near(lungs, grid, affine) & _inner(grid)
    points = _places(grid, near)
    lack = torch.zeros_like(points)
    for _ in range(DEFECT_STEPS):
        there = _displaced(points + lack, rough)
        lack = lack + points - _displaced(there, (smooth.displacement, smooth.grid))
    return _filled(lack, near), grid


def _edges(
    transform: Transform, smooth: Transform, rough: Displacement, rest: Displacement, lungs: LungMask
) -> Displacement:
    """p, such that W undoes u at x + p(x): W(q + u(q)) is x for q = x + p(x).

    Between the voxels, the error of p would then mostly have the same sign. So part of the error in the middle of each
    cell is distributed to the corners, which halves the largest error.
    """
    u, grid = (transform.displacement, transform.grid), smooth.grid

    def missed(points: Tensor, p: Tensor) -> Tensor:
        return points - _displaced(_displaced(_displaced(points + p, u), rest), rough)

    near = _carried(lungs, smooth) & _inner(grid)
    points = _places(grid, near)
    start = smooth.displacement[0, :, near].T - at_points(points, *u)
    p = _filled(start + missed(points, start), near)
    cells = F.avg_pool3d(near[None, None].float(), 2, stride=1)[0, 0] > 0.99  # all the corners are near
    middles = _places(grid, cells, 0.5)
    lack = _filled(missed(middles, at_points(middles, p, grid)), cells)
    return p + SHARE * F.avg_pool3d(F.pad(lack, [1] * 6), 2, stride=1) * near, grid


def _displaced(points_mm: Float[Tensor, "p 3"], displacement: Displacement) -> Float[Tensor, "p 3"]:
    return points_mm + at_points(points_mm, *displacement)


def _subdivided(grid: Grid) -> Grid:
    """The same extent with a spacing of about `FINE_MM`; all voxel centres remain voxel centres."""
    times = max(1, round(max(grid.spacing) / FINE_MM))
    return in_steps(grid, [times * (n - 1) for n in grid.size])


def _part(grid: Grid, near: Bool[Tensor, "z y x"]) -> Grid:
    """The box of the voxels ``near``, one voxel wider on every side; the whole grid, one wider, if there are none."""
    if not near.any():  # the pre-alignment failed
        near = torch.ones_like(near)
    along = (near.any(0).any(0), near.any(0).any(1), near.any(1).any(1))
    (x, x1), (y, y1), (z, z1) = (axis.nonzero()[[0, -1], 0].tolist() for axis in along)
    return grid.cropped((x - 1, y - 1, z - 1), (x1 - x + 3, y1 - y + 3, z1 - z + 3))


def _inner(grid: Grid) -> Bool[Tensor, "z y x"]:
    """All voxels except those at the border."""
    return F.pad(torch.ones([n - 2 for n in grid.shape], dtype=torch.bool), [1] * 6)


def _near(lungs: LungMask, grid: Grid, affine: Affine) -> Bool[Tensor, "z y x"]:
    """The corners of all cells that may contain a point of the pre-aligned moving lungs."""
    return _grown(resample_image(lungs.mask, lungs.grid, grid, affine=affine, least=0.0, fill=0.0))


def _carried(lungs: LungMask, transform: Transform) -> Bool[Tensor, "z y x"]:
    """The corners of all cells of the transform's grid that may contain a point of the moving lungs, carried back."""
    u, grid = transform.displacement, transform.grid
    return _grown(warp(lungs.mask.float(), lungs.grid, u, grid, affine=transform.affine, fill=0.0))


def _grown(share: Float[Tensor, "1 1 z y x"]) -> Bool[Tensor, "z y x"]:
    """The voxels where the share is above 0, and their neighbours."""
    return F.max_pool3d(share, 3, stride=1, padding=1)[0, 0] > 0


def _places(grid: Grid, chosen: Bool[Tensor, "z y x"], shift: float = 0.0) -> Float[Tensor, "p 3"]:
    """World positions of the chosen voxels, moved by ``shift`` voxels along each axis."""
    return torch.from_numpy(grid.to_world(chosen.nonzero().numpy()[:, ::-1] + shift)).float()


def _filled(values: Float[Tensor, "p 3"], chosen: Bool[Tensor, "z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """The values at the chosen voxels, 0 at the others."""
    filled = torch.zeros(1, 3, *chosen.shape)
    filled[0, :, chosen] = values.T
    return filled


def _positions(grid: Grid) -> Float[Tensor, "p 3"]:
    """World positions of all voxel centres; x varies fastest."""
    axes, origin = (torch.tensor(values, dtype=torch.float32) for values in (grid.axes, grid.origin))
    return linear_index_map(axes, origin, grid.shape).reshape(-1, 3)


def residual_mm(transform: Transform, back: Inverse, lungs: LungMask) -> Float[np.ndarray, " p"]:
    """Distance (mm) between points in the moving lungs and the same points after the inverse and the transform."""
    step = math.ceil((lungs.mask.numel() / 10 / MOST_PROBES) ** (1 / 3))
    index = lungs.mask[0, 0, ::step, ::step, ::step].nonzero().numpy()[:, ::-1] * step
    points = lungs.grid.to_world(index)
    there = displaced(back(points), transform.displacement, transform.grid)
    rest: np.ndarray = np.linalg.norm(transform.affine(there) - points, axis=1)
    return rest

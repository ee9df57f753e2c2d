"""A transform for everywhere, and its inverse: what other programs are given as `transform.h5` and `inverse.h5`.

The field u of a `Transform` lives in a box around the fixed lungs. ITK takes no displacement beyond a field, so that
one that simply ends has a step there, and everything outside loses the affine map as well. Here u goes on into a frame
around the box and falls to zero in it; the affine map is kept apart. So the map is continuous and, outside, affine.

The inverse of x ↦ A(x + u(x)) is y ↦ z + v(z), z = A⁻¹(y): v undoes u, in the same world and the same box. u has edges
where its voxels lie, as it is trilinear between them; the inverse has them where these are carried to, which no grid
can follow. So the inverse has two parts: W, which undoes a smooth field s through the voxels of u, and a displacement
p after it, of the points of the fixed world, where the edges lie on the grid of u.
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
    displacement_at,
    jacobian_determinant,
    linear_index_map,
    resample,
    resample_image,
    sample,
    warp,
    with_affine,
)
from ..lungs import LungMask
from .transform import Transform

LEAST_FRAME_MM = 24.0
"""The least width of the frame."""
WIDTHS = 2.0
"""The frame is at least so many times as wide as the largest displacement at its inner side: the fall, of slope 1.5 at
most, then changes no length by more than three quarters."""
FRAME_ATTEMPTS = 3
"""So often the frame is made wider by a half where the field folds in it."""
MOST_VOXELS = 1_500_000
"""Of the grid of v: so many take about a second."""
FINE_MM = 1.35
"""The voxels of the grids of v and u are divided into parts of about that length; those are the grids of e and p."""
SHARE = 0.6
"""Of what the middle of a cell misses, so much is added at its corners."""
NEWTON_STEPS = 2
"""For v; more of them change e and nothing else."""
DEFECT_STEPS = 2
CLOSE_MM = 0.05
"""So far from its place a point may end after these steps."""
PARTS = 64
"""Points are looked up in so many parts along z, which `sample` shares among the threads."""
MOST_DOUBLE = 2**26
"""Numbers that are brought to double precision at once."""
MOST_PROBES = 200_000
"""At about so many points in the lungs the residual is looked at."""

Displacement = tuple[Float[Tensor, "1 3 _ _ _"], Grid]
"""In mm, on a grid."""


@dataclass(frozen=True)
class Inverse:
    """y ↦ x + p(x), x = W(z), z = affine(y), from the moving to the fixed world; W(z) is z + v(z), but z + e(z) for z.

    v undoes u at the voxels of a coarse grid; trilinear between them, a few tenths of a mm are left. e and p, which
    make up for them, are zero but in the lungs, and so take little room.
    """

    edges: Displacement
    """p."""
    rough: Displacement
    """v."""
    rest: Displacement
    """e."""
    affine: Affine
    """The inverse of the transform's."""

    def field(self, grid: Grid) -> Float[Tensor, "1 3 z y x"]:
        """The displacement of the points of any grid of the moving world, mm."""
        forward = torch.tensor(np.linalg.inv(np.array(self.affine.matrix)), dtype=torch.float32)
        none = torch.zeros(1, 3, *grid.shape)
        found = none
        for displacement, its_grid in (self.rest, self.rough, self.edges):
            before = torch.einsum("ij,njzyx->nizyx", forward, found)  # what it is before the affine map
            found = found + warp(displacement, its_grid, before, grid, affine=self.affine)
        return found + with_affine(none, grid, self.affine)

    def __call__(self, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
        """Points of the moving scan (mm, LPS) in the fixed one."""
        points = self.affine(points_mm)
        for part in (self.rest, self.rough, self.edges):
            points = moved(points, *part)
        return points


def moved(
    points_mm: Float[np.ndarray, "p 3"], displacement: Float[Tensor, "1 3 z y x"], grid: Grid
) -> Float[np.ndarray, "p 3"]:
    """x + u(x); u is looked up in double precision where there is room for that."""
    points = torch.from_numpy(np.asarray(points_mm, np.float64))
    u = displacement if displacement.numel() > MOST_DOUBLE else displacement.double()
    result: np.ndarray = (points + displacement_at(points, u, grid)).numpy()
    return result


# --- the frame -------------------------------------------------------------------------------------------------------


def framed(transform: Transform) -> Transform:
    """The same map in the box of its field; around it, u falls to zero."""
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
    """u on a grid with a frame of that width, in which it goes on with its border values, times a falling weight."""
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
    """1 for ``n`` voxels; in the ``frame`` voxels on either side 1 - 3t² + 2t³, which is 0 at the last."""
    t = torch.arange(1, frame + 1, dtype=torch.float64) / frame
    fall = 1 - t**2 * (3 - 2 * t)
    return torch.cat([fall.flip(0), torch.ones(n, dtype=torch.float64), fall])


# --- the inverse -----------------------------------------------------------------------------------------------------


def inverse(transform: Transform, lungs: LungMask) -> Inverse:
    """The inverse of a `framed` transform, best in the moving ``lungs``."""
    return inverse_and_residual(transform, lungs)[0]


def inverse_and_residual(transform: Transform, lungs: LungMask) -> tuple[Inverse, Float[np.ndarray, " p"]]:
    """The same, and its `residual_mm`."""
    smooth = _smooth(transform, lungs)
    rough = _rough(transform, smooth, lungs)
    rest = _rest(smooth, rough, lungs)
    found = Inverse(_edges(transform, smooth, rough, rest, lungs), rough, rest, transform.affine.inverse())
    return found, residual_mm(transform, found, lungs)


def _rough(transform: Transform, smooth: Transform, lungs: LungMask) -> Displacement:
    """v, which undoes u at the voxels of a coarse grid, but s around the lungs: then e is small, at its own edges above
    all."""
    u, grid = transform.displacement, transform.grid
    coarser = coarse(grid)
    points, there = _positions(coarser), resample(u, grid, coarser)
    slope = derivative(there, coarser), coarser
    undo = undone(points, (u, grid), slope, points - there[0].flatten(1).T)
    near = _near(lungs, coarser, transform.affine).flatten()
    undo[near] = undone(points[near], (smooth.displacement, smooth.grid), slope, undo[near])
    return (undo - points).T.reshape(1, 3, *coarser.shape), coarser


def _smooth(transform: Transform, lungs: LungMask) -> Transform:
    """The transform with s in place of u, on the subdivided part of its grid that holds the lungs: cubic splines
    through the voxels of u."""
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
    """e, such that p = z + e(z) + v(z + e(z)) is z - s(p) at the voxels around the lungs.

    The map from z to p + s(p) is nearly the identity, so what a point misses is nearly what it lacks.
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

    Between the voxels p would then miss on one side, mostly. So part of what it misses in the middle of each cell is
    shared among the corners, which halves the most that it misses.
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


def coarse(grid: Grid, most_voxels: int = MOST_VOXELS) -> Grid:
    """The grid, or about so many voxels between the same outermost voxel centres."""
    factor = (math.prod(grid.size) / most_voxels) ** (1 / 3)
    return grid if factor <= 1 else _in_steps(grid, [math.ceil((n - 1) / factor) for n in grid.size])


def _in_steps(grid: Grid, steps: list[int]) -> Grid:
    """So many steps along each axis from one outermost voxel centre to the other, which both stay where they are."""
    x, y, z = steps
    sx, sy, sz = ((n - 1) * s / step for n, s, step in zip(grid.size, grid.spacing, steps, strict=True))
    return Grid((x + 1, y + 1, z + 1), (sx, sy, sz), grid.origin, grid.direction)


def _subdivided(grid: Grid) -> Grid:
    """The same extent, in steps of about `FINE_MM`; all voxel centres stay."""
    times = max(1, round(max(grid.spacing) / FINE_MM))
    return _in_steps(grid, [times * (n - 1) for n in grid.size])


def _part(grid: Grid, near: Bool[Tensor, "z y x"]) -> Grid:
    """The part of a grid that is a voxel wider than what is ``near``; around the whole where nothing is."""
    if not near.any():  # the pre-alignment failed
        near = torch.ones_like(near)
    along = (near.any(0).any(0), near.any(0).any(1), near.any(1).any(1))
    (x, x1), (y, y1), (z, z1) = (axis.nonzero()[[0, -1], 0].tolist() for axis in along)
    return grid.cropped((x - 1, y - 1, z - 1), (x1 - x + 3, y1 - y + 3, z1 - z + 3))


def _inner(grid: Grid) -> Bool[Tensor, "z y x"]:
    """All voxels but those at the border."""
    return F.pad(torch.ones([n - 2 for n in grid.shape], dtype=torch.bool), [1] * 6)


def _near(lungs: LungMask, grid: Grid, affine: Affine) -> Bool[Tensor, "z y x"]:
    """The voxels that a point in the moving lungs, pre-aligned, may lie between."""
    return _grown(resample_image(lungs.mask, lungs.grid, grid, affine=affine, least=0.0, fill=0.0))


def _carried(lungs: LungMask, transform: Transform) -> Bool[Tensor, "z y x"]:
    """The voxels of the transform's grid that a point in the moving lungs, carried back, may lie between."""
    u, grid = transform.displacement, transform.grid
    return _grown(warp(lungs.mask.float(), lungs.grid, u, grid, affine=transform.affine, fill=0.0))


def _grown(share: Float[Tensor, "1 1 z y x"]) -> Bool[Tensor, "z y x"]:
    """Where it is above 0, and the voxels around."""
    return F.max_pool3d(share, 3, stride=1, padding=1)[0, 0] > 0


def _places(grid: Grid, chosen: Bool[Tensor, "z y x"], shift: float = 0.0) -> Float[Tensor, "p 3"]:
    """The world positions of the chosen voxels, so many voxels farther along each axis."""
    return torch.from_numpy(grid.to_world(chosen.nonzero().numpy()[:, ::-1] + shift)).float()


def _filled(values: Float[Tensor, "p 3"], chosen: Bool[Tensor, "z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """The values at the chosen voxels, 0 at the others."""
    filled = torch.zeros(1, 3, *chosen.shape)
    filled[0, :, chosen] = values.T
    return filled


def _positions(grid: Grid) -> Float[Tensor, "p 3"]:
    """The world positions of all voxel centres, those along x fastest."""
    axes, origin = (torch.tensor(values, dtype=torch.float32) for values in (grid.axes, grid.origin))
    return linear_index_map(axes, origin, grid.shape).reshape(-1, 3)


def undone(
    targets_mm: Float[Tensor, "p 3"],
    displacement: Displacement,
    slope: tuple[Float[Tensor, "1 9 _ _ _"], Grid],
    start_mm: Float[Tensor, "p 3"],
    steps: int = NEWTON_STEPS,
    close_mm: float = CLOSE_MM,
) -> Float[Tensor, "p 3"]:
    """The points p with p + u(p) = target, by Newton's method from ``start_mm``.

    ``slope`` is the `derivative`, on any grid. It is that of central differences, interpolated, so each step leaves a
    small share of the error. Points that are not within ``close_mm`` after the last step start again by half-steps:
    more of them are needed, but they converge from anywhere where the eigenvalues of I + ∇u lie between 0 and 4.
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
    """I + ∇u by central differences; the entries row by row: ∂x/∂x, ∂x/∂y, ..., ∂z/∂z."""
    by_index = torch.stack([torch.gradient(u, dim=dim)[0] for dim in (-1, -2, -3)], dim=2)
    to_index = torch.tensor(np.linalg.inv(grid.axes), dtype=u.dtype, device=u.device)
    derivative = torch.einsum("ncizyx,ij->ncjzyx", by_index, to_index)
    return (derivative + torch.eye(3).to(u).reshape(1, 3, 3, 1, 1, 1)).flatten(1, 2)


def at_points(points_mm: Float[Tensor, "p 3"], volume: Float[Tensor, "1 c z y x"], grid: Grid) -> Float[Tensor, "p c"]:
    """The values at world points, trilinear."""
    to_index = torch.tensor(np.linalg.inv(grid.axes), dtype=torch.float64)
    index = ((points_mm.double() - torch.tensor(grid.origin, dtype=torch.float64)) @ to_index.T).to(volume)
    whole = F.pad(index, (0, 0, 0, -len(index) % PARTS))
    return sample(volume, whole.reshape(1, PARTS, 1, -1, 3))[0].flatten(1).T[: len(index)]


def _solved(matrices: Float[Tensor, "p 3 3"], right: Float[Tensor, "p 3"]) -> Float[Tensor, "p 3"]:
    """The solutions of 3 × 3 systems by cross products: much faster than a factorisation of each."""
    a, b, c = matrices.unbind(1)
    bc, ca, ab = torch.cross(b, c, dim=1), torch.cross(c, a, dim=1), torch.cross(a, b, dim=1)
    determinant = (a * bc).sum(dim=1, keepdim=True)
    x, y, z = right.unbind(1)
    return (bc * x[:, None] + ca * y[:, None] + ab * z[:, None]) / determinant


def residual_mm(transform: Transform, back: Inverse, lungs: LungMask) -> Float[np.ndarray, " p"]:
    """How far points in the moving lungs end from where they were, after the inverse and the transform (mm)."""
    step = math.ceil((lungs.mask.numel() / 10 / MOST_PROBES) ** (1 / 3))
    index = lungs.mask[0, 0, ::step, ::step, ::step].nonzero().numpy()[:, ::-1] * step
    points = lungs.grid.to_world(index)
    there = moved(back(points), transform.displacement, transform.grid)
    rest: np.ndarray = np.linalg.norm(transform.affine(there) - points, axis=1)
    return rest

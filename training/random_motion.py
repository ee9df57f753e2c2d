"""A random motion of the lungs, exact in both directions and free of folding by construction.

    u = A ∘ exp(v) - id        and back: exp(-v) ∘ A⁻¹ - id

v is a velocity. A is an affine map near the identity: the error of the pre-alignment. exp(v) is the flow of v after
unit time, the composition of 2ⁿ equal small steps (scaling and squaring, Arsigny et al. 2006). Each step is injective,
because its gradient is below `STEEPEST_STEP`. v is drawn from

- the motion of a real pair, scaled to the box of these lungs (`training.real_motion`), or
- the diaphragm: cranio-caudal motion that grows from apex to base by a power law and is stronger at the back, with
  domes that change their shape; the chest wall moves to the front and the sides with it;
- local detail, added to either: cubic B-spline fields on control grids of 96, 48, 24 and 12 mm.

The best affine map over the lungs is removed, from v and again from exp(v), because the cascade gets pre-aligned pairs.
The rest of v is scaled to a random mean length. It is scaled less if v would be longer than `most_motion_mm` anywhere.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import (
    Affine,
    Grid,
    compose,
    index_displacement,
    resample,
    warp,
    with_affine,
    world_displacement,
)

STEEPEST_STEP = 0.3
"""Maximum gradient of one small step, by finite differences; a gradient of 1 would fold."""


@dataclass(frozen=True)
class MotionSettings:
    """Ranges of the random values. Lengths in mm."""

    diaphragm_mm: float = 25.0
    """Maximum cranio-caudal motion of the base, before the affine part is removed."""
    dome: float = 0.0
    """Maximum additional motion of a dome, relative to ``diaphragm_mm``."""
    detail_spacing_mm: tuple[float, ...] = (96.0, 48.0, 24.0, 12.0)
    """Control point distances of the B-spline fields."""
    detail_mm: tuple[float, ...] = (4.0, 2.0, 1.0, 0.45)
    """Standard deviation of the components of these fields. Each is drawn between 0 and twice this value."""
    real: float = 0.0
    """Probability of a real pair's motion in place of the diaphragm."""
    real_detail: float = 0.3
    """Local detail added to a real pair's motion, relative to ``detail_mm``, because real motions are smoothed."""
    mean_motion_mm: tuple[float, float] = (0.8, 10.0)
    """Mean length of v in the lungs, drawn log-uniformly."""
    most_motion_mm: float = 35.0
    """Maximum length of v in the lungs."""
    affine_mm: tuple[float, float] = (2.0, 2.0)
    """Standard deviation of the pre-alignment's error at the surface of the lungs, drawn uniformly."""
    spacing_mm: float = 3.0
    """Minimum voxel spacing of the motion's grid: the image's grid is coarsened until it reaches it."""


@dataclass(frozen=True)
class Motion:
    """Both directions of a motion (mm) on one grid. Each is the inverse of the other to some hundredths of a mm."""

    forward: Float[Tensor, "1 3 z y x"]
    backward: Float[Tensor, "1 3 z y x"]


RealMotions = Float[Tensor, "cases 3 n n n"]
"""Displacements in the box around the lungs. Each component is relative to the box's edge in that direction."""


def load_real_motions(path: Path) -> RealMotions:
    """The fields of all pairs in a file that `training.real_motion` wrote."""
    with np.load(path) as data:
        return torch.from_numpy(data["fields"])


def draw_motion(
    lungs: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    generator: torch.Generator,
    settings: MotionSettings,
    real: RealMotions | None = None,
) -> Motion:
    """A motion of the lungs (mask, 0 to 1) on their ``grid``. Its axes must point about to left, back and head."""
    velocity = _without_affine(_velocity(lungs, grid, generator, settings, real), lungs)
    low, high = (math.log(value) for value in settings.mean_motion_mm)
    length = velocity.norm(dim=1, keepdim=True)[lungs > 0.5]
    scale = math.exp(uniform(generator, low, high)) / float(length.mean())
    velocity = velocity * min(scale, settings.most_motion_mm / float(length.max()))
    forward = flow(velocity, grid)
    rest = _affine_fit(forward, grid, lungs).inverse()
    left = _after(rest, random_affine(grid, generator, uniform(generator, *settings.affine_mm)))
    forward = with_affine(forward, grid, left)
    return Motion(forward, inverted(forward, grid, _before(flow(-velocity, grid), grid, left.inverse())))


def _velocity(
    lungs: Tensor, grid: Grid, generator: torch.Generator, settings: MotionSettings, real: RealMotions | None
) -> Float[Tensor, "1 3 z y x"]:
    if real is not None and uniform(generator) < settings.real:
        main, share = _real(lungs, grid, generator, real), settings.real_detail
    else:
        main, share = _diaphragm(lungs, grid, generator, settings), 1.0
    velocity: Tensor = main + share * random_splines(
        grid, settings.detail_spacing_mm, settings.detail_mm, generator
    ).to(lungs)
    return velocity


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """One number between ``low`` and ``high``."""
    return low + (high - low) * float(torch.rand((), generator=generator))


# ---- the flow


def flow(velocity: Float[Tensor, "1 3 z y x"], grid: Grid) -> Float[Tensor, "1 3 z y x"]:
    """exp(v) - id (mm) for a velocity in mm per unit of time; v is constant beyond the grid."""
    slopes: list[Tensor] = [
        torch.diff(index_displacement(velocity, grid), dim=dim).abs().amax() for dim in (-1, -2, -3)
    ]
    doublings = max(0, math.ceil(math.log2(max(float(max(slopes)), 1e-9) / STEEPEST_STEP)))
    displacement: Tensor = velocity / 2**doublings
    for _ in range(doublings):
        displacement = compose(displacement, grid, displacement, grid)
    return displacement


def inverted(
    displacement: Float[Tensor, "1 3 z y x"], grid: Grid, start: Float[Tensor, "1 3 z y x"], iterations: int = 8
) -> Float[Tensor, "1 3 z y x"]:
    """w with w(x) = -u(x + w(x)), by a fixed-point iteration with half-steps from a ``start`` close to w."""
    inverse = start
    for _ in range(iterations):
        inverse = (inverse - warp(displacement, grid, inverse, grid)) / 2
    return inverse


# ---- random fields


def _unit_coordinates(shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and z from -1 to 1 over the grid, broadcastable."""
    z, y, x = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in shape)
    return x[None, None, :], y[None, :, None], z[:, None, None]


def _real(lungs: Tensor, grid: Grid, generator: torch.Generator, real: RealMotions) -> Float[Tensor, "1 3 z y x"]:
    """The motion of one real pair, or a weighted mean of two, scaled to the box around the lungs.

    It may be mirrored left to right. It is constant beyond the box.
    """
    first, second = torch.randint(len(real), (2,), generator=generator).tolist()
    share = uniform(generator) if uniform(generator) < 0.5 else 0.0
    relative = ((1 - share) * real[first] + share * real[second])[None].to(lungs)
    if uniform(generator) < 0.5:
        relative = relative.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).to(lungs).reshape(1, 3, 1, 1, 1)
    z, y, x = ((lungs[0, 0] > 0.5).any(dim=a).any(dim=b).nonzero().flatten() for a, b in ((1, 1), (0, 1), (0, 0)))
    start = int(x[0]), int(y[0]), int(z[0])
    box = grid.cropped(start, (int(x[-1]) - start[0] + 1, int(y[-1]) - start[1] + 1, int(z[-1]) - start[2] + 1))
    source = box.resized((relative.shape[-1],) * 3)
    voxels = resample(relative, source, grid) * torch.tensor(box.size).to(lungs).reshape(1, 3, 1, 1, 1)
    return world_displacement(voxels, grid)


def _diaphragm(
    lungs: Tensor, grid: Grid, generator: torch.Generator, settings: MotionSettings
) -> Float[Tensor, "1 3 z y x"]:
    """A power law in the height, and a dome in each lung. The grid's x, y, z point about to left, back, head."""
    x, y, z = _unit_coordinates(lungs.shape[2:], lungs)
    depth = ((1 - z) / 2).clamp(0, 1)  # 0 at the apex, 1 at the base
    amplitude = uniform(generator, -1.0, 1.0) * settings.diaphragm_mm
    profile = depth ** uniform(generator, 1.0, 3.0)
    modulation = 1 + uniform(generator, 0.0, 0.5) * y + uniform(generator, -0.3, 0.3) * x
    cranial = amplitude * profile * modulation * (1 - uniform(generator, 0.0, 0.4) * x**2)
    front = amplitude * uniform(generator, 0.0, 0.4) * torch.sin(math.pi * depth) * (y - 1) / 2
    lateral = amplitude * uniform(generator, -0.2, 0.2) * torch.sin(math.pi * depth) * x
    if settings.dome > 0:
        for side in (-0.5, 0.5):
            cranial = cranial + settings.diaphragm_mm * settings.dome * _dome(x, y, depth, side, generator)
    mm = torch.stack([v.expand(lungs.shape[2:]) for v in (lateral, front, cranial)])[None]
    spacing = torch.tensor(grid.spacing, dtype=mm.dtype, device=mm.device).reshape(1, 3, 1, 1, 1)
    return world_displacement(mm / spacing, grid)


def _dome(x: Tensor, y: Tensor, depth: Tensor, side: float, generator: torch.Generator) -> Tensor:
    """A bump in the middle of one lung's base, up or down, between -1 and 1."""
    width = uniform(generator, 0.25, 0.6)
    across = ((x - side - uniform(generator, -0.2, 0.2)) / width).square()
    along = ((y - uniform(generator, -0.4, 0.4)) / width).square()
    bump = uniform(generator, -1.0, 1.0) * torch.exp(-(across + along) / 2)
    return bump * depth ** uniform(generator, 2.0, 5.0)


def random_splines(
    grid: Grid, spacings_mm: tuple[float, ...], deviations_mm: tuple[float, ...], generator: torch.Generator
) -> Float[Tensor, "1 3 z y x"]:
    """Sum of random cubic B-spline fields (mm)."""
    total = torch.zeros(1, 3, *grid.shape)
    for spacing, deviation in zip(spacings_mm, deviations_mm, strict=True):
        z, y, x = (bspline_basis(n, spacing / s) for n, s in zip(grid.size[::-1], grid.spacing[::-1], strict=True))
        control = torch.randn(3, z.shape[1], y.shape[1], x.shape[1], generator=generator)
        # half the variance of the control points remains along each axis
        control = control * (deviation * uniform(generator, 0.0, 2.0) * 2**1.5)
        control = torch.einsum("xi,ckji->ckjx", x, control)
        control = torch.einsum("yj,ckjx->ckyx", y, control)
        total += torch.einsum("zk,ckyx->czyx", z, control)[None]
    return total


def bspline_basis(size: int, knot_spacing: float) -> Float[Tensor, "n k"]:
    """Cubic B-spline weights of k control points, ``knot_spacing`` voxels apart, at n voxels; rows sum to 1."""
    position = torch.arange(size) / knot_spacing + _HALO
    knots = torch.arange(math.ceil((size - 1) / knot_spacing) + 2 * _HALO + 1)
    distance = (position[:, None] - knots[None]).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)


_HALO = 2  # control points beyond the first voxel, so that no weight of a voxel is missing


# ---- affine parts


def _without_affine(displacement: Tensor, lungs: Tensor) -> Tensor:
    """The displacement minus its least-squares affine fit over the lungs."""
    x, y, z = (c.expand(lungs.shape[2:]) for c in _unit_coordinates(lungs.shape[2:], lungs))
    basis = torch.stack([torch.ones_like(x), x, y, z], dim=-1)
    inside = lungs[0, 0] > 0.5
    points, values = basis[inside], displacement[0][:, inside].T
    fit = torch.linalg.solve(points.T @ points, points.T @ values)
    return displacement - torch.einsum("zyxk,kc->czyx", basis, fit)[None]


def _affine_fit(displacement: Float[Tensor, "1 3 z y x"], grid: Grid, lungs: Tensor) -> Affine:
    """The least-squares affine map of x + u(x) over the lungs."""
    z, y, x = (lungs[0, 0] > 0.5).nonzero().cpu().numpy().T
    points = grid.to_world(np.stack([x, y, z], axis=1))
    return Affine.least_squares(points, points + displacement[0, :, z, y, x].T.cpu().double().numpy())


def random_affine(grid: Grid, generator: torch.Generator, deviation_mm: float) -> Affine:
    """A random affine map about the grid's centre. Each coefficient moves the surface by ``deviation_mm`` / 2 (σ)."""
    shift, *columns = (torch.randn(4, 3, generator=generator) * deviation_mm / 2).double().numpy()
    axes = np.array(grid.direction)
    matrix = np.eye(3) + np.column_stack(columns) @ np.diag(2 / np.array(grid.extent_mm)) @ axes.T
    centre = grid.to_world((np.array(grid.size) - 1) / 2)
    return Affine.from_arrays(matrix, shift + centre - matrix @ centre)


def _after(first: Affine, then: Affine) -> Affine:
    """x ↦ then(first(x))."""
    matrix = np.array(then.matrix)
    return Affine.from_arrays(matrix @ np.array(first.matrix), then(np.array(first.offset)))


def _before(displacement: Float[Tensor, "1 3 z y x"], grid: Grid, first: Affine) -> Float[Tensor, "1 3 z y x"]:
    """The displacement of x ↦ y + u(y), y = first(x)."""
    moved = with_affine(torch.zeros_like(displacement), grid, first)
    return compose(moved, grid, displacement, grid)

"""A simulator of breathing: from one scan, a pair with the exact displacement field inside the lungs.

The scan is the moving image M. A random motion u gives the fixed image F(x) = M(x + u(x)), so the exact field is u
itself, without any inversion, and the fixed lungs are the pulled-back mask. What is drawn:

- diaphragm: cranio-caudal motion that grows from apex to base by a power law and is stronger behind; with it the
  chest wall moves to the front and sides;
- local detail: cubic B-spline fields on control grids of 96, 48, 24 and 12 mm;
- from this the best affine map over the lungs is taken away and a small random one added, since the cascade sees
  pre-aligned pairs; the rest is scaled to a drawn mean length;
- sliding: around the lungs the body moves by another, smooth field, and shows soft tissue where they were;
- density by conservation of mass: parenchyma becomes (HU + 1000) · (v · det(I + ∇u))^g - 1000, vessels stay; v is
  the ratio of the lungs' volumes, which the affine part that was taken away would have changed;
- for each image noise, reconstruction kernel, blur along z, an offset in HU; sometimes a truncated field of view.

How long and how rough the motion is was set by real correspondences: `training.motion` shows both.

Only torch and numpy are needed.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, jacobian_determinant, resample, warp, world_displacement
from algorithm.network import AIR_HU, downsample
from training.pairs import TrainingPair

SOFT_TISSUE_HU = 30.0
FAT_HU = -100.0
RIM = 1
"""Voxels around the lung mask that may be part lung."""


@dataclass(frozen=True)
class BreathingSettings:
    """Ranges to draw from. Lengths in mm."""

    diaphragm_mm: float = 25.0
    """Largest cranio-caudal motion of the base, before the affine part is taken away."""
    detail_spacing_mm: tuple[float, ...] = (96.0, 48.0, 24.0, 12.0)
    """Control point distances of the B-spline fields."""
    detail_mm: tuple[float, ...] = (4.0, 2.0, 1.0, 0.45)
    """Standard deviation of their components; each is drawn between 0 and twice this."""
    mean_motion_mm: tuple[float, float] = (0.8, 10.0)
    """Mean length of the motion in the lungs, drawn log-uniformly: breathing at rest to breath-holds."""
    motion_spacing_mm: float = 3.0
    """Motion is drawn on the image's grid, coarsened until its voxels are at least so large."""
    affine_mm: float = 2.0
    """Standard deviation of the pre-alignment's error at the surface of the lungs."""
    least_determinant: float = 0.25
    """The motion is damped until no determinant in the lungs is below."""
    body_mm: float = 5.0
    """Standard deviation of the body's affine motion relative to the lungs', at the surface."""
    volume_ratio: float = 1.35
    """Largest ratio of the lungs' volumes, either way; seen in the density only."""
    noise_hu: float = 30.0
    """Largest standard deviation of the noise."""
    offset_hu: float = 15.0
    truncation: float = 0.1
    """Probability of a field of view that ends within the lungs."""


def simulate(
    scan: Float[Tensor, "1 1 z y x"],
    lungs: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    generator: torch.Generator,
    settings: BreathingSettings = BreathingSettings(),
) -> TrainingPair:
    """A pair from one scan (HU) and its lung mask (0 to 1). All randomness comes from ``generator`` (CPU)."""
    return scanned(deformed(scan, lungs, grid, generator, settings), generator, settings)


def deformed(
    scan: Float[Tensor, "1 1 z y x"],
    lungs: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    generator: torch.Generator,
    settings: BreathingSettings = BreathingSettings(),
) -> TrainingPair:
    """The pair before scanner and reconstruction leave their marks (`scanned`)."""
    coarse_lungs, coarse = lungs, grid
    while min(coarse.spacing) < settings.motion_spacing_mm:
        coarse_lungs, coarse = downsample(coarse_lungs), coarse.coarsened(2)
    inner = motion(coarse_lungs, coarse, generator, settings)
    determinant = _on(grid, jacobian_determinant(inner, coarse)[:, None], coarse)
    displacement = body = _on(grid, inner, coarse)
    fixed_lungs = warp(lungs, grid, displacement, grid, fill=0.0)
    if _uniform(generator) < 0.8:
        sliding = _detail(coarse, (96.0,), (2.0,), generator) + _affine_error(coarse, generator, settings.body_mm)
        body = _on(grid, sliding.to(scan), coarse)
    volume = settings.volume_ratio ** _uniform(generator, -1.0, 1.0)
    density = (volume * determinant.clamp(min=0.2)) ** _uniform(generator, 0.5, 1.2)
    fixed = _pulled(scan, lungs, fixed_lungs, displacement, body, grid, density)
    moving = _truncated(scan, grid, generator) if _uniform(generator) < settings.truncation else scan
    return TrainingPair(fixed, moving, fixed_lungs, lungs, inner, grid, grid, coarse)


def scanned(
    pair: TrainingPair, generator: torch.Generator, settings: BreathingSettings = BreathingSettings()
) -> TrainingPair:
    """The pair with noise, kernel, slice thickness and offset, drawn independently for the two images."""
    fixed, moving = (_scanned(image, generator, settings) for image in (pair.fixed, pair.moving))
    return replace(pair, fixed=fixed, moving=moving)


def _on(grid: Grid, values: Tensor, coarse: Grid) -> Tensor:
    return values if coarse == grid else resample(values, coarse, grid)


def motion(
    lungs: Float[Tensor, "1 1 z y x"], grid: Grid, generator: torch.Generator, settings: BreathingSettings
) -> Float[Tensor, "1 3 z y x"]:
    """Breathing without its affine part, mm; determinants in the lungs at least ``least_determinant``."""
    detail = _detail(grid, settings.detail_spacing_mm, settings.detail_mm, generator).to(lungs)
    displacement = _without_affine(_diaphragm(lungs, grid, generator, settings) + detail, lungs)
    inside = lungs > 0.5
    mean = displacement.norm(dim=1, keepdim=True)[inside].mean()
    low, high = (math.log(value) for value in settings.mean_motion_mm)
    target = math.exp(_uniform(generator, low, high))
    displacement = displacement * (target / float(mean)) + _affine_error(grid, generator, settings.affine_mm).to(lungs)
    near = F.max_pool3d(lungs, 5, stride=1, padding=2)[:, 0] > 0.5
    for _ in range(20):
        if jacobian_determinant(displacement, grid)[near].min() >= settings.least_determinant:
            break
        displacement = 0.85 * displacement
    return displacement


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _unit_coordinates(shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z from -1 to 1 over the grid, broadcastable."""
    z, y, x = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in shape)
    return x[None, None, :], y[None, :, None], z[:, None, None]


def _diaphragm(
    lungs: Tensor, grid: Grid, generator: torch.Generator, settings: BreathingSettings
) -> Float[Tensor, "1 3 z y x"]:
    """Power law in the height; x, y, z of the grid close to left, back, head."""
    x, y, z = _unit_coordinates(lungs.shape[2:], lungs)
    depth = ((1 - z) / 2).clamp(0, 1)  # 0 at the apex, 1 at the base
    amplitude = _uniform(generator, -1.0, 1.0) * settings.diaphragm_mm
    profile = depth ** _uniform(generator, 1.0, 3.0)
    modulation = 1 + _uniform(generator, 0.0, 0.5) * y + _uniform(generator, -0.3, 0.3) * x
    cranial = amplitude * profile * modulation * (1 - _uniform(generator, 0.0, 0.4) * x**2)
    front = amplitude * _uniform(generator, 0.0, 0.4) * torch.sin(math.pi * depth) * (y - 1) / 2
    lateral = amplitude * _uniform(generator, -0.2, 0.2) * torch.sin(math.pi * depth) * x
    mm = torch.stack([v.expand(lungs.shape[2:]) for v in (lateral, front, cranial)])[None]
    return world_displacement(mm / _spacing(grid, mm), grid)


def _spacing(grid: Grid, like: Tensor) -> Tensor:
    return torch.tensor(grid.spacing, dtype=like.dtype, device=like.device).reshape(1, 3, 1, 1, 1)


def _detail(
    grid: Grid, spacings_mm: tuple[float, ...], deviations_mm: tuple[float, ...], generator: torch.Generator
) -> Float[Tensor, "1 3 z y x"]:
    """Sum of random cubic B-spline fields, mm."""
    total = torch.zeros(1, 3, *grid.shape)
    for spacing, deviation in zip(spacings_mm, deviations_mm, strict=True):
        z, y, x = (bspline_basis(n, spacing / s) for n, s in zip(grid.size[::-1], grid.spacing[::-1], strict=True))
        control = torch.randn(3, z.shape[1], y.shape[1], x.shape[1], generator=generator)
        # half the variance of the control points remains along each axis
        control = control * (deviation * _uniform(generator, 0.0, 2.0) * 2**1.5)
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


_HALO = 2  # control points beyond the first voxel, so that every voxel has all its weights


def _without_affine(displacement: Tensor, lungs: Tensor) -> Tensor:
    """The displacement less its least-squares affine fit over the lungs."""
    x, y, z = (c.expand(lungs.shape[2:]) for c in _unit_coordinates(lungs.shape[2:], lungs))
    basis = torch.stack([torch.ones_like(x), x, y, z], dim=-1)
    inside = lungs[0, 0] > 0.5
    points, values = basis[inside], displacement[0][:, inside].T
    fit = torch.linalg.solve(points.T @ points, points.T @ values)
    return displacement - torch.einsum("zyxk,kc->czyx", basis, fit)[None]


def _affine_error(grid: Grid, generator: torch.Generator, deviation_mm: float) -> Float[Tensor, "1 3 z y x"]:
    """A random affine displacement: each coefficient moves the surface by ``deviation_mm`` / 2 (σ)."""
    coefficients = torch.randn(4, 3, generator=generator) * deviation_mm / 2
    x, y, z = _unit_coordinates(torch.Size(grid.shape), coefficients)
    parts = [c.expand(grid.shape) for c in (torch.ones(1, 1, 1), x, y, z)]
    return torch.einsum("zyxk,kc->czyx", torch.stack(parts, dim=-1), coefficients)[None]


def _pulled(
    scan: Tensor, lungs: Tensor, fixed_lungs: Tensor, displacement: Tensor, body: Tensor, grid: Grid, density: Tensor
) -> Float[Tensor, "1 1 z y x"]:
    """M(x + u(x)) with the density of the parenchyma changed; around the lungs, tissue moved by the ``body`` field b.

    With B the body without lungs and L the fixed lungs: M(x + u) + (1 - L(x)) (B(x + b) - B(x + u)). So the lungs and
    their blurred edge, M - B, move by u only, and where b = u the image is M(x + u) throughout.
    """
    alone = _without_lungs(scan, lungs)
    pulled, tissue = warp(torch.cat([scan, alone], dim=1), grid, displacement, grid).split(1, dim=1)
    parenchyma = torch.sigmoid((-500 - pulled) / 60) * fixed_lungs  # vessels and walls keep their density
    pulled = pulled + parenchyma * (pulled - AIR_HU) * (density - 1)
    slid: Tensor = pulled + (1 - fixed_lungs) * (warp(alone, grid, body, grid) - tissue)
    return slid


def _without_lungs(scan: Tensor, lungs: Tensor) -> Tensor:
    """The scan with soft tissue for the lungs, and around them fat for what is darker: voxels that are part lung."""
    around = F.max_pool3d(lungs, 2 * RIM + 1, stride=1, padding=RIM) > 0
    return torch.where(lungs > 0.5, SOFT_TISSUE_HU, torch.where(around, scan.clamp(min=FAT_HU), scan))


def _truncated(scan: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """The scan with up to 15 % of its slices missing at the upper or lower end."""
    missing = int(_uniform(generator, 0.0, 0.15) * grid.size[2])
    scan = scan.clone()
    scan[:, :, slice(0, missing) if _uniform(generator) < 0.5 else slice(grid.size[2] - missing, None)] = AIR_HU
    return scan


def _scanned(image: Tensor, generator: torch.Generator, settings: BreathingSettings) -> Tensor:
    """Noise of random strength and grain, kernel (soft or sharp), blur along z (thick slices), an offset."""
    noise = torch.randn(image.shape, generator=generator).to(image)
    grain = _uniform(generator)
    noise = (1 - grain) * noise + grain * 3 * F.avg_pool3d(noise, 3, stride=1, padding=1)
    draw = _uniform(generator)
    if draw < 0.3:
        image = torch.lerp(image, _mean(image, (3, 3, 3)), _uniform(generator, -0.4, 0.6))
    elif draw < 0.6:
        image = torch.lerp(image, _mean(image, (3, 1, 1)), _uniform(generator))
    strength = settings.noise_hu * _uniform(generator) ** 2
    result: Tensor = image + strength * noise + settings.offset_hu * _uniform(generator, -1.0, 1.0)
    return result


def _mean(image: Tensor, size: tuple[int, int, int]) -> Tensor:
    padding = [n // 2 for n in size]
    return F.avg_pool3d(image, size, stride=1, padding=padding, count_include_pad=False)

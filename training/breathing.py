"""A simulator of breathing: from one scan, a pair with the exact displacement field inside the lungs.

The scan is the moving image M. A random motion u (`training.random_motion`) gives the fixed image F(x) = M(x + u(x)).
So the exact field is u itself, and the fixed lungs are the warped mask. The inverse of the motion is the exact field of
the swapped pair. There are two kinds of breathing, `AT_REST` and `BREATH_HOLD`. Other random effects:

- sliding: around the lungs, the body moves by another, smooth field and shows soft tissue in place of the lungs;
- density by conservation of mass: parenchyma becomes (HU + 1000) · (v · det(I + ∇u))^g - 1000, vessels do not change. v
  is the ratio of the lungs' volumes, which stands for the removed affine part of the motion. In a breath-hold, g may
  vary over the lungs: it is near 0 where air is trapped;
- for each image: noise, reconstruction kernel, blur along z, an offset in HU, sometimes a truncated field of view.

Length and roughness of the motion agree with real correspondences: `training.motion` shows both.

Only torch and numpy are needed.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, downsample, jacobian_determinant, resample, warp, with_affine
from algorithm.hounsfield import AIR_HU
from training.pairs import TrainingPair
from training.random_motion import MotionSettings, RealMotions, draw_motion, random_affine, random_splines, uniform

SOFT_TISSUE_HU = 30.0
FAT_HU = -100.0
RIM = 1
"""Width, in voxels, of the rim around the lung mask whose voxels may be partly lung."""


@dataclass(frozen=True)
class BreathingSettings:
    """Ranges of the random values. Lengths in mm."""

    motion: MotionSettings = field(default_factory=MotionSettings)
    body_mm: float = 5.0
    """Standard deviation of the body's affine motion relative to the lungs, at the surface."""
    volume_ratio: float = 1.35
    """Maximum ratio of the lungs' volumes, in both directions. It changes only the density."""
    trapping: float = 0.0
    """Probability that some regions keep their density."""
    noise_hu: float = 30.0
    """Maximum standard deviation of the noise."""
    offset_hu: float = 15.0
    truncation: float = 0.1
    """Probability of a field of view that ends within the lungs."""


AT_REST = BreathingSettings()
"""Quiet and somewhat deeper breathing."""
BREATH_HOLD = BreathingSettings(
    motion=MotionSettings(
        diaphragm_mm=40.0,
        dome=0.6,
        detail_mm=(5.0, 2.5, 1.0, 0.3),
        real=0.6,
        mean_motion_mm=(2.5, 14.0),
        affine_mm=(1.0, 6.0),
    ),
    body_mm=12.0,
    volume_ratio=1.8,
    trapping=0.5,
    noise_hu=60.0,
    truncation=0.2,
)
"""Full inspiration to full expiration, healthy and emphysematous lungs."""


def simulate(
    scan: Float[Tensor, "1 1 z y x"],
    lungs: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    generator: torch.Generator,
    settings: BreathingSettings = AT_REST,
    real: RealMotions | None = None,
) -> TrainingPair:
    """A pair from one scan (HU) and its lung mask (0 to 1). All randomness comes from ``generator`` (CPU)."""
    return scanned(deformed(scan, lungs, grid, generator, settings, real), generator, settings)


def deformed(
    scan: Float[Tensor, "1 1 z y x"],
    lungs: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    generator: torch.Generator,
    settings: BreathingSettings = AT_REST,
    real: RealMotions | None = None,
) -> TrainingPair:
    """The pair before the effects of scanner and reconstruction (`scanned`)."""
    coarse_lungs, coarse = lungs, grid
    while min(coarse.spacing) < settings.motion.spacing_mm:
        coarse_lungs, coarse = downsample(coarse_lungs), coarse.coarsened(2)
    inner = draw_motion(coarse_lungs, coarse, generator, settings.motion, real)
    determinant = _on(grid, jacobian_determinant(inner.forward, coarse)[:, None], coarse)
    displacement = body = _on(grid, inner.forward, coarse)
    fixed_lungs = warp(lungs, grid, displacement, grid, fill=0.0)
    if uniform(generator) < 0.8:
        sliding = random_splines(coarse, (96.0,), (2.0,), generator)
        body = _on(grid, with_affine(sliding, coarse, random_affine(coarse, generator, settings.body_mm)), coarse)
    density = _density(determinant, coarse, grid, generator, settings)
    fixed = _pulled(scan, lungs, fixed_lungs, displacement, body.to(scan), grid, density)
    moving = _truncated(scan, grid, generator) if uniform(generator) < settings.truncation else scan
    return TrainingPair(fixed, moving, fixed_lungs, lungs, inner.forward, inner.backward, grid, grid, coarse)


def _density(
    determinant: Tensor, coarse: Grid, grid: Grid, generator: torch.Generator, settings: BreathingSettings
) -> Float[Tensor, "1 1 z y x"]:
    """(v · det)^g. With trapped air, g decreases towards 0 in regions of some centimetres."""
    volume = settings.volume_ratio ** uniform(generator, -1.0, 1.0)
    exponent: Tensor | float = uniform(generator, 0.5, 1.2)
    if uniform(generator) < settings.trapping:
        pattern = random_splines(coarse, (60.0,), (1.0,), generator)[:, :1]
        spread = float(pattern.std()) + 1e-6
        trapped = torch.sigmoid((pattern / spread - uniform(generator, -0.5, 1.5)) / 0.3)
        exponent = exponent * (1 - uniform(generator, 0.3, 1.0) * _on(grid, trapped, coarse).to(determinant))
    density: Tensor = (volume * determinant.clamp(min=0.2)) ** exponent
    return density


def scanned(pair: TrainingPair, generator: torch.Generator, settings: BreathingSettings = AT_REST) -> TrainingPair:
    """The pair with noise, kernel, slice thickness and offset, drawn independently for the two images."""
    fixed, moving = (_scanned(image, generator, settings) for image in (pair.fixed, pair.moving))
    return replace(pair, fixed=fixed, moving=moving)


def _on(grid: Grid, values: Tensor, coarse: Grid) -> Tensor:
    return values if coarse == grid else resample(values, coarse, grid)


def _pulled(
    scan: Tensor, lungs: Tensor, fixed_lungs: Tensor, displacement: Tensor, body: Tensor, grid: Grid, density: Tensor
) -> Float[Tensor, "1 1 z y x"]:
    """M(x + u(x)) with the new density of the parenchyma. Around the lungs, tissue moves by the ``body`` field b.

    With B the body without lungs and L the fixed lungs, it is M(x + u) + (1 - L(x)) (B(x + b) - B(x + u)). So the lungs
    and their blurred edge, M - B, move by u only. Where b = u, the image is M(x + u) everywhere.
    """
    alone = _without_lungs(scan, lungs)
    pulled, tissue = warp(torch.cat([scan, alone], dim=1), grid, displacement, grid).split(1, dim=1)
    parenchyma = torch.sigmoid((-500 - pulled) / 60) * fixed_lungs  # vessels and walls keep their density
    pulled = pulled + parenchyma * (pulled - AIR_HU) * (density - 1)
    slid: Tensor = pulled + (1 - fixed_lungs) * (warp(alone, grid, body, grid) - tissue)
    return slid


def _without_lungs(scan: Tensor, lungs: Tensor) -> Tensor:
    """The scan with soft tissue in place of the lungs. In a rim around them, darker voxels (partly lung) become fat."""
    around = F.max_pool3d(lungs, 2 * RIM + 1, stride=1, padding=RIM) > 0
    return torch.where(lungs > 0.5, SOFT_TISSUE_HU, torch.where(around, scan.clamp(min=FAT_HU), scan))


def _truncated(scan: Tensor, grid: Grid, generator: torch.Generator) -> Tensor:
    """The scan with up to 15 % of its slices missing at the upper or lower end."""
    missing = int(uniform(generator, 0.0, 0.15) * grid.size[2])
    scan = scan.clone()
    scan[:, :, slice(0, missing) if uniform(generator) < 0.5 else slice(grid.size[2] - missing, None)] = AIR_HU
    return scan


def _scanned(image: Tensor, generator: torch.Generator, settings: BreathingSettings) -> Tensor:
    """The image with noise of random strength and grain, soft or sharp kernel, blur along z (thick slices), offset."""
    noise = torch.randn(image.shape, generator=generator).to(image)
    grain = uniform(generator)
    noise = (1 - grain) * noise + grain * 3 * F.avg_pool3d(noise, 3, stride=1, padding=1)
    draw = uniform(generator)
    if draw < 0.3:
        image = torch.lerp(image, _mean(image, (3, 3, 3)), uniform(generator, -0.4, 0.6))
    elif draw < 0.6:
        image = torch.lerp(image, _mean(image, (3, 1, 1)), uniform(generator))
    strength = settings.noise_hu * uniform(generator) ** 2
    result: Tensor = image + strength * noise + settings.offset_hu * uniform(generator, -1.0, 1.0)
    return result


def _mean(image: Tensor, size: tuple[int, int, int]) -> Tensor:
    padding = [n // 2 for n in size]
    return F.avg_pool3d(image, size, stride=1, padding=padding, count_include_pad=False)

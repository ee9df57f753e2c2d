"""Per-pair minimisation of the objective, coarse to fine, from a given start.

The unknown is the displacement on a control grid of twice the spacing of the level's images, in voxels of the level. It
is smoothed by small means before it is used (`..objective.control_grid`). The same field, trilinear on the control
grid, warps the images, is regularised and is returned.

After the cascade, this is the refinement that Hering et al. 2021 leave for future work. With keypoints and from a zero
start, it is the conventional method (`baselines.ruehaak`).

The original images are sampled through the affine map. Resampling them to the pre-aligned world first would blur them
twice. Both directions are minimised, and the result is the mean of the forward field and the inverse of the backward
field. Their errors are nearly independent, so the mean is better than either field, and their distance is a measure of
confidence.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from ..files.images import Image
from ..geometry import (
    Affine,
    Grid,
    doubled,
    index_map,
    inside,
    invert,
    lengths,
    moving_index,
    needed_part,
    resample,
    resample_image,
    sample,
)
from ..hounsfield import AIR_HU
from ..lungs import LungMask, crop_grid
from ..objective import Keypoints, Weights, ngf_distance, objective
from ..objective.adam import Adam
from ..objective.control_grid import smoothed, unsmoothed
from ..objective.local_correlation import dilated, local_correlation_distance, local_statistics
from ..objective.mind import mind_distance, mind_ssc
from ..objective.sampled_correlation import SampledCorrelation, applies
from ..preparation.prepare import Prepared
from ..preparation.subject import Subject
from .keypoints import KeypointSettings, find_keypoints

log = logging.getLogger(__name__)

Similarity = Literal["local correlation", "ngf", "mind"]

ADULT_LITRES = 1.0
"""The settings are for lungs, or a part of them, of at least this volume."""

SMOOTH = Weights(alpha=20.0, beta=0.0, gamma=0.0, delta=0.0)
"""Only D and the curvature. Unlike the diffusion, the curvature does not penalise locally affine large motion."""
SMOOTHER = replace(SMOOTH, alpha=40.0)
FARTHER_STEPS = 40
"""Steps of the level that `farther` adds."""


@dataclass(frozen=True)
class RefineSettings:
    """Settings of `refine`; tuples have one entry for each level, coarse to fine."""

    spacing_mm: tuple[float, ...] = (4.0, 2.0)
    """Isotropic voxel spacing of the images. For scans whose voxels are larger than the last one, see `for_voxels`."""
    steps: tuple[int, ...] = (30, 30)
    both_directions: bool = True
    similarity: Similarity = "local correlation"
    weights: tuple[Weights, ...] = (SMOOTHER, SMOOTH)
    """Weights of the terms beside D, one for each level. β must be 0, since there are no labels; δ > 0 needs keypoints.
    """
    step_vox: float = 0.3
    """Adam's first step size: about the motion of a control point in one step. It decreases linearly to a tenth."""
    smoothing: int = 2
    """Number of 3³ means that turn the control points into the field."""
    window_hu: tuple[float, float] = (-1000.0, -100.0)
    """Intensity window: only differences within the lungs count, not those of ribs, heart and diaphragm."""
    noise_hu: float = 20.0
    """s of the local correlation: its noise level."""
    epsilon_hu_per_mm: float = 10.0
    """ε of the NGF: its edge parameter."""
    margin_mm: float = 12.0
    """Margin of the field around the fixed lungs. Beyond it, the field is constant."""
    mask_margin_vox: int = 0
    """Margin of the mask for D around the lungs. Tissue outside the lungs slides along them."""

    def __post_init__(self) -> None:
        if not len(self.spacing_mm) == len(self.steps) == len(self.weights):
            raise ValueError(
                f"{len(self.spacing_mm)} spacings, {len(self.steps)} numbers of steps and {len(self.weights)} weights, "
                "expected one of each for every level"
            )
        if any(weights.beta for weights in self.weights):
            raise ValueError("refinement has no labels to align, expected beta 0")


def for_voxels(settings: RefineSettings, *grids: Grid) -> RefineSettings:
    """The same levels, all coarser by one factor if the voxels of a scan (geometric mean) are larger than the last
    level's.

    Otherwise, windows of a few voxels would contain only interpolated values.
    """
    largest = max(math.prod(grid.spacing) ** (1 / 3) for grid in grids)
    factor = max(1.0, largest / settings.spacing_mm[-1])
    return replace(settings, spacing_mm=tuple(factor * spacing for spacing in settings.spacing_mm))


def for_lungs(settings: RefineSettings, lungs: LungMask) -> RefineSettings:
    """The same levels, all finer by one factor if the lungs are smaller than an adult's.

    The lungs of an infant (0.15 l) have half the length of an adult's, and so have their vessels.
    """
    factor = min(1.0, (lungs.litres / ADULT_LITRES) ** (1 / 3))
    return replace(settings, spacing_mm=tuple(factor * spacing for spacing in settings.spacing_mm))


def farther(settings: RefineSettings) -> RefineSettings:
    """The same levels after one more level of twice the voxel spacing, which finds larger motion."""
    return replace(
        settings,
        spacing_mm=(2 * settings.spacing_mm[0], *settings.spacing_mm),
        steps=(FARTHER_STEPS, *settings.steps),
        weights=(settings.weights[0], *settings.weights),
    )


class Refined(NamedTuple):
    """The result of `refine`."""

    displacement: Float[Tensor, "1 3 z y x"]
    """u in mm on ``grid``: x ↦ affine(x + u(x))."""
    grid: Grid
    inconsistency_mm: Float[Tensor, "1 1 z y x"] | None
    """Distance from a second registration of the pair, here of the other direction; None if there was only one."""


FAST = RefineSettings(steps=(20, 8))
FULL = RefineSettings()


def refine(
    fixed: Subject,
    moving: Subject,
    affine: Affine,
    start: Float[Tensor, "1 3 zs ys xs"],
    start_grid: Grid,
    settings: RefineSettings = FULL,
    keypoints: Keypoints | None = None,
) -> Refined:
    """The field u (mm, applied before ``affine``) that minimises the objective, near ``start``.

    ``keypoints`` are in the fixed world, before the affine map. The computation runs on the device of ``start``.
    Nothing is stored between calls and nothing is random. On a CPU the same input gives the same output. On a GPU this
    holds to rounding, because a GPU does not add in a fixed order.
    """
    settings = for_voxels(for_lungs(settings, fixed.lungs), fixed.image.grid, moving.image.grid)
    forward, grid = minimise(fixed, moving, affine, start, start_grid, settings, keypoints)
    if not settings.both_directions:
        return Refined(forward, grid, None)
    back = affine.inverse()
    back_grid = _level_grid(moving.lungs, settings.spacing_mm[-1], settings.margin_mm).coarsened()
    back_start = invert(forward, grid, back_grid, back)
    back_points = None if keypoints is None else swapped(keypoints, affine)
    backward, back_grid = minimise(moving, fixed, back, back_start, back_grid, settings, back_points)
    undone = invert(backward, back_grid, grid, affine)
    return Refined((forward + undone) / 2, grid, lengths(forward - undone))


def swapped(keypoints: Keypoints, affine: Affine) -> Keypoints:
    """The keypoints of the backward direction, in the moving world. The targets are before the inverse affine map."""
    moving_mm, fixed_mm = (
        torch.from_numpy(affine(p.detach().cpu().numpy())) for p in (keypoints.moving_mm, keypoints.fixed_mm)
    )
    return Keypoints(moving_mm, fixed_mm, keypoints.weights)


def _level_grid(lungs: LungMask, spacing_mm: float, margin_mm: float) -> Grid:
    """A grid of about this spacing, with an even number of voxels along each axis, in the box around the lungs."""
    box = crop_grid(lungs, margin_mm, (8, 8, 8))
    x, y, z = (max(4, 2 * math.ceil(extent / spacing_mm / 2)) for extent in box.extent_mm)
    return box.resized((x, y, z))


def find_pair_keypoints(
    pair: Prepared,
    fixed: Subject,
    start: Float[Tensor, "1 3 zs ys xs"],
    start_grid: Grid,
    spacing_mm: float = 2.0,
    settings: KeypointSettings = KeypointSettings(),  # noqa: B008  (immutable)
) -> Keypoints:
    """Keypoints for `refine`: the motion that remains after ``start``, on a grid of ``spacing_mm`` around the lungs."""
    grid = _level_grid(fixed.lungs, spacing_mm, RefineSettings().margin_mm)
    image = resample_image(fixed.image.voxels, fixed.image.grid, grid, least=AIR_HU, fill=AIR_HU).to(start)
    lungs = resample_image(fixed.lungs.mask, fixed.lungs.grid, grid, least=0.0, fill=0.0).to(start)
    moving = pair.moving.to(start)
    return find_keypoints(image, lungs, grid, moving, pair.moving_grid, resample(start, start_grid, grid), settings)


def minimise(
    fixed: Subject,
    moving: Subject,
    affine: Affine,
    start: Float[Tensor, "1 3 zs ys xs"],
    start_grid: Grid,
    settings: RefineSettings,
    keypoints: Keypoints | None = None,
) -> tuple[Float[Tensor, "1 3 z y x"], Grid]:
    """Minimise on all levels in one direction. Returns the field (mm) and its grid, the last level's control grid."""
    displacement, grid = start, start_grid
    for spacing, steps, weights in zip(settings.spacing_mm, settings.steps, settings.weights, strict=True):
        level = _Level(fixed, moving, affine, spacing, settings, start.device)
        control_grid = level.grid.coarsened()
        displacement = resample(displacement, grid, control_grid)
        displacement = level.minimise(displacement, control_grid, steps, weights, keypoints)
        grid = control_grid
    return displacement, grid


class _Level:
    """The images of one level, and the objective between them."""

    def __init__(
        self,
        fixed: Subject,
        moving: Subject,
        affine: Affine,
        spacing_mm: float,
        settings: RefineSettings,
        device: torch.device,
    ) -> None:
        self.settings, self.affine, self.device = settings, affine, device
        self.grid = _level_grid(fixed.lungs, spacing_mm, settings.margin_mm)
        image = _hu(fixed.image, self.grid, settings).to(device)
        lungs = resample_image(fixed.lungs.mask, fixed.lungs.grid, self.grid, least=0.0, fill=0.0) > 0.5
        unseen = ~inside(
            moving_index(self.grid, fixed.image.grid, None, Affine(), lungs.float()), fixed.image.grid.shape
        )
        # without voxels outside the fixed image and next to its border: filled voxels make edges
        self.mask = (dilated(lungs, settings.mask_margin_vox) & ~dilated(unseen[:, None], 1)).to(device)
        self.moving_grid = _moving_grid(moving.image.grid, self.grid, affine, spacing_mm)
        self.moving = _hu(moving.image, self.moving_grid, settings).to(device)
        self.distance = distance(image, self.grid, settings)
        self.sampled = None
        if settings.similarity == "local correlation" and applies(self.mask, self.moving):
            to_moving = index_map(self.grid, self.moving_grid, affine)
            self.sampled = SampledCorrelation(image, self.mask, self.moving, to_moving, settings.noise_hu)

    def minimise(
        self,
        start: Float[Tensor, "1 3 z y x"],
        control_grid: Grid,
        steps: int,
        weights: Weights,
        keypoints: Keypoints | None,
    ) -> Float[Tensor, "1 3 z y x"]:
        """Take ``steps`` steps of Adam. Returns the field (mm) on the control grid."""
        settings = self.settings
        voxel_mm = torch.tensor(self.grid.spacing, device=self.device).reshape(1, 3, 1, 1, 1)
        control = (unsmoothed(start, settings.smoothing) / voxel_mm).requires_grad_()
        adam = Adam(control, settings.step_vox, steps)
        value = terms = None
        words = f"Refinement, voxels of {self.grid.spacing[0]:.1f} mm"
        for _ in tqdm(range(steps), words, disable=None, leave=False, bar_format="{l_bar}{bar}| {elapsed}"):
            u = smoothed(control, settings.smoothing) * voxel_mm
            points = None if keypoints is None else [keypoints]
            value, terms = objective(u, control_grid, weights, self._distance(u), keypoints=points)
            adam.descend(value)
        if terms is not None:
            log.debug("refined at %.3g mm: %s", self.grid.spacing[0], {k: round(float(v), 4) for k, v in terms.items()})
        return (smoothed(control, settings.smoothing) * voxel_mm).detach()

    def _distance(self, displacement: Float[Tensor, "1 3 z y x"]) -> Float[Tensor, ""]:
        """D on the voxels around the lungs that the moving field of view covers."""
        if self.sampled is not None:
            return self.sampled(displacement)
        fine = doubled(displacement)
        index = moving_index(self.grid, self.moving_grid, fine, self.affine, fine)
        valid = inside(index.detach(), self.moving_grid.shape)[:, None]
        return self.distance(sample(self.moving, index), self.mask & valid)


def distance(
    fixed: Float[Tensor, "1 1 z y x"], grid: Grid, settings: RefineSettings
) -> Callable[[Tensor, Tensor], Tensor]:
    """D as a function of a warped image and a mask on ``grid``. Values of ``fixed`` alone are computed once."""
    if settings.similarity == "ngf":
        return lambda warped, mask: ngf_distance(fixed, warped, grid, mask, settings.epsilon_hu_per_mm)
    if settings.similarity == "mind":
        descriptors = mind_ssc(fixed)
        return lambda warped, mask: mind_distance(descriptors, warped, mask)
    known = local_statistics(fixed)
    return lambda warped, mask: local_correlation_distance(
        fixed, warped, mask, noise_hu=settings.noise_hu, statistics=known
    )


def _moving_grid(source: Grid, grid: Grid, affine: Affine, spacing_mm: float) -> Grid:
    """The part of the moving image's grid that the level may need, coarsened to the level's spacing where it is finer.

    The margin is a third of the lungs' extent, for displacements that leave the lungs.
    """
    x, y, z = (max(1, n // 3) for n in grid.size)
    around = grid.cropped((-x, -y, -z), (grid.size[0] + 2 * x, grid.size[1] + 2 * y, grid.size[2] + 2 * z))
    part = source.cropped(*needed_part(source, around, affine))
    nx, ny, nz = (
        max(1, round(extent / max(spacing_mm, voxel)))
        for extent, voxel in zip(part.extent_mm, part.spacing, strict=True)
    )
    return part.resized((nx, ny, nz))


def _hu(image: Image, grid: Grid, settings: RefineSettings) -> Float[Tensor, "1 1 z y x"]:
    return resample_image(image.voxels, image.grid, grid, least=AIR_HU, fill=AIR_HU).clamp(*settings.window_hu)

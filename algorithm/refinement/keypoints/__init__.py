"""Corresponding keypoints of a pair, found without training (Rühaak et al. 2017; corrField, Heinrich et al. 2015).

`detect`   distinctive points of the fixed lungs
`match`    their positions in the moving image

Keypoints attract a field to reliable correspondences, over distances that the gradient of an image does not reach.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...geometry import Grid, displacement_at, resample, validity, warp
from ...objective.keypoints import Keypoints
from .detect import DetectSettings, distinctive_points
from .match import MatchSettings, match, search_margin

__all__ = [
    "DetectSettings",
    "KeypointSettings",
    "Keypoints",
    "MatchSettings",
    "displacements",
    "distinctive_points",
    "find_keypoints",
    "match",
]


@dataclass(frozen=True)
class KeypointSettings:
    """Settings of detection and matching, for voxels of about 2 mm, nearly isotropic."""

    detect: DetectSettings = field(default_factory=DetectSettings)
    match: MatchSettings = field(default_factory=MatchSettings)


def find_keypoints(
    fixed: Float[Tensor, "1 1 z y x"],
    mask: Bool[Tensor, "1 1 z y x"] | Float[Tensor, "1 1 z y x"],
    grid: Grid,
    moving: Float[Tensor, "1 1 zm ym xm"],
    moving_grid: Grid,
    start: Float[Tensor, "1 3 z y x"] | None = None,
    settings: KeypointSettings = KeypointSettings(),
) -> Keypoints:
    """Points of the fixed lungs and their targets under u: u(fixed_mm) = moving_mm - fixed_mm.

    ``fixed`` (HU), lung ``mask`` and ``start`` (mm) are on ``grid``; ``moving`` (HU) is pre-aligned, on any grid of the
    same world. The search finds only the motion that remains after ``start`` (None: no motion), up to the radius of the
    settings.
    """
    points = distinctive_points(fixed, mask, grid, settings.detect)
    offset, keep = displacements(fixed, grid, moving, moving_grid, points, start, settings.match)
    fixed_mm = torch.from_numpy(grid.to_world(points[keep].cpu().numpy())).to(fixed)
    return Keypoints(fixed_mm, fixed_mm + offset[keep])


def displacements(
    fixed: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    moving: Float[Tensor, "1 1 zm ym xm"],
    moving_grid: Grid,
    points: Int[Tensor, "p 3"],
    start: Float[Tensor, "1 3 z y x"] | None = None,
    settings: MatchSettings = MatchSettings(),  # noqa: B008  (immutable)
) -> tuple[Float[Tensor, "p 3"], Bool[Tensor, " p"]]:
    """u (mm) at ``points``, voxels (x, y, z) of ``grid``, and which of them to keep; images as in `find_keypoints`.

    With the start field u₀ and the offset d found in moving ∘ (x + u₀(x)), u(x) = d + u₀(x + d). Points with a position
    outside the moving field of view are not kept.
    """
    margin = search_margin(grid, settings)
    around = grid.cropped(*_with_margin(grid, margin))
    zero = torch.zeros(1, 3, *around.shape, dtype=fixed.dtype, device=fixed.device)
    first = zero if start is None else resample(start, grid, around)
    warped = warp(moving, moving_grid, first, around)
    seen = validity(first, around, moving_grid)
    offset, keep = match(fixed, warped, grid, points, settings, seen)
    if start is None or not len(points):
        return offset, keep
    there = torch.from_numpy(grid.to_world(points.cpu().numpy())).to(offset.device) + offset  # double precision
    return offset + displacement_at(there, start, grid), keep


def _with_margin(grid: Grid, margin: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Start and size of the grid with ``margin`` more voxels (x, y, z) on each side."""
    (x, y, z), (nx, ny, nz) = margin, grid.size
    return (-x, -y, -z), (nx + 2 * x, ny + 2 * y, nz + 2 * z)

"""Quality of a result: figures for results.json, and warnings from them.

They are measured on the network grid at half its resolution, before (u = 0: pre-aligned) and after the registration:

ngf_distance                 D of the paper, in the fixed lungs that both scans show                   0 to 1
local_correlation_distance   1 - squared correlation over 3³ voxels, in the same                       0 to 1
curvature, volume_change     R (1/mm²) and V of the field, in the fixed lungs
mask_distance                B of the lung masks, over the grid                                        0 to 0.5
lung_dice                    overlap of the lung masks where both scans show something                 0 to 1
outside_field_of_view        share of the fixed lungs that the transform puts outside the moving image
inconsistency_mm             only after: distance from the pair's second registration, mean over the fixed lungs
inconsistency_p95_mm         and its 95th percentile
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Grid, resample, validity, warp
from ..objective import curvature, mask_distance, ngf_distance, volume_change
from ..objective.local_correlation import dilated, local_correlation_distance
from ..preparation.prepare import Prepared

NGF_EDGE_HU_PER_MM = 10.0
"""ε of the reported NGF distance. It is above the noise of most scans at this resolution."""
EDGE = 2
"""Voxels next to what one of the scans does not show: smoothing and gradients mix it in."""
LEAST_DETERMINANT = 0.05
"""t of the reported volume change."""

LEAST_DICE = 0.9
MOST_OUTSIDE = 0.05
MOST_UNLIKE = 0.3
"""Limits of these figures: beyond them there is a warning. Measured: docs/trust.md."""


def quality(
    pair: Prepared, displacement: Float[Tensor, "1 3 z y x"], grid: Grid, fixed_view: Grid, moving_view: Grid
) -> dict[str, dict[str, float]]:
    """The figures listed above, "before" and "after", for u (mm) on ``grid``.

    ``fixed_view`` and ``moving_view`` are the grids of the images as read from their files.
    """
    half = pair.halved()
    after = resample(displacement, grid, half.grid)
    shown = validity(torch.zeros_like(after), half.grid, fixed_view)
    return {
        "before": _figures(half, torch.zeros_like(after), shown, moving_view),
        "after": _figures(half, after, shown, moving_view),
    }


def _figures(pair: Prepared, displacement: Tensor, shown: Tensor, moving_view: Grid) -> dict[str, float]:
    """``shown`` is True where the fixed image has voxels."""
    lungs = pair.fixed_lungs > 0.5
    seen = validity(displacement, pair.grid, moving_view, affine=pair.affine)
    warped = warp(torch.cat([pair.moving, pair.moving_lungs], dim=1), pair.moving_grid, displacement, pair.grid)
    image, warped_lungs = warped.split(1, dim=1)
    inner = ~dilated(~(shown & seen), EDGE)
    here, there = (mask & inner for mask in (lungs, warped_lungs > 0.5))
    values = {
        "ngf_distance": ngf_distance(pair.fixed, image, pair.grid, here, NGF_EDGE_HU_PER_MM),
        "local_correlation_distance": local_correlation_distance(pair.fixed, image, here),
        "curvature": curvature(displacement, pair.grid, lungs),
        "volume_change": volume_change(displacement, pair.grid, LEAST_DETERMINANT, lungs),
        "mask_distance": mask_distance(pair.fixed_lungs, warped_lungs),
        "lung_dice": 2 * (here & there).sum() / (here.sum() + there.sum()),
        "outside_field_of_view": (lungs & ~seen).sum() / lungs.sum(),
    }
    return {name: float(value) for name, value in values.items()}


def warnings(figures: dict[str, dict[str, float]]) -> list[str]:
    """Sentences for the user if the figures show that the result should not be trusted."""
    after, sentences = figures["after"], []
    if not after["lung_dice"] >= LEAST_DICE:  # "not >=": NaN, of lungs too thin to measure, gives a warning, too
        sentences.append(
            f"After the registration the lungs overlap by {after['lung_dice']:.2f} only (Dice; {LEAST_DICE} expected)."
        )
    if not after["outside_field_of_view"] <= MOST_OUTSIDE:
        sentences.append(
            f"{after['outside_field_of_view']:.0%} of the fixed lungs lie outside the moving field of view; there the "
            "displacement field is only a continuation."
        )
    if not after["ngf_distance"] <= MOST_UNLIKE:
        sentences.append(
            f"The registered lungs are hardly alike (NGF distance {after['ngf_distance']:.2f}, {MOST_UNLIKE} at most "
            "expected): are they of one patient?"
        )
    return sentences

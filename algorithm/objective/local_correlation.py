"""Local squared correlation: 1 - cov(F, W)² / (var(F) var(W)) over small windows.

    D = 1/|Ω| ∫_Ω 1 - cov² / ((var F + s²)(var W + s²)) dx

D does not depend on local brightness and contrast, so it does not depend on the density change of breathing. It is not
in Hering et al. 2021. In the literature it is the strongest similarity for the refinement of lung CT (e.g. Vishnevskiy
et al. 2017).

The gradient is written out. The part of the fixed image is computed beforehand, so value and gradient take three box
sums each. Automatic differentiation takes more than twice the time and memory.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .domain import domain_mean


class LocalStatistics(NamedTuple):
    """Window statistics of the fixed image; voxels beyond the border do not count."""

    number: Float[Tensor, "1 1 z y x"]
    """Voxels in the window."""
    mean: Float[Tensor, "n 1 z y x"]
    variance: Float[Tensor, "n 1 z y x"]


def local_statistics(fixed: Float[Tensor, "n 1 z y x"], window: int = 3) -> LocalStatistics:
    """Mean (HU) and variance (HU²) over ``window``³ voxels (odd), for many calls with the same fixed image."""
    number = box_sum(torch.ones_like(fixed[:1]), window)
    mean = box_sum(fixed, window) / number
    return LocalStatistics(number, mean, (box_sum(fixed * fixed, window) / number - mean * mean).clamp(min=0))


def local_correlation_distance(
    fixed: Float[Tensor, "n 1 z y x"],
    warped: Float[Tensor, "n 1 z y x"],
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None,
    window: int = 3,
    noise_hu: float = 20.0,
    statistics: LocalStatistics | None = None,
) -> Float[Tensor, ""]:
    """D in [0, 1], a mean over the mask, with s = ``noise_hu`` and ``window``³ voxels; differentiable in ``warped``.

    Where both images are flat, the value is 1 and its gradient is near 0, so noise has no effect. An empty mask
    yields 0.
    """
    known = statistics or local_statistics(fixed, window)
    distance: Tensor = _Distance.apply(warped, fixed, known, window, noise_hu**2)
    return domain_mean(distance[:, 0], mask)


class _Distance(torch.autograd.Function):
    """1 - cc at every voxel, cc = cov² / (F W) with F, W the two variances plus s².

    d cov / d w_i = (f_i - mean f)/n and d var / d w_i = 2 (w_i - mean w)/n for every window that voxel i is in, hence
    d cc / d w_i = Σ over those windows of 2 cov/(F W) (f_i - mean f)/n - 2 cc/W (w_i - mean w)/n.
    """

    @staticmethod
    def forward(ctx: Any, warped: Tensor, fixed: Tensor, known: LocalStatistics, window: int, floor: float) -> Tensor:
        mean = box_sum(warped, window) / known.number
        variance = (box_sum(warped * warped, window) / known.number - mean * mean).clamp_(min=0).add_(floor)
        covariance = box_sum(fixed * warped, window) / known.number - known.mean * mean
        slope = covariance / ((known.variance + floor) * variance)
        correlation = covariance * slope
        ctx.save_for_backward(warped, fixed, known.number, known.mean, mean, slope, correlation / variance)
        ctx.window = window
        return 1 - correlation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        warped, fixed, number, fixed_mean, mean, slope, falling = ctx.saved_tensors
        scale = -2 * gradients[0] / number
        towards, against = slope * scale, falling * scale
        gradient = fixed * box_sum(towards, ctx.window)
        gradient -= warped * box_sum(against, ctx.window)
        gradient += box_sum(against * mean - towards * fixed_mean, ctx.window)
        return gradient, None, None, None, None


def box_sum(volume: Float[Tensor, "n c z y x"], window: int) -> Float[Tensor, "n c z y x"]:
    """Sum over the part of the window (odd) that lies inside the volume.

    It adds shifted copies, one axis after the other: several times faster than ``avg_pool3d`` on a CPU.
    """
    for axis in (2, 3, 4):
        size = volume.shape[axis]
        total = volume.clone()
        for shift in range(1, min(window // 2, size - 1) + 1):
            total.narrow(axis, shift, size - shift).add_(volume.narrow(axis, 0, size - shift))
            total.narrow(axis, 0, size - shift).add_(volume.narrow(axis, shift, size - shift))
        volume = total
    return volume


def dilated(mask: Bool[Tensor, "1 1 z y x"], voxels: int) -> Bool[Tensor, "1 1 z y x"]:
    """The mask grown by ``voxels`` in every direction (a cube)."""
    return box_sum(mask.float(), 2 * voxels + 1) > 0 if voxels else mask

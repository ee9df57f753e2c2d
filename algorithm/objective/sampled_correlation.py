"""Local correlation of a fixed and a warped image on the CPU, together with the warping, only at the voxels of a mask.

It computes the value and the gradient of `local_correlation_distance` of `sample`, for a displacement from control
points. It takes one pass over the lungs instead of some thirty over the box around them, and stores nothing in between.
It is several times faster. The first use compiles it, which takes some seconds
(`algorithm.objective.correlation_kernels`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from ..geometry import IndexMap
from ..threads import in_parts
from .local_correlation import dilated, local_statistics


def applies(mask: Bool[Tensor, "1 1 z y x"], moving: Float[Tensor, "1 1 zm ym xm"]) -> bool:
    """Whether `SampledCorrelation` can be used: on the CPU, with numba, and with the mask away from the border."""
    inner = mask[..., 2:-2, 2:-2, 2:-2]  # windows of these voxels and of their neighbours lie in the box
    if mask.device.type != "cpu" or int(inner.sum()) != int(mask.sum()) or min(moving.shape[2:]) < 2:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


class SampledCorrelation:
    """D of a displacement u on a control grid of twice the voxel spacing, differentiable in u; float32."""

    def __init__(
        self,
        fixed: Float[Tensor, "1 1 z y x"],
        mask: Bool[Tensor, "1 1 z y x"],
        moving: Float[Tensor, "1 1 zm ym xm"],
        index_map: IndexMap,
        noise_hu: float,
    ) -> None:
        """``index_map`` maps voxels of ``fixed`` and u (mm) to voxels of ``moving``; see `applies`."""
        statistics = local_statistics(fixed)
        self.fixed, self.moving = _array(fixed[0, 0]), _array(moving[0, 0])
        self.statistics = (_array(statistics.mean[0, 0]), _array(statistics.variance[0, 0]))
        self.index_map = IndexMap(*(np.ascontiguousarray(part) for part in index_map))
        self.floor = noise_hu**2
        around = dilated(mask, 1)
        reached = dilated(F.max_pool3d(around.float(), 2) > 0, 1)
        self.inner, self.around, self.reached = (runs_of(part[0, 0]) for part in (mask, around, reached))
        shape = self.fixed.shape
        self.warped, self.seen = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.slope, self.terms = np.zeros((3, *shape), np.float32), np.zeros((3, *shape), np.float32)

    def __call__(self, control: Float[Tensor, "1 3 zc yc xc"]) -> Float[Tensor, ""]:
        """D, a mean over the voxels of the mask that the moving field of view covers; 0 if it covers none."""
        value: Tensor = _Distance.apply(control, self)
        return value

    def value_and_gradient(self, control: Float[np.ndarray, "3 zc yc xc"]) -> tuple[float, np.ndarray]:
        """D and its gradient with respect to the control points."""
        from . import correlation_kernels as kernels

        fixed, warped, seen, slope, terms = self.fixed, self.warped, self.seen, self.slope, self.terms
        mean, variance = self.statistics
        matrix, offset, steps = self.index_map
        sums, gradient = np.zeros((torch.get_num_threads(), 2)), np.zeros_like(control)

        def sample(_: int, *part: int) -> None:
            kernels.sample(self.moving, control, self.around, matrix, offset, steps, warped, slope, seen, *part)

        def correlate(number: int, *part: int) -> None:
            known = mean, variance, seen, self.inner, self.floor
            kernels.correlate(warped, fixed, *known, terms, sums, number, *part)

        def differentiate(_: int, *part: int) -> None:
            kernels.differentiate(terms, fixed, warped, slope, self.around, scale, *part)

        def gather(_: int, *part: int) -> None:
            kernels.gather(slope, gradient, self.reached, *part)

        _in_parts(sample, self.around)
        _in_parts(correlate, self.inner)
        total, voxels = sums.sum(axis=0)
        if voxels == 0:
            return 0.0, gradient
        scale = -2 / (kernels.WINDOW * voxels)
        _in_parts(differentiate, self.around)
        _in_parts(gather, self.reached)
        return float(total / voxels), gradient


class _Distance(torch.autograd.Function):
    """Computes the gradient together with the value: the minimisation needs both."""

    @staticmethod
    def forward(ctx: Any, control: Tensor, correlation: SampledCorrelation) -> Tensor:
        value, gradient = correlation.value_and_gradient(_array(control[0]))
        ctx.save_for_backward(torch.from_numpy(gradient)[None])
        return control.new_tensor(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None


def runs_of(mask: Bool[Tensor, "z y x"]) -> Int32[np.ndarray, "n 4"]:
    """The rows of voxels of a mask: z, y, first x, end x."""
    steps = np.diff(np.pad(mask.numpy().astype(np.int8), ((0, 0), (0, 0), (1, 1))), axis=2)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return np.ascontiguousarray(np.concatenate([starts, ends[:, 2:]], axis=1), np.int32)


def _in_parts(kernel: Callable[..., None], runs: Int32[np.ndarray, "n 4"]) -> None:
    """Call ``kernel(part, first, end)`` in parallel on parts of the list of runs, each with about as many voxels."""
    if not len(runs):
        return
    threads, voxels = torch.get_num_threads(), np.cumsum(runs[:, 3] - runs[:, 2])
    bounds = np.searchsorted(voxels, voxels[-1] * np.arange(threads + 1) / threads)
    bounds[-1] = len(runs)
    in_parts(kernel, bounds.tolist())


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())

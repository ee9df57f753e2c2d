"""Smooth continuation of a field around the lungs, where the cascade is not trained.

Training compares fields in the lungs only. Outside, the U-Nets predict whatever makes the field in the lungs right, and
their prediction may fold. There it is replaced by pull and push (Gortler et al. 1996, "The lumigraph"). Pull: means of
the known values over larger and larger blocks. Push, from coarse to fine: each block without known values takes the
interpolated value of the larger blocks around it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..geometry import doubled

EDGE_VOX = 5
"""Width of the transition from the field to its continuation: voxels of half the resolution, half of them in the
lungs."""
SMOOTHING, SMOOTHING_VOX = 3, 5
"""Number of means that smooth the continuation, and edge of their cube in voxels of half the resolution."""


def extended(displacement: Float[Tensor, "1 3 z y x"], lungs: Float[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """The field in the lungs (mask, 0 to 1, on the same grid, of even size) and its continuation around them.

    With an empty mask the field stays unchanged. The continuation is computed at half the resolution.
    """
    if not lungs.any():
        return displacement
    values, known = _pulled(displacement, lungs)
    continuation = _smoothed(_pushed(values, known), SMOOTHING_VOX, SMOOTHING)
    weight = _smoothed(known, EDGE_VOX, 1)
    return torch.lerp(doubled(continuation), displacement, doubled(weight))


def _pulled(values: Tensor, weight: Tensor) -> tuple[Float[Tensor, "1 3 z y x"], Float[Tensor, "1 1 z y x"]]:
    """Means over 2³ voxels, weighted by ``weight``, and 1 where there is any weight, else 0."""
    shares = F.avg_pool3d(weight, 2)
    return F.avg_pool3d(values * weight, 2) / shares.clamp(min=1e-6), (shares > 0).float()


def _pushed(values: Float[Tensor, "1 3 z y x"], known: Float[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """``values`` where ``known`` is 1, elsewhere the interpolated values of the coarser level."""
    if any(n % 2 for n in values.shape[2:]):
        mean = (values * known).sum(dim=(2, 3, 4), keepdim=True) / known.sum()
        return torch.where(known > 0, values, mean)
    return torch.where(known > 0, values, doubled(_pushed(*_pulled(values, known))))


def _smoothed(volume: Float[Tensor, "1 c z y x"], width: int, times: int) -> Float[Tensor, "1 c z y x"]:
    """Apply a mean over ``width``³ voxels (odd) ``times`` times, by one matrix per axis; border values are repeated."""
    for axis in (2, 3, 4):
        weights = torch.linalg.matrix_power(_mean_of(width, volume.shape[axis]).to(volume), times)
        volume = torch.movedim(torch.tensordot(weights, volume, dims=([1], [axis])), 0, axis)
    return volume.contiguous()


def _mean_of(width: int, number: int) -> Float[Tensor, "n n"]:
    """The matrix of a running mean."""
    around = (torch.arange(number)[:, None] + torch.arange(width) - width // 2).clamp(0, number - 1)
    return torch.zeros(number, number).scatter_add_(1, around, torch.full(around.shape, 1 / width))

"""A field goes on smoothly around the lungs, where the cascade was never asked for any.

Training compares fields in the lungs only, so around them the U-Nets predict whatever makes the lungs right, and it may
fold. There it is replaced by pull and push (Gortler et al. 1996, "The lumigraph"): means over larger and larger blocks
of what is known, and from coarse to fine each block without any knowledge takes the interpolated value of the larger
ones around it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..geometry import doubled

EDGE_VOX = 5
"""Over so many voxels of half the resolution, half of them in the lungs, the field turns into its continuation."""
SMOOTHING = 3
"""Means over 5³ voxels of half the resolution that smooth the continuation."""


def extended(displacement: Float[Tensor, "1 3 z y x"], lungs: Float[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """The field in the lungs (mask, 0 to 1, on the same grid, of even size) and its continuation around them.

    Without any lungs the field stays as it is. The continuation is worked out at half the resolution.
    """
    if not lungs.any():
        return displacement
    continuation = _pushed(*_pulled(displacement, lungs))
    for _ in range(SMOOTHING):
        continuation = _mean(continuation, 5)
    weight = _mean((F.avg_pool3d(lungs, 2) > 0).float(), EDGE_VOX)
    return torch.lerp(doubled(continuation), displacement, doubled(weight))


def _pulled(values: Tensor, weight: Tensor) -> tuple[Float[Tensor, "1 3 z y x"], Float[Tensor, "1 1 z y x"]]:
    """Means over 2³ voxels by ``weight``, and whether there was any."""
    shares = F.avg_pool3d(weight, 2)
    return F.avg_pool3d(values * weight, 2) / shares.clamp(min=1e-6), (shares > 0).float()


def _pushed(values: Float[Tensor, "1 3 z y x"], known: Float[Tensor, "1 1 z y x"]) -> Float[Tensor, "1 3 z y x"]:
    """``values`` where they are ``known`` (1, else 0), elsewhere what the coarser level says."""
    if any(n % 2 for n in values.shape[2:]):
        mean = (values * known).sum(dim=(2, 3, 4), keepdim=True) / known.sum()
        return torch.where(known > 0, values, mean)
    return torch.where(known > 0, values, doubled(_pushed(*_pulled(values, known))))


def _mean(volume: Float[Tensor, "1 c z y x"], width: int) -> Float[Tensor, "1 c z y x"]:
    """Over ``width``³ voxels (odd), border values repeated."""
    volume = F.pad(volume, [width // 2] * 6, mode="replicate")
    for window in ((width, 1, 1), (1, width, 1), (1, 1, width)):  # one axis after the other: fewer sums
        volume = F.avg_pool3d(volume, window, stride=1)
    return volume

"""Distance of MIND-SSC descriptors (Heinrich et al. 2013, "Towards realtime multimodal fusion ...", MICCAI).

    D = 1/|Ω| ∫_Ω 1/12 Σ_k (m_k(F) - m_k(W))² dx

A voxel has six neighbours, and twelve pairs of them lie a diagonal apart. The descriptor compares the patches around
the two voxels of each pair: exp(-(d_k - min_k d)/v), with d_k the mean squared difference of the 3³ patches and v the
mean of the d_k - min_k d. It depends on structure, not on brightness.
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .domain import check_same_shape, domain_mean
from .local_correlation import box_sum

SIX = ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0), (-1, 0, 0), (1, 0, 0))
"""The neighbours of a voxel, (z, y, x)."""
PAIRS = tuple((a, b) for a, b in itertools.combinations(SIX, 2) if a != (-b[0], -b[1], -b[2]))


def mind_distance(
    descriptors: Float[Tensor, "n 12 z y x"],
    warped: Float[Tensor, "n 1 z y x"],
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None,
) -> Float[Tensor, ""]:
    """D (no unit), a mean over the mask. ``descriptors`` is `mind_ssc` of the fixed image. An empty mask yields 0."""
    check_same_shape(descriptors.shape[2:], warped.shape[2:])
    return domain_mean((descriptors - mind_ssc(warped)).square().mean(dim=1), mask)


def mind_ssc(image: Float[Tensor, "n 1 z y x"]) -> Float[Tensor, "n 12 z y x"]:
    """The descriptors, 0 to 1, of an image in HU. v is clamped between 1/1000 of its mean and 1000 times its mean."""
    padded = F.pad(image, [1] * 6, mode="replicate")
    size = image.shape[2:]
    at = {s: padded[:, :, 1 + s[0] :, 1 + s[1] :, 1 + s[2] :][:, :, : size[0], : size[1], : size[2]] for s in SIX}
    distances = torch.cat([box_sum((at[a] - at[b]).square(), 3) / 27 for a, b in PAIRS], dim=1)
    distances = distances - distances.amin(dim=1, keepdim=True)
    scale = distances.mean(dim=1, keepdim=True)
    typical = float(scale.detach().mean())
    return torch.exp(-distances / scale.clamp(max(typical / 1000, 1e-6), max(typical * 1000, 1e-6)))

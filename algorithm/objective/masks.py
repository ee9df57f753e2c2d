"""Mask distance, B (Hering et al. 2021, equation 7).

    B = 1/(2 |Ω|) ∫_Ω ‖b_M(y(x)) - b_F(x)‖² dx

with b the one-hot representation of a segmentation: one channel per label (k = 5 lobes, or 2 lungs), no channel for the
background.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .domain import check_same_shape, domain_mean


def mask_distance(
    fixed_labels: Float[Tensor, "n k z y x"],
    warped_labels: Float[Tensor, "n k z y x"],
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None = None,
) -> Float[Tensor, ""]:
    """B in [0, 1] (no unit), a mean over the mask (by default the whole grid); an empty mask yields 0.

    A voxel with two different labels costs 1; a voxel with a label on background costs 1/2. Make ``warped_labels`` by
    `geometry.warp` from the one-hot moving labels, with *linear* interpolation and fill 0: nearest neighbours would
    give no gradient. ``mask`` is for the validity of the warp. Do not give the lung mask: B compares lung outlines.
    """
    check_same_shape(fixed_labels.shape, warped_labels.shape)
    difference = warped_labels - fixed_labels
    return 0.5 * domain_mean((difference * difference).sum(dim=1), mask)


def one_hot(labels: Int[Tensor, "n 1 z y x"], classes: tuple[int, ...]) -> Float[Tensor, "n k z y x"]:
    """Channel i is 1.0 where the label is ``classes[i]``. A label that is not in ``classes`` is 0 in every channel."""
    wanted = torch.tensor(classes, dtype=labels.dtype, device=labels.device)
    return (labels == wanted.reshape(1, -1, 1, 1, 1)).to(torch.float32)

"""The mean over a domain: the one normalisation that all terms share."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def domain_mean(
    values: Float[Tensor, "n z y x"], mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None
) -> Float[Tensor, ""]:
    """``Σ m v / Σ m`` for every sample of the batch, then the mean over the batch.

    The mask m is bool or has weights ≥ 0; None is the whole grid. A sample with an empty mask counts as exactly 0 and
    has zero gradient. Values must be finite even where the mask is 0.
    """
    if mask is None:
        return values.mean()
    check_same_shape(values.shape[1:], mask.shape[2:])
    weights = mask[:, 0].to(values.dtype)
    total = weights.sum(dim=(1, 2, 3))
    integral = (weights * values).sum(dim=(1, 2, 3))
    return (integral / torch.where(total > 0, total, 1)).mean()


def check_same_shape(expected: tuple[int, ...], actual: tuple[int, ...]) -> None:
    """ValueError if the shapes differ: broadcasting would hide the mistake."""
    if tuple(expected) != tuple(actual):
        raise ValueError(f"expected a volume of shape {tuple(expected)}, got {tuple(actual)}")

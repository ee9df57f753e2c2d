"""Keypoint distance, K (Hering et al. 2021, section 3.2.5).

    K = 1/|P| Σ_i ‖k_M,i - y(k_F,i)‖²,    y(x) = x + u(x),    in mm²

with P the set of corresponding keypoints (k_F, k_M).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Grid, displacement_at
from .domain import check_same_shape


class Keypoints(NamedTuple):
    """Corresponding keypoints of one pair, world mm (x, y, z), with weights ≥ 0 (None: all equal)."""

    fixed_mm: Float[Tensor, "p 3"]
    moving_mm: Float[Tensor, "p 3"]
    weights: Float[Tensor, " p"] | None = None


def keypoint_distance(
    fixed_mm: Float[Tensor, "p 3"],
    moving_mm: Float[Tensor, "p 3"],
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    weights: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, ""]:
    """K in mm²: the mean of the squared distances, weighted by ``weights``. Without points, or with weights 0, it is 0.

    If an affine map is applied after the field, first map the moving keypoints by its inverse. The field is trilinear
    between voxel centres; points outside the grid get the border value.
    """
    check_same_shape(fixed_mm.shape, moving_mm.shape)
    if not len(fixed_mm):
        return displacement[:, :, :0].sum()  # 0, and still part of the graph
    wanted = (moving_mm.double() - fixed_mm.double()).to(displacement)  # subtract in float64: differences are small
    residual = displacement_at(fixed_mm, displacement, grid) - wanted
    squares = (residual * residual).sum(dim=1)
    if weights is None:
        return squares.mean()
    check_same_shape(squares.shape, weights.shape)
    trust = weights.to(squares)
    total = trust.sum()
    return (trust * squares).sum() / torch.where(total > 0, total, 1)

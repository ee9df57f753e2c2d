"""Normalised gradient field distance, D (Hering et al. 2021, section 3.2.1; Haber and Modersitzki 2006).

    D = 1/|Ω| ∫_Ω 1 - ⟨∇W, ∇F⟩²_ε / (‖∇W‖²_ε ‖∇F‖²_ε) dx,    ⟨f, g⟩_ε = Σ_j f_j g_j + ε²,    ‖f‖²_ε = ⟨f, f⟩_ε

with F the fixed and W(x) = M(y(x)) the warped moving image. D is small where edges are parallel, whatever their
strength or sign. ε (HU/mm) is the gradient below which a voxel counts as flat. Flat on flat costs 0; an edge on flat
costs almost 1. The sign has no effect only for edges well above ε: ε² in the product slightly favours gradients of the
same direction.

The paper prints ``Σ_j (f_j g_j + ε²)``, which would count ε² three times. We read ``Σ_j f_j g_j + ε²``, as in Haber and
Modersitzki (2006) and Rühaak et al. (2017). The printed form is the same with √3 ε instead of ε.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid
from .domain import check_same_shape, domain_mean


def ngf_distance(
    fixed: Float[Tensor, "n 1 z y x"],
    warped: Float[Tensor, "n 1 z y x"],
    grid: Grid,
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None,
    epsilon_hu_per_mm: float,
) -> Float[Tensor, ""]:
    """D in [0, 1] (to rounding), a mean over the mask; 0 where all edges are parallel.

    ``mask``: the lung mask of the fixed image, as bool or weights. If the moving field of view is truncated, multiply
    it by the validity of the warp. A gradient uses the six neighbours, so the images must be valid one voxel beyond the
    mask. An empty mask yields 0. InputError when ε is not positive: flat regions would be 0/0.
    """
    if epsilon_hu_per_mm <= 0:
        raise InputError(f"the NGF edge parameter is {epsilon_hu_per_mm} HU/mm, expected a value > 0")
    check_same_shape(fixed.shape, warped.shape)
    square = epsilon_hu_per_mm**2
    of_fixed, of_warped = gradient(fixed, grid), gradient(warped, grid)
    product = _dot(of_warped, of_fixed) + square
    norms = (_dot(of_warped, of_warped) + square) * (_dot(of_fixed, of_fixed) + square)
    return domain_mean((1 - product * product / norms)[:, 0], mask)


def edge_parameter(
    image: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    mask: Bool[Tensor, "1 1 z y x"] | Float[Tensor, "1 1 z y x"] | None,
    noise: float,
) -> float:
    """The automatic ε = ν/V ∫_Ω ‖∇I‖ dx in HU/mm (Haber and Modersitzki 2006), ν = ``noise`` (no unit).

    ε is the mean gradient over the mask, times ν. It is 0 for an empty mask or a flat image; `ngf_distance` refuses
    ε = 0.
    """
    of_image = gradient(image, grid)
    return noise * float(domain_mean(_dot(of_image, of_image).sqrt()[:, 0], mask))


def gradient(image: Float[Tensor, "n 1 z y x"], grid: Grid) -> tuple[Float[Tensor, "n 1 z y x"], ...]:
    """Derivatives along the index axes x, y, z, per mm: central inside, one-sided at the border.

    Products and norms of gradients do not depend on the (orthonormal) direction matrix, so it is left out. Needs two
    voxels along each axis.
    """
    check_same_shape(grid.shape, image.shape[2:])
    if min(grid.size) < 2:
        raise ValueError(f"gradients need at least two voxels along each axis, got a grid of {grid.size}")
    return tuple(torch.gradient(image, spacing=grid.spacing, dim=(-1, -2, -3)))


def _dot(f: tuple[Tensor, ...], g: tuple[Tensor, ...]) -> Tensor:
    return torch.addcmul(torch.addcmul(f[0] * g[0], f[1], g[1]), f[2], g[2])

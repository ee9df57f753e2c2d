"""Curvature regulariser, R (Hering et al. 2021, equation 2; Fischer and Modersitzki 2003).

    R = 1/|Ω| ∫_Ω Σ_j (Δu_j)² dx,    in 1/mm²

of the displacement u = y - x; Δy = Δu.

The Laplacian is the 7-point stencil with the grid's spacing. Beyond the border the field goes on linearly: the
second difference along an axis is 0 at the two ends of that axis, those along the other axes still count there. The
mean goes over *all* voxels, and affine fields cost 0 (to rounding). Repeating the border voxel, the usual
Neumann rule, would charge a field with slope a about 2 a²/(spacing · length) per axis: more as the grid is refined, so
that α would depend on the grid.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry import Grid
from .domain import check_same_shape, domain_mean


def curvature(
    displacement: Float[Tensor, "n 3 z y x"],
    grid: Grid,
    mask: Bool[Tensor, "n 1 z y x"] | Float[Tensor, "n 1 z y x"] | None = None,
) -> Float[Tensor, ""]:
    """R in 1/mm², a mean over the mask (by default the whole grid); an empty mask yields 0.

    The same for any direction matrix (orthonormal): Δ is invariant and Σ_j does not mind turned components.
    """
    laplacian_ = laplacian(displacement, grid)
    return domain_mean((laplacian_ * laplacian_).sum(dim=1), mask)


def laplacian(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """Δu in 1/mm, component by component; the boundary rule is above. Needs two voxels along each axis."""
    check_same_shape(grid.shape, displacement.shape[2:])
    if min(grid.size) < 2:
        raise ValueError(f"the Laplacian needs at least two voxels along each axis, got a grid of {grid.size}")
    along_x, along_y, along_z = (
        F.pad(torch.diff(displacement, n=2, dim=dim), [0, 0] * (-dim - 1) + [1, 1]) / spacing**2
        for dim, spacing in zip((-1, -2, -3), grid.spacing, strict=True)
    )
    return along_x + along_y + along_z

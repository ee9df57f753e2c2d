"""Curvature regulariser, R (Hering et al. 2021, equation 2; Fischer and Modersitzki 2003).

    R = 1/|Ω| ∫_Ω Σ_j (Δu_j)² dx,    in 1/mm²

of the displacement u = y - x; Δy = Δu.

The Laplacian is the 7-point stencil with the grid's spacing. Beyond the border, the field continues linearly: the
second difference along an axis is 0 at the two ends of that axis, and the differences along the other axes still count
there. The mean is over *all* voxels, and affine fields cost 0 (to rounding). The usual Neumann rule repeats the border
voxel. A field with slope a would then cost about 2 a²/(spacing · length) per axis. This grows as the grid is refined,
so α would depend on the grid.
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

    R is the same for any (orthonormal) direction matrix: a rotation of the axes changes neither Δ nor the sum over j.
    """
    laplacian_ = laplacian(displacement, grid)
    return domain_mean((laplacian_ * laplacian_).sum(dim=1), mask)


def laplacian(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """Δu in 1/mm, component by component; see above for the boundary rule. Needs two voxels along each axis."""
    check_same_shape(grid.shape, displacement.shape[2:])
    if min(grid.size) < 2:
        raise ValueError(f"the Laplacian needs at least two voxels along each axis, got a grid of {grid.size}")
    along_x, along_y, along_z = (
        F.pad(torch.diff(displacement, n=2, dim=dim), [0, 0] * (-dim - 1) + [1, 1]) / spacing**2
        for dim, spacing in zip((-1, -2, -3), grid.spacing, strict=True)
    )
    return along_x + along_y + along_z

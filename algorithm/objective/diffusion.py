"""Diffusion regulariser: how much neighbours differ (Horn and Schunck 1981; Fischer and Modersitzki 2002).

    E = 1/|Ω| ∫_Ω Σ_j ‖∇u_j‖² dx,    no unit

Unlike the curvature, it also penalises a linear change of the field. So it limits the deformation of the lung where the
image has no structure. Derivatives are forward differences divided by the grid's spacing. Each axis is a mean over its
own differences.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Grid
from .domain import check_same_shape


def diffusion(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, ""]:
    """E (no unit), a mean over the grid; the same for any direction matrix. Needs two voxels along each axis."""
    check_same_shape(grid.shape, displacement.shape[2:])
    along_x, along_y, along_z = (
        (torch.diff(displacement, dim=dim) / spacing).square().sum(dim=1).mean()
        for dim, spacing in zip((-1, -2, -3), grid.spacing, strict=True)
    )
    return along_x + along_y + along_z

"""Local deformation of the lung by the map: change of volume, change of lengths, and their anisotropy.

F = ∇(affine(x + u(x))) is taken on the grid that u lives on, by central differences. Its singular values are the
principal stretches λ₁ ≥ λ₂ ≥ λ₃, the roots of the eigenvalues of the right Cauchy-Green tensor FᵀF; det F = λ₁ λ₂ λ₃.
All refer to the map from expiration to inspiration; if the inspiration is the fixed scan, the stretches are those of
F⁻¹.
"""

import numpy as np
import torch
import torch.nn.functional as nn
from jaxtyping import Float
from torch import Tensor

from ..fields.frame import coarse
from ..fields.newton import derivative
from ..fields.transform import Transform
from ..geometry import Grid, resample, resample_image
from ..lungs import LungMask

MOST_VOXELS = 2**24
"""Maximum number of voxels of the grid on which the derivatives are taken."""


@torch.no_grad()
def deformation(transform: Transform, lungs: LungMask) -> tuple[Float[Tensor, "1 4 z y x"], Grid]:
    """det F and the stretches, smallest first, of the map from the fixed to the moving scan; 1 outside the lungs."""
    grid = coarse(transform.grid, MOST_VOXELS)
    slope = derivative(resample(transform.displacement, transform.grid, grid), grid)[0].reshape(3, 3, *grid.shape)
    share = resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0)
    near = nn.max_pool3d(share, 3, stride=1, padding=1)[0, 0] > 0
    linear = torch.tensor(transform.affine.matrix, dtype=torch.float64)
    gradient = linear @ slope[:, :, near].permute(2, 0, 1).double()
    found = torch.ones(1, 4, *grid.shape)
    found[0, 0, near] = torch.linalg.det(gradient).float()
    found[0, 1:, near] = torch.from_numpy(principal_stretches(gradient.numpy()).T).float()
    return found, grid


def principal_stretches(gradient: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "n 3"]:
    """The singular values of F, smallest first: the square roots of the eigenvalues of FᵀF."""
    squares = np.linalg.eigvalsh(np.swapaxes(gradient, 1, 2) @ gradient)
    stretches: np.ndarray = np.sqrt(np.maximum(squares, 0))
    return stretches


def principal_strains(stretches: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """The eigenvalues (λ² - 1) / 2 of the Green-Lagrange strain E = (FᵀF - I) / 2; They are 0 where no length
    changes."""
    strains: np.ndarray = (stretches**2 - 1) / 2
    return strains


def anisotropic_deformation_index(stretches: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """ADI = √(((λ₁ - λ₂) / λ₂)² + ((λ₂ - λ₃) / λ₃)²), for stretches sorted from small to large: 0 where all directions
    stretch equally.

    Amelon et al. 2011 (J Biomech 44(13):2489).
    """
    third, second, first = np.asarray(stretches).T
    index: np.ndarray = np.hypot((first - second) / second, (second - third) / third)
    return index


def slab_rod_index(stretches: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """SRI = (2/π) arctan(λ₃ (λ₁ - λ₂) / (λ₂ (λ₂ - λ₃))), for stretches sorted from small to large: 0 slab, 1 rod.

    A slab is λ₁ = λ₂ > λ₃, a rod λ₁ > λ₂ = λ₃; NaN where all three are equal to a thousandth, because this is neither.
    Amelon et al. 2011.
    """
    third, second, first = np.asarray(stretches).T
    index: np.ndarray = np.arctan2(third * (first - second), second * (second - third)) * (2 / np.pi)
    return np.where(first - third > 1e-3 * first, index, np.nan)

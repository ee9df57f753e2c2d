"""The input of the pre-alignment, and the image terms of its objective."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Grid, downsample, inside, sample
from ..objective.local_correlation import local_correlation_distance


@dataclass(frozen=True)
class PrealignSettings:
    """Settings of `prealign`; lengths in mm."""

    iterations: int = 30
    """Maximum number of iterations from each start, at half the resolution."""
    searched: int = 6
    """Number of the best placements of the search that become starts."""
    most_rounds: int = 8
    """Maximum number of restarts of the best result from its end point."""
    settled: float = 0.02
    """Restarts stop when one of them decreases the image terms by less than this share."""
    deformed: tuple[int, int] = (30, 20)
    """Adam steps of the deformable registration, at half and at full resolution."""
    deformed_step_vox: float = 1.0
    """Size of the first Adam step: about the motion of a control point. It decreases linearly to a tenth."""
    deformed_window: int = 3
    diffusion: float = 2.0
    """Weight of the diffusion term."""
    whole_gain: float = 0.2
    """If the deformable registration decreases the image terms by at least this share, it alone gives the result. If
    they decrease by less, the best affine map counts, too."""
    polish: int = 30
    """Maximum number of iterations for the best affine map, at full resolution."""
    steepness: float = 200.0
    """Factor of the objective in the affine minimisation, so that its first step is of the order of 1 mm."""
    converged: float = 1e-5
    """Convergence threshold: the minimisation stops when a step decreases the objective by less than this share."""
    mask_weight: float = 1.0
    """β: weight of the squared difference of the masks."""
    rigidity: float = 0.05
    """ρ: weight of the change of the linear part."""
    window: int = 5
    """Window of the local correlation in voxels of the coarse grid."""
    least_overlap: float = 0.3
    """Minimum share of the fixed lungs inside the moving field of view; other starts are dropped."""


@dataclass(frozen=True)
class Scan:
    """One image on a coarse grid (some 4 mm, even sizes) around its lungs."""

    voxels: Float[Tensor, "1 1 z y x"]
    """HU."""
    lungs: Float[Tensor, "1 1 z y x"]
    """Lung mask, 0 to 1."""
    grid: Grid

    def coarsened(self) -> "Scan":
        """The same scan at half the resolution."""
        return Scan(downsample(self.voxels), downsample(self.lungs), self.grid.coarsened())

    def lung_points_mm(self) -> np.ndarray:
        """World positions (n, 3) of the lung voxels."""
        z, y, x = np.nonzero(self.lungs[0, 0].numpy() > 0.5)
        return self.grid.to_world(np.stack([x, y, z], axis=1))


def image_terms(
    fixed: Scan, moving: Scan, index: Float[Tensor, "1 z y x 3"], settings: PrealignSettings, window: int
) -> tuple[Tensor, float]:
    """Sum of local correlation and mask terms, and the share of the fixed lungs inside the moving field of view."""
    valid = inside(index, moving.grid.shape)[:, None].float()
    warped = sample(torch.cat([moving.voxels, moving.lungs], dim=1), index)
    weight = fixed.lungs * valid
    covered = float(weight.sum() / fixed.lungs.sum())
    similarity = local_correlation_distance(fixed.voxels, warped[:, :1], weight, window)
    masks = ((warped[:, 1:] - fixed.lungs).square() * valid).sum() / fixed.lungs.sum()
    return similarity + settings.mask_weight * masks, covered

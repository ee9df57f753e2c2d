"""Plausibility of the deformation: the determinant of the map x ↦ x + u(x), section 4.6 of Hering et al. 2021.

det(I + ∇u) in world coordinates, of the *written* field: with A = direction · diag(spacing) and u on the index grid, I
+ ∇u = (A + ∂u/∂i) A⁻¹, so it is det(A + ∂u/∂i) / det A. Central differences inside, one-sided ones at the border. Above
1 is expansion from fixed to moving, below 1 contraction; 0 or less (apart from rounding) is folding.
"""

import math
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float

from .errors import CaseError
from .fields import axes_of

FOLDED = 1e-5
"""Values up to this count as 0. With displacements of some 100 mm in float32, a determinant of 0 becomes this large,
with a random sign. No lung shrinks to a hundred thousandth."""
SLAB = 4
"""Number of slices at a time. It is small, so that the dozen arrays of a step stay in the processor's cache."""


@dataclass(frozen=True)
class JacobianStatistics:
    """All except ``folding_percent_all`` refer to the lung mask, or without a mask to the whole grid."""

    folding_percent: float | None
    """Percentage of voxels of the lung mask with a determinant ≤ `FOLDED`; None without a mask."""
    folding_percent_all: float
    """Percentage of such voxels in the whole grid."""
    jacobian_min: float
    jacobian_max: float
    std_log_jacobian: float | None
    """SDlogJ, the standard deviation (of the population) of log det over the voxels that are not folded. None if all
    are folded. Learn2Reg's evaluation uses log(det + 3), which is another quantity."""


def jacobian_statistics(field: sitk.Image, lung_mask: Bool[np.ndarray, "z y x"] | None) -> JacobianStatistics:
    """``lung_mask`` is on the grid of the field. CaseError if it is not, if it is empty, or if the field is a single
    slice."""
    vectors = sitk.GetArrayViewFromImage(field)
    shape = vectors.shape[:3]
    if min(shape) < 2:
        raise CaseError(f"the displacement field has {field.GetSize()} voxels, expected at least 2 along each axis")
    if lung_mask is not None and lung_mask.shape != shape:
        raise CaseError(f"the lung mask has (z, y, x) = {lung_mask.shape} voxels, the field {shape}, expected as many")
    if lung_mask is not None and not lung_mask.any():
        raise CaseError("the lung mask is empty, expected some voxels above 0")

    folded_all, inside = 0, _Inside()
    for z in range(0, shape[0], SLAB):
        determinant = _slab_determinant(vectors, axes_of(field), z)
        folded_all += int(np.count_nonzero(determinant <= FOLDED))
        inside.add(determinant.ravel() if lung_mask is None else determinant[lung_mask[z : z + SLAB]])
    return JacobianStatistics(
        folding_percent=None if lung_mask is None else 100 * inside.folded / inside.voxels,
        folding_percent_all=100 * folded_all / math.prod(shape),
        jacobian_min=inside.low,
        jacobian_max=inside.high,
        std_log_jacobian=inside.std_log,
    )


def jacobian_determinant(field: sitk.Image) -> Float[np.ndarray, "z y x"]:
    """det(I + ∇u) at every voxel."""
    vectors = sitk.GetArrayViewFromImage(field)
    return np.concatenate([_slab_determinant(vectors, axes_of(field), z) for z in range(0, len(vectors), SLAB)])


@dataclass
class _Inside:
    """Statistics that are collected slab by slab, in and around the lungs."""

    voxels: int = 0
    folded: int = 0
    low: float = math.inf
    high: float = -math.inf
    logs: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared deviations of the logarithms from their mean."""

    def add(self, determinant: Float[np.ndarray, " n"]) -> None:
        """Add voxels; the moments of the parts are combined as in Chan, Golub, LeVeque 1983."""
        if not len(determinant):
            return
        positive = determinant[determinant > FOLDED]
        self.voxels += len(determinant)
        self.folded += len(determinant) - len(positive)
        self.low = min(self.low, float(determinant.min()))
        self.high = max(self.high, float(determinant.max()))
        if not len(positive):
            return
        logs = np.log(positive)
        mean, n = float(logs.mean(dtype=float)), len(logs)
        total = self.logs + n
        self.squares += float(np.square(logs - np.float32(mean)).sum(dtype=float))
        self.squares += (mean - self.mean) ** 2 * self.logs * n / total
        self.mean += (mean - self.mean) * n / total
        self.logs = total

    @property
    def std_log(self) -> float | None:
        return math.sqrt(self.squares / self.logs) if self.logs else None


def _slab_determinant(
    vectors: Float[np.ndarray, "z y x 3"], axes: Float[np.ndarray, "3 3"], start: int
) -> Float[np.ndarray, "d y x"]:
    """The determinant of `SLAB` slices from ``start`` on, in float32; derivatives use one more slice on either side."""
    first = max(start - 1, 0)
    slab = vectors[first : start + SLAB + 1]
    rows = []
    for component in range(3):
        derivatives = np.gradient(np.ascontiguousarray(slab[..., component], np.float32))[::-1]  # along x, y, z
        keep = slice(start - first, start - first + SLAB)
        rows.append([d[keep] + np.float32(axes[component, i]) for i, d in enumerate(derivatives)])
    (a, b, c), (d, e, f), (g, h, i) = rows
    determinant: np.ndarray = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    determinant /= np.float32(np.linalg.det(axes))
    return determinant

"""Distinctive points of the fixed lungs: the Förstner operator.

    S = G_ρ * (∇I ∇Iᵀ),    q = 1 / tr(S⁻¹)    in (HU/mm)²

(Förstner and Gülch 1987; for lungs Heinrich et al. 2015 and Rühaak et al. 2017). S is the structure tensor of the image
in the lung window. A Gaussian of σ smooths the image before the derivatives, and a Gaussian of ρ smooths the products.
q is the harmonic mean of the eigenvalues, divided by three. It is large only where the image changes along *all three*
directions: at forks and bends of vessels, but not along their straight parts or at the pleura.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import InputError
from ...geometry import Grid, Vector


@dataclass(frozen=True)
class DetectSettings:
    """Settings of the detection; InputError for a value out of range."""

    number: int = 2500
    """Maximum number of points. The most distinctive ones are kept."""
    spacing_mm: float = 3.0
    """Minimum distance of two points along at least one index axis (up to rounding to voxels)."""
    erosion_mm: float = 2.0
    """Minimum distance from the outline of the lung mask, where chest wall and lung slide along each other."""
    image_sigma_mm: float = 1.0
    """σ: smoothing before the derivatives."""
    tensor_sigma_mm: float = 1.4
    """ρ: size of the neighbourhood in which a point is distinctive. 2.8 mm gives a third of the maxima."""
    threshold_hu_per_mm: float = 1.0
    """Threshold for √q: lower values are noise."""
    low_hu: float = -1000.0
    high_hu: float = 200.0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise InputError(f"{self.number} keypoints were asked for, expected at least 1")
        for name in ("spacing_mm", "image_sigma_mm", "tensor_sigma_mm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"the keypoint setting {name} is {getattr(self, name)}, expected a number > 0")
        if not 0 <= self.erosion_mm < math.inf:
            raise InputError(f"the keypoint setting erosion_mm is {self.erosion_mm}, expected a number ≥ 0")


def distinctive_points(
    fixed: Float[Tensor, "1 1 z y x"],
    mask: Bool[Tensor, "1 1 z y x"] | Float[Tensor, "1 1 z y x"],
    grid: Grid,
    settings: DetectSettings = DetectSettings(),
) -> Int[Tensor, "p 3"]:
    """Voxel indices (x, y, z) of distinctive points, the most distinctive first; none for an empty mask.

    ``fixed`` (HU) and ``mask`` of the lungs (0 to 1; above one half counts) are on ``grid``. The points are the local
    maxima of q in windows of ``spacing_mm`` to each side, in the eroded mask and above the threshold. The window
    distributes the points: a vessel tree of strong contrast gets no more points per volume than the thin vessels under
    the pleura. If there are more than ``number`` maxima, the weakest are left out.
    """
    values = distinctiveness(fixed.clamp(settings.low_hu, settings.high_hu), grid, settings)
    inner = eroded(mask > 0.5, grid, settings.erosion_mm)
    values = torch.where(inner, values, 0)
    peaks = (values >= box_maximum(values, grid, settings.spacing_mm)) & (values > settings.threshold_hu_per_mm**2)
    index = peaks[0, 0].nonzero()
    strength = values[0, 0][peaks[0, 0]]
    order = strength.argsort(descending=True, stable=True)[: settings.number]
    return index[order].flip(1)


def distinctiveness(
    image: Float[Tensor, "1 1 z y x"], grid: Grid, settings: DetectSettings = DetectSettings()
) -> Float[Tensor, "1 1 z y x"]:
    """q in (HU/mm)² at every voxel; 0 where the structure tensor is singular.

    q = det S / tr adj S (determinant and adjugate), so no matrix must be inverted.
    """
    xx, yy, zz, xy, xz, yz = structure_tensor(image, grid, settings.image_sigma_mm, settings.tensor_sigma_mm).unbind(1)
    minors = (yy * zz - yz * yz, xx * zz - xz * xz, xx * yy - xy * xy)
    trace = minors[0] + minors[1] + minors[2]
    determinant = xx * minors[0] - xy * (xy * zz - yz * xz) + xz * (xy * yz - yy * xz)
    quotient = determinant / torch.where(trace > 0, trace, 1)
    return torch.where(trace > 0, quotient, 0).clamp(min=0)[:, None]  # rounding can leave a determinant of -0


def structure_tensor(
    image: Float[Tensor, "1 1 z y x"], grid: Grid, image_sigma_mm: float, tensor_sigma_mm: float
) -> Float[Tensor, "1 6 z y x"]:
    """S in (HU/mm)² along the index axes: xx, yy, zz, xy, xz, yz.

    tr S⁻¹ is the same for all orthonormal axes, so the grid's direction does not matter. Differences are central
    inside and one-sided at the border. The Gaussians repeat border values.
    """
    smooth = gaussian(image, grid, image_sigma_mm)
    x, y, z = (torch.gradient(smooth, spacing=s, dim=4 - axis)[0] for axis, s in enumerate(grid.spacing))
    return gaussian(torch.cat([x * x, y * y, z * z, x * y, x * z, y * z], dim=1), grid, tensor_sigma_mm)


def gaussian(volume: Float[Tensor, "n c z y x"], grid: Grid, sigma_mm: float) -> Float[Tensor, "n c z y x"]:
    """Smooth by a Gaussian of ``sigma_mm``, cut at three σ (at least one voxel); border values are repeated."""
    for axis, spacing in enumerate(grid.spacing):
        sigma = sigma_mm / spacing
        radius = max(1, math.ceil(3 * sigma))
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
        pad = [0] * 6
        pad[2 * axis] = pad[2 * axis + 1] = radius
        padded = F.pad(volume, pad, mode="replicate")
        size = volume.shape[4 - axis]
        volume = torch.zeros_like(volume)  # faster on the CPU than a convolution of one channel
        for start, tap in enumerate((taps / taps.sum()).tolist()):
            volume.add_(padded.narrow(4 - axis, start, size), alpha=tap)
    return volume


def eroded(mask: Bool[Tensor, "1 1 z y x"], grid: Grid, radius_mm: float) -> Bool[Tensor, "1 1 z y x"]:
    """The mask eroded by a box of ``radius_mm`` to each side. At the border of the grid, the mask continues outside."""
    return box_maximum((~mask).float(), grid, radius_mm) == 0


def box_maximum(volume: Float[Tensor, "1 1 z y x"], grid: Grid, radius_mm: float) -> Float[Tensor, "1 1 z y x"]:
    """The largest value in a box of ``radius_mm`` (rounded to voxels) to each side, one axis after the other."""
    for axis, radius in enumerate(voxels(grid.spacing, radius_mm)):
        kernel, pad = [1, 1, 1], [0, 0, 0]
        kernel[2 - axis], pad[2 - axis] = 2 * radius + 1, radius
        volume = F.max_pool3d(volume, kernel, stride=1, padding=pad)
    return volume


def voxels(spacing: Vector, length_mm: float) -> tuple[int, int, int]:
    """A length in voxels along each index axis, rounded."""
    x, y, z = (round(length_mm / s) for s in spacing)
    return x, y, z

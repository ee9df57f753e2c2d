"""Propagated label images and their overlap."""

import numpy as np
import SimpleITK as sitk
from grand_challenge_metrics.stats import calculate_confusion_matrix  # evalutils
from jaxtyping import Float, Shaped, UInt8, UInt16

from .errors import CaseError
from .fields import SLAB, axes_of, same_grid

Labels = UInt8[np.ndarray, "z y x"] | UInt16[np.ndarray, "z y x"]

TIE = 1e-5
"""Tolerance in voxels: positions up to this far below the middle of two voxels count as the middle and go to the upper
voxel. Without it, a shift by half a voxel would be rounded up or down depending on the last bit."""


def warp_labels(moving: sitk.Image, field: sitk.Image, fixed: sitk.Image) -> Labels:
    """The moving labels at x + u(x) for the voxel centres x of ``fixed``, by nearest neighbour: b_M(y) in section 4.4.

    They are 0 outside the moving image. A field on another grid than ``fixed`` is interpolated linearly and is zero
    outside its own grid, as in `sitk.DisplacementFieldTransform`. CaseError unless the labels are UInt8 or UInt16.
    """
    labels = sitk.GetArrayViewFromImage(moving)
    if labels.dtype not in (np.uint8, np.uint16):
        raise CaseError(f"labels of type {moving.GetPixelIDTypeAsString()}, expected 8-bit or 16-bit unsigned integers")
    warped = np.zeros(fixed.GetSize()[::-1], labels.dtype)
    grid = None if same_grid(field, fixed) else fixed
    for z in range(0, len(warped), SLAB):
        slab = fixed[:, :, z : z + SLAB]
        displacement = _on(slab, field) if grid else sitk.GetArrayViewFromImage(field)[z : z + SLAB]
        warped[z : z + SLAB] = _nearest(labels, moving, slab, displacement)
    return warped


def _on(grid: sitk.Image, field: sitk.Image) -> Float[np.ndarray, "z y x 3"]:
    """The field on another grid, zero outside its own grid."""
    nearby = sitk.Resample(field, grid, sitk.Transform(3, sitk.sitkIdentity), sitk.sitkLinear, 0.0)
    vectors: np.ndarray = sitk.GetArrayFromImage(nearby)
    return vectors


def _nearest(
    labels: Labels, moving: sitk.Image, grid: sitk.Image, displacement: Float[np.ndarray, "d h w 3"]
) -> Shaped[np.ndarray, "d h w"]:
    """Labels at x + u(x) for a slab. The index along each moving axis is a · i + b + c · u, rounded half up."""
    to_index = np.linalg.inv(axes_of(moving))
    matrix = to_index @ axes_of(grid)
    offset = to_index @ (np.array(grid.GetOrigin()) - moving.GetOrigin())
    nz, ny, nx = displacement.shape[:3]
    i, j, k = np.arange(nx), np.arange(ny)[:, None], np.arange(nz)[:, None, None]
    flat = np.zeros((nz, ny, nx), np.int64)
    inside = np.ones((nz, ny, nx), bool)
    for a, (size, stride) in enumerate(zip(moving.GetSize(), np.cumprod([1, *moving.GetSize()[:2]]), strict=True)):
        index = (matrix[a, 1] * j + matrix[a, 2] * k) + (matrix[a, 0] * i + offset[a] + 0.5 + TIE)
        for c in np.flatnonzero(to_index[a]):
            index += to_index[a, c] * displacement[..., c]
        inside &= (index >= 0) & (index < size)
        flat += stride * index.astype(np.int64)  # rounds down, because it is not negative
    flat[~inside] = 0
    return np.where(inside, labels.reshape(-1)[flat], labels.dtype.type(0))


def dice(fixed: Labels, warped: Labels, label: int) -> float | None:
    """2 |X ∩ Y| / (|X| + |Y|) for the voxels of one label; 0 if only one of the two has any, None if neither."""
    counts = calculate_confusion_matrix(fixed == label, warped == label, [0, 1])  # its own Dice is in float32
    total = int(counts[1].sum() + counts[:, 1].sum())
    return 2 * int(counts[1, 1]) / total if total else None

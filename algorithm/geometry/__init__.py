"""The conventions, and every operation that depends on them.

Volumes are tensors ``(n, c, z, y, x)``. Vectors have components ``(x, y, z)`` in world axes (LPS, mm), as in ITK.
A displacement field ``u`` lives on the grid of the *fixed* image and pulls: ``warped(x) = moving(x + u(x))``, as
``sitk.DisplacementFieldTransform`` applies it. A field is always in mm on a `Grid`: a change of resolution resamples
the field and never rescales it.

Voxels are points: index ``i`` is the voxel centre ``origin + direction · diag(spacing) · i``. Values between the
centres are trilinear. Up to half a voxel beyond the outermost centres, a volume has its border value (as in ITK).
Farther out, fields keep the border value and images have a fill value.
"""

from .displacement import (
    compose,
    displacement_at,
    index_displacement,
    invert,
    jacobian_determinant,
    lengths,
    with_affine,
    world_displacement,
)
from .grids import IDENTITY, Affine, Grid, Matrix, Size, Vector, canonical_axes, moved, restored, slabs
from .resampling import doubled, downsample, downsample_by, needed_part, resample, resample_image
from .sampling import IndexMap, index_map, inside, linear_index_map, moving_index, sample, validity
from .warping import has_loop, warp, warp_image

__all__ = [
    "IDENTITY",
    "Affine",
    "Grid",
    "IndexMap",
    "Matrix",
    "Size",
    "Vector",
    "canonical_axes",
    "compose",
    "displacement_at",
    "doubled",
    "downsample",
    "downsample_by",
    "has_loop",
    "index_displacement",
    "index_map",
    "inside",
    "invert",
    "jacobian_determinant",
    "lengths",
    "linear_index_map",
    "moved",
    "moving_index",
    "needed_part",
    "resample",
    "resample_image",
    "restored",
    "sample",
    "slabs",
    "validity",
    "warp",
    "warp_image",
    "with_affine",
    "world_displacement",
]

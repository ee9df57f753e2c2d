"""The result of a registration. Fields and warped images are made slab by slab, so only a part is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..files.images import Image
from ..geometry import Affine, Grid, resample, slabs, warp_image, with_affine
from ..hounsfield import AIR_HU


@dataclass(frozen=True)
class Transform:
    """x ↦ affine(x + u(x)), from the fixed to the moving world."""

    displacement: Float[Tensor, "1 3 z y x"]
    """u in mm on ``grid``, on the CPU."""
    grid: Grid
    affine: Affine = Affine()  # noqa: RUF009  (immutable)

    def field(self, grid: Grid) -> Float[Tensor, "1 3 z y x"]:
        """The displacement affine(x + u(x)) - x (mm) on any grid of the fixed world."""
        return with_affine(resample(self.displacement, self.grid, grid), grid, self.affine)

    def field_slabs(self, grid: Grid) -> Iterator[Float[Tensor, "1 3 d y x"]]:
        """`field`, slab by slab along z."""
        for slab in slabs(grid):
            yield self.field(slab)

    def warped_slabs(self, moving: Image, grid: Grid) -> Iterator[Tensor]:
        """The moving image on ``grid``, (1, 1, d, y, x) slabs of its type, -1000 HU outside its field of view."""
        for slab in slabs(grid):
            warped = warp_image(moving.voxels, moving.grid, self.field(slab), slab, fill=AIR_HU)
            yield warped.to(moving.voxels.dtype) if moving.voxels.is_floating_point() else warped.round().short()

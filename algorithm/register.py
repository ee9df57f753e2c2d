"""From two scans to one displacement field: prepare → cascade → full transform.

lungs      mask of both images (given, or from the HU)
prealign   affine map between the lungs
crop       box around the fixed lungs, resized to the network grid (192×160×192)
cascade    displacement field on the network grid
"""

import logging
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Affine, Grid, resample_image
from algorithm.images import Image
from algorithm.lungs import LungMask, crop_grid, lung_mask
from algorithm.network import AIR_HU
from algorithm.prealign import PrealignSettings, Scan, prealign

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareSettings:
    """How scans become network input; lengths in mm."""

    margin_mm: float = 12.0
    """Free space around the lungs in the network grid."""
    moving_margin_vox: int = 16
    """So much more of the moving image is kept around the network grid, for displacements that leave it."""
    prealign_spacing_mm: float = 4.0
    """Finest voxel of the pre-alignment."""
    prealign: PrealignSettings = field(default_factory=PrealignSettings)


@dataclass(frozen=True)
class Prepared:
    """A pair as the cascade sees it. The moving image and mask are pre-aligned: they lie in the fixed world."""

    fixed: Float[Tensor, "1 1 z y x"]
    """HU on ``grid``."""
    fixed_lungs: Float[Tensor, "1 1 z y x"]
    """Lung mask on ``grid``, 0 to 1."""
    grid: Grid
    """The network grid: the box around the fixed lungs."""
    moving: Float[Tensor, "1 1 zm ym xm"]
    moving_lungs: Float[Tensor, "1 1 zm ym xm"]
    moving_grid: Grid
    affine: Affine
    """Pre-alignment: fixed world → moving world."""

    def to(self, device: torch.device) -> "Prepared":
        """The same pair on another device."""
        fixed, lungs = self.fixed.to(device), self.fixed_lungs.to(device)
        moving, moving_lungs = self.moving.to(device), self.moving_lungs.to(device)
        return Prepared(fixed, lungs, self.grid, moving, moving_lungs, self.moving_grid, self.affine)


def prepare(
    fixed: Image,
    moving: Image,
    network_size: tuple[int, int, int],
    fixed_lungs: LungMask | None = None,
    moving_lungs: LungMask | None = None,
    settings: PrepareSettings = PrepareSettings(),
) -> Prepared:
    """Masks, pre-aligns, crops and resamples a pair of images in canonical storage order; InputError without lungs."""
    fixed_lungs = fixed_lungs or lung_mask(fixed.voxels, fixed.grid, str(fixed.path))
    moving_lungs = moving_lungs or lung_mask(moving.voxels, moving.grid, str(moving.path))
    affine = prealign(_scan(fixed, fixed_lungs, settings), _scan(moving, moving_lungs, settings), settings.prealign)
    grid = crop_grid(fixed_lungs, settings.margin_mm, network_size)
    moving_grid = grid.padded(settings.moving_margin_vox)
    return Prepared(
        resample_image(fixed.voxels, fixed.grid, grid, least=AIR_HU, fill=AIR_HU),
        resample_image(fixed_lungs.mask, fixed_lungs.grid, grid, least=0.0, fill=0.0),
        grid,
        resample_image(moving.voxels, moving.grid, moving_grid, affine=affine, least=AIR_HU, fill=AIR_HU),
        resample_image(moving_lungs.mask, moving_lungs.grid, moving_grid, affine=affine, least=0.0, fill=0.0),
        moving_grid,
        affine,
    )


def _scan(image: Image, lungs: LungMask, settings: PrepareSettings) -> Scan:
    """The surroundings of the lungs on the grid of the pre-alignment (even sizes: it halves them once)."""
    box = crop_grid(lungs, 5 * settings.prealign_spacing_mm, (2, 2, 2))
    x, y, z = (2 * max(4, round(extent / settings.prealign_spacing_mm / 2)) for extent in box.extent_mm)
    grid = box.resized((x, y, z))
    voxels = resample_image(image.voxels, image.grid, grid, least=AIR_HU, fill=AIR_HU).clamp(max=200)
    return Scan(voxels, resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0), grid)

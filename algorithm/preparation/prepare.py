"""From two scans to the input of the cascade: lung masks, pre-alignment, crop, network grid."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import Affine, Grid, downsample, resample_image
from ..hounsfield import AIR_HU
from ..lungs import crop_grid
from .prealign import prealign
from .scan import PrealignSettings, Scan
from .subject import Subject


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `prepare`; lengths in mm."""

    margin_mm: float = 12.0
    """Margin around the lungs in the network grid."""
    moving_margin_vox: int = 16
    """Margin of the moving image around the network grid, for displacements that point outside it."""
    prealign_spacing_mm: float = 4.0
    """Finest voxel spacing of the pre-alignment."""
    prealign: PrealignSettings = field(default_factory=PrealignSettings)


@dataclass(frozen=True)
class Prepared:
    """A pair as input of the cascade. The moving image and mask are pre-aligned: they lie in the fixed world."""

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

    def halved(self) -> "Prepared":
        """The same pair at half the resolution."""
        return Prepared(
            downsample(self.fixed),
            downsample(self.fixed_lungs),
            self.grid.coarsened(),
            downsample(self.moving),
            downsample(self.moving_lungs),
            self.moving_grid.coarsened(),
            self.affine,
        )

    def to(self, device: torch.device) -> "Prepared":
        """The same pair on another device."""
        fixed, lungs = self.fixed.to(device), self.fixed_lungs.to(device)
        moving, moving_lungs = self.moving.to(device), self.moving_lungs.to(device)
        return Prepared(fixed, lungs, self.grid, moving, moving_lungs, self.moving_grid, self.affine)


def prepare(
    fixed: Subject,
    moving: Subject,
    network_size: tuple[int, int, int],
    settings: PrepareSettings = PrepareSettings(),
) -> Prepared:
    """Pre-align, crop and resample a pair; InputError when the two scans share too little."""
    with one_thread():  # thousands of steps on few voxels: a second thread costs more time than it saves
        affine = prealign(_scan(fixed, settings), _scan(moving, settings), settings.prealign)
    grid = crop_grid(fixed.lungs, settings.margin_mm, network_size)
    moving_grid = grid.padded(settings.moving_margin_vox)
    return Prepared(
        _hu(fixed, grid, Affine()),
        _lungs(fixed, grid, Affine()),
        grid,
        _hu(moving, moving_grid, affine),
        _lungs(moving, moving_grid, affine),
        moving_grid,
        affine,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread in the body."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _hu(subject: Subject, grid: Grid, affine: Affine) -> Float[Tensor, "1 1 z y x"]:
    image = subject.image
    return resample_image(image.voxels, image.grid, grid, affine=affine, least=AIR_HU, fill=AIR_HU)


def _lungs(subject: Subject, grid: Grid, affine: Affine) -> Float[Tensor, "1 1 z y x"]:
    return resample_image(subject.lungs.mask, subject.lungs.grid, grid, affine=affine, least=0.0, fill=0.0)


def _scan(subject: Subject, settings: PrepareSettings) -> Scan:
    """The lungs and their surroundings on the grid of the pre-alignment (even sizes, because it halves them once).

    The grid ends where the image ends: outside the image there is nothing to compare.
    """
    box = crop_grid(subject.lungs, 5 * settings.prealign_spacing_mm, (2, 2, 2)).within(subject.image.grid, (2, 2, 2))
    x, y, z = (2 * max(4, round(extent / settings.prealign_spacing_mm / 2)) for extent in box.extent_mm)
    grid = box.resized((x, y, z))
    return Scan(_hu(subject, grid, Affine()).clamp(max=200), _lungs(subject, grid, Affine()), grid)

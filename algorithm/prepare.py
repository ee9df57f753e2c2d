"""From two scans to what the cascade sees: lung masks, pre-alignment, crop, network grid."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InputError
from .geometry import Affine, Grid, resample_image, validity
from .images import Image, canonical, read_mask
from .intensities import in_hounsfield_units
from .lungs import LungMask, crop_grid, lung_mask
from .network import AIR_HU, downsample
from .prealign import PrealignSettings, Scan, prealign

MASK_LITRES = (0.02, 12.0)
"""A mask's volume: from less than a newborn's lungs to more than those of the largest, most inflated adult."""
MOST_BORDER = 0.5
"""Of the mask's outermost voxels. Lungs reach the border here and there, a mask of everything is all over it."""
MASK_MEDIAN_HU = (-985.0, -300.0)
"""The median under a mask lies below outside air only by mistake, above where more than half of it holds no air."""
MASK_SAMPLE = 1_000_000
"""About so many voxels of a mask are looked up in its scan, at most."""


class Subject(NamedTuple):
    """One scan of the pair, in canonical storage order, and its lungs on a grid of their own."""

    image: Image
    lungs: LungMask


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


def given_lungs(path: Path | None, image: Image) -> LungMask | None:
    """A lung mask from a file, in canonical storage order; None without one. InputError when it cannot be ``image``'s.

    Voxels above 0.5 count: shares from one half, and all labels, which must be those of lungs only. It is the image's
    when it has the volume of lungs, an infant's or an adult's, does not cover its own border, as a mask of everything
    or an inverted one does, and at least half of the box around it lies in the image.
    """
    if path is None:
        return None
    mask, grid = read_mask(path)
    stored = canonical(Image(mask.short(), grid, path))
    lungs = LungMask(stored.voxels > 0, stored.grid)
    if (share := _border_share(lungs)) > MOST_BORDER:
        raise InputError(
            f"{path}: the mask covers {share:.0%} of its own border, as if it were inverted or of everything, expected "
            "0 outside the lungs"
        )
    low, high = MASK_LITRES
    if not low <= lungs.litres <= high:
        raise InputError(f"{path}: the mask has {lungs.litres:.2g} l, expected lungs of {low} to {high:g} l")
    box = crop_grid(lungs, 0.0, (8, 8, 8))
    if validity(torch.zeros(1, 3, *box.shape), box, image.grid).float().mean() < 0.5:
        raise InputError(f"{path}: the mask lies outside {image.path}, expected the lungs in that image")
    return lungs


def _border_share(lungs: LungMask) -> float:
    """Of the outermost voxels of a mask, the share that belongs to it."""
    mask, (nz, ny, nx) = lungs.mask[0, 0], lungs.grid.shape
    inner = mask[1:-1, 1:-1, 1:-1]
    return float(mask.sum() - inner.sum()) / (nz * ny * nx - inner.numel())


def _doubt(mask: Path, lungs: LungMask, image: Image) -> str | None:
    """A sentence where what lies under a mask is hardly lung by its HU."""
    step = int(np.ceil((lungs.mask.numel() / MASK_SAMPLE) ** (1 / 3)))
    index = lungs.mask[0, 0, ::step, ::step, ::step].nonzero().numpy()[:, ::-1] * step
    there = np.rint(image.grid.to_index(lungs.grid.to_world(index))).astype(int)
    x, y, z = there[((there >= 0) & (there < image.grid.size)).all(axis=1)].T
    if not len(x):
        return None
    median, (low, high) = float(image.voxels[0, 0, z, y, x].float().median()), MASK_MEDIAN_HU
    if low <= median <= high:
        return None
    return (
        f"{mask.name}: the median under the mask is {median:.0f} HU, {low:.0f} to {high:.0f} HU expected where lungs "
        f"hold air: is it a mask of the lungs, of {image.path.name}, and of nothing else?"
    )


def subject(image: Image, mask: Path | None) -> Subject:
    """An image in HU and canonical storage order with its lungs, from the file ``mask`` or else from the HU.

    InputError where the values cannot be HU, where there is no lung, or the mask is not that image's. A mask under
    which hardly any lung can be, by the HU, is taken all the same, with a sentence in `Image.remarks`: a lung may be
    consolidated as a whole.
    """
    image = in_hounsfield_units(canonical(image))
    lungs = given_lungs(mask, image)
    if mask is None or lungs is None:
        return Subject(image, lung_mask(image.voxels, image.grid, str(image.path)))
    doubt = _doubt(mask, lungs, image)
    return Subject(replace(image, remarks=(*image.remarks, doubt)) if doubt else image, lungs)


def subjects(fixed: Image, fixed_mask: Path | None, moving: Image, moving_mask: Path | None) -> tuple[Subject, Subject]:
    """`subject` of both scans, at once: most of it lets other threads run. What is wrong with the fixed one is told
    first."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(subject, moving, moving_mask)
        return subject(fixed, fixed_mask), other.result()


def prepare(
    fixed: Subject,
    moving: Subject,
    network_size: tuple[int, int, int],
    settings: PrepareSettings = PrepareSettings(),
) -> Prepared:
    """Pre-aligns, crops and resamples a pair; InputError when the two share too little."""
    with one_thread():  # thousands of steps on few voxels: waking a second thread costs more than it does
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
    """In the body torch works with one thread."""
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
    """The surroundings of the lungs on the grid of the pre-alignment (even sizes: it halves them once).

    They end where the image ends: what lies beyond is not known, and is not to be compared with anything.
    """
    box = crop_grid(subject.lungs, 5 * settings.prealign_spacing_mm, (2, 2, 2)).within(subject.image.grid, (2, 2, 2))
    x, y, z = (2 * max(4, round(extent / settings.prealign_spacing_mm / 2)) for extent in box.extent_mm)
    grid = box.resized((x, y, z))
    return Scan(_hu(subject, grid, Affine()).clamp(max=200), _lungs(subject, grid, Affine()), grid)

"""From two scans to one displacement field: prepare → cascade → full transform.

lungs      mask of both images (given, or from the HU)
prealign   affine map between the lungs
crop       box around the fixed lungs, resized to the network grid (192×160×192)
cascade    displacement field on the network grid
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import (
    Affine,
    Grid,
    jacobian_determinant,
    resample,
    resample_image,
    validity,
    warp,
    warp_image,
    with_affine,
)
from algorithm.images import Image, canonical, read_mask
from algorithm.lungs import SMALLEST_LITRES, LungMask, crop_grid, lung_mask
from algorithm.network import AIR_HU, Cascade, downsample
from algorithm.objective import ngf_distance
from algorithm.prealign import PrealignSettings, Scan, prealign
from algorithm.report import Report

log = logging.getLogger(__name__)

NGF_EDGE_HU_PER_MM = 10.0
"""ε of the reported NGF distance, above the noise of most scans at the network's resolution."""


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


@dataclass(frozen=True)
class Transform:
    """x ↦ affine(x + u(x)), from the fixed to the moving world."""

    displacement: Float[Tensor, "1 3 z y x"]
    """u in mm on ``grid``, on the CPU."""
    grid: Grid
    affine: Affine = Affine()  # noqa: RUF009  (immutable)

    def field(self, grid: Grid) -> Float[Tensor, "1 3 z y x"]:
        """The displacement affine(x + u(x)) - x on any grid of the fixed world, mm."""
        return with_affine(resample(self.displacement, self.grid, grid), grid, self.affine)

    def field_slabs(self, grid: Grid) -> Iterator[Float[Tensor, "1 3 d y x"]]:
        """`field`, slab by slab along z."""
        for slab in slabs(grid):
            yield self.field(slab)

    def warped_slabs(self, moving: Image, grid: Grid) -> Iterator[Tensor]:
        """The moving image on ``grid``, (1, 1, d, y, x) slabs in its own type; -1000 HU outside its field of view."""
        for slab in slabs(grid):
            warped = warp_image(moving.voxels, moving.grid, self.field(slab), slab, fill=AIR_HU)
            yield warped.to(moving.voxels.dtype) if moving.voxels.is_floating_point() else warped.round().short()


def given_lungs(path: Path | None, image: Image) -> LungMask | None:
    """A lung mask from a file, in canonical storage order; None without one. InputError when it cannot be ``image``'s.

    It is when it has the volume of a lung, and at least half of the box around it lies in the image.
    """
    if path is None:
        return None
    mask, grid = read_mask(path)
    stored = canonical(Image(mask.short(), grid, path))
    lungs = LungMask(stored.voxels > 0, stored.grid)
    if lungs.litres < SMALLEST_LITRES:
        raise InputError(f"{path}: the mask has {lungs.litres:.2g} l, expected lungs of at least {SMALLEST_LITRES} l")
    box = crop_grid(lungs, 0.0, (8, 8, 8))
    if validity(torch.zeros(1, 3, *box.shape), box, image.grid).float().mean() < 0.5:
        raise InputError(f"{path}: the mask lies outside {image.path}, expected the lungs in that image")
    return lungs


def slabs(grid: Grid, most_voxels: int = 4_000_000) -> Iterator[Grid]:
    """The grid in slabs along z of at most so many voxels (or one slice)."""
    nx, ny, nz = grid.size
    depth = max(1, most_voxels // (nx * ny))
    for z in range(0, nz, depth):
        yield grid.cropped((0, 0, z), (nx, ny, min(depth, nz - z)))


def choose_device(option: str, report: Report) -> torch.device:
    """The device for ``--device``; auto without a GPU is the CPU, with a warning."""
    if option == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that this PyTorch can use, expected one (or --device cpu)")
    if option == "auto" and not torch.cuda.is_available():
        report.warn("No GPU: running on the CPU.")
        return torch.device("cpu")
    return torch.device("cuda" if option == "auto" else option)


def fastest_precision(device: torch.device) -> torch.dtype:
    """Arithmetic for the U-Nets: half on a GPU, bfloat16 on CPUs that have instructions for it, else float32."""
    if device.type == "cuda":
        return torch.float16
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


@torch.inference_mode()
def register(
    fixed: Image,
    moving: Image,
    masks: tuple[LungMask | None, LungMask | None],
    cascade: Cascade,
    device: torch.device,
    report: Report,
) -> Transform:
    """Registers two images in canonical storage order; says in ``report`` how well it went."""
    with report.timed("prepare"), torch.inference_mode(False):  # the pre-alignment needs gradients
        pair = prepare(fixed, moving, cascade.settings.network_size, *masks)
    with report.timed("cascade"):
        cascade = cascade.to(device)
        cascade.precision = fastest_precision(device)
        on_device = pair.to(device)
        displacement, grid = cascade(on_device.fixed, pair.grid, on_device.moving, pair.moving_grid)
    with report.timed("quality"):
        report.set(quality=quality(pair, displacement.cpu()), prealignment=asdict(pair.affine))
    return Transform(displacement.cpu(), grid, pair.affine)


def quality(pair: Prepared, displacement: Float[Tensor, "1 3 z y x"]) -> dict[str, float]:
    """How well it went, by results.json's names: Jacobian determinant of u in the lungs; before (pre-aligned) and after
    the cascade the overlap of the lungs (Dice) and the NGF distance, both at half the network's resolution."""
    determinant = jacobian_determinant(displacement, pair.grid)[pair.fixed_lungs[:, 0] > 0.5]
    result = {
        "folding_fraction": float((determinant <= 0).float().mean()),
        "jacobian_min": float(determinant.min()),
        "jacobian_max": float(determinant.max()),
    }
    fixed, moving, u = downsample(pair.fixed), downsample(pair.moving), downsample(displacement)
    grid, moving_grid = pair.grid.coarsened(), pair.moving_grid.coarsened()
    lungs, moving_lungs = downsample(pair.fixed_lungs) > 0.5, downsample(pair.moving_lungs)
    for name, field_mm in (("before", torch.zeros_like(u)), ("after", u)):
        warped = warp(torch.cat([moving, moving_lungs], dim=1), moving_grid, field_mm, grid)
        warped_lungs = warped[:, 1:] > 0.5
        overlap = 2 * (lungs & warped_lungs).sum() / (lungs.sum() + warped_lungs.sum())
        distance = ngf_distance(fixed, warped[:, :1], grid, lungs, NGF_EDGE_HU_PER_MM)
        result |= {f"lung_dice_{name}": float(overlap), f"ngf_distance_{name}": float(distance)}
    return result


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

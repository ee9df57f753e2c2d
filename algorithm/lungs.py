"""Lung mask from Hounsfield units, without training, and the crop box around the lungs.

Lungs are the air that lies inside the body, less the trachea and bowel gas, closed over vessels and moderate
opacities. Whether air lies inside the body is told by looking along the image axes for the chest wall rather than by
contact with the image border, so a lung may be cut by any border. The work is done on a copy of about 2.5 mm
isotropic, whatever the grid of the scan; every length below is in mm.

Inside the module volumes are arrays (z, y, x) in a storage order close to LPS, that is z grows towards the head;
`Spacing` is in the same order.
"""

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int16
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .errors import InputError
from .geometry import Grid, Size, canonical_axes, resample, restored

log = logging.getLogger(__name__)

WORKING_SPACING_MM = 2.5
AIR_HU = -350.0
"""Air against tissue: above the midpoint, so that expired lungs (-600) and ground glass count as air."""
GAS_HU = -960.0
"""Upper quartile of pure gas (bowel, outside air). Emphysema with a median of -950 has its upper quartile above."""
SMALLEST_LITRES = 0.3
"""Fewer litres of air are not taken for lungs: bowel gas and sinuses have as much. Infants' lungs need masks."""
FRAGMENT_LITRES = 0.02
"""Smaller separate parts of a lung are dropped."""
CORE_MM = 5.0
"""Half width of the passages (bronchi, thin walls) at which air regions are taken apart."""
REGROW_MM = 30.0
"""How far thin parts (recesses, edges) reach from the cores."""
CLOSING_MM = 8.0

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]
Walls = NDArray[np.int8]


@dataclass(frozen=True)
class LungMask:
    """Both lungs as one mask, vessels and closed-in opacities included, trachea excluded."""

    mask: Bool[Tensor, "1 1 z y x"]
    grid: Grid
    """About 2.5 mm isotropic, in a storage order close to LPS whatever that of the scan."""

    @property
    def litres(self) -> float:
        """Volume of the mask."""
        return float(self.mask.sum()) * float(np.prod(self.grid.spacing)) * 1e-6


def lung_mask(
    voxels: Int16[Tensor, "1 1 z y x"] | Float32[Tensor, "1 1 z y x"], grid: Grid, name: str = "image"
) -> LungMask:
    """The lungs in a chest CT in HU, on a grid of about 2.5 mm that covers the scan (to less than 2.5 mm).

    ``name`` stands for the scan in messages. InputError when no lung is found, or only small ones, as of an infant.
    """
    hu, padding, working = _working_copy(voxels, grid)
    spacing = working.spacing[::-1]
    mask, largest = _lungs(hu, padding, spacing)
    litres = float(mask.sum()) * _voxel_litres(spacing)
    if litres < SMALLEST_LITRES:
        raise InputError(_no_lung(name, max(litres, largest)))
    log.info("%s: lungs of %.2f l", name, litres)
    return LungMask(torch.from_numpy(mask)[None, None], working)


def crop_grid(lungs: LungMask, margin_mm: float, size: Size = (192, 160, 192)) -> Grid:
    """A grid of ``size`` voxels (x, y, z) whose outer voxel edges are the box around the lungs plus the margin.

    The box lies along the axes of ``lungs.grid`` and may reach beyond the image.
    """
    index = lungs.mask[0, 0].nonzero().numpy()[:, ::-1]
    margin = margin_mm / np.array(lungs.grid.spacing)
    low, high = index.min(axis=0) - 0.5 - margin, index.max(axis=0) + 0.5 + margin
    return lungs.grid.between(low, high, size)


def _no_lung(name: str, litres: float) -> str:
    """What was found instead: something small, or nothing at all."""
    if litres >= FRAGMENT_LITRES:
        return (
            f"{name}: what could be lung in it is too small, {litres:.2f} l, at least {SMALLEST_LITRES} l expected; "
            "for smaller lungs, as of infants, give lung masks"
        )
    return (
        f"{name} holds no lung: the largest region of lung density inside the body is {litres:.1f} l, at "
        f"least {SMALLEST_LITRES} l expected; are the values Hounsfield units?"
    )


# ---- the working copy


def _working_copy(voxels: Tensor, grid: Grid) -> tuple[Array, Mask, Grid]:
    """HU and padding on an isotropic grid in LPS order. Averaged first, so the full scan is never held as float."""
    hu, grid = _block_means(voxels[0, 0].cpu().numpy(), grid)
    (hu, padding), grid = _in_lps_order([hu, _constant_air(hu).astype(np.float32)], grid)
    nx, ny, nz = (max(1, round(extent / WORKING_SPACING_MM)) for extent in grid.extent_mm)
    working = grid.resized((nx, ny, nz))
    both = resample(torch.from_numpy(np.stack([hu, padding])[None]), grid, working)[0].numpy()
    return both[0], both[1] > 0.5, working


def _block_means(voxels: NDArray, grid: Grid) -> tuple[Array, Grid]:
    """Mean HU of blocks no longer than the working spacing; an incomplete last block is left out.

    Clipped to [-1024, 400] before: the mean with padding of -3024 would look like air in the midst of tissue, and
    every padding becomes constant.
    """
    fx, fy, fz = (min(n, max(1, int(WORKING_SPACING_MM / s))) for n, s in zip(grid.size, grid.spacing, strict=True))
    nx, ny, nz = (n // f for n, f in zip(grid.size, (fx, fy, fz), strict=True))
    hu = np.zeros((nz, ny, nx), dtype=np.float32)
    for z, dz in itertools.product(range(nz), range(fz)):
        plane = np.clip(voxels[z * fz + dz, : ny * fy, : nx * fx], -1024, 400)
        for dy, dx in itertools.product(range(fy), range(fx)):
            hu[z] += plane[dy::fy, dx::fx]
    blocks = grid.cropped((0, 0, 0), (nx * fx, ny * fy, nz * fz)).resized((nx, ny, nz))
    return hu / np.float32(fx * fy * fz), blocks


def _constant_air(hu: Array) -> Mask:
    """Exactly constant air at the image border: padding, or outside air clipped to one value. Real air is noisy."""
    constant = hu < GAS_HU
    for axis in range(3):
        same = np.diff(hu, axis=axis) == 0
        ends = [(0, 0)] * 3
        ends[axis] = (1, 0)
        constant &= np.pad(same, ends, constant_values=True)
        ends[axis] = (0, 1)
        constant &= np.pad(same, ends, constant_values=True)
    regions, _ = ndimage.label(constant)
    at_border = np.zeros(regions.max() + 1, dtype=bool)
    for axis in range(3):
        at_border[np.take(regions, (0, -1), axis=axis)] = True
    padding = (np.bincount(regions.ravel()) >= 50) & at_border
    padding[0] = False
    grown = ndimage.binary_dilation(padding[regions])
    return np.asarray(grown & (hu < GAS_HU))


def _in_lps_order(volumes: list[Array], grid: Grid) -> tuple[list[Array], Grid]:
    """Index axes permuted and flipped so that the direction comes closest to the identity."""
    axes, flips = canonical_axes(grid)
    order = [2 - axes[a] for a in (2, 1, 0)]
    flipped = tuple(2 - a for a in range(3) if flips[a])
    stored = [np.ascontiguousarray(np.flip(volume.transpose(order), flipped)) for volume in volumes]
    return stored, restored(grid, axes, flips)


# ---- from air to lungs


def _lungs(hu: Array, padding: Mask, spacing: Spacing) -> tuple[Mask, float]:
    """The lungs, and the litres of the largest region of lung density inside the body."""
    smooth = ndimage.gaussian_filter(hu, [1.5 / s for s in spacing])
    air = _without_padding_rim((smooth < AIR_HU) & ~padding, padding, spacing)
    body = _body(~air & ~padding, spacing)
    mask = np.zeros_like(air)
    if not body.any():
        return mask, 0.0
    margin = _steps(20.0, spacing)  # a lung that padding cuts reaches beyond the eroded body
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side in ndimage.find_objects(body.astype(np.uint8))[0]
    )
    mask[box], largest = _lungs_in_body(smooth[box], air[box], body[box], spacing)
    return _without_fragments(mask & ~padding, spacing), largest


def _without_padding_rim(air: Mask, padding: Mask, spacing: Spacing) -> Mask:
    """The air without the thin layer where tissue and padding mix: next to padding only what has air behind it."""
    steps = _steps(5.0, spacing)
    inner = air & ~ndimage.binary_dilation(padding, iterations=steps)
    return np.asarray(inner | (air & ndimage.binary_dilation(inner, iterations=steps)))


def _without_fragments(mask: Mask, spacing: Spacing) -> Mask:
    """The mask without separate parts below 20 ml, which would stretch its bounding box."""
    parts, _ = ndimage.label(mask)
    large = np.bincount(parts.ravel()) * _voxel_litres(spacing) >= FRAGMENT_LITRES
    large[0] = False
    return np.asarray(large[parts])


def _lungs_in_body(smooth: Array, air: Mask, body: Mask, spacing: Spacing) -> tuple[Mask, float]:
    """The same within the bounding box of the body."""
    trachea = _trachea(smooth, air, body, spacing)
    air = air & ~trachea
    depth = ndimage.distance_transform_edt(air, sampling=spacing).astype(np.float32)
    labels, _ = ndimage.label(depth > CORE_MM)
    regions = _regions(labels, smooth, body, spacing)
    log.debug("regions of air: %s", regions)
    chosen = _choose(regions)
    largest = max((r.litres for r in regions if r.enclosed and r.upper_hu >= GAS_HU), default=0.0)
    if not chosen:
        return np.zeros_like(air), largest
    others = ndimage.binary_dilation(np.isin(labels, [0, *chosen], invert=True), iterations=_steps(CORE_MM, spacing))
    mask = np.zeros_like(air)
    for core in _left_and_right(np.isin(labels, chosen), depth, spacing):
        mask |= _close(_regrow(core, air & ~others, spacing), spacing)
    mask = ndimage.binary_fill_holes(mask) & ~trachea
    return ndimage.gaussian_filter(mask.astype(np.float32), [2.0 / s for s in spacing]) > 0.5, largest


def _body(tissue: Mask, spacing: Spacing) -> Mask:
    """The largest piece of tissue after an erosion of 5 mm, which parts it from table, clothes and blankets."""
    regions, _ = ndimage.label(ndimage.binary_erosion(tissue, iterations=_steps(5.0, spacing), border_value=1))
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return np.asarray((regions == sizes.argmax()) & (regions > 0))


def _walls(body: Mask, axes: tuple[int, ...]) -> Walls:
    """In how many directions (two for each axis) the body lies. Along x and y: 4 in a lung, 3 where a border cuts
    it, 2 or fewer outside."""
    walls = np.zeros(body.shape, dtype=np.int8)
    for axis in axes:
        walls += np.logical_or.accumulate(body, axis=axis)
        walls += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis=axis), axis)
    return walls


def _trachea(smooth: Array, air: Mask, body: Mask, spacing: Spacing) -> Mask:
    """The trachea and its wall, from the top of the image to the carina or somewhat farther.

    It is found as a chain of small round holes in successive axial slices, and followed from both ends of the chain
    where only a thin wall parts it from a lung.
    """
    enclosed = air & (_walls(body, (1, 2)) >= 3)
    trachea = np.zeros_like(air)
    if not enclosed.any():
        return trachea
    middle = np.median(np.nonzero(enclosed)[0])
    darkest = min(-780.0, float(np.median(smooth[enclosed])) - 15)
    # the enclosed air alone only where the trachea opens into outside air: it may cut a lung into odd pieces
    for holes in (air, enclosed):
        for box, chain in _chains(holes, spacing):
            shortest_mm = 8.0 if box[0].stop == air.shape[0] else 25.0
            dark = np.percentile(smooth[box][chain], 25) < darkest
            if (
                dark
                and box[0].stop > middle
                and enclosed[box][chain].mean() > 0.7
                and _is_tube(chain, shortest_mm, spacing)
            ):
                trachea[box] |= chain
                _follow(trachea, box[0], smooth)
        if trachea.any():
            break
    return np.asarray(ndimage.binary_dilation(trachea, np.ones((3, 3, 3), dtype=bool)))


def _chains(air: Mask, spacing: Spacing) -> list[tuple[tuple[slice, ...], Mask]]:
    """Connected holes of less than 9 cm² in axial slices: bounding box, and mask within the box."""
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = True
    holes, _ = ndimage.label(air, in_plane)
    area = np.bincount(holes.ravel()) * spacing[1] * spacing[2]
    area[0] = np.inf
    chains, _ = ndimage.label((area < 900)[holes])
    return [(box, chains[box] == label) for label, box in enumerate(ndimage.find_objects(chains), 1)]


def _is_tube(chain: Mask, shortest_mm: float, spacing: Spacing) -> bool:
    """Long, and round in most slices (inscribed circle against area)."""
    if chain.shape[0] * spacing[0] < shortest_mm:
        return False
    padded = np.pad(chain, ((0, 0), (1, 1), (1, 1)))
    radius = ndimage.distance_transform_edt(padded, sampling=(1e4, *spacing[1:])).max(axis=(1, 2))
    area = chain.sum(axis=(1, 2)) * spacing[1] * spacing[2]
    return bool(np.median(np.pi * radius**2 / area) > 0.4)


def _follow(trachea: Mask, slices: slice, smooth: Array) -> None:
    """Continues a chain slice by slice while a dark lumen of about its size is found where the last slice had it."""
    dark = smooth < np.percentile(smooth[slices][trachea[slices]], 25) + 50
    usual = np.median((trachea & dark)[slices].sum(axis=(1, 2)))
    for start, end, step in ((slices.start, -1, -1), (slices.stop - 1, trachea.shape[0], 1)):
        lumen, stuck = trachea[start] & dark[start], 0
        for z in range(start + step, end, step):
            grown = ndimage.binary_dilation(lumen) & dark[z]
            leaks = grown.sum() > 1.5 * usual
            stuck = stuck + 1 if leaks else 0
            lumen = lumen & dark[z] if leaks else grown
            if lumen.sum() < 0.4 * usual or stuck > 8:
                break
            trachea[z] |= lumen


def _left_and_right(core: Mask, depth: Array, spacing: Spacing) -> list[Mask]:
    """The core parted where the lungs touch (anterior and posterior junction), so that each is closed by itself.

    ``depth`` is the distance of air from tissue (mm).
    """
    for radius in CORE_MM * np.array([1, 1.6, 2.2, 2.8, 3.4]):
        regions, _ = ndimage.label(core & (depth > radius))
        sizes = np.bincount(regions.ravel(), minlength=3)
        sizes[0] = 0
        first, second = sizes.argsort()[::-1][:2]
        if sizes[second] > 0.25 * sizes[first]:
            seeds = np.where(np.isin(regions, [first, second]), regions, 0)
            nearest = ndimage.distance_transform_edt(
                seeds == 0, sampling=spacing, return_distances=False, return_indices=True
            )
            owner = seeds[tuple(nearest)]
            return [core & (owner == first), core & (owner == second)]
    return [core]


@dataclass(frozen=True)
class _Region:
    label: int
    litres: float
    median_hu: float
    upper_hu: float
    """Upper quartile."""
    across: float
    """Walls along x and y, mean over the voxels."""
    along: float
    """Walls along z."""
    bottom: float
    """z index below which a quarter of the region lies."""
    middle: float
    """Mean z index."""

    @property
    def enclosed(self) -> bool:
        """Inside the body. A lung cut by two borders has as many walls across as air beside the body has, but it
        ends above and below."""
        return self.across > 3 or (self.across > 1.8 and self.across + self.along > 3.6 and self.median_hu > -955)

    def may_belong_to(self, lung: "_Region") -> bool:
        """A lung cut by several borders: hardly enclosed, but comparable with ``lung`` in size and filling."""
        alike = abs(self.median_hu - lung.median_hu) < 50 and self.litres > 0.25 * lung.litres
        return alike and self.across + self.along > 2.2


def _regions(labels: NDArray, smooth: Array, body: Mask, spacing: Spacing) -> list[_Region]:
    """The labelled regions, largest first; fragments below 20 ml are left out."""
    litres = np.bincount(labels.ravel()) * _voxel_litres(spacing)
    litres[0] = 0
    across, along = _walls(body, (1, 2)), _walls(body, (0,))
    regions = []
    for label in np.argsort(-litres):
        if litres[label] < FRAGMENT_LITRES:
            break
        where = np.nonzero(labels == label)
        median, upper = np.percentile(smooth[where], [50, 75])
        walls = float(across[where].mean()), float(along[where].mean())
        z = float(np.percentile(where[0], 25)), float(where[0].mean())
        regions.append(_Region(int(label), float(litres[label]), float(median), float(upper), *walls, *z))
    return regions


def _choose(regions: list[_Region]) -> list[int]:
    """Labels of the regions that are lung, largest first."""
    not_gas = [region for region in regions if region.upper_hu >= GAS_HU]
    enclosed = [region for region in not_gas if region.enclosed]
    if not enclosed:  # without enough chest wall in the image, the values alone must do
        enclosed = [region for region in not_gas if region.median_hu > -940][:1]
    if not enclosed:
        return []
    lung = enclosed[0]
    chosen = [region for region in enclosed if region.middle >= lung.bottom]  # separate air below is bowel gas
    cut = [region for region in not_gas if region not in enclosed and region.may_belong_to(lung)]
    return [region.label for region in (*chosen, *cut)]


def _regrow(core: Mask, air: Mask, spacing: Spacing) -> Mask:
    """The air around a core that is reached within `REGROW_MM`."""
    return np.asarray(ndimage.binary_dilation(core, mask=air, iterations=_steps(REGROW_MM, spacing)))


def _close(mask: Mask, spacing: Spacing) -> Mask:
    """Closing with a ball of 8 mm. Beyond the image the border voxels go on, so a cut lung is not eaten there."""
    reach = _steps(CLOSING_MM, spacing) + 2
    box = ndimage.find_objects(np.pad(mask, reach).astype(np.uint8))[0]
    # the box of the mask in the padded volume, grown by the reach on both sides
    around = tuple(slice(side.start - reach, side.stop + reach) for side in box)
    padded = np.pad(mask, reach, mode="edge")
    near = ndimage.distance_transform_edt(~padded[around], sampling=spacing) <= CLOSING_MM
    padded[around] |= ndimage.distance_transform_edt(near, sampling=spacing) > CLOSING_MM
    return padded[reach:-reach, reach:-reach, reach:-reach]


def _steps(mm: float, spacing: Spacing) -> int:
    """Voxels in a length; the working grid is isotropic to a few per cent."""
    return max(1, round(mm / min(spacing)))


def _voxel_litres(spacing: Spacing) -> float:
    return float(np.prod(spacing)) * 1e-6

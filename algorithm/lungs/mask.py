"""Lung mask from Hounsfield units, without training, and the crop box around the lungs.

The lungs are the air inside the body without the trachea and bowel gas, closed over vessels and moderate opacities. Air
counts as inside the body when the chest wall is found along the image axes. Contact with the image border plays no
role, so any border may cut a lung. The method works on a copy of the scan of about 2.5 mm isotropic, whatever the grid
of the scan. Every length below is in mm.

Inside the module, volumes are arrays (z, y, x) in a storage order close to LPS: z grows towards the head. `Spacing` is
in the same order.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int16
from scipy import ndimage
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid, Size
from .regions import FRAGMENT_LITRES, choose, find_body, find_regions
from .trachea import find_trachea
from .working_copy import GAS_HU, Array, Mask, Spacing, voxel_litres, voxels_in, working_copy

log = logging.getLogger(__name__)
MOST_LUNG_HU = -350.0
"""Threshold between air and tissue. Above the midpoint, so that expired lungs (-600) and ground glass count as air."""
SMALLEST_LITRES = 0.3
"""Less air does not count as lungs: bowel gas and sinuses can have as much. Infants' lungs need given masks."""
CORE_MM = 5.0
"""Half width of the passages (bronchi, thin walls) at which air regions are separated."""
REGROW_MM = 30.0
"""Maximum distance of thin parts (recesses, edges) from the cores."""
CLOSING_MM = 8.0


@dataclass(frozen=True)
class LungMask:
    """Both lungs as one mask, with vessels and enclosed opacities, without the trachea."""

    mask: Bool[Tensor, "1 1 z y x"]
    grid: Grid
    """About 2.5 mm isotropic, in a storage order close to LPS, whatever the order of the scan."""

    @property
    def litres(self) -> float:
        """Volume of the mask."""
        return float(self.mask.sum()) * float(np.prod(self.grid.spacing)) * 1e-6


def lung_mask(
    voxels: Int16[Tensor, "1 1 z y x"] | Float32[Tensor, "1 1 z y x"], grid: Grid, name: str = "image"
) -> LungMask:
    """The lungs in a chest CT in HU, on a grid of about 2.5 mm that covers the scan (to less than 2.5 mm).

    ``name`` is the scan's name in messages. InputError when no lung is found, or only small ones, such as an infant's.
    """
    hu, padding, working = working_copy(voxels, grid)
    spacing = working.spacing[::-1]
    mask, largest = _lungs(hu, padding, spacing)
    litres = float(mask.sum()) * voxel_litres(spacing)
    if litres < SMALLEST_LITRES:
        raise InputError(_no_lung(name, max(litres, largest)))
    log.info("%s: lungs of %.2f l", name, litres)
    return LungMask(torch.from_numpy(mask)[None, None], working)


def crop_grid(lungs: LungMask, margin_mm: float, size: Size = (192, 160, 192)) -> Grid:
    """A grid of ``size`` voxels (x, y, z). Its outer voxel edges are the box around the lungs plus the margin.

    The box lies along the axes of ``lungs.grid`` and may reach beyond the image.
    """
    index = lungs.mask[0, 0].nonzero().numpy()[:, ::-1]
    margin = margin_mm / np.array(lungs.grid.spacing)
    low, high = index.min(axis=0) - 0.5 - margin, index.max(axis=0) + 0.5 + margin
    return lungs.grid.between(low, high, size)


def _no_lung(name: str, litres: float) -> str:
    """The message when there is no lung, or only a small one."""
    if litres >= FRAGMENT_LITRES:
        return (
            f"{name}: what could be lung in it is too small, {litres:.2f} l, at least {SMALLEST_LITRES} l expected; "
            "for smaller lungs, as of infants, give lung masks"
        )
    return (
        f"{name} holds no lung: the largest region of lung density inside the body is {litres:.1f} l, at "
        f"least {SMALLEST_LITRES} l expected; are the values Hounsfield units?"
    )


def _lungs(hu: Array, padding: Mask, spacing: Spacing) -> tuple[Mask, float]:
    """The lungs, and the litres of the largest region of lung density inside the body."""
    smooth = ndimage.gaussian_filter(hu, [1.5 / s for s in spacing])
    air = _without_padding_rim((smooth < MOST_LUNG_HU) & ~padding, padding, spacing)
    body = find_body(~air & ~padding, spacing)
    mask = np.zeros_like(air)
    if not body.any():
        return mask, 0.0
    margin = voxels_in(20.0, spacing)  # a lung that padding cuts reaches beyond the eroded body
    box = tuple(
        slice(max(0, side.start - margin), side.stop + margin)
        for side in ndimage.find_objects(body.astype(np.uint8))[0]
    )
    mask[box], largest = _lungs_in_body(smooth[box], air[box], body[box], spacing)
    return _without_fragments(mask & ~padding, spacing), largest


def _without_padding_rim(air: Mask, padding: Mask, spacing: Spacing) -> Mask:
    """The air without the thin layer where tissue and padding mix.

    Within 5 mm of the padding, only air that has more air behind it stays.
    """
    steps = voxels_in(5.0, spacing)
    inner = air & ~ndimage.binary_dilation(padding, iterations=steps)
    return np.asarray(inner | (air & ndimage.binary_dilation(inner, iterations=steps)))


def _without_fragments(mask: Mask, spacing: Spacing) -> Mask:
    """The mask without separate parts below 20 ml: they would enlarge its bounding box."""
    parts, _ = ndimage.label(mask)
    large = np.bincount(parts.ravel()) * voxel_litres(spacing) >= FRAGMENT_LITRES
    large[0] = False
    return np.asarray(large[parts])


def _lungs_in_body(smooth: Array, air: Mask, body: Mask, spacing: Spacing) -> tuple[Mask, float]:
    """`_lungs` within the bounding box of the body."""
    trachea = find_trachea(smooth, air, body, spacing)
    air = air & ~trachea
    depth = ndimage.distance_transform_edt(air, sampling=spacing).astype(np.float32)
    labels, _ = ndimage.label(depth > CORE_MM)
    regions = find_regions(labels, smooth, body, spacing)
    log.debug("regions of air: %s", regions)
    chosen = choose(regions)
    largest = max((r.litres for r in regions if r.enclosed and r.upper_hu >= GAS_HU), default=0.0)
    if not chosen:
        return np.zeros_like(air), largest
    others = ndimage.binary_dilation(np.isin(labels, [0, *chosen], invert=True), iterations=voxels_in(CORE_MM, spacing))
    mask = np.zeros_like(air)
    for core in _left_and_right(np.isin(labels, chosen), depth, spacing):
        mask |= _close(_regrow(core, air & ~others, spacing), spacing)
    mask = ndimage.binary_fill_holes(mask) & ~trachea
    return ndimage.gaussian_filter(mask.astype(np.float32), [2.0 / s for s in spacing]) > 0.5, largest


def _left_and_right(core: Mask, depth: Array, spacing: Spacing) -> list[Mask]:
    """The core, split where the lungs touch (anterior and posterior junction): each lung is then closed separately.

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


def _regrow(core: Mask, air: Mask, spacing: Spacing) -> Mask:
    """The core and the connected air within `REGROW_MM` of it."""
    return np.asarray(ndimage.binary_dilation(core, mask=air, iterations=voxels_in(REGROW_MM, spacing)))


def _close(mask: Mask, spacing: Spacing) -> Mask:
    """Closing with a ball of 8 mm. Border voxels are repeated outside the image, so a cut lung keeps its border."""
    reach = voxels_in(CLOSING_MM, spacing) + 2
    box = ndimage.find_objects(np.pad(mask, reach).astype(np.uint8))[0]
    # the box of the mask in the padded volume, grown by the reach on both sides
    around = tuple(slice(side.start - reach, side.stop + reach) for side in box)
    padded = np.pad(mask, reach, mode="edge")
    near = ndimage.distance_transform_edt(~padded[around], sampling=spacing) <= CLOSING_MM
    padded[around] |= ndimage.distance_transform_edt(near, sampling=spacing) > CLOSING_MM
    return padded[reach:-reach, reach:-reach, reach:-reach]

"""A scan and its lungs, from a mask file or from the HU."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from ..errors import InputError
from ..files.images import Image, canonical, read_mask
from ..geometry import validity
from ..lungs import LungMask, crop_grid, lung_mask
from ..lungs.sides import is_one_lung
from ..threads import Pool
from .intensities import in_hounsfield_units

MASK_LITRES = (0.02, 12.0)
"""Valid volume of a mask: from less than a newborn's lungs to more than those of the largest, most inflated adult."""
MOST_BORDER = 0.5
"""Maximum share of the mask's outermost voxels. Lungs reach the border in places, a mask of everything covers it."""
MASK_MEDIAN_HU = (-985.0, -300.0)
"""Expected median under a mask. Below it is outside air, by mistake; above it, more than half has no air."""
MASK_SAMPLE = 1_000_000
"""Approximate maximum number of voxels of a mask that are looked up in its scan."""
EDGE_MM, EDGE_HU, LEAST_EDGE = 4.0, 150.0, 0.5
"""`LEAST_EDGE` is the minimum share of a mask's border where the scan is denser outside than inside, by at least
`EDGE_HU`, between two positions `EDGE_MM` from the border. Correct masks have 0.95 or more, masks shifted by 20 mm have
at most 0.38, and masks of lungs without air in 40 % of their volume have 0.54."""
EDGE_SAMPLE = 20_000
"""Approximate number of positions on the border that are checked along each axis."""


class Subject(NamedTuple):
    """One scan of the pair, in canonical storage order, and its lungs on a grid of their own."""

    image: Image
    lungs: LungMask


def given_lungs(path: Path | None, image: Image) -> LungMask | None:
    """A lung mask from a file, in canonical storage order; None without a file.

    Voxels above 0.5 count: shares above one half, and all labels, so every label must be lung. InputError when the mask
    cannot belong to ``image``: its volume is not that of lungs (of an infant or an adult), it covers its own border
    (as an inverted mask or a mask of everything does), or less than half of the box around it lies in the image.
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
    """Share of the outermost voxels of a mask that are inside it."""
    mask, (nz, ny, nx) = lungs.mask[0, 0], lungs.grid.shape
    inner = mask[1:-1, 1:-1, 1:-1]
    return float(mask.sum() - inner.sum()) / (nz * ny * nx - inner.numel())


def _doubt(mask: Path, lungs: LungMask, image: Image) -> str | None:
    """A sentence for the user if the HU under a mask are hardly those of lungs, or its border is not that of lungs."""
    step = int(np.ceil((lungs.mask.numel() / MASK_SAMPLE) ** (1 / 3)))
    index = lungs.mask[0, 0, ::step, ::step, ::step].nonzero().numpy()[:, ::-1] * step
    found = _values(image, lungs.grid.to_world(index))
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    median, (low, high) = float(np.median(found)), MASK_MEDIAN_HU
    if not low <= median <= high:
        return (
            f"{mask.name}: the median under the mask is {median:.0f} HU, {low:.0f} to {high:.0f} HU expected where "
            f"lungs hold air: is it a mask of the lungs, of {image.path.name}, and of nothing else?"
        )
    share = _edge_share(lungs, image)
    if share is None or share >= LEAST_EDGE:
        return None
    return (
        f"{mask.name}: only {share:.0%} of the mask's border lies where the lungs end in {image.path.name}, at least "
        f"{LEAST_EDGE:.0%} expected: is it the mask of that scan, and in its place?"
    )


def _values(image: Image, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, " p"]:
    """HU of the nearest voxels, NaN outside the image."""
    index = np.rint(image.grid.to_index(points_mm)).astype(int)
    within = ((index >= 0) & (index < image.grid.size)).all(axis=1)
    x, y, z = index[within].T
    values: np.ndarray = np.full(len(index), np.nan)
    values[within] = image.voxels[0, 0, z, y, x].numpy()
    return values


def _edge_share(lungs: LungMask, image: Image) -> float | None:
    """Share of a mask's border where the scan is denser outside; None if no part of the border lies in the scan."""
    mask, steps = lungs.mask[0, 0], []
    for axis in range(3):  # axes of the tensor: z, y, x
        last = mask.shape[axis] - 1
        before, after = (mask.narrow(axis, start, last) for start in (0, 1))
        border = (before ^ after).nonzero()
        border = border[:: max(1, len(border) // EDGE_SAMPLE)]
        first_inside = before[tuple(border.T)].numpy()
        middle = border.double().numpy()[:, ::-1]
        middle[:, 2 - axis] += 0.5
        away = np.zeros(3)
        away[2 - axis] = max(0.5, EDGE_MM / lungs.grid.spacing[2 - axis])
        low, high = (_values(image, lungs.grid.to_world(middle + sign * away)) for sign in (-1, 1))
        steps.append(np.where(first_inside, high - low, low - high))
    found = np.concatenate(steps)
    found = found[np.isfinite(found)]
    return float((found > EDGE_HU).mean()) if len(found) else None


def find_lungs(image: Image, mask: Path | None) -> Subject:
    """An image in HU and canonical storage order with its lungs, from the file ``mask`` or else from the HU.

    InputError when the values cannot be HU, when there is no lung, or when the mask does not belong to the image. If
    the HU under a mask are hardly those of lungs, or the mask does not end where the lungs do, it is still used, and
    `Image.remarks` gets a sentence: a whole lung may be consolidated.
    """
    image = in_hounsfield_units(canonical(image))
    lungs = given_lungs(mask, image)
    if mask is None or lungs is None:
        return Subject(image, lung_mask(image.voxels, image.grid, str(image.path)))
    doubt = _doubt(mask, lungs, image)
    return Subject(replace(image, remarks=(*image.remarks, doubt)) if doubt else image, lungs)


def find_both_lungs(
    fixed: Image, fixed_mask: Path | None, moving: Image, moving_mask: Path | None
) -> tuple[Subject, Subject]:
    """`find_lungs` of both scans in parallel: most of the work releases Python's lock.

    If both scans are bad, the error is that of the fixed one. If one scan has one lung and the other has two, and there
    is a mask, the fixed image gets a remark.
    """
    with Pool(1) as pool:
        other = pool.submit(find_lungs, moving, moving_mask)
        found, there = find_lungs(fixed, fixed_mask), other.result()
    if (fixed_mask or moving_mask) and (one := is_one_lung(found.lungs)) != is_one_lung(there.lungs):
        single, both = ("fixed", "moving") if one else ("moving", "fixed")
        remark = f"One lung in the {single} scan, two in the {both} one: is the mask right? The other lung is left out."
        found = found._replace(image=replace(found.image, remarks=(*found.image.remarks, remark)))
    return found, there

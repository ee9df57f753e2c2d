"""The body, and the regions of air inside it that are lung."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .working_copy import GAS_HU, Array, Mask, Spacing, Walls, voxel_litres, voxels_in

FRAGMENT_LITRES = 0.02
"""Minimum volume of a separate part of a lung; smaller parts are dropped."""


def find_body(tissue: Mask, spacing: Spacing) -> Mask:
    """The largest piece of tissue after an erosion of 5 mm, which separates it from table, clothes and blankets."""
    regions, _ = ndimage.label(ndimage.binary_erosion(tissue, iterations=voxels_in(5.0, spacing), border_value=1))
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return np.asarray((regions == sizes.argmax()) & (regions > 0))


def count_walls(body: Mask, axes: tuple[int, ...]) -> Walls:
    """Number of directions (two for each axis) in which the body lies. Along x and y it is 4 in a lung, 3 where a
    border cuts the lung, 2 or fewer outside."""
    walls = np.zeros(body.shape, dtype=np.int8)
    for axis in axes:
        walls += np.logical_or.accumulate(body, axis=axis)
        walls += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis=axis), axis)
    return walls


@dataclass(frozen=True)
class Region:
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
        """Whether the region lies inside the body.

        A lung that two borders cut has as few walls across as air beside the body, but it also has walls along z.
        """
        return self.across > 3 or (self.across > 1.8 and self.across + self.along > 3.6 and self.median_hu > -955)

    def may_belong_to(self, lung: "Region") -> bool:
        """Whether this may be a lung cut by several borders: hardly enclosed, but like ``lung`` in size and HU."""
        alike = abs(self.median_hu - lung.median_hu) < 50 and self.litres > 0.25 * lung.litres
        return alike and self.across + self.along > 2.2


def find_regions(labels: NDArray, smooth: Array, body: Mask, spacing: Spacing) -> list[Region]:
    """The labelled regions, largest first; fragments below 20 ml are left out."""
    litres = np.bincount(labels.ravel()) * voxel_litres(spacing)
    litres[0] = 0
    across, along = count_walls(body, (1, 2)), count_walls(body, (0,))
    regions = []
    for label in np.argsort(-litres):
        if litres[label] < FRAGMENT_LITRES:
            break
        where = np.nonzero(labels == label)
        median, upper = np.percentile(smooth[where], [50, 75])
        walls = float(across[where].mean()), float(along[where].mean())
        z = float(np.percentile(where[0], 25)), float(where[0].mean())
        regions.append(Region(int(label), float(litres[label]), float(median), float(upper), *walls, *z))
    return regions


def choose(regions: list[Region]) -> list[int]:
    """Labels of the lung regions, largest first."""
    not_gas = [region for region in regions if region.upper_hu >= GAS_HU]
    enclosed = [region for region in not_gas if region.enclosed]
    if not enclosed:  # too little chest wall in the image: decide by the values alone
        enclosed = [region for region in not_gas if region.median_hu > -940][:1]
    if not enclosed:
        return []
    lung = enclosed[0]
    chosen = [region for region in enclosed if region.middle >= lung.bottom]  # separate air below is bowel gas
    cut = [region for region in not_gas if region not in enclosed and region.may_belong_to(lung)]
    return [region.label for region in (*chosen, *cut)]

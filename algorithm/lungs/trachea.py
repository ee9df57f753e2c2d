"""The trachea: a chain of small round holes in axial slices."""

import numpy as np
from scipy import ndimage

from .regions import count_walls
from .working_copy import Array, Mask, Spacing


def find_trachea(smooth: Array, air: Mask, body: Mask, spacing: Spacing) -> Mask:
    """The trachea and its wall, from the top of the image to the carina or somewhat farther.

    It is a chain of small round holes in successive axial slices. From both ends of the chain, the search follows it
    where only a thin wall separates it from a lung.
    """
    enclosed = air & (count_walls(body, (1, 2)) >= 3)
    trachea = np.zeros_like(air)
    if not enclosed.any():
        return trachea
    middle = np.median(np.nonzero(enclosed)[0])
    darkest = min(-780.0, float(np.median(smooth[enclosed])) - 15)
    # only the enclosed air where the trachea opens into outside air: it may cut a lung into odd pieces
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
    """Whether the chain is long, and round in most slices (area of the inscribed circle against area)."""
    if chain.shape[0] * spacing[0] < shortest_mm:
        return False
    padded = np.pad(chain, ((0, 0), (1, 1), (1, 1)))
    radius = ndimage.distance_transform_edt(padded, sampling=(1e4, *spacing[1:])).max(axis=(1, 2))
    area = chain.sum(axis=(1, 2)) * spacing[1] * spacing[2]
    return bool(np.median(np.pi * radius**2 / area) > 0.4)


def _follow(trachea: Mask, slices: slice, smooth: Array) -> None:
    """Continue a chain slice by slice, while there is a dark lumen of similar size at the place of the last slice."""
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

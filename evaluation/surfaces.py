"""Distances between the surfaces of two masks on one grid: section 4.4 of Hering et al. 2021.

The surface of a mask is the set of centres of its border voxels. These have a face neighbour outside the mask, or lie
at the edge of the volume. Distances are Euclidean in world mm, so spacing and direction may be arbitrary.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import KDTree


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances, with d(x, Y) = min |x - y| over the surface Y."""

    asd_mm: float
    """Average symmetric surface distance: (Σ d(x, Y) + Σ d(y, X)) / (|X| + |Y|)."""
    hd_mm: float
    """Hausdorff distance: the largest of all distances."""
    hd95_mm: float
    """The larger of the two 95th percentiles, of d(x, Y) and of d(y, X); not the percentile of both pooled."""


def surface_distances(
    fixed: Bool[np.ndarray, "z y x"], warped: Bool[np.ndarray, "z y x"], axes: Float[np.ndarray, "3 3"]
) -> SurfaceDistances | None:
    """``axes`` is direction · diag(spacing), world mm per step along x, y, z. None if a mask is empty."""
    return distances_between(surface_points(fixed, axes), surface_points(warped, axes))


def distances_between(x: Float[np.ndarray, "n 3"], y: Float[np.ndarray, "m 3"]) -> SurfaceDistances | None:
    """Distances between two surfaces, given as points (mm). None if one has no points."""
    if not len(x) or not len(y):
        return None
    to_y, to_x = _distances(x, y), _distances(y, x)
    return SurfaceDistances(
        asd_mm=float((to_y.sum() + to_x.sum()) / (len(to_y) + len(to_x))),
        hd_mm=float(max(to_y.max(), to_x.max())),
        hd95_mm=float(max(np.percentile(to_y, 95), np.percentile(to_x, 95))),
    )


def surface_points(mask: Bool[np.ndarray, "z y x"], axes: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "n 3"]:
    """World positions (mm, relative to the grid's origin) of the border voxels; only the box around the mask is
    searched."""
    box = _box(mask)
    zyx = np.argwhere(_border(mask[box])) + [part.start for part in box]
    points: Float[np.ndarray, "n 3"] = zyx[:, ::-1] @ axes.T
    return points


def _box(mask: Bool[np.ndarray, "z y x"]) -> tuple[slice, slice, slice]:
    """The smallest box around a mask."""
    box = [slice(0, n) for n in mask.shape]
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        filled = np.flatnonzero(mask[tuple(box)].any(axis=others))
        box[axis] = slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0, 0)
    z, y, x = box
    return z, y, x


def _border(mask: Bool[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """The voxels of a mask that erosion by a cross removes; positions outside the array are not in the mask."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for start in (0, 2):
            part = [slice(1, -1)] * 3
            part[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(part)]
    border: Bool[np.ndarray, "z y x"] = mask & ~inner
    return border


def _distances(points: Float[np.ndarray, "n 3"], others: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, " n"]:
    tree = KDTree(others, balanced_tree=False, compact_nodes=False)  # faster to build, as fast to query
    distances: Float[np.ndarray, " n"] = tree.query(points)[0]
    return distances

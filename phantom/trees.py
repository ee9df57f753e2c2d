"""Branching trees that fill a volume, and tubes around them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray as Array
from scipy.spatial import cKDTree

from phantom.shapes import Points, Scalars

RADIUS_CLASSES_MM = (0.0, 1.2, 2.5, 5.0)


@dataclass(frozen=True)
class Branches:
    """Straight tubes from start to end (mm), each with one radius (mm)."""

    start: Float[Array, "b 3"]
    end: Float[Array, "b 3"]
    radius_mm: Float[Array, " b"]


def joined(trees: list[Branches]) -> Branches:
    """All branches of several trees."""
    return Branches(
        np.concatenate([tree.start for tree in trees]),
        np.concatenate([tree.end for tree in trees]),
        np.concatenate([tree.radius_mm for tree in trees]),
    )


def grow_tree(
    root: Float[Array, " 3"], targets: Float[Array, "t 3"], tip_radius_mm: float
) -> tuple[Branches, Float[Array, "f 3"]]:
    """A tree from ``root`` to every target, and its bifurcations.

    The tree fills a volume as in Tawhai et al. 2000 (Ann Biomed Eng 28). A branch goes 40 % of the way to the centroid
    of its targets. Then the targets are halved across their widest direction. Radii follow Murray's law,
    r³ = r₁³ + r₂³.
    """
    branches, forks = [], []
    open_ends = [(root, targets)] if len(targets) else []
    while open_ends:
        start, group = open_ends.pop()
        if len(group) == 1:
            branches.append((start, group[0], 1))
            continue
        end = start + 0.4 * (group.mean(0) - start)
        branches.append((start, end, len(group)))
        forks.append(end)
        order = np.argsort(group[:, np.argmax(np.ptp(group, axis=0))])
        middle = len(group) // 2
        open_ends += [(end, group[order[:middle]]), (end, group[order[middle:]])]
    starts = np.array([b[0] for b in branches]).reshape(-1, 3)
    ends = np.array([b[1] for b in branches]).reshape(-1, 3)
    counts = np.array([b[2] for b in branches], dtype=np.float64)
    return Branches(starts, ends, tip_radius_mm * np.cbrt(counts)), np.array(forks).reshape(-1, 3)


class Tubes:
    """Soft tubes around branches, evaluated at any points.

    The nearest centre line is looked up among branches of similar radius, so that a thin branch does not hide a thick
    one.
    """

    def __init__(self, branches: Branches, step_mm: float) -> None:
        """Centre lines are sampled every ``step_mm``."""
        length = np.linalg.norm(branches.end - branches.start, axis=1)
        count = np.ceil(length / step_mm).astype(int) + 1
        branch = np.repeat(np.arange(len(count)), count)
        place = np.arange(len(branch)) - np.repeat(np.cumsum(count) - count, count)
        way = (place / np.maximum(count[branch] - 1, 1))[:, None]
        points = (1 - way) * branches.start[branch] + way * branches.end[branch]
        radius = branches.radius_mm[branch]
        level = np.digitize(radius, RADIUS_CLASSES_MM)
        self._classes = [(cKDTree(points[level == k]), radius[level == k]) for k in np.unique(level)]

    def occupancy(self, points: Points, voxel_mm: float, wall: float = 0.0) -> Scalars:
        """Share of a voxel of ``voxel_mm`` at each point that the tubes fill, 0 to 1.

        A tube thinner than a voxel is drawn one voxel wide, and fainter by the ratio of the cross-sections: this is the
        partial volume effect. ``wall`` increases radii by this fraction and 0.4 mm.
        """
        filled = np.zeros(len(points), dtype=np.float32)
        place = points.detach().numpy()
        for tree, radii in self._classes:
            radii = radii * (1 + wall) + (0.4 if wall else 0.0)
            reach = float(np.maximum(radii, voxel_mm / 2).max()) + voxel_mm / 2
            distance, nearest = tree.query(place, distance_upper_bound=reach, workers=1)
            near = np.flatnonzero(np.isfinite(distance))
            radius = radii[nearest[near]]
            drawn = np.maximum(radius, voxel_mm / 2)
            edge = np.clip((drawn - distance[near]) / voxel_mm + 0.5, 0, 1) * (radius / drawn) ** 2
            filled[near] = np.maximum(filled[near], edge)
        return torch.from_numpy(filled)

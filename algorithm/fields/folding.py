"""Repair of a field that folds: `unfold` smooths it on its own grid, only around the foldings.

A folding is a determinant of I + ∇u ≤ 0. Between its voxels a field is trilinear. Inside a cell of eight voxels, its
derivative along x is a weighted mean of the differences along the four x-edges of that cell; the same holds for y and
z. The determinant is linear in each of the three derivatives. So it is at least the smallest of the 4·4·4 determinants
that take one edge along each axis. `unfold` keeps these above a bound. They contain all eight forward and backward
difference schemes at every voxel, and so their mean, the central differences, which alone would miss a checkerboard.
They do not cover the differences on another grid whose steps reach over several cells. For these there are the check of
the written field (`algorithm.fields.determinant`) and ``points_mm`` in `unfold`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor

from ..geometry import Grid, Size

_BAND_VOXELS = 2**17
"""Number of voxels that are processed together, so that the dozen arrays of a step stay in the processor's cache."""
_CELLS = 2**14
_MOST_BOXES = 200


@dataclass(frozen=True)
class UnfoldSettings:
    """Settings of `unfold`; lengths in voxels of the field's grid."""

    least: float = 0.05
    """Minimum of all determinants of a cell's edges, between 0 and 1."""
    radius_vox: float = 3.0
    """First radius: voxels farther from a folded cell do not change."""
    rounds: int = 3
    """Number of rounds with the same radius; then it doubles."""


def unfold(
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    settings: UnfoldSettings = UnfoldSettings(),
    points_mm: Float[Tensor, "p 3"] | None = None,
    attempt: int = 0,
) -> tuple[Float[Tensor, "1 3 z y x"], int]:
    """The field (mm) without foldings, and the number of changed voxels; the same tensor if nothing folds.

    A cell with a determinant below ``settings.least`` (see above) counts as folded. Outside the grid the field has its
    border values, and it must not fold there either. Around the voxels of folded cells, the field is mixed with its
    local mean: completely at those voxels, smoothly decreasing to nothing at the radius. This is repeated until no cell
    is folded, with larger and larger radii. If a radius larger than the grid does not suffice, the whole field is
    halved until no cell is folded. So the repair always ends, and always without foldings.

    ``points_mm``: world positions (which folded on another grid) around which the field is smoothed in any case; for a
    position outside the grid, around the nearest voxel. ``attempt``: number of earlier attempts for such positions;
    each doubles the first radius. ValueError for a displacement that is NaN or infinite.
    """
    if not bool(displacement.isfinite().all()):
        raise ValueError("a field with NaN or infinite displacements cannot be unfolded")
    whole = (0, 0, 0), grid.shape
    folded = _folded_voxels(displacement, grid, settings.least, [whole])
    if points_mm is not None and len(points_mm):
        folded = np.unique(np.concatenate([folded, _nearest_voxels(points_mm, grid)]), axis=0)
    if not len(folded):
        return displacement, 0
    repaired = displacement.detach().clone()
    for turn in itertools.count(attempt * settings.rounds):
        radius = settings.radius_vox * 2.0 ** (turn // settings.rounds)
        if radius > 2 * max(grid.size):
            _shrink(repaired, grid, settings.least)
            break
        boxes = [_smooth(repaired, cluster, radius) for cluster in _clusters(folded, radius)]
        folded = _folded_voxels(repaired, grid, settings.least, boxes)
        if not len(folded):
            break
    return repaired, int((repaired != displacement).any(dim=1).sum())


Box = tuple[Size, Size]
"""First voxel and the voxel after the last, each (z, y, x)."""


def smallest_determinant(displacement: Float[Tensor, "1 3 z y x"], grid: Grid) -> float:
    """The smallest determinant of a cell's edges, over all cells; NaN if any is NaN.

    It is a lower bound of det(I + ∇u) of the trilinear field at every point of the world.
    """
    least = 1.0  # the cell beyond the corner, where the field is constant
    for start, stop in _bands((0, 0, 0), grid.shape):
        voxels = _cell_corners(displacement, grid, start, stop)
        cells = torch.ones([n - 1 for n in voxels.shape[1:]], dtype=torch.bool)
        lowest = float(_edge_determinants(voxels, cells.nonzero()).min())
        least = lowest if math.isnan(lowest) else min(least, lowest)
        if math.isnan(least):
            break
    return least


def _folded_voxels(displacement: Tensor, grid: Grid, least: float, boxes: list[Box]) -> Int[np.ndarray, "n 3"]:
    """The voxels (z, y, x) of all cells that touch the boxes and have an edge determinant below ``least``."""
    folded = torch.zeros(grid.shape, dtype=torch.bool)
    last = torch.tensor(grid.shape) - 1
    found = False
    for box in boxes:
        for start, stop in _bands(*box):
            voxels = _cell_corners(displacement, grid, start, stop)
            cells = _steep(voxels, least).nonzero()
            if len(cells):
                cells = cells[~(_edge_determinants(voxels, cells) >= least)]  # also NaN, from overflow
            if not len(cells):
                continue
            found = True
            for corner in itertools.product((0, 1), repeat=3):
                z, y, x = (cells + torch.tensor(start) + torch.tensor(corner)).clamp(min=0).minimum(last).unbind(1)
                folded[z, y, x] = True
    indices: np.ndarray = folded.nonzero().numpy() if found else np.empty((0, 3), dtype=np.int64)
    return indices


def _bands(start: Size, stop: Size) -> Iterator[Box]:
    """The cells that touch the voxels of a box, in parts along z. Cell c lies between voxels c and c + 1; the cells at
    -1 and n - 1 lie outside the grid."""
    first, last = start[0] - 1, stop[0]
    depth = max(1, _BAND_VOXELS // ((stop[1] - start[1] + 1) * (stop[2] - start[2] + 1)))
    for z in range(first, last, depth):
        yield (z, start[1] - 1, start[2] - 1), (min(z + depth, last), stop[1], stop[2])


def _cell_corners(displacement: Tensor, grid: Grid, start: Size, stop: Size) -> Float[Tensor, "3 zc yc xc"]:
    """The displacement in voxels at the corners of the cells ``start`` to ``stop``; border values outside the grid."""
    low = [max(a, 0) for a in start]
    high = [min(b, n - 1) + 1 for b, n in zip(stop, grid.shape, strict=True)]
    part = displacement[:, :, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    pad = [p for a in (2, 1, 0) for p in (low[a] - start[a], stop[a] + 1 - high[a])]
    part = F.pad(part, pad, mode="replicate")[0] if any(pad) else part[0]
    to_voxels = torch.from_numpy(np.linalg.inv(grid.axes)).to(part)
    voxels: Tensor = to_voxels @ part.reshape(3, -1)
    corners: Tensor = voxels.reshape(part.shape)
    return corners


def _steep(voxels: Tensor, least: float) -> Bool[Tensor, "z y x"]:
    """The cells whose edges could have a determinant below ``least``: a quick test that misses none.

    No singular value of I + G is below 1 - ‖G‖ (Frobenius norm), so det(I + G) ≥ (1 - ‖G‖)³.
    """
    norms = []
    for axis, (p, q) in ((3, (1, 2)), (2, (1, 3)), (1, (2, 3))):
        step = voxels.diff(dim=axis).square_().sum(dim=0, keepdim=True)
        for dim in (p, q):
            n = step.shape[dim] - 1
            step = torch.maximum(step.narrow(dim, 0, n), step.narrow(dim, 1, n))
        norms.append(step[0])
    gentle: Tensor = norms[0] + norms[1] + norms[2] <= (1 - least ** (1 / 3)) ** 2
    return gentle.logical_not_()  # with this order, NaN counts as steep


def _edge_determinants(voxels: Float[Tensor, "3 z y x"], cells: Int[Tensor, "n 3"]) -> Float[Tensor, " n"]:
    """For each cell, the smallest of the 64 determinants of an x-, a y- and a z-edge."""
    _, _, ny, nx = voxels.shape
    corners = torch.tensor([(z * ny + y) * nx + x for z, y, x in itertools.product((0, 1), repeat=3)])
    flat = voxels.reshape(3, -1)
    smallest = []
    for part in cells.split(_CELLS):
        z, y, x = part.unbind(1)
        v = flat[:, corners[:, None] + (z * ny + y) * nx + x].reshape(3, 2, 2, 2, -1)
        ex, ey, ez = (v.diff(dim=dim).reshape(3, 4, -1) for dim in (3, 2, 1))
        ex[0] += 1
        ey[1] += 1
        ez[2] += 1
        p, q = ey[:, :, None], ez[:, None]
        normal = [p[b] * q[c] - p[c] * q[b] for b, c in ((1, 2), (2, 0), (0, 1))]
        lowest = [
            (e[0] * normal[0]).addcmul_(e[1], normal[1]).addcmul_(e[2], normal[2]).amin(dim=(0, 1))
            for e in ex.unbind(1)
        ]
        smallest.append(torch.stack(lowest).amin(dim=0))
    return torch.cat(smallest)


def _clusters(folded: Int[np.ndarray, "n 3"], radius: float) -> list[Int[np.ndarray, "m 3"]]:
    """Groups of folded voxels whose neighbourhoods of ``radius`` do not touch; one group if there are too many."""
    blocks = folded // (2 * math.ceil(radius) + 1)
    occupied = np.zeros(blocks.max(axis=0) + 1, dtype=bool)
    occupied[tuple(blocks.T)] = True
    labels, count = ndimage.label(occupied, structure=np.ones((3, 3, 3)))
    if count == 1 or count > _MOST_BOXES:
        return [folded]
    label = labels[tuple(blocks.T)]
    order = np.argsort(label, kind="stable")
    return np.split(folded[order], np.flatnonzero(np.diff(label[order])) + 1)


def _smooth(displacement: Tensor, folded: Int[np.ndarray, "m 3"], radius: float) -> Box:
    """Mix the field with its local mean around the folded voxels, in place. Returns the box of the changed voxels.

    The mean is a moving average of about ``radius`` voxels, applied twice. It does not change linear fields.
    """
    shape = np.array(displacement.shape[2:])
    margin = math.ceil(radius)
    start = np.maximum(folded.min(axis=0) - margin, 0)
    stop = np.minimum(folded.max(axis=0) + margin + 1, shape)
    away = np.ones(stop - start, dtype=bool)
    away[tuple((folded - start).T)] = False
    nearness = np.clip(1.5 * (1 - ndimage.distance_transform_edt(away) / radius), 0, 1)
    weight = torch.from_numpy(nearness**2 * (3 - 2 * nearness)).to(displacement)
    width = 2 * max(1, round(radius / 2)) + 1
    (z, y, x), (z1, y1, x1) = start.tolist(), stop.tolist()
    low = np.maximum(start - width, 0)  # the mean reaches farther
    high = np.minimum(stop + width, shape)
    for component in displacement[0]:
        mean = component[low[0] : high[0], low[1] : high[1], low[2] : high[2]].numpy()
        for _ in range(2):
            mean = ndimage.uniform_filter(mean, width, mode="nearest")
        inner = tuple(slice(a, b) for a, b in zip(start - low, stop - low, strict=True))
        part = component[z:z1, y:y1, x:x1]
        mixed = part + weight * (torch.from_numpy(mean[inner]) - part)
        part.copy_(torch.where(weight > 0, mixed, part))  # all other values stay bit by bit, also -0
    return (z, y, x), (z1, y1, x1)


def _shrink(displacement: Tensor, grid: Grid, least: float) -> None:
    """Halve the field, in place, at least once, until nothing folds."""
    while True:
        displacement.mul_(0.5)
        if not len(_folded_voxels(displacement, grid, least, [((0, 0, 0), grid.shape)])):
            return


def _nearest_voxels(points_mm: Tensor, grid: Grid) -> Int[np.ndarray, "n 3"]:
    """Voxels (z, y, x) nearest to world positions."""
    index = np.rint(grid.to_index(points_mm.cpu().numpy())).astype(np.int64)
    nearest: np.ndarray = np.clip(index, 0, np.array(grid.size) - 1)[:, ::-1]
    return nearest

"""The conventions, and every operation that depends on them.

Volumes are tensors ``(n, c, z, y, x)``. Vectors have components ``(x, y, z)`` in world axes (LPS, mm), as in ITK.
A displacement field ``u`` lives on the grid of the *fixed* image and pulls: ``warped(x) = moving(x + u(x))``, the
way ``sitk.DisplacementFieldTransform`` applies it. Fields are always mm on a `Grid`: a change of resolution
resamples a field, it never rescales it.

Voxels are points: index ``i`` stands for the voxel centre ``origin + direction · diag(spacing) · i``. Between the
centres values are trilinear; outside, up to half a voxel beyond the outermost centres, the border value holds (as in
ITK), and farther out either the border value (fields) or a fill value (images). This is the only module that calls
``grid_sample``, always with ``align_corners=True``.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
Size = tuple[int, int, int]

_PART_VOXELS = 2**24
"""Of an image that is resampled, so many voxels are held as float at a time, or some more."""

IDENTITY: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Grid:
    """Voxel centres in the world, as an ITK image header gives them; every triple is in the order (x, y, z)."""

    size: Size
    spacing: Vector = (1.0, 1.0, 1.0)
    """mm between neighbouring voxel centres."""
    origin: Vector = (0.0, 0.0, 0.0)
    """World position (mm) of the centre of voxel (0, 0, 0)."""
    direction: Matrix = field(default=IDENTITY)
    """Columns are the world directions of the index axes."""

    @property
    def shape(self) -> Size:
        """Tensor shape (z, y, x)."""
        return self.size[2], self.size[1], self.size[0]

    @property
    def extent_mm(self) -> Vector:
        """Edge lengths of the box that the voxels fill."""
        x, y, z = (n * s for n, s in zip(self.size, self.spacing, strict=True))
        return x, y, z

    @property
    def axes(self) -> np.ndarray:
        """(3, 3), world mm per index step: direction · diag(spacing)."""
        return np.array(self.direction) @ np.diag(self.spacing)

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """World positions (..., 3) in mm of continuous indices (..., 3)."""
        world: np.ndarray = np.asarray(index, dtype=np.float64) @ self.axes.T + np.array(self.origin)
        return world

    def to_index(self, world: np.ndarray) -> np.ndarray:
        """Continuous indices (..., 3) of world positions (..., 3) in mm."""
        offset: np.ndarray = np.asarray(world, dtype=np.float64) - np.array(self.origin)
        return offset @ np.linalg.inv(self.axes).T

    def cropped(self, start: Size, size: Size) -> "Grid":
        """The voxels ``start ... start + size - 1``; a negative start or a larger size pads."""
        x, y, z = self.to_world(np.array(start))
        return replace(self, size=size, origin=(float(x), float(y), float(z)))

    def padded(self, margin: int) -> "Grid":
        """``margin`` more voxels on every side."""
        x, y, z = (n + 2 * margin for n in self.size)
        return self.cropped((-margin, -margin, -margin), (x, y, z))

    def resized(self, size: Size) -> "Grid":
        """Another number of voxels in the same box: outer voxel *edges* stay, so the origin moves by half voxels."""
        return self.between(np.full(3, -0.5), np.array(self.size) - 0.5, size)

    def between(self, low: np.ndarray, high: np.ndarray, size: Size) -> "Grid":
        """``size`` voxels whose outer edges are at the continuous indices ``low`` and ``high``, (3,)."""
        ratio = (high - low) / np.array(size)
        x, y, z = self.to_world(low + ratio / 2)
        sx, sy, sz = ratio * np.array(self.spacing)
        origin, spacing = (float(x), float(y), float(z)), (float(sx), float(sy), float(sz))
        return replace(self, size=size, spacing=spacing, origin=origin)

    def within(self, other: "Grid", size: Size) -> "Grid":
        """``size`` voxels in the part of the box that lies in that of ``other``; in all of it where the axes of the two
        are not parallel, or they lie apart."""
        low, high = np.full(3, -0.5), np.array(self.size) - 0.5
        if _parallel(other, self, Affine()):
            ends = self.to_index(other.to_world(np.array([np.full(3, -0.5), np.array(other.size) - 0.5])))
            start, end = np.maximum(low, ends.min(axis=0)), np.minimum(high, ends.max(axis=0))
            if (start < end).all():
                low, high = start, end
        return self.between(low, high, size)

    def coarsened(self, factor: int = 2) -> "Grid":
        """The grid of averages over ``factor``³ voxels: its origin lies (factor - 1) / 2 voxels farther in."""
        if any(n % factor for n in self.size):
            raise ValueError(f"a grid of {self.size} voxels cannot be coarsened by {factor}")
        x, y, z = (n // factor for n in self.size)
        return self.resized((x, y, z))


@dataclass(frozen=True)
class Affine:
    """The world map x ↦ matrix · x + offset (mm)."""

    matrix: Matrix = IDENTITY
    offset: Vector = (0.0, 0.0, 0.0)

    @classmethod
    def from_arrays(cls, matrix: np.ndarray, offset: np.ndarray) -> "Affine":
        """From a (3, 3) matrix and an offset (3,) in mm."""
        a, b, c = ((float(r[0]), float(r[1]), float(r[2])) for r in matrix)
        return cls((a, b, c), (float(offset[0]), float(offset[1]), float(offset[2])))

    @classmethod
    def least_squares(cls, points: np.ndarray, targets: np.ndarray) -> "Affine":
        """The map that brings ``points`` (p, 3) closest to ``targets`` (mm), in the least-squares sense."""
        centre = points.mean(axis=0)
        basis = np.column_stack([np.ones(len(points)), points - centre])
        shift, *columns = np.linalg.lstsq(basis, targets)[0]
        matrix = np.column_stack(columns)
        return cls.from_arrays(matrix, shift - matrix @ centre)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Maps world points (..., 3) in mm."""
        mapped: np.ndarray = np.asarray(points, dtype=np.float64) @ np.array(self.matrix).T + np.array(self.offset)
        return mapped

    def inverse(self) -> "Affine":
        """The inverse map; ValueError when there is none."""
        if abs(np.linalg.det(np.array(self.matrix))) < 1e-9:
            raise ValueError(f"affine matrix {self.matrix} is singular")
        inverse = np.linalg.inv(np.array(self.matrix))
        return type(self).from_arrays(inverse, -inverse @ np.array(self.offset))


def canonical_axes(grid: Grid) -> tuple[Size, tuple[bool, bool, bool]]:
    """For each new axis (x, y, z): which old axis it is, and whether it runs backwards.

    Of the 48 re-storings the one whose direction has the largest trace, i.e. is closest to the identity in the
    Frobenius norm. Ties (axes at 45°) go by the direction itself, so they too end in the same order from any other.
    """
    direction = np.array(grid.direction)

    def closeness(axes: tuple[int, ...]) -> tuple[float, ...]:
        columns = direction[:, list(axes)]
        diagonal = np.diag(columns)
        stored = columns * np.where(diagonal < 0, -1.0, 1.0)
        return round(float(np.abs(diagonal).sum()), 6), *(np.round(stored, 6) + 0.0).ravel().tolist()

    x, y, z = max(itertools.permutations(range(3)), key=closeness)
    flip_x, flip_y, flip_z = (bool(direction[a, axis] < 0) for a, axis in enumerate((x, y, z)))
    return (x, y, z), (flip_x, flip_y, flip_z)


def restored(grid: Grid, axes: Size, flips: tuple[bool, bool, bool]) -> Grid:
    """The same voxel centres, new axis a being old axis ``axes[a]``, backwards where ``flips[a]``."""
    signs = np.where(flips, -1.0, 1.0)
    direction = np.array(grid.direction)[:, list(axes)] * signs + 0.0
    corner = np.zeros(3)
    for a in range(3):
        corner[axes[a]] = grid.size[axes[a]] - 1 if flips[a] else 0
    ox, oy, oz = grid.to_world(corner)
    x, y, z = (grid.size[a] for a in axes)
    sx, sy, sz = (grid.spacing[a] for a in axes)
    rows = ((float(r[0]), float(r[1]), float(r[2])) for r in direction)
    return Grid((x, y, z), (sx, sy, sz), (float(ox), float(oy), float(oz)), (next(rows), next(rows), next(rows)))


def linear_index_map(
    matrix: Float[Tensor, "3 3"], offset: Float[Tensor, " 3"], shape: Size
) -> Float[Tensor, "1 z y x 3"]:
    """``matrix · (i, j, k) + offset`` for every voxel of a (z, y, x) shape; differentiable in both."""
    nz, ny, nx = shape
    i, j, k = (torch.arange(n, dtype=matrix.dtype, device=matrix.device) for n in (nx, ny, nz))
    step_x, step_y, step_z = matrix.unbind(1)
    plane = j[:, None, None] * step_y + i[None, :, None] * step_x + offset
    return (k[:, None, None, None] * step_z + plane)[None]


class IndexMap(NamedTuple):
    """From voxels of one grid to continuous indices of another: matrix · (i, j, k) + offset + steps · u, u in mm."""

    matrix: Float[np.ndarray, "3 3"]
    offset: Float[np.ndarray, " 3"]
    steps: Float[np.ndarray, "3 3"]


def index_map(grid: Grid, moving_grid: Grid, affine: Affine) -> IndexMap:
    """The moving indices of affine(x + u), x on ``grid``; float64."""
    steps = np.linalg.inv(moving_grid.axes) @ np.array(affine.matrix)
    return IndexMap(steps @ grid.axes, moving_grid.to_index(affine(np.array(grid.origin))), steps)


def moving_index(
    grid: Grid, moving_grid: Grid, displacement: Float[Tensor, "n 3 z y x"] | None, affine: Affine, like: Tensor
) -> Float[Tensor, "m zz yy xx 3"]:
    """Continuous moving indices of the points affine(x + u(x)), x on ``grid``; all linear parts in float64 first."""
    return _mapped(index_map(grid, moving_grid, affine), displacement, grid, like)


def _mapped(
    index_map: IndexMap, displacement: Float[Tensor, "n 3 z y x"] | None, grid: Grid, like: Tensor
) -> Float[Tensor, "m zz yy xx 3"]:
    matrix, offset, steps = (_tensor(part, like) for part in index_map)
    index = linear_index_map(matrix, offset, grid.shape)
    if displacement is None:
        return index
    return torch.einsum("ij,njzyx->nzyxi", steps, displacement).add_(index)


def sample(
    volume: Float[Tensor, "n c z y x"],
    index: Float[Tensor, "m zz yy xx 3"],
    fill: float | None = None,
    nearest: bool = False,
) -> Float[Tensor, "k c zz yy xx"]:
    """Values of ``volume`` at continuous indices (x, y, z), trilinear or nearest.

    Outside the volume the border value holds; with ``fill``, only up to half a voxel outside, then the fill value.
    One of n and m may be 1.
    """
    to_position = _tensor(_to_position(volume.shape[2:]), index)
    values = _sampled(volume, torch.addcmul(-torch.ones_like(to_position), index, to_position), nearest)
    if fill is None:
        return values
    return torch.where(inside(index, volume.shape[2:])[:, None], values, fill)


def _to_position(shape: Size | torch.Size) -> Float[np.ndarray, " 3"]:
    """Voxels (x, y, z) of a (z, y, x) volume times this, less 1, are the positions of ``grid_sample``."""
    sizes = np.array(tuple(shape)[::-1], dtype=float)
    return np.asarray(2 / np.maximum(sizes - 1, 1))


def _sampled(volume: Tensor, position: Float[Tensor, "m zz yy xx 3"], nearest: bool) -> Tensor:
    """Values at positions of ``grid_sample``; one of the batches may be of 1."""
    number = max(volume.shape[0], position.shape[0])
    volume, position = (part.expand(number, -1, -1, -1, -1) for part in (volume, position))
    return _grid_sample(volume, position, "nearest" if nearest else "bilinear")


def inside(index: Float[Tensor, "n z y x 3"], shape: Size | torch.Size) -> Bool[Tensor, "n z y x"]:
    """Whether continuous indices lie in a volume of (z, y, x) voxels, voxels being boxes around their centres."""
    x, y, z = ((i >= -0.5) & (i < n - 0.5) for i, n in zip(index.unbind(-1), tuple(shape)[::-1], strict=True))
    return x & y & z


def _grid_sample(volume: Tensor, position: Tensor, mode: str) -> Tensor:
    """``grid_sample`` with the project's settings. The CPU kernel is parallel over the batch only: split z into one."""
    n, depth, height, width, _ = position.shape
    parts = math.gcd(depth, torch.get_num_threads()) if n == 1 and position.device.type == "cpu" else 1
    split = position.reshape(n * parts, depth // parts, height, width, 3)
    source = volume.expand(parts, -1, -1, -1, -1) if n == 1 else volume
    values = F.grid_sample(source, split, mode=mode, padding_mode="border", align_corners=True)
    channels = volume.shape[1]
    if parts == 1:
        return values
    return values.transpose(0, 1).reshape(1, channels, depth, height, width)


def warp(
    moving: Float[Tensor, "n c zm ym xm"],
    moving_grid: Grid,
    displacement: Float[Tensor, "m 3 z y x"] | None,
    grid: Grid,
    *,
    affine: Affine = Affine(),
    fill: float | None = None,
    nearest: bool = False,
) -> Float[Tensor, "k c z y x"]:
    """``moving(affine(x + u(x)))`` for x on ``grid``; ``displacement`` None means u = 0. Outside: see `sample`."""
    _check_shape(moving, moving_grid)
    if displacement is not None:
        _check_shape(displacement, grid)
    if fill is not None:
        return sample(moving, moving_index(grid, moving_grid, displacement, affine, moving), fill, nearest)
    scale, (matrix, offset, steps) = _to_position(moving_grid.shape), index_map(grid, moving_grid, affine)
    positions = IndexMap(scale[:, None] * matrix, scale * offset - 1, scale[:, None] * steps)  # saves a pass
    return _sampled(moving, _mapped(positions, displacement, grid, moving), nearest)


def validity(
    displacement: Float[Tensor, "n 3 z y x"],
    grid: Grid,
    moving_grid: Grid,
    *,
    affine: Affine = Affine(),
) -> Bool[Tensor, "n 1 z y x"]:
    """Whether affine(x + u(x)) lies inside the moving field of view."""
    return inside(moving_index(grid, moving_grid, displacement, affine, displacement), moving_grid.shape)[:, None]


def resample(
    volume: Float[Tensor, "n c zs ys xs"], source: Grid, target: Grid, fill: float | None = None
) -> Float[Tensor, "n c z y x"]:
    """A volume or field on another grid of the same world. Trilinear: smooth first when the target is coarser."""
    if source == target:
        return volume
    if fill is None and _parallel(source, target, Affine()):
        return _interpolated(volume, source, target)
    return warp(volume, source, None, target, fill=fill)


def _interpolated(volume: Tensor, source: Grid, target: Grid) -> Tensor:
    """`resample` where the axes are parallel: one matrix for each axis, several times faster than `warp`."""
    along_x, along_y, along_z = (weights.to(volume) for weights in _weights(source, target, Affine(), smoothed=False))
    return along_y @ torch.einsum("ts,ncsyx->nctyx", along_z, volume) @ along_x.T


def doubled(volume: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n c zd yd xd"]:
    """`resample` from ``grid.coarsened(2)`` to ``grid``, faster."""
    return F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)


def resample_image(
    image: Tensor, source: Grid, target: Grid, *, affine: Affine = Affine(), least: float, fill: float
) -> Float[Tensor, "1 1 z y x"]:
    """An image (1 1 z y x, any type) at affine(x), x on ``target``, smoothed first along axes that become coarser.

    Only what is needed of the source is converted to float, and never more than some million voxels at a time. Values
    below ``least`` (padding) are raised to it before any smoothing; outside the source the value is ``fill``. The
    Gaussian's variance is that of the target voxel's box less that of the source's, both measured along the source
    axes: (step² - 1) / 12 source voxels².
    """
    resampled = _axis_by_axis if _parallel(source, target, affine) else _slab_by_slab
    values = resampled(image, source, target, affine, least)
    return torch.where(inside(moving_index(target, source, None, affine, values), source.shape)[:, None], values, fill)


def _axis_by_axis(image: Tensor, source: Grid, target: Grid, affine: Affine, least: float) -> Tensor:
    """`resample_image` but for ``fill``, where the axes are parallel: smoothing and interpolation are then one matrix
    for each axis, and no smoothed voxel is worked out that is not asked for."""
    start, size = needed_part(source, target, affine)
    (x, y, z), (nx, ny, nz) = start, size
    weights = _weights(source.cropped(start, size), target, affine, smoothed=True)
    along_x, along_y, along_z = (along.to(image.device) for along in weights)
    volume = image[0, 0, z : z + nz, y : y + ny, x : x + nx]
    parts = []
    for rows in volume.split(max(1, _PART_VOXELS // (nx * nz)), dim=1):
        coarse = torch.tensordot(along_z, rows.float().clamp(min=least), dims=1)
        parts.append(coarse @ along_x.T)
    return (along_y @ torch.cat(parts, dim=1))[None, None]


def _weights(source: Grid, target: Grid, affine: Affine, *, smoothed: bool) -> list[Float[Tensor, "t s"]]:
    """`_axis_weights` along x, y and z for axes that are parallel."""
    first = source.to_index(affine(np.array(target.origin)))
    steps = np.diag(_index_steps(source, target, affine))
    return [
        _axis_weights(start + step * np.arange(count), number, _sigma(step) if smoothed else 0.0)
        for start, step, count, number in zip(first, steps, target.size, source.size, strict=True)
    ]


def _axis_weights(index: np.ndarray, number: int, sigma: float) -> Float[Tensor, "t s"]:
    """One row for each continuous index: the weights of ``number`` voxels for the linear interpolation between their
    Gaussian means; border values go on."""
    low = np.clip(np.floor(index).astype(int), 0, number - 1)
    share = np.clip(index - low, 0, 1)
    taps = _taps(sigma)
    weights = np.zeros((len(index), number))
    for voxel, part in ((low, 1 - share), (np.minimum(low + 1, number - 1), share)):
        for shift, tap in enumerate(taps, start=-(len(taps) // 2)):
            np.add.at(weights, (np.arange(len(index)), np.clip(voxel + shift, 0, number - 1)), part * tap)
    return torch.from_numpy(weights.astype(np.float32))


def _slab_by_slab(image: Tensor, source: Grid, target: Grid, affine: Affine, least: float) -> Tensor:
    """`resample_image` but for ``fill``: smoothed at full resolution, then sampled, in slabs of the target along z."""
    part_voxels = math.prod(needed_part(source, target, affine)[1])
    most = max(1, int(math.prod(target.size) * min(1.0, _PART_VOXELS / part_voxels)))
    parts = []
    for slab in slabs(target, most):
        start, size = needed_part(source, slab, affine)
        (x, y, z), (nx, ny, nz) = start, size
        part = image[:, :, z : z + nz, y : y + ny, x : x + nx].float().clamp(min=least)
        for axis, ratio in zip((4, 3, 2), _steps(source, target, affine), strict=True):
            part = _gaussian(part, _sigma(ratio), axis)
        parts.append(warp(part, source.cropped(start, size), None, slab, affine=affine))
    return torch.cat(parts, dim=2)


def warp_image(
    image: Tensor, source: Grid, displacement: Float[Tensor, "1 3 z y x"], grid: Grid, *, fill: float
) -> Float[Tensor, "1 1 z y x"]:
    """An image (1 1 z y x, any type) at x + u(x): `warp`, but only the part that is needed is converted to float."""
    index = moving_index(grid, source, displacement, Affine(), displacement)
    last = torch.tensor(source.size) - 1
    ends = torch.tensor([torch.aminmax(along) for along in index.unbind(-1)]).T  # along each axis: fast
    low, high = (torch.minimum(end.long().clamp(min=0), last) for end in (ends[0].floor(), ends[1].ceil()))
    (x, y, z), (x1, y1, z1) = low.tolist(), (high + 1).tolist()
    values = sample(image[:, :, z:z1, y:y1, x:x1].float(), index - low.float())
    return torch.where(inside(index, source.shape)[:, None], values, fill)


def needed_part(source: Grid, target: Grid, affine: Affine) -> tuple[Size, Size]:
    """First voxel and size of the part of ``source`` that `resample_image` looks at for ``target``."""
    corners = np.array([[i * (n - 1) for i, n in zip(c, target.size, strict=True)] for c in np.ndindex(2, 2, 2)])
    index = source.to_index(affine(target.to_world(corners)))
    margin = 2 + 2 * _steps(source, target, affine)
    last = np.array(source.size) - 1
    low = np.clip(np.floor(index.min(axis=0) - margin), 0, last).astype(int)
    high = np.clip(np.ceil(index.max(axis=0) + margin), 0, last).astype(int)
    (x, y, z), (nx, ny, nz) = low.tolist(), (high - low + 1).tolist()
    return (x, y, z), (nx, ny, nz)


def _index_steps(source: Grid, target: Grid, affine: Affine) -> np.ndarray:
    """(3, 3): source index per index step of ``target``."""
    steps: np.ndarray = np.linalg.inv(source.axes) @ np.array(affine.matrix) @ target.axes
    return steps


def _steps(source: Grid, target: Grid, affine: Affine) -> np.ndarray:
    """Source voxels per step of ``target``, along each source axis."""
    steps: np.ndarray = np.abs(_index_steps(source, target, affine)).max(axis=1)
    return steps


def _parallel(source: Grid, target: Grid, affine: Affine) -> bool:
    """Whether every axis of ``target``, mapped, runs along the axis of the same name of ``source``, or against it."""
    aside = _index_steps(source, target, affine) * np.array(target.size)
    np.fill_diagonal(aside, 0)
    return bool(np.abs(aside).max() < 1e-6)


def _sigma(step: float) -> float:
    """Standard deviation (source voxels) of the smoothing before steps of so many source voxels."""
    return float(np.sqrt(max(step**2 - 1, 0) / 12))


def _taps(sigma: float) -> np.ndarray:
    """A Gaussian of ``sigma`` voxels, an odd number of weights that add up to one."""
    radius = math.ceil(3 * sigma) if sigma >= 0.2 else 0
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 0.2)) ** 2)
    taps: np.ndarray = weights / weights.sum()
    return taps


def _gaussian(volume: Tensor, sigma: float, axis: int) -> Tensor:
    """Gaussian of ``sigma`` voxels along one axis, border values repeated. Shifted copies: faster than ``conv3d``."""
    taps = _taps(sigma).tolist()
    radius, n = len(taps) // 2, volume.shape[axis]
    if radius == 0:
        return volume
    total: Tensor = taps[radius] * volume
    for shift in range(1, radius + 1):
        tap, reach = taps[radius + shift], min(shift, n)
        for here, there, border, edge in ((0, shift, n - reach, n - 1), (shift, 0, 0, 0)):
            if shift < n:
                total.narrow(axis, here, n - shift).add_(volume.narrow(axis, there, n - shift), alpha=tap)
            total.narrow(axis, border, reach).add_(volume.narrow(axis, edge, 1), alpha=tap)
    return total


def slabs(grid: Grid, most_voxels: int = 2**21) -> Iterator[Grid]:
    """The grid in slabs along z of at most so many voxels (or one slice).

    The default keeps the three components of a slab below the 32 MiB from which glibc maps new pages each time.
    """
    nx, ny, nz = grid.size
    depth = max(1, most_voxels // (nx * ny))
    depth = 1 << (depth.bit_length() - 1)  # a power of two, which `_grid_sample` can share among threads
    for z in range(0, nz, depth):
        yield grid.cropped((0, 0, z), (nx, ny, min(depth, nz - z)))


def compose(
    first: Float[Tensor, "n 3 z y x"], first_grid: Grid, then: Float[Tensor, "n 3 zt yt xt"], then_grid: Grid
) -> Float[Tensor, "n 3 z y x"]:
    """The field of x ↦ y + then(y), y = x + first(x), on ``first_grid``: first(x) + then(x + first(x)).

    In the cascade ``then`` is the field so far and ``first`` the new level's, predicted for the already warped image:
    warped(x + first(x)) = moving(x + first(x) + then(x + first(x))).
    """
    return first + warp(then, then_grid, first, first_grid)


def with_affine(displacement: Float[Tensor, "n 3 z y x"], grid: Grid, affine: Affine) -> Float[Tensor, "n 3 z y x"]:
    """The displacement affine(x + u(x)) - x of the whole transform."""
    growth = np.array(affine.matrix) - np.eye(3)
    start = growth @ np.array(grid.origin) + np.array(affine.offset)
    along_x, along_y, along_z = (
        _tensor(np.outer(step, np.arange(n)), displacement)
        for step, n in zip((growth @ grid.axes).T, grid.size, strict=True)
    )
    plane = (along_y[:, :, None] + along_x[:, None, :] + _tensor(start, displacement)[:, None, None])[:, None]
    return _apply(np.array(affine.matrix), displacement).add_(plane).add_(along_z[:, :, None, None])


def invert(
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    target: Grid,
    affine: Affine = Affine(),
    iterations: int = 30,
) -> Float[Tensor, "1 3 zt yt xt"]:
    """The field w on ``target`` for which x ↦ affine(x + w(x)) undoes y ↦ affine⁻¹(y + u(y)), u on ``grid``.

    So w(x) = -A⁻¹ u(affine(x + w(x))), A the linear part, by fixed-point iteration with steps of a half; they converge
    where the eigenvalues of I + ∇u lie between 0 and 4. Outside its grid, u holds its border values.
    """
    back = np.linalg.inv(np.array(affine.matrix))
    inverse = torch.zeros(1, 3, *target.shape, dtype=displacement.dtype, device=displacement.device)
    for _ in range(iterations):
        inverse = (inverse - _apply(back, warp(displacement, grid, inverse, target, affine=affine))) / 2
    return inverse


def displacement_at(
    points_mm: Float[Tensor, "p 3"], displacement: Float[Tensor, "1 3 z y x"], grid: Grid
) -> Float[Tensor, "p 3"]:
    """u (mm) at world points (mm), trilinear; differentiable in the field."""
    index = torch.from_numpy(grid.to_index(points_mm.detach().cpu().numpy())).to(displacement)
    return sample(displacement, index[None, None, None])[0, :, 0, 0].T


def lengths(vectors: Float[Tensor, "n 3 z y x"]) -> Float[Tensor, "n 1 z y x"]:
    """Of every vector, in the unit of its components. Much faster than ``norm``, whose sums run across the memory."""
    x, y, z = vectors.split(1, dim=1)
    return torch.addcmul(torch.addcmul(x * x, y, y), z, z).sqrt()


def index_displacement(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """The same displacement in voxels along the index axes."""
    return _apply(np.linalg.inv(grid.axes), displacement)


def world_displacement(voxels: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n 3 z y x"]:
    """Displacements in voxels along the index axes, in world mm."""
    return _apply(grid.axes, voxels)


def jacobian_determinant(displacement: Float[Tensor, "n 3 z y x"], grid: Grid) -> Float[Tensor, "n z y x"]:
    """det(I + ∇u) at every voxel: central differences inside, one-sided at the border.

    Taken in index space, where the direction matrix cancels: det(I + ∂v/∂i) with v the displacement in voxels.
    A folding is a value ≤ 0. Needs at least two voxels along each axis.
    """
    voxels = index_displacement(displacement, grid)
    # rows: derivatives along x, y, z; columns: components
    rows = [torch.gradient(voxels, dim=dim)[0] for dim in (-1, -2, -3)]
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(1) for row in rows)
    a, e, i = a + 1, e + 1, i + 1
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _apply(matrix: np.ndarray, vectors: Float[Tensor, "n 3 z y x"]) -> Float[Tensor, "n 3 z y x"]:
    return torch.einsum("ij,njzyx->nizyx", _tensor(matrix, vectors), vectors)


def _check_shape(volume: Tensor, grid: Grid) -> None:
    if tuple(volume.shape[2:]) != grid.shape:
        raise ValueError(
            f"a volume of (z, y, x) = {tuple(volume.shape[2:])} voxels does not fit a grid of {grid.shape}"
        )

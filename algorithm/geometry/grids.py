"""Grids of voxel centres in the world, affine maps between worlds."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
Size = tuple[int, int, int]
IDENTITY: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True)
class Grid:
    """Voxel centres in the world, as in an ITK image header. Every triple is in the order (x, y, z)."""

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
        """The same box with another number of voxels. Outer voxel *edges* stay, so the origin moves by half voxels."""
        return self.between(np.full(3, -0.5), np.array(self.size) - 0.5, size)

    def between(self, low: np.ndarray, high: np.ndarray, size: Size) -> "Grid":
        """``size`` voxels whose outer edges are at the continuous indices ``low`` and ``high``, (3,)."""
        ratio = (high - low) / np.array(size)
        x, y, z = self.to_world(low + ratio / 2)
        sx, sy, sz = ratio * np.array(self.spacing)
        origin, spacing = (float(x), float(y), float(z)), (float(sx), float(sy), float(sz))
        return replace(self, size=size, spacing=spacing, origin=origin)

    def within(self, other: "Grid", size: Size) -> "Grid":
        """``size`` voxels in the part of this box that lies inside the box of ``other``.

        They fill the whole box when the axes of the two grids are not parallel, or when the boxes do not overlap.
        """
        low, high = np.full(3, -0.5), np.array(self.size) - 0.5
        if are_parallel(other, self, Affine()):
            ends = self.to_index(other.to_world(np.array([np.full(3, -0.5), np.array(other.size) - 0.5])))
            start, end = np.maximum(low, ends.min(axis=0)), np.minimum(high, ends.max(axis=0))
            if (start < end).all():
                low, high = start, end
        return self.between(low, high, size)

    def coarsened(self, factor: int = 2) -> "Grid":
        """The grid of averages over ``factor``³ voxels. Its origin lies (factor - 1) / 2 voxels further inside."""
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
        """Map world points (..., 3) in mm."""
        mapped: np.ndarray = np.asarray(points, dtype=np.float64) @ np.array(self.matrix).T + np.array(self.offset)
        return mapped

    @property
    def determinant(self) -> float:
        """The change of volume."""
        return float(np.linalg.det(np.array(self.matrix)))

    def inverse(self) -> "Affine":
        """The inverse map; ValueError when the matrix is singular."""
        if abs(self.determinant) < 1e-9:
            raise ValueError(f"affine matrix {self.matrix} is singular")
        inverse = np.linalg.inv(np.array(self.matrix))
        return type(self).from_arrays(inverse, -inverse @ np.array(self.offset))


def moved(grid: Grid, rigid: Affine) -> Grid:
    """The grid moved by a rigid map of the world. Voxels of an image keep their values and change their positions."""
    x, y, z = rigid(np.array(grid.origin))
    direction = Affine.from_arrays(np.array(rigid.matrix) @ np.array(grid.direction), np.zeros(3)).matrix
    return replace(grid, origin=(float(x), float(y), float(z)), direction=direction)


def canonical_axes(grid: Grid) -> tuple[Size, tuple[bool, bool, bool]]:
    """For each new axis (x, y, z): the old axis that it is, and whether it runs backwards.

    There are 48 ways to store the voxels. This one has the direction with the largest trace, so it is closest to the
    identity in the Frobenius norm. The direction itself decides ties (axes at 45°), so the result does not depend on
    the order in which the voxels are stored.
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
    """The same voxel centres. New axis a is old axis ``axes[a]``, backwards where ``flips[a]``."""
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


def index_steps(source: Grid, target: Grid, affine: Affine) -> np.ndarray:
    """Steps of the source index per index step of ``target``, (3, 3)."""
    steps: np.ndarray = np.linalg.inv(source.axes) @ np.array(affine.matrix) @ target.axes
    return steps


def steps_between(source: Grid, target: Grid, affine: Affine) -> np.ndarray:
    """Source voxels per index step of ``target``, along each source axis."""
    steps: np.ndarray = np.abs(index_steps(source, target, affine)).max(axis=1)
    return steps


def are_parallel(source: Grid, target: Grid, affine: Affine) -> bool:
    """Whether ``affine`` maps each axis of ``target`` along, or against, the axis of the same name of ``source``."""
    aside = index_steps(source, target, affine) * np.array(target.size)
    np.fill_diagonal(aside, 0)
    return bool(np.abs(aside).max() < 1e-6)


def slabs(grid: Grid, most_voxels: int = 2**21) -> Iterator[Grid]:
    """The grid in slabs along z of at most ``most_voxels`` voxels (or one slice).

    With the default, the three components of a slab take less than 32 MiB. From that size on, glibc maps new pages for
    each allocation.
    """
    nx, ny, nz = grid.size
    depth = max(1, most_voxels // (nx * ny))
    depth = 1 << (depth.bit_length() - 1)  # a power of two: threads can share it evenly
    for z in range(0, nz, depth):
        yield grid.cropped((0, 0, z), (nx, ny, min(depth, nz - z)))

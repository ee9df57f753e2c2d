"""det(I + ∇u) of the written field: `checked` passes the slabs of a field on and computes it at every voxel.

A folding is a determinant ≤ 0.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..geometry import Grid, warp

MOST_POINTS = 100_000
"""Maximum number of positions of folded voxels that are kept. All folded voxels are counted."""

_BAND_VOXELS = 2**17
"""Number of voxels that are processed together, so that the dozen arrays of a step stay in the processor's cache."""


@dataclass
class DeterminantStatistics:
    """Statistics of det(I + ∇u) over a grid, collected slice by slice.

    A voxel is folded when its determinant is ≤ 0 or not finite. Folded voxels are counted, but `std_log_jacobian`
    leaves them out. The minima and maxima leave out determinants that are not finite.
    """

    voxels: int = 0
    lung_voxels: int = 0
    folded: int = 0
    folded_in_lungs: int = 0
    non_finite: int = 0
    """Voxels whose displacement is NaN or infinite."""
    minimum: float = math.inf
    minimum_in_lungs: float = math.inf
    maximum_in_lungs: float = -math.inf
    _logs: tuple[int, float, float] = (0, 0.0, 0.0)
    """Number, mean and sum of squared deviations of log det in the lungs."""
    _points: list[np.ndarray] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether no voxel folds and every displacement is finite."""
        return self.folded == 0 and self.non_finite == 0

    @property
    def points_mm(self) -> Float[Tensor, "p 3"]:
        """World positions of the first `MOST_POINTS` folded voxels, float64."""
        return torch.from_numpy(np.concatenate([np.empty((0, 3)), *self._points]))

    @property
    def std_log_jacobian(self) -> float | None:
        """Population standard deviation of log det in the lungs, without folded voxels (SDlogJ)."""
        count, _, squares = self._logs
        return math.sqrt(squares / count) if count else None

    def figures(self) -> dict[str, int | float | None]:
        """The statistics by their names in results.json; None for a figure without any lung voxel."""
        inside = self.folded_in_lungs / self.lung_voxels if self.lung_voxels else None
        return {
            "voxels": self.voxels,
            "lung_voxels": self.lung_voxels,
            "folded_voxels": self.folded,
            "folded_lung_voxels": self.folded_in_lungs,
            "non_finite_voxels": self.non_finite,
            "folding_fraction": inside,
            "jacobian_min": _finite(self.minimum_in_lungs),
            "jacobian_max": _finite(self.maximum_in_lungs),
            "jacobian_min_everywhere": _finite(self.minimum),
            "std_log_jacobian": self.std_log_jacobian,
        }

    def add(self, determinant: Float[Tensor, "y x"], lungs: Bool[Tensor, "y x"] | None, grid: Grid) -> None:
        """Add a slice. ``grid`` is the grid of this slice; ``lungs`` is None if the slice has no lung."""
        self.voxels += determinant.numel()
        low, high = (float(v) for v in torch.aminmax(determinant))
        if not (low > 0 and high < math.inf):  # also for NaN
            low = self._add_folded(determinant, lungs, grid)
        self.minimum = min(self.minimum, low)
        if lungs is not None:
            self._add_lungs(determinant[lungs])

    def _add_folded(self, determinant: Tensor, lungs: Tensor | None, grid: Grid) -> float:
        """Count the folded voxels of a slice; return its smallest finite determinant."""
        finite = determinant.isfinite()
        folded = ~((determinant > 0) & finite)
        self.folded += int(folded.sum())
        self.folded_in_lungs += 0 if lungs is None else int((folded & lungs).sum())
        room = MOST_POINTS - sum(map(len, self._points))
        y, x = folded.nonzero()[: max(room, 0)].unbind(1)
        self._points.append(grid.to_world(torch.stack([x, y, torch.zeros_like(x)], dim=1).numpy()))
        return float(torch.where(finite, determinant, torch.inf).min())

    def _add_lungs(self, determinant: Tensor) -> None:
        if not len(determinant):
            return
        self.lung_voxels += len(determinant)
        low, high = (float(v) for v in torch.aminmax(determinant))
        if not (low > 0 and high < math.inf):
            determinant = determinant[determinant.isfinite()]
            low, high = (float(v) for v in torch.aminmax(determinant)) if len(determinant) else (math.inf, -math.inf)
        self.minimum_in_lungs = min(self.minimum_in_lungs, low)
        self.maximum_in_lungs = max(self.maximum_in_lungs, high)
        logs = (determinant if low > 0 else determinant[determinant > 0]).log().double()
        if not len(logs):
            return
        # combine the moments of two parts: Chan, Golub, LeVeque 1983
        count, mean, squares = self._logs
        spread, middle = torch.var_mean(logs, correction=0)
        n, shift = len(logs), float(middle) - mean
        total = count + n
        squares += float(spread) * n + shift**2 * count * n / total
        self._logs = total, mean + shift * n / total, squares


def checked(
    slabs: Iterable[Float[Tensor, "1 3 _ y x"]],
    grid: Grid,
    lungs: Bool[Tensor, "1 1 zm ym xm"] | Float[Tensor, "1 1 zm ym xm"],
    lungs_grid: Grid,
    statistics: DeterminantStatistics,
) -> Iterator[Tensor]:
    """The unchanged slabs (along z, of any thickness, mm) of a field on ``grid``. Each slab is added to ``statistics``.

    The determinants equal `geometry.jacobian_determinant` of the whole field, to rounding. Along an axis with a single
    voxel the derivative is 0. A voxel belongs to the lungs where the nearest voxel of the mask is above 0.5; outside
    the mask's grid it does not. Two slices are kept in memory beside the slab. The last slice is counted when the
    iterator is exhausted. ValueError unless the slabs fill the grid.
    """
    check = _Check(grid, lungs > 0.5, lungs_grid, statistics)
    for slab in slabs:
        check.add(slab)
        yield slab
    check.finish()


class _Check:
    """The state of `checked`: the slices that the next determinant needs."""

    def __init__(self, grid: Grid, lungs: Tensor, lungs_grid: Grid, statistics: DeterminantStatistics) -> None:
        self.grid, self.lungs, self.statistics = grid, _Lungs(lungs, lungs_grid, grid), statistics
        self.tail: list[Tensor] = []
        """The last (at most two) slices so far, (3, y, x)."""
        self.z = 0
        """Number of slices so far."""

    @torch.no_grad()
    def add(self, slab: Tensor) -> None:
        """Process all slices whose neighbours are known."""
        nz, ny, nx = self.grid.shape
        depth = slab.shape[2]
        if tuple(slab.shape) != (1, 3, depth, ny, nx) or self.z + depth > nz:
            raise ValueError(
                f"a slab of {tuple(slab.shape)} after {self.z} slices, "
                f"expected (1, 3, at most {nz - self.z}, {ny}, {nx})"
            )
        if not math.isfinite(float(slab.sum())):  # one pass; a sum may also overflow
            self.statistics.non_finite += int((~slab.isfinite()).any(dim=1).sum())
        slices = [*self.tail, *slab[0].unbind(1)]
        first = self.z - len(self.tail)  # the z of slices[0]
        for i in range(len(self.tail) - 1 if self.tail else 0, len(slices) - 1):
            self._take(first + i, slices[i - 1] if i else None, slices[i], slices[i + 1])
        self.z += depth
        self.tail = [s.clone() for s in slices[-2:]]  # copies: a view would keep the caller's slab in memory

    @torch.no_grad()
    def finish(self) -> None:
        """Process the last slice."""
        if self.z != self.grid.shape[0]:
            raise ValueError(f"slabs of {self.z} slices in all, expected {self.grid.shape[0]}")
        self._take(self.z - 1, self.tail[-2] if self.z > 1 else None, self.tail[-1], None)

    def _take(self, z: int, below: Tensor | None, here: Tensor, above: Tensor | None) -> None:
        determinant = slice_determinant(below, here, above, self.grid)
        nx, ny, _ = self.grid.size
        self.statistics.add(determinant, self.lungs.at(z), self.grid.cropped((0, 0, z), (nx, ny, 1)))


def slice_determinant(
    below: Float[Tensor, "3 y x"] | None,
    here: Float[Tensor, "3 y x"],
    above: Float[Tensor, "3 y x"] | None,
    grid: Grid,
) -> Float[Tensor, "y x"]:
    """det(I + ∇u) on one slice ``here`` of a field (mm); None for a neighbour that lies outside the field.

    It is det(D + G) / det D, with D the grid's axes (mm per index step) and G the derivatives of u along the index
    axes. So the displacements need not be converted to voxels. The computation works on bands of rows that fit into the
    cache. It uses 2 D and 2 G, so the differences need not be halved.
    """
    _, ny, nx = here.shape
    rows = min(ny, max(1, _BAND_VOXELS // nx))
    work = here.new_empty(3, 3, rows, nx)
    minor = here.new_empty(rows, nx)
    determinant = here.new_empty(ny, nx)
    low, high = (here if below is None else below), (here if above is None else above)
    one_sided = (below is None) != (above is None)
    for start in range(0, ny, rows):
        stop = min(start + rows, ny)
        gx, gy, gz = work[:, :, : stop - start]
        _twice_derivative(here[:, start:stop], 2, 0, nx, gx)
        _twice_derivative(here, 1, start, stop, gy)
        torch.sub(high[:, start:stop], low[:, start:stop], out=gz)
        if one_sided:
            gz.mul_(2)
        _determinant(gx, gy, gz, 2 * grid.axes, minor[: stop - start], determinant[start:stop])
    return determinant


def _twice_derivative(values: Tensor, dim: int, start: int, stop: int, out: Tensor) -> None:
    """``values[i + 1] - values[i - 1]`` for i from start to stop; twice the one-sided difference at the borders."""
    n = values.shape[dim]
    if n == 1:
        out.zero_()
        return
    first, count = max(start, 1), min(stop, n - 1) - max(start, 1)
    if count > 0:
        inner = out.narrow(dim, first - start, count)
        torch.sub(values.narrow(dim, first + 1, count), values.narrow(dim, first - 1, count), out=inner)
    for border, here, low in ((start == 0, 0, 0), (stop == n, stop - start - 1, n - 2)):
        if border:
            edge = out.narrow(dim, here, 1)
            torch.sub(values.narrow(dim, low + 1, 1), values.narrow(dim, low, 1), out=edge)
            edge.mul_(2)


def _determinant(gx: Tensor, gy: Tensor, gz: Tensor, axes: np.ndarray, minor: Tensor, out: Tensor) -> None:
    """det(axes + G) / det(axes). G has the columns gx, gy, gz (3, y, x), which are overwritten."""
    for axis, column in enumerate((gx, gy, gz)):
        for component in range(3):
            if axes[component, axis] != 0:
                column[component].add_(float(axes[component, axis]))
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        torch.mul(gy[b], gz[c], out=minor)
        minor.addcmul_(gy[c], gz[b], value=-1)
        if a == 0:
            torch.mul(minor, gx[a], out=out)
        else:
            out.addcmul_(minor, gx[a])
    out.mul_(1 / float(np.linalg.det(axes)))


class _Lungs:
    """Slices of a lung mask on another grid. If the axes are parallel, one index per axis finds the nearest voxel."""

    def __init__(self, mask: Tensor, mask_grid: Grid, grid: Grid) -> None:
        self.mask, self.mask_grid, self.grid = mask, mask_grid, grid
        steps = np.linalg.inv(mask_grid.axes) @ grid.axes
        reach = np.abs(steps) * np.array(grid.size)
        self.along = [int(a) for a in reach.argmax(axis=0)]
        """For each axis of ``grid``, the axis of the mask."""
        rest = reach.copy()
        rest[self.along, range(3)] = 0
        self.parallel = sorted(self.along) == [0, 1, 2] and float(rest.max()) < 1e-3
        if not self.parallel:
            self.mask = mask.float()
        else:
            start = mask_grid.to_index(np.array(grid.origin))
            # the mask with its axes in the order of the grid's, still (z, y, x)
            self.mask = mask[0, 0].permute(*(2 - self.along[a] for a in (2, 1, 0)))
            self.index = [
                np.rint(start[b] + steps[b, a] * np.arange(grid.size[a])).astype(int) for a, b in enumerate(self.along)
            ]
            self.spans = [
                np.flatnonzero((index >= 0) & (index < mask_grid.size[b]))
                for index, b in zip(self.index, self.along, strict=True)
            ]

    def at(self, z: int) -> Bool[Tensor, "y x"] | None:
        """The lungs on one slice; None if the slice has no lung."""
        nx, ny, _ = self.grid.size
        if not self.parallel:
            part = self.grid.cropped((0, 0, z), (nx, ny, 1))
            mask = warp(self.mask, self.mask_grid, None, part, fill=0.0, nearest=True)[0, 0, 0] > 0.5
            return mask if bool(mask.any()) else None
        x, y, depth = self.spans
        k = int(self.index[2][z])
        if not len(x) or not len(y) or z not in depth or not bool(self.mask[k].any()):
            return None
        rows, columns = (torch.from_numpy(self.index[a][span]) for a, span in ((1, y), (0, x)))
        mask = torch.zeros(ny, nx, dtype=torch.bool)
        mask[y[0] : y[-1] + 1, x[0] : x[-1] + 1] = self.mask[k].index_select(0, rows).index_select(1, columns)
        return mask


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

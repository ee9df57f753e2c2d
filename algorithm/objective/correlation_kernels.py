"""Loops of `algorithm.objective.sampled_correlation`, compiled for the processor at hand when this module is imported.

Every kernel takes a list of runs, rows (z, y, first x, end x) of voxels, and works on the runs from ``first`` to
``end``. Several threads can work on parts of one list at the same time. Volumes are float32, (z, y, x); vectors are
(3, z, y, x) with components x, y, z. No run touches the border of its volume.
"""

import numpy as np

from ..loops import cell, compiled_loop, f4

VOLUME, VECTORS, RUNS = "f4[:,:,::1]", "f4[:,:,:,::1]", "i4[:,::1]"
WINDOW = 27
"""Voxels in a window of 3³."""


@compiled_loop()
def _between(volume, z, y, x, share_z, share_y, share_x):  # type: ignore[no-untyped-def]
    """Trilinear value in the cell that begins at voxel (z, y, x), and its derivatives along z, y and x."""
    v000, v001 = volume[z, y, x], volume[z, y, x + 1]
    v010, v011 = volume[z, y + 1, x], volume[z, y + 1, x + 1]
    v100, v101 = volume[z + 1, y, x], volume[z + 1, y, x + 1]
    v110, v111 = volume[z + 1, y + 1, x], volume[z + 1, y + 1, x + 1]
    v00, v01 = v000 + share_x * (v001 - v000), v010 + share_x * (v011 - v010)
    v10, v11 = v100 + share_x * (v101 - v100), v110 + share_x * (v111 - v110)
    v0, v1 = v00 + share_y * (v01 - v00), v10 + share_y * (v11 - v10)
    near = (v001 - v000) + share_y * ((v011 - v010) - (v001 - v000))
    far = (v101 - v100) + share_y * ((v111 - v110) - (v101 - v100))
    along_y = (v01 - v00) + share_z * ((v11 - v10) - (v01 - v00))
    return v0 + share_z * (v1 - v0), v1 - v0, along_y, near + share_z * (far - near)


@compiled_loop(f"void({VOLUME},{VECTORS},{RUNS},f8[:,::1],f8[::1],f8[:,::1],{VOLUME},{VECTORS},{VOLUME},i8,i8)")
def sample(
    moving: np.ndarray,
    control: np.ndarray,
    runs: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    steps: np.ndarray,
    warped: np.ndarray,
    slope: np.ndarray,
    seen: np.ndarray,
    first: int,
    end: int,
) -> None:
    """Set ``warped``, ``slope`` and ``seen`` at the voxels of the runs.

    ``warped`` is the moving image at matrix·(x, y, z) + offset + steps·u, ``slope`` is its gradient with respect to u,
    and ``seen`` is 1 in the moving field of view, else 0. u is trilinear between the ``control`` points, whose spacing
    is two voxels.
    """
    size_z, size_y, size_x = moving.shape
    for run in range(first, end):
        z, y, start, stop = runs[run]
        for x in range(start, stop):
            cz, cy, cx = (z - 1) // 2, (y - 1) // 2, (x - 1) // 2
            tz, ty, tx = f4(0.75 - 0.5 * (z % 2)), f4(0.75 - 0.5 * (y % 2)), f4(0.75 - 0.5 * (x % 2))
            ux = _between(control[0], cz, cy, cx, tz, ty, tx)[0]
            uy = _between(control[1], cz, cy, cx, tz, ty, tx)[0]
            uz = _between(control[2], cz, cy, cx, tz, ty, tx)[0]
            i = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + offset[0]
            j = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + offset[1]
            k = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + offset[2]
            i += steps[0, 0] * ux + steps[0, 1] * uy + steps[0, 2] * uz
            j += steps[1, 0] * ux + steps[1, 1] * uy + steps[1, 2] * uz
            k += steps[2, 0] * ux + steps[2, 1] * uy + steps[2, 2] * uz
            in_x, in_y, in_z = -0.5 <= i < size_x - 0.5, -0.5 <= j < size_y - 0.5, -0.5 <= k < size_z - 0.5
            seen[z, y, x] = in_x and in_y and in_z
            a, share_x, flat_x = cell(i, size_x)
            b, share_y, flat_y = cell(j, size_y)
            c, share_z, flat_z = cell(k, size_z)
            value, along_k, along_j, along_i = _between(moving, c, b, a, share_z, share_y, share_x)
            warped[z, y, x] = value
            gi, gj, gk = f4(0) if flat_x else along_i, f4(0) if flat_y else along_j, f4(0) if flat_z else along_k
            for axis in range(3):
                slope[axis, z, y, x] = gi * steps[0, axis] + gj * steps[1, axis] + gk * steps[2, axis]


@compiled_loop(f"void({VOLUME},{VOLUME},{VOLUME},{VOLUME},{VOLUME},{RUNS},f4,{VECTORS},f8[:,::1],i8,i8,i8)")
def correlate(
    warped: np.ndarray,
    fixed: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    seen: np.ndarray,
    runs: np.ndarray,
    floor: float,
    terms: np.ndarray,
    sums: np.ndarray,
    part: int,
    first: int,
    end: int,
) -> None:
    """Set ``sums[part]`` and ``terms``.

    ``sums[part]`` is the sum of 1 - cc over the ``seen`` voxels, and their number. ``terms`` is the contribution of
    each window to the gradient (see `algorithm.objective.local_correlation`). ``mean`` and ``variance`` are those of
    ``fixed``.
    """
    size = warped.shape[2]
    of_warped, of_square, of_product = (
        np.empty(size, np.float32),
        np.empty(size, np.float32),
        np.empty(size, np.float32),
    )
    total, number = 0.0, 0.0
    for run in range(first, end):
        z, y, start, stop = runs[run]
        of_warped[start - 1 : stop + 1] = 0
        of_square[start - 1 : stop + 1] = 0
        of_product[start - 1 : stop + 1] = 0
        for row_z in range(z - 1, z + 2):
            for row_y in range(y - 1, y + 2):
                for x in range(start - 1, stop + 1):
                    value = warped[row_z, row_y, x]
                    of_warped[x] += value
                    of_square[x] += value * value
                    of_product[x] += value * fixed[row_z, row_y, x]
        for x in range(start, stop):
            m = (of_warped[x - 1] + of_warped[x] + of_warped[x + 1]) / f4(WINDOW)
            square = (of_square[x - 1] + of_square[x] + of_square[x + 1]) / f4(WINDOW)
            product = (of_product[x - 1] + of_product[x] + of_product[x + 1]) / f4(WINDOW)
            spread = max(square - m * m, f4(0)) + floor
            covariance = product - mean[z, y, x] * m
            towards = covariance / ((variance[z, y, x] + floor) * spread)
            correlation = covariance * towards
            total += seen[z, y, x] * (f4(1) - correlation)
            number += seen[z, y, x]
            towards *= seen[z, y, x]
            against = correlation / spread * seen[z, y, x]
            terms[0, z, y, x] = towards
            terms[1, z, y, x] = against
            terms[2, z, y, x] = against * m - towards * mean[z, y, x]
    sums[part, 0], sums[part, 1] = total, number


@compiled_loop(f"void({VECTORS},{VOLUME},{VOLUME},{VECTORS},{RUNS},f4,i8,i8)")
def differentiate(
    terms: np.ndarray,
    fixed: np.ndarray,
    warped: np.ndarray,
    slope: np.ndarray,
    runs: np.ndarray,
    scale: float,
    first: int,
    end: int,
) -> None:
    """Turn ``slope`` from the gradient of the warped image into that of the sum over all windows, times ``scale``."""
    size = warped.shape[2]
    towards, against, rest = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for run in range(first, end):
        z, y, start, stop = runs[run]
        towards[start - 1 : stop + 1] = 0
        against[start - 1 : stop + 1] = 0
        rest[start - 1 : stop + 1] = 0
        for row_z in range(z - 1, z + 2):
            for row_y in range(y - 1, y + 2):
                for x in range(start - 1, stop + 1):
                    towards[x] += terms[0, row_z, row_y, x]
                    against[x] += terms[1, row_z, row_y, x]
                    rest[x] += terms[2, row_z, row_y, x]
        for x in range(start, stop):
            value = fixed[z, y, x] * (towards[x - 1] + towards[x] + towards[x + 1])
            value -= warped[z, y, x] * (against[x - 1] + against[x] + against[x + 1])
            value += rest[x - 1] + rest[x] + rest[x + 1]
            for axis in range(3):
                slope[axis, z, y, x] *= scale * value


@compiled_loop()
def _add_row(target, row, share, start, stop):  # type: ignore[no-untyped-def]
    """Add the share of one row of voxels to control points ``start`` to ``stop``.

    The outermost control points have only one neighbour.
    """
    last = len(target) - 1
    for x in range(max(start, 1), min(stop, last)):
        value = f4(0.25) * (row[2 * x - 1] + row[2 * x + 2]) + f4(0.75) * (row[2 * x] + row[2 * x + 1])
        target[x] += share * value
    if start == 0:
        target[0] += share * (f4(0.75) * row[1] + f4(0.25) * row[2])
    if stop == last + 1:
        target[last] += share * (f4(0.25) * row[2 * last - 1] + f4(0.75) * row[2 * last])


@compiled_loop(f"void({VECTORS},{VECTORS},{RUNS},i8,i8)")
def gather(fine: np.ndarray, control: np.ndarray, runs: np.ndarray, first: int, end: int) -> None:
    """The transpose of the doubling of the control points: ``control`` from ``fine``, which is 0 at its border.

    These are runs of control points; they may touch the border.
    """
    for run in range(first, end):
        z, y, start, stop = runs[run]
        for axis in range(3):
            target = control[axis, z, y]
            target[start:stop] = 0
            for row_z in range(max(2 * z - 1, 0), min(2 * z + 3, fine.shape[1])):
                for row_y in range(max(2 * y - 1, 0), min(2 * y + 3, fine.shape[2])):
                    share = f4(0.75 if row_z // 2 == z else 0.25) * f4(0.75 if row_y // 2 == y else 0.25)
                    _add_row(target, fine[axis, row_z, row_y], share, start, stop)

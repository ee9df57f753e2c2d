"""The loop of `.warping.warp` on the CPU: one pass that reads u on its own grid and writes only the result.

It works row by row, so that intermediate values stay in the processor's nearest cache. Each step can be vectorised: the
processor does it for several voxels at once.
"""

from typing import Any

import numpy as np

from ..loops import compiled_loop, f4, i4

VOLUMES, PLACES, SHARES = "f4[:,:,:,::1]", "i8[::1]", "f4[::1]"


@compiled_loop("void(f4[:,:,:,::1],i8,f4,i8,f4,f4[:,::1])")
def _between_rows(u: np.ndarray, z: int, share_z: float, y: int, share_y: float, row: np.ndarray) -> None:
    """Set ``row``, (3, xu): u interpolated between planes z and z + 1 and rows y and y + 1; the border is repeated."""
    _, size_z, size_y, size_x = u.shape
    z1, y1 = min(z + 1, size_z - 1), min(y + 1, size_y - 1)
    for c in range(3):
        for x in range(size_x):
            near = u[c, z, y, x] + share_y * (u[c, z, y1, x] - u[c, z, y, x])
            far = u[c, z1, y, x] + share_y * (u[c, z1, y1, x] - u[c, z1, y, x])
            row[c, x] = near + share_z * (far - near)


@compiled_loop("void(f4[:,::1],i8[::1],f4[::1],f4[:,::1])")
def _along_row(row: np.ndarray, places: np.ndarray, shares: np.ndarray, u: np.ndarray) -> None:
    """Set ``u``, (3, x): the values of ``row``, interpolated between the voxels ``places`` and the next ones."""
    last = row.shape[1] - 1
    for c in range(3):
        for x in range(u.shape[1]):
            here, there = places[x], min(places[x] + 1, last)
            u[c, x] = row[c, here] + shares[x] * (row[c, there] - row[c, here])


@compiled_loop("void(f4[:,::1],f4[::1],f4,f4,i8,i4[::1],i4[::1],f4[::1],b1[::1])")
def _cells(
    u: np.ndarray, step: np.ndarray, start: float, slope: float, size: int, before: np.ndarray, to_next: np.ndarray,
    share: np.ndarray, seen: np.ndarray,
) -> None:  # fmt: skip
    """Find the cells of the continuous indices start + slope·x + step·u along an axis.

    ``before`` becomes the voxel before the index, ``to_next`` the step to the next voxel (1, or 0 at the border), and
    ``share`` the weight of the next voxel. ``seen`` becomes False where the index lies more than half a voxel beyond
    the outermost centres. Such an index, and NaN, gets a border voxel: no index leads out of the volume.
    """
    last, rim = f4(size - 1), f4(size - 0.5)
    for x in range(u.shape[1]):
        index: Any = start + slope * f4(x) + step[0] * u[0, x] + step[1] * u[1, x] + step[2] * u[2, x]
        seen[x] = seen[x] and index >= f4(-0.5) and index < rim
        index = index if index > f4(0) else f4(0)
        index = index if index < last else last
        before[x] = i4(index)
        share[x] = index - f4(before[x])
        to_next[x] = i4(1) if f4(before[x]) < last else i4(0)


@compiled_loop("void(f4[::1],i8,i8,i4[:,::1],i4[:,::1],f4[:,::1],f4[::1])")
def _interpolated(
    volume: np.ndarray, row: int, plane: int, before: np.ndarray, to_next: np.ndarray, share: np.ndarray,
    values: np.ndarray,
) -> None:  # fmt: skip
    """Set ``values``: a flat volume with ``row`` voxels per row and ``plane`` per plane, interpolated in the cells."""
    wide, high = i4(row), i4(plane)
    for x in range(len(values)):
        at = before[2, x] * high + before[1, x] * wide + before[0, x]
        dx, dy, dz = to_next[0, x], to_next[1, x] * wide, to_next[2, x] * high
        v00 = volume[at] + share[0, x] * (volume[at + dx] - volume[at])
        v01 = volume[at + dy] + share[0, x] * (volume[at + dy + dx] - volume[at + dy])
        v10 = volume[at + dz] + share[0, x] * (volume[at + dz + dx] - volume[at + dz])
        v11 = volume[at + dz + dy] + share[0, x] * (volume[at + dz + dy + dx] - volume[at + dz + dy])
        v0, v1 = v00 + share[1, x] * (v01 - v00), v10 + share[1, x] * (v11 - v10)
        values[x] = v0 + share[2, x] * (v1 - v0)


@compiled_loop(
    f"void({VOLUMES},{VOLUMES},{PLACES},{SHARES},{PLACES},{SHARES},{PLACES},{SHARES},"
    f"f8[:,::1],f8[::1],f8[:,::1],b1,f4,{VOLUMES},i8,i8)"
)
def warp_rows(
    volume: np.ndarray,
    u: np.ndarray,
    u_z: np.ndarray,
    share_z: np.ndarray,
    u_y: np.ndarray,
    share_y: np.ndarray,
    u_x: np.ndarray,
    share_x: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    steps: np.ndarray,
    filled: bool,
    fill: float,
    warped: np.ndarray,
    first: int,
    end: int,
) -> None:
    """Set the rows from ``first`` to ``end`` of ``warped`` (c, z, y, x).

    They are ``volume`` (c, zv, yv, xv) at the continuous indices matrix·(x, y, z) + offset + steps·u, trilinear. With
    ``filled``, the value is ``fill`` more than half a voxel outside. Along each axis, ``u`` (3, zu, yu, xu) is
    interpolated between the voxel ``u_`` and the next one, with the weight ``share`` for the next. A volume must have
    less than 2^31 voxels.
    """
    channels, size_z, size_y, size_x = volume.shape
    sizes, flat, step = (size_x, size_y, size_z), volume.reshape(channels, -1), steps.astype(np.float32)
    _, _, ny, nx = warped.shape
    row, there = np.empty((3, u.shape[3]), np.float32), np.empty((3, nx), np.float32)
    before, to_next = np.empty((3, nx), np.int32), np.empty((3, nx), np.int32)
    share, seen = np.empty((3, nx), np.float32), np.empty(nx, np.bool_)
    for number in range(first, end):
        z, y = number // ny, number % ny
        _between_rows(u, u_z[z], share_z[z], u_y[y], share_y[y], row)
        _along_row(row, u_x, share_x, there)
        seen[:] = True
        for d in range(3):
            start = f4(matrix[d, 1] * y + matrix[d, 2] * z + offset[d])
            _cells(there, step[d], start, f4(matrix[d, 0]), sizes[d], before[d], to_next[d], share[d], seen)
        for c in range(channels):
            values = warped[c, z, y]
            _interpolated(flat[c], size_x, size_x * size_y, before, to_next, share, values)
            if filled:
                for x in range(nx):
                    values[x] = values[x] if seen[x] else f4(fill)

"""The loop of `.warping.warp` on the CPU: one pass that reads u where it lies, and writes nothing but the result."""

import numpy as np

from ..loops import compiled_loop, f4

VOLUMES, PLACES, SHARES = "f4[:,:,:,::1]", "i8[::1]", "f4[::1]"


@compiled_loop()
def _cell(index, size):  # type: ignore[no-untyped-def]
    """Of a continuous index: the voxels before and behind it, and the share of the second. Beyond the outermost voxel
    centres, and for NaN, a border voxel."""
    inner = index if index > 0.0 else 0.0
    inner = inner if inner < size - 1.0 else size - 1.0
    first = int(inner)
    return first, min(first + 1, size - 1), f4(inner - first)


@compiled_loop()
def _row(u, z, z_share, y, y_share, row):  # type: ignore[no-untyped-def]
    """``row``, (3, x): u between the planes z and z + 1 and the rows y and y + 1, where there are such."""
    _, size_z, size_y, size_x = u.shape
    z1, y1 = min(z + 1, size_z - 1), min(y + 1, size_y - 1)
    for c in range(3):
        for x in range(size_x):
            near = u[c, z, y, x] + y_share * (u[c, z, y1, x] - u[c, z, y, x])
            far = u[c, z1, y, x] + y_share * (u[c, z1, y1, x] - u[c, z1, y, x])
            row[c, x] = near + z_share * (far - near)


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
    """``warped`` (c, z, y, x), its rows from ``first`` to ``end``: ``volume`` (c, zv, yv, xv) at the continuous indices
    matrix·(x, y, z) + offset + steps·u, trilinear; where ``filled``, ``fill`` farther out than half a voxel.

    Along each axis ``u`` (3, zu, yu, xu) is taken ``share`` of the way from the voxel ``u_`` to the next.
    """
    channels, size_z, size_y, size_x = volume.shape
    _, _, ny, nx = warped.shape
    row = np.empty((3, u.shape[3]), np.float32)
    last = u.shape[3] - 1
    for number in range(first, end):
        z, y = number // ny, number % ny
        _row(u, u_z[z], share_z[z], u_y[y], share_y[y], row)
        for x in range(nx):
            a, b, share = u_x[x], min(u_x[x] + 1, last), share_x[x]
            ux = row[0, a] + share * (row[0, b] - row[0, a])
            uy = row[1, a] + share * (row[1, b] - row[1, a])
            uz = row[2, a] + share * (row[2, b] - row[2, a])
            i = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + offset[0]
            j = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + offset[1]
            k = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + offset[2]
            i += steps[0, 0] * ux + steps[0, 1] * uy + steps[0, 2] * uz
            j += steps[1, 0] * ux + steps[1, 1] * uy + steps[1, 2] * uz
            k += steps[2, 0] * ux + steps[2, 1] * uy + steps[2, 2] * uz
            if filled and not (-0.5 <= i < size_x - 0.5 and -0.5 <= j < size_y - 0.5 and -0.5 <= k < size_z - 0.5):
                for c in range(channels):
                    warped[c, z, y, x] = fill
                continue
            i0, i1, si = _cell(i, size_x)
            j0, j1, sj = _cell(j, size_y)
            k0, k1, sk = _cell(k, size_z)
            for c in range(channels):
                v = volume[c]
                v00 = v[k0, j0, i0] + si * (v[k0, j0, i1] - v[k0, j0, i0])
                v01 = v[k0, j1, i0] + si * (v[k0, j1, i1] - v[k0, j1, i0])
                v10 = v[k1, j0, i0] + si * (v[k1, j0, i1] - v[k1, j0, i0])
                v11 = v[k1, j1, i0] + si * (v[k1, j1, i1] - v[k1, j1, i0])
                v0, v1 = v00 + sj * (v01 - v00), v10 + sj * (v11 - v10)
                warped[c, z, y, x] = v0 + sk * (v1 - v0)

"""Small volumes inside a page: NIfTI, one byte per voxel, gzip, base64."""

import base64
import gzip
import struct

import numpy as np
from jaxtyping import Float, UInt8

HEADER_BYTES = 352
"""Size of a NIfTI-1 header in one file with its voxels, and of the four bytes that say that there is no extension."""
MILLIMETRES = 2


def nifti(
    voxels: UInt8[np.ndarray, "z y x"],
    axes: Float[np.ndarray, "3 3"],
    origin: Float[np.ndarray, " 3"],
) -> bytes:
    """A NIfTI-1 file. ``axes`` are the world steps (mm) of the indices x, y, z as columns, LPS like ``origin``.

    NIfTI's world coordinates are RAS: x and y change their sign. Volumes whose axes lie near LPS are stored backwards
    along x and y, so that a viewer shows them in the right orientation.
    """
    flipped = voxels[:, ::-1, ::-1]
    size = voxels.shape[::-1]
    start = origin + axes @ np.array([size[0] - 1, size[1] - 1, 0], float)
    to_ras = np.diag([-1.0, -1.0, 1.0])
    rows = np.column_stack([to_ras @ axes @ np.diag([-1.0, -1.0, 1.0]), to_ras @ start])
    spacing = np.linalg.norm(axes, axis=0)
    return _header(size, spacing, rows) + np.ascontiguousarray(flipped).tobytes()


def _header(size: tuple[int, ...], spacing: np.ndarray, rows: np.ndarray) -> bytes:
    header = bytearray(HEADER_BYTES)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *size, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 2, 8)  # unsigned bytes
    struct.pack_into("<8f", header, 76, 1.0, *spacing.tolist(), 0.0, 0.0, 0.0, 0.0)
    struct.pack_into("<3f", header, 108, HEADER_BYTES, 1.0, 0.0)  # start of the voxels; values are not rescaled
    struct.pack_into("<B", header, 123, MILLIMETRES)
    struct.pack_into("<2h", header, 252, 0, 1)  # no quaternion; the rows, in scanner coordinates
    struct.pack_into("<12f", header, 280, *rows.ravel().tolist())
    struct.pack_into("<4s", header, 344, b"n+1\0")
    return bytes(header)


def packed(content: bytes) -> str:
    """Gzip in base64; the same content gives the same text."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()

"""How an image is stored, by the ending of its name: the header, then the values, slab by slab.

.mha      MetaImage: a header in text, then the values; the components of a voxel lie side by side
.nrrd     the same with another header
.nii.gz   NIfTI-1, compressed. A field is what the standard calls displacement vectors (intent 1006): five axes, mm
          along **RAS**, one component after the other. SimpleITK turns them to LPS when it reads them.

A comment in the first bytes names the program that wrote the file. Programs that change an image write their own
header. ITK, pynrrd and nibabel ignore the comment. In .nii.gz it belongs to the compression and is not part of the
image.
"""

import struct
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..geometry import Grid
from ..threads import Pool

Layout = Literal["itk", "grand-challenge"]
"""How a field file holds its three components: as vectors in 3-D, or as a fourth axis of a scalar image."""
ENDINGS = {".mha": ".mha", ".mhd": ".mha", ".nii.gz": ".nii.gz", ".nii": ".nii.gz", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}
"""The format written for users whose files have these endings; always as one file."""
RAS = (-1.0, -1.0, 1.0)
"""Factors that turn components along LPS into components along RAS, and back."""
_TYPES = {
    torch.float32: ("MET_FLOAT", "float", np.float32),
    torch.int16: ("MET_SHORT", "short", np.int16),
    torch.uint8: ("MET_UCHAR", "uchar", np.uint8),
}
_NIFTI_START = 352
"""Length of the header and of the four bytes that say that no extension follows."""


def kind_of(path: Path) -> str:
    """The ending of an image's name; ValueError for endings that cannot be written."""
    found = next((kind for kind in set(ENDINGS.values()) if path.name.endswith(kind)), None)
    if found is None:
        raise ValueError(f"{path}: is no name for an image, expected one that ends in {', '.join(ENDINGS.values())}")
    return found


def beginning(path: Path, comment: str) -> bytes | None:
    """The first bytes of an image written under this name with a ``comment``; None for other names."""
    text = comment.encode()
    starts = {
        ".mha": b"ObjectType = Image\nComment = " + text + b"\nNDims = ",
        ".nrrd": b"NRRD0004\n# " + text + b"\ntype: ",
        ".nii.gz": _gzip_header(comment),
    }
    return next((start for kind, start in starts.items() if path.name.endswith(kind)), None)


def header(kind: str, grid: Grid, dtype: torch.dtype, layout: Layout | None = None, comment: str = "") -> bytes:
    """The header before the values, for a field in its ``layout`` (None: a scalar image); for .nii.gz before
    compression. ValueError for types that are not supported, and for grand-challenge's layout in formats other than
    .mha."""
    if dtype not in _TYPES:
        raise ValueError(f"voxels of {dtype}, expected one of {', '.join(map(str, _TYPES))}")
    if layout == "grand-challenge" and kind != ".mha":
        raise ValueError(f"a field in grand-challenge's layout as {kind}, expected .mha")
    if kind == ".nrrd":
        return _nrrd_header(grid, _TYPES[dtype][1], layout is not None, comment)
    if kind == ".nii.gz":
        return _nifti_header(grid, _TYPES[dtype][2], layout is not None)
    return _meta_header(grid, _TYPES[dtype][0], layout, comment)


def _meta_header(grid: Grid, element: str, layout: Layout | None, comment: str) -> bytes:
    """TransformMatrix lists the world direction of each index axis, one after the other: the columns of D."""
    size, spacing, origin, direction = list(grid.size), list(grid.spacing), list(grid.origin), np.array(grid.direction)
    if layout == "grand-challenge":
        size, spacing, origin = [*size, 3], [*spacing, 1.0], [*origin, 0.0]
        direction = np.pad(direction, (0, 1))
        direction[3, 3] = 1
    lines = {
        "ObjectType": "Image",
        **({"Comment": comment} if comment else {}),
        "NDims": len(size),
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": False,
        "TransformMatrix": _numbers(direction.T.ravel()),
        "Offset": _numbers(origin),
        "ElementSpacing": _numbers(spacing),
        "DimSize": " ".join(map(str, size)),
        **({"ElementNumberOfChannels": 3} if layout == "itk" else {}),
        "ElementType": element,
        "ElementDataFile": "LOCAL",
    }
    return "".join(f"{key} = {value}\n" for key, value in lines.items()).encode()


def _nrrd_header(grid: Grid, element: str, vectors: bool, comment: str) -> bytes:
    """The component axis comes first because it is the fastest."""
    axes = [f"({_numbers(column, ',')})" for column in grid.axes.T]
    lines = {
        "type": element,
        "dimension": 4 if vectors else 3,
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, ((3, *grid.size) if vectors else grid.size))),
        "space directions": " ".join(["none", *axes] if vectors else axes),
        "kinds": " ".join(["vector"] * vectors + ["domain"] * 3),
        "endian": "little",
        "encoding": "raw",
        "space origin": f"({_numbers(grid.origin, ',')})",
    }
    first = f"NRRD0004\n# {comment}\n" if comment else "NRRD0004\n"
    return (first + "".join(f"{key}: {value}\n" for key, value in lines.items()) + "\n").encode()


def _nifti_header(grid: Grid, dtype: type, vectors: bool) -> bytes:
    from nibabel.nifti1 import Nifti1Header  # here: most runs do not need it

    head: Any = Nifti1Header(endianness="<")
    affine = np.diag([*RAS, 1.0]) @ np.block([[grid.axes, np.array(grid.origin)[:, None]], [np.eye(4)[3:]]])
    head.set_data_dtype(dtype)
    head.set_data_shape((*grid.size, 1, 3) if vectors else grid.size)
    head.set_qform(affine, "scanner")
    head.set_sform(affine, "scanner")
    head.set_xyzt_units("mm")
    head.set_slope_inter(1, 0)
    if vectors:
        head.set_intent("displacement vector")
    head["vox_offset"] = _NIFTI_START
    block: bytes = head.binaryblock
    return block.ljust(_NIFTI_START, b"\0")


def _numbers(values: Iterable[float], between: str = " ") -> str:
    """Shortest decimal forms that read back as the same float64."""
    return between.join(repr(float(v)) for v in values)


# --- compression -----------------------------------------------------------------------------------------------------


def gzipped(pieces: Iterable[Any], comment: str = "") -> Iterator[bytes]:
    """One gzip stream of pieces (bytes-like, some MB each), compressed with one thread per processor. About as many
    pieces as threads are in memory at a time. The bytes depend only on the pieces."""
    yield _gzip_header(comment)
    checksum, length, threads = 0, 0, torch.get_num_threads()
    waiting: deque[Any] = deque()
    with Pool(threads) as pool:
        for piece in pieces:
            checksum, length = zlib.crc32(piece, checksum), length + memoryview(piece).nbytes
            waiting.append(pool.submit(_deflated, piece))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()
    yield zlib.compressobj(wbits=-zlib.MAX_WBITS).flush()  # an empty last block
    yield struct.pack("<2L", checksum, length % 2**32)


def _deflated(piece: Any) -> bytes:
    """A part of a deflate stream that ends at a whole byte, after which any other part may follow."""
    compressor = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    return compressor.compress(piece) + compressor.flush(zlib.Z_SYNC_FLUSH)


def _gzip_header(comment: str) -> bytes:
    """A header without a time, so that the same image has the same bytes."""
    flags = 0x10 if comment else 0
    return (
        b"\x1f\x8b\x08" + bytes([flags, 0, 0, 0, 0, 4, 255]) + (comment.encode("latin-1") + b"\0" if comment else b"")
    )

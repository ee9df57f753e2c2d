"""Writes images and fields slab by slab. A file is written completely or not at all.

`.formats` gives the header; raw little-endian slabs follow. SimpleITK cannot write slab by slab, and a full-size field
(512 × 512 × 974 × 3 float32) is 3 GB.
"""

import itertools
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from ..geometry import Grid
from .formats import RAS, gzipped, header, kind_of
from .formats import Layout as Layout

PARTIAL = ".{}.partial"
"""Name of a file that is being written."""
BLOCK_BYTES = 2**22
"""Size of the blocks in which written data is read again, where that is necessary."""


def write_image(path: Path, voxels: Shaped[Tensor, "1 1 z y x"], grid: Grid) -> None:
    """A float32, int16 or uint8 volume; formats and errors as in `write_image_slabs`."""
    write_image_slabs(path, grid, [voxels], voxels.dtype)


def write_image_slabs(
    path: Path, grid: Grid, slabs: Iterable[Shaped[Tensor, "1 1 d y x"]], dtype: torch.dtype, comment: str = ""
) -> None:
    """As `write_image`, from slabs along z, in order. Each slab is written as it arrives; slabs may differ in
    thickness.

    The name decides the format: .mha or .nrrd (both uncompressed), or .nii.gz. All or nothing, see `atomically`.
    ValueError when the slabs are not of ``dtype`` or do not fill the grid. The file begins with a ``comment``, which
    readers ignore.
    """
    kind = kind_of(path)
    values = (_raw(slab) for _, slab in _counted(slabs, grid, 1, dtype))
    pieces: Iterator[Any] = itertools.chain([header(kind, grid, dtype, comment=comment)], values)
    with atomically(path) as file:
        file.writelines(gzipped(pieces, comment) if kind == ".nii.gz" else pieces)


def write_field(
    path: Path, grid: Grid, slabs: Iterable[Float32[Tensor, "1 3 d y x"]], layout: Layout, comment: str = ""
) -> None:
    """A displacement field (mm, LPS) in float32, from slabs as in `write_image_slabs`, in the form given in `.formats`.

    NIfTI stores one component after the other, compressed. During writing, a nameless temporary file beside it holds
    the whole field, so that only one slab is in memory.
    """
    kind = kind_of(path)
    head = header(kind, grid, torch.float32, layout, comment)
    counted = _counted(slabs, grid, 3, torch.float32)
    with atomically(path) as file:
        if layout == "grand-challenge":
            _write_components(file, head, grid, counted)
        elif kind == ".nii.gz":
            with tempfile.TemporaryFile(dir=path.parent) as whole:
                _write_components(whole, head, grid, counted, RAS)
                whole.seek(0)
                file.writelines(gzipped(iter(lambda: whole.read(BLOCK_BYTES), b""), comment))
        else:
            file.write(head)
            for _, slab in counted:
                file.write(_raw(torch.stack(slab[0].unbind(), dim=-1)))  # five times faster than permute


def _write_components(
    file: BinaryIO | IO[bytes], head: bytes, grid: Grid, slabs: Iterator[tuple[int, Tensor]],
    signs: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:  # fmt: skip
    """Write the components one after the other, each multiplied by its sign."""
    row_bytes = 4 * grid.size[0] * grid.size[1]
    file.write(head)
    for z, slab in slabs:
        for component, sign in enumerate(signs):
            file.seek(len(head) + (component * grid.size[2] + z) * row_bytes)
            file.write(_raw(slab[0, component] if sign == 1 else sign * slab[0, component]))


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It becomes ``path`` only when the body ends without an error; until then ``path`` does not
    change.

    It is written under a hidden name in the same folder and flushed to the disk before it is renamed. OSError that
    names ``path`` when the disk is full or the folder cannot be written.
    """
    partial = path.with_name(PARTIAL.format(uuid.uuid4().hex))
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _counted(slabs: Iterable[Tensor], grid: Grid, channels: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Each slab with the z index at which it starts; ValueError unless they fill the grid exactly."""
    z, (nz, ny, nx) = 0, grid.shape
    for slab in slabs:
        rows = slab.shape[2]
        if slab.dtype != dtype or tuple(slab.shape) != (1, channels, rows, ny, nx) or z + rows > nz:
            raise ValueError(
                f"a slab of {tuple(slab.shape)} {slab.dtype} after {z} rows, "
                f"expected (1, {channels}, at most {nz - z}, {ny}, {nx}) {dtype}"
            )
        yield z, slab
        z += rows
    if z != nz:
        raise ValueError(f"slabs of {z} rows in all, expected {nz}")


def _raw(slab: Tensor) -> memoryview:
    array = slab.detach().cpu().numpy()
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data

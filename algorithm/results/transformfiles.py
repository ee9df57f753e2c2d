"""`transform.h5` and `inverse.h5`: transforms in ITK's HDF5 format, which ANTs and 3D Slicer read as well.

Both are composites of an affine map and displacement fields; ITK applies the last part of a composite first. The lungs
of the scan whose points are mapped, and the expected error, lie beside the group of the transform; other programs
ignore them. They are written by h5py and not by SimpleITK, which does not compress, stores double precision, and
records the operating system.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ..errors import InputError
from ..fields.expected_error import ExpectedError
from ..fields.inverse import Inverse
from ..fields.newton import Displacement
from ..fields.transform import Transform
from ..files.writing import atomically
from ..geometry import Affine, Grid
from ..lungs import LungMask
from ..threads import Pool
from .ownership import TRANSFORM_MARK, transform_mark

STEP_MM = 2.0**-13
"""Displacements are rounded to multiples of this (0.0001 mm). The lost digits are noise, which cannot be compressed."""
CHUNK = 2**18
"""Number of values that are compressed together, 1 MB."""
_COMPOSITE = "CompositeTransform_double_3_3"
_AFFINE = "AffineTransform_double_3_3"
_LUNGS, _ERROR, _GRID = "LungMask", "ExpectedError", "Grid"
_FIELD = "DisplacementFieldTransform_double_3_3"


def write_transform(
    path: Path, transform: Transform, fixed_lungs: LungMask, expected: ExpectedError | None = None
) -> None:
    """Write x ↦ affine(x + u(x)), completely or not at all; OSError as in `atomically`."""
    _write(path, [transform.affine, (transform.displacement, transform.grid)], fixed_lungs, expected)


def write_inverse(path: Path, inverse: Inverse, moving_lungs: LungMask) -> None:
    """Write the inverse: first the affine map, then e, v and p; completely or not at all."""
    _write(path, [inverse.edges, inverse.rough, inverse.rest, inverse.affine], moving_lungs)


def _write(
    path: Path, parts: list[Affine | Displacement], lungs: LungMask, expected: ExpectedError | None = None
) -> None:
    """The part that is applied first comes last."""
    content = BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs[TRANSFORM_MARK] = np.bytes_(transform_mark(path))
        group = file.create_group("TransformGroup")
        _named(group, 0, _COMPOSITE)
        for number, part in enumerate(parts, start=1):
            if isinstance(part, Affine):
                _write_affine(_named(group, number, _AFFINE), part)
            else:
                _write_field(_named(group, number, _FIELD), *part)
        _write_volume(file, _LUNGS, lungs.mask[0, 0].to(torch.uint8), lungs.grid)
        if expected is not None:
            _write_volume(file, _ERROR, expected.at(expected.grid)[0, 0], expected.grid)
    with atomically(path) as out:
        out.write(content.getbuffer())


def _write_volume(file: h5py.File, name: str, values: torch.Tensor, grid: Grid) -> None:
    dataset = file.create_dataset(name, data=values.numpy(), chunks=True, compression="gzip", compression_opts=1)
    dataset.attrs[_GRID] = _grid_numbers(grid)


def _named(group: h5py.Group, number: int, kind: str) -> h5py.Group:
    part = group.create_group(str(number))
    part.create_dataset("TransformType", data=np.array([kind], dtype=object), dtype=h5py.string_dtype("ascii"))
    return part


def _write_affine(part: h5py.Group, affine: Affine) -> None:
    """Write the centre of the rotation, which is the origin, the matrix and the offset."""
    part.create_dataset("TransformFixedParameters", data=np.zeros(3))
    part.create_dataset("TransformParameters", data=np.array([*np.ravel(affine.matrix), *affine.offset]))


def _write_field(part: h5py.Group, displacement: torch.Tensor, grid: Grid) -> None:
    """Write size, origin, spacing and direction, then the vectors; x is the fastest axis."""
    vectors = torch.stack(displacement[0].unbind(), dim=-1).flatten()
    vectors = (vectors / STEP_MM).round_().mul_(STEP_MM)
    part.create_dataset("TransformFixedParameters", data=_grid_numbers(grid))
    _write_compressed(part, "TransformParameters", vectors.numpy())


def _write_compressed(part: h5py.Group, name: str, values: np.ndarray) -> None:
    """Compress as HDF5 itself does (the bytes of a chunk sorted by their place in the numbers, then deflated), but with
    one thread per processor."""
    chunk = min(CHUNK, len(values))
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    dataset = part.create_dataset(name, values.shape, "<f4", chunks=(chunk,), **options)

    def compressed(start: int) -> bytes:
        whole = np.zeros(chunk, "<f4")
        whole[: len(values) - start] = values[start : start + chunk]
        packed = zlib.compressobj(1, strategy=zlib.Z_RLE)  # only single bytes repeat: half the time, 1.1 times the size
        return packed.compress(whole.view(np.uint8).reshape(-1, 4).T.tobytes()) + packed.flush()

    starts = range(0, len(values), chunk)
    with Pool(torch.get_num_threads()) as pool:
        for start, data in zip(starts, pool.map(compressed, starts), strict=True):
            dataset.id.write_direct_chunk((start,), data)


def _grid_numbers(grid: Grid) -> np.ndarray:
    return np.array([*grid.size, *grid.origin, *grid.spacing, *np.ravel(grid.direction)], dtype=np.float64)


def read_transform(path: Path) -> Transform:
    """The transform that `write_transform` wrote; InputError when the file is missing or has other content."""
    affine, (displacement, grid) = _read(path, (_AFFINE, _FIELD))
    return Transform(displacement, grid, affine)


def read_inverse(path: Path) -> Inverse:
    """The inverse that `write_inverse` wrote; InputError when the file is missing or has other content."""
    return Inverse(*_read(path, (_FIELD, _FIELD, _FIELD, _AFFINE)))


def read_lungs(path: Path) -> LungMask:
    """The lungs that were written with a transform; InputError as in `read_transform`."""
    with _opened(path) as file:
        dataset = file[_LUNGS]
        return LungMask(torch.from_numpy(dataset[()] > 0)[None, None], _read_grid(dataset.attrs[_GRID]))


def read_expected_error(path: Path) -> ExpectedError | None:
    """The expected error that was written with a transform, None without one; InputError as in `read_transform`."""
    with _opened(path) as file:
        if _ERROR not in file:
            return None
        values = torch.from_numpy(file[_ERROR][()])[None, None]
        return ExpectedError.from_image(values, _read_grid(file[_ERROR].attrs[_GRID]))


def _read(path: Path, kinds: tuple[str, ...]) -> list[Any]:
    """The parts of the transform; InputError unless they have these kinds."""
    with _opened(path) as file:
        group = file["TransformGroup"]
        found = tuple(group[str(n)]["TransformType"][0].decode() for n in range(len(group)))
        if found != (_COMPOSITE, *kinds):
            raise InputError(f"{path}: holds {', '.join(found)}, expected {', '.join((_COMPOSITE, *kinds))}")
        parts = [group[str(number)] for number in range(1, len(group))]
        read = {_AFFINE: _read_affine, _FIELD: _read_field}
        return [read[kind](part) for kind, part in zip(kinds, parts, strict=True)]


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """The opened file; every problem with it is an InputError."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except InputError:
        raise
    except (OSError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a transform ({error}), expected that of a result") from error


def _read_affine(part: h5py.Group) -> Affine:
    numbers = part["TransformParameters"][()]
    return Affine.from_arrays(numbers[:9].reshape(3, 3), numbers[9:12])


def _read_field(part: h5py.Group) -> Displacement:
    grid = _read_grid(part["TransformFixedParameters"][()])
    vectors = torch.from_numpy(part["TransformParameters"][()].astype(np.float32)).reshape(*grid.shape, 3)
    return torch.stack(vectors.unbind(dim=-1))[None], grid


def _read_grid(numbers: np.ndarray) -> Grid:
    nx, ny, nz = numbers[:3].astype(int).tolist()
    x, y, z, sx, sy, sz = numbers[3:9].tolist()
    a, b, c = ((float(r[0]), float(r[1]), float(r[2])) for r in numbers[9:18].reshape(3, 3))
    return Grid((nx, ny, nz), (sx, sy, sz), (x, y, z), (a, b, c))

"""Reads the voxels of an image file: exactly the bytes that the header promises, each of them once."""

import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped

from imagefiles.opened import stored_in
from imagefiles.stored import FileError, Stored, no_header

BLOCK = 2**20
GZIP = b"\x1f\x8b"
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS
MOST_DEFLATED = 1032
"""Maximum number of bytes that one byte of a zlib stream can become."""


def read_voxels(path: Path, reader: sitk.ImageFileReader) -> Shaped[np.ndarray, "..."]:
    """The values of a file that `open_image` opened: axes in reverse order, as (z, y, x); several components last.

    FileError unless the file holds exactly as many bytes as its header promises, and the checksum, if any, is right. No
    more than that is decompressed. MemoryError if the memory is too small for the voxels.
    """
    stored = stored_in(path)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    dtype = stored.dtype or sitk.GetArrayViewFromImage(sitk.Image(1, 1, reader.GetPixelIDValue())).dtype
    if math.prod(size) * components != stored.count or stored.count < 1:
        raise no_header(path, f"{stored.count} values or {size} of {components}")
    shape, place = list(size[::-1]), 0
    if components > 1:
        place = len(size) - stored.component_axis if stored.component_axis >= 0 else 0
        shape.insert(place, components)
    values = (_from_text if stored.encoding in ("text", "hex") else _from_bytes)(stored, shape, dtype)
    if stored.slope != 1 or stored.intercept != 0:
        values = _rescaled(values, stored)
    if components == 3 and stored.flipped:
        first_two = np.moveaxis(values, place, -1)[..., :2]
        np.negative(first_two, out=first_two)
    return np.moveaxis(values, place, -1) if components > 1 else values


def _from_bytes(stored: Stored, shape: list[int], dtype: np.dtype) -> np.ndarray:
    promised, there = math.prod(shape) * dtype.itemsize, [path.stat().st_size for path in stored.files]
    part = promised // max(len(there), 1)
    if not there or promised % len(there):
        raise FileError(f"it names {len(there)} data files, expected a number that divides {promised} bytes")
    for path, length in zip(stored.files, there, strict=True):
        _check_length(path, stored, length, part)
    values = np.empty(shape, dtype)
    target = values.reshape(-1).data.cast("B")
    for number, (path, length) in enumerate(zip(stored.files, there, strict=True)):
        with path.open("rb") as file:
            _fill(target[number * part : (number + 1) * part], file, stored, length)
    if stored.big_endian:
        values.byteswap(inplace=True)
    return values


def _check_length(path: Path, stored: Stored, length: int, part: int) -> None:
    """FileError if the length of the file alone shows an error; this check needs no memory for voxels."""
    if stored.encoding == "raw":
        expected = part + (length - part if stored.start is None else stored.start)
        if length < expected or length < part:
            raise _cut(path, length, max(part, expected))
        if length > expected:
            raise FileError(f"{path.name} has {length} bytes where its header promises {expected}, expected just those")
        return
    if part > MOST_DEFLATED * max(0, length - stored.skipped):
        raise FileError(f"{path.name} is cut short: its {length} bytes cannot hold {part}, expected a whole file")


def _cut(path: Path, length: int, expected: int) -> FileError:
    return FileError(f"{path.name} is cut short at {length} of {expected} bytes, expected a whole file")


def _fill(target: memoryview, file: BinaryIO, stored: Stored, length: int) -> None:
    name, start = Path(file.name), stored.start
    if stored.encoding == "raw":
        file.seek(length - len(target) if start is None else start)
        count = file.readinto(target)  # type: ignore[attr-defined]
    else:
        file.seek(stored.skipped)
        try:
            count = _inflate(name, file, target, start or 0)
        except (zlib.error, EOFError) as error:
            raise FileError(f"its compressed voxels are damaged ({error}), expected a whole file") from error
        if stored.compressed_bytes not in (None, length - stored.skipped):
            raise FileError(
                f"its header promises {stored.compressed_bytes} compressed bytes, {name.name} has "
                f"{length - stored.skipped}, expected just those"
            )
    if count < len(target):
        raise _cut(name, count + (start or 0), len(target) + (start or 0))


def _inflate(name: Path, file: BinaryIO, target: memoryview, before: int) -> int:
    """Fill the target from a stream without its first ``before`` bytes; returns the number of bytes filled.

    zlib.error or EOFError unless the stream is complete and undamaged; FileError if it is longer than the target.
    """
    inflater, filled = zlib.decompressobj(wbits=ZLIB_OR_GZIP), -before
    while block := file.read(BLOCK):
        while block:
            if inflater.eof:  # gzip files may be concatenated
                if not GZIP.startswith(block[:2]):
                    raise zlib.error(f"{len(block)} or more bytes after its end")
                inflater = zlib.decompressobj(wbits=ZLIB_OR_GZIP)
            piece = inflater.decompress(block, 4 * BLOCK)
            block = inflater.unconsumed_tail or inflater.unused_data
            filled = _put(name, piece, target, filled)
    filled = _put(name, inflater.flush(), target, filled)
    if not inflater.eof:
        raise EOFError("the stream ends early")
    return max(filled, 0)


def _put(name: Path, piece: bytes, target: memoryview, filled: int) -> int:
    """Copy the piece to position ``filled``; negative positions are bytes before the voxels. Returns the new
    position."""
    if filled + len(piece) > len(target):
        raise FileError(f"{name.name} holds more than the {len(target)} bytes of its header, expected just those")
    if filled + len(piece) > 0:
        kept = memoryview(piece)[max(0, -filled) :]
        target[max(filled, 0) : filled + len(piece)] = kept
    return filled + len(piece)


def _from_text(stored: Stored, shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Values from plain text, or from hexadecimal digits; such files are rare and small."""
    text = b"".join(path.read_bytes()[stored.skipped :] for path in stored.files)
    try:
        if stored.encoding == "hex":
            values = np.frombuffer(bytes.fromhex(text.decode("ascii")), dtype)
            values = values.byteswap() if stored.big_endian else values.copy()
        else:
            number = float if dtype.kind == "f" else int
            exact = [number(word) for word in text.split()]
            values = np.array(exact, dtype)  # OverflowError for values that do not fit
    except (ValueError, OverflowError) as error:
        raise FileError(f"its voxels are no numbers of the type {dtype} ({error}), expected such") from error
    if values.size != math.prod(shape):
        raise FileError(f"it holds {values.size} values where its header promises {math.prod(shape)}, expected those")
    return values.reshape(shape)


def _rescaled(values: np.ndarray, stored: Stored) -> np.ndarray:
    """slope · stored + intercept in float32, or in float64 if it is stored so; plane by plane, because arrays can be
    large."""
    rescaled = np.empty(values.shape, np.float64 if values.dtype == np.float64 else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for target, plane in zip(rescaled, values, strict=True):
            target[:] = plane.astype(np.float64) * stored.slope + stored.intercept
    return rescaled

"""The header of a NIfTI file (.nii, .nii.gz), version 1 or 2: numbers at fixed positions.

Two transforms may give the voxel positions: qform (rotation, with the spacings of pixdim) and sform (a matrix). Each
has a code that is 0 if it is not set. nibabel, FSL and others use sform if its code is above 0; ITK mostly uses qform,
and always takes the spacing from pixdim. So they must not contradict each other.
"""

import itertools
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from imagefiles.stored import FileError, Stored, head_of, no_header

TYPES = {
    code: np.dtype(name)
    for name, code in (
        ("u1", 2),
        ("i2", 4),
        ("i4", 8),
        ("f4", 16),
        ("f8", 64),
        ("i1", 256),
        ("u2", 512),
        ("u4", 768),
        ("i8", 1024),
        ("u8", 1280),
    )
}
"""The types by the number in the header."""
GZIP = b"\x1f\x8b"
DISPLACEMENT = 1006
"""The intent of vectors in mm along RAS."""
SAME_PLACE = 0.1
"""Maximum distance, in voxels, between the positions of a voxel by qform and by sform."""
SAME_SPACING = 0.01
"""Maximum relative difference between the steps of sform and pixdim."""


@dataclass(frozen=True)
class Header:
    """The numbers of the header that are needed."""

    size: tuple[int, ...]
    dtype: np.dtype
    big_endian: bool
    start: int
    """Start of the voxels, in bytes."""
    slope: float
    intercept: float
    intent: int
    pixdim: tuple[float, ...]
    """The sign of the third axis (qfac) and the spacings, in the units of the header, as in the next fields."""
    codes: tuple[int, int]
    """The codes of qform and sform."""
    quaternion: tuple[float, ...]
    """The quaternion b, c, d, and the offset."""
    rows: Float[np.ndarray, "3 4"]
    """The rows of sform."""


def stored(path: Path) -> Stored:
    """Where and how the voxels are stored. FileError for a header that is invalid or contradicts itself, and if ITK
    would read another file."""
    twin = path.with_suffix("")
    if path.name.lower().endswith(".gz") and twin.exists():  # ITK would read that one
        raise FileError(f"it has {twin.name} beside it, which would be read instead, expected only one of the two")
    header = _header(path)
    no_scale = header.slope == 0 or not math.isfinite(header.slope)  # as the standard says
    return Stored(
        (path,),
        "compressed" if head_of(path)[:2] == GZIP else "raw",
        math.prod(header.size),
        start=header.start,
        big_endian=header.big_endian,
        component_axis=-1,
        dtype=header.dtype,
        slope=1.0 if no_scale else header.slope,
        intercept=0.0 if no_scale else header.intercept,
        flipped=header.intent == DISPLACEMENT,
        remarks=_world_remarks(header),
    )


def _header(path: Path) -> Header:
    head = _inflated_head(path)
    for order, length in itertools.product("<>", (348, 540)):
        if len(head) >= length and struct.unpack_from(order + "i", head)[0] == length:
            break
    else:
        raise no_header(path)
    if head[4:7] != b"n+2" and head[344:347] != b"n+1":
        raise no_header(path, "expected 'n+1' or 'n+2' as its magic")

    def numbers(first: tuple[str, int], second: tuple[str, int]) -> tuple[Any, ...]:
        """The numbers at the position that version 1 or 2 defines."""
        form, place = first if length == 348 else second
        return struct.unpack_from(order + form, head, place)

    dim = numbers(("8h", 40), ("8q", 16))
    code, bits = numbers(("2h", 70), ("2h", 12))
    slope, intercept = numbers(("2f", 112), ("2d", 176))
    (start,), (intent,) = numbers(("f", 108), ("q", 168)), numbers(("h", 68), ("i", 504))
    size = dim[1 : dim[0] + 1]
    sensible = {
        f"dim is {dim}": 1 <= dim[0] <= 7 and min(size, default=0) >= 1,
        f"datatype {code} of {bits} bits": code in TYPES and TYPES[code].itemsize * 8 == bits,
        f"voxels at {start}": math.isfinite(start) and start >= length and start == int(start),
        f"scl_inter is {intercept}": slope == 0 or not math.isfinite(slope) or math.isfinite(intercept),
    }
    for why, fine in sensible.items():
        if not fine:
            raise no_header(path, why)
    header = Header(
        size=size,
        dtype=TYPES[code],
        big_endian=order == ">",
        start=int(start),
        slope=slope,
        intercept=intercept,
        intent=intent,
        pixdim=numbers(("8f", 76), ("8d", 104))[:4],
        codes=numbers(("2h", 252), ("2i", 344)),
        quaternion=numbers(("6f", 256), ("6d", 352)),
        rows=np.array(numbers(("12f", 280), ("12d", 400))).reshape(3, 4),
    )
    _check_world(header)
    return header


def _inflated_head(path: Path) -> bytes:
    head = head_of(path)
    if head[:2] != GZIP:
        return head
    if not path.name.lower().endswith(".gz"):
        raise FileError("it is compressed with gzip though its name ends in .nii, expected .nii.gz")
    try:
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(head, 544)
    except zlib.error as error:
        raise no_header(path, str(error)) from error


# --- where the voxels lie --------------------------------------------------------------------------------------------


def _check_world(header: Header) -> None:
    """FileError unless all statements of the header on voxel positions agree."""
    qform, sform = header.codes
    spacing = header.pixdim[1 : 1 + min(3, len(header.size))]
    if not all(math.isfinite(s) and s > 0 for s in spacing):  # ITK would use 1 mm for these
        raise FileError(f"it has a spacing of {spacing}, expected positive numbers")
    if len(spacing) < 3:
        return
    if qform <= 0 and sform <= 0 and set(spacing) == {1.0} and not _in_voxels(header):
        raise FileError(
            "it has neither a spacing nor a position (pixdim is 1, qform_code and sform_code are 0, as of a bare "
            "array), expected the scan's own"
        )
    if sform <= 0:
        return
    steps = np.linalg.norm(header.rows[:, :3], axis=0)
    axes = header.rows[:, :3] / spacing
    skewed = np.abs(axes.T @ axes - np.diag(np.diag(axes.T @ axes))).max() > SAME_SPACING  # ITK rejects that
    if not skewed and np.abs(steps / spacing - 1).max() > SAME_SPACING:
        raise FileError(
            f"its sform has steps of {_listed(steps)} but its pixdim is {_listed(spacing)}, expected equal spacings"
        )
    if qform > 0 and (apart := _apart(header)) > SAME_PLACE:
        raise FileError(
            f"its qform (code {qform}) and its sform (code {sform}) place voxels up to {apart:.3g} voxels apart, "
            "expected equal ones, or a code of 0 for the one that does not hold"
        )


def _in_voxels(header: Header) -> bool:
    """Whether it can be a field of Learn2Reg, which is in voxels of another image and needs no position."""
    return tuple(header.size[3:]) == (3,)


def _apart(header: Header) -> float:
    """Largest distance between the positions of a corner by qform and by sform, in units of the smallest spacing."""
    last = np.array(header.size[:3]) - 1
    corners = np.array(list(np.ndindex(2, 2, 2))) * last
    shift = corners @ (_qform(header) - header.rows)[:, :3].T + (_qform(header) - header.rows)[:, 3]
    return float(np.linalg.norm(shift, axis=1).max() / min(header.pixdim[1:4]))


def _qform(header: Header) -> Float[np.ndarray, "3 4"]:
    """The matrix of a quaternion a + bi + cj + dk with columns multiplied by the spacings, and the offset."""
    b, c, d = header.quaternion[:3]
    a = math.sqrt(max(0.0, 1 - (b * b + c * c + d * d)))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    sign = -1.0 if header.pixdim[0] < 0 else 1.0
    return np.column_stack([rotation * header.pixdim[1:4] * [1.0, 1.0, sign], header.quaternion[3:]])


def _world_remarks(header: Header) -> tuple[str, ...]:
    if max(header.codes) > 0 or len(header.size) < 3 or _in_voxels(header):
        return ()
    return (
        "it does not say where it lies (qform_code and sform_code are 0); its axes were taken to point to the left, "
        "to the back and to the head, from the origin.",
    )


def _listed(numbers: np.ndarray | tuple[float, ...]) -> str:
    return " × ".join(f"{number:.4g}" for number in numbers)

"""Where and how a file keeps its voxels."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

HEAD_BYTES = 2**20
"""A header that is longer is none."""

Encoding = Literal["raw", "compressed", "text", "hex"]
"""``compressed``: a zlib or gzip stream, with its checksum."""


class FileError(ValueError):
    """What is wrong with an image file, and what was expected: a sentence that lacks only the file's name before it."""


@dataclass(frozen=True)
class Stored:
    """What the header says of the voxels besides their size and type, which SimpleITK knows as well."""

    files: tuple[Path, ...]
    """The file with the voxels; or one for each of equal parts, in their order."""
    encoding: Encoding
    count: int
    """Of values, components counted each."""
    start: int | None = 0
    """Bytes before the voxels, counted after decompression; None: as many as are too much."""
    skipped: int = 0
    """Bytes before the compressed stream."""
    compressed_bytes: int | None = None
    """Length of the compressed stream, where the header has it."""
    big_endian: bool = False
    component_axis: int = 0
    """Place of the components of a vector among the axes, the fastest first; -1 is the last."""
    dtype: np.dtype | None = None
    """None: as SimpleITK has it."""
    slope: float = 1.0
    intercept: float = 0.0
    """The value is slope · stored + intercept."""
    flipped: bool = False
    """Whether the first two components are stored with the other sign than along LPS."""
    remarks: tuple[str, ...] = ()
    """What was taken for granted where the header says nothing: for users, like a `FileError`."""


def head_of(path: Path) -> bytes:
    """The first bytes. FileError when the file cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise FileError(f"it cannot be opened ({error.strerror}{_link(path)}), expected a readable file") from error


def _link(path: Path) -> str:
    with suppress(OSError):
        if path.is_symlink() and not path.exists():
            return f"; it is a link to {str(path.readlink())!a}, which is not there"
    return ""


def no_header(path: Path, why: str = "") -> FileError:
    """The error for a header that makes no sense."""
    kind = "".join(path.suffixes[-2:]) if path.name.lower().endswith(".gz") else path.suffix
    return FileError(f"it has no readable header{f' ({why})' if why else ''}, expected a valid {kind} file")


def beside(header: Path, name: str) -> Path:
    """The data file that a header names, in or below its own folder. FileError when it lies elsewhere, or is none."""
    folder = header.parent.absolute()
    target = Path(os.path.normpath(folder / name))  # links stay as they are: users make them, headers do not
    folder = Path(os.path.normpath(folder))
    if "\0" in name or not target.is_relative_to(folder):
        raise FileError(f"its data file {name!a} lies outside its folder, expected one beside the header")
    if not target.is_file():
        why = f"it is no file{_link(target)}" if target.exists() or target.is_symlink() else "No such file or directory"
        raise FileError(f"its data file {name!a} cannot be read ({why}), expected it beside the header")
    return target

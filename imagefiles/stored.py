"""Where and how a file stores its voxels."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

HEAD_BYTES = 2**20
"""Maximum length of a header."""

Encoding = Literal["raw", "compressed", "text", "hex"]
"""``compressed``: a zlib or gzip stream, with its checksum."""


class FileError(ValueError):
    """A sentence on what is wrong with an image file and what was expected; the file's name must be prepended."""


@dataclass(frozen=True)
class Stored:
    """The data of the header on the voxels, except size and type, which SimpleITK reads as well."""

    files: tuple[Path, ...]
    """The file with the voxels, or one file for each of several equal parts, in order."""
    encoding: Encoding
    count: int
    """Number of values, each component counted."""
    start: int | None = 0
    """Bytes before the voxels, counted after decompression; None: all bytes beyond the size of the voxels."""
    skipped: int = 0
    """Bytes before the compressed stream."""
    compressed_bytes: int | None = None
    """Length of the compressed stream, if the header has it."""
    big_endian: bool = False
    component_axis: int = 0
    """Position of the component axis among the axes, the fastest first; -1 is the last."""
    dtype: np.dtype | None = None
    """None: the type that SimpleITK reads."""
    slope: float = 1.0
    intercept: float = 0.0
    """The value is slope · stored + intercept."""
    flipped: bool = False
    """Whether the first two components are stored with the opposite sign of LPS."""
    remarks: tuple[str, ...] = ()
    """Assumptions about values that the header does not give: sentences for users, in the form of a `FileError`."""


def head_of(path: Path) -> bytes:
    """The first bytes of a file. FileError if it cannot be opened."""
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
    """The error for an invalid header."""
    kind = "".join(path.suffixes[-2:]) if path.name.lower().endswith(".gz") else path.suffix
    return FileError(f"it has no readable header{f' ({why})' if why else ''}, expected a valid {kind} file")


def beside(header: Path, name: str) -> Path:
    """The data file that a header names, in or below its own folder. FileError if it lies elsewhere or is not a
    file."""
    folder = header.parent.absolute()
    target = Path(os.path.normpath(folder / name))  # links are not resolved: users create them, headers do not
    folder = Path(os.path.normpath(folder))
    if "\0" in name or not target.is_relative_to(folder):
        raise FileError(f"its data file {name!a} lies outside its folder, expected one beside the header")
    if not target.is_file():
        why = f"it is no file{_link(target)}" if target.exists() or target.is_symlink() else "No such file or directory"
        raise FileError(f"its data file {name!a} cannot be read ({why}), expected it beside the header")
    return target

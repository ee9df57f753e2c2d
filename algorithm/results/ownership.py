"""Recognises the files that this program wrote: only these may be replaced or removed."""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

from ..errors import InputError
from ..files.folders import images_in
from ..files.formats import beginning
from ..files.writing import PARTIAL

log = logging.getLogger(__name__)
KINDS = ("displacement-field", "warped-moving", "expected-error")
"""The folders of the result images in images/."""
SUFFIXES = ("_field", "_warped", "_error")
"""Optional endings of their names, so that all can lie in one folder."""
TRANSFORMS = ("transform.h5", "inverse.h5")
"""Transforms for other programs, beside results.json: from the fixed to the moving scan, and back."""
TRANSFORM_MARK = "Comment"
"""The attribute of such a file that names its writer; ITK ignores it."""
RESULTS = "results.json"
PAGE = "report.html"
PAGE_MARK = "written by lung-registration as report.html"
"""The comment in the second line of every page that this program writes."""
OWN_ENTRIES = {"version", "timings_s", "warnings"}
"""Entries that every results.json of this program has (`Report`)."""
FUNCTION = ("function.json", "function.csv")
"""The files that `lungreg function` writes beside results.json."""
FUNCTION_IMAGES = "function"
"""The folder of its images in images/."""
FUNCTION_COLOURS = "prm.ctbl"
FUNCTION_MARK = "# written by lung-registration"
"""The first line of `FUNCTION_COLOURS`."""
_OWN_PARTIAL = re.compile(re.escape(PARTIAL).replace(r"\{\}", "[0-9a-f]{32}"))


def check_page(page: Path, inputs: Iterable[Path]) -> None:
    """InputError if the page would replace a file that this program did not write, or an input."""
    if exists(page):
        check_replaceable(page, identities(inputs), is_own_page(page))


def check_writable(folder: Path) -> None:
    """InputError unless a file can be created in the folder, or in its nearest existing parent."""
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error


def result_mark(path: Path) -> str:
    """The comment in the header of a result that is written as ``path``. It distinguishes this result from every other
    file.

    The mark of a renamed file does not fit its new name, and programs that change an image write their own header, see
    `algorithm.files.formats`.
    """
    name = f"{path.parent.name}/{path.name}".encode(errors="surrogateescape")
    return f"written by lung-registration as {hashlib.sha256(name).hexdigest()[:32]}"


def is_own_image(path: Path) -> bool:
    """Whether this program wrote the file under this name and nobody has changed it since."""
    expected = beginning(path, result_mark(path))
    return expected is not None and _begins_with(path, expected)


def _begins_with(path: Path, expected: bytes) -> bool:
    """Whether the path is a readable file, not a link, that begins with these bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(expected)) == expected
    except OSError:
        return False


def transform_mark(path: Path) -> bytes:
    """The value of `TRANSFORM_MARK` in a transform that is written as ``path``; the folder may be renamed."""
    return f"written by lung-registration as {path.name}".encode()


def is_own_transform(path: Path) -> bool:
    """Whether this program wrote this transform under this name."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            return bool(file.attrs.get(TRANSFORM_MARK) == np.bytes_(transform_mark(path)))
    except OSError:
        return False


def is_own_results(path: Path) -> bool:
    """Whether this program wrote this results.json."""
    return _is_own_json(path, OWN_ENTRIES)


def _is_own_json(path: Path, entries: set[str]) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.keys() >= entries


def is_own_page(path: Path) -> bool:
    """Whether this program wrote this page."""
    return _begins_with(path, f"<!DOCTYPE html>\n<!-- {PAGE_MARK} -->".encode())


def _own_function(root: Path) -> Iterator[tuple[Path, bool]]:
    """The paths to which lung function is written that exist, each with whether this program wrote it."""
    table, cells = (root / name for name in FUNCTION)
    images = root / "images" / FUNCTION_IMAGES
    if exists(table):
        yield table, is_own_function(table)
    if exists(cells):
        yield cells, _begins_with(cells, b"region,volume_in_l,")
    if exists(images / FUNCTION_COLOURS):
        yield images / FUNCTION_COLOURS, _begins_with(images / FUNCTION_COLOURS, FUNCTION_MARK.encode())
    for image in images_in(images):
        yield image, is_own_image(image)


def is_own_function(path: Path) -> bool:
    """Whether this program wrote this function.json."""
    return _is_own_json(path, {"version", "inspiration", "settings", "regions"})


def check_function(root: Path) -> None:
    """InputError if the lung function would replace a file that this program did not write."""
    check_writable(root / "images" / FUNCTION_IMAGES)
    for path, own in _own_function(root):
        check_replaceable(path, set(), own)


def remove_own_function(root: Path) -> None:
    """Remove the lung function of an earlier run, because it belongs to another field."""
    for path, own in _own_function(root):
        if own:
            path.unlink()
    with suppress(OSError):  # it is not there, or holds something else
        (root / "images" / FUNCTION_IMAGES).rmdir()


def in_the_way(path: Path) -> list[Path]:
    """The images in the folder of ``path``, and whatever exists under the name ``path``."""
    others = images_in(path.parent)
    return others if path in others or not exists(path) else [*others, path]


def exists(path: Path) -> bool:
    """Whether the path exists, also as a broken link."""
    return path.is_symlink() or path.exists()


def check_replaceable(path: Path, kept: set[tuple[int, int]], own: bool) -> None:
    if not identities([path]).isdisjoint(kept):
        raise InputError(f"{path}: is an input, and lies where the results go; expected another folder for the results")
    if not own:
        raise InputError(
            f"{path}: was not written by this program, and lies where the results go alone; expected another folder "
            "for the results, or this file elsewhere"
        )


def identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and inode of the files, and of the files in the folders (DICOM). They are the same for every name of a
    file."""
    found = set()
    for path in paths:
        with suppress(OSError):
            for file in (path, *(path.iterdir() if path.is_dir() else ())):
                status = file.stat()
                found.add((status.st_dev, status.st_ino))
    return found


def folders_below(path: Path) -> list[Path]:
    """The path and all folders below it, each once; links are followed."""
    found: dict[Path, None] = {}
    for folder, below, _ in os.walk(path, followlinks=True):
        if Path(folder).resolve() in found:
            below.clear()
        found[Path(folder).resolve()] = None
    return [path, *found]


def remove_own_texts(root: Path) -> None:
    """Remove results.json and report.html that this program wrote, and the lung function, which belongs to their
    field."""
    for path, own in ((root / RESULTS, is_own_results), (root / PAGE, is_own_page)):
        if own(path):
            path.unlink()
    remove_own_function(root)


def remove_own_images(folders: list[Path], but: Iterable[Path]) -> None:
    kept = identities(but)
    for image in (image for folder in folders for image in images_in(folder)):
        if is_own_image(image) and identities([image]).isdisjoint(kept):
            image.unlink()
            log.info("removed, the result of an earlier run: %s", image)


def remove_own_transforms(root: Path, but: Iterable[Path] = ()) -> None:
    """Remove the transforms of an earlier run from a result folder."""
    kept = identities(but)
    for path in (root / name for name in TRANSFORMS):
        if is_own_transform(path) and identities([path]).isdisjoint(kept):
            path.unlink()
            log.info("removed, the result of an earlier run: %s", path)


def remove_partials(folder: Path) -> None:
    for partial in folder.glob(PARTIAL.format("*")):
        if _OWN_PARTIAL.fullmatch(partial.name):
            partial.unlink()

"""What /input and /output look like: grand-challenge.org's files, and plain folders for everyone else."""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import h5py
import numpy as np
from torch import Tensor

from imagefiles import ENDINGS, ending

from .dicom import holds_dicom
from .errors import InputError
from .formats import ENDINGS as WRITTEN
from .formats import beginning
from .images import PARTIAL, Layout, atomically
from .inputs import PLATFORM_FILE as PLATFORM_FILE
from .inputs import Inputs as Inputs

SLUGS = {"fixed": "fixed-image", "moving": "moving-image", "fixed-mask": "fixed-mask", "moving-mask": "moving-mask"}
"""The platform's name for each role; images are required, masks are not."""
REQUIRED = ("fixed", "moving")
KINDS = ("displacement-field", "warped-moving", "expected-error")
"""The folders of the results in images/."""
SUFFIXES = ("_field", "_warped", "_error")
"""What their names may end in, so that all can lie in one folder."""
TRANSFORMS = ("transform.h5", "inverse.h5")
"""For other programs, beside results.json: from the fixed to the moving scan, and back."""
TRANSFORM_MARK = "Comment"
"""The attribute of such a file that says who wrote it; ITK does not look at it."""
RESULTS, PAGE = "results.json", "report.html"
PAGE_MARK = "written by lung-registration as report.html"
"""The comment in the second line of every page that this program writes."""
OWN_ENTRIES = {"version", "timings_s", "warnings"}
"""Of every results.json that this program writes (`Report`)."""
FUNCTION = ("function.json", "function.csv")
"""What `lungreg function` measures, beside results.json."""
FUNCTION_IMAGES = "function"
"""The folder of its images in images/."""
FUNCTION_COLOURS = "prm.ctbl"
FUNCTION_MARK = "# written by lung-registration"
"""The first line of `FUNCTION_COLOURS`."""
_OWN_PARTIAL = re.compile(re.escape(PARTIAL).replace(r"\{\}", "[0-9a-f]{32}"))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """The files that one case is written to."""

    displacement_field: Path
    warped_moving: Path
    expected_error: Path
    results: Path
    inputs: tuple[Path, ...] = ()
    """Of the case: neither removed nor written over, wherever they lie."""
    transforms: tuple[Path, ...] = ()
    """Those of `TRANSFORMS`, or none."""
    page: Path | None = None
    """report.html; None where it is not wanted."""

    def check(self) -> None:
        """InputError where a result would take the place of a file that is none of this program's, or an input."""
        kept = _identities(self.inputs)
        for image in (self.displacement_field, self.warped_moving, self.expected_error):
            for other in _in_the_way(image):
                _check_replaceable(other, kept, is_own_image(other))
        for transform in filter(_exists, self.transforms):
            _check_replaceable(transform, kept, is_own_transform(transform))
        if _exists(self.results):
            _check_replaceable(self.results, kept, is_own_results(self.results))
        if self.page is not None:
            check_page(self.page, self.inputs)


def check_page(page: Path, inputs: Iterable[Path]) -> None:
    """InputError where the page would take the place of a file that is none of this program's, or of an input."""
    if _exists(page):
        _check_replaceable(page, _identities(inputs), is_own_page(page))


# --- input -----------------------------------------------------------------------------------------------------------


def find_inputs(root: Path) -> Inputs:
    """The files under ``root``, by the first of these that is there.

    ``inputs.json`` (grand-challenge.org); ``images/fixed/`` or ``images/fixed-image/`` with one image of any name, or
    with the files of one DICOM series, and likewise for moving; ``fixed.*`` and ``moving.*``, or such folders of DICOM
    files. Masks: ``fixed-mask``, ``moving-mask`` in the same way, but always as one image. InputError when there is
    none, or more than one image for a role, and when a folder cannot be searched. ``root`` may be a symbolic link.
    """
    try:
        return _find_inputs(root)
    except OSError as error:
        raise _closed(Path(error.filename or root), error) from error


def _closed(path: Path, error: OSError) -> InputError:
    """Names the folder on the way to ``path`` that does not let through, not what may not even be there."""
    folder = next((p for p in (path, *path.absolute().parents) if _seen(p)), path)
    return InputError(f"{folder}: cannot be searched ({error.strerror}), expected a folder whose files can be read")


def _seen(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False


def _find_inputs(root: Path) -> Inputs:
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder, expected one with a fixed and a moving image")
    if (root / PLATFORM_FILE).exists():
        found = _from_platform(root)
        return Inputs(found["fixed"], found["moving"], found.get("fixed-mask"), found.get("moving-mask"), True)
    in_folders = {role: _candidates(root / "images" / role, role) for role in SLUGS}
    for role in REQUIRED:
        in_folders[role] += _candidates(root / "images" / SLUGS[role], role)
    by_name = {
        role: [p for p in images_in(root, links=True) if image_name(p).replace("_", "-") == role] for role in SLUGS
    }
    for role in REQUIRED:
        by_name[role] += _dicom(root / role)
    candidates = in_folders if any(in_folders[role] for role in REQUIRED) else by_name
    fixed, moving = (_single(root, role, candidates[role]) for role in REQUIRED)
    fixed_mask, moving_mask = (
        _single(root, role, candidates[role]) if candidates[role] else None for role in ("fixed-mask", "moving-mask")
    )
    return Inputs(fixed, moving, fixed_mask, moving_mask)


def image_name(path: Path) -> str:
    """The file name without its ending: ``case.nii.gz`` gives ``case``; the name of a folder (DICOM)."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name[: len(name) - len(ending(path) or "")]


def _from_platform(root: Path) -> dict[str, Path]:
    """The file for each role that inputs.json has."""
    sockets = _sockets(root / PLATFORM_FILE)
    missing = [SLUGS[role] for role in REQUIRED if SLUGS[role] not in sockets]
    if missing:
        raise InputError(
            f"{root / PLATFORM_FILE}: has the sockets {', '.join(sorted(sockets)) or 'none'}, "
            f"expected also {' and '.join(missing)}"
        )
    found = {}
    for role, slug in SLUGS.items():
        if slug in sockets:
            found[role] = _single(root, role, _candidates(root / sockets[slug], role), sockets[slug])
    return found


def _sockets(file: Path) -> dict[str, str]:
    """relative_path by slug. Entries carry it as `socket`; before December 2025 only as `interface`."""
    try:
        entries = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}), expected a list of inputs") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not valid JSON, expected a list of inputs") from error
    if not isinstance(entries, list):
        raise InputError(f"{file}: holds a JSON {type(entries).__name__}, expected a list of inputs")
    sockets: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        socket = (entry.get("socket") or entry.get("interface")) if isinstance(entry, dict) else None
        slug, relative = (socket.get("slug"), socket.get("relative_path")) if isinstance(socket, dict) else (None, None)
        if not isinstance(slug, str) or not isinstance(relative, str):
            raise InputError(f"{file}: entry {number} has no socket with slug and relative_path, expected both as text")
        if PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts or "\0" in relative:
            raise InputError(f"{file}: {slug} is at {relative!a}, expected a path inside {file.parent}")
        if slug in sockets:
            raise InputError(f"{file}: has several entries for {slug}, expected one")
        sockets[slug] = relative
    return sockets


def _candidates(folder: Path, role: str) -> list[Path]:
    """The images in the folder, and the folder itself when a DICOM series may lie in it and the role is a scan's."""
    return images_in(folder, links=True) + (_dicom(folder) if role in REQUIRED else [])


def _dicom(folder: Path) -> list[Path]:
    return [folder] if folder.is_dir() and holds_dicom(folder) else []


def images_in(folder: Path, links: bool = False) -> list[Path]:
    """Files in the folder with a supported ending, hidden ones left out; none when there is no folder.

    With ``links`` also those to nothing, so that reading them tells of it.
    """
    try:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        images = [p for p in files if ending(p) and not p.name.startswith(".")]
        return [p for p in images if p.is_file() or (links and _to_nothing(p))]
    except OSError as error:
        raise _closed(folder, error) from error


def _to_nothing(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _single(root: Path, role: str, candidates: list[Path], relative: str | None = None) -> Path:
    """The only candidate, links to nothing only without others; InputError that says what was expected and there."""
    candidates = [p for p in candidates if not _to_nothing(p)] or candidates
    if len(candidates) == 1:
        return candidates[0]
    places = f"images/{role}/, images/{SLUGS[role]}/ or {role}.*" if role in REQUIRED else f"images/{role}/ or {role}.*"
    found = ", ".join(str(p.relative_to(root)) for p in candidates) if candidates else "no image"
    raise InputError(
        f"{root}: found {found} for {role}, expected exactly one ({', '.join(ENDINGS)}) in {relative or places}; "
        f"the folder has {_listing(root)}"
    )


def _listing(root: Path, limit: int = 8) -> str:
    """The first files under ``root``, not deeper than ``images/<slug>/``."""
    patterns = ("*", "images/*", "images/*/*")
    files = sorted(str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern) if not p.is_dir())
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(files[:limit]) + more if files else "no files"


# --- output ----------------------------------------------------------------------------------------------------------


def prepare_outputs(
    root: Path,
    name: str,
    inputs: Iterable[Path] = (),
    page: bool = False,
    transforms: bool = False,
    suffixes: bool = False,
    kind: str = ".mha",
) -> Outputs:
    """Where the results of the case ``name`` go, with page, `TRANSFORMS` and `SUFFIXES` if they are wanted; the names
    of images end in ``kind``. Makes nothing, so that a run that fails leaves nothing behind.

    InputError when one of the places cannot be written, or holds what must not be replaced, see `Outputs.check`: before
    any time is spent on the registration.
    """
    if not name or name.startswith(".") or "/" in name or len(name.encode(errors="replace")) > 200:
        raise InputError(f"{name!a}: is no name for a case, expected a short file name without folders")
    field, warped, error = (
        root / "images" / folder / f"{name}{suffix if suffixes else ''}{kind}"
        for folder, suffix in zip(KINDS, SUFFIXES, strict=True)
    )
    outputs = Outputs(
        field,
        warped,
        error,
        root / RESULTS,
        tuple(inputs),
        tuple(root / file for file in TRANSFORMS) if transforms else (),
        root / PAGE if page else None,
    )
    for path in (outputs.displacement_field, outputs.warped_moving, outputs.expected_error, outputs.results):
        _check_writable(path.parent)
    outputs.check()
    return outputs


def _check_writable(folder: Path) -> None:
    """InputError unless a file can be made in the folder, or in the nearest folder above that exists."""
    try:
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error


def withdraw(root: Path, images: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Where a case begins: results.json and the page of an earlier one go, so that nobody takes them for this one's.

    With ``images`` those of the earlier one go, too, and its transforms, but for what is one of the ``inputs`` or lies
    below them. Nothing is touched while another process writes its results there. InputError when they cannot be
    removed.
    """
    try:
        if not root.is_dir():
            return
        with _locked(root, wait=False) as ours:
            if ours:
                remove_own_texts(root)
            if ours and images:
                below = [folder for path in inputs for folder in _folders_below(path)]
                _remove_own_images([root / "images" / kind for kind in KINDS], below)
                remove_own_transforms(root, below)
    except OSError as error:
        raise InputError(
            f"{root}: an earlier result cannot be removed ({error.strerror}), expected a writable folder"
        ) from error


@contextmanager
def sole_image(path: Path, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Makes the folder of ``path`` for the body to write into; then ``path`` is its only image, as the platform asks.

    Images that earlier runs wrote there, and parts of those that were killed, go only after the body has ended well; if
    it has not, folders made here go instead. What another program wrote stays, and what is one of the ``inputs``.
    """
    with _made(path.parent):
        yield path
    _remove_own_images([path.parent], (*inputs, path))
    _remove_partials(path.parent)


def remove_own_image(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Images that earlier runs wrote into the folder of ``path`` go, where this run writes none, and so does the folder
    if nothing else is there."""
    if path.parent.is_dir():
        _remove_own_images([path.parent], inputs)
        with suppress(OSError):
            path.parent.rmdir()


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Makes the folder. Of several processes that write there, one at a time runs the body; the others wait.

    So the results of one run stay together, where the file system knows locks. Parts of a killed run's file go.
    """
    with _made(root), _locked(root):
        _remove_partials(root)
        yield


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Whether the body has the folder's lock: always, but for when it does not ``wait`` for another process's."""
    descriptor, ours = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            ours = False
        except OSError:  # a file system without locks
            pass
        yield ours
    finally:
        os.close(descriptor)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is made, and those above it; when the body fails, those made here go again if they are empty."""
    made = [f for f in (folder, *folder.parents) if not f.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for new in made:
            with suppress(OSError):  # another output may be there by now
                new.rmdir()
        raise


# --- whose files? ----------------------------------------------------------------------------------------------------


def result_mark(path: Path) -> str:
    """The comment in the header of a result that is written as ``path``. It tells that from every other file.

    A file that was renamed has another mark than its name asks for, and programs that change an image write a header
    of their own, see `algorithm.formats`.
    """
    name = f"{path.parent.name}/{path.name}".encode(errors="surrogateescape")
    return f"written by lung-registration as {hashlib.sha256(name).hexdigest()[:32]}"


def is_own_image(path: Path) -> bool:
    """Whether it is a result that this program wrote under this name, as it was written."""
    expected = beginning(path, result_mark(path))
    return expected is not None and _begins_with(path, expected)


def _begins_with(path: Path, expected: bytes) -> bool:
    """Whether it is a file, and no link to one, that can be read and begins so."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(expected)) == expected
    except OSError:
        return False


def transform_mark(path: Path) -> bytes:
    """What `TRANSFORM_MARK` says in a transform that is written as ``path``; the folder may be renamed."""
    return f"written by lung-registration as {path.name}".encode()


def is_own_transform(path: Path) -> bool:
    """Whether it is a transform that this program wrote under this name."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            return bool(file.attrs.get(TRANSFORM_MARK) == np.bytes_(transform_mark(path)))
    except OSError:
        return False


def is_own_results(path: Path) -> bool:
    """Whether it is a results.json that this program wrote."""
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
    """Whether it is a page that this program wrote."""
    return _begins_with(path, f"<!DOCTYPE html>\n<!-- {PAGE_MARK} -->".encode())


def _own_function(root: Path) -> Iterator[tuple[Path, bool]]:
    """What lies where the lung function is written, and whether this program wrote it."""
    table, cells = (root / name for name in FUNCTION)
    images = root / "images" / FUNCTION_IMAGES
    if _exists(table):
        yield table, is_own_function(table)
    if _exists(cells):
        yield cells, _begins_with(cells, b"region,volume_in_l,")
    if _exists(images / FUNCTION_COLOURS):
        yield images / FUNCTION_COLOURS, _begins_with(images / FUNCTION_COLOURS, FUNCTION_MARK.encode())
    for image in images_in(images):
        yield image, is_own_image(image)


def is_own_function(path: Path) -> bool:
    """Whether it is a function.json that this program wrote."""
    return _is_own_json(path, {"version", "inspiration", "settings", "regions"})


def check_function(root: Path) -> None:
    """InputError where lung function would take the place of a file that is none of this program's."""
    _check_writable(root / "images" / FUNCTION_IMAGES)
    for path, own in _own_function(root):
        _check_replaceable(path, set(), own)


def remove_own_function(root: Path) -> None:
    """What an earlier run measured; it belongs to another field."""
    for path, own in _own_function(root):
        if own:
            path.unlink()
    with suppress(OSError):  # it is not there, or holds something else
        (root / "images" / FUNCTION_IMAGES).rmdir()


def _in_the_way(path: Path) -> list[Path]:
    """The images in the folder of ``path``, and whatever has that name itself."""
    others = images_in(path.parent)
    return others if path in others or not _exists(path) else [*others, path]


def _exists(path: Path) -> bool:
    """Also as a link to nothing."""
    return path.is_symlink() or path.exists()


def _check_replaceable(path: Path, kept: set[tuple[int, int]], own: bool) -> None:
    if not _identities([path]).isdisjoint(kept):
        raise InputError(f"{path}: is an input, and lies where the results go; expected another folder for the results")
    if not own:
        raise InputError(
            f"{path}: was not written by this program, and lies where the results go alone; expected another folder "
            "for the results, or this file elsewhere"
        )


def _identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and inode of the files, and of those in the folders (DICOM): the same for every name of a file."""
    found = set()
    for path in paths:
        with suppress(OSError):
            for file in (path, *(path.iterdir() if path.is_dir() else ())):
                status = file.stat()
                found.add((status.st_dev, status.st_ino))
    return found


def _folders_below(path: Path) -> list[Path]:
    """The path and all folders below it, links followed, each once."""
    found: dict[Path, None] = {}
    for folder, below, _ in os.walk(path, followlinks=True):
        if Path(folder).resolve() in found:
            below.clear()
        found[Path(folder).resolve()] = None
    return [path, *found]


def remove_own_texts(root: Path) -> None:
    """results.json and report.html that this program wrote, and the lung function, which is that of their field."""
    for path, own in ((root / RESULTS, is_own_results), (root / PAGE, is_own_page)):
        if own(path):
            path.unlink()
    remove_own_function(root)


def _remove_own_images(folders: list[Path], but: Iterable[Path]) -> None:
    kept = _identities(but)
    for image in (image for folder in folders for image in images_in(folder)):
        if is_own_image(image) and _identities([image]).isdisjoint(kept):
            image.unlink()
            log.info("removed, the result of an earlier run: %s", image)


def remove_own_transforms(root: Path, but: Iterable[Path] = ()) -> None:
    """Those of an earlier run in a folder for results."""
    kept = _identities(but)
    for path in (root / name for name in TRANSFORMS):
        if is_own_transform(path) and _identities([path]).isdisjoint(kept):
            path.unlink()
            log.info("removed, the result of an earlier run: %s", path)


def _remove_partials(folder: Path) -> None:
    for partial in folder.glob(PARTIAL.format("*")):
        if _OWN_PARTIAL.fullmatch(partial.name):
            partial.unlink()


# --- how results are written -----------------------------------------------------------------------------------------


def write_results(path: Path, results: dict[str, Any]) -> None:
    """results.json, all or nothing. NaN and ±inf become null: JSON has neither, and the platform drops them."""
    text = json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")  # a lone surrogate's \udcff is valid JSON


def paths_from(folder: Path, **files: Path) -> dict[str, str]:
    """For results.json: where files lie, as seen from a folder, by their names there; without those that are not there
    (scans in memory)."""
    start = folder.resolve()
    return {name: os.path.relpath(file.resolve(), start) for name, file in files.items() if file.exists()}


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8, all or nothing; what cannot be in it is escaped."""
    with atomically(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def _plain(value: Any) -> Any:
    """The same in what JSON knows; TypeError for what it does not."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"results hold a {type(value).__name__}, expected numbers, texts, lists and dicts with text keys")


def field_layout(option: Literal["auto", "itk", "grand-challenge"], inputs: Inputs) -> Layout:
    """The layout asked for; by itself, grand-challenge on the platform and itk elsewhere."""
    if option != "auto":
        return option
    return "grand-challenge" if inputs.platform else "itk"


def image_kind(option: Literal["auto", "mha", "nii.gz", "nrrd"], fixed: Path, layout: Layout) -> str:
    """The ending of the images that are written: the one asked for; by itself that of the ``fixed`` image where it can
    be written, and .mha for others (DICOM). InputError for anything but .mha in grand-challenge's layout."""
    if layout == "grand-challenge":
        if option not in ("auto", "mha"):
            raise InputError(f"--format {option}: grand-challenge.org's layout of a field needs mha, expected that")
        return ".mha"
    return f".{option}" if option != "auto" else WRITTEN.get(ending(fixed) or "", ".mha")

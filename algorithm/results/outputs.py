"""Where the results of a case are written, and how several processes share a folder."""

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagefiles import ending

from ..errors import InputError
from ..files.formats import ENDINGS as WRITTEN
from ..files.images import Layout
from ..files.inputs import Inputs
from .ownership import (
    KINDS,
    PAGE,
    RESULTS,
    SUFFIXES,
    TRANSFORMS,
    check_page,
    check_replaceable,
    check_writable,
    exists,
    folders_below,
    identities,
    in_the_way,
    is_own_image,
    is_own_results,
    is_own_transform,
    remove_own_images,
    remove_own_texts,
    remove_own_transforms,
    remove_partials,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """The files that one case is written to."""

    displacement_field: Path
    warped_moving: Path
    expected_error: Path
    results: Path
    inputs: tuple[Path, ...] = ()
    """The input files of the case. They are never removed or overwritten, wherever they lie."""
    transforms: tuple[Path, ...] = ()
    """The paths of `TRANSFORMS`, or none."""
    page: Path | None = None
    """The path of report.html; None if it is not wanted."""

    def check(self) -> None:
        """InputError if a result would replace a file that this program did not write, or an input."""
        kept = identities(self.inputs)
        for image in (self.displacement_field, self.warped_moving, self.expected_error):
            for other in in_the_way(image):
                check_replaceable(other, kept, is_own_image(other))
        for transform in filter(exists, self.transforms):
            check_replaceable(transform, kept, is_own_transform(transform))
        if exists(self.results):
            check_replaceable(self.results, kept, is_own_results(self.results))
        if self.page is not None:
            check_page(self.page, self.inputs)


def prepare_outputs(
    root: Path,
    name: str,
    inputs: Iterable[Path] = (),
    page: bool = False,
    transforms: bool = False,
    suffixes: bool = False,
    kind: str = ".mha",
) -> Outputs:
    """The output paths of the case ``name``, with page, `TRANSFORMS` and `SUFFIXES` if wanted; image names end in
    ``kind``. This function creates no file or folder, so that a failed run leaves nothing behind.

    InputError when a path cannot be written, or holds a file that must not be replaced (see `Outputs.check`). This
    check runs before the registration starts.
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
        check_writable(path.parent)
    outputs.check()
    return outputs


def withdraw(root: Path, images: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Called when a case begins: removes results.json and the page of an earlier case, so that nobody takes them for
    those of this case.

    With ``images``, images and transforms of the earlier case are removed as well, except the ``inputs`` and all that
    lies below them. Nothing is removed while another process writes its results there. InputError when they cannot be
    removed.
    """
    try:
        if not root.is_dir():
            return
        with _locked(root, wait=False) as ours:
            if ours:
                remove_own_texts(root)
            if ours and images:
                below = [folder for path in inputs for folder in folders_below(path)]
                remove_own_images([root / "images" / kind for kind in KINDS], below)
                remove_own_transforms(root, below)
    except OSError as error:
        raise InputError(
            f"{root}: an earlier result cannot be removed ({error.strerror}), expected a writable folder"
        ) from error


@contextmanager
def sole_image(path: Path, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Create the folder of ``path``, into which the body writes; afterwards ``path`` is its only image, as the platform
    requires.

    Images of earlier runs and partial files of killed runs are removed only after the body has ended without an error.
    After an error, the folders made here are removed instead. Files of other programs and the ``inputs`` stay.
    """
    with _folders_made(path.parent):
        yield path
    remove_own_images([path.parent], (*inputs, path))
    remove_partials(path.parent)


def remove_own_image(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Remove images of earlier runs from the folder of ``path`` when this run writes none there. The folder is removed
    too if it is then empty."""
    if path.parent.is_dir():
        remove_own_images([path.parent], inputs)
        with suppress(OSError):
            path.parent.rmdir()


@contextmanager
def sole_writer(root: Path) -> Iterator[None]:
    """Create the folder. When several processes write there, one at a time runs the body; the others wait.

    So the results of one run stay together, if the file system supports locks. Partial files of killed runs are
    removed.
    """
    with _folders_made(root), _locked(root):
        remove_partials(root)
        yield


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Yield whether this process holds the lock of the folder. This is false only without ``wait`` while another
    process holds it."""
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
def _folders_made(folder: Path) -> Iterator[None]:
    """Create the folder and its parents. If the body fails, the folders made here are removed if they are empty."""
    made = [f for f in (folder, *folder.parents) if not f.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for new in made:
            with suppress(OSError):  # another output may be there by now
                new.rmdir()
        raise


def field_layout(option: Literal["auto", "itk", "grand-challenge"], inputs: Inputs) -> Layout:
    """The requested layout; "auto" gives grand-challenge on the platform and itk elsewhere."""
    if option != "auto":
        return option
    return "grand-challenge" if inputs.platform else "itk"


def image_kind(option: Literal["auto", "mha", "nii.gz", "nrrd"], fixed: Path, layout: Layout) -> str:
    """The ending of the images that are written: the requested one. "auto" gives the ending of the ``fixed`` image if
    that format can be written, else .mha (DICOM). InputError for anything but .mha in grand-challenge's layout."""
    if layout == "grand-challenge":
        if option not in ("auto", "mha"):
            raise InputError(f"--format {option}: grand-challenge.org's layout of a field needs mha, expected that")
        return ".mha"
    return f".{option}" if option != "auto" else WRITTEN.get(ending(fixed) or "", ".mha")

"""Which image files there are, and their headers."""

from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk

from imagefiles import meta, nifti, nrrd
from imagefiles.stored import FileError, Stored, no_header

ENDINGS = {
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".nii": "NiftiImageIO",
    ".nii.gz": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
}
"""The file formats that are read, by the ending of the name in small letters, and SimpleITK's names for them."""

_HEADERS: dict[str, Callable[[Path], Stored]] = {
    "MetaImageIO": meta.stored,
    "NiftiImageIO": nifti.stored,
    "NrrdImageIO": nrrd.stored,
}


def ending(path: Path) -> str | None:
    """The supported ending of a file name, given in small letters; None when there is none.

    In the name it may be in capitals, but not in both: ITK's NIfTI reader knows no `.Nii`.
    """
    return next((e for e in ENDINGS if path.name.endswith((e, e.upper()))), None)


def open_image(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header, and whose voxels `read_voxels` reads.

    FileError when the file cannot be opened, when its header makes no sense, lacks a spacing, contradicts itself or
    leads out of its folder, and when a data file that it names is not there. The name has to be UTF-8: SimpleITK aborts
    the process on others.
    """
    stored_in(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(ENDINGS[ending(path) or ""])  # else capital endings are unknown, a wrong one is guessed around
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise FileError("it has axes that are not orthonormal, expected axes at right angles") from error
        raise no_header(path) from error
    return reader


def remarks(path: Path) -> tuple[str, ...]:
    """What was taken for granted where the header says nothing: sentences that lack the file's name before them."""
    return stored_in(path).remarks


def stored_in(path: Path) -> Stored:
    """Where and how the voxels are kept; FileError as in `open_image`."""
    kind = ending(path)
    if kind is None:
        raise FileError(f"it is no known kind of image, expected a name that ends in {', '.join(ENDINGS)}")
    return _HEADERS[ENDINGS[kind]](path)

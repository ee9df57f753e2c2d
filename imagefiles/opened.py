"""Supported image files and their headers."""

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
"""The supported file formats: endings in lower case, and the names of SimpleITK for them."""

_HEADERS: dict[str, Callable[[Path], Stored]] = {
    "MetaImageIO": meta.stored,
    "NiftiImageIO": nifti.stored,
    "NrrdImageIO": nrrd.stored,
}


def ending(path: Path) -> str | None:
    """The supported ending of a file name, in lower case; None if there is none.

    In the name it may be in lower or upper case, but not mixed: ITK's NIfTI reader does not know `.Nii`.
    """
    return next((e for e in ENDINGS if path.name.endswith((e, e.upper()))), None)


def open_image(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header, and whose voxels `read_voxels` reads.

    FileError if the file cannot be opened, if its header is invalid, lacks a spacing, contradicts itself or names a
    file outside its folder, and if a data file is missing. The name must be UTF-8, because SimpleITK aborts the process
    on others.
    """
    stored_in(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(ENDINGS[ending(path) or ""])  # else upper-case endings are unknown, wrong ones ignored
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise FileError("it has axes that are not orthonormal, expected axes at right angles") from error
        raise no_header(path) from error
    return reader


def remarks(path: Path) -> tuple[str, ...]:
    """Assumptions about values that the header does not give: sentences to which the file's name must be prepended."""
    return stored_in(path).remarks


def stored_in(path: Path) -> Stored:
    """Where and how the voxels are stored; FileError as in `open_image`."""
    kind = ending(path)
    if kind is None:
        raise FileError(f"it is no known kind of image, expected a name that ends in {', '.join(ENDINGS)}")
    return _HEADERS[ENDINGS[kind]](path)

"""Image files: finding them, reading their headers and their content."""

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped

import imagefiles

from .errors import CaseError, short

log = logging.getLogger(__name__)

ENDINGS = tuple(imagefiles.ENDINGS)

Grid = sitk.Image | sitk.ImageFileReader
"""An object with a grid: an image, or a reader that has read a header."""


def is_there(path: Path) -> bool:
    """Whether the path exists, also as a broken link, so that reading it reports the error."""
    return path.is_symlink() or path.exists()


def find_image(folder: Path, name: str) -> Path | None:
    """``folder/name`` with the first ending for which a file exists; None without such a file."""
    return next((p for p in (folder / (name + ending) for ending in ENDINGS) if is_there(p)), None)


def open_image(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header. CaseError if there is no header, or if it contradicts itself."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # SimpleITK (2.5.7) would end the process
        raise CaseError(f"{short(path)}: its path is not in UTF-8, expected one that is") from error
    try:
        return imagefiles.open_image(path)
    except imagefiles.FileError as error:
        raise CaseError(f"{short(path)} cannot be read: {error}") from error


def read_voxels(path: Path, reader: sitk.ImageFileReader) -> Shaped[np.ndarray, "..."]:
    """The values, axes in reverse order, components last. CaseError unless the file holds exactly the values that the
    header promises.

    The log says so if the header does not define their position.
    """
    try:
        voxels: np.ndarray = imagefiles.read_voxels(path, reader)
    except imagefiles.FileError as error:
        raise CaseError(f"{short(path)} cannot be read: {error}") from error
    except OSError as error:
        raise CaseError(f"{short(path)} cannot be read ({error.strerror}), expected a whole file") from error
    for remark in imagefiles.remarks(path):
        log.warning("%s: %s", short(path), remark)
    return voxels


def read_image(path: Path) -> sitk.Image:
    """A 3-D image of one component. CaseError if the image is different or broken."""
    reader = read_grid(path)
    if reader.GetNumberOfComponents() != 1:
        raise CaseError(f"{short(path)} has {reader.GetNumberOfComponents()} components, expected one")
    image = sitk.GetImageFromArray(read_voxels(path, reader), isVector=False)
    place(image, reader)
    return image


def read_grid(path: Path) -> sitk.ImageFileReader:
    """The header of a 3-D image. CaseError if it has another dimension, or does not exist."""
    reader = open_image(path)
    if reader.GetDimension() != 3:
        raise CaseError(f"{short(path)} has the size {reader.GetSize()}, expected a 3-D image")
    return reader


def place(image: sitk.Image, grid: Grid) -> None:
    """Give a 3-D image the geometry of the first three axes of the grid."""
    n = grid.GetDimension()
    image.SetOrigin(grid.GetOrigin()[:3])
    image.SetSpacing(grid.GetSpacing()[:3])
    image.SetDirection(np.array(grid.GetDirection()).reshape(n, n)[:3, :3].ravel())

"""Image files: which there are, their headers, and reading them whole."""

import gzip
import math
import zlib
from pathlib import Path

import SimpleITK as sitk

from evaluation.errors import CaseError, short

ENDINGS = (".mha", ".mhd", ".nii.gz", ".nii", ".nrrd")

Grid = sitk.Image | sitk.ImageFileReader
"""What says where voxels lie: an image, or a reader that has read the header of one."""


def is_there(path: Path) -> bool:
    """Also for a link to nowhere, so that reading it tells of it."""
    return path.is_symlink() or path.exists()


def find_image(folder: Path, name: str) -> Path | None:
    """``folder/name`` with the first of the endings that is there; None when none is."""
    return next((p for p in (folder / (name + ending) for ending in ENDINGS) if is_there(p)), None)


def open_image(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header; SimpleITK's RuntimeError when there is none."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # SimpleITK (2.5.7) would end the process
        raise CaseError(f"{short(path)}: its path is not in UTF-8, expected one that is") from error
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def check_whole(path: Path, reader: sitk.ImageFileReader) -> None:
    """CaseError for a NIfTI file cut short, which SimpleITK (2.5.7) reads as zeros from there on, without a word."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return
    voxel_bytes = sitk.GetArrayViewFromImage(sitk.Image(1, 1, reader.GetPixelIDValue())).itemsize
    voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
    expected = int(float(reader.GetMetaData("vox_offset"))) + voxels * voxel_bytes
    length = 0
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        while block := file.read(2**22):  # to the end, where gzip checks its sum
            length += len(block)
    if length < expected:
        raise CaseError(f"{path.name}: is cut short at {length} of {expected} bytes, expected a whole file")


def read_image(path: Path) -> sitk.Image:
    """A 3-D image of one component. CaseError when it is another, or broken."""
    reader = read_grid(path)
    try:
        if reader.GetNumberOfComponents() != 1:
            raise CaseError(f"{short(path)} has {reader.GetNumberOfComponents()} components, expected one")
        check_whole(path, reader)
        image: sitk.Image = reader.Execute()
    except (RuntimeError, OSError, EOFError, zlib.error) as error:
        raise CaseError(f"{short(path)} cannot be read as an image") from error
    return image


def read_grid(path: Path) -> sitk.ImageFileReader:
    """The header of a 3-D image. CaseError when it is of another dimension, or there is none."""
    try:
        reader = open_image(path)
    except RuntimeError as error:
        raise CaseError(f"{short(path)} cannot be read as an image") from error
    if reader.GetDimension() != 3:
        raise CaseError(f"{short(path)} has the size {reader.GetSize()}, expected a 3-D image")
    return reader

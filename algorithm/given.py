"""Scans in the forms in which a program may pass them: paths, SimpleITK images, nibabel images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped

from .errors import InputError
from .files.images import Image, image_from, read_image
from .geometry import Grid

Given = str | os.PathLike[str] | sitk.Image | Any
"""A path (a file, or the folder of a DICOM series), a `SimpleITK.Image`, or an image of nibabel."""


def scan(given: Given, name: str) -> Image:
    """A scan with the same checks as one from a file; ``name`` stands for it in messages if it has no path."""
    if isinstance(given, str | os.PathLike):
        return read_image(Path(given))
    return image_from(*volume(given, name), name)


def volume(given: Given, name: str) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    """The values and the grid of an image in memory; InputError if it is not a 3-D image of one component."""
    if isinstance(given, sitk.Image):
        return _from_simpleitk(given, name)
    if hasattr(given, "dataobj") and hasattr(given, "affine"):
        return _from_nibabel(given, name)
    raise InputError(f"{name}: is a {type(given).__name__}, expected a path, a SimpleITK image or one of nibabel")


def _from_simpleitk(image: sitk.Image, name: str) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{name}: has size {image.GetSize()}, expected a 3-D image of one component")
    a, b, c = np.array(image.GetDirection()).reshape(3, 3).tolist()
    grid = Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), (tuple(a), tuple(b), tuple(c)))
    return sitk.GetArrayFromImage(image), grid


def _from_nibabel(image: Any, name: str) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    """As `_from_simpleitk`, for nibabel, whose world coordinates are RAS instead of LPS."""
    values = np.asanyarray(image.dataobj)
    if values.ndim < 3 or any(n != 1 for n in values.shape[3:]):
        raise InputError(f"{name}: has the shape {values.shape}, expected a 3-D image")
    values = values.reshape(values.shape[:3])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and spacing.min() > 0):
        raise InputError(f"{name}: has the affine {affine.tolist()}, expected one that places voxels")
    a, b, c = (affine[:3, :3] / spacing + 0.0).tolist()
    (nx, ny, nz), (sx, sy, sz), (x, y, z) = values.shape, spacing.tolist(), affine[:3, 3].tolist()
    return values.T, Grid((nx, ny, nz), (sx, sy, sz), (x, y, z), (tuple(a), tuple(b), tuple(c)))

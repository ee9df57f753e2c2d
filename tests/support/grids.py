"""Grids that are along no axis of the world, and SimpleITK images on them."""

import numpy as np
import SimpleITK as sitk

from algorithm.geometry import Grid, Matrix
from tests.support.strategies import as_matrix

ROTATION: Matrix = ((0.8, -0.6, 0.0), (0.48, 0.64, -0.6), (0.36, 0.48, 0.8))
"""About no axis of the world: swapped axes, a lost sign and a transposed matrix all show."""
OBLIQUE = Grid((11, 9, 10), (1.5, 0.75, 2.5), (-120.0, 33.0, 410.0), ROTATION)


def sitk_image(array: np.ndarray, grid: Grid) -> sitk.Image:
    """(z, y, x) as a scalar image, (z, y, x, 3) as vectors."""
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(np.ravel(grid.direction).tolist())
    return image


def blank(grid: Grid) -> sitk.Image:
    """Zeros."""
    return sitk_image(np.zeros(grid.shape, np.uint8), grid)


def noisy_field(grid: Grid, amplitude_mm: float = 3.0) -> sitk.Image:
    """Uniform random displacements, the same ones each time."""
    vectors = np.random.default_rng(0).uniform(-amplitude_mm, amplitude_mm, (*grid.shape, 3))
    return sitk_image(vectors.astype(np.float32), grid)


def grid_of(image: sitk.Image) -> Grid:
    """Where a 3-D image lies."""
    direction = np.reshape(image.GetDirection(), (3, 3))
    return Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), as_matrix(direction))

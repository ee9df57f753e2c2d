"""Target registration error: how far the field misses corresponding anatomical points."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float

from evaluation.errors import CaseError, short
from evaluation.fields import axes_of
from evaluation.images import Grid
from evaluation.tables import numbers, read_columns

COLUMNS = ("x", "y", "z")


@dataclass(frozen=True)
class LandmarkErrors:
    """Distances in mm, one per landmark: before, and after registration by two definitions."""

    initial_mm: Float[np.ndarray, " n"]
    """|x_fixed - x_moving|."""
    trilinear_mm: Float[np.ndarray, " n"]
    """|x_fixed + u(x_fixed) - x_moving|, u trilinear."""
    snapped_mm: Float[np.ndarray, " n"]
    """The same with x_fixed + u(x_fixed) moved to the nearest voxel centre of the moving grid.

    Most DIR-Lab figures in the literature are of this kind, whose landmarks are voxel centres. It is mostly smaller
    where the error is below a voxel, so the two must not be compared.
    """


def read_landmarks(path: Path) -> Float[np.ndarray, "n 3"]:
    """World positions (mm, LPS): the columns x, y, z of a CSV file with a header line. CaseError when it is another."""
    points: np.ndarray = np.stack([numbers(path, cells) for cells in read_columns(path, COLUMNS)], axis=1)
    if len(points) == 0:
        raise CaseError(f"{short(path)}: holds 0 landmarks, expected positions in mm")
    return points


def landmark_errors(
    field: sitk.Image,
    fixed_mm: Float[np.ndarray, "n 3"],
    moving_mm: Float[np.ndarray, "m 3"],
    moving: Grid | None = None,
) -> LandmarkErrors:
    """The errors of corresponding landmarks, row by row.

    ``moving`` is the moving grid, for the snapping, by default that of the field; it goes on without end. Up to half a
    voxel outside the field its border value holds. CaseError when landmarks lie farther out, or the numbers of
    landmarks differ.
    """
    if len(fixed_mm) != len(moving_mm):
        raise CaseError(f"{len(fixed_mm)} fixed and {len(moving_mm)} moving landmarks, expected as many")
    mapped = fixed_mm + displacement_at(field, fixed_mm)
    grid = field if moving is None else moving
    axes, origin = axes_of(grid), np.array(grid.GetOrigin())
    voxel = np.rint((mapped - origin) @ np.linalg.inv(axes).T)
    return LandmarkErrors(
        np.linalg.norm(fixed_mm - moving_mm, axis=1),
        np.linalg.norm(mapped - moving_mm, axis=1),
        np.linalg.norm(voxel @ axes.T + origin - moving_mm, axis=1),
    )


def displacement_at(field: sitk.Image, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """u (mm) at world points (mm), trilinear in float64. CaseError as in `landmark_errors`."""
    size = np.array(field.GetSize())
    index = (points_mm - np.array(field.GetOrigin())) @ np.linalg.inv(axes_of(field)).T
    outside = np.flatnonzero((np.maximum(-index, index - (size - 1)) > 0.5 + 1e-6).any(axis=1))
    if len(outside):
        numbers = ", ".join(str(n + 1) for n in outside[:5]) + (" …" if len(outside) > 5 else "")
        raise CaseError(
            f"{len(outside)} of {len(index)} fixed landmarks (number {numbers}) lie outside the displacement field, "
            "expected none"
        )
    vectors = sitk.GetArrayViewFromImage(field)
    index = np.clip(index, 0, size - 1)
    low = np.minimum(index.astype(int), np.maximum(size - 2, 0))
    part = index - low
    values = np.zeros(index.shape)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=1)
        x, y, z = np.minimum(low + corner, size - 1).T
        values += weight[:, None] * vectors[z, y, x]
    return values

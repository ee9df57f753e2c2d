"""Sentences on unusual findings in a case that can be evaluated, for metrics.json and the page."""

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from scipy.spatial import KDTree

from .fields import axes_of
from .ground_truth import GroundTruth
from .images import Grid
from .landmarks import LandmarkErrors, displacement_at, outside

HARDLY = 0.9
"""An error after registration of at least this share of the error before gets a remark."""


def remarks(field: sitk.Image, truth: GroundTruth, errors: LandmarkErrors | None) -> list[str]:
    """Sentences on unusual findings, if there are any.

    They report labels that only one scan has; labels or landmarks outside the field; landmarks outside their scan; a
    mean landmark error after registration that is hardly smaller than before (`HARDLY`), with a change that would halve
    it.
    """
    found = [f"label {label} is only in {where}: null, in none of the means" for label, where in truth.lone_labels]
    if errors is None and truth.fixed_labels is None:
        found.append("there are neither landmarks nor lobes: only the field's foldings and volume changes are measured")
    found += _labels_outside(field, truth)
    fixed_mm, moving_mm = truth.fixed_landmarks_mm, truth.moving_landmarks_mm
    if errors is None or fixed_mm is None or moving_mm is None:
        return found
    found += _outside(fixed_mm, field, "fixed landmarks", "the displacement field, where it counts as zero")
    found += _outside(fixed_mm, truth.fixed_grid, "fixed landmarks", "the fixed scan")
    where = "the moving scan" if truth.moving_scan_known else "the fixed scan (the ground truth has no moving one)"
    found += _outside(moving_mm, truth.moving_grid, "moving landmarks", where)
    before_mm, after_mm = errors.initial_mm.mean(), errors.trilinear_mm.mean()
    if after_mm >= HARDLY * before_mm and after_mm > 0:
        hint = _hint(fixed_mm + displacement_at(field, fixed_mm), moving_mm, truth.moving_grid, float(after_mm))
        found.append(f"TRE is {after_mm:.2f} mm, hardly smaller than the {before_mm:.2f} mm before{hint}")
    return found


def _outside(points_mm: Float[np.ndarray, "n 3"], grid: Grid | None, what: str, where: str) -> list[str]:
    number = 0 if grid is None else int(outside(grid, points_mm).sum())
    return [f"{number} of {len(points_mm)} {what} lie outside {where}"] if number else []


def _labels_outside(field: sitk.Image, truth: GroundTruth) -> list[str]:
    """Remarks on voxels of the fixed labels where the field counts as zero."""
    if truth.fixed_labels is None:
        return []
    zyx = np.argwhere(sitk.GetArrayViewFromImage(truth.fixed_labels))
    corners = np.array(list(np.ndindex(2, 2, 2))) * np.ptp(zyx, axis=0) + zyx.min(axis=0)
    place, origin = axes_of(truth.fixed_labels), np.array(truth.fixed_labels.GetOrigin())
    if not outside(field, corners[:, ::-1] @ place.T + origin).any():  # the box around the labels is inside
        return []
    number = int(outside(field, zyx[:, ::-1] @ place.T + origin).sum())
    share = 100 * number / len(zyx)
    where = "lie outside the displacement field, where it counts as zero"
    return [f"{share:.2g} % of the voxels of fixed_lobes {where}"] if number else []


def _hint(
    mapped_mm: Float[np.ndarray, "n 3"], moving_mm: Float[np.ndarray, "n 3"], grid: Grid | None, after_mm: float
) -> str:
    """A sentence on another interpretation of the moving landmarks that would more than halve the error."""
    readings = {"RAS, not LPS": moving_mm * [-1, -1, 1]}
    if grid is not None:
        readings["voxel indices, not mm"] = moving_mm @ axes_of(grid).T + np.array(grid.GetOrigin())
    nearest = KDTree(moving_mm).query(mapped_mm)[1]
    if len(np.unique(nearest)) > 0.5 * len(nearest):  # else the order of rows is not the cause
        readings["in another order of rows"] = moving_mm[nearest]
    errors_mm = {name: np.linalg.norm(mapped_mm - points, axis=1).mean() for name, points in readings.items()}
    best = min(errors_mm, key=lambda name: errors_mm[name])
    if errors_mm[best] > 0.5 * after_mm:
        return ""
    return f"; it would be {errors_mm[best]:.2f} mm if the moving landmarks were {best}"

"""The values of a failed case in statistics over all cases, so that failing on a hard case is no advantage.

Landmarks and labels have the values without registration (displacement zero), or their own values if these are worse:
the error of each landmark, the overlap and the surfaces of each label. Folding has its own value, or 100 % without a
readable field; SDlogJ is then the worst value of any compared case (`counted_values`). A case whose ground truth cannot
be used is not counted, because this is not the method's fault.
"""

import numpy as np
import SimpleITK as sitk

from .cases import Case
from .errors import CaseError
from .fields import axes_of, read_field
from .ground_truth import GroundTruth, check_ground_truth, mask_on, read_ground_truth
from .jacobian import jacobian_statistics
from .labels import dice, warp_labels
from .landmarks import LandmarkErrors, landmark_errors, unregistered_errors
from .quantities import QUANTITIES
from .surfaces import SurfaceDistances, distances_between, surface_distances, surface_points

JACOBIAN = ("folding_percent", "folding_percent_all", "jacobian_min", "jacobian_max", "std_log_jacobian")


def nothing_counted() -> dict[str, float | None]:
    """The entry of a case that is not counted."""
    return {quantity.key: None for quantity in QUANTITIES}


def counted_as_failed(case: Case) -> dict[str, float | None]:
    """The counted values of a failed case, by quantity; None where there is no ground truth."""
    counted = nothing_counted()
    try:
        truth = read_ground_truth(case.ground_truth)
        check_ground_truth(truth)
    except (CaseError, OSError):
        return counted
    field = _field(case, truth)
    return counted | _landmarks(field, truth) | _labels(field, truth) | _jacobian(field, truth)


def _field(case: Case, truth: GroundTruth) -> sitk.Image | None:
    if case.error or case.field is None:
        return None
    try:
        return read_field(case.field, truth.fixed_grid, truth.moving_grid)
    except (CaseError, OSError):
        return None


def _landmarks(field: sitk.Image | None, truth: GroundTruth) -> dict[str, float | None]:
    fixed_mm, moving_mm = truth.fixed_landmarks_mm, truth.moving_landmarks_mm
    if fixed_mm is None or moving_mm is None:
        return {}
    before = after = unregistered_errors(fixed_mm, moving_mm, truth.moving_grid)
    if field is not None:
        after = _own_errors(field, fixed_mm, moving_mm, truth) or before
    return {
        "tre_mm": float(max(before.trilinear_mm.mean(), after.trilinear_mm.mean())),
        "tre_snapped_mm": float(max(before.snapped_mm.mean(), after.snapped_mm.mean())),
        "tre_initial_mm": float(before.initial_mm.mean()),
    }


def _own_errors(
    field: sitk.Image, fixed_mm: np.ndarray, moving_mm: np.ndarray, truth: GroundTruth
) -> LandmarkErrors | None:
    try:
        return landmark_errors(field, fixed_mm, moving_mm, truth.moving_grid)
    except CaseError:
        return None


def _labels(field: sitk.Image | None, truth: GroundTruth) -> dict[str, float | None]:
    """The means over the labels, with the worse of the values before and after for each label."""
    fixed, moving = truth.fixed_labels, truth.moving_labels
    if fixed is None or moving is None:
        return {}
    zero = sitk.Image(fixed.GetSize(), sitk.sitkVectorFloat32, 3)
    zero.CopyInformation(fixed)
    voxels, moving_voxels = sitk.GetArrayViewFromImage(fixed), sitk.GetArrayViewFromImage(moving)
    before, after = (warp_labels(moving, u, fixed) for u in (zero, zero if field is None else field))
    overlaps, distances = [], []
    for label in truth.labels:
        overlaps.append(min(dice(voxels, warped, label) or 0.0 for warped in (before, after)))
        surfaces = [_apart(voxels == label, fixed, moving_voxels == label, moving)]
        own = surface_distances(voxels == label, after == label, axes_of(fixed))
        distances.append(np.max([[d.asd_mm, d.hd_mm, d.hd95_mm] for d in (*surfaces, own) if d], axis=0))
    means = dict(zip(("asd_mm", "hd_mm", "hd95_mm"), np.mean(distances, axis=0).tolist(), strict=True))
    return {"dice": float(np.mean(overlaps)), **means}


def _apart(x: np.ndarray, fixed: sitk.Image, y: np.ndarray, moving: sitk.Image) -> SurfaceDistances | None:
    """Distances between two masks in world coordinates, each on its own grid, also if these grids do not overlap."""
    points = [surface_points(m, axes_of(grid)) + grid.GetOrigin() for m, grid in ((x, fixed), (y, moving))]
    return distances_between(*points)


def _jacobian(field: sitk.Image | None, truth: GroundTruth) -> dict[str, float | None]:
    lost = {} if truth.lungs is None else {"folding_percent": 100.0}
    if field is None:
        return dict(lost)
    try:
        statistics = jacobian_statistics(field, None if truth.lungs is None else mask_on(field, truth.lungs))
    except CaseError:
        return dict(lost)
    return {name: getattr(statistics, name) for name in JACOBIAN}

"""Evaluates one case, then all cases, and writes the output folder. Each metric has its own module."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Float

from .cases import Case, images_in
from .errors import CaseError, printable
from .failures import JACOBIAN, counted_as_failed, nothing_counted
from .fields import EMPIRE10, axes_of, is_transform, npz_header, read_field
from .ground_truth import GroundTruth, check_ground_truth, mask_on, read_ground_truth
from .images import open_image
from .jacobian import jacobian_statistics
from .labels import dice, warp_labels
from .landmarks import LandmarkErrors, landmark_errors
from .quantities import QUANTITIES, counted_values, worst30
from .remarks import remarks
from .surfaces import surface_distances
from .tables import cases_table, write_csv, write_json
from .workers import each, workers_for

log = logging.getLogger(__name__)

Result = dict[str, Any]

TRE = ("tre_mm", "tre_snapped_mm", "tre_initial_mm")
BY_LABEL = ("dice", "asd_mm", "hd_mm", "hd95_mm")
METRICS = (*TRE, *BY_LABEL, *JACOBIAN)
SUMMARY: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean,
    "std": np.std,
    "median": np.median,
    "p75": lambda values: np.percentile(values, 75),
    "p95": lambda values: np.percentile(values, 95),
    "max": np.max,
}
"""Statistics of a case's landmark errors. The standard deviation divides by n."""
LOW_IS_BAD = ("dice", "jacobian_min")
LANDMARKS = ("case", "landmark", "fixed_x", "fixed_y", "fixed_z", "moving_x", "moving_y", "moving_z", *TRE)
BYTES_PER_VOXEL = 40
"""Memory for a case, per voxel of the largest of field and labels: measured 28, plus a reserve."""


# --- one case --------------------------------------------------------------------------------------------------------


def evaluate_case(case: Case) -> tuple[Result, pd.DataFrame]:
    """The case's entry in metrics.json, and its landmarks (mm, numbered from 1).

    Values without ground truth are None, and so is a label that only one scan has. If a file of the case is missing or
    broken, or a label has no voxels after the warp, everything except ``error`` and ``counted`` is None: a case counts
    in full, or it counts as failed. ``counted`` has one value per quantity for statistics over all cases: the value of
    the case, or that of a failed case (`failures.py`). ``remarks`` are sentences on unusual findings (`remarks.py`).
    """
    try:
        truth, field = read_case(case)
        check_ground_truth(truth)
        errors = _landmark_errors(field, truth)
        landmarks = _landmark_table(case.name, truth, errors)
        result: Result = {"case": case.name}
        result |= {name: _summary(landmarks[name].to_numpy(float)) for name in TRE}
        result |= _label_metrics(field, truth)
        result |= _jacobian_metrics(field, truth)
        _check_finite(result)
        counted = {quantity.key: quantity.of(result) for quantity in QUANTITIES}
        found = remarks(field, truth, errors)
        return {**result, "counted": counted, "remarks": found, "error": None}, landmarks
    except CaseError as error:
        return failed_result(case.name, printable(str(error)), counted_as_failed(case)), _no_landmarks()


def read_case(case: Case) -> tuple[GroundTruth, sitk.Image]:
    """The ground truth and the field (mm, LPS). CaseError if one of the files is missing or broken."""
    if case.error or case.field is None:
        raise CaseError(case.error or "there is no displacement field")
    try:
        truth = read_ground_truth(case.ground_truth)
        return truth, read_field(case.field, truth.fixed_grid, truth.moving_grid)
    except OSError as error:
        raise CaseError(f"{error.filename or case.name}: cannot be read ({error.strerror})") from error


def failed_result(case: str, error: str, counted: dict[str, float | None] | None = None) -> Result:
    """The entry of a case that could not be evaluated: one sentence with the reason, and the values that it counts
    with."""
    tre = {name: dict.fromkeys(SUMMARY) for name in TRE}
    by_label = {name: {"mean": None} for name in BY_LABEL}
    ends = {"counted": nothing_counted() if counted is None else counted, "remarks": [], "error": error}
    return {"case": case, **tre, **by_label, **dict.fromkeys(JACOBIAN), **ends}


def _no_landmarks() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=float) for name in LANDMARKS})


def _landmark_errors(field: sitk.Image, truth: GroundTruth) -> LandmarkErrors | None:
    if truth.fixed_landmarks_mm is None or truth.moving_landmarks_mm is None:
        return None
    return landmark_errors(field, truth.fixed_landmarks_mm, truth.moving_landmarks_mm, truth.moving_grid)


def _landmark_table(case: str, truth: GroundTruth, errors: LandmarkErrors | None) -> pd.DataFrame:
    fixed_mm, moving_mm = truth.fixed_landmarks_mm, truth.moving_landmarks_mm
    if fixed_mm is None or moving_mm is None or errors is None:
        return _no_landmarks()
    numbers = np.arange(1, len(fixed_mm) + 1)
    errors_mm = (errors.trilinear_mm, errors.snapped_mm, errors.initial_mm)
    columns = ([case] * len(fixed_mm), numbers, *fixed_mm.T, *moving_mm.T, *errors_mm)
    return pd.DataFrame(dict(zip(LANDMARKS, columns, strict=True)))


def _summary(values: Float[np.ndarray, " n"]) -> dict[str, float | None]:
    return {name: float(of(values)) if len(values) else None for name, of in SUMMARY.items()}


def _label_metrics(field: sitk.Image, truth: GroundTruth) -> Result:
    """For each metric, the value of each label, by its number, and their mean; None for labels that only one scan
    has."""
    values: dict[str, dict[str, float | None]] = {name: {} for name in BY_LABEL}
    if truth.fixed_labels is None or truth.moving_labels is None:
        return {name: {"mean": None} for name in BY_LABEL}
    fixed = sitk.GetArrayViewFromImage(truth.fixed_labels)
    lone = [label for label, _ in truth.lone_labels]
    warped = warp_labels(truth.moving_labels, field, truth.fixed_labels)
    axes = axes_of(truth.fixed_labels)
    for label in sorted([*truth.labels, *lone]):
        if label in lone:
            for of in values.values():
                of[str(label)] = None
            continue
        overlap = dice(fixed, warped, label)
        distances = surface_distances(fixed == label, warped == label, axes)
        if overlap is None or distances is None:
            raise CaseError(f"label {label} has no voxels left in moving_lobes after the warp")
        for name, value in zip(BY_LABEL, (overlap, distances.asd_mm, distances.hd_mm, distances.hd95_mm), strict=True):
            values[name][str(label)] = float(value)
    known = {name: [value for value in of.values() if value is not None] for name, of in values.items()}
    return {name: {**of, "mean": float(np.mean(known[name]))} for name, of in values.items()}


def _jacobian_metrics(field: sitk.Image, truth: GroundTruth) -> Result:
    statistics = jacobian_statistics(field, None if truth.lungs is None else mask_on(field, truth.lungs))
    values = {name: getattr(statistics, name) for name in JACOBIAN}
    return {name: None if value is None else float(value) for name, value in values.items()}


def _check_finite(result: Result) -> None:
    for name in METRICS:
        values = result[name].values() if isinstance(result[name], dict) else [result[name]]
        bad = [value for value in values if value is not None and not math.isfinite(value)]
        if bad:
            raise CaseError(f"{name} is {bad[0]}, expected a finite number")


# --- all cases -------------------------------------------------------------------------------------------------------


def aggregate(results: Sequence[Result]) -> dict[str, Any]:
    """Statistics of each metric over the cases that have it: their number n, mean, std (dividing by n), median, min,
    max, and worst30, the mean of the 30 % worst cases (rounded up; Dice30 of section 4.5 in Hering et al. 2021).

    Each case gives one value; for landmarks and labels, it is their mean. ``failed`` cases are not included.
    """
    aggregates: dict[str, Any] = {}
    for quantity in QUANTITIES:
        of_cases = [quantity.of(result) for result in results if not result.get("error")]
        values = np.array([value for value in of_cases if value is not None], float)
        aggregates[quantity.key] = _statistics(values, quantity.key in LOW_IS_BAD)
    return {**aggregates, **_numbers(results)}


def aggregate_all(results: Sequence[Result]) -> dict[str, Any]:
    """As `aggregate`, over all cases, including the ``failed`` ones with their counted values (`failures.py`)."""
    aggregates: dict[str, Any] = {}
    for quantity in QUANTITIES:
        (values,) = counted_values(quantity, results)
        aggregates[quantity.key] = _statistics(values[~np.isnan(values)], quantity.key in LOW_IS_BAD)
    return {**aggregates, **_numbers(results)}


def _numbers(results: Sequence[Result]) -> dict[str, int]:
    return {"cases": len(results), "failed": sum(bool(result.get("error")) for result in results)}


def _statistics(values: Float[np.ndarray, " n"], low_is_bad: bool) -> dict[str, float | int | None]:
    if not len(values):
        return {"n": 0, **dict.fromkeys(("mean", "std", "median", "min", "max", "worst30"))}
    figures = {"mean": values.mean(), "std": values.std(), "median": np.median(values)}
    figures |= {"min": values.min(), "max": values.max(), "worst30": worst30(values, low_is_bad).mean()}
    return {"n": len(values), **{name: float(value) for name, value in figures.items()}}


def evaluate(cases: Sequence[Case], out: Path, workers: int | None = None) -> tuple[Result, pd.DataFrame]:
    """Evaluate the cases in parallel and write metrics.json, cases.csv and landmarks.csv to ``out``, in the order of
    the cases.

    By default, cores and memory determine the number of workers. Returns the content of metrics.json and landmarks.csv.
    """
    if workers is None:
        workers = workers_for(max(map(_case_bytes, cases)), len(cases))
    log.info("%d at a time", workers)
    done: dict[int, tuple[Result, pd.DataFrame]] = {}
    start = time.monotonic()
    for number, outcome in each(evaluate_case, cases, workers):
        if isinstance(outcome, Exception):
            log.error("%s", cases[number].name, exc_info=outcome)
            sentence = " ".join(f"the evaluation failed: {type(outcome).__name__}: {outcome}".split())
            outcome = _without_field(cases[number], sentence)
        done[number] = outcome
        log.info("%d/%d %s, %.0f s", len(done), len(cases), _line(outcome[0]), time.monotonic() - start)

    results = [done[number][0] for number in range(len(cases))]
    tables = [table for _, table in (done[number] for number in range(len(cases))) if len(table)]
    metrics = {"results": results, "aggregates": aggregate(results), "aggregates_all": aggregate_all(results)}
    landmarks = pd.concat(tables, ignore_index=True) if tables else _no_landmarks()
    write_csv(out / "cases.csv", cases_table(results))
    write_csv(out / "landmarks.csv", landmarks)
    write_json(out / "metrics.json", metrics)  # last: its presence means that all files are complete
    return metrics, landmarks


def _without_field(case: Case, error: str) -> tuple[Result, pd.DataFrame]:
    """The counted values of a case whose evaluation crashed, computed again in a separate process."""
    for _, outcome in each(evaluate_case, [replace(case, field=None, error=error)], 1):
        if not isinstance(outcome, Exception):
            return outcome
    return failed_result(case.name, error), _no_landmarks()


def _line(result: Result) -> str:
    """A result as one line for the log."""
    if result["error"]:
        return f"{result['case']}: failed: {result['error']}"
    figures = {"TRE %.2f mm": result["tre_mm"]["mean"], "Dice %.3f": result["dice"]["mean"]}
    figures["folding %.4f %%"] = result["folding_percent"]
    known = [text % value for text, value in figures.items() if value is not None]
    return f"{result['case']}: " + ", ".join([*known, *(f"remark: {remark}" for remark in result["remarks"])])


def _case_bytes(case: Case) -> int:
    """An estimate of the memory for a case, from the headers of its images; unreadable images count as 0."""
    try:
        files = [*images_in(case.ground_truth)]
        if case.field is not None:
            files.append(case.field / EMPIRE10[0] if case.field.is_dir() else case.field)
    except OSError:
        return 0
    return BYTES_PER_VOXEL * max((_voxels(path) for path in files), default=0)


def _voxels(path: Path) -> int:
    try:
        if path.name.endswith(".npz"):
            return math.prod(npz_header(path)[0]) // 3
        if is_transform(path):
            return path.stat().st_size // 12  # float64 vectors, which are twice in memory here
        return math.prod(open_image(path).GetSize()[:3])
    except (OSError, RuntimeError, ValueError, BadZipFile):
        return 0

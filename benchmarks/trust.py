"""Is what went wrong warned of, and what went well not? Pairs, turned and cut ones, and scans of different patients.

    python -m benchmarks.trust PAIR... [--variants NAME...] [--refine NAME...] [--wrong] [--out TABLE.csv]

PAIR is a folder as for `benchmarks.landmarks`. Every pair is registered as it is, with the moving scan turned, with
either scan cut, and with the moving scan of the next pair; each with the refinement off, fast and full. With --wrong,
what `benchmarks.wrong_inputs` makes of each is registered instead.

Where a folder holds fixed_landmarks_dense.csv and moving_landmarks_dense.csv, these are the truth: places that a
program found in both scans, without an observer's error; ``observed_mm`` is the mean error at the other landmarks then.
``expected_mm`` and ``true_mm`` are means over the landmarks at which there is an expected error.
A result is bad where the mean error of its landmarks (those that both scans show) is above 3 mm, or more than 5 % of
them are beyond 5 mm; scans of different patients are always bad. Prints a row for each result, its warnings, then how
many were bad and good, and how many of those were warned of.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from algorithm.cascade.weights import LoadedCascade, find_weights, load_cascade
from algorithm.errors import InputError
from algorithm.fields.expected_error import LARGE_MM, ExpectedError
from algorithm.fields.transform import Transform
from algorithm.files.images import Image, read_image
from algorithm.geometry import displacement_at
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import find_both_lungs
from algorithm.registration import REFINE, checked_transform, doubted, estimate, predict, refined
from algorithm.report import Report
from benchmarks.invariance import VARIANTS, Placed, same, shown
from benchmarks.landmarks import landmarks_mm
from benchmarks.wrong_inputs import wrong_inputs
from evaluation.landmarks import read_landmarks
from training.expected_error import judged, summary

CHOSEN = (
    "moving turned 25°",
    "moving turned 80°",
    "moving prone",
    "moving without lower half",
    "fixed without lower half",
    "moving without left half",
    "fixed without left half",
)
FIGURES = (
    "ngf_distance", "local_correlation_distance", "lung_dice", "outside_field_of_view", "inconsistency_mm",
    "inconsistency_p95_mm",
)  # fmt: skip
BAD_MEAN_MM, FAR_MM, BAD_SHARE_FAR = 3.0, 5.0, 0.05
CPU = torch.device("cpu")

Row = dict[str, float | str | bool]
Pairs = tuple[np.ndarray, np.ndarray]
"""Fixed and moving landmarks (mm), each (n, 3)."""


class Trial(NamedTuple):
    """Two scans, and their landmarks (n, 3) where they show the same patient."""

    name: str
    fixed: Image
    moving: Image
    landmarks: Pairs | None
    observed: Pairs | None = None
    """Those that people placed, where ``landmarks`` are others."""
    masks: tuple[Path | None, Path | None] = (None, None)
    undone: Callable[[np.ndarray], np.ndarray] | None = None
    """From the moving scan to the world of its landmarks."""


def trials(folders: list[Path], variants: list[str]) -> Iterator[Trial]:
    """All that is registered."""
    for folder, other in zip(folders, [*folders[1:], folders[0]], strict=True):
        images = pair_images(folder)
        for name in ("as it is", *variants):
            changes = VARIANTS.get(name, (same, same))
            here, there = (change(image) for change, image in zip(changes, images, strict=True))
            known, observed = (pairs and seen(pairs, here, there) for pairs in all_landmarks(folder))
            yield Trial(f"{folder.name}, {name}", here.image, there.image, known, observed)
        if len(folders) > 1:
            yield Trial(f"{folder.name}, moving of {other.name}", images[0], pair_images(other)[1], None)


def wrong_trials(folders: list[Path], masks: Path) -> Iterator[Trial]:
    """The same of wrong inputs; ``masks`` is a folder for some."""
    for folder in folders:
        landmarks, _ = all_landmarks(folder)
        for wrong in wrong_inputs(*pair_images(folder), masks):
            known = landmarks[::-1] if wrong.swapped and landmarks else landmarks
            name = f"{folder.name}, {wrong.name}"
            yield Trial(name, wrong.fixed, wrong.moving, known, None, wrong.masks, wrong.undone)


def pair_images(folder: Path) -> tuple[Image, Image]:
    """The scans of a pair."""
    return read_image(folder / "fixed.mha"), read_image(folder / "moving.mha")


def all_landmarks(folder: Path) -> tuple[Pairs | None, Pairs | None]:
    """The dense ones where there are any, and then those that people placed; else those."""
    paths = [folder / f"{role}_landmarks_dense.csv" for role in ("fixed", "moving")]
    if not all(path.exists() for path in paths):
        return landmarks_mm(folder), None
    return (read_landmarks(paths[0]), read_landmarks(paths[1])), landmarks_mm(folder)


def seen(landmarks: Pairs, fixed: Placed, moving: Placed) -> Pairs:
    """Where they lie now, those that both scans show."""
    here, there = (scan.world(points) for scan, points in zip((fixed, moving), landmarks, strict=True))
    both = shown(here, fixed.image.grid) & shown(there, moving.image.grid)
    return here[both], there[both]


def results(trial: Trial, weights: LoadedCascade, refinements: list[str]) -> Iterator[Row]:
    """A row for each refinement, or the one of a refusal."""
    try:
        fixed, moving = find_both_lungs(trial.fixed, trial.masks[0], trial.moving, trial.masks[1])
        pair = prepare(fixed, moving, weights.cascade.settings.network_size)
    except InputError as error:
        yield Row(trial=trial.name, refused=str(error))
        return
    start = predict(pair, weights.cascade, CPU, Report())
    assert weights.errors is not None
    for name in refinements:
        model = weights.errors.of(name)
        if name == "off":
            result = doubted(fixed, moving, pair, start, CPU)
        else:
            result = refined(fixed, moving, pair, start, REFINE[name], model, CPU)
        report = Report()
        for remark in (*fixed.image.remarks, *moving.image.remarks):
            report.warn(remark)
        transform = checked_transform(pair, fixed, moving, result, report)
        expected = estimate(pair, moving, result, model, report)
        assert expected is not None
        yield Row(trial=trial.name, refine=name) | said(report) | true(trial, transform, expected)


def said(report: Report) -> Row:
    """What the result says of itself."""
    values = report.to_dict()
    after, error = values["quality"]["after"], values["expected_error"]
    figures = {name: after.get(name, float("nan")) for name in FIGURES}
    sentences = "\n".join(values["warnings"])
    figures |= {f"expected_{name}": v for name, v in error.items()}
    return Row(warnings=len(values["warnings"]), sentences=sentences) | figures


def true(trial: Trial, transform: Transform, expected: ExpectedError) -> Row:
    """What the landmarks say: the error, and how well the expected one fits where there is one."""
    if trial.landmarks is None:
        return Row(mean_mm=float("nan"), far=float("nan"), bad=True)
    error, at = errors(trial, transform, trial.landmarks), expected.at_points(trial.landmarks[0])
    told, mean, far = at >= 0, float(error.mean()), float((error > FAR_MM).mean())
    return Row(
        mean_mm=mean,
        far=far,
        bad=mean > BAD_MEAN_MM or far > BAD_SHARE_FAR,
        beyond_3mm=float((error > LARGE_MM).mean()),
        observed_mm=float(errors(trial, transform, trial.observed).mean()) if trial.observed else float("nan"),
    ) | judged(at[told], error[told])


def errors(trial: Trial, transform: Transform, landmarks: Pairs) -> np.ndarray:
    """Distances (mm) of the mapped fixed landmarks from the moving ones, (n,)."""
    here, there = landmarks
    points = torch.from_numpy(np.ascontiguousarray(here))
    mapped = transform.affine(here + displacement_at(points, transform.displacement, transform.grid).numpy())
    distance: np.ndarray = np.linalg.norm((trial.undone(mapped) if trial.undone else mapped) - there, axis=1)
    return distance


def print_summary(table: pd.DataFrame) -> None:
    """How many were bad, and warned of; how near the expected error comes to the true one."""
    table = table.assign(warned=table.warnings > 0)
    print(table.groupby(["refine", "bad"], sort=False).warned.agg(results="size", warned="sum").to_string())
    known = table.dropna(subset=["mean_mm"])
    columns = {str(name): summary(rows) for name, rows in known.groupby("refine", sort=False)}
    print(pd.DataFrame(columns).round(3).to_string())


def print_rows(rows: list[Row]) -> None:
    """One trial's, and what was said."""
    table = pd.DataFrame(rows)
    shown = table.drop(columns=[name for name in ("sentences", "refused") if name in table])
    print(shown.to_string(index=False, float_format=lambda v: f"{v:.3f}"), flush=True)
    for row in rows:
        for sentence in str(row.get("sentences") or row.get("refused") or "").splitlines():
            print(f"    {row.get('refine', 'refused')}: {sentence}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(CHOSEN), metavar="NAME")
    parser.add_argument("--refine", nargs="+", choices=["off", *REFINE], default=["off", *REFINE])
    parser.add_argument("--wrong", action="store_true", help="wrong inputs instead")
    parser.add_argument("--out", type=Path, help="all rows as CSV")
    arguments = parser.parse_args()
    weights = load_cascade(find_weights(None))
    rows: list[Row] = []
    with TemporaryDirectory() as masks:
        wrong, folders = arguments.wrong, arguments.pairs
        for trial in wrong_trials(folders, Path(masks)) if wrong else trials(folders, arguments.variants):
            new = list(results(trial, weights, arguments.refine))
            print_rows(new)
            rows += new
            if arguments.out:
                pd.DataFrame(rows).to_csv(arguments.out, index=False)
    if not arguments.wrong:
        print_summary(pd.DataFrame(rows))


if __name__ == "__main__":
    main()

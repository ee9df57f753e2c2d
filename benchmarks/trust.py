"""Is what went wrong warned of, and what went well not? Pairs, turned and cut ones, and scans of different patients.

    python -m benchmarks.trust PAIR... [--out TABLE.csv]

PAIR is a folder as for `benchmarks.landmarks`. Every pair is registered as it is, with the moving scan turned, with
either scan cut, and with the moving scan of the next pair; each with the refinement off, fast and full. A result is bad
where the mean error of its landmarks (those that both scans show) is above 3 mm, or more than 5 % of them are beyond
5 mm; scans of different patients are always bad. Prints a row for each result, then how many were bad and good, and how
many of those were warned of.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import mannwhitneyu

from algorithm.cascade.weights import LoadedCascade, find_weights, load_cascade
from algorithm.fields.expected_error import LARGE_MM, ExpectedError
from algorithm.fields.transform import Transform
from algorithm.files.images import read_image
from algorithm.geometry import displacement_at
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import find_lungs
from algorithm.registration import REFINE, checked_transform, estimate, predict, refined
from algorithm.report import Report
from benchmarks.invariance import VARIANTS, Placed, same, shown
from benchmarks.landmarks import landmarks_mm

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
LEAST_LARGE = 0.03
"""Of the landmarks beyond 3 mm: with fewer there is no curve to take the area under."""
MOST_OFF = 0.3

Row = dict[str, float | str | bool]


class Trial(NamedTuple):
    """Two scans, and their landmarks (n, 3) where they show the same patient."""

    name: str
    fixed: Placed
    moving: Placed
    landmarks: tuple[np.ndarray, np.ndarray] | None


def trials(folders: list[Path]) -> Iterator[Trial]:
    """All that is registered."""
    for folder, other in zip(folders, [*folders[1:], folders[0]], strict=True):
        images = [read_image(folder / f"{name}.mha") for name in ("fixed", "moving")]
        for name in ("as it is", *CHOSEN):
            changes = VARIANTS.get(name, (same, same))
            here, there = (change(image) for change, image in zip(changes, images, strict=True))
            yield Trial(f"{folder.name}, {name}", here, there, seen_landmarks(folder, here, there))
        if len(folders) > 1:
            stranger = same(read_image(other / "moving.mha"))
            yield Trial(f"{folder.name}, moving of {other.name}", same(images[0]), stranger, None)


def seen_landmarks(folder: Path, fixed: Placed, moving: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Where they lie now, those that both scans show."""
    here, there = (scan.world(points) for scan, points in zip((fixed, moving), landmarks_mm(folder), strict=True))
    seen = shown(here, fixed.image.grid) & shown(there, moving.image.grid)
    return here[seen], there[seen]


def results(trial: Trial, weights: LoadedCascade) -> Iterator[Row]:
    """A row for each refinement."""
    fixed, moving = (find_lungs(scan.image, None) for scan in (trial.fixed, trial.moving))
    pair = prepare(fixed, moving, weights.cascade.settings.network_size)
    start = predict(pair, weights.cascade, torch.device("cpu"), Report(), backwards=True)
    assert weights.errors is not None
    for name in ("off", *REFINE):
        result, model = start, weights.errors.cascade
        if name != "off":
            model = weights.errors.refined
            result = refined(fixed, moving, pair, start, REFINE[name], model, torch.device("cpu"))
        report = Report()
        transform = checked_transform(pair, moving, result, report)
        expected = estimate(pair, moving, result, model, report)
        assert expected is not None
        yield Row(trial=trial.name, refine=name) | said(report) | true(trial, transform, expected)


def said(report: Report) -> Row:
    """What the result says of itself."""
    values = report.to_dict()
    after, error = values["quality"]["after"], values["expected_error"]
    figures = {name: after.get(name, float("nan")) for name in FIGURES}
    return Row(warnings=len(values["warnings"])) | figures | {f"expected_{name}": v for name, v in error.items()}


def true(trial: Trial, transform: Transform, expected: ExpectedError) -> Row:
    """What the landmarks say: the error, the expected one at them, and how well the latter finds those beyond 3 mm."""
    if trial.landmarks is None:
        return Row(mean_mm=float("nan"), far=float("nan"), bad=True)
    fixed_mm, moving_mm = trial.landmarks
    points = torch.from_numpy(np.ascontiguousarray(fixed_mm))
    moved = fixed_mm + displacement_at(points, transform.displacement, transform.grid).numpy()
    error = np.linalg.norm(transform.affine(moved) - moving_mm, axis=1)
    three = torch.cat([expected.mm * expected.known, expected.known, expected.known], dim=1)
    total, share, _ = displacement_at(points, three, expected.grid).numpy().T
    told = share > 0.05
    at = total[told] / share[told]
    mean, far, large = float(error.mean()), float((error > FAR_MM).mean()), error[told] > LARGE_MM
    return Row(
        mean_mm=mean,
        far=far,
        bad=mean > BAD_MEAN_MM or far > BAD_SHARE_FAR,
        expected_at_landmarks_mm=float(at.mean()),
        beyond_3mm=float((error > LARGE_MM).mean()),
        auroc_3mm=auroc(at, large) if large.mean() > LEAST_LARGE else float("nan"),
        within_2mm_as_said=float((error[told][at < 2] < 2).mean()) if (at < 2).any() else float("nan"),
    )


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has the larger value (Mann and Whitney)."""
    number = int(positive.sum()) * int((~positive).sum())
    return float(mannwhitneyu(values[positive], values[~positive]).statistic) / number if number else float("nan")


def print_summary(table: pd.DataFrame) -> None:
    """How many were bad, and warned of; how near the expected error comes to the true one."""
    table = table.assign(warned=table.warnings > 0, ratio=table.expected_at_landmarks_mm / table.mean_mm)
    print(table.groupby(["refine", "bad"], sort=False).warned.agg(results="size", warned="sum").to_string())
    known = table.dropna(subset=["mean_mm"])
    known = known.assign(near=(known.ratio - 1).abs() <= MOST_OFF)
    columns = {
        "results": ("ratio", "size"),
        "expected / true, median": ("ratio", "median"),
        "least": ("ratio", "min"),
        "most": ("ratio", "max"),
        "within 30 %": ("near", "mean"),
        "AUROC beyond 3 mm, mean": ("auroc_3mm", "mean"),
        "least AUROC": ("auroc_3mm", "min"),
        "said within 2 mm, and are": ("within_2mm_as_said", "mean"),
    }
    print(known.groupby("refine", sort=False).agg(**columns).T.to_string(float_format=lambda v: f"{v:.3f}"))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="all rows as CSV")
    arguments = parser.parse_args()
    weights = load_cascade(find_weights(None))
    rows: list[Row] = []
    for trial in trials(arguments.pairs):
        rows += results(trial, weights)
        print(
            pd.DataFrame(rows[-3:]).to_string(index=False, header=len(rows) == 3, float_format=lambda v: f"{v:.3f}"),
            flush=True,
        )
        if arguments.out:
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
    print_summary(pd.DataFrame(rows))


if __name__ == "__main__":
    main()

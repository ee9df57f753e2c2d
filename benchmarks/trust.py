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

from algorithm.geometry import displacement_at
from algorithm.images import read_image
from algorithm.network import Cascade
from algorithm.prepare import Prepared, Subject, prepare, subject
from algorithm.refine import Refined, refine
from algorithm.registration import REFINE, finish, predict
from algorithm.report import Report
from algorithm.weights import find_weights, load_cascade
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


def results(trial: Trial, cascade: Cascade) -> Iterator[Row]:
    """A row for each refinement."""
    fixed, moving = (subject(scan.image, None) for scan in (trial.fixed, trial.moving))
    pair = prepare(fixed, moving, cascade.settings.network_size)
    start = predict(pair, cascade, torch.device("cpu"), Report())
    for name in ("off", *REFINE):
        refined = start
        if name != "off":
            refined = refine(fixed, moving, pair.affine, start.displacement, start.grid, REFINE[name])
        yield Row(trial=trial.name, refine=name) | row(trial, pair, moving, refined)


def row(trial: Trial, pair: Prepared, moving: Subject, refined: Refined) -> Row:
    """What the result says of itself, and what the landmarks say."""
    report = Report()
    transform = finish(pair, moving, refined, report)
    values = report.to_dict()
    after = values["quality"]["after"]
    said: Row = {"warnings": len(values["warnings"])} | {name: after.get(name, float("nan")) for name in FIGURES}
    if trial.landmarks is None:
        return said | {"mean_mm": float("nan"), "far": float("nan"), "bad": True}
    fixed_mm, moving_mm = trial.landmarks
    moved = fixed_mm + displacement_at(torch.from_numpy(fixed_mm), transform.displacement, transform.grid).numpy()
    error = np.linalg.norm(transform.affine(moved) - moving_mm, axis=1)
    mean, far = float(error.mean()), float((error > FAR_MM).mean())
    return said | {"mean_mm": mean, "far": far, "bad": mean > BAD_MEAN_MM or far > BAD_SHARE_FAR}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="all rows as CSV")
    arguments = parser.parse_args()
    cascade = load_cascade(find_weights(None)).cascade
    rows: list[Row] = []
    for trial in trials(arguments.pairs):
        rows += results(trial, cascade)
        print(
            pd.DataFrame(rows[-3:]).to_string(index=False, header=len(rows) == 3, float_format=lambda v: f"{v:.3f}"),
            flush=True,
        )
        if arguments.out:
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
    table = pd.DataFrame(rows).assign(warned=lambda t: t.warnings > 0)
    print(table.groupby(["refine", "bad"], sort=False).warned.agg(results="size", warned="sum").to_string())


if __name__ == "__main__":
    main()

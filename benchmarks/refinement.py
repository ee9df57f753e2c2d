"""Effect of each part of the refinement: similarity × keypoints × start, in one direction.

python -m benchmarks.refinement PAIR... [--similarity "local correlation" ngf mind]

PAIR is a folder as for `benchmarks.landmarks`. Prints the mean landmark error (mm) of each pair, the foldings on the
field's own grid, and the mean time (s) of refinement and keypoint search. From the pre-alignment there is one more
level, of 8 mm, because this start is farther from the result.
"""

import argparse
import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from algorithm.cascade.weights import find_weights, load_cascade
from algorithm.files.images import read_image
from algorithm.geometry import Grid, displacement_at, jacobian_determinant
from algorithm.preparation.prepare import Prepared, prepare
from algorithm.preparation.subject import Subject, find_lungs
from algorithm.refinement.refine import RefineSettings, Similarity, find_pair_keypoints, refine
from algorithm.registration import predict
from algorithm.report import Report
from benchmarks.landmarks import landmarks_mm

SCALE = {"local correlation": 1.0, "ngf": 1.0, "mind": 0.125}
"""Weights relative to D: differences of MIND are much smaller than those of the other distances."""
DELTA = 0.02
PREALIGNED, CASCADE = "pre-alignment", "cascade"


@dataclass(frozen=True)
class Case:
    """A prepared pair with both starts and its landmarks."""

    name: str
    fixed: Subject
    moving: Subject
    pair: Prepared
    starts: dict[str, tuple[Tensor, Grid]]
    start_s: dict[str, float]
    """Time (s) of each start after the pre-alignment."""
    landmarks: tuple[np.ndarray, np.ndarray]


def load(folder: Path) -> Case:
    """Read and prepare a pair, and run the cascade."""
    cascade = load_cascade(find_weights(None)).cascade
    fixed, moving = (find_lungs(read_image(folder / f"{name}.mha"), None) for name in ("fixed", "moving"))
    pair = prepare(fixed, moving, cascade.settings.network_size)
    begun = time.monotonic()
    predicted = predict(pair, cascade, torch.device("cpu"), Report())
    seconds = {PREALIGNED: 0.0, CASCADE: time.monotonic() - begun}
    starts = {
        PREALIGNED: (torch.zeros(1, 3, 8, 8, 8), pair.grid.resized((8, 8, 8))),
        CASCADE: (predicted.displacement, predicted.grid),
    }
    return Case(folder.name, fixed, moving, pair, starts, seconds, landmarks_mm(folder))


def settings(similarity: Similarity, keypoints: bool, start: str) -> RefineSettings:
    """Settings for one direction; from the pre-alignment there is one more level, of 8 mm. Keypoints are used on all
    levels except the finest."""
    shipped = RefineSettings()
    spacing, steps, weights = shipped.spacing_mm, shipped.steps, shipped.weights
    if start == PREALIGNED:
        spacing, steps, weights = (2 * spacing[0], *spacing), (60, 60, 40), (weights[0], *weights)
    deltas = [DELTA * keypoints] * (len(spacing) - 1) + [0.0]
    scale = SCALE[similarity]
    scaled = tuple(replace(w, alpha=w.alpha * scale, delta=d * scale) for w, d in zip(weights, deltas, strict=True))
    return RefineSettings(spacing, steps, both_directions=False, similarity=similarity, weights=scaled)


def measure(case: Case, similarity: Similarity, keypoints: bool, start: str) -> tuple[float, int, float]:
    """Mean landmark error (mm), foldings, and time (s)."""
    begun = time.monotonic()
    first, grid = case.starts[start]
    points = find_pair_keypoints(case.pair, case.fixed, first, grid) if keypoints else None
    chosen = settings(similarity, keypoints, start)
    result = refine(case.fixed, case.moving, case.pair.affine, first, grid, chosen, points)
    seconds = time.monotonic() - begun
    fixed, moving = case.landmarks
    found = fixed + displacement_at(torch.from_numpy(fixed), result.displacement, result.grid).numpy()
    error = np.linalg.norm(case.pair.affine(found) - moving, axis=1).mean()
    return float(error), int((jacobian_determinant(result.displacement, result.grid) <= 0).sum()), seconds


def main() -> None:
    """Print the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--similarity", nargs="+", choices=tuple(SCALE), default=list(SCALE))
    arguments = parser.parse_args()
    cases = [load(folder) for folder in arguments.pairs]
    rows = []
    for similarity, start, keypoints in itertools.product(arguments.similarity, (PREALIGNED, CASCADE), (False, True)):
        values = [measure(case, similarity, keypoints, start) for case in cases]
        errors, folded, seconds = zip(*values, strict=True)
        row = {"similarity": similarity, "start": start, "keypoints": keypoints, "mean": np.mean(errors)}
        row |= {case.name: error for case, error in zip(cases, errors, strict=True)}
        rows.append(row | {"folded": sum(folded), "s": np.mean(seconds)})
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format=lambda v: f"{v:.3f}"), flush=True)


if __name__ == "__main__":
    main()

"""Accuracy of keypoint matching: the landmarks of packed pairs are matched like keypoints.

python -m benchmarks.keypoints PAIR.npz... [--weights FOLDER] [--grid-mm 2] [--cascade]

Each pair (packed by `training.data --pairs`) is resampled to a grid of ``--grid-mm`` around the lungs. The landmarks
are added to the keypoints of the fixed lungs, so that the graph connects them. They start from zero motion
(pre-aligned), and with ``--cascade`` also from the field of the cascade. There is one row per pair and start: mean,
median and 95th percentile of the landmark error (mm) of the start; the same for the landmarks that are kept after
matching, and for the start *at these landmarks*; the share of dropped landmarks; keypoints found and kept; time (s) for
detection, and for matching with the landmarks.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.cascade.weights import BUNDLED, load_cascade
from algorithm.geometry import resample, resample_image
from algorithm.hounsfield import AIR_HU
from algorithm.lungs import lung_mask
from algorithm.refinement.keypoints import DetectSettings, MatchSettings, displacements, distinctive_points
from training.data import ValidationPair, load_validation_pair


def cascade_field(pair: ValidationPair, weights: Path) -> Float[Tensor, "1 3 z y x"]:
    """The cascade's displacement (mm) on the grid of the pair."""
    cascade = load_cascade(weights).cascade
    displacement, grid = cascade(pair.fixed, pair.grid, pair.moving, pair.moving_grid)
    return resample(displacement, grid, pair.grid)


def measure(
    pair: ValidationPair,
    start: Float[Tensor, "1 3 z y x"] | None,
    spacing_mm: float,
    detect: DetectSettings,
    match: MatchSettings,
) -> dict[str, float | str]:
    """One row of the table. ``start`` in mm on the grid of the pair; None: no motion."""
    x, y, z = (round(extent / spacing_mm) for extent in pair.grid.extent_mm)
    grid = pair.grid.resized((x, y, z))
    fixed = resample_image(pair.fixed, pair.grid, grid, least=AIR_HU, fill=AIR_HU)
    lungs = lung_mask(pair.fixed, pair.grid, pair.name)
    mask = resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0)
    times = [time.monotonic()]
    keypoints = distinctive_points(fixed, mask, grid, detect)
    times.append(time.monotonic())
    landmarks = torch.from_numpy(grid.to_index(pair.fixed_landmarks_mm)).round().long()
    first = None if start is None else resample(start, pair.grid, grid)
    points = torch.cat([keypoints, landmarks])
    offset, keep = displacements(fixed, grid, pair.moving, pair.moving_grid, points, first, match)
    times.append(time.monotonic())
    matched = pair.fixed_landmarks_mm + offset[len(keypoints) :].double().numpy()
    error = np.linalg.norm(pair.affine(matched) - pair.moving_landmarks_mm, axis=1)
    before, kept = pair.tre_mm(start), keep[len(keypoints) :].numpy()
    return (
        {"pair": pair.name, "start": "none" if start is None else "cascade"}
        | summary("start_", before)
        | summary("start_kept_", before[kept])
        | summary("kept_", error[kept])
        | {"all_mean": float(error.mean()), "dropped": 1 - float(kept.mean())}
        | {"keypoints": len(keypoints), "keypoints_kept": int(keep[: len(keypoints)].sum())}
        | {"detect_s": times[1] - times[0], "match_s": times[2] - times[1]}
    )


def summary(prefix: str, error_mm: np.ndarray) -> dict[str, float]:
    """Mean, median, 95th percentile; nan if there are no values."""
    if not len(error_mm):
        return {prefix + name: float("nan") for name in ("mean", "median", "p95")}
    values = float(error_mm.mean()), float(np.median(error_mm)), float(np.percentile(error_mm, 95))
    return dict(zip((prefix + "mean", prefix + "median", prefix + "p95"), values, strict=True))


def settings_from(kind: type, arguments: argparse.Namespace) -> Any:
    """A settings object from the options of the same names."""
    return kind(**{item.name: getattr(arguments, item.name) for item in fields(kind)})


@torch.inference_mode()
def main() -> None:
    """Print the table and its mean over the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--cascade", action="store_true", help="start from the cascade's field too")
    parser.add_argument("--weights", type=Path, default=BUNDLED)
    parser.add_argument("--grid-mm", type=float, default=2.0)
    for item in (*fields(DetectSettings), *fields(MatchSettings)):
        parser.add_argument("--" + item.name.replace("_", "-"), type=type(item.default), default=item.default)
    arguments = parser.parse_args()
    detect, match = settings_from(DetectSettings, arguments), settings_from(MatchSettings, arguments)
    rows = []
    for path in arguments.pairs:
        pair = load_validation_pair(path)
        starts = [None, cascade_field(pair, arguments.weights)] if arguments.cascade else [None]
        rows += [measure(pair, start, arguments.grid_mm, detect, match) for start in starts]
    table = pd.DataFrame(rows).set_index(["start", "pair"]).sort_index()
    print(table.T.to_string(float_format=lambda value: f"{value:.2f}"))
    print("\nmean over the pairs")
    print(table.groupby("start").mean().T.to_string(float_format=lambda value: f"{value:.2f}"))


if __name__ == "__main__":
    main()

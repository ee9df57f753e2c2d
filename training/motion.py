"""Compare statistics of real and simulated breathing motion: the evidence for `training.breathing`.

    python -m training.motion --real lung250m/*.csv --l2r keypoints/*.csv --train runs/train --out docs/motion.png

Real motion comes as correspondences (x, y, z of the fixed and of the moving point). The cascade gets pre-aligned pairs,
so the least-squares affine map over the points is removed first, from the simulated motion as well. Two properties of
the remaining motion are compared: its length and its roughness. The roughness is a variogram: the root mean square
difference of two residuals as a function of the distance of their points, relative to their root mean square length.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from algorithm.errors import InputError, exit_code
from algorithm.geometry import resample
from training.breathing import AT_REST, BREATH_HOLD, BreathingSettings
from training.data import load_scan
from training.pairs import TrainingPair
from training.random_motion import RealMotions, load_real_motions
from training.train import drawn_pair

log = logging.getLogger(__name__)

LAGS_MM = ((3.0, 8.0), (8.0, 14.0), (14.0, 26.0), (26.0, 50.0), (50.0, 90.0))
L2R_SPACING_MM = (1.75, 1.25, 1.75)
"""Voxel spacing of the Learn2Reg LungCT keypoint files, x, y, z."""
NOTHING_MM = 1e-6
"""A motion with a shorter residual is affine: the residual is only rounding."""


@dataclass(frozen=True)
class MotionStatistics:
    """Statistics of the motion of one pair without its affine part. Shares and variogram are nan if it is affine."""

    mean_mm: float
    p95_mm: float
    shares: tuple[float, float, float]
    """Root mean square of the x, y and z components, relative to that of the vectors."""
    variogram: tuple[float, ...]
    """A value for each range of `LAGS_MM`: √2 where residuals are independent, nan without pairs of points there."""


def statistics(
    points: Float[np.ndarray, "n 3"], vectors: Float[np.ndarray, "n 3"], number: int = 3000
) -> MotionStatistics:
    """Statistics of ``vectors`` (mm) at ``points`` (mm), from at most ``number`` points, drawn with a fixed seed."""
    generator = np.random.default_rng(0)
    if len(points) > number:
        chosen = generator.choice(len(points), number, replace=False)
        points, vectors = points[chosen], vectors[chosen]
    basis = np.column_stack([np.ones(len(points)), points])
    residual = vectors - basis @ np.linalg.lstsq(basis, vectors)[0]
    length = np.linalg.norm(residual, axis=1)
    root = float(np.sqrt((residual**2).sum(1).mean()))
    if root < NOTHING_MM:
        return MotionStatistics(0.0, 0.0, (math.nan,) * 3, (math.nan,) * len(LAGS_MM))
    x, y, z = np.sqrt((residual**2).mean(0)) / root
    first, second = generator.integers(len(points), size=(2, 400_000))
    lag = np.linalg.norm(points[first] - points[second], axis=1)
    difference = ((residual[first] - residual[second]) ** 2).sum(1)
    variogram = tuple(_root_mean(difference[(lag > low) & (lag <= high)]) / root for low, high in LAGS_MM)
    return MotionStatistics(
        float(length.mean()), float(np.percentile(length, 95)), (float(x), float(y), float(z)), variogram
    )


def _root_mean(values: np.ndarray) -> float:
    return float(np.sqrt(values.mean())) if len(values) > 20 else float("nan")


def correspondences(path: Path, spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """Points and vectors (mm) from a csv of six columns without a header, in units of ``spacing_mm``.

    InputError for any other file.
    """
    expected = "expected six numbers a line: x, y, z of the fixed and of the moving point"
    try:
        lines = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        values = np.array([[float(value) for value in line] for line in lines])
    except ValueError as error:
        raise InputError(f"{path} is no csv of numbers ({error}); {expected}") from error
    if values.ndim != 2 or values.shape[1] != 6:
        raise InputError(f"{path} has {len(lines[0]) if lines else 0} columns; {expected}")
    values = values * np.tile(spacing_mm, 2)
    return values[:, :3], values[:, 3:] - values[:, :3]


def of_pair(pair: TrainingPair) -> MotionStatistics:
    """Statistics of a simulated pair, in its lungs."""
    index = (pair.fixed_lungs[0, 0] > 0.5).nonzero().numpy()
    z, y, x = index.T
    displacement = resample(pair.displacement, pair.displacement_grid, pair.grid)
    return statistics(pair.grid.to_world(index[:, ::-1]), displacement[0].numpy()[:, z, y, x].T)


def plot(real: dict[str, list[MotionStatistics]], out: Path) -> None:
    """Write box plots of length and variogram for every group of ``real``, which has the simulated groups, too."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 2))
    names = list(real)
    left.boxplot([[s.mean_mm for s in real[name]] for name in names], tick_labels=names, whis=(0, 100))
    left.set_ylabel("mean length after the affine part (mm)")
    left.set_ylim(bottom=0)
    left.tick_params(axis="x", rotation=30)
    for i, name in enumerate(names):
        values = np.array([s.variogram for s in real[name]])
        columns = [column[np.isfinite(column)] for column in values.T]
        places = np.arange(len(LAGS_MM)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        boxes = right.boxplot(columns, positions=places, widths=0.6 / len(names), patch_artist=True, whis=(0, 100))
        for box in boxes["boxes"]:
            box.set_facecolor(f"C{i}")
        right.plot([], [], "s", color=f"C{i}", label=name)
    right.set_xticks(range(len(LAGS_MM)), [f"{low:.0f}-{high:.0f}" for low, high in LAGS_MM])
    right.set_xlabel("distance of two points (mm)")
    right.set_ylabel("difference of their motion / length")
    right.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, nargs="*", default=[], help="csv files in mm")
    parser.add_argument("--l2r", type=Path, nargs="*", default=[], help="csv files in Learn2Reg voxels")
    parser.add_argument("--train", type=Path, required=True, help="folder of packed scans to simulate from")
    parser.add_argument("--real-motion", type=Path, help="motion of real pairs, for the simulated breath-holds")
    parser.add_argument("--number", type=int, default=40, help="of simulated pairs of either kind")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    groups = {
        "Lung250M": [statistics(*correspondences(path)) for path in arguments.real],
        "Learn2Reg": [statistics(*correspondences(path, L2R_SPACING_MM)) for path in arguments.l2r],
    }
    real = load_real_motions(arguments.real_motion) if arguments.real_motion else None
    for name, kind in (("at rest", AT_REST), ("breath-hold", BREATH_HOLD)):
        groups[f"simulated {name}"] = simulated_statistics(arguments.train, arguments.number, kind, real)
    groups = {name: group for name, group in groups.items() if group}
    for name, group in groups.items():
        log.info("%s: %s", name, summary(group))
    plot(groups, arguments.out)


def summary(group: list[MotionStatistics]) -> str:
    """Medians over the pairs of a group, in one line; pairs without a value are left out."""
    low, middle, high = np.percentile([s.mean_mm for s in group], (0, 50, 100))
    ratio = _medians([(s.p95_mm / s.mean_mm if s.mean_mm > 0 else math.nan,) for s in group])
    shares, variogram = _medians([s.shares for s in group]), _medians([s.variogram for s in group])
    return (
        f"{len(group)} pairs, mean {middle:.1f} mm ({low:.1f} to {high:.1f}), p95/mean {ratio[0]:.2f}, "
        f"shares {shares}, variogram {variogram}"
    )


def _medians(rows: Sequence[tuple[float, ...]]) -> np.ndarray:
    columns = [column[np.isfinite(column)] for column in np.array(rows).T]
    return np.array([np.median(column) if len(column) else math.nan for column in columns]).round(2)


def simulated_statistics(
    folder: Path, number: int, kind: BreathingSettings, real: RealMotions | None
) -> list[MotionStatistics]:
    """Statistics of ``number`` simulated pairs of one kind, at half the resolution of the packed scans."""
    scans = [load_scan(path).reduced(2) for path in sorted(folder.glob("*.npz"))]
    if not scans:
        raise InputError(f"{folder} holds no .npz scans; training.data makes them")
    return [of_pair(drawn_pair(scans, i, kind, real=real)) for i in range(number)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(exit_code(main))

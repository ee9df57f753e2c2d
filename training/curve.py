"""Learning curves of one training, or of several consecutive trainings.

    python -m training.curve RUN... --out curve.png

Left: the landmark error of every validation pair, and their mean. Right: the distance from the exact field in the lungs
of the training pairs. Both are plotted over the steps; each level has its own background colour.
"""

import argparse
import csv
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from algorithm.errors import InputError, exit_code

Series = tuple[np.ndarray, np.ndarray]
"""Steps and values."""

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """The log of one level of one training."""

    level: int
    series: dict[str, Series]

    @property
    def steps(self) -> int:
        """The last step in the log."""
        return max(int(steps[-1]) for steps, _ in self.series.values())


def read_stages(log: Path) -> list[Stage]:
    """The levels in a log.csv, coarse to fine, without levels that have no steps.

    A training that was killed and resumed logs some steps twice: the later value counts. InputError if the file is not
    such a log.
    """
    values: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    try:
        with log.open(newline="") as file:
            for level, step, _, name, value in csv.reader(file):
                values[int(level)][name][int(step)] = float(value)
    except (OSError, ValueError) as error:
        raise InputError(f"{log}: expected lines of level, step, minutes, name, value ({error})") from error
    stages = [Stage(level, _with_mean(named)) for level, named in sorted(values.items())]
    return [stage for stage in stages if stage.steps > 0]


def _with_mean(values: dict[str, dict[int, float]]) -> dict[str, Series]:
    """Series of the values by step, and of the mean landmark error at the steps that all pairs have."""
    pairs = validation(values)
    steps = set.intersection(*(set(points) for points in pairs.values())) if pairs else set()
    mean = {step: float(np.mean([points[step] for points in pairs.values()])) for step in steps}
    return {name: _sorted(points) for name, points in (values | ({"mean": mean} if mean else {})).items()}


def validation(series: dict[str, T]) -> dict[str, T]:
    """The landmark errors among the series: the pairs that also have a series of their foldings."""
    return {name: values for name, values in series.items() if f"{name} folded" in series}


def _sorted(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def chained(stages: list[Stage]) -> dict[str, Series]:
    """Every series over all stages; the steps continue from stage to stage."""
    joined: dict[str, list[Series]] = defaultdict(list)
    first = 0
    for stage in stages:
        for name, (steps, values) in stage.series.items():
            joined[name].append((steps + first, values))
        first += stage.steps
    return {name: (np.concatenate([s for s, _ in p]), np.concatenate([v for _, v in p])) for name, p in joined.items()}


def plot(stages: list[Stage], out: Path) -> None:
    """Write the plot to ``out``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    series = chained(stages)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, (steps, values) in validation(series).items():
        left.plot(steps, values, marker=".", linewidth=1, label=name)
    if "mean" in series:
        left.plot(*series["mean"], color="black", linewidth=2.5, label="mean")
    left.set_ylabel("landmark error (mm)")
    if "exact_error" in series:
        steps, values = series["exact_error"]
        right.plot(steps, values, ".", color="grey", markersize=4, label="one pair")
        right.plot(steps, running_median(values), color="black", label="median of 9")
    right.set_ylabel("distance from the exact field (mm)")
    for axes in (left, right):
        _shade(axes, stages)
        axes.set_xlabel("steps")
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def running_median(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Running median over ``window`` (odd) neighbours, over fewer at the ends."""
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _shade(axes: Any, stages: list[Stage]) -> None:
    """Draw a background colour for every level, and its number above."""
    first = 0
    for level, group in itertools.groupby(stages, lambda stage: stage.level):
        steps = sum(stage.steps for stage in group)
        axes.axvspan(first, first + steps, color=f"C{level}", alpha=0.12, linewidth=0)
        above = axes.get_xaxis_transform()
        axes.text(first + steps / 2, 1.01, f"level {level}", ha="center", fontsize="small", transform=above)
        first += steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a log.csv, first to last")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    stages = [stage for run in arguments.runs for stage in read_stages(run / "log.csv")]
    if not stages:
        raise InputError(f"{', '.join(map(str, arguments.runs))}: no steps were logged yet")
    plot(stages, arguments.out)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))

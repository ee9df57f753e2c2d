"""Error against time of the refinement, from the pre-alignment and from the cascade, in one direction.

python -m benchmarks.convergence PAIR... --out docs/convergence.png

PAIR is a folder as for `benchmarks.landmarks`. Every point is a separate run with another number of steps. From the
pre-alignment, the levels are 8, 4 and 2 mm. The cascade is closer to the result, so from there the levels are 4 and 2
mm or, with smaller steps, only 2 mm. Time starts after the pre-alignment and includes the cascade. Prints landmark
errors (mm) and times (s), means over the pairs.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from algorithm.geometry import displacement_at
from algorithm.refinement.refine import RefineSettings, refine
from benchmarks.refinement import CASCADE, PREALIGNED, Case, load, settings

BUDGETS = (2, 5, 10, 20, 40, 60)
"""Steps on each level except the finest."""
ALONE = "cascade, 2 mm alone"
STARTS = (PREALIGNED, CASCADE, ALONE)


def with_budget(start: str, steps: int) -> RefineSettings:
    """One direction, local correlation, no keypoints; The level of 2 mm has two thirds of the steps; half if it is the
    only level."""
    if start == ALONE:
        one = settings("local correlation", False, CASCADE)
        return replace(one, spacing_mm=one.spacing_mm[-1:], weights=one.weights[-1:], steps=(steps // 2,), step_vox=0.2)
    chosen = settings("local correlation", False, start)
    coarse = len(chosen.steps) - 1
    return replace(chosen, steps=(steps,) * coarse + (max(1, 2 * steps // 3),))


def measure(case: Case, start: str, steps: int) -> dict[str, float | str | int]:
    """Mean landmark error (mm) and time (s) of one run; with 0 steps, those of the start."""
    first = CASCADE if start == ALONE else start
    displacement, grid = case.starts[first]
    begun = time.monotonic() - case.start_s[first]
    if steps:
        result = refine(case.fixed, case.moving, case.pair.affine, displacement, grid, with_budget(start, steps))
        displacement, grid = result.displacement, result.grid
    seconds = time.monotonic() - begun
    fixed, moving = case.landmarks
    found = fixed + displacement_at(torch.from_numpy(fixed), displacement, grid).numpy()
    error = float(np.linalg.norm(case.pair.affine(found) - moving, axis=1).mean())
    return {"pair": case.name, "start": start, "steps": steps, "error_mm": error, "seconds": seconds}


def plot(table: pd.DataFrame, out: Path) -> None:
    """Plot the means over the pairs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for start, rows in table.groupby("start", sort=False):
        mean = rows.groupby("steps")[["seconds", "error_mm"]].mean()
        axes.plot(mean.seconds, mean.error_mm, "o-", label=f"from the {start}")
    axes.set_xlabel("time after the pre-alignment (s)")
    axes.set_ylabel("mean landmark error (mm)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.pairs:
        case = load(folder)
        rows += [measure(case, start, steps) for start in STARTS for steps in (0, *BUDGETS)]
    table = pd.DataFrame(rows)
    means = table.groupby(["start", "steps"])[["error_mm", "seconds"]].mean()
    by_pair = table.pivot_table(index=["start", "steps"], columns="pair", values="error_mm")
    print(means.join(by_pair).to_string(float_format=lambda value: f"{value:.3f}"))
    plot(table, arguments.out)


if __name__ == "__main__":
    main()

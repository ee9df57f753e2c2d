"""Error of the cascade for known motion, of the kind used in training and of kinds kept out of training.

python -m benchmarks.generalisation --train runs/train --kept-out runs/kept_out [--weights weights]

The folders hold scans packed by `training.data`. Motion is simulated at full resolution with seeds that training does
not use. The error is measured in the lungs against the exact field (phantom: at its landmarks). Prints means over the
pairs in mm and the share of improved pairs for each kind. Only the cascade runs; its field is not repaired.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from algorithm.cascade.network import Cascade, fastest_precision
from algorithm.cascade.weights import find_weights, load_cascade
from algorithm.files.images import Image
from algorithm.geometry import displacement_at, jacobian_determinant, resample
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import find_lungs
from phantom import PhantomSettings, make_pair
from training.breathing import AT_REST, BREATH_HOLD, BreathingSettings, scanned
from training.data import TrainingScan, load_scan
from training.random_motion import MotionSettings
from training.train import drawn_pair

Measured = dict[str, float]
LOCAL = MotionSettings(
    diaphragm_mm=0.0, detail_spacing_mm=(40.0, 20.0), detail_mm=(3.0, 1.5), mean_motion_mm=(1.0, 4.0)
)
STYLES = {
    "at rest, as trained": AT_REST,
    "breath-holds, as trained (without real motion)": BREATH_HOLD,
    "local (B-splines of 40 and 20 mm alone)": BreathingSettings(motion=LOCAL),
}
FIRST_SEED = 2_000_000_000


@torch.no_grad()
def of_simulated(cascade: Cascade, scans: list[TrainingScan], style: BreathingSettings, number: int) -> Measured:
    """Measure one simulated pair."""
    pair = drawn_pair(scans, FIRST_SEED + number, style)
    pair = scanned(pair, torch.Generator().manual_seed(FIRST_SEED + number), style)
    displacement, grid = cascade(pair.fixed, pair.grid, pair.moving, pair.moving_grid)
    inside = pair.fixed_lungs > 0.5
    exact = resample(pair.displacement, pair.displacement_grid, pair.grid)
    found = resample(displacement, grid, pair.grid)
    return {
        "before": float(exact.norm(dim=1, keepdim=True)[inside].mean()),
        "after": float((found - exact).norm(dim=1, keepdim=True)[inside].mean()),
        "folded": float((jacobian_determinant(displacement, grid) <= 0).float().mean()),
    }


def of_phantom(cascade: Cascade, number: int) -> Measured:
    """Measure one phantom pair at the landmarks of its lobes, with the pre-alignment of the algorithm."""
    settings = PhantomSettings(seed=100 + number, fixed_phase="inhale" if number % 2 else "exhale")
    phantom = make_pair(settings)
    fixed_image = Image(phantom.fixed, phantom.fixed_grid, Path("phantom fixed"))
    moving_image = Image(phantom.moving, phantom.moving_grid, Path("phantom moving"))
    pair = prepare(find_lungs(fixed_image, None), find_lungs(moving_image, None), cascade.settings.network_size)
    with torch.no_grad():  # the pre-alignment needs gradients
        displacement, grid = cascade(pair.fixed, pair.grid, pair.moving, pair.moving_grid)
    fixed = torch.from_numpy(phantom.fixed_landmarks_mm)
    moving = torch.from_numpy(phantom.moving_landmarks_mm)
    ends = fixed, fixed + displacement_at(fixed, displacement, grid)
    before, after = ((torch.from_numpy(pair.affine(end.numpy())) - moving).norm(dim=1).mean() for end in ends)
    folded = (jacobian_determinant(displacement, grid) <= 0).float().mean()
    return {"before": float(before), "after": float(after), "folded": float(folded)}


def row(name: str, measure: Callable[[int], Measured], pairs: int) -> dict[str, float | str]:
    """Means over ``pairs`` pairs."""
    table = pd.DataFrame([measure(number) for number in range(pairs)])
    better = float((table.after < table.before).mean())
    return {"kind": name, "pairs": pairs, **table.mean(), "folded_max": table.folded.max(), "better": better}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="packed scans that were trained on")
    parser.add_argument("--kept-out", type=Path, required=True, help="packed scans that were not")
    parser.add_argument("--weights", type=Path, help="folder of weights (default: those of the repository)")
    parser.add_argument("--pairs", type=int, default=6, help="of each kind")
    arguments = parser.parse_args()
    cascade = load_cascade(find_weights(arguments.weights)).cascade
    cascade.precision = fastest_precision(torch.device("cpu"))
    trained, kept_out = (
        [load_scan(path) for path in sorted(folder.glob("*.npz"))] for folder in (arguments.train, arguments.kept_out)
    )
    kinds: dict[str, Callable[[int], Measured]] = {
        **{name: partial(of_simulated, cascade, trained, style) for name, style in STYLES.items()},
        "scans kept out": partial(of_simulated, cascade, kept_out, AT_REST),
        "phantoms": partial(of_phantom, cascade),
    }
    for name, measure in kinds.items():
        rows = pd.DataFrame([row(name, measure, arguments.pairs)]).set_index("kind")
        print(rows.to_string(float_format=lambda value: f"{value:.4g}"), flush=True)


if __name__ == "__main__":
    main()

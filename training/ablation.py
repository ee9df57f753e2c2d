"""The ablation of Hering et al. 2021 (section 4.9, table 2) on a small scale: half resolution, few steps.

    python -m training.ablation --bank runs/bank --validation runs/val --out runs/ablation

Trains every configuration of training/config with the given steps of each level; configurations with fewer levels use
the steps of the finest ones. If it is run again, it continues where it was stopped, and finished trainings stay.
OUT/<configuration>_<seed> has the trainings. OUT/table.md has the landmark errors and the other measures of the
cascades alone: no refinement, no unfolding.
"""

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.cascade.network import Cascade
from algorithm.cascade.weights import MANIFEST, load_cascade
from algorithm.errors import InputError, exit_code
from algorithm.geometry import Grid, jacobian_determinant, resample, warp
from algorithm.lungs import LungMask, lung_mask
from training.data import ValidationPair, load_validation_pair
from training.settings import CONFIG, TrainSettings, read_settings
from training.train import Run, train

log = logging.getLogger(__name__)

PAPER_TRE_MM = {
    "voxelmorph": 1.71,
    "single_level": 1.76,
    "two_levels": 1.26,
    "no_mask": 1.26,
    "no_volume_change": 1.22,
    "no_keypoints": 1.72,
    "proposed": 1.14,
}
"""Configurations in the order of the table, and the paper's mean error on the ten DIR-Lab 4DCT pairs (its table 2; for
VoxelMorph, its section 5.7)."""
CONFIGS = (*PAPER_TRE_MM, "exact_field")
"""The rows of the table. The last one has no counterpart in the paper."""


@dataclass(frozen=True)
class Measures:
    """Measures of one field of one validation pair."""

    tre_mm: float
    """Mean landmark error."""
    folding_fraction: float
    """Share of the voxels of the field's grid that fold."""
    std_log_jacobian: float
    """In the fixed lungs, without folded voxels."""
    dice: float
    """Overlap of the fixed and the warped moving lungs."""


def reduced_settings(config: str, steps: tuple[int, ...], seed: int) -> TrainSettings:
    """A configuration at half resolution with ``steps``, those of the finest levels. The U-Nets halve once less."""
    settings = read_settings(CONFIG / f"{config}.toml")
    levels = len(settings.factors)
    return replace(
        settings,
        features=settings.features[:-1],
        factors=tuple(2 * factor for factor in settings.factors),
        reduction=(2,) * levels,
        crop=(0,) * levels,
        steps=steps[-levels:],
        seed=seed,
    )


def finished(out: Path, settings: TrainSettings) -> bool:
    """Whether OUT/weights are from a finished training with these settings."""
    manifest = out / "weights" / MANIFEST
    if not manifest.exists():
        return False
    training = json.loads(manifest.read_text())["training"]
    same: bool = training["settings"] == json.loads(json.dumps(asdict(settings)))
    return same and training["levels"] == len(settings.factors)


def lungs_of(pair: ValidationPair) -> tuple[LungMask, LungMask]:
    """Fixed and (pre-aligned) moving lungs, from the HU."""
    return lung_mask(pair.fixed, pair.grid, pair.name), lung_mask(pair.moving, pair.moving_grid, pair.name)


def measure(
    pair: ValidationPair,
    lungs: tuple[LungMask, LungMask],
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
) -> Measures:
    """The measures of a field (mm) on ``grid``."""
    fixed = resample(lungs[0].mask.float(), lungs[0].grid, grid) > 0.5
    moving = warp(lungs[1].mask.float(), lungs[1].grid, displacement, grid, fill=0.0) > 0.5
    determinant = jacobian_determinant(displacement, grid)
    logarithm = determinant[fixed[:, 0] & (determinant > 0)].log()
    return Measures(
        float(pair.tre_mm(displacement, grid).mean()),
        float((determinant <= 0).float().mean()),
        float(logarithm.std(correction=0)),
        float(2 * (fixed & moving).sum() / (fixed.sum() + moving.sum())),
    )


@torch.no_grad()
def measure_cascade(
    cascade: Cascade, pair: ValidationPair, lungs: tuple[LungMask, LungMask], device: str = "cpu"
) -> Measures:
    """The measures of the field of a cascade."""
    images = pair.fixed.to(device), pair.grid, pair.moving.to(device), pair.moving_grid
    displacement, grid = cascade.to(device)(*images)
    return measure(pair, lungs, displacement.cpu(), grid)


def measure_none(pair: ValidationPair, lungs: tuple[LungMask, LungMask]) -> Measures:
    """The measures of the pre-alignment alone."""
    grid = pair.grid.coarsened(2)
    return measure(pair, lungs, torch.zeros(1, 3, *grid.shape), grid)


def write_table(
    out: Path,
    runs: dict[str, list[Path]],
    steps: tuple[int, ...],
    seeds: list[int],
    pairs: list[ValidationPair],
    device: str = "cpu",
) -> None:
    """Write OUT/table.md. ``runs`` are the finished trainings of every configuration, at most one for each seed."""
    out.mkdir(parents=True, exist_ok=True)
    lungs = [lungs_of(pair) for pair in pairs]
    rows = [_row("pre-aligned", [[measure_none(p, m) for p, m in zip(pairs, lungs, strict=True)]])]
    for config, folders in runs.items():
        cascades = [load_cascade(folder / "weights").cascade for folder in folders]
        measures = [
            [measure_cascade(cascade, p, m, device) for p, m in zip(pairs, lungs, strict=True)] for cascade in cascades
        ]
        if measures:
            rows.append(_row(config, measures))
    names = [pair.name for pair in pairs]
    header = ["configuration", *names, "mean", "folded (%)", "SDlogJ", "lung Dice", "paper (mm)"]
    lines = [" | ".join(cells) for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    (out / "table.md").write_text(f"{table}\n\n{_caption(runs, steps, seeds)}\n")
    log.info("%s", table)


def _row(config: str, measures: list[list[Measures]]) -> list[str]:
    """Table cells of a configuration from its measures by seed and pair: means over the seeds."""
    values = np.array([[list(asdict(m).values()) for m in of_seed] for of_seed in measures])
    tre, (_, folded, spread, dice) = values[:, :, 0].mean(0), values.mean((0, 1))
    mean = f"{tre.mean():.2f}"
    if len(measures) > 1:
        by_seed = values[:, :, 0].mean(1)
        mean += f" ({by_seed.min():.2f} to {by_seed.max():.2f})"
    paper = f"{PAPER_TRE_MM[config]:.2f}" if config in PAPER_TRE_MM else ""
    return [
        config.replace("_", " "), *(f"{v:.2f}" for v in tre), mean, f"{100 * folded:.3f}", f"{spread:.3f}",
        f"{dice:.3f}", paper,
    ]  # fmt: skip


def _caption(runs: dict[str, list[Path]], steps: tuple[int, ...], seeds: list[int]) -> str:
    text = (
        f"Mean landmark error (mm) of each pair, and of all; voxels of the field's grid that fold; standard deviation "
        f"of the log Jacobian determinant in the lungs; overlap of the lungs. Cascades alone, at half resolution, "
        f"{', '.join(map(str, steps))} steps (coarse to fine; fewer levels take the last of these), "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    )
    if len(seeds) > 1:
        text += " (means over the seeds, in brackets their range)"
    text += ". Last column: the paper's error on DIR-Lab 4DCT, of networks trained in full on COPDGene."
    missing = [config.replace("_", " ") for config, folders in runs.items() if len(folders) < len(seeds)]
    return text + (f" Not finished: {', '.join(missing)}." if missing else "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True, help="folder of simulated pairs")
    parser.add_argument("--validation", type=Path, required=True, help="folder of packed pairs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, nargs=3, default=(300, 300, 150), help="of each level, coarse to fine")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop training after so long, in all")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    pairs = [load_validation_pair(path) for path in sorted(arguments.validation.glob("*.npz"))]
    if not pairs:
        raise InputError(f"{arguments.validation} holds no .npz files, expected pairs (training.data --pairs)")
    steps, ends = tuple(arguments.steps), time.monotonic() + 60 * arguments.minutes
    runs: dict[str, list[Path]] = {config: [] for config in arguments.configs}
    for seed in arguments.seeds:
        for config in arguments.configs:
            out, settings = arguments.out / f"{config}_{seed}", reduced_settings(config, steps, seed)
            minutes = (ends - time.monotonic()) / 60
            run = Run(out, bank=arguments.bank, device=arguments.device, minutes=minutes)
            log.info("%s, seed %d", config, seed)
            if finished(out, settings) or (minutes > 0 and train(settings, run)):
                runs[config].append(out)
    write_table(arguments.out, runs, steps, arguments.seeds, pairs, arguments.device)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))

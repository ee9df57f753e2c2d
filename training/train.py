"""Train the cascade level by level, coarse to fine (Hering et al. 2021, sections 3.4 and 4.3).

    python -m training.train --out runs/first --bank runs/bank --validation runs/val --steps 2000 2000 1000
    python -m training.train --out runs/no_mask --bank runs/bank --config training/config/no_mask.toml

Read this script from top to bottom; `training.settings` has the settings that decide the result. The coarsest network
starts from Xavier's parameters. Each finer network starts from the parameters of the level before, which then stays
fixed. Every step takes a breathing pair, simulated from one scan (`training.breathing`) in this step or before
(`training.bank`). It minimises the objective of `algorithm.objective` and the distance from the exact field. On the
finest level, each step uses a part of the fixed image. The randomness of a step depends only on seed, level and step,
so a resumed run gives the same result as an uninterrupted run.

OUT/checkpoint.pt has everything to resume (with the settings), OUT/log.csv the values, OUT/weights the result.
"""

import argparse
import json
import logging
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.cascade.network import Cascade, CascadeSettings, fastest_precision
from algorithm.cascade.weights import load_cascade, save_cascade
from algorithm.errors import InputError, exit_code
from algorithm.geometry import Grid, displacement_at, downsample_by, jacobian_determinant, resample, warp
from algorithm.objective import Keypoints, ngf_distance, objective
from algorithm.objective.local_correlation import local_correlation_distance
from training.breathing import AT_REST, BREATH_HOLD, BreathingSettings, deformed, scanned
from training.data import TrainingScan, ValidationPair, load_scan, load_validation_pair
from training.optimiser import Optimiser
from training.pairs import TrainingPair, load_pair
from training.random_motion import RealMotions, load_real_motions, uniform
from training.settings import TrainSettings, read_settings

log = logging.getLogger(__name__)

Field = tuple[Float[Tensor, "n 3 z y x"], Grid]
"""A displacement field (mm) and its grid."""


@dataclass(frozen=True)
class Run:
    """Paths, device, intervals and time limit of a training: not part of its settings."""

    out: Path
    train: Path | None = None
    """Packed scans, from which every step simulates a pair."""
    real_motion: Path | None = None
    """Motion of real pairs (`training.real_motion`), for simulated breath-holds."""
    bank: Path | None = None
    """Pairs that were simulated before, in place of ``train``."""
    validation: Path | None = None
    initial: Path | None = None
    """Weights to start from. A level with 0 steps keeps them. If a coarser level is trained, it gets that level's
    parameters, unless ``keep_finer`` is set."""
    device: str = "cpu"
    validate_every: int = 500
    checkpoint_every: int = 100
    minutes: float = float("inf")
    """Time limit. The training stops then and can be resumed."""


def drawn_pair(
    scans: list[TrainingScan],
    seed: int,
    settings: BreathingSettings,
    scale: float = 0.12,
    real: RealMotions | None = None,
) -> TrainingPair:
    """The pair of a seed, at the resolution of the scans, before `scanned`."""
    generator = torch.Generator().manual_seed(seed)
    scan = scans[int(torch.randint(len(scans), (), generator=generator))]
    stretch = 1 + scale * (2 * torch.rand(3, generator=generator) - 1)
    voxels, lungs = scan.voxels, scan.lungs
    if torch.rand((), generator=generator) < 0.5:  # mirrored left to right
        voxels, lungs = voxels.flip(-1), lungs.flip(-1)
    x, y, z = (float(s * f) for s, f in zip(scan.grid.spacing, stretch, strict=True))
    return deformed(voxels, lungs, replace(scan.grid, spacing=(x, y, z)), generator, settings, real)


def kind_of_breathing(seed: int, breath_holds: float) -> BreathingSettings:
    """The kind of breathing for the pair of a seed; ``breath_holds`` is the share of breath-holds."""
    return BREATH_HOLD if uniform(torch.Generator().manual_seed(seed)) < breath_holds else AT_REST


class Pairs:
    """The pairs of all steps of one level."""

    def __init__(self, level: int, settings: TrainSettings, run: Run) -> None:
        self.level, self.settings = level, settings
        reduction = settings.reduction[level]
        self.files = sorted((run.bank / str(reduction)).glob("*.npz")) if run.bank else []
        scans = [load_scan(path) for path in sorted(run.train.glob("*.npz"))] if run.train else []
        self.scans = [scan.reduced(reduction) for scan in scans]
        self.real = load_real_motions(run.real_motion) if run.real_motion else None
        if not self.files and not self.scans:
            wanted = f"pairs in {run.bank / str(reduction)} (training.bank)" if run.bank else "scans (training.data)"
            raise InputError(f"{run.bank or run.train} holds no .npz files, expected {wanted}")

    def __call__(self, step: int) -> tuple[TrainingPair, torch.Generator]:
        """The pair of one step, and the generator for the other random values of that step."""
        seed = (self.settings.seed * 10 + self.level) * 10_000_000 + step
        generator = torch.Generator().manual_seed(seed)
        kind = kind_of_breathing(seed, self.settings.breath_holds)
        if self.files:  # use every pair once before any pair again
            turn = torch.Generator().manual_seed(seed - step + step // len(self.files))
            pair = load_pair(self.files[int(torch.randperm(len(self.files), generator=turn)[step % len(self.files)])])
        else:
            pair = drawn_pair(self.scans, seed, kind, self.settings.scale, self.real)
        if uniform(generator) < 0.5:
            pair = pair.swapped()
        noise = kind.noise_hu / self.settings.reduction[self.level]  # averaging reduces the noise
        return scanned(pair, generator, replace(kind, noise_hu=noise)), generator


def part_of(pair: TrainingPair, edge: int, generator: torch.Generator) -> TrainingPair:
    """The pair with a part of the fixed image around a random lung voxel; the whole pair if ``edge`` is 0."""
    if edge == 0:
        return pair
    lung = (pair.fixed_lungs[0, 0] > 0.5).nonzero()
    centre = lung[int(torch.randint(len(lung), (), generator=generator))].tolist()[::-1]
    size = [min(edge, n) for n in pair.grid.size]
    start = [min(max(c - n // 2, 0), full - n) for c, n, full in zip(centre, size, pair.grid.size, strict=True)]
    return pair.cropped((start[0], start[1], start[2]), (size[0], size[1], size[2]))


def before(cascade: Cascade, level: int, pair: TrainingPair, reduction: int) -> Field | None:
    """The field of the levels coarser than ``level``, from the whole pair; None for the coarsest level.

    To save time, a pair at full resolution is halved for them.
    """
    if level == 0:
        return None
    whole = pair.reduced(2) if reduction == 1 else pair
    with torch.no_grad():
        return cascade.forward(whole.fixed, whole.grid, whole.moving, whole.moving_grid, level, max(reduction, 2))


def step_loss(
    cascade: Cascade, level: int, pair: TrainingPair, settings: TrainSettings, generator: torch.Generator, device: str
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The mean loss of all applications of a level, and the terms of the last application.

    It is differentiable in the level's parameters only. Each application starts from the result of the one before, as
    in the cascade.
    """
    reduction, times = settings.reduction[level], settings.applications[level]
    part = part_of(pair, settings.crop[level], generator).to(device)
    so_far = before(cascade, level, pair.to(device), reduction)
    terms: dict[str, Tensor] = {}
    total = part.fixed.new_zeros(())
    for _ in range(times):
        images = part.fixed, part.grid, part.moving, part.moving_grid
        (displacement, grid), _ = cascade.add_level(level, *images, so_far, reduction)
        value, terms = loss(displacement, grid, part, level, settings, generator)
        total = total + value / times
        so_far = displacement.detach(), grid
    return total, terms


def loss(
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    pair: TrainingPair,
    level: int,
    settings: TrainSettings,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The objective of one pair on the grid of ``level``."""
    factor = pair.grid.size[0] // grid.size[0]
    fixed, lungs = downsample_by(pair.fixed, factor), downsample_by(pair.fixed_lungs, factor)
    moving = downsample_by(torch.cat([pair.moving, pair.moving_lungs], dim=1), factor)
    warped = warp(moving, pair.moving_grid.coarsened(factor), displacement, grid)
    total, terms = objective(
        displacement,
        grid,
        settings.weights(level),
        distance(fixed, warped[:, :1], grid, lungs, level, settings),
        fixed_labels=lungs,
        warped_labels=warped[:, 1:],
        keypoints=[exact_keypoints(pair, settings.keypoints, generator)] if settings.delta[level] > 0 else [],
    )
    error = exact_error(displacement, resample(pair.displacement, pair.displacement_grid, grid), lungs)
    return total + settings.exact[level] * error, terms | {"exact_error": error.detach()}


def distance(
    fixed: Float[Tensor, "1 1 z y x"],
    warped: Float[Tensor, "1 1 z y x"],
    grid: Grid,
    lungs: Float[Tensor, "1 1 z y x"],
    level: int,
    settings: TrainSettings,
) -> Float[Tensor, ""]:
    """The image distance D of the settings."""
    if settings.distance == "ncc":
        return local_correlation_distance(fixed, warped, lungs, settings.window)
    return ngf_distance(fixed, warped, grid, lungs, settings.epsilon_hu_per_mm[level])


def exact_error(
    displacement: Float[Tensor, "1 3 z y x"], exact: Float[Tensor, "1 3 z y x"], lungs: Float[Tensor, "1 1 z y x"]
) -> Float[Tensor, ""]:
    """Mean distance from the exact field in the lungs (mm). Not its square, so that large motion does not dominate."""
    squared = (displacement - exact).square().sum(dim=1, keepdim=True)
    error: Tensor = ((squared + SOFT_MM**2).sqrt() * lungs).sum() / lungs.sum().clamp(min=1) - SOFT_MM
    return error


SOFT_MM = 0.3  # much smaller errors count by their square, so the gradient stays finite


def exact_keypoints(pair: TrainingPair, number: int, generator: torch.Generator) -> Keypoints:
    """Random lung voxels with their exact partners."""
    index = (pair.fixed_lungs[0, 0] > 0.5).nonzero().cpu()
    index = index[torch.randint(len(index), (number,), generator=generator)]
    fixed_mm = torch.from_numpy(pair.grid.to_world(index.numpy()[:, ::-1])).to(pair.displacement)
    return Keypoints(fixed_mm, fixed_mm + displacement_at(fixed_mm, pair.displacement, pair.displacement_grid))


@torch.no_grad()
def validate(cascade: Cascade, level: int, pairs: list[ValidationPair]) -> dict[str, float]:
    """Mean TRE (mm) and folding fraction of every validation pair, from the levels up to ``level``."""
    result = {}
    reduction = max(cascade.settings.factors[level] // 2, 1)
    device = next(cascade.parameters()).device
    for pair in pairs:
        fixed, moving = (downsample_by(v.to(device), reduction) for v in (pair.fixed, pair.moving))
        grids = pair.grid.coarsened(reduction), pair.moving_grid.coarsened(reduction)
        displacement, grid = cascade(fixed, grids[0], moving, grids[1], level + 1, reduction)
        result[pair.name] = float(pair.tre_mm(displacement.cpu(), grid).mean())
        result[f"{pair.name} folded"] = float((jacobian_determinant(displacement, grid) <= 0).float().mean())
    return result


def train(settings: TrainSettings, run: Run) -> bool:
    """Train, or resume the training in ``run.out``; False if the time limit came before the end."""
    started = time.monotonic()
    pairs = [load_validation_pair(path) for path in sorted(run.validation.glob("*.npz"))] if run.validation else []
    run.out.mkdir(parents=True, exist_ok=True)
    cascade, state = start(settings, run)
    first_level = state["level"] if state else 0
    for level in range(first_level, len(settings.steps)):
        resumed = state if state and level == first_level else None
        if not train_level(cascade, level, pairs, settings, run, resumed, started):
            return False
        if settings.steps[level] > 0 and not settings.keep_finer:
            for finer in cascade.levels[level + 1 :]:  # start of their training, and usable without it
                finer.load_state_dict(cascade.levels[level].state_dict())
        provenance = {"commit": commit(), "settings": asdict(settings), "levels": level + 1, "pairs": source(run)}
        save_cascade(run.out / "weights", cascade, provenance)
    return True


def start(settings: TrainSettings, run: Run) -> tuple[Cascade, dict | None]:
    """The cascade at the start or from the checkpoint, and the checkpoint (None if there is none)."""
    torch.manual_seed(settings.seed)
    cascade = Cascade(CascadeSettings(settings.features, settings.factors, applications=settings.applications))
    if run.initial is not None:
        initial = load_cascade(run.initial).cascade
        architecture = initial.settings.features, initial.settings.factors
        if architecture != (settings.features, settings.factors):
            expected = f"those of the settings, {settings.features} and {settings.factors}"
            raise InputError(f"{run.initial} has features and factors {architecture}, expected {expected}")
        cascade.load_state_dict(initial.state_dict())
    cascade.precision = training_precision(torch.device(run.device))
    checkpoint = run.out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True, map_location=run.device) if checkpoint.exists() else None
    if state is not None:
        if state["settings"] != json.dumps(asdict(settings)):
            raise InputError(f"{checkpoint} was made with other settings: {state['settings']}")
        cascade.load_state_dict(state["cascade"])
    return cascade.to(run.device), state


def training_precision(device: torch.device) -> torch.dtype:
    """bfloat16 if the device has fast instructions for it, else float32. bfloat16 needs no scaling of the loss."""
    return torch.float32 if fastest_precision(device) == torch.float32 else torch.bfloat16


def train_level(
    cascade: Cascade,
    level: int,
    validation: list[ValidationPair],
    settings: TrainSettings,
    run: Run,
    state: dict | None,
    started: float,
) -> bool:
    """Take all steps of one level; False if the time limit came before the end."""
    steps = settings.steps[level]
    pairs = Pairs(level, settings, run) if steps > 0 else None
    optimiser = Optimiser(cascade.levels[level], settings.learning_rate, steps, settings.muon)
    first = 0
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    cascade.requires_grad_(False)
    cascade.levels[level].requires_grad_(True)
    for step in range(first, steps + 1):
        if step % run.validate_every == 0 or step == steps:
            write_log(run.out, level, step, validate(cascade, level, validation), started)
        if step == steps or pairs is None:
            break
        pair, generator = pairs(step)
        value, terms = step_loss(cascade, level, pair, settings, generator, run.device)
        optimiser.step(value)
        if step % 25 == 0:
            terms |= {"motion": pair.displacement.norm(dim=1).mean()}
            write_log(run.out, level, step, {name: float(v) for name, v in terms.items()}, started)
        out_of_time = time.monotonic() - started > 60 * run.minutes
        if (step + 1) % run.checkpoint_every == 0 or out_of_time:
            save_checkpoint(run.out, cascade, optimiser, level, step + 1, settings)
        if out_of_time:
            return False
    return True


def save_checkpoint(
    out: Path,
    cascade: Cascade,
    optimiser: Optimiser,
    level: int,
    step: int,
    settings: TrainSettings,
) -> None:
    """Write the checkpoint under another name first, so that a killed run leaves the last complete checkpoint."""
    state = {
        "settings": json.dumps(asdict(settings)),
        "level": level,
        "step": step,
        "cascade": cascade.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


def write_log(out: Path, level: int, step: int, values: dict[str, float], started: float) -> None:
    """Write one line per value to OUT/log.csv, and one line with all values to the log."""
    minutes = (time.monotonic() - started) / 60
    log.info(
        "level %d step %d (%.1f min): %s", level, step, minutes, "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    )
    with (out / "log.csv").open("a") as file:
        file.writelines(f"{level},{step},{minutes:.2f},{name},{value:.6g}\n" for name, value in values.items())


def source(run: Run) -> dict[str, Any]:
    """Description of the data behind the pairs, for the manifest."""
    if run.bank is None:
        scans = sorted(path.stem for path in run.train.glob("*.npz")) if run.train else []
        return {"scans": scans, "at_rest": asdict(AT_REST), "breath_hold": asdict(BREATH_HOLD)}
    description = run.bank / "bank.json"
    made_of: dict[str, Any] = json.loads(description.read_text()) if description.exists() else {}
    return made_of | {"bank": len(list((run.bank / "1").glob("*.npz")))}


def commit() -> str:
    """The commit of the code, for the manifest."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--train", type=Path, help="folder of packed scans, pairs are simulated in every step")
    source.add_argument("--bank", type=Path, help="folder of simulated pairs")
    parser.add_argument("--real-motion", type=Path, help="motion of real pairs, for the breath-holds")
    parser.add_argument("--validation", type=Path, help="folder of packed pairs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="weights folder to start from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, resumable, after so long")
    parser.add_argument("--config", type=Path, help="TOML file with fields of TrainSettings; what follows overrides it")
    parser.add_argument("--applications", type=int, nargs="+", help="of each level, coarse to fine")
    parser.add_argument("--steps", type=int, nargs="+", help="of each level, coarse to fine")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--keep-finer", action="store_true", default=None, help="train a level, leave the finer ones")
    arguments = vars(parser.parse_args())
    config = arguments.pop("config")
    per_level = {name: tuple(arguments.pop(name) or ()) or None for name in ("steps", "applications")}
    decisive = {name: arguments.pop(name) for name in ("seed", "learning_rate", "keep_finer")}
    settings = read_settings(config, **per_level, **decisive)
    train(settings, Run(**arguments))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))

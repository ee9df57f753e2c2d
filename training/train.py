"""Trains the cascade level by level, coarse first (Hering et al. 2021, sections 3.4 and 4.3).

    python -m training.train --out runs/first --train runs/train --validation runs/val --steps 3000 1000 300

One script, top to bottom. The coarsest network starts from Xavier's parameters, each finer one from those of the level
before, which then stays fixed. Every step simulates a breathing pair from one scan (`training.breathing`) and minimises
the objective of `algorithm.objective`; the keypoints are lung voxels with their exact partners. The randomness of a
step depends on nothing but seed, level and step, so a resumed run is the uninterrupted run.

OUT/checkpoint.pt holds everything to resume (settings included), OUT/log.csv the values, OUT/weights the result.
"""

import argparse
import json
import logging
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, jacobian_determinant, warp
from algorithm.network import Cascade, CascadeSettings, downsample_by
from algorithm.objective import Keypoints, Weights, ngf_distance, objective
from algorithm.weights import load_cascade, save_cascade
from training.breathing import BreathingSettings, SimulatedPair, simulate
from training.data import TrainingScan, ValidationPair, load_pair, load_scan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the result; kept in the checkpoint. Triples are for the levels, coarse to fine."""

    steps: tuple[int, ...] = (3000, 1000, 300)
    learning_rate: float = 1e-3
    """Adam's, at the start of a level; falls to a tenth by a cosine."""
    seed: int = 1
    alpha: tuple[float, ...] = (10.0, 10.0, 10.0)
    """Curvature, mm²."""
    beta: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Lung masks."""
    gamma: tuple[float, ...] = (0.04, 0.04, 0.04)
    """Volume change."""
    delta: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Exact keypoints, 1/mm²."""
    t: tuple[float, ...] = (0.2, 0.1, 0.05)
    epsilon_hu_per_mm: tuple[float, ...] = (3.0, 5.0, 10.0)
    """Edge parameter of the NGF distance; for CT the paper calls 0.1 to 10 good."""
    keypoints: int = 4096
    """Lung voxels drawn as keypoints in every step."""
    reduction: tuple[int, ...] = (2, 2, 1)
    """Downsampling at which pairs are simulated; the coarse level warps at twice its resolution, the middle at its
    own, for the sake of time."""
    scale: float = 0.12
    """Largest relative change of each voxel edge: lungs of other sizes and shapes."""
    bfloat16: bool = True
    """U-Nets in bfloat16: three times faster on a CPU with AVX-512 BF16."""

    def weights(self, level: int) -> Weights:
        """The objective's weights of one level."""
        return Weights(
            self.alpha[level],
            self.beta[level],
            self.gamma[level],
            self.delta[level],
            self.t[level],
        )


@dataclass(frozen=True)
class Run:
    """Where and how often; does not decide the result."""

    train: Path
    out: Path
    validation: Path | None = None
    initial: Path | None = None
    """Weights to start from. A level with 0 steps keeps them, unless a coarser one is trained: then it takes its."""
    device: str = "cpu"
    validate_every: int = 250
    checkpoint_every: int = 100
    minutes: float = float("inf")
    """Stop (resumable) after so long."""


def reduced(scan: TrainingScan, factor: int) -> TrainingScan:
    """The scan at 1/factor of its resolution."""
    voxels, lungs = downsample_by(scan.voxels, factor), downsample_by(scan.lungs, factor)
    return replace(scan, voxels=voxels, lungs=lungs, grid=scan.grid.coarsened(factor))


def simulated(scans: list[TrainingScan], level: int, step: int, settings: TrainSettings) -> SimulatedPair:
    """The pair of one step, at the resolution of the scans."""
    generator = torch.Generator().manual_seed((settings.seed * 10 + level) * 10_000_000 + step)
    scan = scans[int(torch.randint(len(scans), (), generator=generator))]
    stretch = 1 + settings.scale * (2 * torch.rand(3, generator=generator) - 1)
    voxels, lungs = scan.voxels, scan.lungs
    if torch.rand((), generator=generator) < 0.5:  # mirrored left to right
        voxels, lungs = voxels.flip(-1), lungs.flip(-1)
    x, y, z = (float(s * f) for s, f in zip(scan.grid.spacing, stretch, strict=True))
    return simulate(voxels, lungs, replace(scan.grid, spacing=(x, y, z)), generator, BreathingSettings())


def predict(
    cascade: Cascade, level: int, pair: SimulatedPair, reduction: int
) -> tuple[Float[Tensor, "1 3 z y x"], Grid]:
    """The field after ``level``, differentiable in that level's parameters only."""
    images = pair.fixed, pair.grid, pair.moving, pair.grid
    with torch.no_grad():
        so_far = cascade(*images, level, reduction) if level > 0 else None
    return cascade.add_level(level, *images, so_far, reduction)


def loss(
    displacement: Float[Tensor, "1 3 z y x"],
    grid: Grid,
    pair: SimulatedPair,
    level: int,
    settings: TrainSettings,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The objective of one simulated pair on the grid of ``level``."""
    factor = pair.grid.size[0] // grid.size[0]
    fixed, lungs = downsample_by(pair.fixed, factor), downsample_by(pair.fixed_lungs, factor)
    moving = downsample_by(torch.cat([pair.moving, pair.moving_lungs], dim=1), factor)
    warped = warp(moving, grid, displacement, grid)
    return objective(
        displacement,
        grid,
        settings.weights(level),
        ngf_distance(fixed, warped[:, :1], grid, lungs, settings.epsilon_hu_per_mm[level]),
        fixed_labels=lungs,
        warped_labels=warped[:, 1:],
        keypoints=[exact_keypoints(pair, settings.keypoints, generator)],
    )


def exact_keypoints(pair: SimulatedPair, number: int, generator: torch.Generator) -> Keypoints:
    """Lung voxels, drawn at random, with their exact partners."""
    index = (pair.fixed_lungs[0, 0] > 0.5).nonzero().cpu()
    index = index[torch.randint(len(index), (number,), generator=generator)]
    z, y, x = index.to(pair.displacement.device).unbind(1)
    fixed_mm = torch.from_numpy(pair.grid.to_world(index.numpy()[:, ::-1])).to(pair.displacement)
    return Keypoints(fixed_mm, fixed_mm + pair.displacement[0, :, z, y, x].T)


@torch.no_grad()
def validate(cascade: Cascade, level: int, pairs: list[ValidationPair]) -> dict[str, float]:
    """Mean TRE (mm) and folding fraction of every validation pair, with the levels up to ``level``."""
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


def train(settings: TrainSettings, run: Run) -> None:
    """Trains, or goes on with the training in ``run.out``."""
    started = time.monotonic()
    scans = [load_scan(path) for path in sorted(run.train.glob("*.npz"))]
    pairs = [load_pair(path) for path in sorted(run.validation.glob("*.npz"))] if run.validation else []
    if not scans:
        raise SystemExit(f"{run.train} holds no .npz scans; training.data makes them")
    run.out.mkdir(parents=True, exist_ok=True)
    cascade, state = start(settings, run)
    first_level = state["level"] if state else 0
    for level in range(first_level, len(settings.steps)):
        resumed = state if state and level == first_level else None
        if not train_level(cascade, level, scans, pairs, settings, run, resumed, started):
            return
        if settings.steps[level] > 0:
            for finer in cascade.levels[level + 1 :]:  # where their training starts, and usable without any
                finer.load_state_dict(cascade.levels[level].state_dict())
        provenance = {"commit": commit(), "settings": asdict(settings), "levels": level + 1, "scans": len(scans)}
        save_cascade(run.out / "weights", cascade, provenance)


def start(settings: TrainSettings, run: Run) -> tuple[Cascade, dict | None]:
    """The cascade to go on with, and the checkpoint that it comes from, if any."""
    torch.manual_seed(settings.seed)
    cascade = Cascade(CascadeSettings())
    if run.initial is not None:
        cascade.load_state_dict(load_cascade(run.initial).cascade.state_dict())
    cascade.precision = torch.bfloat16 if settings.bfloat16 else torch.float32
    checkpoint = run.out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True, map_location=run.device) if checkpoint.exists() else None
    if state is not None:
        if state["settings"] != json.dumps(asdict(settings)):
            raise SystemExit(f"{checkpoint} was made with other settings: {state['settings']}")
        cascade.load_state_dict(state["cascade"])
    return cascade.to(run.device), state


def train_level(
    cascade: Cascade,
    level: int,
    scans: list[TrainingScan],
    pairs: list[ValidationPair],
    settings: TrainSettings,
    run: Run,
    state: dict | None,
    started: float,
) -> bool:
    """All steps of one level; False when the time was up before."""
    steps, reduction = settings.steps[level], settings.reduction[level]
    scans = [reduced(scan, reduction) for scan in scans]
    optimiser = torch.optim.Adam(cascade.levels[level].parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1), settings.learning_rate / 10)
    first = 0
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    cascade.requires_grad_(False)
    cascade.levels[level].requires_grad_(True)
    for step in range(first, steps + 1):
        if step % run.validate_every == 0 or step == steps:
            write_log(run.out, level, step, validate(cascade, level, pairs), started)
        if step == steps:
            break
        pair = to_device(simulated(scans, level, step, settings), torch.device(run.device))
        generator = torch.Generator().manual_seed(step)
        displacement, grid = predict(cascade, level, pair, reduction)
        value, terms = loss(displacement, grid, pair, level, settings, generator)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(cascade.levels[level].parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            terms |= {"motion": pair.displacement.norm(dim=1)[pair.fixed_lungs[:, 0] > 0.5].square().mean()}
            write_log(run.out, level, step, {name: float(v) for name, v in terms.items()}, started)
        out_of_time = time.monotonic() - started > 60 * run.minutes
        if (step + 1) % run.checkpoint_every == 0 or out_of_time:
            save_checkpoint(run.out, cascade, optimiser, schedule, level, step + 1, settings)
        if out_of_time:
            return False
    return True


def to_device(pair: SimulatedPair, device: torch.device) -> SimulatedPair:
    """The pair on the training device."""
    names = ("fixed", "moving", "fixed_lungs", "moving_lungs", "displacement")
    return replace(pair, **{name: getattr(pair, name).to(device) for name in names})


def save_checkpoint(
    out: Path,
    cascade: Cascade,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    level: int,
    step: int,
    settings: TrainSettings,
) -> None:
    """Written under another name first: a killed run leaves the last whole checkpoint."""
    state = {
        "settings": json.dumps(asdict(settings)),
        "level": level,
        "step": step,
        "cascade": cascade.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
    }
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


def write_log(out: Path, level: int, step: int, values: dict[str, float], started: float) -> None:
    """One line per value in OUT/log.csv, and all on one line in the log."""
    minutes = (time.monotonic() - started) / 60
    log.info(
        "level %d step %d (%.1f min): %s", level, step, minutes, "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    )
    with (out / "log.csv").open("a") as file:
        file.writelines(f"{level},{step},{minutes:.2f},{name},{value:.6g}\n" for name, value in values.items())


def commit() -> str:
    """The commit of the code, for the record."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of packed scans")
    parser.add_argument("--validation", type=Path, help="folder of packed pairs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="weights folder to start from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, nargs=3, default=TrainSettings().steps, help="of each level")
    parser.add_argument("--seed", type=int, default=TrainSettings().seed)
    parser.add_argument("--learning-rate", type=float, default=TrainSettings().learning_rate)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop, resumable, after so long")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = TrainSettings(tuple(arguments.steps), arguments.learning_rate, arguments.seed)
    run = Run(
        arguments.train,
        arguments.out,
        arguments.validation,
        arguments.initial,
        arguments.device,
        minutes=arguments.minutes,
    )
    train(settings, run)


if __name__ == "__main__":
    main()

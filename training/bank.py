"""Simulate training pairs once, at the full resolution of the network, for training with little time per step.

    python -m training.bank --train runs/train --out runs/bank --pairs 300

OUT/1/00000.npz, … are the pairs, OUT/2 has the same pairs at half the resolution, and OUT/bank.json describes how they
were made. Noise and other effects of a scanner are not in the pairs: training draws them anew in every step. Existing
pairs are kept, so the command continues where it was stopped.
"""

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from algorithm.errors import InputError, exit_code
from training.breathing import AT_REST, BREATH_HOLD
from training.data import load_scan
from training.pairs import save_pair
from training.random_motion import load_real_motions
from training.train import drawn_pair, kind_of_breathing

log = logging.getLogger(__name__)

REDUCTIONS = (1, 2)
DESCRIPTION = "bank.json"
SEEDS_OF_BANKS = 9
"""Replaces the level in the seeds of `training.train`, so that a bank has no pair that training itself draws."""


def write_bank(
    train: Path, out: Path, pairs: int, seed: int, breath_holds: float = 0.5, real_motion: Path | None = None
) -> None:
    """Write the pairs 0 to ``pairs`` - 1 of ``seed``. Each pair depends on seed and number only."""
    scans = [load_scan(path) for path in sorted(train.glob("*.npz"))]
    if not scans:
        raise InputError(f"{train} holds no .npz scans; training.data makes them")
    for reduction in REDUCTIONS:
        (out / str(reduction)).mkdir(parents=True, exist_ok=True)
    real = load_real_motions(real_motion) if real_motion else None
    kinds = {"at_rest": asdict(AT_REST), "breath_hold": asdict(BREATH_HOLD), "breath_holds": breath_holds}
    _describe(out, {"seed": seed, "scans": [scan.name for scan in scans], **kinds, "real": real is not None})
    for number in tqdm(range(pairs), disable=None):
        if number % 50 == 0:
            log.info("pair %d of %d", number, pairs)
        paths = [out / str(reduction) / f"{number:05d}.npz" for reduction in REDUCTIONS]
        if not all(path.exists() for path in paths):
            own = (seed * 10 + SEEDS_OF_BANKS) * 10_000_000 + number
            pair = drawn_pair(scans, own, kind_of_breathing(own, breath_holds), real=real)
            for reduction, path in zip(REDUCTIONS, paths, strict=True):
                save_pair(path, pair.reduced(reduction))


def _describe(out: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to OUT/bank.json; InputError if the pairs in OUT were made from something else."""
    content = json.loads(json.dumps(content))
    path = out / DESCRIPTION
    made = json.loads(path.read_text()) if path.exists() else None
    if made != content and any(out.glob("*/*.npz")):
        raise InputError(f"{out} holds pairs of another seed, other scans or other settings; expected a new folder")
    path.write_text(json.dumps(content, indent=2))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="folder of packed scans")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--breath-holds", type=float, default=0.5, help="their share")
    parser.add_argument("--real-motion", type=Path, help="motion of real pairs, for the breath-holds")
    write_bank(**vars(parser.parse_args()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(exit_code(main))

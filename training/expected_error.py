"""Fit the model of the expected error (`algorithm.fields.expected_error`) on simulated pairs.

    python -m training.expected_error --bank runs/bank/1 --pairs 40

The pairs are from a bank (`training.bank`), with noise, kernel and offset. Some pairs are rotated and shifted, by up to
some 20° and 20 mm. In some pairs, one scan is cut. All pairs are pre-aligned as in the program, so that registrations
fail where they fail in practice, and not more often. (In a first fit, half of the pairs were misplaced *after* the
pre-alignment. Where these failed, both directions failed in the same way, with errors of up to three times their
distance. The exponents became too large, and the errors of real breath-holds were overestimated by a third.)

Each pair is registered with ``off``, ``fast`` and ``full``. The exact errors of the fields in the lungs are predicted
from the distance of the two fields and the change of volume, see `fitted`. The result is written into the manifest of
the weights. A table is printed of how well each pair is predicted when it is left out of the fit.
"""

import argparse
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.spatial.transform import Rotation
from scipy.stats import mannwhitneyu
from torch import Tensor
from tqdm import tqdm

from algorithm.cascade.weights import LoadedCascade, find_weights, load_cascade, save_errors
from algorithm.errors import InputError, exit_code
from algorithm.fields.expected_error import LARGE_MM, MOST_MM, OFFSET_MM, ErrorModel, ErrorModels
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid, moved, resample, with_affine
from algorithm.lungs import LungMask
from algorithm.preparation.prepare import Prepared, prepare
from algorithm.preparation.subject import Subject
from algorithm.refinement.refine import Refined, refine
from algorithm.registration import REFINE, doubted, evidence, predict
from algorithm.report import Report
from training.breathing import AT_REST, BREATH_HOLD, scanned
from training.pairs import load_pair

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
POINTS = 4000
"""Number of random points in the lungs for each result."""
MOST_DEGREES, MOST_SHIFT_MM = 20.0, 20.0
MISPLACED, CUT = 0.3, 0.4
"""Share of the pairs that are rotated and shifted, and share of the pairs in which one scan is cut."""
NEAR_MM = 2.0
LEAST_LARGE, MOST_OFF = 0.03, 0.3
"""Share of the positions beyond 3 mm above which there is an AUROC, and the accepted deviation of a mean."""
CORNER = 0.1
"""Below about this value, the absolute value is smoothed, so that it has a derivative everywhere."""

Sample = tuple[np.ndarray, np.ndarray]
"""Features (p, 2) and errors (p,) in mm at some positions."""


@dataclass(frozen=True)
class Drawn:
    """A simulated pair, as input of the program."""

    fixed: Subject
    moving: Subject
    displacement: Float[Tensor, "1 3 z y x"]
    """The exact displacement (mm)."""
    grid: Grid
    """The grid of the displacement."""

    def truth(self, pair: Prepared, grid: Grid) -> Float[Tensor, "1 3 z y x"]:
        """The exact displacement before the pre-alignment's affine map, mm on ``grid``."""
        return with_affine(resample(self.displacement, self.grid, grid), grid, pair.affine.inverse())


def drawn(path: Path, number: int) -> Drawn:
    """A pair of the bank, with noise. Some pairs are rotated and shifted, and some are cut."""
    generator, chance = torch.Generator().manual_seed(77_000_000 + number), np.random.default_rng(number)
    pair = load_pair(path)
    if torch.rand((), generator=generator) < 0.5:
        pair = pair.swapped()
    pair = scanned(pair, generator, BREATH_HOLD if number % 2 else AT_REST)  # noise of this kind of scan
    rigid = misplaced(pair.grid, chance) if chance.random() < MISPLACED else Affine()
    fixed = simulated_subject(pair.fixed, pair.fixed_lungs, pair.grid)
    moving = simulated_subject(pair.moving, pair.moving_lungs, pair.moving_grid)
    if chance.random() < CUT:
        fixed, moving = (cut(fixed, chance), moving) if chance.random() < 0.5 else (fixed, cut(moving, chance))
    displacement = with_affine(resample(pair.displacement, pair.displacement_grid, pair.grid), pair.grid, rigid)
    return Drawn(fixed, carried(moving, rigid), displacement, pair.grid)


def misplaced(grid: Grid, chance: np.random.Generator) -> Affine:
    """A random rotation about the middle and a shift: a patient in another position."""
    size = chance.random()
    turn = np.deg2rad(MOST_DEGREES * size) * chance.normal(size=3) / np.sqrt(3)
    rotation = Rotation.from_rotvec(turn).as_matrix()
    middle = grid.to_world((np.array(grid.size) - 1) / 2)
    shift = MOST_SHIFT_MM * size * chance.normal(size=3) / np.sqrt(3)
    return Affine.from_arrays(rotation, middle - rotation @ middle + shift)


def simulated_subject(hu: Tensor, lungs: Tensor, grid: Grid) -> Subject:
    """A scan with its lungs, as input of the program."""
    return Subject(Image(hu, grid, Path("simulated")), LungMask(lungs > 0.5, grid))


def carried(scan: Subject, rigid: Affine) -> Subject:
    """The scan moved by a rigid map of the world."""
    grid = moved(scan.image.grid, rigid)
    return Subject(replace(scan.image, grid=grid), replace(scan.lungs, grid=grid))


def cut(scan: Subject, chance: np.random.Generator) -> Subject:
    """The scan without up to half of its voxels, at one end of the index axis x or z."""
    axis = int(chance.choice([0, 2]))
    size = list(scan.image.grid.size)
    missing = round(0.5 * chance.random() * size[axis])
    first = missing if chance.random() < 0.5 else 0
    size[axis] -= missing
    start = [0, 0, 0]
    start[axis] = first
    (x, y, z), (nx, ny, nz) = start, size
    grid = scan.image.grid.cropped((x, y, z), (nx, ny, nz))
    hu, lungs = (v[:, :, z : z + nz, y : y + ny, x : x + nx] for v in (scan.image.voxels, scan.lungs.mask))
    return Subject(replace(scan.image, voxels=hu, grid=grid), LungMask(lungs, grid))


def sample(pair: Prepared, drawn: Drawn, result: Refined, seed: int) -> Sample:
    """Features and errors of one result, where there is an estimate."""
    found = evidence(pair, drawn.moving, result)
    displacement = resample(result.displacement, result.grid, found.grid)
    error = (displacement - drawn.truth(pair, found.grid)).norm(dim=1)
    voxels = found.known[0, 0].nonzero()
    some = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(seed))[:POINTS]]
    z, y, x = some.T
    return found.features[:, z, y, x].T.numpy(), error[0, z, y, x].numpy()


def samples(path: Path, number: int, weights: LoadedCascade) -> tuple[Sample, list[Sample]]:
    """The sample of a pair's cascade, and the samples of its refinements."""
    pair = drawn(path, number)
    fixed, moving = pair.fixed, pair.moving
    prepared = prepare(fixed, moving, weights.cascade.settings.network_size)
    found = predict(prepared, weights.cascade, CPU, Report())
    of_cascade = sample(prepared, pair, doubted(fixed, moving, prepared, found, CPU), number)
    start = prepared.affine, found.displacement, found.grid
    refined = [refine(fixed, moving, *start, settings) for settings in REFINE.values()]
    return of_cascade, [sample(prepared, pair, one, number) for one in refined]


def fitted(some: list[Sample]) -> ErrorModel:
    """The model that fits at every position, and in the mean over each result.

    With m the modelled and e the true error, both with c, it minimises the mean over all results of

        mean(log m + e/m) + |log(mean m / mean e)|.

    The first term is the gamma regression: it is smallest where m is the mean of e, given the features. The second term
    counts every result once, by the factor of its error, so that few large failures do not dominate.
    """
    both = [(torch.from_numpy(x).double(), torch.from_numpy(e).double()) for x, e in some]
    data = [(x, e.clamp(max=MOST_MM) + OFFSET_MM) for x, e in both]
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def deviance() -> Tensor:
        optimiser.zero_grad()
        losses = []
        for x, error in data:
            logarithm = weights[0] + x @ weights[1:]
            factor = (logarithm.exp().mean() / error.mean()).log()
            absolute = (factor.square() + CORNER**2).sqrt()
            losses.append((logarithm + error * torch.exp(-logarithm)).mean() + absolute)
        value = torch.stack(losses).mean()
        value.backward()
        return value

    optimiser.step(deviance)
    return ErrorModel(*(round(float(w), 4) for w in weights.detach()))


def all_samples(bank: Path, pairs: int, weights: LoadedCascade) -> dict[str, list[list[Sample]]]:
    """The samples of the first ``pairs`` pairs of a bank: for each model, a list for each pair.

    InputError if the bank has no pairs. Pairs whose scans share too little for a pre-alignment are left out.
    """
    paths = sorted(bank.glob("*.npz"))[:pairs]
    if not paths:
        raise InputError(f"{bank} holds no .npz pairs; training.bank makes them")
    found: dict[str, list[list[Sample]]] = {"cascade": [], "refined": []}
    for number, path in enumerate(tqdm(paths, disable=None)):
        try:
            one, others = samples(path, number, weights)
        except InputError as error:
            log.info("pair %d: %s", number, error)
            continue
        found["cascade"].append([one])
        found["refined"].append(others)
    return found


def left_out(pairs: list[list[Sample]]) -> pd.DataFrame:
    """`judged` for every result, by a model that was fitted on all pairs but its own."""
    rows = []
    for number, own in enumerate(pairs):
        model = fitted([one for pair in pairs[:number] + pairs[number + 1 :] for one in pair])
        rows += [judged(model(torch.from_numpy(x).T[..., None, None]).flatten().numpy(), error) for x, error in own]
    return pd.DataFrame(rows)


def judged(expected_mm: Float[np.ndarray, " p"], error_mm: Float[np.ndarray, " p"]) -> dict[str, float]:
    """How well the expected errors of one result fit the true ones, at the same positions.

    Both means; the AUROC of the errors beyond 3 mm (NaN where 3 % of them are beyond it, or less); and, of the
    positions that are said to be within 2 mm, how many are.
    """
    large, near = error_mm > LARGE_MM, expected_mm < NEAR_MM
    return {
        "expected_mm": float(expected_mm.mean()) if len(expected_mm) else math.nan,
        "true_mm": float(error_mm.mean()) if len(error_mm) else math.nan,
        "auroc_3mm": auroc(expected_mm, large) if len(large) and large.mean() > LEAST_LARGE else math.nan,
        "within_2mm_as_said": float((error_mm[near] < NEAR_MM).mean()) if near.any() else math.nan,
    }


def auroc(values: Float[np.ndarray, " p"], positive: Bool[np.ndarray, " p"]) -> float:
    """Probability that a positive has the larger value (Mann and Whitney); NaN if all are positive, or none."""
    number = int(positive.sum()) * int((~positive).sum())
    return float(mannwhitneyu(values[positive], values[~positive]).statistic) / number if number else math.nan


def summary(table: pd.DataFrame) -> pd.Series:
    """Of rows of `judged`: how near the expected error comes to the true one."""
    ratio = table.expected_mm / table.true_mm
    return pd.Series(
        {
            "results": len(table),
            "expected / true, median": ratio.median(),
            "least": ratio.min(),
            "most": ratio.max(),
            "within 30 %": ((ratio - 1).abs() <= MOST_OFF).mean(),
            "AUROC beyond 3 mm, mean": table.auroc_3mm.mean(),
            "least AUROC": table.auroc_3mm.min(),
            "said within 2 mm, and are": table.within_2mm_as_said.mean(),
        }
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: the program's own)")
    arguments = parser.parse_args()
    weights = find_weights(arguments.weights)
    found = all_samples(arguments.bank, arguments.pairs, load_cascade(weights))
    models = ErrorModels(*(fitted([one for pair in found[name] for one in pair]) for name in ("cascade", "refined")))
    on = {"pairs": arguments.pairs, "points": POINTS, "misplaced": MISPLACED, "cut": CUT, "simulated": True}
    save_errors(weights, models, on)
    print(models)
    print(pd.DataFrame({name: summary(left_out(pairs)) for name, pairs in found.items()}).round(3).to_string())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(exit_code(main))

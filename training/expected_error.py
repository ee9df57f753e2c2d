"""Fit the model of the expected error (`algorithm.fields.expected_error`) on simulated pairs.

    python -m training.expected_error --bank runs/bank/1 --pairs 40 [--only cascade]

The pairs are from a bank (`training.bank`), with noise, kernel and offset. Some pairs are rotated and shifted, by up to
some 20° and 20 mm. In some pairs, one scan is cut. All pairs are pre-aligned as in the program, so that registrations
fail where they fail in practice, and not more often. (In a first fit, half of the pairs were misplaced *after* the
pre-alignment. Where these failed, both directions failed in the same way, with errors of up to three times their
distance. The exponents became too large, and the errors of real breath-holds were overestimated by a third.)

Each pair is registered with ``off``, ``fast`` and ``full``. The exact errors of the fields in the lungs are predicted
from the distance of the two directions, see `fitted`. The result is written into the manifest of the weights.
"""

import argparse
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor
from tqdm import tqdm

from algorithm.cascade.weights import LoadedCascade, find_weights, load_cascade, manifest_of, save_errors
from algorithm.errors import InputError, exit_code
from algorithm.fields.expected_error import MOST_MM, OFFSET_MM, ErrorModel, ErrorModels, features
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid, downsample, moved, resample, validity, with_affine
from algorithm.lungs import LungMask
from algorithm.preparation.prepare import Prepared, prepare
from algorithm.preparation.subject import Subject
from algorithm.refinement.refine import Refined, refine
from algorithm.registration import REFINE, predict
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
    """Features and errors of one result, where `algorithm.registration.estimate` would give an estimate."""
    if result.inconsistency_mm is None:
        raise InputError("the cascade has no level for a second opinion, expected one of a half resolution")
    grid = pair.grid.coarsened()
    apart, found = (resample(v, result.grid, grid) for v in (result.inconsistency_mm, result.displacement))
    seen = validity(found, grid, drawn.moving.image.grid, affine=pair.affine)
    known = ((downsample(pair.fixed_lungs) > 0.5) & seen).float()
    error = (found - drawn.truth(pair, grid)).norm(dim=1)
    voxels = known[0, 0].nonzero()
    some = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(seed))[:POINTS]]
    z, y, x = some.T
    return features(apart, known)[:, z, y, x].T.numpy(), error[0, z, y, x].numpy()


def samples(path: Path, number: int, weights: LoadedCascade, refinements: list[str]) -> tuple[Sample, list[Sample]]:
    """The sample of a pair's cascade, and the samples of its refinements."""
    pair = drawn(path, number)
    fixed, moving = pair.fixed, pair.moving
    prepared = prepare(fixed, moving, weights.cascade.settings.network_size)
    found = predict(prepared, weights.cascade, CPU, Report(), backwards=True)
    start = prepared.affine, found.displacement, found.grid
    refined = [refine(fixed, moving, *start, REFINE[name]) for name in refinements]
    return sample(prepared, pair, found, number), [sample(prepared, pair, one, number) for one in refined]


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


def fit(bank: Path, pairs: int, weights: Path, refinements: list[str]) -> ErrorModels:
    """Fit on the first ``pairs`` pairs of a bank; without ``refinements`` the refined model does not change.

    InputError if the bank has no pairs. Pairs whose scans share too little for a pre-alignment are left out.
    """
    paths = sorted(bank.glob("*.npz"))[:pairs]
    if not paths:
        raise InputError(f"{bank} holds no .npz pairs; training.bank makes them")
    loaded = load_cascade(weights)
    stays = None if refinements else loaded.errors
    if not refinements and stays is None:
        raise InputError(f"{weights}: its manifest has no model of the refined error that could stay")
    of_cascade, of_refined = [], []
    for number, path in enumerate(tqdm(paths, disable=None)):
        try:
            one, others = samples(path, number, loaded, refinements)
        except InputError as error:
            log.info("pair %d: %s", number, error)
            continue
        of_cascade.append(one)
        of_refined += others
    return ErrorModels(fitted(of_cascade), fitted(of_refined) if stays is None else stays.refined)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--only", choices=["cascade"], help="the model of --refine off; the other one stays")
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: the program's own)")
    arguments = parser.parse_args()
    weights = find_weights(arguments.weights)
    models = fit(arguments.bank, arguments.pairs, weights, [] if arguments.only else list(REFINE))
    on = {"pairs": arguments.pairs, "points": POINTS, "misplaced": MISPLACED, "cut": CUT, "simulated": True}
    before = manifest_of(weights).get("expected_error", {}).get("fitted", {})
    stays = before.get("refined", before)
    save_errors(weights, models, {"cascade": on, "refined": stays if arguments.only else on})
    print(models)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(exit_code(main))

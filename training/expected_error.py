"""Fits what the expected error is estimated with (`algorithm.fields.expected_error`), on simulated pairs.

    python -m training.expected_error --bank runs/bank/1 --pairs 40

The pairs are those of a bank (`training.bank`) with noise, kernel and offset, which a pre-alignment has not seen: every
other one is turned and shifted, by up to some 20° and 20 mm, so that some registrations fail as they do in practice.
Each is registered with ``off``, ``fast`` and ``full``; the fields' exact errors in the lungs are explained by the
distance of the two directions: gamma regression with a logarithmic link, which asks of the mean that it be right.
The result is written into the manifest of the weights.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor
from tqdm import tqdm

from algorithm.cascade.weights import LoadedCascade, find_weights, load_cascade, save_errors
from algorithm.errors import InputError, exit_code
from algorithm.fields.expected_error import MOST_MM, OFFSET_MM, ErrorModel, ErrorModels, features
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid, downsample, resample, resample_image, validity, with_affine
from algorithm.hounsfield import AIR_HU
from algorithm.lungs import LungMask
from algorithm.preparation.prepare import Prepared, PrepareSettings
from algorithm.preparation.subject import Subject
from algorithm.refinement.refine import Refined, refine
from algorithm.registration import REFINE, predict
from algorithm.report import Report
from benchmarks.invariance import moved
from training.breathing import AT_REST, BREATH_HOLD, scanned
from training.pairs import TrainingPair, load_pair

CPU = torch.device("cpu")
POINTS = 4000
"""Of each result, at random in the lungs."""
MOST_DEGREES, MOST_SHIFT_MM = 20.0, 20.0

Sample = tuple[np.ndarray, np.ndarray]
"""Features (p, 2) and errors (p,) in mm at some places."""


def drawn(path: Path, number: int) -> tuple[Prepared, Subject, Subject, Float[Tensor, "1 3 z y x"]]:
    """A pair of the bank as the cascade sees it, its scans, and its exact displacement (mm) on the network grid."""
    generator, chance = torch.Generator().manual_seed(77_000_000 + number), np.random.default_rng(number)
    pair = load_pair(path)
    if torch.rand((), generator=generator) < 0.5:
        pair = pair.swapped()
    pair = scanned(pair, generator, BREATH_HOLD if number % 2 else AT_REST)  # as noisy as such scans are
    rigid = misplaced(pair.grid, chance) if chance.random() < 0.5 else Affine()
    moving_grid = moved(pair.moving_grid, rigid)
    truth = with_affine(resample(pair.displacement, pair.displacement_grid, pair.grid), pair.grid, rigid)
    fixed, moving = find_both_lungs(pair, moving_grid)
    around = pair.grid.padded(PrepareSettings().moving_margin_vox)
    hu = resample_image(pair.moving, moving_grid, around, least=AIR_HU, fill=AIR_HU)
    lungs = resample_image(pair.moving_lungs, moving_grid, around, least=0.0, fill=0.0)
    return Prepared(pair.fixed, pair.fixed_lungs, pair.grid, hu, lungs, around, Affine()), fixed, moving, truth


def misplaced(grid: Grid, chance: np.random.Generator) -> Affine:
    """A rotation about the middle and a shift, from none to the largest, such as a poor pre-alignment leaves."""
    size = chance.random()
    turn = np.deg2rad(MOST_DEGREES * size) * chance.normal(size=3) / np.sqrt(3)
    rotation = Rotation.from_rotvec(turn).as_matrix()
    middle = grid.to_world((np.array(grid.size) - 1) / 2)
    shift = MOST_SHIFT_MM * size * chance.normal(size=3) / np.sqrt(3)
    return Affine.from_arrays(rotation, middle - rotation @ middle + shift)


def find_both_lungs(pair: TrainingPair, moving_grid: Grid) -> tuple[Subject, Subject]:
    """The scans with their lungs, as the refinement takes them."""
    fixed = Subject(Image(pair.fixed, pair.grid, Path("fixed")), LungMask(pair.fixed_lungs > 0.5, pair.grid))
    moving = Image(pair.moving, moving_grid, Path("moving"))
    return fixed, Subject(moving, LungMask(pair.moving_lungs > 0.5, moving_grid))


def sample(pair: Prepared, moving: Subject, result: Refined, truth: Tensor, seed: int) -> Sample:
    """Features and errors of one result, where `algorithm.registration.estimate` would speak."""
    if result.inconsistency_mm is None:
        raise InputError("the cascade has no level for a second opinion, expected one of a half resolution")
    grid = pair.grid.coarsened()
    apart, found = (resample(v, result.grid, grid) for v in (result.inconsistency_mm, result.displacement))
    seen = validity(found, grid, moving.image.grid, affine=pair.affine)
    known = ((downsample(pair.fixed_lungs) > 0.5) & seen).float()
    error = (found - resample(truth, pair.grid, grid)).norm(dim=1)
    voxels = known[0, 0].nonzero()
    some = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(seed))[:POINTS]]
    z, y, x = some.T
    return features(apart, known)[:, z, y, x].T.numpy(), error[0, z, y, x].numpy()


def samples(path: Path, number: int, weights: LoadedCascade) -> tuple[Sample, list[Sample]]:
    """Of a pair's cascade, and of its refinements."""
    pair, fixed, moving, truth = drawn(path, number)
    found = predict(pair, weights.cascade, CPU, Report(), backwards=True)
    refined = [
        refine(fixed, moving, pair.affine, found.displacement, found.grid, settings) for settings in REFINE.values()
    ]
    return sample(pair, moving, found, truth, number), [sample(pair, moving, r, truth, number) for r in refined]


def fitted(some: list[Sample]) -> ErrorModel:
    """The gamma regression: minimises log m + e/m over all places, m the modelled mean and e the error, both with c."""
    x = torch.from_numpy(np.concatenate([features for features, _ in some])).double()
    x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], dim=1)
    error = torch.from_numpy(np.concatenate([e for _, e in some])).double().clamp(max=MOST_MM) + OFFSET_MM
    weights = torch.zeros(3, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def deviance() -> Tensor:
        optimiser.zero_grad()
        logarithm = x @ weights
        value = (logarithm + error * torch.exp(-logarithm)).mean()
        value.backward()
        return value

    optimiser.step(deviance)
    return ErrorModel(*(round(float(w), 4) for w in weights.detach()))


def fit(bank: Path, pairs: int, weights: Path) -> ErrorModels:
    """Fits on so many pairs of a bank; InputError where there are none."""
    paths = sorted(bank.glob("*.npz"))[:pairs]
    if not paths:
        raise InputError(f"{bank} holds no .npz pairs; training.bank makes them")
    loaded = load_cascade(weights)
    of_cascade, of_refined = [], []
    for number, path in enumerate(tqdm(paths, disable=None)):
        one, others = samples(path, number, loaded)
        of_cascade.append(one)
        of_refined += others
    return ErrorModels(fitted(of_cascade), fitted(of_refined))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: the program's own)")
    arguments = parser.parse_args()
    weights = find_weights(arguments.weights)
    models = fit(arguments.bank, arguments.pairs, weights)
    provenance: dict[str, Any] = {"pairs": arguments.pairs, "points": POINTS, "simulated": True}
    save_errors(weights, models, provenance)
    print(models)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    raise SystemExit(exit_code(main))

"""The expected error: its formula, where it speaks, what it warns of, and how it is fitted."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor

from algorithm import registration
from algorithm.cascade.network import Cascade, CascadeSettings
from algorithm.cascade.weights import load_cascade, save_cascade, save_errors
from algorithm.errors import InputError
from algorithm.fields.expected_error import ErrorModel, ErrorModels, ExpectedError, expected_error, features, warnings
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid, with_affine
from algorithm.lungs import LungMask
from algorithm.preparation.prepare import Prepared
from algorithm.preparation.subject import Subject
from algorithm.refinement.refine import FAST, Refined, RefineSettings
from algorithm.registration import evidence
from tests.support.made_up_results import MODEL
from tests.support.running import call_main, results
from tests.support.strategies import smooth_field
from training.expected_error import Drawn, carried, cut, fitted, judged, left_out, simulated_subject, summary

GRID = Grid((12, 10, 8), (4.0, 4.0, 4.0))


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of the two fields (mm), changes of volume, and where they count."""
    generator = torch.Generator().manual_seed(seed)
    apart, volume, known = (torch.rand(1, 1, *GRID.shape, generator=generator) for _ in range(3))
    return 3 * apart, 1.5 * volume - 0.1, (known > 0.4).float()


def test_it_is_the_formula_of_the_module() -> None:
    apart, volume, known = drawn()
    found = expected_error(features(apart, volume, known), known, GRID, MODEL)
    d, j, w = (v[0, 0].double().numpy() for v in (apart, volume.clamp(min=0), known))
    sums = [ndimage.generic_filter(v, np.sum, size=5, mode="constant") for v in (d * w, j * w, w)]
    wanted = np.exp(-0.2) * (sums[0] / sums[2] + 0.1) ** 0.9 * (sums[1] / sums[2] + 0.1) ** -0.4 - 0.1
    np.testing.assert_allclose(found.mm[0, 0].numpy()[w > 0], wanted[w > 0].clip(0), rtol=1e-4, atol=1e-5)
    assert not found.mm[known == 0].any()


def test_what_is_not_known_says_nothing_of_its_neighbours() -> None:
    apart, volume, known = drawn()
    others = (torch.where(known > 0, v, 1000.0) for v in (apart, volume))
    there = known[0, 0] > 0
    torch.testing.assert_close(features(*others, known)[:, there], features(apart, volume, known)[:, there])


@pytest.mark.parametrize(("distance", "volume"), [(2.0, 1.0), (1.0, 0.5)])
def test_farther_apart_or_smaller_is_more_error(distance: float, volume: float) -> None:
    apart, j, known = drawn()
    less, more = (
        expected_error(features(f * apart, v * j, known), known, GRID, MODEL).figures()["mean_mm"]
        for f, v in ((1.0, 1.0), (distance, volume))
    )
    assert less is not None and more is not None and 1.15 * less < more


def test_on_another_grid_it_ends_where_the_lungs_end() -> None:
    known = torch.zeros(1, 1, *GRID.shape)
    known[..., :6] = 1
    error = ExpectedError(2.5 * known, known, GRID)
    fine = GRID.resized((48, 40, 32))
    values = error.at(fine)
    assert (((values - 2.5).abs() < 1e-5) | (values == -1)).all()  # no mixture of both at the border
    assert ((values > 0).float().mean() - 0.5).abs() < 0.02
    assert torch.equal(error.at(fine, elsewhere=60.0) == 60, values < 0)


def test_figures_are_those_of_the_known() -> None:
    mm, known = torch.tensor([1.0, 2.0, 4.0, 50.0]).reshape(1, 1, 1, 1, 4), torch.ones(1, 1, 1, 1, 4)
    known[..., 3] = 0
    found = ExpectedError(mm, known, Grid((4, 1, 1))).figures()
    assert found["mean_mm"] == pytest.approx(7 / 3)
    assert found["share_above_3mm"] == pytest.approx(1 / 3)
    assert found["p95_mm"] == pytest.approx(3.8)
    nothing = ExpectedError(mm, 0 * known, Grid((4, 1, 1))).figures()
    assert set(nothing.values()) == {None} and not warnings(nothing)


@pytest.mark.parametrize(("mean", "share", "warned"), [(1.9, 0.025, False), (2.1, 0.02, True), (1.0, 0.035, True)])
def test_a_large_error_is_warned_of(mean: float, share: float, warned: bool) -> None:
    said = warnings({"mean_mm": mean, "p95_mm": 3.0, "share_above_3mm": share})
    assert bool(said) == warned
    assert all(f"{mean:.1f} mm" in sentence for sentence in said)


def test_the_fit_finds_the_model_that_made_the_errors() -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(20000, 2)).astype(np.float32)
    mean = np.exp(-0.5 + 0.8 * x[:, 0] + 0.3 * x[:, 1])
    error = (mean * chance.gamma(2.0, 0.5, len(x)) - 0.1).astype(np.float32)
    found = fitted([(x[:9000], error[:9000]), (x[9000:], error[9000:])])
    assert (found.constant, found.around, found.volume) == pytest.approx((-0.5, 0.8, 0.3), abs=0.03)


def test_what_is_left_out_is_judged_by_the_others() -> None:
    """Two kinds of pairs, with errors of once and twice the distance: each is judged by the other's model."""
    chance = np.random.default_rng(0)
    x = chance.normal(1.0, 0.5, size=(3000, 2)).astype(np.float32)
    once, twice = ([(x, (f * np.exp(x[:, 0]) - 0.1).astype(np.float32))] for f in (1.0, 2.0))
    found = left_out([once, twice])
    np.testing.assert_allclose(found.expected_mm / found.true_mm, [2.0, 0.5], rtol=0.1)
    told = summary(found)
    assert told["results"] == 2 and told["within 30 %"] == 0
    assert (told["least"], told["most"]) == pytest.approx((0.5, 2.0), rel=0.1)


def test_an_expected_error_is_judged_by_the_true_one() -> None:
    error = np.array([0.5, 1.0, 4.0, 5.0])
    found = judged(np.array([0.5, 1.5, 1.0, 3.0]), error)
    assert (found["expected_mm"], found["true_mm"]) == (1.5, 2.625)
    assert found["auroc_3mm"] == 0.75  # of four comparisons, 1.5 with 1.0 is wrong
    assert found["within_2mm_as_said"] == pytest.approx(2 / 3)
    assert math.isnan(judged(error, np.full(4, 0.5))["auroc_3mm"])
    assert all(map(math.isnan, judged(error[:0], error[:0]).values()))


def test_few_large_failures_do_not_decide_for_all() -> None:
    """Nine results with errors of half the distance, one with six times it: their mean ratio is 1.05."""
    chance = np.random.default_rng(0)
    x = [chance.normal(0.5, 0.5, size=(500, 2)).astype(np.float32) for _ in range(10)]
    ratios = [0.5] * 9 + [6.0]
    results = [(d, (r * np.exp(d[:, 0]) - 0.1).astype(np.float32)) for d, r in zip(x, ratios, strict=True)]
    found = fitted(results)
    mean = [np.exp(found.constant + found.around * d[:, 0] + found.volume * d[:, 1]).mean() for d in x]
    assert np.median([m / np.exp(d[:, 0]).mean() for m, d in zip(mean, x, strict=True)]) == pytest.approx(0.5, rel=0.25)


def test_the_truth_of_a_misplaced_pair_is_in_front_of_the_prealignment() -> None:
    """affine(x + truth(x)) is where the point went: through the motion, and along with the patient."""
    grid = Grid((12, 10, 14), (3.0, 3.0, 3.0), (-15.0, 5.0, 40.0))
    motion = smooth_field(grid, 2.0, torch.Generator().manual_seed(1))
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
    rigid, found = Affine.from_arrays(turn, np.array([5.0, -3.0, 12.0])), Affine.from_arrays(1.1 * turn.T, np.ones(3))
    scan = simulated_subject(torch.zeros(1, 1, *grid.shape), torch.ones(1, 1, *grid.shape), grid)
    pair = Drawn(scan, carried(scan, rigid), with_affine(motion, grid, rigid), grid)
    prepared = Prepared(*(scan.image.voxels,) * 2, grid, *(scan.image.voxels,) * 2, grid, found)
    z, y, x = np.indices(grid.shape).reshape(3, -1)
    points = grid.to_world(np.stack([x, y, z], axis=1))
    truth = pair.truth(prepared, grid)[0, :, z, y, x].T.double().numpy()
    wanted = rigid(points + motion[0, :, z, y, x].T.double().numpy())
    np.testing.assert_allclose(found(points + truth), wanted, atol=1e-3)
    np.testing.assert_allclose(pair.moving.image.grid.to_world(np.array([1, 2, 3])), rigid(points[0] + [3.0, 6.0, 9.0]))


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_scan_keeps_its_voxels_in_their_places(seed: int) -> None:
    scan = simulated_subject(torch.rand(1, 1, *GRID.shape), torch.rand(1, 1, *GRID.shape), GRID)
    part = cut(scan, np.random.default_rng(seed))
    first = GRID.to_index(np.array(part.image.grid.origin)).round().astype(int)
    x, y, z = (slice(a, a + n) for a, n in zip(first, part.image.grid.size, strict=True))
    assert torch.equal(part.image.voxels, scan.image.voxels[:, :, z, y, x])
    assert torch.equal(part.lungs.mask, scan.lungs.mask[:, :, z, y, x])
    assert part.image.grid == part.lungs.grid and 0.5 <= part.image.voxels.numel() / scan.image.voxels.numel() <= 1


def test_the_evidence_is_measured_where_both_scans_show_the_lungs() -> None:
    """A field x ↦ 0.8 x after an affine map of half the volume; half of the result is outside the moving scan."""
    grid = Grid((16, 16, 16), (3.0, 3.0, 3.0))
    ones = torch.ones(1, 1, *grid.shape)
    pair = Prepared(ones, ones, grid, ones, ones, grid, Affine.from_arrays(np.diag([0.5, 1.0, 1.0]), np.zeros(3)))
    field = torch.from_numpy(-0.2 * 3.0 * np.indices(grid.shape)[None, ::-1].copy()).float()
    scan = Subject(Image(ones, grid.cropped((0, 0, 0), (16, 16, 6)), Path("a")), LungMask(ones > 0, grid))
    found = evidence(pair, scan, Refined(field, grid, 2 * ones))
    assert found.grid == grid.coarsened()
    assert found.known[:, :, :4].all() and not found.known[:, :, 4:].any()
    there = found.features[:, found.known[0, 0] > 0]
    torch.testing.assert_close(there[0], torch.full_like(there[0], math.log(2.1)))
    torch.testing.assert_close(there[1], torch.full_like(there[1], math.log(0.8**3 / 2 + 0.1)))
    with pytest.raises(ValueError, match="second field"):
        evidence(pair, scan, Refined(field, grid, None))


def test_the_second_opinion_leaves_the_field_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance is from the field of a refinement that starts at the cascade's."""
    grid = Grid((16, 16, 16), (3.0, 3.0, 3.0))
    ones = torch.ones(1, 1, *grid.shape)
    pair = Prepared(ones, ones, grid, ones, ones, grid, Affine())
    scan = Subject(Image(ones, grid, Path("a")), LungMask(ones > 0, grid))
    field, other = (smooth_field(grid, 2.0, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    asked: list[Any] = []

    def refine(*arguments: Any) -> Refined:
        asked.extend(arguments)
        return Refined(other, grid, None)

    monkeypatch.setattr(registration, "refine", refine)
    found = registration.doubted(scan, scan, pair, Refined(field, grid, None), torch.device("cpu"))
    assert torch.equal(found.displacement, field) and found.inconsistency_mm is not None
    torch.testing.assert_close(found.inconsistency_mm, (field - other).norm(dim=1, keepdim=True))
    assert torch.equal(asked[3], field) and asked[5] == FAST


def test_models_are_kept_in_the_manifest(tmp_path: Path) -> None:
    save_cascade(tmp_path, Cascade(CascadeSettings((4, 8), (2, 1), (16, 16, 16), (1, 1))), {})
    assert load_cascade(tmp_path).errors is None
    models = ErrorModels(MODEL, ErrorModel(0.1, 1.0, -0.5))
    save_errors(tmp_path, models, {"pairs": 3})
    assert load_cascade(tmp_path).errors == models
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["expected_error"]["refined"]["volume"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected_error"):
        load_cascade(tmp_path)


@pytest.mark.parametrize("refine", ["off", "fast"])
def test_a_run_writes_it_beside_the_field(tmp_path: Path, example: Path, small_weights: Path, refine: str) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(small_weights, weights)
    save_errors(weights, ErrorModels(MODEL, MODEL), {})
    inputs = [f"--{role}={example / f'{role}.mha'}" for role in ("fixed", "moving")]
    options = [*inputs, f"--output={tmp_path / 'out'}", f"--weights={weights}", "--device=cpu", f"--refine={refine}"]
    assert call_main(*options) == 0
    folder = tmp_path / "out" / "images"
    image, field = (
        sitk.ReadImage(str(folder / kind / "fixed.mha")) for kind in ("expected-error", "displacement-field")
    )
    assert image.GetSize() == field.GetSize() and image.GetOrigin() == field.GetOrigin()
    values, said = sitk.GetArrayFromImage(image), results(tmp_path / "out")["expected_error"]
    lungs = sitk.GetArrayFromImage(sitk.ReadImage(str(example / "fixed_lobes.mha"))) > 0
    assert ((values >= 0) == lungs).mean() > 0.95
    assert (values[values < 0] == -1).all()
    assert values[values >= 0].mean() == pytest.approx(said["mean_mm"], rel=0.1)
    assert call_main(*options[:-2], "--device=cpu", "--refine=off", f"--weights={small_weights}") == 0
    assert not (folder / "expected-error").exists()  # nothing is left of the run before


@pytest.mark.parametrize(("first", "second", "chosen", "runs"), [(0.5, 9.0, 0, 1), (8.0, 1.0, 1, 2), (8.0, 9.0, 0, 2)])
def test_where_the_error_seems_large_the_refinement_reaches_farther(
    monkeypatch: pytest.MonkeyPatch, first: float, second: float, chosen: int, runs: int
) -> None:
    """And of both results the one of which less error is expected is taken."""
    grid = Grid((16, 16, 16), (3.0, 3.0, 3.0))
    pair = Prepared(*(torch.ones(1, 1, *grid.shape),) * 2, grid, *(torch.ones(1, 1, *grid.shape),) * 2, grid, Affine())
    still = torch.zeros(1, 3, *grid.shape)
    made = [Refined(still, grid, torch.full((1, 1, *grid.shape), apart)) for apart in (first, second)]
    asked: list[RefineSettings] = []

    def refine(*arguments: Any) -> Refined:
        asked.append(arguments[-1])
        return made[len(asked) - 1]

    monkeypatch.setattr(registration, "refine", refine)
    scan = Subject(Image(torch.zeros(1, 1, *grid.shape), grid, Path("a")), LungMask(pair.fixed > 0, grid))
    found = registration.refined(scan, scan, pair, Refined(still, grid, None), FAST, MODEL, torch.device("cpu"))
    assert found is made[chosen]
    assert len(asked) == runs and asked[0] == FAST
    assert all(settings.spacing_mm == (8.0, 4.0, 2.0) and settings.steps[1:] == FAST.steps for settings in asked[1:])
    asked.clear()
    without = registration.refined(scan, scan, pair, Refined(still, grid, None), FAST, None, torch.device("cpu"))
    assert without is made[0] and len(asked) == 1  # without a model nobody can tell

"""Training: packed data come back, the loss falls, and an interrupted run ends like an uninterrupted one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithm import prepare
from algorithm.geometry import Affine, Grid, displacement_at, jacobian_determinant, resample_image
from algorithm.images import canonical, read_image
from algorithm.lungs import crop_grid, lung_mask
from algorithm.network import WINDOW_HU, Cascade, CascadeSettings
from algorithm.prepare import PrepareSettings
from algorithm.weights import load_cascade, save_cascade
from phantom import PhantomPair
from training import data, train
from training.breathing import SimulatedPair
from training.data import TrainingScan, ValidationPair, load_pair, load_scan, pack_pair, pack_scan
from training.train import Run, TrainSettings

TINY = CascadeSettings(features=(4, 8), network_size=(32, 24, 32))
QUICK = TrainSettings(steps=(3, 2, 2), keypoints=200, bfloat16=False)
HALF_STEP_HU = (WINDOW_HU[1] - WINDOW_HU[0]) / 255 / 2


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """One thread, for these volumes are small; and everywhere the tiny cascade."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        tiny = partial(CascadeSettings, TINY.features, TINY.factors, TINY.network_size)
        patch.setattr(train, "CascadeSettings", tiny)
        patch.setattr(data, "CascadeSettings", tiny)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """A folder with two packed scans."""
    folder = tmp_path_factory.mktemp("packed")
    for name in ("fixed", "moving"):
        pack_scan(example / f"{name}.mha", folder / f"{name}.npz")
    return folder


@pytest.fixture(scope="module")
def packed_pair(tmp_path_factory: pytest.TempPathFactory, example: Path) -> Path:
    """A folder with a packed pair; pre-aligned at the 8 mm of the example."""
    folder = tmp_path_factory.mktemp("validation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "prepare", partial(prepare.prepare, settings=PrepareSettings(prealign_spacing_mm=8.0)))
        pack_pair(example, folder / "pair.npz")
    return folder


@pytest.fixture
def scans(packed: Path) -> list[TrainingScan]:
    return [load_scan(path) for path in sorted(packed.glob("*.npz"))]


def parameters(cascade: Cascade) -> Tensor:
    return torch.cat([p.detach().flatten() for p in cascade.parameters()])


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_packed_scan_is_the_scan_within_half_a_quantisation_step(example: Path, packed: Path) -> None:
    loaded = load_scan(packed / "fixed.npz")
    image = canonical(read_image(example / "fixed.mha"))
    lungs = lung_mask(image.voxels, image.grid, "fixed")
    grid = crop_grid(lungs, PrepareSettings().margin_mm, TINY.network_size)
    assert loaded.name == "fixed"
    assert loaded.grid == grid
    expected = resample_image(image.voxels, image.grid, grid, least=-1000.0, fill=-1000.0).clamp(*WINDOW_HU)
    assert (loaded.voxels - expected).abs().max() <= HALF_STEP_HU + 1e-3
    mask = resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0)
    assert torch.equal(loaded.lungs, (mask > 0.5).float())
    assert 0.2 < loaded.lungs.mean() < 0.6


def test_packed_codes_span_the_lung_window() -> None:
    hu = torch.tensor([-3024.0, -1000.0, -995.0, 0.0, 199.0, 200.0, 3000.0]).reshape(1, 1, 1, 1, 7)
    codes = data._codes(hu)
    assert codes.dtype == np.uint8
    assert codes.flatten()[[0, 1, 5, 6]].tolist() == [0, 0, 255, 255]
    back = data._hu(codes)
    assert (back - hu.clamp(*WINDOW_HU)).abs().max() <= HALF_STEP_HU
    assert np.array_equal(data._codes(back), codes)


def test_a_packed_grid_comes_back() -> None:
    direction = ((0.8, -0.6, 0.0), (0.48, 0.64, -0.6), (0.36, 0.48, 0.8))
    grid = Grid((3, 4, 5), (0.1, 1 / 3, 2.5), (-120.7, 33.0, 1e4), direction)
    assert data._grid(data._grid_arrays(grid, "a_"), "a_") == grid


def test_a_packed_pair_is_a_prepared_pair(packed_pair: Path, example_pair: PhantomPair) -> None:
    pair = load_pair(packed_pair / "pair.npz")
    points, targets = example_pair.fixed_landmarks_mm, example_pair.moving_landmarks_mm
    np.testing.assert_allclose(pair.fixed_landmarks_mm, points, atol=1e-4)
    assert pair.grid.size == TINY.network_size
    assert pair.moving.shape[2:] == pair.moving_grid.shape
    before = np.linalg.norm(points - targets, axis=1).mean()
    assert 0.2 * before < pair.tre_mm().mean() < 0.8 * before  # what the pre-alignment leaves


def test_landmark_errors_of_a_field() -> None:
    grid = Grid((8, 8, 8), spacing=(10.0, 10.0, 10.0))
    affine = Affine(((2.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), (100.0, 0.0, 0.0))
    points = np.array([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    image = torch.zeros(1, 1, *grid.shape)
    moved = points + np.array([1.0, 2.0, 3.0])
    pair = ValidationPair("pair", image, grid, image, grid, affine, points, moved * [2, 1, 1] + [100, 0, 0])
    constant = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1, 1)
    for field_grid in (grid, grid.coarsened()):
        assert pair.tre_mm(constant.expand(1, 3, *field_grid.shape), field_grid).tolist() == pytest.approx([0, 0])
    np.testing.assert_allclose(pair.tre_mm(), np.linalg.norm([2, 2, 3]))
    np.testing.assert_allclose(pair.tre_mm(-constant.expand(1, 3, *grid.shape)), 2 * np.linalg.norm([2, 2, 3]))


def test_the_command_packs_what_is_missing(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    (out / "moving.npz").write_bytes(b"already there")
    arguments = ["data", str(example / "fixed.mha"), str(example / "moving.mha"), str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    data.main()
    assert load_scan(out / "fixed.npz").grid.size == TINY.network_size
    assert (out / "moving.npz").read_bytes() == b"already there"


# --- one step --------------------------------------------------------------------------------------------------------


def test_a_step_s_pair_follows_from_seed_level_and_step(scans: list[TrainingScan]) -> None:
    def drawn(level: int, step: int, seed: int = 1) -> SimulatedPair:
        return train.simulated(scans, level, step, replace(QUICK, seed=seed))

    torch.manual_seed(0)
    one = drawn(1, 5)
    torch.manual_seed(7)
    same = drawn(1, 5)
    assert torch.equal(one.fixed, same.fixed)
    assert torch.equal(one.displacement, same.displacement)
    assert one.grid == same.grid
    for other in (drawn(0, 5), drawn(1, 6), drawn(1, 5, seed=2)):
        assert other.grid.spacing != one.grid.spacing
        assert not torch.equal(other.displacement, one.displacement)


def test_scans_are_stretched_mirrored_and_all_used(scans: list[TrainingScan]) -> None:
    sources = {(i, flip): s.lungs.flip(-1) if flip else s.lungs for i, s in enumerate(scans) for flip in (False, True)}
    met = set()
    for step in range(16):
        pair = train.simulated(scans, 0, step, QUICK)
        (key,) = [key for key, lungs in sources.items() if torch.equal(lungs, pair.moving_lungs)]
        met.add(key)
        stretch = np.array(pair.grid.spacing) / scans[key[0]].grid.spacing
        assert np.abs(stretch - 1).max() <= QUICK.scale
        assert np.ptp(stretch) > 0
    assert met == set(sources)


def test_reduced_scans_lie_on_the_coarser_grid(scans: list[TrainingScan]) -> None:
    coarse = train.reduced(scans[0], 4)
    assert coarse.grid == scans[0].grid.coarsened(4)
    assert coarse.voxels.shape[2:] == coarse.lungs.shape[2:] == coarse.grid.shape
    assert coarse.voxels.mean() == pytest.approx(scans[0].voxels.mean().item(), abs=30)


def test_exact_keypoints_move_as_the_field_says(scans: list[TrainingScan]) -> None:
    pair = train.simulated(scans, 0, 3, QUICK)
    keypoints = train.exact_keypoints(pair, 100, torch.Generator().manual_seed(0))
    assert keypoints.fixed_mm.shape == (100, 3)
    index = pair.grid.to_index(keypoints.fixed_mm.numpy())
    np.testing.assert_allclose(index, index.round(), atol=1e-3)
    x, y, z = index.round().astype(int).T
    assert (pair.fixed_lungs[0, 0, z, y, x] > 0.5).all()
    expected = displacement_at(keypoints.fixed_mm, pair.displacement, pair.grid)
    torch.testing.assert_close(keypoints.moving_mm - keypoints.fixed_mm, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_s_prediction_is_the_cascade_s_and_only_its_own_parameters_learn(
    scans: list[TrainingScan], level: int
) -> None:
    torch.manual_seed(0)
    cascade = Cascade(TINY)
    for unet in cascade.levels:
        unet.last.weight.data.mul_(50)
    cascade.requires_grad_(False)
    cascade.levels[level].requires_grad_(True)
    reduction = QUICK.reduction[level]
    pair = train.simulated([train.reduced(s, reduction) for s in scans], level, 0, QUICK)
    displacement, grid = train.predict(cascade, level, pair, reduction)
    expected, expected_grid = cascade(pair.fixed, pair.grid, pair.moving, pair.grid, level + 1, reduction)
    torch.testing.assert_close(displacement, expected)
    assert grid == expected_grid
    generator = torch.Generator().manual_seed(0)
    value, terms = train.loss(displacement, grid, pair, level, QUICK, generator)
    value.backward()
    assert terms
    learning = [any(p.grad is not None and p.grad.any() for p in unet.parameters()) for unet in cascade.levels]
    assert learning == [other == level for other in range(3)]


def test_the_exact_field_has_a_lower_loss_than_none_and_than_its_negative(scans: list[TrainingScan]) -> None:
    pair = train.simulated(scans, 2, 4, QUICK)

    def loss_of(displacement: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        return float(train.loss(displacement, pair.grid, pair, 2, QUICK, generator)[0])

    exact, none, wrong = (loss_of(factor * pair.displacement) for factor in (1, 0, -1))
    assert exact < 0.5 * none < 0.5 * wrong


def test_the_loss_falls_on_a_fixed_pair(scans: list[TrainingScan]) -> None:
    torch.manual_seed(0)
    cascade = Cascade(TINY)
    pair = train.simulated([train.reduced(s, 2) for s in scans], 0, 1, QUICK)
    optimiser = torch.optim.Adam(cascade.levels[0].parameters(), lr=5e-3)
    values, errors = [], []
    for _ in range(40):
        displacement, grid = train.predict(cascade, 0, pair, 2)
        generator = torch.Generator().manual_seed(0)
        value, _ = train.loss(displacement, grid, pair, 0, QUICK, generator)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
        keypoints = train.exact_keypoints(pair, 500, torch.Generator().manual_seed(1))
        found = keypoints.fixed_mm + displacement_at(keypoints.fixed_mm, displacement.detach(), grid)
        errors.append(float((found - keypoints.moving_mm).norm(dim=1).mean()))
    assert values[-1] < 0.5 * values[0]
    assert errors[-1] < 0.7 * errors[0]  # mm, on other keypoints than those of the loss


# --- whole runs ------------------------------------------------------------------------------------------------------


def log_lines(run: Run) -> list[list[str]]:
    """level, step, name, value: without the time."""
    lines = [line.split(",") for line in (run.out / "log.csv").read_text().splitlines()]
    return [[level, step, name, value] for level, step, _, name, value in lines]


def test_a_resumed_run_is_the_uninterrupted_run(packed: Path, packed_pair: Path, tmp_path: Path) -> None:
    whole = Run(packed, tmp_path / "whole", packed_pair)
    train.train(QUICK, whole)
    parts = Run(packed, tmp_path / "parts", packed_pair, minutes=0.0)  # stops after every step
    starts = 0
    while not (parts.out / "weights").exists() or manifest(parts)["training"]["levels"] < 3:
        starts += 1
        assert starts <= sum(QUICK.steps) + 1
        torch.manual_seed(starts)  # nothing may hang on it
        train.train(QUICK, parts)
    assert starts == sum(QUICK.steps) + 1
    one, other = (load_cascade(run.out / "weights") for run in (whole, parts))
    assert one.sha256 == other.sha256
    assert {tuple(line) for line in log_lines(whole)} == {tuple(line) for line in log_lines(parts)}
    torch.manual_seed(QUICK.seed)
    untrained = Cascade(TINY)
    change = (parameters(one.cascade) - parameters(untrained)).abs().max()
    assert change > 1e-3


def manifest(run: Run) -> dict:
    content: dict = json.loads((run.out / "weights" / "manifest.json").read_text())
    return content


def test_a_run_leaves_a_log_and_its_provenance(packed: Path, packed_pair: Path, tmp_path: Path) -> None:
    run = Run(packed, tmp_path, packed_pair)
    train.train(replace(QUICK, steps=(1, 1, 1)), run)
    lines = log_lines(run)
    assert {(level, step) for level, step, name, _ in lines if name == "pair"} == {(a, b) for a in "012" for b in "01"}
    assert all(np.isfinite(float(value)) for *_, value in lines)
    training = manifest(run)["training"]
    assert training["levels"] == 3
    assert training["scans"] == 2
    assert training["settings"]["steps"] == [1, 1, 1]


def test_finer_levels_start_from_the_level_before(packed: Path, tmp_path: Path) -> None:
    run = Run(packed, tmp_path, minutes=0.0)
    for _ in range(QUICK.steps[0]):
        train.train(QUICK, run)
    trained = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert (trained["level"], trained["step"]) == (0, QUICK.steps[0])
    slow = replace(QUICK, learning_rate=0.0)
    (run.out / "checkpoint.pt").unlink()
    torch.save(trained | {"settings": json.dumps(train.asdict(slow))}, run.out / "checkpoint.pt")
    train.train(slow, run)
    after = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert (after["level"], after["step"]) == (1, 1)
    for name, value in after["cascade"].items():
        coarsest = "levels.0." + name.split(".", 2)[2]
        assert torch.equal(value, trained["cascade"][coarsest]), name


def test_coarse_levels_without_steps_keep_the_initial_weights(packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_cascade(tmp_path / "initial", Cascade(TINY), {})
    run = Run(packed, tmp_path / "out", initial=tmp_path / "initial")
    train.train(replace(QUICK, steps=(0, 0, 2)), run)
    initial, final = (load_cascade(path).cascade for path in (tmp_path / "initial", run.out / "weights"))
    same = [
        all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        for one, other in zip(initial.levels, final.levels, strict=True)
    ]
    assert same == [True, True, False]


def test_a_checkpoint_of_other_settings_is_refused(packed: Path, tmp_path: Path) -> None:
    run = Run(packed, tmp_path, minutes=0.0)
    train.train(QUICK, run)
    with pytest.raises(SystemExit, match="made with other settings"):
        train.train(replace(QUICK, seed=2), run)


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no \.npz scans"):
        train.train(QUICK, Run(tmp_path, tmp_path / "out"))


def test_validation_is_the_landmark_error_of_the_levels_so_far(packed_pair: Path) -> None:
    pair = load_pair(packed_pair / "pair.npz")
    torch.manual_seed(0)
    cascade = Cascade(TINY)
    for unet in cascade.levels:
        unet.last.weight.data.zero_()
    for level in range(3):
        found = train.validate(cascade, level, [pair])
        assert found == pytest.approx({"pair": float(pair.tre_mm().mean()), "pair folded": 0.0})
    cascade.levels[2].last.bias.data = torch.tensor([3.0, 0.0, 0.0])  # voxels
    shift = torch.zeros(1, 3, *pair.grid.shape)
    shift[:, 0] = 3 * pair.grid.spacing[0]
    moved = train.validate(cascade, 2, [pair])["pair"]
    assert moved == pytest.approx(float(pair.tre_mm(shift, pair.grid).mean()), rel=1e-4)
    assert jacobian_determinant(shift, pair.grid).min() == 1

"""Training: packed data come back, the loss falls, and an interrupted run ends like an uninterrupted one."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithm.cascade.network import LEAST_STEP_VOX, WINDOW_HU, Cascade, CascadeSettings, mean_length_vox
from algorithm.cascade.weights import load_cascade, save_cascade
from algorithm.errors import InputError, exit_code
from algorithm.files.images import canonical, read_image
from algorithm.geometry import Affine, Grid, displacement_at, jacobian_determinant, resample, resample_image
from algorithm.lungs import crop_grid, lung_mask
from algorithm.preparation import prepare
from algorithm.preparation.prepare import PrepareSettings
from phantom import PhantomPair
from tests.support.grids import ROTATION
from training import data, train
from training.bank import write_bank
from training.breathing import AT_REST
from training.data import TrainingScan, ValidationPair, load_scan, load_validation_pair, pack_pair, pack_scan
from training.optimiser import Optimiser
from training.pairs import TrainingPair
from training.settings import CONFIG, TrainSettings, read_settings
from training.train import Pairs, Run, drawn_pair

TINY = CascadeSettings(features=(4, 8), network_size=(32, 24, 32))
QUICK = TrainSettings(features=TINY.features, steps=(3, 2, 2), delta=(0.0, 0.1, 0.1), crop=(0, 0, 16), keypoints=200)
HALF_STEP_HU = (WINDOW_HU[1] - WINDOW_HU[0]) / 127 / 2


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """One thread, for these volumes are small; and small network grids."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        tiny = partial(CascadeSettings, TINY.features, TINY.factors, TINY.network_size)
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


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """A folder with simulated pairs, fewer than a level has steps."""
    folder = tmp_path_factory.mktemp("bank")
    write_bank(packed, folder, 2, seed=1)
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
    codes = data.codes(hu)
    assert codes.dtype == np.uint8
    assert codes.flatten()[[0, 1, 5, 6]].tolist() == [0, 0, 255, 255]
    back = data.hu(codes)
    assert (back - hu.clamp(*WINDOW_HU)).abs().max() <= HALF_STEP_HU
    assert np.array_equal(data.codes(back), codes)


def test_a_packed_grid_comes_back() -> None:
    grid = Grid((3, 4, 5), (0.1, 1 / 3, 2.5), (-120.7, 33.0, 1e4), ROTATION)
    assert data.packed_grid(data.grid_arrays(grid, "a_"), "a_") == grid


def test_a_packed_pair_is_a_prepared_pair(packed_pair: Path, example_pair: PhantomPair) -> None:
    pair = load_validation_pair(packed_pair / "pair.npz")
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


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.toml")), ids=lambda path: path.stem)
def test_the_configurations_are_read(path: Path) -> None:
    settings = read_settings(path)
    assert len(settings.factors) == {"single_level": 1, "voxelmorph": 1, "two_levels": 2}.get(path.stem, 3)
    assert settings.factors[-1] == 1
    assert read_settings(path, steps=settings.steps, seed=None) == settings


def test_a_configuration_changes_what_it_names_only() -> None:
    default = TrainSettings()
    assert read_settings() == read_settings(CONFIG / "exact_field.toml") == default
    proposed = read_settings(CONFIG / "proposed.toml")
    assert proposed == replace(default, delta=(0.0, 2.0, 2.0), exact=(0.0, 0.0, 0.0))
    assert read_settings(CONFIG / "no_mask.toml") == replace(proposed, beta=(0.0, 0.0, 0.0))
    assert read_settings(CONFIG / "no_volume_change.toml") == replace(proposed, gamma=(0.0, 0.0, 0.0))
    assert read_settings(CONFIG / "no_keypoints.toml") == replace(proposed, delta=(0.0, 0.0, 0.0))
    two = read_settings(CONFIG / "two_levels.toml")
    assert two.delta == (0.0, 2.0)  # none on the coarsest, whichever that is
    for name, value in asdict(two).items():
        whole = getattr(proposed, name)
        if name != "delta":
            assert value == (whole[-2:] if isinstance(whole, tuple) and name != "features" else whole), name
    voxelmorph = read_settings(CONFIG / "voxelmorph.toml").weights(0)
    assert voxelmorph.diffusion > 0
    assert (voxelmorph.alpha, voxelmorph.beta, voxelmorph.gamma, voxelmorph.delta) == (0, 0, 0, 0)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 3\nlearning_rate = 1\nmuon = false\n")
    settings = read_settings(tmp_path / "a.toml", seed=5, learning_rate=None, steps=(1, 2, 3))
    assert settings == TrainSettings(seed=5, learning_rate=1.0, muon=False, steps=(1, 2, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa = [1, 1, 1]", "unknown setting alhpa"),
        ("alpha = 1.0", "alpha is 1.0, expected a list of float"),
        ("alpha = [1, 2, '3']", "alpha is '3', expected float"),
        ("steps = [1, 2, 3.5]", "steps is 3.5, expected int"),
        ("steps = [1, 2, true]", "steps is True, expected int"),
        ("muon = 1", "muon is 1, expected bool"),
        ("distance = 'ssd'", "distance is 'ssd', expected 'ngf' or 'ncc'"),
        ("distance = ['ngf']", "expected 'ngf' or 'ncc'"),
        ("beta = [1, 1]", r"beta is \(1.0, 1.0\), expected 3 values"),
        ("factors = [2, 1]\nbeta = [1, 1, 1]", "expected 2 values"),
        ("factors = [8, 4, 2, 1]", "expected 4 values"),
        ("factors = []", "expected some"),
        ("features = []", "expected some"),
        ("factors = [4, 2, 3]", "expected a power of two"),
        ("reduction = [2, 2, 2]", "level 2: factor 1, reduction 2"),
        ("crop = [0, 0, 100]", "crop is 100, expected a multiple of 8"),
        ("gamma = [0, -1, 0]", "the weight gamma is -1"),
        ("t = [0.2, 0.1, 1.5]", "between 0 and 1"),
        ("steps = [1, 1, -1]", "negative"),
        ("window = 4", "expected an odd number"),
        ("seed = ", "cannot be read"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "a.toml")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of ``python -m training.train ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
    return exit_code(train.main)


def test_the_command_trains_as_its_configuration_says(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["features = [4, 8]", "factors = [2, 1]", "crop = [0, 16]", "steps = [9, 9]"]
    (tmp_path / "a.toml").write_text("\n".join(lines))
    options = ["--out", tmp_path / "out", "--config", tmp_path / "a.toml", "--steps", 1, 1, "--seed", 4]
    assert call(monkeypatch, "--train", packed, *options) == 0
    settings = manifest(Run(tmp_path / "out"))["training"]["settings"]
    assert settings["steps"] == [1, 1]
    assert (settings["seed"], settings["factors"], settings["keep_finer"]) == (4, [2, 1], False)
    assert load_cascade(tmp_path / "out" / "weights").cascade.settings.features == (4, 8)


def test_the_command_refuses_bad_input_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bank", tmp_path, "--out", tmp_path / "out"]
    for arguments, message in [
        (["--steps", 1, 1], "steps is (1, 1), expected 3 values"),
        (["--config", tmp_path / "none.toml"], "none.toml: the settings cannot be read"),
        ([], "holds no .npz files, expected pairs in"),
    ]:
        assert call(monkeypatch, *options, *arguments) == 2
        assert message in capsys.readouterr().err


# --- one step --------------------------------------------------------------------------------------------------------


def pair_of(scans: list[TrainingScan], seed: int, reduction: int = 1) -> TrainingPair:
    return drawn_pair([scan.reduced(reduction) for scan in scans], seed, AT_REST)


def test_a_step_s_pair_follows_from_seed_level_and_step(packed: Path, tmp_path: Path) -> None:
    def drawn(level: int, step: int, seed: int = 1) -> TrainingPair:
        return Pairs(level, replace(QUICK, seed=seed), Run(tmp_path, train=packed))(step)[0]

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


def test_a_bank_s_pairs_all_come_before_any_comes_again_and_with_new_noise(bank: Path, tmp_path: Path) -> None:
    for level in range(3):
        pairs = Pairs(level, QUICK, Run(tmp_path, bank=bank))
        drawn = [pairs(step)[0] for step in range(6)]
        assert {pair.grid.size[0] for pair in drawn} == {TINY.network_size[0] // QUICK.reduction[level]}
        for turn in (drawn[:2], drawn[2:4], drawn[4:]):
            assert len({pair.grid.spacing for pair in turn}) == 2
        again = pairs(3)[0]
        assert torch.equal(drawn[3].fixed, again.fixed)
        twin = next(pair for pair in drawn[:2] if pair.grid == again.grid)
        if not torch.equal(twin.displacement, again.displacement):
            twin = twin.swapped()  # either way round, as it is drawn
        assert torch.equal(twin.displacement, again.displacement)
        assert not torch.equal(twin.fixed, again.fixed)


def test_scans_are_stretched_mirrored_and_all_used(scans: list[TrainingScan]) -> None:
    sources = {(i, flip): s.lungs.flip(-1) if flip else s.lungs for i, s in enumerate(scans) for flip in (False, True)}
    met = set()
    for seed in range(16):
        pair = pair_of(scans, seed)
        (key,) = [key for key, lungs in sources.items() if torch.equal(lungs, pair.moving_lungs)]
        met.add(key)
        stretch = np.array(pair.grid.spacing) / scans[key[0]].grid.spacing
        assert np.abs(stretch - 1).max() <= QUICK.scale
        assert np.ptp(stretch) > 0
    assert met == set(sources)


def test_reduced_scans_lie_on_the_coarser_grid(scans: list[TrainingScan]) -> None:
    coarse = scans[0].reduced(4)
    assert coarse.grid == scans[0].grid.coarsened(4)
    assert coarse.voxels.shape[2:] == coarse.lungs.shape[2:] == coarse.grid.shape
    assert coarse.voxels.mean() == pytest.approx(scans[0].voxels.mean().item(), abs=30)


def test_exact_keypoints_move_as_the_field_says(scans: list[TrainingScan]) -> None:
    pair = pair_of(scans, 3)
    keypoints = train.exact_keypoints(pair, 100, torch.Generator().manual_seed(0))
    assert keypoints.fixed_mm.shape == (100, 3)
    index = pair.grid.to_index(keypoints.fixed_mm.numpy())
    np.testing.assert_allclose(index, index.round(), atol=1e-3)
    x, y, z = index.round().astype(int).T
    assert (pair.fixed_lungs[0, 0, z, y, x] > 0.5).all()
    expected = displacement_at(keypoints.fixed_mm, pair.displacement, pair.displacement_grid)
    torch.testing.assert_close(keypoints.moving_mm - keypoints.fixed_mm, expected, atol=1e-3, rtol=0)


def test_the_exact_error_is_the_mean_distance_in_the_lungs() -> None:
    exact = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    lungs = torch.zeros(1, 1, 4, 5, 6)
    lungs[:, :, 1:3] = 1
    off = torch.zeros_like(exact)
    off[:, :, 1] = torch.tensor([3.0, 4.0, 0.0]).reshape(1, 3, 1, 1)  # 5 mm in half of the lungs
    off[:, :, 3] = 100  # outside
    displacement = (exact + off).requires_grad_()
    error = train.exact_error(displacement, exact, lungs)
    assert float(error.detach()) == pytest.approx((np.hypot(5, train.SOFT_MM) - train.SOFT_MM) / 2, rel=1e-4)
    error.backward()
    assert displacement.grad is not None
    assert displacement.grad.isfinite().all()
    assert not displacement.grad[:, :, 3].any()


def cascade_with_motion() -> Cascade:
    """Untrained, but every level moves by some mm."""
    torch.manual_seed(0)
    cascade = Cascade(TINY)
    for unet in cascade.levels:
        unet.last.weight.data.mul_(50)
    return cascade


def predicted(
    cascade: Cascade, level: int, pair: TrainingPair, part: TrainingPair, reduction: int
) -> tuple[Tensor, Grid]:
    """The field on ``part`` after one application of ``level``."""
    so_far = train.before(cascade, level, pair, reduction)
    return cascade.add_level(level, part.fixed, part.grid, part.moving, part.moving_grid, so_far, reduction)[0]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_s_prediction_is_the_cascade_s_and_only_its_own_parameters_learn(
    scans: list[TrainingScan], level: int
) -> None:
    cascade = cascade_with_motion()
    cascade.requires_grad_(False)
    cascade.levels[level].requires_grad_(True)
    reduction = QUICK.reduction[level]
    pair = pair_of(scans, level, reduction)
    displacement, grid = predicted(cascade, level, pair, pair, reduction)
    expected, expected_grid = cascade(pair.fixed, pair.grid, pair.moving, pair.grid, level + 1, reduction)
    assert grid == expected_grid
    if reduction > 1:
        torch.testing.assert_close(displacement, expected)
    else:  # the coarser levels have seen the pair at half its resolution
        assert 0 < (displacement - expected).norm() < 0.2 * expected.norm()
    value, terms = train.loss(displacement, grid, pair, level, QUICK, torch.Generator().manual_seed(0))
    value.backward()
    assert not any(term.requires_grad for term in terms.values())
    learning = [any(p.grad is not None and p.grad.any() for p in unet.parameters()) for unet in cascade.levels]
    assert learning == [other == level for other in range(3)]


def test_every_application_starts_from_where_the_one_before_came_to(scans: list[TrainingScan]) -> None:
    """The mean of the losses of both; no gradient goes from the second to the first."""
    cascade = cascade_with_motion()
    pair = pair_of(scans, 0, 2)
    twice = replace(QUICK, applications=(2, 1, 1))
    value, terms = train.step_loss(cascade, 0, pair, twice, torch.Generator().manual_seed(0), "cpu")
    images = pair.fixed, pair.grid, pair.moving, pair.moving_grid
    (first, grid), _ = cascade.add_level(0, *images, None, 2)
    (second, _), step = cascade.add_level(0, *images, (first.detach(), grid), 2)
    assert mean_length_vox(step, grid) > LEAST_STEP_VOX
    losses = [train.loss(u, grid, pair, 0, QUICK, torch.Generator().manual_seed(0)) for u in (first, second)]
    torch.testing.assert_close(value, (losses[0][0] + losses[1][0]) / 2)
    torch.testing.assert_close(terms["exact_error"], losses[1][1]["exact_error"])
    value.backward()
    found = cascade.levels[0].last.bias.grad.clone()
    cascade.zero_grad()
    for loss_value, _ in losses:
        (loss_value / 2).backward()
    torch.testing.assert_close(found, cascade.levels[0].last.bias.grad)


def test_a_part_lies_where_it_was_cut_from_the_lungs(scans: list[TrainingScan]) -> None:
    pair = pair_of(scans, 0)
    starts = set()
    for seed in range(8):
        part = train.part_of(pair, 16, torch.Generator().manual_seed(seed))
        x, y, z = np.rint(pair.grid.to_index(part.grid.to_world(np.zeros((1, 3))))[0]).astype(int).tolist()
        starts.add((x, y, z))
        assert part.grid == pair.grid.cropped((x, y, z), (16, 16, 16))
        assert torch.equal(part.fixed, pair.fixed[:, :, z : z + 16, y : y + 16, x : x + 16])
        assert torch.equal(part.fixed_lungs, pair.fixed_lungs[:, :, z : z + 16, y : y + 16, x : x + 16])
        assert part.fixed_lungs.max() > 0.5
        assert part.moving is pair.moving
        assert part.displacement is pair.displacement
    assert len(starts) > 3
    whole = train.part_of(pair, 32, torch.Generator())
    assert whole.grid == pair.grid
    assert torch.equal(whole.fixed, pair.fixed)
    assert train.part_of(pair, 0, torch.Generator()) is pair


def test_on_a_part_the_coarser_levels_predict_as_on_the_whole(scans: list[TrainingScan]) -> None:
    cascade = cascade_with_motion()
    cascade.levels[2].last.weight.data.zero_()  # the bias is 0: the finest level adds nothing
    pair = pair_of(scans, 0)
    part = train.part_of(pair, 16, torch.Generator().manual_seed(0))
    (whole, whole_grid), (found, grid) = (predicted(cascade, 2, pair, p, 1) for p in (pair, part))
    assert grid == part.grid
    assert found.norm(dim=1).max() > 1
    torch.testing.assert_close(found, resample(whole, whole_grid, grid), atol=1e-3, rtol=1e-4)


def test_the_exact_field_has_a_lower_loss_than_none_and_than_its_negative(scans: list[TrainingScan]) -> None:
    pair = pair_of(scans, 4)
    exact = resample(pair.displacement, pair.displacement_grid, pair.grid)

    def loss_of(part: TrainingPair, displacement: Tensor) -> float:
        return float(train.loss(displacement, part.grid, part, 2, QUICK, torch.Generator().manual_seed(0))[0])

    for part in (pair, train.part_of(pair, 16, torch.Generator().manual_seed(0))):
        on_part = resample(exact, pair.grid, part.grid)
        right, none, wrong = (loss_of(part, factor * on_part) for factor in (1, 0, -1))
        assert right < 0.5 * none < 0.5 * wrong


@pytest.mark.parametrize(("config", "term"), [("exact_field", "exact_error"), ("voxelmorph", "distance")])
def test_the_loss_falls_on_a_fixed_pair(scans: list[TrainingScan], config: str, term: str) -> None:
    settings = replace(read_settings(CONFIG / f"{config}.toml"), features=TINY.features)
    torch.manual_seed(0)
    cascade = Cascade(replace(TINY, factors=settings.factors))
    pair = pair_of(scans, 1, settings.reduction[0])
    optimiser = Optimiser(cascade.levels[0], 5e-3, 40)
    values, parts = [], []
    for _ in range(40):
        value, terms = train.step_loss(cascade, 0, pair, settings, torch.Generator().manual_seed(0), "cpu")
        optimiser.step(value)
        values.append(float(value.detach()))
        parts.append(float(terms[term]))
    assert values[-1] < 0.9 * values[0]
    assert parts[-1] < 0.9 * parts[0]


# --- whole runs ------------------------------------------------------------------------------------------------------


def log_lines(run: Run) -> list[list[str]]:
    """level, step, name, value: without the time."""
    lines = [line.split(",") for line in (run.out / "log.csv").read_text().splitlines()]
    return [[level, step, name, value] for level, step, _, name, value in lines]


@pytest.mark.parametrize("source", ["scans", "bank"])
def test_a_resumed_run_is_the_uninterrupted_run(
    source: str, packed: Path, bank: Path, packed_pair: Path, tmp_path: Path
) -> None:
    whole = Run(
        tmp_path / "whole", validation=packed_pair, **({"bank": bank} if source == "bank" else {"train": packed})
    )
    assert train.train(QUICK, whole)
    parts = replace(whole, out=tmp_path / "parts", minutes=0.0)  # stops after every step
    starts = 1
    while not train.train(QUICK, parts):
        starts += 1
        assert starts <= sum(QUICK.steps) + 1
        torch.manual_seed(starts)  # nothing may hang on it
    assert starts == sum(QUICK.steps) + 1
    one, other = (load_cascade(run.out / "weights") for run in (whole, parts))
    assert one.sha256 == other.sha256
    assert {tuple(line) for line in log_lines(whole)} == {tuple(line) for line in log_lines(parts)}
    torch.manual_seed(QUICK.seed)
    change = (parameters(one.cascade) - parameters(Cascade(TINY))).abs().max()
    assert change > 1e-3


def test_a_part_as_large_as_the_image_is_the_whole_image(bank: Path, tmp_path: Path) -> None:
    exact_only = replace(QUICK, delta=(0.0, 0.0, 0.0), steps=(0, 1, 3))  # keypoints are drawn after the part
    hashes = []
    for edge in (0, 32, 16):
        run = Run(tmp_path / str(edge), bank=bank)
        train.train(replace(exact_only, crop=(0, 0, edge)), run)
        hashes.append(load_cascade(run.out / "weights").sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def manifest(run: Run) -> dict:
    content: dict = json.loads((run.out / "weights" / "manifest.json").read_text())
    return content


def test_a_run_leaves_a_log_and_its_provenance(packed: Path, packed_pair: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, packed, validation=packed_pair)
    settings = replace(QUICK, steps=(1, 1, 1))
    train.train(settings, run)
    lines = log_lines(run)
    assert {(level, step) for level, step, name, _ in lines if name == "pair"} == {(a, b) for a in "012" for b in "01"}
    assert {level for level, _, name, _ in lines if name == "exact_error"} == set("012")
    assert all(np.isfinite(float(value)) for *_, value in lines)
    training = manifest(run)["training"]
    assert training["levels"] == 3
    assert training["settings"] == json.loads(json.dumps(asdict(settings)))


def test_finer_levels_start_from_the_level_before(packed: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, packed, minutes=0.0)
    for _ in range(QUICK.steps[0]):
        train.train(QUICK, run)
    trained = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert (trained["level"], trained["step"]) == (0, QUICK.steps[0])
    slow = replace(QUICK, learning_rate=0.0)
    (run.out / "checkpoint.pt").unlink()
    torch.save(trained | {"settings": json.dumps(asdict(slow))}, run.out / "checkpoint.pt")
    train.train(slow, run)
    after = torch.load(run.out / "checkpoint.pt", weights_only=True)
    assert (after["level"], after["step"]) == (1, 1)
    for name, value in after["cascade"].items():
        coarsest = "levels.0." + name.split(".", 2)[2]
        assert torch.equal(value, trained["cascade"][coarsest]), name


@pytest.fixture
def initial(tmp_path: Path) -> Path:
    """A folder with weights."""
    torch.manual_seed(5)
    save_cascade(tmp_path / "initial", Cascade(TINY), {})
    return tmp_path / "initial"


def levels(folder: Path) -> list[Tensor]:
    return [torch.cat([p.flatten() for p in unet.parameters()]) for unet in load_cascade(folder).cascade.levels]


@pytest.mark.parametrize(
    ("steps", "keep_finer", "kept"),
    [
        ((0, 0, 2), False, [True, True, False]),
        ((2, 0, 0), True, [False, True, True]),
        ((0, 2, 0), True, [True, False, True]),
        ((2, 0, 0), False, [False, False, False]),
    ],
)
def test_levels_without_steps_keep_the_initial_weights(
    steps: tuple[int, ...], keep_finer: bool, kept: list[bool], packed: Path, initial: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "out", packed, initial=initial)
    train.train(replace(QUICK, steps=steps, keep_finer=keep_finer), run)
    before, after = levels(initial), levels(run.out / "weights")
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == kept
    if not keep_finer:
        trained = max(level for level in range(3) if steps[level] > 0)
        assert all(torch.equal(after[trained], finer) for finer in after[trained:])


def test_initial_weights_of_another_architecture_are_refused(packed: Path, initial: Path, tmp_path: Path) -> None:
    for other in (replace(QUICK, features=(4, 4)), replace(QUICK, factors=(8, 4, 1))):
        with pytest.raises(InputError, match=re.escape(f"expected those of the settings, {other.features}")):
            train.train(other, Run(tmp_path / "out", packed, initial=initial))


def test_a_checkpoint_of_other_settings_is_refused(packed: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, packed, minutes=0.0)
    train.train(QUICK, run)
    with pytest.raises(InputError, match="made with other settings"):
        train.train(replace(QUICK, seed=2), run)


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.npz files, expected scans"):
        train.train(QUICK, Run(tmp_path / "out", tmp_path))


def test_validation_is_the_landmark_error_of_the_levels_so_far(packed_pair: Path) -> None:
    pair = load_validation_pair(packed_pair / "pair.npz")
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

"""Training pairs: files hold them within stated precision, parts stay in place, and a bank is the same however made."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.cascade.network import WINDOW_HU
from algorithm.errors import InputError
from algorithm.geometry import Grid, displacement_at, downsample, resample, warp
from tests.support.made_up_lungs import made_scan, scan_files
from tests.support.strategies import as_matrix, examples, grids, smooth_field
from training import bank
from training.bank import write_bank
from training.breathing import BreathingSettings
from training.data import TrainingScan
from training.pairs import TrainingPair, load_pair, save_pair
from training.train import drawn_pair, kind_of_breathing

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(10)
HALF_STEP_HU = (WINDOW_HU[1] - WINDOW_HU[0]) / 255 / 2
TENSORS = ("fixed", "moving", "fixed_lungs", "moving_lungs", "displacement", "backward")
GRIDS = ("grid", "moving_grid", "displacement_grid")


def noise(grid: Grid, generator: torch.Generator, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(1, 1, *grid.shape, generator=generator)


def pair_on(grid: Grid, moving_grid: Grid, displacement_grid: Grid, seed: int, amplitude_mm: float) -> TrainingPair:
    """HU beyond the lung window, lungs of all shares."""
    generator = torch.Generator().manual_seed(seed)
    return TrainingPair(
        noise(grid, generator, -1200.0, 400.0),
        noise(moving_grid, generator, -1200.0, 400.0),
        noise(grid, generator, 0.0, 1.0),
        noise(moving_grid, generator, 0.0, 1.0),
        smooth_field(displacement_grid, amplitude_mm, generator),
        smooth_field(displacement_grid, amplitude_mm, generator),
        grid,
        moving_grid,
        displacement_grid,
    )


@pytest.fixture
def pair() -> TrainingPair:
    """Three different grids, the first two divisible by 4, none along the world's axes."""
    turn = as_matrix(np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    grid = Grid((16, 12, 8), (2.0, 2.5, 3.0), (-10.0, 5.0, 100.0), turn)
    moving_grid = Grid((12, 16, 8), (2.2, 2.1, 3.5), (-12.0, 0.0, 95.0), turn)
    return pair_on(grid, moving_grid, grid.coarsened(4), 0, 8.0)


# --- files -----------------------------------------------------------------------------------------------------------


@given(grids(), grids(), grids(), st.integers(0, 2**31), st.floats(0.1, 15.9))
@PROPERTY
def test_a_saved_pair_comes_back_within_the_stated_precision(
    tmp_path_factory: pytest.TempPathFactory, a: Grid, b: Grid, c: Grid, seed: int, amplitude_mm: float
) -> None:
    path = tmp_path_factory.mktemp("pair") / "one.npz"
    pair = pair_on(a, b, c, seed, amplitude_mm)
    save_pair(path, pair)
    loaded = load_pair(path)
    for name in GRIDS:
        assert getattr(loaded, name) == getattr(pair, name)
    for name in TENSORS:
        assert getattr(loaded, name).dtype == torch.float32
    for name in ("fixed", "moving"):
        error = getattr(loaded, name) - getattr(pair, name).clamp(*WINDOW_HU)
        assert error.abs().max() <= HALF_STEP_HU + 1e-3
    for name in ("fixed_lungs", "moving_lungs"):
        assert (getattr(loaded, name) - getattr(pair, name)).abs().max() <= 0.5 / 255 + 1e-6
    assert (loaded.displacement - pair.displacement).abs().max() <= 2.0**-11 * pair.displacement.abs().max()
    assert [p.name for p in path.parent.iterdir()] == ["one.npz"]


def test_a_loaded_pair_is_saved_without_further_loss(tmp_path: Path, pair: TrainingPair) -> None:
    save_pair(tmp_path / "one.npz", pair)
    once = load_pair(tmp_path / "one.npz")
    save_pair(tmp_path / "two.npz", once)
    twice = load_pair(tmp_path / "two.npz")
    for name in TENSORS:
        assert torch.equal(getattr(once, name), getattr(twice, name)), name


def test_lungs_and_air_keep_their_exact_values(tmp_path: Path, pair: TrainingPair) -> None:
    binary = replace(pair, fixed_lungs=pair.fixed_lungs.round(), fixed=torch.full_like(pair.fixed, -1000.0))
    save_pair(tmp_path / "one.npz", binary)
    loaded = load_pair(tmp_path / "one.npz")
    assert torch.equal(loaded.fixed_lungs, binary.fixed_lungs)
    assert torch.equal(loaded.fixed, binary.fixed)


def test_an_interrupted_write_leaves_no_pair_and_the_old_one_whole(
    tmp_path: Path, pair: TrainingPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.npz"

    def full_disk(file: BinaryIO, **_: Any) -> None:
        file.write(b"half a file")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_pair(path, pair)
    assert not list(tmp_path.glob("*.npz"))
    save_pair(path, pair)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_pair(path, replace(pair, displacement=-pair.displacement))
    assert path.read_bytes() == before


# --- parts and reductions --------------------------------------------------------------------------------------------


def test_a_crop_shows_the_same_values_at_the_same_places(pair: TrainingPair) -> None:
    part = pair.cropped((3, 2, 1), (10, 7, 5))
    assert part.fixed.shape[2:] == part.fixed_lungs.shape[2:] == part.grid.shape == (5, 7, 10)
    for i, j, k in ((0, 0, 0), (9, 6, 4), (4, 1, 3)):
        world = part.grid.to_world(np.array([i, j, k]))
        np.testing.assert_allclose(pair.grid.to_index(world), [i + 3, j + 2, k + 1], atol=1e-9)
        assert part.fixed[0, 0, k, j, i] == pair.fixed[0, 0, k + 1, j + 2, i + 3]
        assert part.fixed_lungs[0, 0, k, j, i] == pair.fixed_lungs[0, 0, k + 1, j + 2, i + 3]
    for name in ("moving", "moving_lungs", "displacement", "moving_grid", "displacement_grid"):
        assert getattr(part, name) is getattr(pair, name)


def test_a_reduced_pair_is_the_same_scene(pair: TrainingPair) -> None:
    half = pair.reduced(2)
    assert half.grid == pair.grid.coarsened(2)
    assert half.moving_grid == pair.moving_grid.coarsened(2)
    assert half.displacement is pair.displacement
    assert half.displacement_grid == pair.displacement_grid
    for name in ("fixed", "moving", "fixed_lungs", "moving_lungs"):
        assert torch.equal(getattr(half, name), downsample(getattr(pair, name))), name
    for name in TENSORS:
        assert torch.equal(getattr(pair.reduced(1), name), getattr(pair, name)), name
    quarter, twice = pair.reduced(4), half.reduced(2)
    assert torch.equal(quarter.fixed, twice.fixed)
    for name in GRIDS:
        one, other = getattr(quarter, name), getattr(twice, name)
        np.testing.assert_allclose(one.to_world(np.eye(3)), other.to_world(np.eye(3)), atol=1e-9)


def test_a_reduced_image_of_positions_holds_the_positions_of_its_voxels(pair: TrainingPair) -> None:
    """Away from the border a ramp keeps its values under the symmetric filter, if the grids are right."""

    def ramp(grid: Grid) -> Tensor:
        index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")[::-1], axis=-1)
        return torch.from_numpy(grid.to_world(index)[..., 0]).float()[None, None]

    half = replace(pair, fixed=ramp(pair.grid), moving=ramp(pair.moving_grid)).reduced(2)
    for image, grid in ((half.fixed, half.grid), (half.moving, half.moving_grid)):
        inner = (..., slice(1, -1), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(image[inner], ramp(grid)[inner], atol=1e-3, rtol=0)


def test_the_field_of_a_reduced_crop_is_that_of_the_pair(pair: TrainingPair) -> None:
    part = pair.reduced(2).cropped((1, 2, 0), (5, 3, 4))
    points = torch.from_numpy(part.grid.to_world(np.array([[0, 0, 0], [4, 2, 3], [2, 1, 1]])))
    whole = displacement_at(points, pair.displacement, pair.displacement_grid)
    assert torch.equal(displacement_at(points, part.displacement, part.displacement_grid), whole)


def test_to_a_device_moves_every_tensor_and_nothing_else(pair: TrainingPair) -> None:
    moved = pair.to("meta")
    for field in fields(TrainingPair):
        value = getattr(moved, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == "meta"
            assert value.shape == getattr(pair, field.name).shape
            assert field.name in TENSORS
        else:
            assert value == getattr(pair, field.name)
            assert field.name in GRIDS
    assert pair.fixed.device.type == "cpu"


# --- the bank --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of two scans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "load_scan", made_scan)
        yield scan_files(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """A bank of three pairs, made in one go."""
    out = tmp_path_factory.mktemp("bank")
    write_bank(packed, out, 3, 1)
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*")) if path.name != "bank.json"
    }


def assert_same_pair(one: TrainingPair, other: TrainingPair) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in GRIDS:
        assert getattr(one, name) == getattr(other, name)


def test_a_bank_holds_every_pair_at_both_resolutions_and_nothing_else(whole: Path) -> None:
    assert sorted(contents(whole)) == [f"{reduction}/0000{number}.npz" for reduction in "12" for number in range(3)]
    spacings = {load_pair(whole / "1" / f"0000{number}.npz").grid.spacing for number in range(3)}
    assert len(spacings) == 3


@pytest.mark.parametrize("reduction", [1, 2])
def test_the_files_are_the_drawn_pairs_reduced(packed: Path, whole: Path, tmp_path: Path, reduction: int) -> None:
    scans = [made_scan(packed / f"{name}.npz") for name in ("one", "two")]
    expected = drawn_pair(scans, 190_000_001, kind_of_breathing(190_000_001, 0.5)).reduced(reduction)
    save_pair(tmp_path / "expected.npz", expected)
    loaded = load_pair(whole / str(reduction) / "00001.npz")
    assert_same_pair(loaded, load_pair(tmp_path / "expected.npz"))
    assert loaded.grid.shape == tuple(n // reduction for n in (32, 24, 32))
    displacement = resample(loaded.displacement, loaded.displacement_grid, loaded.grid)
    warped = warp(loaded.moving_lungs, loaded.moving_grid, displacement, loaded.grid)
    assert (warped - loaded.fixed_lungs).abs().mean() < 0.5 * (loaded.moving_lungs - loaded.fixed_lungs).abs().mean()


def test_a_stopped_bank_goes_on_to_the_same_result(
    packed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after one pair, and again between the two files of the second."""
    write_bank(packed, tmp_path, 1, 1)
    written = []

    def stopping(path: Path, pair: TrainingPair) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        save_pair(path, pair)

    with monkeypatch.context() as patch:
        patch.setattr(bank, "save_pair", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_bank(packed, tmp_path, 3, 1)
    assert sorted(contents(tmp_path)) == ["1/00000.npz", "1/00001.npz", "2/00000.npz"]
    torch.manual_seed(7)  # nothing may hang on it
    write_bank(packed, tmp_path, 3, 1)
    assert sorted(contents(tmp_path)) == sorted(contents(whole))
    for name in contents(whole):
        assert_same_pair(load_pair(tmp_path / name), load_pair(whole / name))


def test_existing_pairs_are_not_touched_nor_drawn_again(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bank(packed, tmp_path, 0, 4)
    for reduction in "12":
        for number in range(2):
            (tmp_path / reduction / f"0000{number}.npz").write_bytes(b"already there")
    seeds = []

    def watched(scans: list[TrainingScan], seed: int, settings_: BreathingSettings, real: None) -> TrainingPair:
        seeds.append(seed)
        return drawn_pair(scans, seed, settings_, real=real)

    monkeypatch.setattr(bank, "drawn_pair", watched)
    write_bank(packed, tmp_path, 3, 4)
    assert seeds == [490_000_002]
    after = contents(tmp_path)
    assert [after[f"{r}/0000{n}.npz"] for r in "12" for n in range(2)] == [b"already there"] * 4
    assert load_pair(tmp_path / "2" / "00002.npz").grid.size == (16, 12, 16)


def test_another_seed_gives_other_pairs(packed: Path, whole: Path, tmp_path: Path) -> None:
    write_bank(packed, tmp_path, 1, 2)
    one, other = (load_pair(out / "1" / "00000.npz") for out in (whole, tmp_path))
    assert one.grid.spacing != other.grid.spacing
    assert not torch.equal(one.displacement, other.displacement)


def test_a_bank_of_something_else_is_refused(packed: Path, tmp_path: Path) -> None:
    write_bank(packed, tmp_path, 1, 1)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds pairs of another seed, other scans or other settings"):
        write_bank(packed, tmp_path, 2, 2)
    assert json.loads((tmp_path / "bank.json").read_text())["seed"] == 1
    (tmp_path / "bank.json").unlink()
    with pytest.raises(InputError, match="expected a new folder"):
        write_bank(packed, tmp_path, 2, 1)
    assert contents(tmp_path) == before


def test_a_folder_without_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.npz scans; training\.data makes them"):
        write_bank(tmp_path, tmp_path / "out", 1, 1)
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_the_bank(
    packed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bank", "--train", str(packed), "--out", str(tmp_path), "--pairs", "1"])
    bank.main()
    assert sorted(contents(tmp_path)) == ["1/00000.npz", "2/00000.npz"]
    assert_same_pair(load_pair(tmp_path / "2" / "00000.npz"), load_pair(whole / "2" / "00000.npz"))

"""The ablation and the learning curve: what they train is finished once, and their numbers are those of the fields."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithm.cascade.network import CascadeSettings
from algorithm.cascade.weights import load_cascade
from algorithm.errors import InputError, exit_code
from algorithm.geometry import Affine, Grid
from algorithm.lungs import LungMask
from algorithm.preparation import prepare
from algorithm.preparation.prepare import PrepareSettings
from training import ablation, curve, data
from training.ablation import CONFIGS, measure, reduced_settings
from training.bank import write_bank
from training.data import ValidationPair, load_validation_pair, pack_pair, pack_scan
from training.settings import CONFIG, TrainSettings, read_settings
from training.train import Run, validate

# --- measures --------------------------------------------------------------------------------------------------------

GRID = Grid((16, 16, 16), (4.0, 4.0, 4.0))


@pytest.fixture
def pair() -> ValidationPair:
    """Landmarks that moved by (0, 0, 4) mm in images of air."""
    image = torch.zeros(1, 1, *GRID.shape)
    points = np.array([[20.0, 30.0, 20.0], [30.0, 20.0, 30.0]])
    return ValidationPair("pair", image, GRID, image, GRID, Affine(), points, points + np.array([0, 0, 4]))


def slab(first: int, last: int) -> LungMask:
    """Lungs from one slice to another, the last not included."""
    mask = torch.zeros(1, 1, *GRID.shape, dtype=torch.bool)
    mask[:, :, first:last] = True
    return LungMask(mask, GRID)


def test_measures_of_a_shift(pair: ValidationPair) -> None:
    shift = torch.zeros(1, 3, *GRID.shape)
    none = measure(pair, (slab(4, 8), slab(5, 9)), shift, GRID)
    assert (none.tre_mm, none.folding_fraction, none.std_log_jacobian) == pytest.approx((4, 0, 0))
    assert none.dice == pytest.approx(3 / 4)
    shift[:, 2] = 4.0  # one slice: the lungs' and the landmarks' motion
    found = measure(pair, (slab(4, 8), slab(5, 9)), shift, GRID)
    assert found.tre_mm == pytest.approx(0, abs=1e-5)
    assert found.dice == 1


def test_measures_of_stretching_and_folding(pair: ValidationPair) -> None:
    displacement = torch.zeros(1, 3, *GRID.shape)
    x = 4.0 * torch.arange(16)
    displacement[:, 0] = torch.where(x < 24, x, 48 - x).expand(16, 16, 16)  # det 2, then 1 at the crest, then 0
    left, right = replace(slab(0, 16), mask=(x < 24).expand(1, 1, 16, 16, 16)), slab(0, 16)
    found = measure(pair, (left, right), displacement, GRID)
    assert found.folding_fraction == pytest.approx(9 / 16)
    assert found.std_log_jacobian == pytest.approx(0, abs=1e-6)
    found = measure(pair, (right, right), displacement, GRID)  # the folded voxels do not count: 6 of det 2, 1 of det 1
    assert found.std_log_jacobian == pytest.approx(np.std([math.log(2)] * 6 + [0]), rel=1e-5)


# --- configurations --------------------------------------------------------------------------------------------------


def test_every_configuration_has_a_row_and_half_the_resolution() -> None:
    assert {path.stem for path in CONFIG.glob("*.toml")} == set(CONFIGS)
    sizes = CascadeSettings().network_size
    for config in CONFIGS:
        full, half = read_settings(CONFIG / f"{config}.toml"), reduced_settings(config, (30, 20, 10), 7)
        assert half.factors == tuple(2 * factor for factor in full.factors)
        assert half.steps[-1] == 10
        assert half.seed == 7
        assert half.weights(0) == full.weights(0)
        for factor in half.factors:  # the U-Net halves each size without remainder
            assert all(size % (factor * 2 ** (len(half.features) - 1)) == 0 for size in sizes)


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small networks on a small network grid, one thread."""

    def tiny(config: str, steps: tuple[int, ...], seed: int) -> TrainSettings:
        return replace(reduced_settings(config, steps, seed), features=(4, 8))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(ablation, "reduced_settings", tiny)
    monkeypatch.setattr(data, "CascadeSettings", partial(CascadeSettings, network_size=(32, 32, 32)))
    settings = PrepareSettings(prealign_spacing_mm=8.0)
    monkeypatch.setattr(prepare, "prepare", partial(prepare.prepare, settings=settings))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folders(small: None, tmp_path: Path, example: Path) -> tuple[Path, Path]:
    """A bank and validation pairs."""
    for name in ("scans", "pairs"):
        (tmp_path / name).mkdir()
    pack_scan(example / "fixed.mha", tmp_path / "scans" / "fixed.npz")
    pack_pair(example, tmp_path / "pairs" / "example.npz")
    write_bank(tmp_path / "scans", tmp_path / "bank", 1, seed=1)
    return tmp_path / "bank", tmp_path / "pairs"


def test_the_ablation_goes_on_where_it_stopped_and_writes_its_table(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, pairs = folders
    out = tmp_path / "ablation"
    options = ["ablation", "--bank", bank, "--validation", pairs, "--out", out, "--steps", 1, 1, 1, "--configs"]
    trained = []

    def counted(settings: TrainSettings, run: Run) -> bool:
        trained.append(run.out.name)
        return run.out.name == "single_level_1" and train(settings, run)

    train = ablation.train
    monkeypatch.setattr(ablation, "train", counted)
    monkeypatch.setattr("sys.argv", [str(o) for o in [*options, "single_level", "proposed"]])
    assert exit_code(ablation.main) == 0
    assert trained == ["single_level_1", "proposed_1"]
    assert [row[0] for row in rows(out)] == ["pre-aligned", "single level"]
    assert "Not finished: proposed." in (out / "table.md").read_text()

    monkeypatch.setattr(ablation, "train", lambda settings, run: trained.append(run.out.name) or train(settings, run))
    assert exit_code(ablation.main) == 0
    assert trained[2:] == ["proposed_1"]
    assert "Not finished" not in (out / "table.md").read_text()
    pair = load_validation_pair(pairs / "example.npz")
    none, single, proposed = rows(out)
    assert float(none[1]) == pytest.approx(pair.tre_mm().mean(), abs=0.006)
    for row, name, levels in ((single, "single_level_1", 1), (proposed, "proposed_1", 3)):
        cascade = load_cascade(out / name / "weights").cascade
        assert float(row[1]) == pytest.approx(validate(cascade, levels - 1, [pair])["example"], abs=0.006)
        assert row[1] == row[2]  # one pair is its own mean
        assert 0.8 < float(row[5]) <= 1

    manifest = json.loads((out / "proposed_1" / "weights" / "manifest.json").read_text())
    assert ablation.finished(out / "proposed_1", ablation.reduced_settings("proposed", (1, 1, 1), 1))
    assert not ablation.finished(out / "proposed_1", ablation.reduced_settings("proposed", (1, 1, 2), 1))
    assert manifest["training"]["settings"]["factors"] == [8, 4, 2]


def rows(out: Path) -> list[list[str]]:
    """The cells below the header."""
    lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_rows_are_means_over_the_seeds() -> None:
    measures = [
        [ablation.Measures(1.0, 0.0, 0.1, 0.9), ablation.Measures(2.0, 0.01, 0.3, 0.9)],
        [ablation.Measures(3.0, 0.0, 0.1, 0.8), ablation.Measures(2.0, 0.01, 0.3, 0.8)],
    ]
    row = ablation._row("no_mask", measures)
    assert row == ["no mask", "2.00", "2.00", "2.00 (1.50 to 2.50)", "0.500", "0.200", "0.850", "1.26"]


# --- the learning curve ----------------------------------------------------------------------------------------------

LOG = """0,0,0.1,a,4
0,0,0.1,a folded,0
0,0,0.1,b,2
0,0,0.1,b folded,0
0,0,0.1,exact_error,3
0,25,0.2,exact_error,2.5
0,50,0.3,a,9
0,50,0.3,a,3
0,50,0.3,a folded,0
0,50,0.3,b,1
0,50,0.3,b folded,0
1,0,0.4,a,3
1,0,0.4,a folded,0
"""


def test_a_log_is_read_level_by_level_and_later_lines_count(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    (stage,) = curve.read_stages(tmp_path / "log.csv")  # level 1 has no steps
    assert (stage.level, stage.steps) == (0, 50)
    series = curve.chained([stage, stage])
    steps, values = series["exact_error"]
    assert steps.tolist() == [0, 25, 50, 75]
    assert values.tolist() == [3, 2.5, 3, 2.5]
    assert set(curve.validation(series)) == {"a", "b"}
    steps, values = series["mean"]
    assert steps.tolist() == [0, 50, 50, 100]
    assert values.tolist() == [3, 2, 3, 2]


def test_the_curve_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    monkeypatch.setattr("sys.argv", ["curve", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "curve.png")])
    assert exit_code(curve.main) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.csv").write_text("0,0,0.1,a,4\n")
    assert exit_code(curve.main) == 2  # no steps yet


@pytest.mark.parametrize("content", ["step,loss\n", "0,x,0.1,a,3\n", None])
def test_other_files_are_no_logs(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "log.csv").write_text(content)
    with pytest.raises(InputError, match=r"log\.csv: expected lines of level"):
        curve.read_stages(tmp_path / "log.csv")


def test_the_running_median_passes_over_outliers() -> None:
    assert curve.running_median(np.array([1.0, 1.0, 50.0, 1.0, 1.0]), 3).tolist() == [1, 1, 1, 1, 1]
    assert curve.running_median(np.array([1.0, 3.0]), 9).tolist() == [2, 2]

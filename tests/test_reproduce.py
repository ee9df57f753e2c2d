"""The tables and figures of the paper: its numbers agree with each other, ours are those of the fields."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from algorithm.errors import exit_code
from algorithm.preparation.prepare import prepare
from baselines import ruehaak
from phantom.pair import PhantomPair
from reproduce import __main__ as command
from reproduce import ablation, runs
from reproduce.pairs import Pair
from reproduce.published import Value, pooled, published
from tests.running import COARSE, call_main

ROOT = Path(__file__).parent.parent
CASE = 4
"""The DIR-Lab 4DCT case that a phantom is taken for here."""


# --- the paper's own figures -----------------------------------------------------------------------------------------

AGREE = ("initial", "eppenhof", "mlvirnet", "lungregnet", "graphregnet", "voxelmorph", "ours")


@pytest.mark.parametrize("method", AGREE)
def test_published_means_follow_from_their_cases(method: str) -> None:
    table = published("table5")
    assert len(table[method]) == 10
    cases = pooled([Value(*value) for value in table[method]])
    assert cases.mean == pytest.approx(table["mean"][method][0], abs=0.0101)


def test_published_figures_that_do_not_follow_are_said_to() -> None:
    table, why = published("table5"), " ".join(published("table5")["why"] + published("table4")["why"])
    assert pooled([Value(*value) for value in table["initial"]]).sd == pytest.approx(6.58, abs=0.005)
    assert f"{pooled([Value(*value) for value in table['ours']]).sd:.2f}" == "0.94" and "cases give 0.94" in why
    assert f"{pooled([Value(*value) for value in table['dlir']]).mean:.2f}" == "2.69" and "cases give 2.69" in why
    assert table["mean"]["ours"] == published("table4")["ours"] == published("table2")["tre_4dct_mm"][-1]
    assert table["mean"]["initial"] == published("table4")["initial"]
    for name, _, mean, sd, *_, key in published("table4")["methods"]:
        assert not key or [mean, sd] == table["mean"][key], name


def test_pooled_is_that_of_all_landmarks() -> None:
    random = np.random.default_rng(0)
    cases = [random.gamma(2, scale, 300) for scale in (1.0, 2.0, 3.0)]
    found = pooled([Value(float(case.mean()), float(case.std())) for case in cases])
    assert (found.mean, found.sd) == pytest.approx((np.concatenate(cases).mean(), np.concatenate(cases).std()))
    assert pooled([Value(1.0), Value(2.0, 1.0)]) == Value(1.5)


def test_every_published_entry_says_where_it_is_from_and_why_ours_differs() -> None:
    for name in command.What.__args__:  # type: ignore[attr-defined]
        entry = published(name)
        assert entry["why"] and entry["shows"], name
        assert name.replace("table", "Table ").replace("figure", "Figure ") in entry["source"]


# --- runs on phantoms ------------------------------------------------------------------------------------------------

Run = Callable[..., int]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[list[str]]:
    """Registrations and evaluations in this process, small and coarse ones; the list of those that were run."""
    found: list[str] = []

    def run(arguments: list[str]) -> tuple[int, str]:
        module, options = arguments[2], arguments[3:]
        found.append(module)
        if module == "algorithm":
            return call_main(*options), ""
        monkeypatch.setattr(sys, "argv", [module, *options])
        return ruehaak.main(), ""

    def each(function: Callable, items: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
        return ((number, function(item)) for number, item in enumerate(items))

    coarse = partial(prepare, settings=COARSE)
    conventional = replace(
        ruehaak.CONVENTIONAL, spacing_mm=(16.0,), steps=(5,), weights=ruehaak.CONVENTIONAL.weights[:1]
    )
    monkeypatch.setattr(ruehaak, "prepare", coarse)
    monkeypatch.setattr(ruehaak, "CONVENTIONAL", conventional)
    monkeypatch.setattr(ablation, "prepare", coarse)
    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr("evaluation.evaluate.each", each)
    yield found


@pytest.fixture
def pairs(tmp_path: Path, example: Path, example_pair: PhantomPair) -> Path:
    """Two pairs of the same scans: a phantom with its lobes, and one with the landmark distances of a 4DCT case."""
    phantom, dirlab = tmp_path / "pairs" / "phantom", tmp_path / "pairs" / "any name"
    shutil.copytree(example, phantom)
    dirlab.mkdir()
    for scan in ("fixed", "moving"):
        shutil.copy(example / f"{scan}.mha", dirlab)
    write_landmarks(dirlab, example_pair, *published("table5")["initial"][CASE - 1])
    return tmp_path / "pairs"


def write_landmarks(folder: Path, pair: PhantomPair, mean: float, sd: float) -> None:
    """300 in the fixed lungs; their partners lie below at distances of just this mean and standard deviation."""
    random = np.random.default_rng(0)
    voxels = pair.fixed_lobes[0, 0].nonzero().numpy()[:, ::-1]
    fixed = pair.fixed_grid.to_world(voxels[random.choice(len(voxels), 300, replace=False)])
    distances = np.tile([mean - sd, mean + sd], 150)
    for scan, points in (("fixed", fixed), ("moving", fixed - distances[:, None] * [0, 0, 1])):
        pd.DataFrame(points, columns=["x", "y", "z"]).to_csv(folder / f"{scan}_landmarks.csv", index=False)


def call(*arguments: object) -> int:
    """The exit code of ``python -m reproduce``."""
    return exit_code(lambda: command.run(list(map(str, arguments))))


def error_mm(field: Path, pair: Path) -> float:
    """Mean landmark error as SimpleITK has it."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    fixed, moving = (pd.read_csv(pair / f"{scan}_landmarks.csv").to_numpy() for scan in ("fixed", "moving"))
    return float(np.linalg.norm([transform.TransformPoint(p) for p in fixed.tolist()] - moving, axis=1).mean())


def test_a_4dct_case_is_told_by_its_landmarks(pairs: Path, example_pair: PhantomPair) -> None:
    assert Pair(pairs / "any name").dirlab == CASE
    assert Pair(pairs / "phantom").dirlab is None
    write_landmarks(pairs / "any name", example_pair, 9.83, 4.90)
    assert Pair(pairs / "any name").dirlab is None


def test_table_5_on_a_phantom_again_and_with_another_scan(
    ran: list[str], pairs: Path, tmp_path: Path, small_weights: Path
) -> None:
    out = tmp_path / "out"
    options = ["table5", "--pairs", pairs, "--out", out, "--weights", small_weights, "--device", "cpu"]
    assert call(*options) == 0
    assert ran == ["algorithm"] * 2
    table = pd.read_csv(out / "table5" / "table5.csv")
    assert list(table.what) == ["4DCT 04", "all 1"]
    for method in ("off", "full"):
        found = error_mm(
            out / "fields" / method / "any name" / "images/displacement-field/fixed.mha", pairs / "any name"
        )
        assert table[method].to_numpy() == pytest.approx([found] * 2, abs=1e-3)
        assert table[f"{method}_minus_published"][0] == pytest.approx(found - 1.37, abs=1e-3)
    page = (out / "table5" / "README.md").read_text()
    assert "1.37 ± 1.03" in page and "phantom: not the 300 landmarks" in page

    before = {path: path.read_bytes() for path in (out / "table5").iterdir()}
    assert call(*options) == 0
    assert len(ran) == 2  # nothing was registered again
    assert {path: path.read_bytes() for path in (out / "table5").iterdir()} == before

    scan = sitk.ReadImage(str(pairs / "any name" / "moving.mha"))
    sitk.WriteImage(scan + 1, str(pairs / "any name" / "moving.mha"))
    assert call(*options) == 0
    assert len(ran) == 4


def test_all_of_them_share_their_registrations(
    ran: list[str], pairs: Path, tmp_path: Path, small_weights: Path
) -> None:
    """Every page names what it needs: its files are there, its columns have values, every picture is on it."""
    trained, out = tmp_path / "ablation", tmp_path / "out"
    for name in ("proposed_1", "proposed_2", "no_mask_1"):
        shutil.copytree(small_weights, trained / name / "weights")
    everything = command.What.__args__  # type: ignore[attr-defined]
    options = ["--pairs", pairs, "--out", out, "--weights", small_weights, "--device", "cpu", "--ablation", trained]
    assert call(*everything, *options) == 0
    assert sorted(ran) == ["algorithm"] * 4 + ["baselines.ruehaak"] * 2  # two pairs, each by every method once
    for name in everything:
        page = (out / name / "README.md").read_text()
        assert published(name)["why"][0] in page
        for picture in re.findall(r"\]\((\S+\.png)\)", page):
            assert (out / name / picture).stat().st_size > 5000

    table = pd.read_csv(out / "table2" / "table2.csv").set_index("what")
    tre = table.loc["proposed: TRE 4DCT"]
    assert tre.ablation == pytest.approx(tre.off, abs=0.05)  # the same weights; off repairs what folds
    assert tre.off == pytest.approx(pd.read_csv(out / "table5" / "table5.csv").off[0], abs=1e-3)
    assert table.ablation["no mask alignment (β = 0): TRE 4DCT"] == pytest.approx(tre.ablation, abs=1e-6)
    assert table.ablation.isna()["two levels: TRE KP"]

    lobes = pd.read_csv(out / "table1" / "table1.csv").set_index("what")
    box = pd.read_csv(out / "figure5" / "figure5.csv").set_index("what")
    assert lobes.full["Dice, networks"] == box.full["Dice, networks"] > box.affine["Dice, affine"] > 0.5
    assert lobes.full["foldings, networks"] == 0 and lobes.full_minus_published["foldings, networks"] == -0.06

    percentiles = pd.read_csv(out / "figure7" / "figure7_percentiles.csv").set_index("what")
    mean, sd = published("table5")["initial"][CASE - 1]
    assert percentiles.off["before registration"] == pytest.approx(mean + sd, abs=1e-6)
    assert percentiles.published["affine"] == 4.46


def test_a_pair_that_cannot_be_registered_is_told_of(
    ran: list[str], pairs: Path, tmp_path: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in no mean, and tried again the next time."""
    whole = runs.run
    monkeypatch.setattr(
        runs, "run", lambda arguments: (2, "moving.mha: is broken") if "off" in str(arguments) else whole(arguments)
    )
    options = ["table5", "--pairs", pairs / "any name", "--out", tmp_path / "out", "--weights", small_weights]
    assert call(*options) == 0
    page = (tmp_path / "out" / "table5" / "README.md").read_text()
    assert "any name, off: failed: moving.mha: is broken" in page
    table = pd.read_csv(tmp_path / "out" / "table5" / "table5.csv")
    assert table.off.isna().all() and table.full.notna().all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["table6", "--pairs", "{pairs}"], "table6"),
        (["--pairs", "{pairs}"], "nothing to make was named"),
        (["table5", "--pairs", "{pairs}/nowhere"], "nowhere: cannot be listed"),
        (["table5", "--pairs", "{pairs}/empty"], "empty: holds no pair"),
        (["table5", "--pairs", "{pairs}/half"], "half: has fixed.mha but no moving.mha"),
        (["table5", "--pairs", "{pairs}/phantom"], "none of the 1 pairs can be used"),
        (["table5", "--pairs", "{pairs}/phantom", "{pairs}/phantom"], "two of the folders are called phantom"),
        (["table5", "figure7", "--pairs", "{pairs}/phantom"], "figure7: none of the 1 pairs can be used"),
        (["table2", "--pairs", "{pairs}/phantom", "--ablation", "{pairs}/empty"], "empty: holds no trainings"),
        (["table5"], "pairs"),
    ],
)
def test_bad_input(
    ran: list[str],
    pairs: Path,
    tmp_path: Path,
    small_weights: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    said: str,
) -> None:
    (pairs / "empty").mkdir()
    (pairs / "half").mkdir()
    shutil.copy(pairs / "phantom" / "fixed.mha", pairs / "half")
    given = [argument.format(pairs=pairs) for argument in arguments]
    assert call(*given, "--out", tmp_path / "out", "--weights", small_weights) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_broken_landmarks_and_a_file_for_out(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (pairs / "any name" / "fixed_landmarks.csv").write_text("x,y,z\n1,2\n")
    assert call("table5", "--pairs", pairs, "--out", tmp_path / "out") == 2
    assert "fixed_landmarks.csv" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert call("table5", "--pairs", pairs, "--out", tmp_path / "file") == 2
    assert "file: cannot be written" in capsys.readouterr().err


# --- real pairs ------------------------------------------------------------------------------------------------------

REAL = ROOT.parent / "shared" / "data" / "pairs"


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason="the real pairs are not there")
def test_real_4dct_pairs_are_told_by_their_landmarks() -> None:
    for folder in REAL.glob("dirlab4dct_*"):
        assert Pair(folder).dirlab == int(folder.name[-2:])

"""The tables and figures of the paper: its numbers agree with each other, ours are those of the fields."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

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
from reproduce.runs import Runs
from tests.support.running import COARSE, call_main

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
    for name in EVERYTHING:
        entry = published(name)
        assert entry["why"] and entry["shows"], name
        assert name.replace("table", "Table ").replace("figure", "Figure ") in entry["source"]


# --- which pairs, and what is there already --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, example: Path, example_pair: PhantomPair) -> Path:
    """A phantom with its lobes and the landmark distances of a 4DCT case; and one with landmarks, but without lungs."""
    folder = tmp_path_factory.mktemp("pairs")
    shutil.copytree(example, folder / "any name")
    write_landmarks(folder / "any name", example_pair, *published("table5")["initial"][CASE - 1])
    (folder / "other").mkdir()
    for scan in ("fixed", "moving"):
        shutil.copy(example / f"{scan}_landmarks.csv", folder / "other")
        sitk.WriteImage(sitk.Image(20, 20, 20, sitk.sitkInt16) - 1000, str(folder / "other" / f"{scan}.mha"))
    return folder


def write_landmarks(folder: Path, pair: PhantomPair, mean: float, sd: float) -> None:
    """300 in the fixed lungs; their partners lie below at distances of just this mean and standard deviation."""
    random = np.random.default_rng(0)
    voxels = pair.fixed_lobes[0, 0].nonzero().numpy()[:, ::-1]
    fixed = pair.fixed_grid.to_world(voxels[random.choice(len(voxels), 300, replace=False)])
    distances = np.tile([mean - sd, mean + sd], 150)
    for scan, points in (("fixed", fixed), ("moving", fixed - distances[:, None] * [0, 0, 1])):
        pd.DataFrame(points, columns=["x", "y", "z"]).to_csv(folder / f"{scan}_landmarks.csv", index=False)


def test_a_4dct_case_is_told_by_its_landmarks(pairs: Path, tmp_path: Path, example_pair: PhantomPair) -> None:
    assert Pair(pairs / "any name").dirlab == CASE
    assert Pair(pairs / "other").dirlab is None
    write_landmarks(tmp_path, example_pair, 9.83, 4.90)
    assert Pair(tmp_path).dirlab is None


def test_what_is_there_is_used_again_unless_it_was_made_from_something_else(
    pairs: Path, tmp_path: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    said = iter([(2, "moving.mha: is broken")])
    monkeypatch.setattr(runs, "run", lambda arguments: ran.append(arguments[2]) or next(said, (0, "")))
    shutil.copytree(pairs / "other", tmp_path / "pair")
    pair, first = Pair(tmp_path / "pair"), Runs(tmp_path / "out", "cpu", small_weights)
    assert first.register(["off"], [pair]) == {("off", "pair"): "moving.mha: is broken"}
    assert first.register(["off", "ruehaak"], [pair]) == {}  # what failed is tried again
    assert ran == ["algorithm"] * 2 + ["baselines.ruehaak"]
    assert first.register(["off", "ruehaak"], [pair]) == {} and len(ran) == 3
    Runs(tmp_path / "out", "cuda", small_weights).register(["off"], [pair])
    assert len(ran) == 4
    Runs(tmp_path / "out", "cuda").register(["off", "ruehaak"], [pair])  # which has no weights: for cuda alone
    assert len(ran) == 6
    (pair.folder / "moving.mha").write_bytes(b"another scan")
    Runs(tmp_path / "out", "cuda").register(["off"], [pair])
    assert len(ran) == 7


# --- whole runs on a phantom -----------------------------------------------------------------------------------------

EVERYTHING = get_args(command.What)


def call(*arguments: object) -> int:
    """The exit code of ``python -m reproduce``."""
    return exit_code(lambda: command.run(list(map(str, arguments))))


@contextmanager
def in_this_process() -> Iterator[list[str]]:
    """Registrations, small and coarse ones, and evaluations in this process; the list of the registrations."""
    ran: list[str] = []

    def run(arguments: list[str]) -> tuple[int, str]:
        module, options = arguments[2], arguments[3:]
        ran.append(module)
        if module == "algorithm":
            return call_main(*options), ""
        patch.setattr(sys, "argv", [module, *options])
        return ruehaak.main(), ""

    def each(function: Callable, items: Sequence[Any], workers: int) -> Iterator[tuple[int, Any]]:
        return ((number, function(item)) for number, item in enumerate(items))

    coarse, full = partial(prepare, settings=COARSE), ruehaak.CONVENTIONAL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruehaak, "prepare", coarse)
        patch.setattr(ruehaak, "CONVENTIONAL", replace(full, spacing_mm=(16.0,), steps=(5,), weights=full.weights[:1]))
        patch.setattr(ablation, "prepare", coarse)
        patch.setattr(runs, "run", run)
        patch.setattr("evaluation.evaluate.each", each)
        yield ran


@pytest.fixture(scope="module")
def options(pairs: Path, tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> list[object]:
    """Of a command line, for a pair that serves every table and figure, and one that serves some of them."""
    trained = tmp_path_factory.mktemp("ablation")
    for name in ("proposed_1", "proposed_2", "no_mask_1", "something_1"):
        shutil.copytree(small_weights, trained / name / "weights")
    return ["--pairs", pairs, "--weights", small_weights, "--device", "cpu", "--ablation", trained]


@pytest.fixture(scope="module")
def out(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every table and figure, made at once: one pair, registered by every method once, and one that always fails."""
    folder = tmp_path_factory.mktemp("out")
    with in_this_process() as ran:
        assert call(*EVERYTHING, *options, "--out", folder) == 0
    assert ran[:3] == ["algorithm", "algorithm", "baselines.ruehaak"]  # table 1: the pair with lobes
    assert len(ran) - 3 == 1 + 3 + 2 + 2  # tables 2, 3, figures 6, 8: the other one, tried each time
    return folder


def table(out: Path, name: str, file: str = "") -> pd.DataFrame:
    return pd.read_csv(out / name / f"{file or name}.csv").set_index("what")


def error_mm(field: Path, pair: Path) -> float:
    """Mean landmark error as SimpleITK has it."""
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(field), sitk.sitkVectorFloat64))
    fixed, moving = (pd.read_csv(pair / f"{scan}_landmarks.csv").to_numpy() for scan in ("fixed", "moving"))
    return float(np.linalg.norm([transform.TransformPoint(p) for p in fixed.tolist()] - moving, axis=1).mean())


@pytest.mark.parametrize("method", ["off", "full"])
def test_ours_is_the_error_of_the_field(out: Path, pairs: Path, method: str) -> None:
    found = error_mm(out / "fields" / method / "any name/images/displacement-field/fixed.mha", pairs / "any name")
    rows = table(out, "table5")
    assert list(rows.index) == ["4DCT 04", "all 1"]
    assert rows[method].to_numpy() == pytest.approx([found] * 2, abs=1e-3)
    assert rows[f"{method}_minus_published"].iloc[0] == pytest.approx(found - 1.37, abs=1e-3)
    assert table(out, "table4")[method]["networks, the same cases (Table 5)"] == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_page_has_its_reasons_and_its_pictures(out: Path, name: str) -> None:
    page = (out / name / "README.md").read_text()
    assert all(sentence in page for sentence in published(name)["why"])
    pictures = re.findall(r"\]\((\S+\.png)\)", page)
    assert all((out / name / picture).stat().st_size > 5000 for picture in pictures)
    assert bool(pictures) == name.startswith("figure")
    assert ("other: no" in page) == (name in ("table1", "table4", "table5", "figure5", "figure7"))


def test_ablation(out: Path) -> None:
    rows = table(out, "table2")
    proposed = rows.loc["proposed: TRE 4DCT"]
    assert proposed.published == 1.14
    assert proposed.ablation == pytest.approx(proposed.off, abs=0.05)  # the same weights, by another way
    assert proposed.off == pytest.approx(table(out, "table5").off.iloc[0], abs=1e-3)
    assert rows.ablation["no mask alignment (β = 0): TRE 4DCT"] == pytest.approx(proposed.ablation, abs=1e-6)
    assert np.isnan(rows.ablation["two levels: TRE KP"])
    assert "something_1" not in (out / "table2" / "README.md").read_text()


def test_lobes_and_foldings(out: Path) -> None:
    rows, figure = table(out, "table1"), table(out, "figure5")
    assert rows.full["Dice, networks"] == figure.full["Dice, networks"]
    assert 0.5 < figure.affine["Dice, affine"] < 1
    assert rows.full["foldings, networks"] == 0 and rows.full_minus_published["foldings, networks"] == -0.06
    assert table(out, "figure6", "figure6_values").full["foldings, any name"] == 0


def test_percentiles(out: Path) -> None:
    rows = table(out, "figure7", "figure7_percentiles")
    mean, sd = published("table5")["initial"][CASE - 1]
    assert rows.initial["before registration"] == pytest.approx(mean + sd, abs=1e-6)  # as half of the landmarks
    assert rows.published["affine"] == 4.46


def test_a_second_run_registers_nothing_and_writes_the_same(out: Path, options: list[object]) -> None:
    before = {path: path.read_bytes() for path in (out / "figure7").iterdir()}
    with in_this_process() as ran:
        assert call("figure7", *options, "--out", out) == 0
    assert not ran
    assert {path: path.read_bytes() for path in (out / "figure7").iterdir()} == before


def test_a_pair_that_cannot_be_registered_is_told_of(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runs, "run", lambda arguments: (2, "moving.mha: is broken"))
    assert call("table5", "--pairs", pairs / "any name", "--out", tmp_path) == 0
    assert "any name, off: failed: moving.mha: is broken" in (tmp_path / "table5" / "README.md").read_text()
    assert table(tmp_path, "table5").off.isna().all()
    assert call("table1", "--pairs", pairs / "any name", "--out", tmp_path) == 0
    assert call("figure5", "figure6", "figure8", "--pairs", pairs / "any name", "--out", tmp_path) == 2
    assert "figure8: none of the 1 pairs could be registered" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["table6", "--pairs", "{pairs}"], "table6"),
        (["--pairs", "{pairs}"], "nothing to make was named"),
        (["table5", "--pairs", "{here}/nowhere"], "nowhere: cannot be listed"),
        (["table5", "--pairs", "{here}/empty"], "empty: holds no pair"),
        (["table5", "--pairs", "{here}/half"], "half: has fixed.mha but no moving.mha"),
        (["table5", "--pairs", "{pairs}/other"], "none of the 1 pairs can be used"),
        (["table5", "--pairs", "{pairs}/other", "{pairs}/other"], "two of the folders are called other"),
        (["table5", "figure7", "--pairs", "{pairs}/other"], "figure7: none of the 1 pairs can be used"),
        (["table2", "--pairs", "{pairs}/other", "--ablation", "{here}/empty"], "empty: holds no trainings"),
        (["table5"], "pairs"),
    ],
)
def test_bad_input(
    pairs: Path,
    tmp_path: Path,
    small_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(runs, "run", lambda arguments: (0, ""))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(pairs / "other" / "fixed.mha", tmp_path / "half")
    given = [argument.format(pairs=pairs, here=tmp_path) for argument in arguments]
    assert call(*given, "--out", tmp_path / "out", "--weights", small_weights) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_broken_landmarks_and_a_file_for_out(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(pairs / "other", tmp_path / "pair")
    (tmp_path / "pair" / "fixed_landmarks.csv").write_text("x,y,z\n1,2\n")
    assert call("table5", "--pairs", tmp_path / "pair", "--out", tmp_path / "out") == 2
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

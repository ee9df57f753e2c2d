"""The comparison: Wilcoxon's test against enumeration by hand, and the table that people read."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

from evaluation.compare import (
    compare,
    load,
    main,
    markdown,
    number_of_tests,
    paired_test,
    stars,
    write_pictures,
)
from evaluation.errors import InputError
from tests.support.strategies import examples


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    path.write_text(json.dumps({"results": results, "aggregates": {}}))
    return path


def case(name: str, tre_mm: float | None, dice: float | None = None, error: str | None = None) -> dict[str, Any]:
    return {"case": name, "tre_mm": {"mean": tre_mm}, "dice": {"1": dice, "mean": dice}, "error": error}


def many(offset: float, number: int = 12) -> list[dict[str, Any]]:
    return [case(f"c{i:02d}", 1 + 0.1 * i + offset * (1 + 0.02 * i)) for i in range(number)]


def by_enumeration(gains: np.ndarray) -> float:
    """P(W₊ ≥ the one seen) over all 2ⁿ signs, midranks for ties."""
    size = np.abs(gains)
    ranks = np.array([(size < s).sum() + ((size == s).sum() + 1) / 2 for s in size])
    seen = ranks[gains > 0].sum()
    sums = [ranks[np.array(signs, bool)].sum() for signs in itertools.product((0, 1), repeat=len(gains))]
    return float(np.mean([s >= seen - 1e-9 for s in sums]))


def test_four_cases_by_hand() -> None:
    """Gains 1, 2, 3, -4: W₊ = 6, W₋ = 4. 7 of the 16 sign patterns reach 6, 11 reach at most 6."""
    first, second = np.array([1.0, 1, 1, 5]), np.array([2.0, 3, 4, 1])
    test = paired_test(first, second, higher_is_better=False)
    assert (test.p_first, test.p_second) == (pytest.approx(7 / 16), pytest.approx(11 / 16))
    assert test.rank_biserial == pytest.approx(0.2) and test.median_difference == pytest.approx(-1.5)
    assert test.smallest_p == 1 / 16 and test.cases == 4


def test_which_way_is_better() -> None:
    low, high = np.arange(8.0), np.arange(8.0) + np.linspace(1, 2, 8)
    assert paired_test(low, high, higher_is_better=False).p_first == pytest.approx(2**-8)
    assert paired_test(low, high, higher_is_better=True).p_second == pytest.approx(2**-8)
    assert paired_test(low, high, higher_is_better=True).rank_biserial == -1


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=7))
@examples(20)
def test_against_enumeration_with_ties_and_zeros(differences: list[int]) -> None:
    gains = np.array(differences, float) / 10  # 0.1 + 0.2 must tie with 0.3
    base = np.full(len(gains), 0.7)
    test = paired_test(base + gains, base, higher_is_better=True)
    kept = np.array([d for d in differences if d], float)
    if not len(kept):
        assert (test.p_first, test.p_second, test.rank_biserial) == (1, 1, 0)
        return
    assert test.p_first == pytest.approx(by_enumeration(kept))
    assert test.p_second == pytest.approx(by_enumeration(-kept))


def test_against_enumeration_with_ties_in_many_cases() -> None:
    """15 cases with few different values, as of a Dice that is rounded."""
    gains = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 2, 2, 2, 2, -2]) / 100
    test = paired_test(gains, np.zeros(15), higher_is_better=True)
    assert test.p_first == pytest.approx(by_enumeration(gains), rel=1e-9)
    assert test.p_second == pytest.approx(by_enumeration(-gains), rel=1e-9)


def test_many_cases_are_tested_as_scipy_tests_them() -> None:
    """Exact up to 500 cases, without ties as scipy has it; beyond, scipy's own."""
    gains = np.random.default_rng(0).normal(0.05, 1, 501)
    for number in (60, 500, 501):
        test = paired_test(gains[:number], np.zeros(number), higher_is_better=True)
        method = "exact" if number <= 500 else "asymptotic"
        for p, alternative in ((test.p_first, "greater"), (test.p_second, "less")):
            expected = wilcoxon(np.round(gains[:number], 9), alternative=alternative, method=method).pvalue
            assert p == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20))
@examples(15)
def test_swapping_the_two_swaps_the_answers(values: list[float]) -> None:
    first, second = np.array(values), np.array(values[::-1])
    one, other = paired_test(first, second, False), paired_test(second, first, False)
    assert one.p_first == pytest.approx(other.p_second) and one.p_second == pytest.approx(other.p_first)
    assert one.rank_biserial == pytest.approx(-other.rank_biserial)
    assert abs(one.rank_biserial) <= 1 + 1e-12


def test_levels() -> None:
    assert [stars(p) for p in (0.0009, 0.001, 0.009, 0.01, 0.049, 0.05)] == ["***", "**", "**", "*", "*", ""]


def test_table(tmp_path: Path) -> None:
    """12 cases, one quantity, better in all: p = 2 · 2⁻¹²."""
    files = [write(tmp_path / "ours", many(0.0)), write(tmp_path / "theirs", many(1.0)[::-1])]
    first, second = load(files)
    comparison = compare(first, second)
    assert number_of_tests([comparison]) == 2
    text = markdown([comparison])
    row = next(line for line in text.splitlines() if line.startswith("| TRE"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("TRE (mm)", "lower", "12", "1.55 ± 0.35", "2.66 ± 0.41", "-1.11", "+1.00"),
        *("0.0005 \\*\\*\\*", "1.000"),
    ]
    assert "Too few" not in text


def test_bonferroni_counts_all_tables(tmp_path: Path) -> None:
    files = [write(tmp_path / name, many(offset)) for name, offset in (("a", 0.0), ("b", 1.0), ("c", 2.0))]
    a, b, c = load(files)
    text = markdown([compare(a, b), compare(a, c)])
    assert "times 4 tests" in text and text.count("0.0010 \\*\\*\\*") == 2  # 4 / 4096 = 0.00098


def test_too_few_cases_is_said(tmp_path: Path) -> None:
    files = [write(tmp_path / name, many(offset, 5)) for name, offset in (("a", 0.0), ("b", 1.0))]
    text = markdown([compare(*load(files))])
    assert (
        "Too few cases that differ for any significance, whatever the result: TRE (5); with 2 tests it takes 6" in text
    )


def test_six_cases_are_enough_for_two_tests(tmp_path: Path) -> None:
    files = [write(tmp_path / name, many(offset, 6)) for name, offset in (("a", 0.0), ("b", 1.0))]
    text = markdown([compare(*load(files))])
    assert "Too few" not in text and "0.031 \\*" in text


def test_missing_and_failed_cases_are_listed(tmp_path: Path) -> None:
    a = [case("one", 1.0, 0.9), case("two", 1.5, 0.8), case("only|a", 1.0, 0.9)]
    b = [case("two", 2.5, 0.7), case("one", None, None, "broken"), case("only b", 1.0, 0.9)]
    comparison = compare(*load([write(tmp_path / "a", a), write(tmp_path / "b", b)]))
    assert [row.test.cases for row in comparison.rows] == [1, 1]
    assert comparison.rows[0].first.tolist() == [1.5] and comparison.rows[0].second.tolist() == [2.5]
    text = markdown([comparison])
    for note in ("a has no only b", "b has no only\\|a", "b failed in one"):
        assert note in text
    assert "Dice30" in text


def test_failing_does_not_pay(tmp_path: Path) -> None:
    """Ours fails where it is hardest: ahead over the others, behind over all, where the case counts as before."""
    theirs = [case(f"c{i}", 2.0 + i) for i in range(8)]
    ours = [case(f"c{i}", 1.9 + i) for i in range(8)]
    ours[7] = {**case("c7", None, None, "lost"), "counted": {"tre_mm": 50.0}}
    comparison = compare(*load([write(tmp_path / name, of) for name, of in (("ours", ours), ("theirs", theirs))]))
    (some,), (over_all,) = comparison.rows, comparison.all_rows
    assert (some.test.cases, over_all.test.cases) == (7, 8)
    assert some.test.rank_biserial == 1 > over_all.test.rank_biserial
    assert over_all.first.mean() > over_all.second.mean() and some.first.mean() < some.second.mean()
    text = markdown([comparison])
    assert text.index("All cases, failed ones") < text.index("Cases that succeeded in both")
    assert "ours failed in c7: in the table over all cases only" in text and "times 4 tests" in text


def test_a_lost_fields_sdlogj_counts_as_the_worst_of_both(tmp_path: Path) -> None:
    ours = [{"case": "a", "std_log_jacobian": 0.1}, {"case": "b", "error": "lost", "counted": {"tre_mm": 9.0}}]
    theirs = [{"case": "a", "std_log_jacobian": 0.2}, {"case": "b", "std_log_jacobian": 0.3}]
    comparison = compare(*load([write(tmp_path / name, of) for name, of in (("ours", ours), ("theirs", theirs))]))
    (row,) = comparison.all_rows
    assert row.first.tolist() == [0.1, 0.3]


def test_equal_evaluations(tmp_path: Path) -> None:
    files = [write(tmp_path / name, many(0.0)) for name in ("a", "b")]
    text = markdown([compare(*load(files))])
    assert "TRE: no case differs" in text and "1.000 | 1.000" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no json", "is not valid JSON"),
        ("[]", 'no list "results"'),
        ('{"results": [{"case": 3}]}', 'no list "results"'),
        ('{"results": [{"case": "a"}, {"case": "a"}]}', "the case a twice"),
        (f'{{"results": [{{"case": "a", "hd_mm": {"9" * 401}}}]}}', "hd_mm of the case a holds '999"),
        ('{"results": [{"case": "a", "dice": {"1": "high", "mean": null}}]}', "dice of the case a holds 'high'"),
        ('{"results": [{"case": "a", "dice": [1]}]}', "dice of the case a holds '[1]'"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path / "good", many(0.0)), tmp_path / "bad.json"
    bad.write_text(content)
    assert main([str(good), str(bad)]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", ["", "some text", "case,tre_mm\na,1\n", "case,tre_mm,tre_initial_mm\na,b,1\n"])
def test_bad_landmarks_for_the_pictures(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / name, many(0.0)) for name in ("a", "b")]
    (tmp_path / "b" / "landmarks.csv").write_text(content)
    assert main([*map(str, files), "--pictures", str(tmp_path / "pictures")]) == 2
    assert "b/landmarks.csv" in capsys.readouterr().err.splitlines()[-1]


def test_targets_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / name, many(0.0)) for name in ("a", "b")]
    for option, target, sentence in (("--out", tmp_path, "is a folder"), ("--pictures", files[0], "cannot be written")):
        assert main([*map(str, files), option, str(target)]) == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_pictures_are_of_the_cases_that_both_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tables are; and "before" is no other evaluation's name."""
    a = [case("one", 1.0, 0.9), case("two", 1.5, 0.8), case("only a", 1.0, 0.1)]
    b = [case("two", 2.5, 0.7), case("one", None, None, "broken")]
    files = [write(tmp_path / "a", a), write(tmp_path / "b", b)]
    for file, cases, tre in ((files[0], ["one", "two", "two", "only a"], 1.0), (files[1], ["two", "two"], 2.0)):
        table = pd.DataFrame({"case": cases, "tre_mm": tre, "tre_initial_mm": 7.0})
        table.to_csv(file.parent / "landmarks.csv", index=False)
    drawn: dict[str, Any] = {}

    def curves(errors_mm: dict[str, np.ndarray], before_mm: np.ndarray) -> Figure:
        drawn.update({name: of.tolist() for name, of in errors_mm.items()}, grey=before_mm.tolist())
        return Figure()

    def boxes(groups: dict[str, Any], title: str) -> Figure:
        drawn[title] = groups
        return Figure()

    monkeypatch.setattr("evaluation.pictures.cumulative_errors", curves)
    monkeypatch.setattr("evaluation.pictures.box_plots", boxes)
    write_pictures(files, load(files, ["before", "b"]), tmp_path)
    assert drawn["before"] == [1.0, 1.0] and drawn["b"] == [2.0, 2.0] and drawn["grey"] == [7.0, 7.0]
    assert drawn["Dice"] == {"before": {"1": [0.8], "mean": [0.8]}, "b": {"1": [0.7], "mean": [0.7]}}
    assert {path.name for path in tmp_path.glob("*.png")} == {"tre.png", "dice.png"}


def test_nothing_in_common(tmp_path: Path) -> None:
    files = [write(tmp_path / "a", [case("x", 1.0)]), write(tmp_path / "b", [case("y", 1.0)])]
    with pytest.raises(InputError, match="in common"):
        markdown([compare(*load(files))])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two folders of the same name, a file for the table, and pictures."""
    results = [case(f"c{i}", 1.0 + i, 0.9 - 0.01 * i) for i in range(4)]
    files = [write(tmp_path / method / "out", results) for method in ("a", "b")]
    for file in files:
        table = pd.DataFrame({"case": ["c0"] * 5, "tre_mm": np.arange(5.0), "tre_initial_mm": np.arange(5.0) + 3})
        table.to_csv(file.parent / "landmarks.csv", index=False)
    out, pictures = tmp_path / "tables" / "t.md", tmp_path / "pictures"
    assert main([*map(str, files), "--out", str(out), "--pictures", str(pictures)]) == 0
    assert out.read_text().startswith("## out (1) and out (2)") and not capsys.readouterr().out
    assert sorted(p.name for p in pictures.iterdir()) == ["dice.png", "tre.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures.iterdir())
    names = ["a$x^$", "_\udcff"]  # no formula, nothing hidden, and bytes that are not UTF-8
    assert main([*map(str, files), "--names", *names, "--out", str(out), "--pictures", str(pictures)]) == 0
    assert out.read_text().startswith("## a$x^$ and _\\\\udcff")
    assert main([*map(str, files), "--names", "A", "B"]) == 0
    assert "p: A better" in capsys.readouterr().out
    assert main([*map(str, files), "--names", "A"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main([str(files[0])])

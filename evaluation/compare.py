"""Compares an evaluation with others by paired tests over the cases, as in Tables 1 and 2 of Hering et al. 2021.

    python -m evaluation.compare OURS/metrics.json THEIRS/metrics.json [MORE/metrics.json ...]

The first evaluation is compared with each of the others, case by case: one-sided Wilcoxon signed-rank tests in both
directions, with Bonferroni's correction. A case is one observation, represented by the mean over its landmarks or
labels. The landmarks of a case move together, so testing them one by one would overstate the evidence.

If cases failed, there are two tables. The first covers all cases; a failed case has the value without registration, or
its own value if that is worse (see `failures.py`), so that a failure is no advantage. The second covers the cases that
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from .errors import InputError, exit_code, printable
from .quantities import QUANTITIES, Quantity, counted_values, read_metrics, worst30
from .tables import all_or_nothing, prepare_file, prepare_folder, read_landmark_errors, write_text

LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
"""Levels of significance, as in the paper."""
MOST_EXACT = 500
"""Maximum number of cases for the exact test; with more, it takes seconds and gives the same result."""


@dataclass(frozen=True)
class PairedTest:
    """The result of the test on the differences between the two values of n cases."""

    cases: int
    median_difference: float
    """The median of first - second, in the unit of the quantity."""
    rank_biserial: float
    """(W₊ - W₋) / (W₊ + W₋), from -1 to 1: positive if the first is better; 0 if nothing differs."""
    p_first: float
    """One-sided p, not corrected, for "the first is better"."""
    p_second: float
    """One-sided p, not corrected, for "the second is better"."""
    smallest_p: float
    """2^-n for n cases that differ: the value of `p_first` if the first is better in all of them."""


def paired_test(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], higher_is_better: bool) -> PairedTest:
    """Wilcoxon's signed-rank test over n ≥ 1 cases, in both directions.

    Differences below 1e-9 come from rounding and count as zero. Cases without a difference get no rank (Wilcoxon 1945);
    ties get their mean rank. p is exact, also with ties, up to `MOST_EXACT` cases that differ; for more cases it is
    asymptotic.
    """
    if not len(first):
        raise ValueError("no cases to test, expected at least one")
    difference = np.round(first - second, 9)
    gains = difference if higher_is_better else -difference
    gains = gains[gains != 0]
    median = float(np.median(difference))
    if not len(gains):
        return PairedTest(len(first), median, 0.0, 1.0, 1.0, 1.0)
    ranks = stats.rankdata(np.abs(gains))
    if len(gains) <= MOST_EXACT:
        p_first, p_second = _exact_p(ranks, gains > 0)
    else:
        p_first, p_second = (float(stats.wilcoxon(gains, alternative=a).pvalue) for a in ("greater", "less"))
    effect = float((ranks * np.sign(gains)).sum() / ranks.sum())
    return PairedTest(len(first), median, effect, p_first, p_second, 0.5 ** len(gains))


def _exact_p(ranks: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """P(W₊ ≥ observed) and P(W₊ ≤ observed) if each rank is added with probability 1/2.

    The probability of every sum is updated rank by rank. Sums are in half ranks, because mean ranks of ties can be
    halves.
    """
    halves = np.rint(2 * ranks).astype(int)
    chance = np.zeros(halves.sum() + 1)
    chance[0] = 1
    for half in halves:
        chance[half:] += chance[:-half].copy()
        chance /= 2
    seen = halves[positive].sum()
    return float(chance[seen:].sum()), float(chance[: seen + 1].sum())


def stars(p: float) -> str:
    """The paper's levels of significance: * p < 0.05, ** p < 0.01, *** p < 0.001."""
    return next((mark for level, mark in LEVELS if p < level), "")


# --- two evaluations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A metrics.json."""

    name: str
    results: dict[str, dict[str, Any]]
    """The results of the cases, by name."""

    @property
    def failed(self) -> list[str]:
        """The cases with an error."""
        return [name for name, result in self.results.items() if result.get("error")]


@dataclass(frozen=True)
class Row:
    """One quantity of two evaluations, over the cases that both have."""

    quantity: Quantity
    first: np.ndarray
    second: np.ndarray
    test: PairedTest


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, quantity by quantity."""

    first: Evaluation
    second: Evaluation
    rows: list[Row]
    """Rows over the cases that succeeded in both."""
    all_rows: list[Row]
    """Rows over all cases, with the counted values of failed ones; empty if no case failed."""


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """One row per quantity that ranks methods and that both evaluations have in at least one case."""
    common = [name for name in first.results if name in second.results]
    ours, theirs = ([evaluation.results[name] for name in common] for evaluation in (first, second))
    ranking = [quantity for quantity in QUANTITIES if quantity.better]
    rows = [
        _row(quantity, *(np.array([quantity.of(result) for result in results], float) for results in (ours, theirs)))
        for quantity in ranking
    ]
    all_rows = [_row(quantity, *counted_values(quantity, ours, theirs)) for quantity in ranking]
    more = sum(len(row.first) for row in all_rows if row) > sum(len(row.first) for row in rows if row)
    return Comparison(first, second, *([row for row in of if row] for of in (rows, all_rows if more else [])))


def _row(quantity: Quantity, first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> Row | None:
    """The row over the cases where neither value is NaN; None if there is no such case."""
    both = ~(np.isnan(first) | np.isnan(second))
    if not both.any():
        return None
    a, b = first[both], second[both]
    return Row(quantity, a, b, paired_test(a, b, quantity.better == "higher"))


def number_of_tests(comparisons: Sequence[Comparison]) -> int:
    """The factor of Bonferroni's correction: two directions for every row of every table."""
    return 2 * sum(len(comparison.rows) + len(comparison.all_rows) for comparison in comparisons)


# --- as Markdown -----------------------------------------------------------------------------------------------------


def markdown(comparisons: Sequence[Comparison]) -> str:
    """One table per comparison, and an explanation of its numbers."""
    tests = number_of_tests(comparisons)
    if not tests:
        raise InputError("the evaluations have no quantity of any case in common, expected the same cases in them")
    sections = [_section(comparison, tests) for comparison in comparisons]
    return "\n\n".join([*sections, _explanation(tests)]) + "\n"


def _section(comparison: Comparison, tests: int) -> str:
    a, b = _cell(comparison.first.name), _cell(comparison.second.name)
    head = ("", "better", "n", a, b, "median difference", "effect", f"p: {a} better", f"p: {b} better")
    lines: list[str] = []
    if comparison.all_rows:
        lines += ["All cases, failed ones as without registration, or as they came out where that is worse:", ""]
        lines += [*_table(head, comparison.all_rows, tests), "", "Cases that succeeded in both:", ""]
    lines += _table(head, comparison.rows, tests) if comparison.rows else ["None."]
    notes = [*_case_notes(comparison), *_power_notes(comparison, tests)]
    return "\n".join([f"## {a} and {b}", "", *lines, "", *(f"- {note}" for note in notes)]).rstrip()


def _table(head: Sequence[str], rows: Sequence[Row], tests: int) -> list[str]:
    lines = [_line(head), _line(["---", "---", *["---:"] * 7])]
    lines += [_line(_cells(row, tests)) for row in rows]
    return [*lines, *(_line(_dice30(row)) for row in rows if row.quantity.key == "dice")]


def _cells(row: Row, tests: int) -> list[str]:
    quantity, test = row.quantity, row.test
    p_values = [min(1.0, p * tests) for p in (test.p_first, test.p_second)]
    difference = f"{test.median_difference:+.{quantity.digits}f}"
    means = [f"{v.mean():.{quantity.digits}f} ± {v.std():.{quantity.digits}f}" for v in (row.first, row.second)]
    ends = [difference, f"{test.rank_biserial:+.2f}", *(_p(p) for p in p_values)]
    return [quantity.title, quantity.better or "", str(test.cases), *means, *ends]


def _dice30(row: Row) -> list[str]:
    """The mean over the 30 % worst cases of each evaluation. These are not the same cases, so they cannot be paired."""
    worst = [worst30(values, low_is_bad=True) for values in (row.first, row.second)]
    means = [f"{v.mean():.{row.quantity.digits}f} ± {v.std():.{row.quantity.digits}f}" for v in worst]
    return ["Dice30", "higher", str(len(worst[0])), *means, *["–"] * 4]


def _p(p: float) -> str:
    text = "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"
    return f"{text} {stars(p).replace('*', chr(92) + '*')}".strip()


def _case_notes(comparison: Comparison) -> list[str]:
    """Notes on cases that are missing in one evaluation."""
    pair = (comparison.first, comparison.second)
    notes = []
    for one, other in (pair, pair[::-1]):
        missing = [name for name in other.results if name not in one.results]
        counted = [name for name in one.failed if any(q.counted(one.results[name]) is not None for q in QUANTITIES)]
        lost = [name for name in one.failed if name not in counted]
        left_out = "left out of the pairs."
        second_only = "in the table over all cases only."
        for cases, what, where in (
            (missing, "has no", left_out),
            (lost, "failed in", left_out),
            (counted, "failed in", second_only),
        ):
            if cases:
                names = ", ".join(_cell(name) for name in cases)
                notes.append(f"{_cell(one.name)} {what} {names}: {where}")
    return notes


def _power_notes(comparison: Comparison, tests: int) -> list[str]:
    """Notes on comparisons in which n is too small for any result to be significant."""
    rows = comparison.all_rows or comparison.rows
    weak = [row for row in rows if row.test.smallest_p * tests >= 0.05 and row.test.smallest_p < 1]
    same = [row.quantity.name for row in rows if row.test.smallest_p == 1]
    notes = [f"{', '.join(same)}: no case differs."] if same else []
    if weak:
        names = ", ".join(f"{row.quantity.name} ({round(-np.log2(row.test.smallest_p))})" for row in weak)
        least = int(np.floor(np.log2(tests / 0.05))) + 1
        notes.append(
            f"Too few cases that differ for any significance, whatever the result: {names}; "
            f"with {tests} tests it takes {least}."
        )
    return notes


def _explanation(tests: int) -> str:
    return (
        "Mean ± standard deviation over the n cases of the table; median difference: first minus second. "
        "Effect: matched-pairs rank-biserial correlation, from -1 to 1, positive where the first is better. "
        f"p: one-sided Wilcoxon signed-rank test over cases, times {tests} tests (Bonferroni), at most 1; "
        "\\* p < 0.05, \\*\\* p < 0.01, \\*\\*\\* p < 0.001. Dice30: mean over the 30 % of the cases with the lowest "
        "Dice of each, not tested, as they need not be the same cases."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text escaped for a table cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


# --- the command -----------------------------------------------------------------------------------------------------


def load(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Evaluation]:
    """The evaluations, with the given names or those of their folders; equal folder names get a number."""
    if names is not None and len(names) != len(paths):
        raise InputError(f"{len(names)} names for {len(paths)} evaluations, expected one for each")
    given = list(names) if names is not None else [path.resolve().parent.name or path.stem for path in paths]
    given = [printable(name) for name in given]
    if len(set(given)) < len(given):
        given = [f"{name} ({number})" for number, name in enumerate(given, start=1)]
    tables = [{r["case"]: r for r in read_metrics(path)["results"]} for path in paths]
    return [Evaluation(name, results) for name, results in zip(given, tables, strict=True)]


def write_pictures(paths: Sequence[Path], evaluations: Sequence[Evaluation], folder: Path) -> None:
    """tre.png (Fig. 7 of the paper) and dice.png, asd_mm.png, hd_mm.png (Fig. 5), if there are data.

    They show the cases that succeeded in all evaluations; landmarks are read from landmarks.csv beside each
    metrics.json.
    """
    from .pictures import box_plots, cumulative_errors, values_by_label

    cases = set.intersection(*(e.results.keys() - e.failed for e in evaluations))
    tables = [read_landmark_errors(path.parent / "landmarks.csv") for path in paths]
    tables = [table[table["case"].isin(cases)] for table in tables]
    errors_mm = {e.name: t["tre_mm"].to_numpy(float) for e, t in zip(evaluations, tables, strict=True) if len(t)}
    with all_or_nothing(folder) as partial:
        if errors_mm:
            before_mm = max(tables, key=len)["tre_initial_mm"].to_numpy(float)
            cumulative_errors(errors_mm, before_mm).savefig(partial / "tre.png", dpi=150)
        for key in ("dice", "asd_mm", "hd_mm"):
            groups = {e.name: values_by_label([e.results[case] for case in cases], key) for e in evaluations}
            if any(groups.values()):
                title = next(q.title for q in QUANTITIES if q.key == key)
                box_plots(groups, title).savefig(partial / f"{key}.png", dpi=150)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong arguments exit with code 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json of two or more evaluations")
    parser.add_argument("--names", nargs="+", help="of the evaluations (default: their folders' names)")
    parser.add_argument("--out", type=Path, help="file for the Markdown (default: standard output)")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the comparison")
    options = parser.parse_args(arguments)
    if len(options.metrics) < 2:
        parser.error(f"one evaluation ({options.metrics[0]}), expected two or more")
    return options


def run(options: argparse.Namespace) -> None:
    """Compare evaluations, from files to a table and pictures."""
    first, *others = evaluations = load(options.metrics, options.names)
    text = markdown([compare(first, other) for other in others])
    if options.out:
        prepare_file(options.out)
        write_text(options.out, text)
    else:
        sys.stdout.write(printable(text))
    if options.pictures:
        prepare_folder(options.pictures)
        write_pictures(options.metrics, evaluations, options.pictures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

"""report.html: one page about an evaluation, for readers. It contains its pictures and loads no other file.

    python -m evaluation.report OUT --input PRED --ground-truth GT [--images FOLDER]

makes it again from OUT/metrics.json and OUT/landmarks.csv, with other images: FOLDER/<case>/fixed.mha and
moving.mha. Without FOLDER, it shows the images beside the ground truth, if there are any.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resultpages import render
from resultpages.charts import colour_bar
from resultpages.colours import VOLUME
from resultpages.pictures import Picture, picture

from .cases import Case, find_cases
from .errors import CaseError, exit_code
from .evaluate import aggregate, aggregate_all, read_case
from .pictures import (
    box_plots,
    coronal_slices,
    cumulative_errors,
    panels,
    read_scan,
    svg,
    values_by_label,
)
from .quantities import QUANTITIES, Quantity, read_metrics
from .tables import read_landmark_errors, write_text

log = logging.getLogger(__name__)

OF = {quantity.key: quantity for quantity in QUANTITIES}
FAILED_COUNT = (
    "Over all cases, a failed one counts as if nothing had been registered, or as it came out where that is worse; its "
    "folding as it is, or 100 % where there is no field that can be read, and its SDlogJ then as the worst of all. A "
    "case whose ground truth cannot be used counts nowhere."
)
BY_LABEL = ("dice", "asd_mm", "hd_mm", "hd95_mm")
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.5)
"""Ticks on the scale of the Jacobian determinant."""
SHOWN_WORST = 3
"""Number of worst cases that are shown in pictures, besides the median one."""


@dataclass(frozen=True)
class Card:
    """A key figure at the top of the page."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True)
class Table:
    """A table of texts; the first cell of a line is its name."""

    heads: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class Cell:
    """The text of a cell in a sortable table, and its sort key."""

    text: str
    value: str


@dataclass(frozen=True)
class Pictured:
    """The pictures of a case, or the reason why there are none."""

    name: str
    why: str
    pictures: list[Picture] = field(default_factory=list)
    trouble: str = ""


def write_page(
    metrics: dict[str, Any],
    landmarks: pd.DataFrame,
    cases: Sequence[Case],
    out: Path,
    images: Path | None = None,
) -> Path:
    """``out``/report.html, from the content of metrics.json and landmarks.csv. If the pictures of a case fail, it is
    shown without them.

    Images (HU) of a case are ``images/<case>/fixed.*`` and ``moving.*``, or those in its ground truth.
    """
    path = out / "report.html"
    write_text(path, page_of(metrics, landmarks, _pictures(metrics["results"], cases, images)))
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return path


def page_of(metrics: dict[str, Any], landmarks: pd.DataFrame, shown: list[Pictured]) -> str:
    """The text of the page. For a single case it leaves out deviations, ranks and boxes of one value."""
    results = metrics["results"]
    aggregates, over_all = metrics["aggregates"], metrics.get("aggregates_all")
    known = [quantity for quantity in QUANTITIES if any(quantity.of(result) is not None for result in results)]
    summaries = _summaries(aggregates, over_all)
    return render(
        "evaluation.html.j2",
        scripts=["sort.js"],
        title="Registration report",
        lead=_lead(aggregates),
        failed=[(r["case"], str(r["error"])) for r in results if r.get("error")],
        failed_count=FAILED_COUNT,
        remarks=[(r["case"], str(remark)) for r in results for remark in r.get("remarks") or []],
        cards=_cards(over_all or aggregates),
        summaries=summaries,
        none_left=aggregates["cases"] == aggregates["failed"],
        labels=_labels(results) if len(results) == 1 else None,
        charts=_charts(results, landmarks),
        worst=_worst(results),
        pictured=shown,
        volume_bar=colour_bar(VOLUME, "Volume in the moving image / in the fixed image", RATIOS, digits=2),
        case_heads=["case", *(q.title for q in known), *(["error"] if aggregates["failed"] else [])]
        if len(results) > 1
        else [],
        case_lines=[(r["case"], [_cell(q, r) for q in known], str(r.get("error") or "")) for r in results],
        definitions=_definitions(over_all or aggregates),
    )


# --- in words and numbers --------------------------------------------------------------------------------------------


def _lead(aggregates: dict[str, Any]) -> str:
    cases, failed = aggregates["cases"], aggregates["failed"]
    return f"{cases} {'case' if cases == 1 else 'cases'}, " + (
        f"{failed} of them failed." if failed else "none failed."
    )


def _cards(aggregates: dict[str, Any]) -> list[Card]:
    cards = []
    for key in ("tre_mm", "dice", "asd_mm", "hd95_mm", "folding_percent"):
        of, quantity = aggregates.get(key) or {}, OF[key]
        if of.get("mean") is not None:
            spread = [] if aggregates["cases"] == 1 else [f"± {quantity.text(of['std'])}"]
            value = f"{quantity.text(of['mean'])} {quantity.unit}"
            cards.append(Card(quantity.name, value, ", ".join([*spread, *_remark(key, aggregates)])))
    return cards


def _remark(key: str, aggregates: dict[str, Any]) -> list[str]:
    quantity, of = OF[key], aggregates[key]
    if key == "tre_mm":
        return [f"before: {quantity.text(aggregates['tre_initial_mm']['mean'])}"]
    if aggregates["cases"] == 1:
        return []
    if key == "folding_percent":
        return [f"largest: {quantity.text(of['max'])}"]
    return [f"30 % worst: {quantity.text(of['worst30'])}"]


def _summaries(aggregates: dict[str, Any], over_all: dict[str, Any] | None) -> list[Table]:
    """Tables over all cases and over those that did not fail; a single table if none failed."""
    if not (over_all and aggregates["failed"]):
        return _summary("over the cases", aggregates)
    return _summary("over all cases", over_all) + _summary("over those that did not fail", aggregates)


def _summary(title: str, aggregates: dict[str, Any]) -> list[Table]:
    """No table without values; for a single case, its values."""
    names = ["mean", "std", "median", "min", "max", "worst30"]
    heads = [title, "n", "mean", "std", "median", "min", "max", "30 % worst"]
    if aggregates["cases"] == 1:
        heads, names = ["of the case", "value"], ["mean"]
    lines = []
    for quantity in QUANTITIES:
        of = aggregates.get(quantity.key) or {}
        if of.get("mean") is not None:
            number = [] if len(names) == 1 else [str(of.get("n", "–"))]
            lines.append([quantity.title, *number, *(quantity.text(of.get(name)) for name in names)])
    return [Table(heads, lines)] if lines else []


def _labels(results: Sequence[dict[str, Any]]) -> Table | None:
    """For a single case, a table with the values that box plots show for several."""
    by_label = {key: values_by_label(results, key) for key in BY_LABEL}
    labels = list(dict.fromkeys(label for of in by_label.values() for label in of))
    if not labels:
        return None
    lines = [
        [label, *(OF[key].text(of[label][0] if label in of else None) for key, of in by_label.items())]
        for label in labels
    ]
    return Table(["label", *(OF[key].title for key in BY_LABEL)], lines)


def _cell(quantity: Quantity, result: dict[str, Any]) -> Cell:
    value = quantity.of(result)
    return Cell(quantity.text(value), "" if value is None else repr(value))


def _worst(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The worst cases for every quantity that ranks methods."""
    found = []
    for quantity in QUANTITIES:
        ranked = _worst_first(results, quantity) if quantity.better else []
        if len({value for _, value in ranked}) > 1:
            found.append((quantity.title, [(name, quantity.text(value)) for name, value in ranked[:SHOWN_WORST]]))
    return found


def _worst_first(results: Sequence[dict[str, Any]], quantity: Quantity) -> list[tuple[str, float]]:
    """Cases with their values, the worst first."""
    values = [(result["case"], quantity.of(result)) for result in results]
    known = [(name, value) for name, value in values if value is not None]
    return sorted(known, key=lambda pair: pair[1], reverse=quantity.better != "higher")


def _definitions(aggregates: dict[str, Any]) -> list[tuple[str, str]]:
    known = {q.key for q in QUANTITIES if (aggregates.get(q.key) or {}).get("mean") is not None}
    if "folding_percent_all" in known:
        known.add("folding_percent")  # another definition refers to it
    shown = [(q.title, q.definition) for q in QUANTITIES if q.key in known]
    if aggregates["cases"] == 1:
        return shown
    general = (
        "Every case counts once. Standard deviations divide by n. “30 % worst” is the mean over the 30 % of the cases "
        f"with the worst values, rounded up; for Dice, the paper’s Dice30. {FAILED_COUNT}"
    )
    return [*shown, ("Over the cases", general)]


# --- in pictures -----------------------------------------------------------------------------------------------------


def _charts(results: Sequence[dict[str, Any]], landmarks: pd.DataFrame) -> list[Picture]:
    """The charts. A single case has no box plots; `_labels` shows its values."""
    found = []
    if len(landmarks):
        after, before = (landmarks[name].to_numpy(float) for name in ("tre_mm", "tre_initial_mm"))
        chart = svg(cumulative_errors({"after": after}, before))
        found.append(_chart(chart, f"Landmarks within a distance, {len(landmarks)} in all"))
    for key in BY_LABEL:
        by_label = values_by_label(results, key)
        if any(len(values) > 1 for values in by_label.values()):
            chart = svg(box_plots({"after": by_label}, OF[key].title))
            found.append(_chart(chart, f"{OF[key].name} of every case, by label"))
    return found


def _chart(source: str, caption: str) -> Picture:
    return Picture(source, caption, caption)


def pictured(results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The cases to show, with the reason: the median case and the worst ones, by landmarks, else labels, else
    foldings."""
    by = (OF["tre_mm"], OF["dice"], OF["std_log_jacobian"], OF["folding_percent_all"])
    quantity = next((q for q in by if any(q.of(r) is not None for r in results)), None)
    if quantity is None:
        return []
    ranked = _worst_first(results, quantity)
    worst, middle = ranked[:SHOWN_WORST], ranked[len(ranked) // 2]
    reasons = list(zip(("worst", "2nd worst", "3rd worst"), worst, strict=False)) if len(ranked) > 1 else [("", middle)]
    chosen = reasons if middle in worst else [("median", middle), *reasons]
    described = []
    for reason, (name, value) in chosen:
        words = f"{quantity.name} {quantity.text(value)} {quantity.unit}".strip()
        described.append((name, f"{reason}, {words}" if reason else words))
    return described


def _pictures(results: Sequence[dict[str, Any]], cases: Sequence[Case], images: Path | None) -> list[Pictured]:
    """Coronal slices of the chosen cases."""
    by_name = {case.name: case for case in cases}
    return [_panels(by_name[name], why, images) for name, why in pictured(results) if name in by_name]


def _panels(case: Case, why: str, images: Path | None) -> Pictured:
    """The pictures of a case, or the reason why there are none."""
    try:
        truth, displacement = read_case(case)
        folder = case.ground_truth if images is None else images / case.ground_truth.name
        scans = read_scan(folder, "fixed"), read_scan(folder, "moving")
        shown = panels(coronal_slices(displacement, truth.lungs, *scans))
        return Pictured(case.name, why, [picture(pixels, title, title) for title, pixels in shown.items()])
    except (CaseError, RuntimeError, OSError, np.linalg.LinAlgError) as error:
        log.warning("%s: no pictures: %s", case.name, error)
        return Pictured(case.name, why, trouble=str(error))


# --- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong arguments exit with code 2 and one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("output", type=Path, help="folder with metrics.json")
    parser.add_argument("--input", type=Path, required=True, help="the predictions, as for python -m evaluation")
    parser.add_argument("--ground-truth", type=Path, required=True, help="a folder per case")
    parser.add_argument("--images", type=Path, help="folder with <case>/fixed.mha and <case>/moving.mha")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Write the page of an earlier evaluation."""
    results = read_metrics(options.output / "metrics.json")["results"]
    metrics = {"results": results, "aggregates": aggregate(results), "aggregates_all": aggregate_all(results)}
    landmarks = read_landmark_errors(options.output / "landmarks.csv")
    write_page(metrics, landmarks, find_cases(options.input, options.ground_truth), options.output, options.images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

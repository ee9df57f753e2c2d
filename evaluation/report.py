"""report.html: one page about an evaluation, for a person. It holds its pictures and loads nothing.

    python -m evaluation.report OUT --input PRED --ground-truth GT [--images FOLDER]

makes it anew from OUT/metrics.json and OUT/landmarks.csv, with images from elsewhere: FOLDER/<case>/fixed.mha and
moving.mha. Without FOLDER those beside the ground truth are shown, where there are any.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .cases import Case, find_cases
from .errors import CaseError, exit_code
from .evaluate import aggregate, aggregate_all, read_case
from .page import page
from .pictures import (
    box_plots,
    colour_bar,
    coronal_slices,
    cumulative_errors,
    jpeg,
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
SHOWN_WORST = 3
"""Cases that are shown in pictures, besides the median one."""


def write_page(
    metrics: dict[str, Any],
    landmarks: pd.DataFrame,
    cases: Sequence[Case],
    out: Path,
    images: Path | None = None,
) -> Path:
    """``out``/report.html, from what metrics.json and landmarks.csv hold. A case whose picture fails is shown without.

    Images (HU) of a case are ``images/<case>/fixed.*`` and ``moving.*``, or those in its ground truth.
    """
    results = metrics["results"]
    aggregates = metrics.get("aggregates_all") or metrics["aggregates"]
    body = [
        _head(metrics),
        _failures(results),
        _remarks(results),
        _cards(aggregates),
        _summary(metrics["aggregates"], metrics.get("aggregates_all")),
        _charts(results, landmarks),
        _worst(results),
        _pictures(results, cases, images),
        _case_table(results),
        _definitions(aggregates),
    ]
    path = out / "report.html"
    write_text(path, page("Registration report", "\n".join(body)))
    log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return path


# --- in words and numbers --------------------------------------------------------------------------------------------


def _head(metrics: dict[str, Any]) -> str:
    cases, failed = metrics["aggregates"]["cases"], metrics["aggregates"]["failed"]
    text = f"{cases} {'case' if cases == 1 else 'cases'}, " + (f"{failed} of them failed" if failed else "none failed")
    return f'<h1>Registration report</h1>\n<p class="dim">{text}. Tables scroll sideways where they are wide.</p>'


def _failures(results: Sequence[dict[str, Any]]) -> str:
    failed = [f"<li><b>{escape(r['case'])}</b>: {escape(str(r['error']))}</li>" for r in results if r.get("error")]
    if not failed:
        return ""
    title = "Failed, and in the figures over all cases only:"
    return f'<div class="failed"><b>{title}</b><ul>{"".join(failed)}</ul></div>'


def _remarks(results: Sequence[dict[str, Any]]) -> str:
    """Of all cases, in their order."""
    lines = [(r["case"], remark) for r in results for remark in r.get("remarks") or []]
    if not lines:
        return ""
    entries = "".join(f"<li><b>{escape(case)}</b>: {escape(str(remark))}</li>" for case, remark in lines)
    return f'<div class="failed"><b>To be looked at:</b><ul>{entries}</ul></div>'


def _cards(aggregates: dict[str, Any]) -> str:
    """The figures that a reader looks for first."""
    cards = []
    for key in ("tre_mm", "dice", "asd_mm", "hd95_mm", "folding_percent"):
        of, quantity = aggregates.get(key) or {}, OF[key]
        if of.get("mean") is not None:
            value = f"{quantity.text(of['mean'])} {quantity.unit}"
            remark = f"± {quantity.text(of['std'])}<br>{_remark(key, aggregates)}"
            cards.append(f'<div class="card">{quantity.name}<b>{value}</b><span class="dim">{remark}</span></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _remark(key: str, aggregates: dict[str, Any]) -> str:
    quantity, of = OF[key], aggregates[key]
    if key == "tre_mm":
        return f"before: {quantity.text(aggregates['tre_initial_mm']['mean'])}"
    if key == "folding_percent":
        return f"largest: {quantity.text(of['max'])}"
    return f"30 % worst: {quantity.text(of['worst30'])}"


def _summary(aggregates: dict[str, Any], over_all: dict[str, Any] | None) -> str:
    """Two tables where cases failed."""
    rows = _summary_rows(aggregates)
    all_rows = _summary_rows(over_all) if over_all and aggregates["failed"] else []
    if not rows and not all_rows:
        return "<h2>Summary</h2><p>No case could be evaluated.</p>"
    columns = ("n", "mean", "std", "median", "min", "max", "30 % worst")
    if not all_rows:
        return f"<h2>Summary</h2>{_table(('over the cases', *columns), rows)}"
    tables = _table(("over all cases", *columns), all_rows)
    if rows:
        tables += f"<p></p>{_table(('over those that did not fail', *columns), rows)}"
    else:
        tables += "<p>No case could be evaluated.</p>"
    return f"<h2>Summary</h2><p>{FAILED_COUNT}</p>{tables}"


def _summary_rows(aggregates: dict[str, Any]) -> list[str]:
    columns = ("mean", "std", "median", "min", "max", "worst30")
    rows = []
    for quantity in QUANTITIES:
        of = aggregates.get(quantity.key) or {}
        if of.get("mean") is not None:
            cells = "".join(f"<td>{quantity.text(of.get(name))}</td>" for name in columns)
            rows.append(f"<tr><td>{quantity.title}</td><td>{of.get('n', '–')}</td>{cells}</tr>")
    return rows


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """Heads and rows are HTML. The table scrolls sideways, by keyboard too, where it is wider than the page."""
    head, body = "".join(f"<th>{name}</th>" for name in heads), "".join(rows)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _case_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per case; a click on a column's head sorts."""
    shown = [q for q in QUANTITIES if any(q.of(result) is not None for result in results)]
    failed = any(result.get("error") for result in results)
    titles = ["case", *(q.title for q in shown), *(["error"] if failed else [])]
    heads = [f'<button type="button">{title}</button>' for title in titles]
    rows = []
    for result in results:
        name, error = escape(result["case"]), escape(str(result.get("error") or ""))
        cells = [f'<td data-value="{name}" title="{name}">{name}</td>', *(_cell(q, result) for q in shown)]
        cells += [f'<td class="error" data-value="{error}">{error}</td>'] if failed else []
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = _table(heads, rows, "sortable")
    return f'<h2>All cases</h2><p class="dim">A click on a column’s head sorts.</p>{table}'


def _cell(quantity: Quantity, result: dict[str, Any]) -> str:
    value = quantity.of(result)
    return f'<td data-value="{"" if value is None else repr(value)}">{quantity.text(value)}</td>'


def _worst(results: Sequence[dict[str, Any]]) -> str:
    """For every quantity that ranks, the worst cases."""
    rows = []
    for quantity in QUANTITIES:
        ranked = _worst_first(results, quantity) if quantity.better else []
        if len({value for _, value in ranked}) > 1:
            worst = ranked[:SHOWN_WORST]
            cells = "".join(f"<td><b>{quantity.text(v)}</b><br>{escape(name)}</td>" for name, v in worst)
            rows.append(f"<tr><td>{quantity.title}</td>{cells}</tr>")
    if not rows:
        return ""
    return f"<h2>Worst cases</h2>{_table(('', 'worst', '2nd', '3rd'), rows)}"


def _worst_first(results: Sequence[dict[str, Any]], quantity: Quantity) -> list[tuple[str, float]]:
    """Cases with their values."""
    values = [(result["case"], quantity.of(result)) for result in results]
    known = [(name, value) for name, value in values if value is not None]
    return sorted(known, key=lambda pair: pair[1], reverse=quantity.better != "higher")


def _definitions(aggregates: dict[str, Any]) -> str:
    shown = [q for q in QUANTITIES if (aggregates.get(q.key) or {}).get("mean") is not None]
    entries = "".join(f"<dt>{q.title}</dt><dd>{q.definition}</dd>" for q in shown)
    general = (
        "<dt>Over the cases</dt><dd>Every case counts once. Standard deviations divide by n. “30 % worst” is the mean "
        "over the 30 % of the cases with the worst values, rounded up; for Dice, the paper’s Dice30. "
        f"{FAILED_COUNT}</dd>"
    )
    return f"<h2>Definitions</h2><dl>{entries}{general}</dl>"


# --- in pictures -----------------------------------------------------------------------------------------------------


def _figure(source: str, caption: str) -> str:
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _charts(results: Sequence[dict[str, Any]], landmarks: pd.DataFrame) -> str:
    found = []
    if len(landmarks):
        after, before = (landmarks[name].to_numpy(float) for name in ("tre_mm", "tre_initial_mm"))
        chart = cumulative_errors({"after": after}, before)
        found.append(_figure(svg(chart), f"Landmarks within a distance, {len(landmarks)} in all"))
    for key in ("dice", "asd_mm", "hd_mm", "hd95_mm"):
        by_label = values_by_label(results, key)
        if by_label:
            chart = box_plots({"after": by_label}, OF[key].title)
            found.append(_figure(svg(chart), f"{OF[key].name} of every case, by label"))
    return f'<h2>Distributions</h2><div class="charts">{"".join(found)}</div>' if found else ""


def pictured(results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The cases to show, and why: the median one and the worst, by landmarks, or by labels where there are none."""
    quantity = next((q for q in (OF["tre_mm"], OF["dice"]) if any(q.of(r) is not None for r in results)), None)
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


def _pictures(results: Sequence[dict[str, Any]], cases: Sequence[Case], images: Path | None) -> str:
    """Coronal slices of the chosen cases."""
    by_name = {case.name: case for case in cases}
    sections = [
        f"<h3>{escape(name)} <span class='dim'>({why})</span></h3>{_panels(by_name[name], images)}"
        for name, why in pictured(results)
        if name in by_name
    ]
    if not sections:
        return ""
    bar = f'<figure class="bar"><img src="{svg(colour_bar())}" alt="colours of the Jacobian determinant"></figure>'
    text = (
        "Coronal slices where the lungs are largest, the patient’s right on the left; images from -1000 to 200 HU, "
        "differences from -500 to 500 HU. The Jacobian determinant is shown inside the lung mask (without one: inside "
        "the fixed labels, and without these everywhere), foldings (0 or less) in magenta."
    )
    return f'<h2>Pictures</h2><p class="dim">{text}</p>{bar}{"".join(sections)}'


def _panels(case: Case, images: Path | None) -> str:
    """The pictures of a case, or the reason why there are none."""
    try:
        truth, field = read_case(case)
        folder = case.ground_truth if images is None else images / case.ground_truth.name
        slices = coronal_slices(field, truth.lungs, read_scan(folder, "fixed"), read_scan(folder, "moving"))
        figures = [_figure(jpeg(picture), title) for title, picture in panels(slices).items()]
    except (CaseError, RuntimeError, OSError, np.linalg.LinAlgError) as error:
        log.warning("%s: no pictures: %s", case.name, error)
        return f'<p class="dim">No pictures: {escape(str(error))}</p>'
    return f'<div class="panels">{"".join(figures)}</div>'


# --- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with code 2 and one sentence when it is wrong."""
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
    """The page of an evaluation that was done before."""
    results = read_metrics(options.output / "metrics.json")["results"]
    metrics = {"results": results, "aggregates": aggregate(results), "aggregates_all": aggregate_all(results)}
    landmarks = read_landmark_errors(options.output / "landmarks.csv")
    write_page(metrics, landmarks, find_cases(options.input, options.ground_truth), options.output, options.images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

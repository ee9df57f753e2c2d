"""cohort.html: one page about a cohort. Outliers come first; each pair is linked to its own report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from resultpages import render
from resultpages.charts import Histogram, histogram, round_up

from .figures import Figures, figures_of, write_tables
from .pictures import pictures_of
from .plan import Plan

MARK = "written by lungreg cohort as cohort.html"
SHOWN = 8
"""Maximum number of outliers with pictures."""
FAR = 3.5
"""An outlier lies more than this many robust standard deviations from the median (Iglewicz and Hoaglin 1993)."""
OF_MAD = 1.4826
"""For normal values, the standard deviation is this factor times the median absolute deviation (MAD)."""


@dataclass(frozen=True)
class Column:
    """A figure of the page's table."""

    title: str
    name: str
    """The column of cohort.csv."""
    digits: int
    factor: float = 1.0
    bad: int = 0
    """1: large values are bad; -1: small values are bad; 0: neither."""
    least: float = 0.1
    """Minimum of the standard deviation: tiny differences are no outliers."""
    drawn: bool = False
    """Whether a histogram of the values is shown."""


COLUMNS = (
    Column("Expected error, mean (mm)", "expected_error.mean_mm", 2, bad=1, least=0.2, drawn=True),
    Column("Expected error, 95 % (mm)", "expected_error.p95_mm", 1, bad=1, least=0.5),
    Column("Motion, mean (mm)", "motion_mm.mean", 1, drawn=True),
    Column("Motion, most (mm)", "motion_mm.max", 1),
    Column("Lungs, fixed (l)", "lungs_litres.fixed", 2, drawn=True),
    Column("Lungs, moving (l)", "lungs_litres.moving", 2),
    Column("Volume, moving / fixed (%)", "volume_ratio", 0, 100.0, drawn=True),
    Column("Lung overlap (Dice)", "quality.after.lung_dice", 3, bad=-1, least=0.01),
    Column("Unlike edges (0 to 1)", "quality.after.ngf_distance", 3, bad=1, least=0.02),
    Column("Outside the moving scan (%)", "quality.after.outside_field_of_view", 1, 100.0, bad=1, least=0.01),
    Column("Folded voxels", "jacobian.folded_voxels", 0, bad=1, least=1.0, drawn=True),
    Column("TRE before (mm)", "tre_initial_mm.mean", 2),
    Column("TRE (mm)", "tre_mm.mean", 2, bad=1, least=0.2, drawn=True),
    Column("Overlap of labels (Dice)", "dice.mean", 3, bad=-1, least=0.01, drawn=True),
    Column("Warnings", "warnings", 0),
    Column("Time (s)", "timings_s.total", 0, drawn=True),
)
CARDS = ("expected_error.mean_mm", "motion_mm.mean", "volume_ratio", "tre_mm.mean", "timings_s.total")


def write_report(figures: Sequence[Figures], out: Path) -> None:
    """Write cohort.html, cohort.csv and cohort.parquet."""
    from ..results.texts import write_text

    for entry in figures:
        litres = entry.get("lungs_litres.fixed"), entry.get("lungs_litres.moving")
        if all(litres):
            entry["volume_ratio"] = litres[1] / litres[0]  # type: ignore[operator]
    write_tables(figures, out)
    write_text(out / "cohort.html", cohort_page(figures, out))


def write_report_of(plan: Plan, log: str) -> None:
    """As `write_report`, called by the workflow."""
    figures = figures_of(plan.rows, plan.out, plan.settings)
    write_report(figures, plan.out)
    failed = [f"{f['subject']}: {f['error']}\n" for f in figures if f["status"] == "failed"]
    Path(log).write_text(f"{len(figures)} pairs, {len(failed)} failed\n{''.join(failed)}", encoding="utf-8")


def cohort_page(figures: Sequence[Figures], out: Path) -> str:
    """The text of the page; pictures come from the pages of the pairs below ``out``."""
    by_status = {s: [f for f in figures if f["status"] == s] for s in ("done", "failed", "not done")}
    measured = [f for f in figures if f.get("timings_s.total") is not None]
    columns = [column for column in COLUMNS if any(_number(f, column) is not None for f in measured)]
    far = outliers(measured, columns)
    ordered = sorted(figures, key=lambda f: (f["status"] != "failed", -_distance(far, f), f["subject"]))
    worst = [f for f in ordered if far.get(f["subject"])][:SHOWN]
    return render(
        "cohort.html.j2",
        scripts=["sort.js"],
        mark=MARK,
        title=f"Cohort of {len(figures)} registrations",
        number=len(figures),
        versions=sorted({str(f["version"]) for f in measured}),
        weights=sorted({str(f["weights_sha256"])[:12] for f in measured if f.get("weights_sha256")}),
        cards=_cards(by_status, measured, columns),
        failed=[(f["subject"], f["step"], f["error"]) for f in by_status["failed"]],
        left=[f["subject"] for f in by_status["not done"]],
        heads=["Pair", "Status", "Unusual by", *(column.title for column in columns)],
        lines=[_line(f, columns, far, out) for f in ordered],
        worst=[
            (f["subject"], _link(out, f["subject"]), far[f["subject"]][0].words, pictures_of(out, f["subject"]))
            for f in worst
        ],
        histograms=[chart for chart in (_chart(c, measured) for c in columns if c.drawn) if chart is not None],
        far=FAR,
    )


# --- outliers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Far:
    """A figure of a pair that lies far from those of the other pairs."""

    distance: float
    """Distance from the median, in robust standard deviations."""
    words: str


def outliers(figures: Sequence[Figures], columns: Sequence[Column] = COLUMNS) -> dict[str, list[Far]]:
    """For each subject, the figures that lie beyond `FAR` on their bad side, the farthest first.

    z = (x - median) / max(1.4826 MAD, least), where MAD is the median of |x - median|.
    """
    found: dict[str, list[Far]] = {}
    for column in (column for column in columns if column.bad):
        known = [(f["subject"], value) for f in figures if (value := _number(f, column)) is not None]
        if not known:
            continue
        values = np.array([value for _, value in known])
        middle = float(np.median(values))
        spread = max(OF_MAD * float(np.median(np.abs(values - middle))), column.least)
        for (subject, value), z in zip(known, (column.bad * (values - middle) / spread).tolist(), strict=True):
            if z > FAR:
                words = f"{column.title}: {_text(value, column)}, median {_text(middle, column)}"
                found.setdefault(subject, []).append(Far(z, words))
    return {subject: sorted(far, key=lambda one: -one.distance) for subject, far in found.items()}


def _distance(far: Mapping[str, list[Far]], entry: Figures) -> float:
    return far[entry["subject"]][0].distance if entry["subject"] in far else 0.0


def _number(entry: Figures, column: Column) -> float | None:
    value = entry.get(column.name)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


# --- parts of the page -----------------------------------------------------------------------------------------------


def _text(value: float | None, column: Column) -> str:
    return "–" if value is None else f"{column.factor * value:.{column.digits}f}"


def _cards(
    by_status: Mapping[str, Sequence[Figures]], measured: Sequence[Figures], columns: Sequence[Column]
) -> list[tuple[str, str, str]]:
    done, failed, left = (len(by_status[status]) for status in ("done", "failed", "not done"))
    warned = sum(bool(f["warnings"]) for f in measured)
    cards = [("Pairs done", str(done), f"of {done + failed + left}")]
    cards.append(("Failed", str(failed), f"{left} not come to" if left else "all were come to"))
    cards.append(("With warnings", str(warned), "of those registered"))
    for column in (column for column in columns if column.name in CARDS):
        low, middle, high = (_text(v, column) for v in np.percentile(_values(column, measured), [5, 50, 95]).tolist())
        cards.append((f"{column.title}, median", middle, f"90 % from {low} to {high}"))
    return cards


def _values(column: Column, figures: Sequence[Figures]) -> Float[np.ndarray, " n"]:
    return np.array([value for f in figures if (value := _number(f, column)) is not None])


def _chart(column: Column, figures: Sequence[Figures]) -> Histogram | None:
    values = column.factor * _values(column, figures)
    if not len(values):
        return None
    bins = int(np.clip(2 * np.sqrt(len(values)), 5, 40))
    title, high = f"{len(values)} pairs", round_up(values.max()) if values.max() > 0 else 1.0
    return histogram(title, column.title, {column.title: values}, 0.0, high, bins=bins, digits=2)


def _line(
    entry: Figures, columns: Sequence[Column], far: Mapping[str, list[Far]], out: Path
) -> tuple[str, str, str, str, list[tuple[str, str]]]:
    """Subject, link, status, the unusual figures, and for each cell its sort key and its text."""
    cells = [(_sorted_by(_number(entry, column)), _text(_number(entry, column), column)) for column in columns]
    unusual = "; ".join(one.words.partition(":")[0] for one in far.get(entry["subject"], []))
    return entry["subject"], _link(out, entry["subject"]), entry["status"], unusual, cells


def _sorted_by(value: float | None) -> str:
    return "" if value is None else repr(value)


def _link(out: Path, subject: str) -> str:
    """A link relative to the page; empty if the pair has no page."""
    return f"pairs/{subject}/report.html" if (out / "pairs" / subject / "report.html").exists() else ""

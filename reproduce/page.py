"""A page in Markdown with tables and pictures beside it, and the tables in CSV."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from evaluation.tables import all_or_nothing, prepare_folder, write_csv, write_text

from .published import Value
from .runs import NAMES

NONE = "–"


@dataclass(frozen=True)
class Row:
    """A figure of the paper and ours, by method."""

    what: str
    published: Value | None
    own: Mapping[str, Value | None]
    unit: str = "mm"
    digits: int = 2
    """After the point."""


@dataclass(frozen=True)
class Part:
    """A table or a picture, and what it says in words. A table is rows, or a table of texts and numbers as it is."""

    name: str
    """Of its file."""
    sentence: str
    rows: Sequence[Row] = ()
    table: pd.DataFrame | None = None
    picture: Figure | None = None


@dataclass(frozen=True)
class Page:
    """Of one table or figure of the paper."""

    published: Mapping[str, Any]
    """Its entry in published.toml."""
    parts: Sequence[Part]
    made_with: Sequence[str]
    """Sentences: what our figures were measured on, and with what."""
    left_out: Sequence[str] = field(default_factory=tuple)
    """Sentences: pairs that were not used or failed, and why."""


def write_page(out: Path, page: Page) -> Path:
    """``out``/README.md with its tables and pictures; its path."""
    prepare_folder(out)
    lines = [f"# {page.published['title']}", "", _one_line(page.published["shows"])]
    lines += ["", f"Published: Hering et al. 2021, {page.published['source']}.", ""]
    for part in page.parts:
        lines += [part.sentence, "", *_content(out, part), ""]
    for title, sentences in (
        ("Why the figures differ", page.published["why"]),
        ("What ours were made with", page.made_with),
        ("Left out", page.left_out),
    ):
        lines += [f"## {title}", "", *(f"- {sentence}" for sentence in sentences), ""] if sentences else []
    path = out / "README.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path


def _content(out: Path, part: Part) -> list[str]:
    """The lines of a part, whose files are written."""
    if part.picture is not None:
        buffer = io.BytesIO()
        part.picture.savefig(buffer, format="png", dpi=110)
        with all_or_nothing(out) as partial:
            (partial / f"{part.name}.png").write_bytes(buffer.getvalue())
        return [f"![{part.sentence}]({part.name}.png)"]
    table = numbers(part.rows) if part.table is None else part.table
    write_csv(out / f"{part.name}.csv", table)
    return in_markdown(texts(part.rows) if part.table is None else table)


def methods_of(rows: Sequence[Row]) -> list[str]:
    """In the order in which they come."""
    return list(dict.fromkeys(method for row in rows for method in row.own))


def numbers(rows: Sequence[Row]) -> pd.DataFrame:
    """A row each: published figure, ours, and ours minus the published one."""

    def values(row: Row) -> dict[str, Any]:
        cells: dict[str, Any] = {"what": row.what, "unit": row.unit, **_pair("published", row.published)}
        for method in methods_of(rows):
            own = row.own.get(method)
            cells |= _pair(method, own) | {f"{method}_minus_published": difference(own, row.published)}
        return cells

    return pd.DataFrame([values(row) for row in rows]).round(6)


def texts(rows: Sequence[Row]) -> pd.DataFrame:
    """The same for people: standard deviations after ±, ours minus the published one in brackets, methods by name."""

    def cells(row: Row) -> dict[str, str]:
        found = {"": f"{row.what} ({row.unit})" if row.unit else row.what, "published": text(row.published, row.digits)}
        for method in methods_of(rows):
            own = row.own.get(method)
            away = difference(own, row.published)
            cell = text(own, row.digits) + ("" if away is None else f" ({signed(away, row.digits)})")
            found[f"{NAMES.get(method, method)} (difference)"] = cell
        return found

    return pd.DataFrame([cells(row) for row in rows])


def in_markdown(table: pd.DataFrame) -> list[str]:
    """Texts as they are, floats with two digits; the first column on the left, all others on the right."""
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    rules = ["---", *["---:"] * (len(table.columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in ([*map(str, table.columns)], rules, *rows)]


def text(value: Value | None, digits: int = 2) -> str:
    """1.14 ± 0.76; – for None."""
    if value is None:
        return NONE
    return f"{value.mean:.{digits}f}".replace("-", "−") + ("" if value.sd is None else f" ± {value.sd:.{digits}f}")


def signed(value: float, digits: int = 2) -> str:
    """+0.03, −0.10."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def difference(own: Value | None, published: Value | None) -> float | None:
    """Ours minus the published one."""
    return None if own is None or published is None else own.mean - published.mean


def _pair(name: str, value: Value | None) -> dict[str, float | None]:
    return {name: None, f"{name}_sd": None} if value is None else {name: value.mean, f"{name}_sd": value.sd}


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return NONE
    return f"{value:.2f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _one_line(words: str) -> str:
    return " ".join(words.split())

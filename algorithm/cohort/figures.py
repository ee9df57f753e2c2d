"""All figures of all pairs in one table: from results.json and the evaluation, and which pairs failed."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import of_the_result
from .done import file_state, key, pair_folder, read_outcome
from .settings import STEPS, Settings
from .steps import concerns
from .table import Row

LEFT_OUT = ("grids", "prealignment", "warnings", "remarks")
"""Entries of results.json that are not figures."""

Figures = dict[str, Any]


def figures_of(rows: Sequence[Row], out: Path, settings: Settings) -> list[Figures]:
    """The figures of each pair, in the order of the table, under names with dots (``quality.after.lung_dice``).

    First come ``subject``; ``status``: done, failed or not done; ``step`` and ``error``, the step that failed and the
    reason; ``warnings``, the number of those of the result, and ``warning``, all of these in one text.
    """
    state = functools.cache(file_state)
    return [_figures(row, out, settings, state) for row in rows]


def _figures(row: Row, out: Path, settings: Settings, state: Callable[[Path], Any]) -> Figures:
    status, step, error, measured = _status(row, out, settings, state)
    results = {} if step in ("check", "register") or status == "not done" else _results(out, row.subject)
    said = of_the_result([str(sentence) for sentence in results.get("warnings", [])])
    head: Figures = {"subject": row.subject, "status": status, "step": step, "error": error}
    head |= {"warnings": len(said) if results else None, "warning": " ".join(said)}
    return head | dict(_flat(results)) | dict(_flat(measured))


def _status(
    row: Row, out: Path, settings: Settings, state: Callable[[Path], Any]
) -> tuple[str, str, str, Mapping[str, Any]]:
    """Status, the step that failed, its message, and the measurements of the evaluation."""
    measured: dict[str, Any] = {}
    for step in STEPS:
        if not concerns(step, row, settings):
            continue
        outcome = read_outcome(out, step, row.subject)
        if outcome is None or outcome.key != key(row, step, settings, state):
            return "not done", "", "", {}
        if outcome.error is not None:
            return "failed", step, outcome.error, {}
        measured |= outcome.figures or {}
    return "done", "", "", measured


def _results(out: Path, subject: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads((pair_folder(out, subject) / "results.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.") if name not in LEFT_OUT else ()
        elif name not in LEFT_OUT and not isinstance(value, list):
            yield f"{before}{name}", value


def write_tables(figures: Sequence[Figures], out: Path) -> None:
    """Write cohort.csv and cohort.parquet, each completely or not at all."""
    import pandas as pd

    from ..files.writing import atomically

    table = pd.DataFrame(list(figures)).convert_dtypes()  # counts stay integers where some are missing
    with atomically(out / "cohort.csv") as file:
        table.to_csv(file, index=False)
    with atomically(out / "cohort.parquet") as file:
        table.to_parquet(file, index=False, engine="pyarrow")

"""Writes the results: JSON and CSV, each all or nothing."""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.errors import InputError


def cases_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per case; ``tre_mm_mean``, ``dice_1``, ... stand for what is nested in metrics.json."""
    rows = [dict(leaf for name, value in result.items() for leaf in _leaves(name, value)) for result in results]
    leaves = [(name, leaf) for result in results for name in result for leaf, _ in _leaves(name, result[name])]
    names = list(dict.fromkeys(name for name, _ in leaves))  # a failed case has no labels, but its metrics' places
    columns = dict.fromkeys(leaf for _, leaf in sorted(leaves, key=lambda pair: names.index(pair[0])))
    return pd.DataFrame(rows, columns=list(columns))


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    return [(f"{name}_{key}", of) for key, of in value.items()] if isinstance(value, dict) else [(name, value)]


def write_json(path: Path, content: Any) -> None:
    """A JSON file; ValueError for NaN and ±inf, which JSON does not have."""
    _write(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """A CSV file with a header line; what is missing is empty."""
    _write(path, table.to_csv(index=False))


def _write(path: Path, text: str) -> None:
    """Writes under a hidden name and renames: nobody sees half a file."""
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def prepare_folder(folder: Path) -> None:
    """Makes the folder for the results, without those of an earlier run. InputError when it cannot be written."""
    probe = folder / f".{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for name in ("metrics.json", "cases.csv", "landmarks.csv", "report.html"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error

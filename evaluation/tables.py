"""Tables and other results in files: reads CSV with all checks; writes each file completely or not at all."""

import csv
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from .errors import CaseError, InputError, short

RESULTS = ("metrics.json", "cases.csv", "landmarks.csv", "report.html")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_columns(path: Path, names: Sequence[str]) -> list[list[str]]:
    """The cells of some columns of a CSV file with a header line, without blanks around them.

    CaseError if a column is missing or occurs twice, or if a line has more non-empty cells than the header, because
    then the columns of its cells are unknown.
    """
    name = short(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            cells = [[cell.strip() for cell in line] for line in csv.reader(file, skipinitialspace=True)]
        head, *lines = [line for line in cells if line not in ([], [""])]
    except (OSError, ValueError, csv.Error) as error:
        raise CaseError(f"{name}: cannot be read, expected a CSV file with the header {','.join(names)}") from error
    if any(head.count(column) != 1 for column in names):
        raise CaseError(f"{name}: has the columns {head}, expected {', '.join(names)}")
    long = next((line for line in lines if any(line[len(head) :])), None)
    if long:
        raise CaseError(f"{name}: has the line {','.join(long)}, expected {len(head)} cells as in its header")
    return [[(line + [""] * len(head))[head.index(column)] for line in lines] for column in names]


def numbers(path: Path, cells: Sequence[str]) -> Float[np.ndarray, " n"]:
    """The cells as numbers; CaseError with the name of the file unless all are finite numbers."""
    try:
        values = np.array([float(cell or "nan") for cell in cells], float)
    except ValueError as error:
        raise CaseError(f"{short(path)}: holds something that is no number ({error})") from error
    if not np.isfinite(values).all():
        raise CaseError(f"{short(path)}: holds empty cells or infinite ones, expected finite numbers")
    return values


def read_landmark_errors(path: Path) -> pd.DataFrame:
    """The case and the errors after and before registration (mm) from landmarks.csv. Empty without such a file;
    CaseError if it has other content."""
    columns = ("case", "tre_mm", "tre_initial_mm")
    if not path.exists():
        return pd.DataFrame({column: [] for column in columns})
    cases, *errors_mm = read_columns(path, columns)
    return pd.DataFrame(dict(zip(columns, (cases, *(numbers(path, cells) for cells in errors_mm)), strict=True)))


# --- writing ---------------------------------------------------------------------------------------------------------


def cases_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per case; ``tre_mm_mean``, ``dice_1``, ... are the names of nested values of metrics.json."""
    rows = [dict(leaf for name, value in result.items() for leaf in _leaves(name, value)) for result in results]
    leaves = [(name, leaf) for result in results for name in result for leaf, _ in _leaves(name, result[name])]
    names = list(dict.fromkeys(name for name, _ in leaves))  # a failed case has no labels, but all metrics
    columns = dict.fromkeys(leaf for _, leaf in sorted(leaves, key=lambda pair: names.index(pair[0])))
    return pd.DataFrame(rows, columns=list(columns))


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):  # remarks
        return [(name, "; ".join(map(str, value)) or None)]
    return [(f"{name}_{key}", of) for key, of in value.items()] if isinstance(value, dict) else [(name, value)]


def write_json(path: Path, content: Any) -> None:
    """A JSON file; ValueError for NaN and ±inf, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """A CSV file with a header line; missing values are empty."""
    write_text(path, table.to_csv(index=False))


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8; characters that UTF-8 cannot hold are escaped."""
    with all_or_nothing(path.parent) as partial, (partial / path.name).open("xb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A hidden folder whose files are moved into ``folder`` at the end, so that no incomplete file appears there, and
    none after an error."""
    partial = folder / f".{uuid.uuid4().hex}.part"
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.iterdir(), key=lambda p: p.suffix == ".mhd"):  # after the voxels that it names
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial)


def prepare_folder(folder: Path, without: Sequence[str] = ()) -> None:
    """Create the output folder and remove some files of an earlier run. InputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with all_or_nothing(folder):
            pass
        for name in without:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}), expected a writable folder") from error


def prepare_file(path: Path) -> None:
    """Create the folder for a file. InputError if it cannot be written, or if the file is a folder."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected the name of a file")
    prepare_folder(path.parent)

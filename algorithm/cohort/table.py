"""The table of a cohort: a CSV file with a row for each pair.

subject                          the name of the pair, and of the folder of its results
fixed, moving                    the scans, files or folders of DICOM series
fixed_mask, moving_mask          lung masks
fixed_lobes, moving_lobes        lobes from another program, instead of masks
fixed_landmarks, moving_landmarks    points; where both are given, the landmark errors are measured
fixed_labels, moving_labels      label maps; where both are given, their overlap is measured

All but the first three are optional. Landmarks and labels are mapped to the other scan; there may be more of them with
a name of their own, as ``moving_labels_vessels``. Paths are relative to the table. Other columns are ignored.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

NEEDED = ("subject", "fixed", "moving")
SCANS = ("fixed", "moving")
_FILE = re.compile(r"(fixed|moving)(_(mask|lobes|(landmarks|labels)(_[A-Za-z0-9]+)*))?")
SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_TOLD = 50
"""Maximum number of faults that are listed one by one."""


@dataclass(frozen=True)
class Row:
    """A row of the table: one pair."""

    line: int
    """Line number in the file. The header is line 1, as in spreadsheets."""
    subject: str
    cells: Mapping[str, str]
    """The text of the cells of the columns that name files, by column, without empty cells."""
    folder: Path
    """The folder of the table."""

    def path(self, column: str) -> Path | None:
        """The file in that column; None if the cell is empty."""
        cell = self.cells.get(column)
        return None if cell is None else self.folder / cell

    def columns(self, *kinds: str) -> list[str]:
        """The row's columns that begin with ``fixed_<kind>`` or ``moving_<kind>``."""
        starts = tuple(f"{scan}_{kind}" for scan in SCANS for kind in kinds)
        return [column for column in self.cells if column.startswith(starts)]

    def has_truth(self) -> bool:
        """Whether landmarks or labels are given for both scans, so that errors can be measured."""
        return any(all(f"{scan}_{kind}" in self.cells for scan in SCANS) for kind in ("landmarks", "labels"))


def read_table(path: Path) -> list[Row]:
    """The rows. `TableError` if the table is faulty; its ``faults`` has one sentence per fault."""
    rows, faults = checked_table(path)
    if faults:
        raise TableError(path, faults)
    return rows


class TableError(InputError):
    """All faults of a table."""

    def __init__(self, path: Path, faults: Sequence[str]) -> None:
        self.faults = faults
        more = f" (and {len(faults) - 1} more faults, all listed above)" if len(faults) > 1 else ""
        super().__init__(f"{path}: {faults[0]}{more}")


def checked_table(path: Path) -> tuple[list[Row], list[str]]:
    """The rows, and a sentence for every fault; InputError if the table cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = list(csv.reader(text.splitlines(), delimiter=_delimiter(text), strict=True))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a table in CSV") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no table in CSV ({error}), expected UTF-8 with a header line") from error
    head = [cell.strip() for cell in lines[0]] if lines else []
    faults = _faults_of_head(head)
    if faults:
        return [], faults
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        cells = dict(zip(head, (cell.strip() for cell in line), strict=False))
        found = _faults_of_row(cells, len(line), len(head))
        faults += [f"row {number}: {sentence}" for sentence in found]
        if not found:
            files = {name: cell for name, cell in cells.items() if cell and _FILE.fullmatch(name)}
            rows.append(Row(number, cells["subject"], files, path.absolute().parent))
    faults += _repeated(rows)
    if not rows and not faults:
        faults.append("has no rows, expected one for each pair")
    return rows, faults


def _delimiter(text: str) -> str:
    """The delimiter: a comma, or the one that spreadsheets in other languages write."""
    head = text.partition("\n")[0]
    return next((mark for mark in (",", ";", "\t") if mark in head), ",")


def _faults_of_head(head: list[str]) -> list[str]:
    faults = [f"the column {name} is missing, expected {', '.join(NEEDED)}" for name in NEEDED if name not in head]
    faults += [f"there are several columns {name}" for name in sorted({n for n in head if n and head.count(n) > 1})]
    odd = [name for name in head if name.startswith(SCANS) and not _FILE.fullmatch(name)]
    return faults + [
        f"the column {name} is not known, expected fixed_ or moving_ with mask, lobes, landmarks or labels"
        for name in odd
    ]


def _faults_of_row(cells: Mapping[str, str], given: int, expected: int) -> list[str]:
    if given != expected:
        return [f"has {given} cells, expected {expected} as in the header line"]
    faults = [f"{name} is empty" for name in NEEDED if not cells[name]]
    if cells["subject"] and not SUBJECT.fullmatch(cells["subject"]):
        faults.append(
            f"the subject {cells['subject']!a} is no name for a folder, expected at most 100 letters, digits, '.', '_' "
            "or '-', the first a letter or digit"
        )
    faults += [
        f"{scan}_mask and {scan}_lobes are both given, expected one of them"
        for scan in SCANS
        if cells.get(f"{scan}_mask") and cells.get(f"{scan}_lobes")
    ]
    if cells["fixed"] and cells["fixed"] == cells["moving"]:
        faults.append("fixed and moving are the same scan, expected two")
    return faults


def _repeated(rows: Sequence[Row]) -> list[str]:
    """Sentences on repeated subjects. They must also differ on file systems that ignore case."""
    first: dict[str, Row] = {}
    faults = []
    for row in rows:
        other = first.setdefault(row.subject.lower(), row)
        if other is not row:
            faults.append(f"row {row.line}: the subject {row.subject} is also that of row {other.line}")
    return faults


def missing_files(rows: Sequence[Row]) -> list[str]:
    """A sentence for every file that does not exist."""
    return [
        f"row {row.line}, {row.subject}: {column} is not there: {row.path(column)}"
        for row in rows
        for column in row.cells
        if not (row.folder / row.cells[column]).exists()
    ]

"""Makes the table of a cohort from a BIDS-like folder: files named as ``sub-01_ses-2_ct.nii.gz``."""

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagefiles import ENDINGS

from ..errors import InputError
from ..files.pointfiles import ENDINGS as POINTS

SUFFIXES = {"ct": "", "mask": "_mask", "dseg": "_labels", "landmarks": "_landmarks"}
"""For each last part of a file name, the ending of the table column for such files."""


@dataclass(frozen=True)
class Named:
    """A file, and the parts of its name."""

    path: Path
    entities: Mapping[str, str]
    """For example ``sub``: ``01``, ``ses``: ``2``."""
    suffix: str


def write_bids_table(folder: Path, table: Path, fixed: str, moving: str) -> str:
    """Write the table of the pairs below ``folder``; returns a sentence with their number and the subjects left out.

    ``fixed`` and ``moving`` are the parts of the names in which the two scans of a pair differ, for example ``ses-2``
    and ``ses-1``, or ``acq-insp`` and ``acq-exp``. All other parts must agree; they become the name of the pair. Masks
    (``_mask``), label maps (``_dseg``) and landmarks (``_landmarks``) with the same parts are added to the row.
    InputError if no pair is found, if two files have one name, or if ``table`` exists.
    """
    if table.exists():
        raise InputError(f"{table}: is there already, expected a new name")
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder, expected one with sub-* in it")
    keys = {part.partition("-")[0] for part in (fixed, moving)}
    if len(keys) != 1 or not all(part.partition("-")[2] for part in (fixed, moving)) or fixed == moving:
        raise InputError(f"--fixed {fixed} --moving {moving}: expected two values of one part, as ses-2 and ses-1")
    pairs = _pairs(folder, {"fixed": fixed, "moving": moving}, table.absolute().parent)
    whole = {name: cells for name, cells in pairs.items() if {"fixed", "moving"} <= cells.keys()}
    if not whole:
        raise InputError(f"{folder}: has no *_{fixed}*_ct and *_{moving}*_ct of one subject, expected images so named")
    columns = sorted({column for cells in whole.values() for column in cells}, key=lambda c: (c.count("_"), c))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["subject", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"subject": name, **cells} for name, cells in sorted(whole.items()))
    with table.open("x", encoding="utf-8") as file:
        file.write(text.getvalue())
    left = sorted(pairs.keys() - whole.keys())
    others = f"; without a second scan: {', '.join(left[:8])}{' and more' if len(left) > 8 else ''}" if left else ""
    return f"{table}: {len(whole)} pairs{others}"


def _pairs(folder: Path, parts: Mapping[str, str], beside: Path) -> dict[str, dict[str, str]]:
    """The table cells of each pair, by the name of the pair."""
    pairs: dict[str, dict[str, str]] = {}
    for file in filter(None, map(_named, sorted(folder.rglob("sub-*")))):
        for scan, part in parts.items():
            key, _, value = part.partition("-")
            if file.entities.get(key) != value:
                continue
            name = "_".join(f"{k}-{v}" for k, v in file.entities.items() if k != key)
            column = scan + SUFFIXES[file.suffix]
            cells = pairs.setdefault(name, {})
            if column in cells:
                raise InputError(f"{file.path}: is a second {column} of {name}, beside {cells[column]}; expected one")
            cells[column] = os.path.relpath(file.path, beside)
    return pairs


def _named(path: Path) -> Named | None:
    """The parts of a file's name; None if the name does not have this form."""
    kind = next((end for end in (*ENDINGS, *POINTS) if path.name.endswith(end)), None)
    if kind is None or not path.is_file():
        return None
    *parts, suffix = path.name[: -len(kind)].split("_")
    if suffix not in SUFFIXES or not all("-" in part for part in parts):
        return None
    return Named(path, dict(part.split("-", 1) for part in parts), suffix)

"""What counts as done: the hash of everything that a step's result follows from, kept beside the outcome of the step.

Of a file the hash takes the path as the table has it, size and time of change, not the content: that of 10,000 pairs
would be terabytes to read before anything runs. A copy that keeps times (`cp -a`, `rsync -a`), or the whole study in
another place, stays done; a touched file is run again; only a file that was changed within its size and was given its
old time back passes unnoticed. Of weights it is the content, SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .settings import Settings
from .table import SCANS, Row

VERSION = 1
"""Of what the hashes are made of."""
APPLIED = "applied"
"""The folder of landmarks and labels that were carried to the other scan, in that of a pair."""
State = Literal["done", "failed", "again"]
"""An outcome's. failed: for what is wrong with the pair's files, and that stays until these change. again: for the
machine's sake (memory, disk, a process that was killed); then the next call tries again."""
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Outcome:
    """How a step ended for a pair."""

    key: str
    state: State
    error: str | None = None
    """Why it failed, in a sentence."""
    figures: Mapping[str, Any] | None = None
    """What a step found out that has no file of its own."""


def files_of(row: Row, step: str) -> list[str]:
    """The columns of a row that a step's result follows from."""
    scans = [*SCANS, *row.columns("mask", "lobes")]
    return scans if step in ("check", "register", "function") else [*scans, *row.columns("landmarks", "labels")]


def file_state(path: Path) -> Any:
    """Size and time of change; of a folder those of each file in it, by name; None for what is not there."""
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                return sorted((entry.name, *_numbers(entry.stat())) for entry in entries if entry.is_file())
        return _numbers(path.stat())
    except OSError:
        return None


def _numbers(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def key(row: Row, step: str, settings: Settings, state: Callable[[Path], Any] = file_state) -> str:
    """The hash of what the step's result follows from; the checks follow from the files alone."""
    files = {column: (row.cells[column], state(row.folder / row.cells[column])) for column in files_of(row, step)}
    options = {} if step == "check" else settings.results_follow_from()
    text = json.dumps([VERSION, step, row.subject, files, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- where results and outcomes lie ----------------------------------------------------------------------------------


def pair_folder(out: Path, subject: str) -> Path:
    """Of a pair's results."""
    return out / "pairs" / subject


def proof(out: Path, step: str, subject: str) -> Path | None:
    """What is there when the step is done; None for steps that leave an outcome only. results.json is written last."""
    names = {"register": "results.json", "apply": APPLIED}
    return pair_folder(out, subject) / names[step] if step in names else None


def outcome_file(out: Path, step: str, state: State, subject: str) -> Path:
    """In a folder for each state, so that a listing tells it of all pairs."""
    return out / "steps" / step / state / f"{subject}.json"


def read_outcome(out: Path, step: str, subject: str) -> Outcome | None:
    """None where there is none yet, or a broken one."""
    for state in STATES:
        try:
            return Outcome(**json.loads(outcome_file(out, step, state, subject).read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    return None


def write_outcome(out: Path, step: str, subject: str, outcome: Outcome) -> None:
    """All or nothing, in place of an earlier one."""
    from ..results.texts import write_results  # here: it brings torch, and who only reads can do without

    write_results(outcome_file(out, step, outcome.state, subject), asdict(outcome))
    withdraw_outcome(out, step, subject, but=outcome.state)


def withdraw_outcome(out: Path, step: str, subject: str, but: State | None = None) -> None:
    """Before a step begins: what it had come to no longer holds."""
    for state in STATES:
        if state != but:
            outcome_file(out, step, state, subject).unlink(missing_ok=True)


def settled(out: Path, step: str, row: Row, settings: Settings) -> Outcome | None:
    """The outcome that stands: of these files and options, final, with its result there. None: the step is to do."""
    found = read_outcome(out, step, row.subject)
    if found is None or found.state == "again" or found.key != key(row, step, settings):
        return None
    result = proof(out, step, row.subject)
    return None if found.state == "done" and result is not None and not result.exists() else found

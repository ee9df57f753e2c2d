"""Decides what is done: stores the outcome of each step with a hash of everything that its result depends on.

For a file, the hash uses the path in the table, size and modification time, not the content: reading the content of
10,000 pairs would mean terabytes before anything runs. A copy that keeps times (`cp -a`, `rsync -a`), or a moved study,
stays done; a file with a new time is run again. Only a file that was changed at the same size and got its old time back
is not noticed. For weights, the hash uses the content, SHA-256.
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
"""Version of the content of the hashes."""
APPLIED = "applied"
"""The folder, inside that of a pair, for landmarks and labels mapped to the other scan."""
State = Literal["done", "failed", "again"]
"""State of an outcome. failed: the pair's files are faulty; the state stays until they change. again: the machine
failed (memory, disk, a killed process); the next call tries again."""
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Outcome:
    """How a step ended for a pair."""

    key: str
    state: State
    error: str | None = None
    """The reason for the failure, in a sentence."""
    figures: Mapping[str, Any] | None = None
    """Results of a step that are stored in no other file."""


def files_of(row: Row, step: str) -> list[str]:
    """The columns of a row that the result of a step depends on."""
    scans = [*SCANS, *row.columns("mask", "lobes")]
    return scans if step in ("check", "register", "function") else [*scans, *row.columns("landmarks", "labels")]


def file_state(path: Path) -> Any:
    """Size and modification time; for a folder those of each file in it, by name; None if it does not exist."""
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
    """The hash of everything that the step's result depends on; the checks depend on the files only."""
    files = {column: (row.cells[column], state(row.folder / row.cells[column])) for column in files_of(row, step)}
    options = {} if step == "check" else settings.results_follow_from()
    text = json.dumps([VERSION, step, row.subject, files, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- where results and outcomes lie ----------------------------------------------------------------------------------


def pair_folder(out: Path, subject: str) -> Path:
    """The folder of a pair's results."""
    return out / "pairs" / subject


def proof(out: Path, step: str, subject: str) -> Path | None:
    """The path that exists when the step is done; None for steps that leave only an outcome. results.json is written
    last."""
    names = {"register": "results.json", "apply": APPLIED}
    return pair_folder(out, subject) / names[step] if step in names else None


def outcome_file(out: Path, step: str, state: State, subject: str) -> Path:
    """The file of an outcome. Each state has its own folder, so that one listing gives the state of all pairs."""
    return out / "steps" / step / state / f"{subject}.json"


def read_outcome(out: Path, step: str, subject: str) -> Outcome | None:
    """The outcome of a step; None if there is none yet, or only a damaged one."""
    for state in STATES:
        try:
            return Outcome(**json.loads(outcome_file(out, step, state, subject).read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    return None


def write_outcome(out: Path, step: str, subject: str, outcome: Outcome) -> None:
    """Write the outcome completely or not at all, in place of an earlier one."""
    from ..results.texts import write_results  # here: it imports torch, which readers do not need

    write_results(outcome_file(out, step, outcome.state, subject), asdict(outcome))
    withdraw_outcome(out, step, subject, but=outcome.state)


def withdraw_outcome(out: Path, step: str, subject: str, but: State | None = None) -> None:
    """Remove the outcome of a step before it begins, because it is no longer valid."""
    for state in STATES:
        if state != but:
            outcome_file(out, step, state, subject).unlink(missing_ok=True)


def settled(out: Path, step: str, row: Row, settings: Settings) -> Outcome | None:
    """The valid outcome: it is final, belongs to these files and options, and its result exists. None: the step must
    run."""
    found = read_outcome(out, step, row.subject)
    if found is None or found.state == "again" or found.key != key(row, step, settings):
        return None
    result = proof(out, step, row.subject)
    return None if found.state == "done" and result is not None and not result.exists() else found

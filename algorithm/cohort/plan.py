"""For the Snakefile: which pairs go into which job, and what the result of a job depends on.

A job takes a chunk of pairs, so that the model is loaded only once for them. Snakemake also plans some thousands of
jobs in seconds, but tens of thousands in minutes. The chunk of a pair depends only on its name: adding, moving or
removing a row changes no other chunk. The number of chunks is a power of two: when a table grows too large for them,
each chunk is split in two.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .done import STATES, State, file_state, key, outcome_file, proof
from .settings import STEPS, Settings
from .table import Row, read_table

AT_MOST = 20
"""Maximum number of pairs in a job. With more pairs, the start of a worker takes only a hundredth of its time or
less."""
TURNS = 4
"""Minimum number of jobs per worker, if there are enough pairs, so that all workers end at about the same time."""


def chunks_for(pairs: int, workers: int, size: int | None = None) -> int:
    """Number of chunks: the power of two nearest to ``pairs / size``. If ``size`` is not given, `AT_MOST` and `TURNS`
    determine it."""
    wanted = max(1, round(pairs / (size or max(1, min(AT_MOST, pairs // (TURNS * max(1, workers)))))))
    below = 1 << (wanted.bit_length() - 1)
    return below if wanted * wanted <= below * 2 * below else 2 * below


def chunk_of(subject: str, chunks: int) -> str:
    """The name of a pair's chunk, for example 17of512."""
    number = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") % chunks
    return f"{number}of{chunks}"


def rows_of(rows: Sequence[Row], chunk: str) -> list[Row]:
    """The pairs of a chunk, in the order of the table."""
    chunks = int(chunk.partition("of")[2])
    return [row for row in rows if chunk_of(row.subject, chunks) == chunk]


@dataclass(frozen=True)
class Plan:
    """A table and its settings, in the form that the Snakefile needs."""

    settings: Settings
    rows: Sequence[Row]
    out: Path = field(default_factory=Path)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Plan":
        """The plan from Snakemake's configuration, in the folder of the cohort."""
        settings = Settings.from_dict(config)
        return cls(settings, read_table(Path(settings.table)))

    @cached_property
    def chunks(self) -> dict[str, list[Row]]:
        """The pairs of each chunk that is not empty."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(chunk_of(row.subject, self.settings.chunks), []).append(row)
        return found

    def wanted(self) -> list[str]:
        """The files of the last jobs, on which the report depends."""
        return [
            f"chunks/{step}/{chunk}.json"
            for chunk, rows in self.chunks.items()
            for step in STEPS
            if self._is_last(step, rows)
        ]

    def _is_last(self, step: str, rows: Sequence[Row]) -> bool:
        wanted = {
            "register": True,
            "apply": any(row.columns("landmarks", "labels") for row in rows),
            "function": self.settings.function,
            "evaluate": any(row.has_truth() for row in rows),
        }
        return wanted.get(step, False)

    def follows_from(self, step: str, chunk: str) -> str:
        """A parameter of the job that changes when the job has work: a row, a file or an option changed, a pair must be
        tried again, or a result was removed."""
        states = [
            (row.subject, key(row, step, self.settings, self._file_state), self._to_do(step, row.subject))
            for row in sorted(self.chunks.get(chunk, []), key=lambda row: row.subject)
        ]
        return hashlib.sha256(repr(states).encode()).hexdigest()

    def minutes(self, chunk: str) -> int:
        """Minutes that a job may take."""
        return self.settings.minutes * (1 + len(self.chunks.get(chunk, [])))

    def _to_do(self, step: str, subject: str) -> float | str:
        """A value that changes when a step must run again; empty for final outcomes and for steps that never ran."""
        outcomes = self._outcomes[step]
        if subject in outcomes["again"]:
            with suppress(OSError):  # it is running now
                return outcome_file(self.out, step, "again", subject).stat().st_mtime
        result = proof(self.out, step, subject) if subject in outcomes["done"] else None
        return "gone" if result is not None and not result.exists() else ""

    @cached_property
    def _outcomes(self) -> dict[str, dict[State, set[str]]]:
        """The subjects that have outcomes, by step and state; listed once for all pairs."""
        return {step: {state: subjects_with(self.out, step, state) for state in STATES} for step in STEPS}

    @cached_property
    def _file_state(self) -> Callable[[Path], Any]:
        """`file_state` with a cache, so that each file is looked up once."""
        return functools.cache(file_state)


def subjects_with(out: Path, step: str, state: State) -> set[str]:
    """The pairs with this state of a step."""
    folder = outcome_file(out, step, state, "any").parent
    return {path.name.removesuffix(".json") for path in folder.iterdir()} if folder.is_dir() else set()

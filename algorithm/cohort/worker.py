"""One job of a cohort: a step for the pairs of a chunk; ``lungreg cohort-step``, as the workflow calls it.

A pair with a valid outcome is skipped. So nothing is computed twice after a stopped job, or when a new pair joins the
chunk. An error of a pair becomes its outcome, and the other pairs continue. A full disk ends the job, because nothing
more could be written.
"""

import errno
import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, Stopped, stopped_by_signals
from ..serve import fault_sentence, forget_peak_memory
from .done import Outcome, key, read_outcome, settled, withdraw_outcome, write_outcome
from .plan import rows_of
from .settings import Settings, read_settings
from .steps import ONE_BY_ONE, Figures, concerns, failed_before, registered
from .table import Row, read_table

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ATTEMPTS = 3
"""Number of attempts that the workflow gives a job. At the last one, pairs whose process was killed before are left
out."""
KILLED = "its process was killed, probably for want of memory (or of time, on a cluster)"

log = logging.getLogger(__name__)


def run_step(step: str, out: Path, chunk: str, done: Path, attempt: int = 1) -> int:
    """Run the step for the pairs of the chunk and list their states in the file ``done``; returns the exit code.

    The exit code is 1 if a pair must be tried again (for example with more memory) and this is not the last attempt.
    InputError if the folder is not that of a cohort; OSError if the disk is full.
    """
    settings = read_settings(out)
    rows = [row for row in rows_of(read_table(Path(settings.table)), chunk) if concerns(step, row, settings)]
    left = [row for row in rows if settled(out, step, row, settings) is None]
    log.info("%s of chunk %s: %d pairs, %d of them to do", step, chunk, len(rows), len(left))
    if left:
        with stopped_by_signals():
            _Job(step, out, settings).run(left, attempt)
    outcomes = {row.subject: read_outcome(out, step, row.subject) for row in rows}
    states = {subject: outcome.state for subject, outcome in outcomes.items() if outcome is not None}
    again = [row for row in left if states.get(row.subject) == "again" and failed_before(out, step, row) is None]
    if again and attempt < ATTEMPTS:
        return 1
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(states, indent=2) + "\n")
    return 0


class _Job:
    """Runs a step for pair after pair and writes their outcomes."""

    def __init__(self, step: str, out: Path, settings: Settings) -> None:
        self.step, self.out, self.settings = step, out, settings
        self.keys: dict[str, str] = {}
        """Hashes of the pairs that have begun and not ended."""

    def run(self, rows: Sequence[Row], attempt: int) -> None:
        """Run the pairs. Pairs suspected of killing their process come last; pairs that failed in an earlier step are
        left out."""
        able = [row for row in self._suspects_last(rows, attempt) if not self._failed_before(row)]
        try:
            if self.step == "register":
                self._register(able)
                return
            for row in able:
                self._begin(row)
                self._end(row, *self._tried(row))
        except Stopped:
            for subject in self.keys:  # they were stopped, not killed
                withdraw_outcome(self.out, self.step, subject)
            raise

    def _register(self, rows: Sequence[Row]) -> None:
        for row, error in registered(rows, self.out, self.settings, self._begin) if rows else ():
            self._end(row, error)

    def _failed_before(self, row: Row) -> bool:
        """Whether an earlier step failed; its outcome then becomes that of this step."""
        before = failed_before(self.out, self.step, row)
        if before is not None:
            self._write(row, Outcome(self._key(row), before.state, before.error))
        return before is not None

    def _suspects_last(self, rows: Sequence[Row], attempt: int) -> list[Row]:
        """Put pairs whose process was killed last, so that they do not stop others; at the last attempt they are left
        out."""
        found = {row.subject: read_outcome(self.out, self.step, row.subject) for row in rows}
        killed = [row for row in rows if (outcome := found[row.subject]) is not None and outcome.error == KILLED]
        return [row for row in rows if row not in killed] + (killed if attempt < ATTEMPTS else [])

    def _key(self, row: Row) -> str:
        return key(row, self.step, self.settings)

    def _begin(self, row: Row) -> None:
        """Write an outcome that remains if the process is killed."""
        forget_peak_memory()
        self.keys[row.subject] = self._key(row)
        self._write(row, Outcome(self.keys[row.subject], "again", KILLED))

    def _tried(self, row: Row) -> tuple[Exception | None, Figures]:
        try:
            return None, ONE_BY_ONE[self.step](row, self.out)
        except Exception as error:
            return error, None

    def _end(self, row: Row, error: BaseException | None, figures: Figures = None) -> None:
        of = self.keys.pop(row.subject)
        if error is None:
            outcome = Outcome(of, "done", None, figures)
        elif isinstance(error, InputError):
            outcome = Outcome(of, "failed", str(error))
        else:
            outcome = Outcome(of, "again", " ".join(fault_sentence(error).split()))
        self._write(row, outcome)
        log.info("%s: %s%s", row.subject, outcome.state, f": {outcome.error}" if outcome.error else "")
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise error
        gc.collect()  # images in reference cycles would add to the memory of the next pair

    def _write(self, row: Row, outcome: Outcome) -> None:
        write_outcome(self.out, self.step, row.subject, outcome)

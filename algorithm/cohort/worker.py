"""One job of a cohort: a step for the pairs of a chunk; ``lungreg cohort-step``, as the workflow calls it.

A pair whose outcome stands is passed over, so a job that was stopped, or that shares its chunk with a pair that is new,
computes nothing twice. What goes wrong with a pair becomes its outcome, and the others go on. A full disk ends the job:
nothing more could be written.
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
"""That the workflow gives a job: at the last one, a pair that took its process with it before is left out."""
KILLED = "its process was killed, probably for want of memory (or of time, on a cluster)"

log = logging.getLogger(__name__)


def run_step(step: str, out: Path, chunk: str, done: Path, attempt: int = 1) -> int:
    """Runs the step for the pairs of the chunk, and lists their states in the file ``done``; the exit code.

    1 where some pair is to be tried again, with more memory say, and this is not the last attempt. InputError where the
    folder is no cohort's; OSError where the disk is full.
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
    """A step for pair after pair, with their outcomes."""

    def __init__(self, step: str, out: Path, settings: Settings) -> None:
        self.step, self.out, self.settings = step, out, settings
        self.keys: dict[str, str] = {}
        """Of the pairs that have begun and not ended."""

    def run(self, rows: Sequence[Row], attempt: int) -> None:
        """The pairs, those first that are not suspected; none that an earlier step failed for."""
        able = [row for row in self._suspects_last(rows, attempt) if not self._failed_before(row)]
        try:
            if self.step == "register":
                self._register(able)
                return
            for row in able:
                self._begin(row)
                self._end(row, *self._tried(row))
        except Stopped:
            for subject in self.keys:  # nobody killed them
                withdraw_outcome(self.out, self.step, subject)
            raise

    def _register(self, rows: Sequence[Row]) -> None:
        for row, error in registered(rows, self.out, self.settings, self._begin) if rows else ():
            self._end(row, error)

    def _failed_before(self, row: Row) -> bool:
        """Whether an earlier step failed; then its outcome is that of this one."""
        before = failed_before(self.out, self.step, row)
        if before is not None:
            self._write(row, Outcome(self._key(row), before.state, before.error))
        return before is not None

    def _suspects_last(self, rows: Sequence[Row], attempt: int) -> list[Row]:
        """Pairs whose process was killed take no others with them; at the last attempt they are left out."""
        found = {row.subject: read_outcome(self.out, self.step, row.subject) for row in rows}
        killed = [row for row in rows if (outcome := found[row.subject]) is not None and outcome.error == KILLED]
        return [row for row in rows if row not in killed] + (killed if attempt < ATTEMPTS else [])

    def _key(self, row: Row) -> str:
        return key(row, self.step, self.settings)

    def _begin(self, row: Row) -> None:
        """Should the process be killed, this is what is left of it."""
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

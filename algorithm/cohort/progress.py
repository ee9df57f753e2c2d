"""Sentences on the progress of a cohort."""

import time
from collections.abc import Collection
from pathlib import Path

from .done import State
from .plan import subjects_with


class Progress:
    """Counts the pairs whose registration ended since this object was created."""

    def __init__(self, out: Path, subjects: Collection[str]) -> None:
        """``subjects``: the pairs to register."""
        self.out, self.wanted, self.began = out, set(subjects), time.monotonic()
        self.stale = {state: self._with(state) for state in ("done", "failed")}
        """Outcomes for earlier files and options. They are ignored until the pair begins."""

    def _with(self, state: State) -> set[str]:
        return subjects_with(self.out, "register", state) & self.wanted

    def line(self) -> str:
        """One sentence; empty if there is nothing to register."""
        if not self.wanted:
            return ""
        now = {state: self._with(state) for state in ("done", "failed")}
        for state, found in now.items():
            self.stale[state] &= found
        done, failed = (len(now[state] - self.stale[state]) for state in ("done", "failed"))
        failures = f", {failed} of them failed" if failed else ""
        return f"{done + failed} of {len(self.wanted)} pairs registered{failures}{self._left(done + failed)}"

    def _left(self, ended: int) -> str:
        if not ended or ended >= len(self.wanted):
            return ""
        seconds = (time.monotonic() - self.began) / ended * (len(self.wanted) - ended)
        return f"; about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """A duration in words: 40 seconds, 12 minutes, 3 hours, 2 days."""
    for unit, length, most in (("second", 1, 90), ("minute", 60, 90), ("hour", 3600, 48)):
        if seconds < most * length:
            number = max(1, round(seconds / length))
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return f"{round(seconds / 86400)} days"

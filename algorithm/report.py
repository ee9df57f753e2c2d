"""Contents of results.json: version, weights, device, timings in s, quality figures, warnings."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import __version__
from .errors import peak_memory_bytes

log = logging.getLogger(__name__)

STAGES = {
    "read": "Reading the scans",
    "lungs": "Finding the lungs",
    "prepare": "Linear pre-alignment",
    "cascade": "Neural networks, coarse to fine",
    "keypoints": "Finding corresponding points",
    "minimise": "Minimising the objective",
    "refine": "Refinement for this pair",
    "second opinion": "Comparing with a refinement",
    "unfold": "Repairing foldings",
    "quality": "Measuring the quality",
    "check": "Checking the field for folding",
    "expected error": "Estimating the error",
    "write field": "Writing the displacement field",
    "write warped": "Writing the warped scan",
    "write expected error": "Writing the expected error",
    "write transforms": "Writing the transforms",
    "function": "Measuring lung function",
    "write function": "Writing the lung function",
    "write page": "Making the page to look at",
}
"""The steps of a run: their names in the timings of results.json, and their names for people."""

NO_GPU = "No GPU: running on the CPU"
"""The begin of the warning of a run that looked for a GPU in vain."""


def of_the_result(warnings: Sequence[str]) -> list[str]:
    """The warnings without the one that there is no GPU, which every run on a CPU has and which says nothing of the
    result."""
    return [sentence for sentence in warnings if not sentence.startswith(NO_GPU)]


class Report:
    """Collects values, timings and warnings during a run.

    ``steps`` are the names of the coming steps; `timed` shows their numbers to the user.
    """

    def __init__(self, steps: Sequence[str] = ()) -> None:
        self._steps = list(steps)
        self._started = time.monotonic()
        self._values: dict[str, Any] = {"version": __version__}
        self._timings: dict[str, float] = {}
        self._warnings: list[str] = []

    def set(self, **values: Any) -> None:
        """Set entries of results.json."""
        self._values |= values

    def warn(self, message: str) -> None:
        """Add a sentence that the user should read; it is also logged."""
        log.warning(message)
        self._warnings.append(message)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the timing ``name``; log its begin and its duration."""
        words = self._numbered(name)
        log.info("%s ...", words, extra={"passing": True})
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        log.info("%s: %.1f s", words, seconds, extra={"instead": True})
        self._timings[name] = self._timings.get(name, 0.0) + seconds

    def _numbered(self, name: str) -> str:
        """The step in words, with its number if that is known."""
        words = STAGES.get(name, name)
        return f"[{self._steps.index(name) + 1}/{len(self._steps)}] {words}" if name in self._steps else words

    def to_dict(self) -> dict[str, Any]:
        """The contents of results.json."""
        timings = self._timings | {"total": time.monotonic() - self._started}
        return self._values | {
            "timings_s": {name: round(value, 3) for name, value in timings.items()},
            "peak_memory_mb": round(peak_memory_bytes() / 2**20),
            "warnings": self._warnings,
        }

"""What results.json says of a run: version, weights, device, timings in s, quality figures, warnings."""

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import __version__

log = logging.getLogger(__name__)


class Report:
    """Collects what is said during a run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._values: dict[str, Any] = {"version": __version__}
        self._timings: dict[str, float] = {}
        self._warnings: list[str] = []

    def set(self, **values: Any) -> None:
        """Entries of results.json."""
        self._values |= values

    def warn(self, message: str) -> None:
        """A sentence that the user should read; also logged."""
        log.warning(message)
        self._warnings.append(message)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time that the body takes to the timing ``name``."""
        log.info("%s ...", name)
        start = time.monotonic()
        yield
        self._timings[name] = self._timings.get(name, 0.0) + time.monotonic() - start

    def to_dict(self) -> dict[str, Any]:
        """results.json."""
        timings = self._timings | {"total": time.monotonic() - self._started}
        return self._values | {
            "timings_s": {name: round(value, 3) for name, value in timings.items()},
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "warnings": self._warnings,
        }

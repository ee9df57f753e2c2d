"""What the paper says: the numbers of published.toml, none of them ours."""

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Value:
    """A figure, with its standard deviation where there is one."""

    mean: float
    sd: float | None = None


@functools.cache
def _read() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def published(name: str) -> dict[str, Any]:
    """The entry of a table or figure, as ``table5``; KeyError where there is none."""
    entry: dict[str, Any] = _read()[name]
    return entry


def pooled(cases: Sequence[Value]) -> Value:
    """Mean and standard deviation over all landmarks of cases that have as many landmarks each.

    The variance is the mean of the cases' variances and the variance of their means. No sd where a case has none.
    """
    means = np.array([case.mean for case in cases])
    if any(case.sd is None for case in cases):
        return Value(float(means.mean()))
    spreads = np.array([case.sd for case in cases], float)
    return Value(float(means.mean()), float(np.sqrt((spreads**2).mean() + means.var())))

"""Histograms and colour bars as drawings in the page: plain shapes, whose positions are computed here."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .colours import Scale

WIDTH, HEIGHT = 340, 120
"""Size of the area of a histogram, in units of the drawing; axis labels lie below and beside it."""


BAR_COLOURS = 85
"""Number of colours in a colour bar."""
ROUND = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Tick:
    """A position along an axis, 0 to 1, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class ColourBar:
    """The meaning of the colours of a scale."""

    title: str
    """The text includes the unit."""
    colours: tuple[str, ...]
    """Colours as #rrggbb, evenly spaced."""
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Series:
    """One outline of a histogram."""

    name: str
    path: str
    """The outline as an SVG path."""


@dataclass(frozen=True)
class Histogram:
    """Frequencies of values."""

    title: str
    axis: str
    """The text includes the unit."""
    series: tuple[Series, ...]
    ticks: tuple[Tick, ...]
    alt: str


def colour_bar(scale: Scale, title: str, at: Sequence[float], digits: int = 0) -> ColourBar:
    """A bar with ticks at the values ``at``."""
    colours = tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in scale.table(BAR_COLOURS).tolist())
    places = scale.share(np.array(at, float)).tolist()
    return ColourBar(title, colours, tuple(Tick(p, _text(v, digits)) for p, v in zip(places, at, strict=True)))


def histogram(
    title: str,
    axis: str,
    values: dict[str, Float[np.ndarray, " _"]],
    low: float,
    high: float,
    *,
    bins: int = 60,
    logarithmic: bool = False,
    ticks: Sequence[float] = (),
    digits: int = 0,
) -> Histogram:
    """Shares of the values from low to high, by name; values outside count in the outermost bins.

    With ``logarithmic``, the bins have equal ratios. The largest bin is as high as the drawing.
    """
    scale = Scale(low, high, ("#000000", "#ffffff"), logarithmic)
    shares = {name: _shares(scale.share(of), bins) for name, of in values.items()}
    most = max((float(of.max()) for of in shares.values()), default=0.0) or 1.0
    at = list(ticks) or np.linspace(low, high, 6).tolist()
    places = scale.share(np.array(at, float)).tolist()
    return Histogram(
        title,
        axis,
        tuple(Series(name, _outline(of / most)) for name, of in shares.items()),
        tuple(Tick(p, _text(v, digits)) for p, v in zip(places, at, strict=True)),
        f"Histogram. {title}. " + " ".join(_described(name, of, digits) for name, of in values.items()),
    )


def _shares(places: Float[np.ndarray, " n"], bins: int) -> Float[np.ndarray, " b"]:
    counts, _ = np.histogram(places, bins=bins, range=(0.0, 1.0))
    shares: np.ndarray = counts / max(1, counts.sum())
    return shares


def _described(name: str, values: Float[np.ndarray, " n"], digits: int) -> str:
    if not len(values):
        return f"{name}: no values."
    low, middle, high = (_text(float(v), digits + 1) for v in np.percentile(values, [5, 50, 95]))
    return f"{name}: median {middle}, 90 % of the values from {low} to {high}."


def _outline(heights: Float[np.ndarray, " b"]) -> str:
    """Steps from the left to the right end, closed along the axis."""
    width = WIDTH / len(heights)
    tops = HEIGHT * (1 - heights)
    steps = "".join(f"V{y:.1f}H{(i + 1) * width:.1f}" for i, y in enumerate(tops.tolist()))
    return f"M0,{HEIGHT}{steps}V{HEIGHT}Z"


def _text(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.rstrip("0").rstrip(".") if "." in text else text


def round_up(value: float) -> float:
    """The smallest product of a number in `ROUND` and a power of ten that is not smaller than ``value``: the end of a
    scale."""
    power = 10.0 ** np.floor(np.log10(max(value, 1e-6)))
    return float(next(step * power for step in ROUND if step * power >= value * (1 - 1e-9)))

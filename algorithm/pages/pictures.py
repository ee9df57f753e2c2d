"""The pictures on the page of a registration: slices, colour bars, histograms, volumes for the viewer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from resultpages.charts import ColourBar, Histogram, colour_bar, histogram, round_up
from resultpages.colours import CT, DIFFERENCE, FOLDED_RGB, GOOD_TO_BAD, LEAST_TO_MOST, VOLUME, Scale, over
from resultpages.pictures import Picture, picture
from resultpages.viewer import Layer, layer

from .view import AXIS, Plane, View, flat

CT_LEVELS = 96
"""Number of grey values in the viewer; fewer than 255 make the page smaller."""
MAP_LEVELS = 128
MAP_OPACITY = 0.7
ARROW_PIXELS = 15
"""Distance between arrows."""
LEAST_ARROW = 2.0
"""Minimum length of an arrow in pixels; shorter ones are not drawn."""
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.5)
"""Ticks for volumes, moving over fixed."""
TITLES: dict[Plane, str] = {
    "coronal": "Coronal, from the front",
    "sagittal": "Sagittal, from the side",
    "axial": "Axial, from below",
}


@dataclass(frozen=True)
class Compared:
    """Two pictures of the same place."""

    caption: str
    before: Picture
    after: Picture


@dataclass(frozen=True)
class PlaneShown:
    """All pictures of one plane."""

    title: str
    fixed: Picture
    pairs: list[Compared]
    motion: Picture
    arrows: str
    """An SVG path in pixels of ``motion``."""
    maps: list[Picture]


@dataclass(frozen=True)
class Scales:
    """The scales (mm) of the colours that depend on the case."""

    motion: Scale
    error: Scale


def scales_for(volume: View) -> Scales:
    """Scales that end at round numbers above the 99.5th percentile in the lungs."""
    inside = volume.motion_mm[volume.lungs]
    longest = float(np.percentile(inside, 99.5)) if len(inside) else 1.0
    error = 5.0
    if volume.expected_mm is not None and len(inside):
        error = max(5.0, min(20.0, float(np.percentile(volume.expected_mm[volume.lungs], 99.5))))
    motion = Scale(0.0, round_up(max(longest, 1.0)), LEAST_TO_MOST)
    return Scales(motion, Scale(0.0, round_up(error), GOOD_TO_BAD))


# --- slices -----------------------------------------------------------------------------------------------------


def plane_shown(plane: Plane, view: View, scales: Scales) -> PlaneShown:
    """The fixed scan, before and after, motion and maps of a `slice_view`."""
    fixed, before, warped = (flat(of, plane) for of in (view.fixed_hu, view.before_hu, view.warped_hu))
    where = f"{plane} slice through the fixed lungs"
    scans = Compared(
        "moving scan",
        picture(CT.rgb(before), "moving", f"Moving scan before the registration, {where}"),
        picture(CT.rgb(warped), "warped", f"Moving scan after the registration, {where}"),
    )
    differences = Compared(
        "fixed − moving",
        picture(DIFFERENCE.rgb(fixed - before), "before", f"Difference before the registration, {where}"),
        picture(DIFFERENCE.rgb(fixed - warped), "after", f"Difference after the registration, {where}"),
    )
    return PlaneShown(
        TITLES[plane],
        picture(CT.rgb(fixed), "fixed scan", f"Fixed scan, {where}"),
        [scans, differences],
        picture(_over(view, plane, scales.motion.rgb(flat(view.motion_mm, plane))), "motion (mm)", f"Motion, {where}"),
        arrows(view, plane),
        list(_maps(view, plane, scales, where)),
    )


def _maps(view: View, plane: Plane, scales: Scales, where: str) -> Iterator[Picture]:
    determinant, lungs = flat(view.determinant, plane), flat(view.lungs, plane)
    colours = VOLUME.rgb(determinant)
    colours[~(determinant > 0)] = FOLDED_RGB
    folded = int((lungs & ~(determinant > 0)).sum())
    alt = f"Volume change, {where}; {folded} pixels are folded"
    yield picture(_over(view, plane, colours), "volume, moving / fixed (Jacobian determinant)", alt)
    if view.expected_mm is not None:
        colours = scales.error.rgb(flat(view.expected_mm, plane))
        yield picture(_over(view, plane, colours), "expected error (mm)", f"Expected error, {where}")


def _over(view: View, plane: Plane, colours: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, "y x 3"]:
    """Colours over the fixed scan, in the lungs."""
    return over(CT.rgb(flat(view.fixed_hu, plane)), colours, flat(view.lungs, plane), MAP_OPACITY)


def arrows(view: View, plane: Plane) -> str:
    """The displacement in the lungs as arrows, true to length: an SVG path in pixels of the plane's picture."""
    across, down = (a for a in range(3) if a != AXIS[plane])
    up = -1.0 if plane != "axial" else 1.0  # all pictures except the axial one are turned upside down
    lungs = flat(view.lungs, plane)
    x_mm, y_mm = (flat(view.displacement_mm[a], plane) for a in (across, down))
    dx, dy = x_mm / view.grid.spacing[across], up * y_mm / view.grid.spacing[down]
    first = ARROW_PIXELS // 2
    rows, columns = np.meshgrid(*(np.arange(first, n, ARROW_PIXELS) for n in lungs.shape), indexing="ij")
    parts = []
    for y, x in zip(rows.ravel().tolist(), columns.ravel().tolist(), strict=True):
        if lungs[y, x] and np.hypot(dx[y, x], dy[y, x]) >= LEAST_ARROW:
            parts.append(_arrow(x, y, float(dx[y, x]), float(dy[y, x])))
    return "".join(parts)


def _arrow(x: int, y: int, dx: float, dy: float) -> str:
    length = float(np.hypot(dx, dy))
    head = min(4.0, 0.45 * length) / length
    ends = [head * (-0.87 * dx + sign * 0.5 * -dy) for sign in (1, -1)]
    sides = [head * (-0.87 * dy + sign * 0.5 * dx) for sign in (1, -1)]
    tip = f"M{x + dx:.1f},{y + dy:.1f}"
    return f"M{x},{y}l{dx:.1f},{dy:.1f}" + "".join(f"{tip}l{a:.1f},{b:.1f}" for a, b in zip(ends, sides, strict=True))


# --- colour bars and histograms --------------------------------------------------------------------------------------


def colour_bars(scales: Scales, expected: bool) -> list[ColourBar]:
    """Colour bars of the maps."""
    bars = [_linear_bar(scales.motion, "Motion (mm)"), _volume_bar()]
    return bars + ([_linear_bar(scales.error, "Expected error (mm)")] if expected else [])


def _linear_bar(scale: Scale, title: str) -> ColourBar:
    ticks = np.linspace(scale.low, scale.high, 6)
    return colour_bar(scale, title, ticks.tolist(), digits=1)


def _volume_bar() -> ColourBar:
    return colour_bar(VOLUME, "Volume, moving / fixed (1: no change)", RATIOS, digits=2)


def histograms(volume: View, scales: Scales) -> list[Histogram]:
    """Histograms over the voxels of the fixed lungs."""
    inside = volume.lungs
    differences = {
        "before": (volume.fixed_hu - volume.before_hu)[inside],
        "after": (volume.fixed_hu - volume.warped_hu)[inside],
    }
    motion, ratios = {"motion": volume.motion_mm[inside]}, {"volume": volume.determinant[inside]}
    high = scales.motion.high
    charts = [
        histogram("How far the lungs move", "motion (mm)", motion, 0.0, high, digits=1),
        histogram(
            "How the volume changes",
            "volume, moving / fixed",
            ratios,
            RATIOS[0],
            RATIOS[-1],
            logarithmic=True,
            ticks=RATIOS,
            digits=2,
        ),
        histogram("Difference of the scans", "fixed − moving (HU)", differences, -500.0, 500.0),
    ]
    if volume.expected_mm is not None:
        errors = {"expected error": volume.expected_mm[inside]}
        charts.append(histogram("Expected error", "mm", errors, 0.0, scales.error.high, digits=1))
    return charts


# --- the viewer ------------------------------------------------------------------------------------------------------


def viewer_layers(volume: View, scales: Scales) -> list[Layer]:
    """The fixed scan first, then the registered one: the page takes their difference itself."""
    axes, origin = volume.grid.axes, np.array(volume.grid.origin)

    def made(key: str, title: str, unit: str, values: Float[np.ndarray, "z y x"], scale: Scale, levels: int) -> Layer:
        return layer(key, title, unit, values, scale, axes, origin, levels)

    def inside(values: Float[np.ndarray, "z y x"]) -> Float[np.ndarray, "z y x"]:
        masked: np.ndarray = np.where(volume.lungs, values, np.nan)
        return masked

    layers = [
        made("fixed", "Fixed scan", "HU", volume.fixed_hu, CT, CT_LEVELS),
        made("warped", "Moving scan, registered", "HU", volume.warped_hu, CT, CT_LEVELS),
        Layer("difference", "Fixed − registered", "HU", "", DIFFERENCE.low, DIFFERENCE.high, False, _table(DIFFERENCE)),
        made("motion", "Motion", "mm", inside(volume.motion_mm), scales.motion, MAP_LEVELS),
        made("volume", "Volume, moving / fixed", "", inside(volume.determinant), VOLUME, MAP_LEVELS),
    ]
    if volume.expected_mm is not None:
        layers.append(made("error", "Expected error", "mm", inside(volume.expected_mm), scales.error, MAP_LEVELS))
    return layers


def _table(scale: Scale) -> list[list[int]]:
    colours: list[list[int]] = scale.table().tolist()
    return colours


def viewer_bars(scales: Scales, layers: list[Layer]) -> list[dict[str, Any]]:
    """By the layers' keys; the fixed scan needs none."""
    bars = {
        "warped": _linear_bar(CT, "Moving scan, registered (HU)"),
        "difference": _linear_bar(DIFFERENCE, "Fixed − registered (HU)"),
        "motion": _linear_bar(scales.motion, "Motion (mm)"),
        "volume": _volume_bar(),
        "error": _linear_bar(scales.error, "Expected error (mm)"),
    }
    return [{"key": one.key, "bar": bars[one.key]} for one in layers if one.key in bars]

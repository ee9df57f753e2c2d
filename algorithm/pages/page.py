"""report.html: one page about a registration, for readers. It contains everything that it shows and loads no other
file.

`registration_page` makes its text; `results.texts.write_text` writes the file.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from resultpages import render
from resultpages.viewer import LICENCE, PARTS, VERSION, library

from ..preparation.subject import Subject
from ..report import STAGES, of_the_result
from ..results.summary import error_in_words
from .pictures import colour_bars, histograms, plane_shown, scales_for, viewer_bars, viewer_layers
from .view import AXIS, Pair, fullest, slice_view, volume_view

MEASURED = {
    "lung_dice": ("Overlap of the lungs (Dice; 1 is perfect)", 1.0, 3),
    "ngf_distance": ("Edges that do not match (0 to 1)", 1.0, 3),
    "local_correlation_distance": ("Textures that do not match (0 to 1)", 1.0, 3),
    "outside_field_of_view": ("Fixed lungs outside the moving scan (%)", 100.0, 1),
    "inconsistency_mm": ("Distance from the second registration (mm, mean)", 1.0, 2),
    "inconsistency_p95_mm": ("The same, 95th percentile (mm)", 1.0, 2),
}
"""For each measure of quality in results.json: its description, a factor, and the digits after the point."""


@dataclass(frozen=True)
class Card:
    """A key figure at the top of the page."""

    name: str
    value: str
    remark: str


def registration_page(pair: Pair, results: dict[str, Any], mark: str = "") -> str:
    """The page's text. ``results`` is the content of results.json; ``mark`` becomes a comment in the second line of the
    page."""
    fixed, moving = pair.fixed.image.path.name, pair.moving.image.path.name
    volume = volume_view(pair)
    scales = scales_for(volume)
    planes = [plane_shown(plane, slice_view(pair, plane), scales) for plane in AXIS]
    program = library()
    layers = [] if program is None else viewer_layers(volume, scales)
    return render(
        "registration.html.j2",
        scripts=["compare.js", *(["viewer.js"] if layers else [])],
        run_later=[program.source] if program and layers else [],
        mark=mark,
        title=f"Lung registration: {moving} onto {fixed}",
        fixed=fixed,
        moving=moving,
        version=results["version"],
        warnings=of_the_result(results["warnings"]),
        cards=_cards(pair, results),
        scans=_scans(pair.fixed, pair.moving),
        before_text=_before(pair),
        planes=planes,
        expected=pair.expected is not None,
        bars=colour_bars(scales, pair.expected is not None),
        histograms=histograms(volume, scales),
        layers=[asdict(one) for one in layers],
        layer_bars=viewer_bars(scales, layers),
        viewer_voxel=f"{float(np.prod(volume.grid.spacing)) ** (1 / 3):.1f}",
        start=[f"{share:.3f}" for share in fullest(volume)],
        viewer_packed=program.packed if program else "",
        viewer_version=VERSION,
        viewer_licence=LICENCE,
        viewer_parts=PARTS,
        run=_run(results),
        quality=_quality(results.get("quality") or {}),
        timings=[(_step(name), f"{seconds:.1f}") for name, seconds in results["timings_s"].items()],
    )


# --- in words and numbers --------------------------------------------------------------------------------------------


def _cards(pair: Pair, results: dict[str, Any]) -> list[Card]:
    fixed, moving = pair.fixed.lungs.litres, pair.moving.lungs.litres
    cards = [Card("Lungs, fixed", f"{fixed:.2f} l", "in the fixed scan")]
    cards.append(Card("Lungs, moving", f"{moving:.2f} l", f"{100 * moving / fixed:.0f} % of the fixed ones"))
    if motion := results.get("motion_mm"):
        remark = f"95 % up to {motion['p95']:.1f}, at most {motion['max']:.1f} mm"
        cards.append(Card("Motion in the lungs, mean", f"{motion['mean']:.1f} mm", remark))
    error = results.get("expected_error") or {}
    if error.get("mean_mm") is not None:
        remark = error_in_words(results).partition(", ")[2] or "estimated without the truth"
        cards.append(Card("Expected error, mean", f"{error['mean_mm']:.1f} mm", remark))
    if jacobian := results.get("jacobian"):
        folded, voxels = jacobian["folded_voxels"], jacobian["voxels"]
        value = "none" if not folded else f"{100 * folded / voxels:.2g} %"
        cards.append(Card("Foldings", value, f"of {voxels:,} voxels of the written field".replace(",", " ")))
    return cards


def _scans(fixed: Subject, moving: Subject) -> list[tuple[str, ...]]:
    rows: dict[str, tuple[str, str]] = {}
    of = [subject.image.grid for subject in (fixed, moving)]
    rows["file"] = (fixed.image.path.name, moving.image.path.name)
    rows["voxels (right–left, front–back, feet–head)"] = (_triple(of[0].size, 0), _triple(of[1].size, 0))
    rows["voxel (mm)"] = (_triple(of[0].spacing, 2), _triple(of[1].spacing, 2))
    rows["extent (mm)"] = (_triple(of[0].extent_mm, 0), _triple(of[1].extent_mm, 0))
    rows["lungs (litres)"] = (f"{fixed.lungs.litres:.2f}", f"{moving.lungs.litres:.2f}")
    return [(name, *cells) for name, cells in rows.items()]


def _triple(values: tuple[float, float, float] | tuple[int, int, int], digits: int) -> str:
    return " × ".join(f"{value:.{digits}f}" for value in values)


def _before(pair: Pair) -> str:
    if not pair.far:
        return "Before: the moving scan as it lies. After: the moving scan as the field carries it onto the fixed one."
    return (
        "The scans lie far apart, as when a patient was moved in between. Before: the moving scan after the linear "
        "pre-alignment. After: as the whole field carries it onto the fixed one."
    )


def _run(results: dict[str, Any]) -> list[tuple[str, str]]:
    rows = {
        "program": f"lung-registration {results['version']}",
        "weights, SHA-256": results.get("weights_sha256"),
        "device": results.get("device"),
        "peak memory": f"{results['peak_memory_mb']} MB" if results.get("peak_memory_mb") else None,
        "smoothed voxels, where the field had folded": results.get("repaired_voxels"),
    }
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def _quality(quality: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Before is after the linear pre-alignment."""
    before, after = quality.get("before", {}), quality.get("after", {})
    return [
        (words, _measured(before.get(name), factor, digits), _measured(after.get(name), factor, digits))
        for name, (words, factor, digits) in MEASURED.items()
        if name in after
    ]


def _measured(value: float | None, factor: float, digits: int) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


def _step(name: str) -> str:
    return "all, without this page" if name == "total" else STAGES.get(name, name)

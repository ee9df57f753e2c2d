"""The pictures of Hering et al. 2021: box plots per label (Fig. 5), the Jacobian determinant (Fig. 6), cumulative
landmark errors (Fig. 7), and fixed, moving, warped and difference images (Fig. 8). Coronal slices show the patient's
right on the left, and the head at the top."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resultpages.colours import CT, DIFFERENCE, FOLDED_RGB, VOLUME, over

from .fields import axes_of
from .images import find_image, read_image
from .jacobian import FOLDED, jacobian_determinant

COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b8860b", "#35978f", "#c51b7d", "#111111", "#8c510a")
"""Colours of the evaluations, used in turn."""
BEFORE = "#888888"
MOST_PIXELS = 420
"""Maximum number of pixels along the longer side of a slice."""


# --- charts ----------------------------------------------------------------------------------------------------------


def cumulative_errors(
    errors_mm: Mapping[str, Float[np.ndarray, " n"]], before_mm: Float[np.ndarray, " m"] | None = None
) -> Figure:
    """Fig. 7: the share of landmarks with an error of at most x mm. Dotted lines are the 75th percentiles; grey is
    before.

    The axis ends at the largest 98th percentile, so that a few landmarks do not compress the rest.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    curves = list(zip(errors_mm, errors_mm.values(), COLOURS * len(errors_mm), strict=False))
    curves += [] if before_mm is None else [("before", before_mm, BEFORE)]
    percent = np.linspace(0, 100, 401)
    last = max(float(np.percentile(values, 98)) for _, values, _ in curves)
    entries = {}
    for name, values, colour in curves:
        at_75 = float(np.percentile(values, 75))
        within = np.append(np.percentile(values, percent), last)
        (line,) = axes.plot(np.maximum.accumulate(within), np.append(percent, 100), color=colour)
        entries[line] = f"{name}: 75 % within {at_75:.2f} mm"
        axes.plot([at_75, at_75], [0, 75], ":", color=colour)
    axes.axhline(75, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set(xlim=(0, max(last, 1e-3)), ylim=(0, 100), xlabel="landmark error (mm)", ylabel="landmarks (%)")
    _legend(axes, entries, loc="lower right")
    return figure


def _legend(axes: Axes, entries: Mapping[Line2D, str], loc: Literal["best", "lower right"] = "best") -> None:
    """A legend with unchanged names: matplotlib would read $…$ as a formula, and omit names that begin with _."""
    legend = axes.legend(list(entries), [""] * len(entries), fontsize="small", loc=loc)
    for text, name in zip(legend.get_texts(), entries.values(), strict=True):
        text.set_text(name)
        text.set_parse_math(False)


def values_by_label(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[float]]:
    """The values of a metric over the cases, by label; the mean comes first. Empty if no case has any."""
    values: dict[str, list[float]] = {}
    for result in results:
        entry = result.get(key)
        for label, value in entry.items() if isinstance(entry, dict) else ():
            if value is not None:
                values.setdefault(label, []).append(float(value))
    order = sorted(values, key=lambda label: (label != "mean", len(label), label))
    return {label: values[label] for label in order}


def box_plots(groups: Mapping[str, Mapping[str, Sequence[float]]], axis_title: str) -> Figure:
    """Fig. 5: one box per label and evaluation; whiskers reach 1.5 times the box, cases farther out are dots."""
    labels = sorted({x for of in groups.values() for x in of}, key=lambda x: (x != "mean", len(x), x))
    figure = Figure(figsize=(max(5.2, 0.45 * len(labels) * len(groups)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    entries = {}
    for number, (name, of) in enumerate(groups.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [i + (number - (len(groups) - 1) / 2) * width for i, x in enumerate(labels) if x in of]
        axes.boxplot(
            [list(of[x]) for x in labels if x in of],
            positions=places,
            widths=0.8 * width,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": colour, "alpha": 0.55},
            medianprops={"color": "black"},
            flierprops={"marker": ".", "markersize": 4},
        )
        (square,) = axes.plot([], [], "s", color=colour, alpha=0.55)
        entries[square] = name
    ticks = [x if x == "mean" else f"label {x}" if len(labels) < 7 else x for x in labels]
    axes.set_xticks(range(len(labels)), ticks)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylabel(axis_title)
    if len(groups) > 1:
        _legend(axes, entries)
    return figure


def svg(figure: Figure) -> str:
    """A figure as a data address that holds all bytes of the image."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- slices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slices:
    """Coronal slices of a case on a grid of square pixels, with the head at the top."""

    determinant: Float[np.ndarray, "z x"]
    inside: Bool[np.ndarray, "z x"]
    """Pixels in the lung mask; all pixels without a mask."""
    fixed: Float[np.ndarray, "z x"] | None = None
    """HU of the images; None if there are no images."""
    moving: Float[np.ndarray, "z x"] | None = None
    warped: Float[np.ndarray, "z x"] | None = None


def coronal_slices(
    field: sitk.Image,
    lung_mask: sitk.Image | None,
    fixed: sitk.Image | None = None,
    moving: sitk.Image | None = None,
) -> Slices:
    """Slices through the row with most of the lungs. Everything is resampled on the grid of ``field`` (mm, LPS)."""
    slab = _slab(field, lung_mask)
    reference = _square_pixels(slab)
    determinant = sitk.GetImageFromArray(jacobian_determinant(slab))
    determinant.CopyInformation(slab)
    identity = sitk.Transform(3, sitk.sitkIdentity)
    pixels = _row(sitk.Resample(determinant, reference, identity, sitk.sitkNearestNeighbor, 1.0))
    inside = np.ones(pixels.shape, bool)
    if lung_mask is not None:
        inside = _row(sitk.Resample(lung_mask, reference, identity, sitk.sitkNearestNeighbor, 0)) > 0
    displacement = sitk.Resample(slab, reference, identity, sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(displacement)
    images = {"fixed": (fixed, identity), "moving": (moving, identity), "warped": (moving, transform)}
    rows = {name: _ct(image, reference, t) for name, (image, t) in images.items() if image is not None}
    return Slices(pixels, inside, **rows)


def _slab(field: sitk.Image, lung_mask: sitk.Image | None) -> sitk.Image:
    """Three rows of the field (fewer in a thinner one), with axes as close to the patient's axes as possible."""
    axis = int(np.argmax(np.abs(np.reshape(field.GetDirection(), (3, 3))[1])))
    rows = field.GetSize()[axis]
    row = rows // 2 if lung_mask is None else _fullest_row(lung_mask, field, axis)
    start, size = [0, 0, 0], list(field.GetSize())
    start[axis] = int(np.clip(row - 1, 0, max(rows - 3, 0)))
    size[axis] = min(3, rows)
    slab: sitk.Image = sitk.DICOMOrient(sitk.RegionOfInterest(field, size, start), "LPS")
    return slab


def _fullest_row(lung_mask: sitk.Image, field: sitk.Image, axis: int) -> int:
    """Row of ``field`` along ``axis`` at the height where the mask is largest, using every second voxel of the mask."""
    voxels = sitk.GetArrayViewFromImage(lung_mask)[::2, ::2, ::2] > 0
    k, j, i = np.nonzero(voxels)
    if not len(i):
        return int(field.GetSize()[axis]) // 2
    world = 2.0 * np.stack([i, j, k], axis=1) @ axes_of(lung_mask).T + lung_mask.GetOrigin()
    to_index = np.linalg.inv(axes_of(field))
    rows = np.round((world - field.GetOrigin()) @ to_index[axis]).astype(int)
    values, counts = np.unique(rows, return_counts=True)
    smooth = np.array([counts[np.abs(values - value) <= 1].sum() for value in values])
    return int(values[int(np.argmax(smooth))])


def _square_pixels(slab: sitk.Image) -> sitk.Image:
    """The geometry of the slab's middle row with square pixels, at most `MOST_PIXELS` along a side.

    No pixel lies beyond the outermost voxel centres.
    """
    (nx, ny, nz), (sx, sy, sz) = slab.GetSize(), slab.GetSpacing()
    pixel = max(min(sx, sz), max(nx * sx, nz * sz) / MOST_PIXELS)
    columns, rows = (int((n - 1) * spacing / pixel + 1e-6) + 1 for n, spacing in ((nx, sx), (nz, sz)))
    reference = sitk.Image(columns, 1, rows, sitk.sitkUInt8)
    reference.SetSpacing((pixel, sy, pixel))
    reference.SetDirection(slab.GetDirection())
    reference.SetOrigin(slab.TransformIndexToPhysicalPoint((0, ny // 2, 0)))
    return reference


def _ct(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform) -> Float[np.ndarray, "z x"]:
    return _row(sitk.Resample(image, reference, transform, sitk.sitkLinear, -1000.0, sitk.sitkFloat32))


def _row(image: sitk.Image) -> np.ndarray:
    """The only row of a slice, with the head at the top."""
    pixels: np.ndarray = np.asarray(sitk.GetArrayFromImage(image)[::-1, 0], dtype=np.float64)
    return pixels


def panels(slices: Slices) -> dict[str, UInt8[np.ndarray, "z x 3"]]:
    """The pictures of Figures 8 and 6, by title, as far as the data allow."""
    fixed, moving, warped = slices.fixed, slices.moving, slices.warped
    found: dict[str, np.ndarray] = {}
    if fixed is not None:
        found["fixed F"] = CT.rgb(fixed)
    if moving is not None and warped is not None:
        found |= {"moving M": CT.rgb(moving), "warped M(y)": CT.rgb(warped)}
        if fixed is not None:
            found["before: F − M"] = DIFFERENCE.rgb(fixed - moving)
            found["after: F − M(y)"] = DIFFERENCE.rgb(fixed - warped)
    return found | {"Jacobian determinant": jacobian_overlay(slices)}


def jacobian_overlay(slices: Slices) -> UInt8[np.ndarray, "z x 3"]:
    """Fig. 6, in colours that all readers can distinguish: the determinant inside the lungs, over the fixed image.

    White is 1, no change of volume; foldings are magenta.
    """
    shape = slices.determinant.shape
    grey = np.full((*shape, 3), 64, np.uint8) if slices.fixed is None else CT.rgb(slices.fixed)
    picture = over(grey, VOLUME.rgb(slices.determinant), slices.inside, 0.65)
    picture[slices.inside & ~(slices.determinant > FOLDED)] = FOLDED_RGB
    return picture


def read_scan(folder: Path, name: str) -> sitk.Image | None:
    """``folder/name`` with any ending; None without such a file. CaseError if it is broken."""
    path = find_image(folder, name)
    return None if path is None else read_image(path)

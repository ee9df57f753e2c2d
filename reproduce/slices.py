"""Coronal slices of results, side by side: what Figures 6 and 8 show."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from algorithm.files.images import read_image as read_scan
from algorithm.files.writing import write_image
from algorithm.preparation.subject import find_lungs
from evaluation.fields import read_field
from evaluation.images import read_image
from evaluation.pictures import Slices, coronal_slices
from resultpages.colours import VOLUME

from .pairs import Pair
from .runs import Runs

SHOWN = 4
"""Pairs, as in the paper."""


def of_result(runs: Runs, method: str, pair: Pair) -> Slices:
    """Through the largest extent of the lungs, as the registration finds them, with both scans."""
    lungs = runs.folder(method, pair) / "lungs.mha"
    if not lungs.exists():
        found = find_lungs(read_scan(pair.folder / "fixed.mha"), None).lungs
        write_image(lungs, found.mask.to(torch.uint8), found.grid)
    fixed, moving = (read_image(pair.folder / f"{scan}.mha") for scan in ("fixed", "moving"))
    return coronal_slices(read_field(runs.field(method, pair)), read_image(lungs), fixed, moving)


def spread_over(pairs: Sequence[Pair]) -> list[Pair]:
    """At most `SHOWN` of ranked pairs, evenly from the first to the last."""
    places = np.linspace(0, len(pairs) - 1, min(SHOWN, len(pairs))).round().astype(int)
    return [pairs[place] for place in places]


def side_by_side(rows: Mapping[str, Mapping[str, UInt8[np.ndarray, "z x 3"]]], volume_bar: bool = False) -> Figure:
    """Pictures in rows, with a name for each row and a title for each picture."""
    columns = max(len(row) for row in rows.values())
    figure = Figure(figsize=(2.3 * columns + 0.4, 2.1 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, row) in zip(grid, rows.items(), strict=True):
        for place, (title, pixels) in zip(axes, row.items(), strict=True):
            place.imshow(pixels, interpolation="nearest")
            place.set_title(title, fontsize="small")
            place.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, fontsize="x-small")
    if volume_bar:
        colours = LinearSegmentedColormap.from_list("volume", VOLUME.colours)
        scale = ScalarMappable(LogNorm(VOLUME.low, VOLUME.high), colours)
        bar = figure.colorbar(scale, ax=list(grid.ravel()), shrink=0.8, ticks=(0.4, 0.6, 1.0, 1.6, 2.5))
        bar.ax.set_yticklabels(["0.4", "0.6", "1", "1.6", "2.5"])
        bar.ax.minorticks_off()
        bar.set_label("Jacobian determinant", fontsize="small")
    return figure

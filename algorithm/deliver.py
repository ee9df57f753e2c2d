"""Writes the results; the field is checked for folding while it is written."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .errors import InputError, first_line
from .fields.determinant import DeterminantStatistics, checked
from .fields.expected_error import ExpectedError
from .fields.folding import unfold
from .fields.frame import framed
from .fields.inverse import inverse_and_residual
from .fields.transform import Transform
from .files.images import Layout
from .files.writing import write_field, write_image_slabs
from .geometry import Grid, slabs
from .lungs import LungMask
from .options import FieldGrid
from .pages.view import Pair
from .preparation.subject import Subject
from .report import Report
from .results.outputs import Outputs, remove_own_image, sole_image, sole_writer
from .results.ownership import PAGE_MARK, remove_own_texts, remove_own_transforms, result_mark
from .results.summary import figures, in_words
from .results.texts import paths_from, write_results, write_text
from .results.transformfiles import write_inverse, write_transform

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Maximum number of times that a field which folds on the output grid is repaired and written again."""


def deliver(
    outputs: Outputs,
    grid: Grid,
    transform: Transform,
    fixed: Subject,
    moving: Subject,
    layout: Layout,
    report: Report,
    field_grid: FieldGrid = "fixed",
    expected: ExpectedError | None = None,
    also: Callable[[Path, Pair, Report], str] | None = None,
) -> None:
    """Write the field on ``field_grid``, the warped image on ``grid`` (that of the fixed image) and results.json; the
    ``expected`` error if there is one; and, if wanted, the transforms for other programs and the page. ``also`` is
    called with the result folder and returns a section of the page.

    The field is checked for folding on the grid on which it is written.
    """
    with sole_writer(outputs.results.parent):
        outputs.check()  # again: another program may have written a file in the meantime
        # those of an earlier run; results.json is written last: then all files are complete
        remove_own_texts(outputs.results.parent)
        with report.timed("write field"), sole_image(outputs.displacement_field, outputs.inputs) as path:
            written = grid if field_grid == "fixed" else transform.grid
            transform = write_unfolded(path, written, transform, fixed.lungs, layout, report)
        with report.timed("write warped"), sole_image(outputs.warped_moving, outputs.inputs) as path:
            warped, dtype = transform.warped_slabs(moving.image, grid), moving.image.voxels.dtype
            write_image_slabs(path, grid, warped, dtype, result_mark(path))
        if expected is None:
            remove_own_image(outputs.expected_error, outputs.inputs)
        else:
            with report.timed("write expected error"), sole_image(outputs.expected_error, outputs.inputs) as path:
                write_error(path, grid if field_grid == "fixed" else expected.grid, expected)
        remove_own_transforms(outputs.results.parent, (*outputs.inputs, *outputs.transforms))
        if outputs.transforms:
            with report.timed("write transforms"):
                residual = write_both_ways(outputs, transform, fixed.lungs, moving.lungs, expected)
                report.set(inverse_residual_mm=residual)
        report.set(paths=paths_from(outputs.results.parent, fixed=fixed.image.path, moving=moving.image.path))
        report.set(**figures(fixed, moving, transform))
        pair = Pair(fixed, moving, transform, expected)
        section = "" if also is None else write_also(outputs.results.parent, pair, report, also)
        if outputs.page is not None:
            write_page(outputs.page, pair, report, section)
        write_results(outputs.results, report.to_dict())
    for line in in_words(report.to_dict(), outputs):
        log.info(line)


def write_error(path: Path, grid: Grid, expected: ExpectedError) -> None:
    """The expected error (mm, float32) on ``grid``; -1 where it is not known."""
    write_image_slabs(path, grid, (expected.at(slab) for slab in slabs(grid)), torch.float32, result_mark(path))


def write_also(folder: Path, pair: Pair, report: Report, also: Callable[[Path, Pair, Report], str]) -> str:
    """Returns the section of the page. An error becomes a warning, so that the other results are still written."""
    with report.timed("function"):
        try:
            return also(folder, pair, report)
        except Exception as error:
            log.debug("lung function", exc_info=True)
            why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
            report.warn(f"Lung function was not measured: {why}.")
            return ""


def write_page(path: Path, pair: Pair, report: Report, section: str = "") -> None:
    """Write report.html. An error becomes a warning, so that the other results are still written."""
    with report.timed("write page"):
        try:
            from resultpages.page import with_section  # here: without a page, its libraries are not loaded

            from .pages.page import registration_page

            text = with_section(registration_page(pair, report.to_dict(), PAGE_MARK), section)
        except Exception as error:
            log.debug("report.html", exc_info=True)
            report.warn(f"report.html could not be made ({type(error).__name__}: {first_line(error)}).")
            return
        write_text(path, text)


def write_unfolded(
    path: Path, grid: Grid, transform: Transform, lungs: LungMask, layout: Layout, report: Report
) -> Transform:
    """Write the field on ``grid``; returns the transform as it was written, see `unfolded`."""

    def write(slabs: Iterator[Float[Tensor, "1 3 d y x"]]) -> None:
        write_field(path, grid, slabs, layout, result_mark(path))

    return unfolded(grid, transform, lungs, report, write)


def unfolded(
    grid: Grid,
    transform: Transform,
    lungs: LungMask,
    report: Report,
    write: Callable[[Iterator[Float[Tensor, "1 3 d y x"]]], None],
) -> Transform:
    """Pass the field on ``grid`` to ``write`` in slabs, repaired where it folds; returns the repaired transform.

    det(I + ∇u) of every voxel is computed on the way. It can be ≤ 0 although the field does not fold on its own grid,
    because a coarse output grid takes differences over several voxels. There, the field is smoothed and written again.
    A warning gives the number of voxels that cannot be repaired.
    """
    for attempt in range(ATTEMPTS):
        statistics = DeterminantStatistics()
        write(checked(transform.field_slabs(grid), grid, lungs.mask, lungs.grid, statistics))
        if statistics.fine or attempt == ATTEMPTS - 1:
            break
        repaired, changed = unfold(
            transform.displacement, transform.grid, points_mm=statistics.points_mm, attempt=attempt
        )
        transform = Transform(repaired, transform.grid, transform.affine)
        report.warn(
            f"The field folded at {statistics.folded} voxels of the grid it is written on; it was smoothed at "
            f"{changed} voxels of its own, after the quality figures were taken."
        )
    report.set(jacobian=statistics.figures())
    if statistics.folded:
        report.warn(f"The field folds at {statistics.folded} of {statistics.voxels} voxels; the repair failed.")
    return transform


def write_both_ways(
    outputs: Outputs,
    transform: Transform,
    fixed_lungs: LungMask,
    moving_lungs: LungMask,
    expected: ExpectedError | None,
) -> dict[str, float]:
    """Write the transform, defined everywhere, and its inverse; returns the inverse residual in the moving lungs,
    mm."""
    there, back = outputs.transforms
    whole = framed(transform)
    undo, rest = inverse_and_residual(whole, moving_lungs)
    write_transform(there, whole, fixed_lungs, expected)
    write_inverse(back, undo, moving_lungs)
    return {"mean": float(rest.mean()), "p99": float(np.quantile(rest, 0.99)), "max": float(rest.max())}

"""One case: reads two subjects from files, computes the transform between them, and writes the results.

The three parts are separate, so that a program with many cases can read the next one while this one is computed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .cascade.weights import LoadedCascade
from .deliver import deliver
from .devices import choose_device
from .files.folders import image_name
from .files.images import Layout, read_image
from .geometry import Grid
from .lungs.segmentations import mask_file
from .options import Options
from .pages.view import Pair
from .preparation.subject import Subject, find_both_lungs
from .registration import Registered, register
from .report import Report
from .results.outputs import Outputs, field_layout, image_kind, prepare_outputs


def run(options: Options, weights: LoadedCascade) -> None:
    """Run one case, from input files to output files."""
    write(compute(read(options, weights.sha256), weights))


@dataclass(frozen=True)
class Case:
    """A case that was read."""

    options: Options
    outputs: Outputs
    report: Report
    device: torch.device
    fixed: Subject
    moving: Subject
    grid: Grid
    """The grid of the fixed image as it was given."""
    layout: Layout


class Computed(NamedTuple):
    """A case and its result."""

    case: Case
    result: Registered


def read(options: Options, weights_sha256: str) -> Case:
    """Read the scans with their lungs; InputError if they cannot be registered, or the results cannot be written."""
    report = Report(options.steps())
    inputs = options.inputs()
    given = (*inputs.paths(), *options.lobes())
    layout = field_layout(options.field_layout, inputs)
    kind = image_kind(options.format, inputs.fixed, layout)
    wanted = options.wants_page(), options.transforms == "on", options.names == "kind", kind
    outputs = prepare_outputs(options.output, image_name(inputs.fixed), given, *wanted)
    device = choose_device(options.device, report)
    report.set(fixed=inputs.fixed.name, moving=inputs.moving.name, weights_sha256=weights_sha256, device=str(device))

    with report.timed("read"):
        fixed_image, moving_image = read_image(inputs.fixed), read_image(inputs.moving)
    with (
        report.timed("lungs"),
        mask_file(options.fixed_lobes, inputs.fixed_mask) as fixed_mask,
        mask_file(options.moving_lobes, inputs.moving_mask) as moving_mask,
    ):
        fixed, moving = find_both_lungs(fixed_image, fixed_mask, moving_image, moving_mask)
    for remark in (*fixed.image.remarks, *moving.image.remarks):
        report.warn(remark)
    report.set(grids={"fixed": asdict(fixed_image.grid), "moving": asdict(moving_image.grid)})
    # the images have another axis order than the subjects, which are copies: the images are freed here
    return Case(options, outputs, report, device, fixed, moving, fixed_image.grid, layout)


def compute(case: Case, weights: LoadedCascade) -> Computed:
    """Register the two scans of a case."""
    options, insist = case.options, case.options.device == "cuda"
    result = register(case.fixed, case.moving, weights, options.refine, case.device, case.report, insist)
    return Computed(case, result)


def write(computed: Computed) -> None:
    """Write the results of a computed case."""
    case, result = computed
    also = lung_function(case.options) if case.options.also == "function" else None
    deliver(
        case.outputs, case.grid, result.transform, case.fixed, case.moving, case.layout, case.report,
        case.options.field_grid, result.expected, also,
    )  # fmt: skip


def lung_function(options: Options) -> Callable[[Path, Pair, Report], str]:
    """The function that ``--also function`` asks for; it is imported only then."""
    from .function.deliver import also_function

    return lambda folder, pair, report: also_function(folder, pair, (options.fixed_lobes, options.moving_lobes), report)

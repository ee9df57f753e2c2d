"""Registers two lung CT scans: /input → /output. Exit code 0: done; 2: bad input, a sentence says what; 1: a fault.

Once (`python -m algorithm`), or at each request (`python -m algorithm serve`).
"""

import sys
from dataclasses import asdict

from .deliver import deliver
from .errors import exit_code, stopped_by_signals
from .images import read_image
from .interface import field_layout, image_kind, image_name, prepare_outputs, withdraw
from .options import Options, parse, parse_serve
from .prepare import subjects
from .registration import choose_device, register
from .report import Report
from .segmentations import mask_file
from .serve import serve
from .weights import LoadedCascade, find_weights, load_cascade


def run(options: Options, weights: LoadedCascade) -> None:
    """One case, from files to files."""
    report = Report(options.steps())
    inputs = options.inputs()
    given = (*inputs.paths(), *options.lobes())
    layout = field_layout(options.field_layout, inputs)
    kind = image_kind(options.format, inputs.fixed, layout)
    wanted = options.wants_page(), options.transforms == "on", options.names == "kind", kind
    outputs = prepare_outputs(options.output, image_name(inputs.fixed), given, *wanted)
    device = choose_device(options.device, report)
    report.set(fixed=inputs.fixed.name, moving=inputs.moving.name, weights_sha256=weights.sha256, device=str(device))

    with report.timed("read"):
        fixed_image, moving_image = read_image(inputs.fixed), read_image(inputs.moving)
    with (
        report.timed("lungs"),
        mask_file(options.fixed_lobes, inputs.fixed_mask) as fixed_mask,
        mask_file(options.moving_lobes, inputs.moving_mask) as moving_mask,
    ):
        fixed, moving = subjects(fixed_image, fixed_mask, moving_image, moving_mask)
    for remark in (*fixed.image.remarks, *moving.image.remarks):
        report.warn(remark)
    report.set(grids={"fixed": asdict(fixed_image.grid), "moving": asdict(moving_image.grid)})
    grid = fixed_image.grid
    del fixed_image, moving_image  # stored in another order than the subjects', they are copies
    insist = options.device == "cuda"
    transform, expected = register(fixed, moving, weights, options.refine, device, report, insist)
    deliver(outputs, grid, transform, fixed, moving, layout, report, options.field_grid, expected)


def run_once(options: Options) -> None:
    """One case, in place of the results of an earlier one."""
    with stopped_by_signals():
        withdraw(options.output, options.on_platform(), options.sources())
        run(options, load_cascade(find_weights(options.weights)))


def run_on_request(arguments: list[str], program: str = "python -m algorithm serve") -> None:
    """Cases from the same folder, refilled in between; the model is loaded once."""
    options, port, host = parse_serve(arguments, program)
    weights = load_cascade(find_weights(options.weights))
    choose_device(options.device, Report())  # a GPU is woken up before the first case

    def case() -> None:
        withdraw(options.output, True, options.sources())
        run(options, weights)

    serve(case, port, host)


def main() -> int:
    """Runs the command line; the exit code."""
    if sys.argv[1:2] == ["serve"]:
        return exit_code(lambda: run_on_request(sys.argv[2:]))
    return exit_code(lambda: run_once(parse()))


if __name__ == "__main__":
    sys.exit(main())

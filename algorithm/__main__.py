"""Registers two lung CT scans: /input → /output. Exit code 0: done; 2: bad input, a sentence says what; 1: a fault."""

import sys

from algorithm.deliver import deliver
from algorithm.errors import exit_code
from algorithm.images import read_image
from algorithm.interface import field_layout, image_name, prepare_outputs
from algorithm.options import Options, parse
from algorithm.prepare import subject
from algorithm.register import choose_device, register
from algorithm.report import Report
from algorithm.weights import find_weights, load_cascade


def run(options: Options) -> None:
    """One case, from files to files."""
    report = Report()
    inputs = options.inputs()
    outputs = prepare_outputs(options.output, image_name(inputs.fixed))
    weights = load_cascade(find_weights(options.weights))
    device = choose_device(options.device, report)
    report.set(fixed=inputs.fixed.name, moving=inputs.moving.name, weights_sha256=weights.sha256, device=str(device))

    with report.timed("read"):
        fixed_image, moving_image = read_image(inputs.fixed), read_image(inputs.moving)
    with report.timed("lungs"):
        fixed, moving = subject(fixed_image, inputs.fixed_mask), subject(moving_image, inputs.moving_mask)
    grid, layout = fixed_image.grid, field_layout(options.field_layout, inputs)
    del fixed_image, moving_image  # stored in another order than the subjects', they are copies
    transform = register(fixed, moving, weights.cascade, options.refine, device, report)
    deliver(outputs, grid, transform, fixed, moving, layout, report)


def main() -> int:
    """Runs the command line; the exit code."""
    return exit_code(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())

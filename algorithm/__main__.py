"""Registers two lung CT scans: /input → /output. Exit code 0: done; 2: bad input, a sentence says what; 1: a fault."""

import logging
import sys

from algorithm.errors import InputError
from algorithm.images import canonical, read_image, write_field, write_image_slabs
from algorithm.interface import field_layout, image_name, prepare_outputs, sole_image, write_results
from algorithm.options import Options, parse
from algorithm.register import choose_device, given_lungs, register
from algorithm.report import Report
from algorithm.weights import find_weights, load_cascade

log = logging.getLogger("algorithm")


def run(options: Options) -> None:
    """One case, from files to files."""
    report = Report()
    inputs = options.inputs()
    outputs = prepare_outputs(options.output, image_name(inputs.fixed))
    weights = load_cascade(find_weights(options.weights))
    device = choose_device(options.device, report)
    report.set(fixed=inputs.fixed.name, moving=inputs.moving.name, weights_sha256=weights.sha256, device=str(device))

    with report.timed("read"):
        fixed, moving = read_image(inputs.fixed), read_image(inputs.moving)
        masks = given_lungs(inputs.fixed_mask, fixed), given_lungs(inputs.moving_mask, moving)
    transform = register(canonical(fixed), canonical(moving), masks, weights.cascade, device, report)
    outputs.results.unlink(missing_ok=True)  # that of an earlier run: it comes last, and says that all is there
    with report.timed("write field"), sole_image(outputs.displacement_field) as path:
        write_field(path, fixed.grid, transform.field_slabs(fixed.grid), field_layout(options.field_layout, inputs))
    with report.timed("write warped"), sole_image(outputs.warped_moving) as path:
        write_image_slabs(path, fixed.grid, transform.warped_slabs(moving, fixed.grid), moving.voxels.dtype)
    write_results(outputs.results, report.to_dict())
    log.info("done: %s", outputs.displacement_field)


def main() -> int:
    """Runs the command line; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        run(parse())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

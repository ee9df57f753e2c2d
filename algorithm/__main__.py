"""Registers two lung CT scans: /input → /output. Exit code 0: done; 2: bad input, with a sentence; 1: a fault.

It runs once (`python -m algorithm`), or at each request (`python -m algorithm serve`).
"""

import sys

from .cascade.weights import find_weights, load_cascade
from .case import run
from .devices import choose_device
from .errors import exit_code, stopped_by_signals
from .options import Options, parse, parse_serve
from .report import Report
from .results.outputs import withdraw
from .serve import serve


def run_once(options: Options) -> None:
    """Run one case; its results replace those of an earlier case."""
    with stopped_by_signals():
        withdraw(options.output, options.on_platform(), options.sources())
        run(options, load_cascade(find_weights(options.weights)))


def run_on_request(arguments: list[str], program: str = "python -m algorithm serve") -> None:
    """Run cases from the same folder, which is refilled in between; the model is loaded once."""
    options, port, host = parse_serve(arguments, program)
    weights = load_cascade(find_weights(options.weights))
    choose_device(options.device, Report())  # initialises a GPU before the first case

    def case() -> None:
        withdraw(options.output, True, options.sources())
        run(options, weights)

    serve(case, port, host)


def main() -> int:
    """Run the command line; returns the exit code."""
    if sys.argv[1:2] == ["serve"]:
        return exit_code(lambda: run_on_request(sys.argv[2:]))
    return exit_code(lambda: run_once(parse()))


if __name__ == "__main__":
    sys.exit(main())

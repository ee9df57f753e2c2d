"""Evaluates displacement fields: /input → /output/metrics.json. Exit code 0: done; 2: bad input; 1: a fault."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from .cases import Case, find_cases
from .errors import InputError, exit_code
from .evaluate import evaluate
from .tables import RESULTS, prepare_folder

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Evaluate all cases, from input files to output files."""
    cases = find_cases(options.input, options.ground_truth)
    prepare_folder(options.output, RESULTS)
    metrics, landmarks = evaluate(cases, options.output, options.workers)
    if options.report:
        write_report(metrics, landmarks, cases, options.output, options.images)
    conclude(metrics)


def write_report(
    metrics: dict[str, Any], landmarks: Any, cases: list[Case], out: Path, images: Path | None = None
) -> None:
    """Write the page. An error in a picture does not lose the figures."""
    try:
        from .report import write_page  # here, or each worker would wait for matplotlib

        write_page(metrics, landmarks, cases, out, images)
    except Exception as error:
        log.exception("report.html")
        print(f"report.html could not be made ({type(error).__name__}); the figures are complete.", file=sys.stderr)


def conclude(metrics: dict[str, Any]) -> None:
    """Print to stderr how many cases failed; InputError if all failed."""
    failed = [result for result in metrics["results"] if result["error"]]
    if not failed:
        return
    sentence = f"{len(failed)} of {len(metrics['results'])} cases failed; {failed[0]['case']}: {failed[0]['error']}"
    if len(failed) == len(metrics["results"]):
        raise InputError(sentence)
    print(sentence, file=sys.stderr)


def parse(arguments: list[str] | None = None, program: str = "python -m evaluation") -> argparse.Namespace:
    """Parse the command line; wrong arguments exit with code 2 and one sentence."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    truth = Path("/opt/ml/input/data/ground_truth")
    parser.add_argument("--input", type=Path, default=Path("/input"), help="predictions.json, or a field per case")
    parser.add_argument("--ground-truth", type=Path, default=truth, help=f"a folder per case (default: {truth})")
    parser.add_argument("--output", type=Path, default=Path("/output"), help="folder for the results")
    parser.add_argument("--workers", type=_positive, help="cases at a time (default: as cores and memory allow)")
    parser.add_argument("--images", type=Path, help="folder with <case>/fixed.mha and moving.mha, for the pictures")
    parser.add_argument("--no-report", dest="report", action="store_false", help="no report.html")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def main(arguments: list[str] | None = None, program: str = "python -m evaluation") -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return exit_code(lambda: run(parse(arguments, program)))


if __name__ == "__main__":
    sys.exit(main())

"""The tables and figures of Hering et al. 2021, the paper's figures beside ours: ``python -m reproduce table5 ...``."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, get_args

from cyclopts import App, CycloptsError, Parameter

from algorithm.errors import InputError, exit_code
from evaluation.errors import InputError as EvaluationError

What = Literal["table1", "table2", "table3", "table4", "table5", "figure5", "figure6", "figure7", "figure8"]
EXAMPLES = """
Examples:

python -m reproduce table5 --pairs pairs --out reproduced

python -m reproduce table2 figure7 --pairs pairs/dirlab4dct_* pairs/copd_like_* --out reproduced --ablation ablation
"""

app = App(
    name="python -m reproduce",
    help="Makes tables and figures of Hering et al. 2021, the paper's figures and ours side by side.",
    help_epilogue=EXAMPLES,
    help_format="plaintext",
    version_flags=(),
)


@app.default
def reproduce(
    *what: Annotated[What, Parameter(help="tables and figures, any number")],
    pairs: Annotated[
        list[Path],
        Parameter(help="folders of pairs, or pairs: folders with fixed.mha and moving.mha", consume_multiple=True),
    ],
    out: Annotated[Path, Parameter(help="folder for the pages, and for the registrations, which are used again")],
    device: Annotated[Literal["auto", "cuda", "cpu"], Parameter(help="as lungreg has it")] = "auto",
    weights: Annotated[Path | None, Parameter(help="of the cascade (default: the bundled ones)")] = None,
    ablation: Annotated[Path | None, Parameter(help="what training.ablation wrote: table2 and figure7")] = None,
) -> None:
    """Make tables and figures."""
    from evaluation.tables import prepare_folder

    from .given import Given, NoPairsError
    from .page import write_page
    from .pairs import find_pairs
    from .runs import Runs

    if not what:
        raise InputError(f"nothing to make was named, expected some of {', '.join(get_args(What))}")
    prepare_folder(out)
    given = Given(find_pairs(pairs), Runs(out.resolve(), device, weights), ablation)
    skipped = []
    for name in what:
        try:
            page = import_module(f".{name}", __package__).make(given)
        except NoPairsError as error:
            skipped.append(f"{name}: {error}")
            print(f"Skipped {skipped[-1]}.")
            continue
        print(f"The page to look at is {write_page(out / name, page)}.")
    if len(skipped) == len(what):
        raise InputError(skipped[-1])


def run(arguments: Sequence[str]) -> None:
    """Runs the command line; InputError for one that is wrong."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise InputError(f"reproduce: {' '.join(str(error).split())} See python -m reproduce --help.") from error
    except EvaluationError as error:
        raise InputError(str(error)) from error


def main() -> int:
    """The entry point; the exit code."""
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

"""The command ``lungreg``: registers two scans and works with results.

Parameters are those of `Options`, with the same help texts. Each command imports its libraries when it is called, so
that ``--help`` and shell completion are fast.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from . import __version__
from .cohort.command import cohort, cohort_step, cohort_table
from .errors import InputError, exit_code, stopped_by_signals
from .evaluating import evaluation_module
from .function.command import EXAMPLES as FUNCTION
from .function.command import function
from .options import HELP, Also, Device, FieldGrid, FieldLayout, Format, Names, Options, Page, Refine, Switch
from .radiotherapy.command import EXAMPLES as DICOM
from .radiotherapy.command import dicom
from .tools.match_command import EXAMPLES as MATCH
from .tools.match_command import match
from .tools.sequence_command import EXAMPLES as SEQUENCE
from .tools.sequence_command import sequence

EXAMPLES = """
Examples:

lungreg inspiration.nii.gz expiration.nii.gz result

lungreg --refine fast --device cpu fixed.mha moving.mha result

lungreg fixed_dicom_folder moving_dicom_folder result
"""

POINTS = """
Map a nodule of the earlier scan, which was the moving one, into the later scan:

lungreg points result nodule.fcsv nodule_now.fcsv --from moving
"""

APPLY = """
Map the lobes of the moving scan onto the fixed one, and a surface of the fixed scan onto the moving one:

lungreg apply result lobes.mha out.mha --onto fixed --interpolation nearest

lungreg apply result vessels.stl vessels_on_moving.stl --onto moving
"""

app = App(
    name="lungreg",
    help="Registers CT scans of the lungs: FIXED MOVING OUT. Other commands work with the result.",
    help_epilogue=EXAMPLES,
    help_format="plaintext",
    version=__version__,
    version_format="plaintext",
)
app.register_install_completion_command("--install-completion", help="Completion for bash, zsh or fish.")

Scan = Literal["fixed", "moving"]
Interpolation = Literal["linear", "bspline", "nearest", "majority"]
Arguments = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
"""Arguments of a command that passes them on unchanged, including --help."""


def _told(name: str) -> Parameter:
    """The parameter for an option, with its help text."""
    return Parameter(name=f"--{name.replace('_', '-')}", help=HELP[name], negative=())


@app.default
def register(
    fixed: Annotated[Path, Parameter(help="the fixed image, a file or the folder of a DICOM series")],
    moving: Annotated[Path, Parameter(help="the moving image, which is warped; a file or such a folder")],
    out: Annotated[Path, Parameter(help=HELP["output"])],
    /,
    *,
    refine: Annotated[Refine, _told("refine")] = Options.refine,
    device: Annotated[Device, _told("device")] = Options.device,
    fixed_mask: Annotated[Path | None, _told("fixed_mask")] = None,
    moving_mask: Annotated[Path | None, _told("moving_mask")] = None,
    fixed_lobes: Annotated[Path | None, _told("fixed_lobes")] = None,
    moving_lobes: Annotated[Path | None, _told("moving_lobes")] = None,
    weights: Annotated[Path | None, _told("weights")] = None,
    field_layout: Annotated[FieldLayout, _told("field_layout")] = Options.field_layout,
    field_grid: Annotated[FieldGrid, _told("field_grid")] = Options.field_grid,
    format: Annotated[Format, _told("format")] = "auto",
    names: Annotated[Names, _told("names")] = "kind",
    transforms: Annotated[Switch, _told("transforms")] = "on",
    report: Annotated[Page, _told("report")] = Options.report,
    also: Annotated[Also, _told("also")] = Options.also,
) -> None:
    """Register two scans: the displacement field, the warped moving image and results.json are written into OUT."""
    from .__main__ import run_once

    given = locals()
    _check_there(fixed, moving)
    _check_folder(out)
    settings = {entry.name: given[entry.name] for entry in fields(Options) if entry.name in given}
    run_once(Options(**settings, output=out))
    print(f"The results lie in {out}.")


def _check_there(*paths: Path) -> None:
    """InputError for a path that does not exist, before large libraries are loaded."""
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise InputError(
                f"{path}: there is no such file or folder, nor a command of that name, expected FIXED MOVING OUT, or "
                f"one of {', '.join(name for name in app if not name.startswith('-'))}"
            )


def _check_folder(out: Path) -> None:
    """InputError if OUT is a file, or has the name of an image file."""
    from imagefiles import ending

    if out.is_file() or (ending(out) is not None and not out.exists()):
        raise InputError(f"{out}: is a file's name, expected that of a folder: several files are written there")


@app.command(help_epilogue=POINTS)
def points(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    points_in: Annotated[Path, Parameter(name="IN", help=".csv (columns x, y, z), .fcsv, .mrk.json, .vtk or .stl")],
    points_out: Annotated[Path, Parameter(name="OUT", help="a new file of the same kind")],
    /,
    *,
    from_: Annotated[Scan, Parameter(name="--from", help="the scan that the points in IN belong to")],
    ras: Annotated[
        bool, Parameter(help="a file that does not name its coordinate system is in RAS, not LPS", negative=())
    ] = False,
    overwrite: Annotated[bool, Parameter(help="replace OUT if it exists", negative=())] = False,
) -> None:
    """Map points of one scan to their positions in the other scan.

    CSV tables get the columns in_lungs (whether the point lies in the lungs of its own scan), jacobian (volume in the
    other scan divided by volume in this one) and expected_error_mm (expected error of the new position); all other
    columns stay unchanged. In files of 3D Slicer, these values are written into empty descriptions.
    """
    from .results.points import map_points

    print(map_points(result, points_in, points_out, from_, ras, overwrite))


@app.command(help_epilogue=APPLY, usage="Usage: lungreg apply RESULT IN... OUT --onto fixed|moving [OPTIONS]\n")
def apply(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    first: Annotated[Path, Parameter(name="IN", help="image, label map, surface (.vtk, .stl) or points; any number")],
    /,
    *more: Annotated[Path, Parameter(name="OUT", help="a new file; or a folder, for any number of results")],
    onto: Annotated[Scan, Parameter(help="the scan onto which IN is mapped; IN belongs to the other scan")],
    interpolation: Annotated[Interpolation, Parameter(help="nearest and majority are for label maps")] = "linear",
    reference: Annotated[Path | None, Parameter(help="an image whose grid the result takes")] = None,
    background: Annotated[float | None, Parameter(help="value outside IN (default: -1000 for CT, otherwise 0)")] = None,
    ras: Annotated[
        bool, Parameter(help="files that do not name their coordinate system are in RAS", negative=())
    ] = False,
    overwrite: Annotated[bool, Parameter(help="replace results that exist", negative=())] = False,
) -> None:
    """Map images, label maps and surfaces of one scan onto the other."""
    from .results.apply import Applied
    from .results.apply import apply as apply_to

    if not more:
        raise InputError("lungreg apply: OUT is missing, expected RESULT IN... OUT")
    how = Applied(onto, interpolation, reference, background, ras)
    for sentence in apply_to(result, [first, *more[:-1]], more[-1], how, overwrite):
        print(sentence)


@app.command
def lungs(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    out: Annotated[Path, Parameter(help="a new file for the label map: .mha, .nii.gz, .nrrd")],
    /,
    *,
    of: Annotated[Scan, Parameter(help="the scan whose lungs are written")],
    reference: Annotated[Path | None, Parameter(help="an image whose grid the result takes")] = None,
    overwrite: Annotated[bool, Parameter(help="replace OUT if it exists", negative=())] = False,
) -> None:
    """Write the lungs of a scan as a label map: 1 is the patient's right lung, 2 the left one."""
    from .results.apply import write_lungs

    print(write_lungs(result, out, of, reference, overwrite))


@app.command
def report(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    /,
    *,
    fixed: Annotated[Path | None, Parameter(help="the fixed image, if its path has changed")] = None,
    moving: Annotated[Path | None, Parameter(help="the moving image, if its path has changed")] = None,
) -> None:
    """Write report.html, a page with pictures and figures, into the folder of an existing result."""
    from .pages.again import write_page_again

    print(f"The page to look at is {write_page_again(result, fixed, moving)}.")


@app.command
def slicer(
    result: Annotated[Path, Parameter(help="the folder with the results of a registration")],
    out: Annotated[Path | None, Parameter(help="a new file, .py (default: open_in_slicer.py in that folder)")] = None,
    /,
    *,
    fixed: Annotated[Path | None, Parameter(help="the fixed image, if its path has changed")] = None,
    moving: Annotated[Path | None, Parameter(help="the moving image, if its path has changed")] = None,
    overwrite: Annotated[bool, Parameter(help="replace OUT if it exists", negative=())] = False,
) -> None:
    """Write a script that opens scans, results and transform in 3D Slicer: Slicer --python-script open_in_slicer.py"""
    from .tools.slicer import write_script

    print(write_script(result, out, fixed, moving, overwrite))


app.command(function, help_epilogue=FUNCTION)
app.command(match, help_epilogue=MATCH)
app.command(dicom, help_epilogue=DICOM)
app.command(sequence, name="4d", help_epilogue=SEQUENCE)


@app.command(help_flags=(), version_flags=())
def serve(*arguments: Arguments) -> None:
    """Start a server that registers --input into --output at each POST /invoke and keeps the model loaded."""
    from .__main__ import run_on_request

    run_on_request(list(arguments), "lungreg serve")


@app.command(help_flags=(), version_flags=())
def evaluate(*arguments: Arguments) -> int:
    """Measure landmark errors, overlap of lobes and folding of displacement fields from any program."""
    return int(evaluation_module("__main__").main(list(arguments), "lungreg evaluate"))


@app.command(help_flags=(), version_flags=())
def convert(*arguments: Arguments) -> int:
    """Convert a displacement field or transform to another format."""
    return int(evaluation_module("convert").main(list(arguments), "lungreg convert"))


app.command(cohort)
app.command(cohort_table)
app.command(cohort_step, show=False)


def run(arguments: Sequence[str]) -> None:
    """Run the command line; InputError for wrong arguments, SystemExit with the exit code if the command returns
    one."""
    try:
        with stopped_by_signals():
            code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        raise InputError(f"lungreg: {_misspelt(arguments) or _in_words(error)} See lungreg --help.") from error
    if code:
        sys.exit(code)


def _in_words(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected arguments: {' '.join(error.unused_tokens or ())}."
    return " ".join(str(error).split())


def _misspelt(arguments: Sequence[str]) -> str:
    """A sentence if the first argument is nearly a command, else empty: it was taken for the fixed image."""
    commands = [name for name in app if not name.startswith("-")]
    word = arguments[0] if arguments else ""
    near = get_close_matches(word, commands, 1)
    return "" if word in commands or Path(word).exists() or not near else f"No command {word!r}, perhaps {near[0]!r}."


def main() -> int:
    """The entry point; returns the exit code."""
    return exit_code(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())

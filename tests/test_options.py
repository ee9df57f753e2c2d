"""The command line: every field of Options is an option; what is wrong is said in one sentence."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from algorithm import __version__
from algorithm.errors import InputError
from algorithm.files.inputs import Inputs
from algorithm.options import HELP, Options, parse
from tests.support.running import call_main


def test_without_options_it_runs_as_the_platform_wants_it() -> None:
    options = parse([])
    assert options == Options()
    assert (options.input, options.output, options.device) == (Path("/input"), Path("/output"), "auto")


def test_every_field_is_an_option_with_a_help_text() -> None:
    assert {entry.name for entry in fields(Options)} == HELP.keys()
    choices = ("device", "refine", "field_layout", "field_grid", "names", "transforms", "report", "also", "format")
    paths = {name: f"/some/{name}" for name in HELP if name not in choices}
    arguments = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    arguments += ["--device", "cpu", "--refine=off", "--field-layout", "itk", "--field-grid=network"]
    options = parse([*arguments, "--names=kind", "--transforms=on", "--report=on", "--also=function", "--format=nrrd"])
    assert {name: str(getattr(options, name)) for name in paths} == paths
    expected = ("cpu", "off", "itk", "network", "kind", "on", "on", "function", "nrrd")
    assert tuple(getattr(options, name) for name in choices) == expected


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nonsense"], "--nonsense"),
        (["scan.mha"], "scan.mha"),
        (["--refine", "nonsense"], "--refine: invalid choice: 'nonsense'"),
        (["--device=nonsense"], "--device: invalid choice: 'nonsense'"),
        (["--field-layout=ants"], "--field-layout: invalid choice: 'ants'"),
        (["--field-grid=moving"], "--field-grid: invalid choice: 'moving'"),
        (["--report=yes"], "--report: invalid choice: 'yes'"),
        (["--output"], "--output"),
        (["--out=x"], "--out=x"),  # no abbreviations: they would change their meaning with the next option
        (["--fixed=a.mha"], "--moving is missing"),
        (["--moving=a.mha"], "--fixed is missing"),
        (["--fixed-mask=a.mha"], "--fixed-mask"),
        (["--moving-lobes=a.mha"], "lobes"),
        (["--fixed=a.mha", "--moving=b.mha", "--fixed-mask=c.mha", "--fixed-lobes=d.mha"], "a mask and lobes"),
    ],
)
def test_wrong_arguments(capfd: pytest.CaptureFixture[str], arguments: list[str], names: str) -> None:
    assert call_main(*arguments) == 2
    message = capfd.readouterr().err
    assert names in message.splitlines()[-1]
    assert "Traceback" not in message


@pytest.mark.parametrize(("option", "says"), [("--version", __version__), ("--help", "--field-layout")])
def test_information(capfd: pytest.CaptureFixture[str], option: str, says: str) -> None:
    assert call_main(option) == 0
    printed = capfd.readouterr()
    assert says in printed.out and printed.err == ""


def test_help_says_every_default_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert call_main("--help") == 0
    text = re.sub(r"\s+", " ", capfd.readouterr().out)
    for default in ("/input", "/output", "auto", "full"):
        assert f"(default: {default})" in text


def test_the_page_is_left_out_on_the_platform_and_where_it_is_not_wanted(tmp_path: Path) -> None:
    assert Options(input=tmp_path).wants_page() and Options(input=tmp_path).steps()[-1] == "write page"
    assert not Options(input=tmp_path, report="off").wants_page()
    (tmp_path / "inputs.json").touch()
    assert not Options(input=tmp_path).wants_page() and "write page" not in Options(input=tmp_path).steps()
    assert Options(input=tmp_path, report="on").wants_page()


def test_files_from_options() -> None:
    fixed, moving, mask = Path("a.mha"), Path("b.nii"), Path("c.mha")
    assert Options(fixed=fixed, moving=moving).inputs() == Inputs(fixed, moving)
    assert Options(fixed=fixed, moving=moving, moving_mask=mask).inputs() == Inputs(fixed, moving, None, mask)


def test_masks_alone_are_refused(tmp_path: Path) -> None:
    """Those of the input folder have their own names: a mixture would be a mistake."""
    with pytest.raises(InputError, match="--fixed-mask"):
        Options(input=tmp_path, moving_mask=Path("c.mha")).inputs()

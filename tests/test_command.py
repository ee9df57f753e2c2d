"""The command ``lungreg``: what it understands, what it refuses, and that it is quick to say so."""

import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from algorithm import __main__ as container
from algorithm import __version__, command
from algorithm.options import Options
from tests.support.running import lungreg

ROOT = Path(__file__).parent.parent


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options that a registration was called with; none is done."""
    calls: list[Options] = []
    monkeypatch.setattr(container, "run_once", calls.append)
    return calls


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Path, Path]:
    fixed, moving = tmp_path / "a fixed.mha", tmp_path / "-moving.nii.gz"
    fixed.touch()
    moving.touch()
    return fixed, moving


def test_without_options_the_defaults_are_those_of_the_container_but_for_what_is_convenient(
    taken: list[Options], scans: tuple[Path, Path]
) -> None:
    assert lungreg(*scans, "out") == 0
    assert taken == [
        Options(fixed=scans[0], moving=scans[1], output=Path("out"), format="auto", names="kind", transforms="on")
    ]


def test_every_option_of_the_container_but_its_folders_is_understood(
    taken: list[Options], scans: tuple[Path, Path]
) -> None:
    values = {
        "fixed_mask": Path("m.mha"),
        "moving_mask": Path("-n.mha"),
        "fixed_lobes": Path("l"),
        "moving_lobes": Path("k.nii.gz"),
        "weights": Path("w"),
        "device": "cpu",
        "refine": "off",
        "field_layout": "grand-challenge",
        "field_grid": "network",
        "format": "nii.gz",
        "names": "case",
        "transforms": "off",
        "report": "off",
        "also": "function",
    }
    assert {entry.name for entry in fields(Options)} - values.keys() == {"input", "output", "fixed", "moving"}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    for arguments in ([*options, *scans, "out"], [*scans, "out", *options], [*options, "--", *scans, "out"]):
        assert lungreg(*arguments) == 0
    expected = Options(fixed=scans[0], moving=scans[1], output=Path("out"), **values)  # type: ignore[arg-type]
    assert taken == [expected] * 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "FIXED"),
        (["FIXED"], "MOVING"),
        (["FIXED", "MOVING"], "OUT"),
        (["FIXED", "MOVING", "out", "more"], "Unexpected arguments: more."),
        (["FIXED", "MOVING", "out", "--nonsense"], "--nonsense"),
        (["FIXED", "MOVING", "out", "-r", "off"], "-r"),
        (["FIXED", "MOVING", "out", "--refine"], "--refine"),
        (["FIXED", "MOVING", "out", "--refine=most"], '"off", "fast", "full"'),
        (["FIXED", "MOVING", "warped.nii.gz"], "warped.nii.gz: is a file's name"),
        (["FIXED", "nowhere.mha", "out"], "nowhere.mha: there is no such file"),
        (["pionts", "MOVING", "out"], "nor a command of that name"),
        (["pionts", "out"], "No command 'pionts', perhaps 'points'."),
        (["evaluate", "--nonsense"], "--nonsense"),
        (["convert", "nowhere.mha", "x.nrrd"], "nowhere.mha"),
        (["serve", "--port=nonsense"], "--port"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    taken: list[Options],
    scans: tuple[Path, Path],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(scans[0].parent)
    names = {"FIXED": str(scans[0]), "MOVING": str(scans[1])}
    assert lungreg(*(names.get(argument, argument) for argument in arguments)) == 2
    said = capfd.readouterr()
    assert says in said.err.splitlines()[-1] and "Traceback" not in said.err
    assert (taken, said.out) == ([], "")
    assert sorted(path.name for path in scans[0].parent.iterdir()) == ["-moving.nii.gz", "a fixed.mha"]


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["convert", "--help"], ["serve", "--help"]])
def test_help(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert lungreg(*arguments) == 0
    said = capfd.readouterr()
    assert "lungreg" in said.out and "--" in said.out and said.err == ""


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert lungreg("--version") == 0
    assert capfd.readouterr().out == f"{__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from algorithm.command import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: pass\n"
    code += "print(sorted({'torch', 'SimpleITK', 'numpy', 'scipy', 'numba', 'openvino'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_interrupt_ends_it_without_a_traceback() -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nimport algorithm.__main__\nfrom algorithm.command import main\n"
        "def wait(options): print('waiting', flush=True); time.sleep(60)\n"
        "algorithm.__main__.run_once = wait\nsys.argv[1:] = ['LICENSE', 'LICENSE', 'out']\nsys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "stopped by SIGINT before the end\n"


def test_a_shell_can_complete_it(tmp_path: Path) -> None:
    script = command.app.generate_completion(shell="bash")
    assert "--refine" in script and "evaluate" in script


# --- the package -----------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(*files: str) -> dict[str, str]:
    """Versions by name."""
    lines = (line for name in files for line in (ROOT / name).read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_package_needs_what_was_tested() -> None:
    versions = pinned("requirements.txt", "evaluation/requirements.txt")
    needed = {requirement.name: requirement for requirement in map(Requirement, PROJECT["project"]["dependencies"])}
    assert needed.keys() == versions.keys()
    assert [name for name, version in versions.items() if version not in needed[name].specifier] == []


def test_every_package_of_the_algorithm_and_the_evaluation_is_in_the_wheel() -> None:
    tool = PROJECT["tool"]["setuptools"]
    folders = {tool["package-dir"].get(name, name) for name in tool["packages"]} | {
        f"algorithm/{name.removeprefix('lungreg.').replace('.', '/')}"
        for name in tool["packages"]
        if name.startswith("lungreg.")
    }
    for top in ("algorithm", "evaluation", "imagefiles", "resultpages"):
        found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / top).rglob("*.py")}
        assert found <= folders

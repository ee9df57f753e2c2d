"""register.sh, setup_venv.sh, build.sh, with stand-ins for Python and docker that write down how they were called."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from algorithm import __version__
from algorithm.options import parse_serve

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PYTHON = """#!/bin/bash
printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  *"-m pip install"*) exit "${PIP_EXIT:-0}";;
  *"-m phantom"*) mkdir -p "${!#}";;
  *"-m algorithm"*) exit "${ALGORITHM_EXIT:-0}";;
esac
"""
DOCKER = """#!/bin/bash
printf '%s|' "$@" >>"$CALLS"; echo >>"$CALLS"
"""


class Sandbox:
    """A copy of the scripts in a folder whose name holds a space, where `python3.11` and `docker` are the stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "the project", folder / "bin", folder / "calls"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("register.sh", "setup_venv.sh", "build.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.root)
        (self.root / "algorithm").mkdir()
        shutil.copy(ROOT / "algorithm" / "__init__.py", self.root / "algorithm")
        for name, content in (("python3.11", PYTHON), ("docker", DOCKER)):
            (self.bin / name).write_text(content)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a script from another folder; `self.calls` are then Python's calls, each a list of arguments."""
        self.calls_file.write_text("")
        path = f"{self.bin}:{os.environ['PATH']}"
        done = subprocess.run(
            [str(self.root / script), *arguments],
            env={**os.environ, "PATH": path, "CALLS": str(self.calls_file), **environment},
            cwd=self.bin,
            capture_output=True,
            text=True,
        )
        self.calls = [line.split("|")[:-1] for line in self.calls_file.read_text().splitlines()]
        return done

    def module_calls(self, module: str) -> list[list[str]]:
        """The arguments of each call of `python ... -m module`."""
        return [call[call.index(module) + 1 :] for call in self.calls if module in call]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["a b.mha", "../c.nii.gz", "out"],
        ["--refine", "off", "--device=cpu", "--", "-a", "b", "c"],
        ["points", "result", "in.csv", "out.csv"],
        ["--help"],
        ["--nonsense"],
    ],
)
def test_register_hands_all_arguments_over(sandbox: Sandbox, arguments: list[str]) -> None:
    done = sandbox.run("register.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert sandbox.module_calls("algorithm.command") == [arguments]
    assert sandbox.module_calls("phantom") == []


def test_register_without_arguments_makes_the_example_once(sandbox: Sandbox) -> None:
    example = sandbox.root / "example"
    files = [f"{example}/fixed.mha", f"{example}/moving.mha", f"{example}/output"]
    for times_made in (1, 0):
        sandbox.run("register.sh")
        assert sandbox.module_calls("algorithm.command") == [files]
        assert len(sandbox.module_calls("phantom")) == times_made


def test_register_sets_up_what_a_command_needs(sandbox: Sandbox) -> None:
    (sandbox.root / "evaluation").mkdir()
    shutil.copy(ROOT / "evaluation" / "requirements.txt", sandbox.root / "evaluation")
    shutil.copy(ROOT / "requirements-cohort.txt", sandbox.root)
    evaluation = ["evaluation/requirements.txt"]
    for command, files in (
        ("points", []),
        ("evaluate", evaluation),
        ("convert", []),
        ("cohort", ["requirements-cohort.txt"]),
        ("cohort-table", []),
    ):
        sandbox.run("register.sh", command)
        installed = [call[-1] for call in sandbox.module_calls("pip") if "install" in call]
        assert [name for name in installed if name != "requirements.txt"] == files


@pytest.mark.parametrize("code", [1, 2, 137])
def test_register_passes_on_the_exit_code(sandbox: Sandbox, code: int) -> None:
    assert sandbox.run("register.sh", "a", "b", "c", ALGORITHM_EXIT=str(code)).returncode == code


def test_setup_installs_once_and_again_after_an_edit(sandbox: Sandbox) -> None:
    assert sandbox.run("setup_venv.sh", "requirements.txt").returncode == 0
    assert len(sandbox.module_calls("venv")) == 1
    assert len(sandbox.module_calls("pip")) == 1
    again = sandbox.run("setup_venv.sh", "requirements.txt")
    assert (sandbox.calls, again.stdout, again.stderr) == ([], "", "")

    sandbox.run("setup_venv.sh", "requirements.txt", "requirements-dev.txt")
    assert [call[-1] for call in sandbox.module_calls("pip") if "install" in call] == ["requirements-dev.txt"]
    with (sandbox.root / "requirements.txt").open("a") as file:
        file.write("# edited\n")
    sandbox.run("setup_venv.sh", "requirements.txt", "requirements-dev.txt")
    assert [call[-1] for call in sandbox.module_calls("pip") if "install" in call] == ["requirements.txt"]
    assert sandbox.module_calls("venv") == []


def test_setup_takes_a_file_in_a_folder(sandbox: Sandbox) -> None:
    (sandbox.root / "evaluation").mkdir()
    (sandbox.root / "evaluation" / "requirements.txt").write_text("numpy\n")
    assert sandbox.run("setup_venv.sh", "evaluation/requirements.txt").returncode == 0
    assert sandbox.run("setup_venv.sh", "evaluation/requirements.txt").returncode == 0
    assert sandbox.calls == []  # the second time there is nothing to do


def test_a_failed_installation_is_tried_again(sandbox: Sandbox) -> None:
    sandbox.run("setup_venv.sh", "requirements.txt")
    original = (sandbox.root / "requirements.txt").read_text()
    (sandbox.root / "requirements.txt").write_text("nonsense\n")
    assert sandbox.run("setup_venv.sh", "requirements.txt", PIP_EXIT="1").returncode != 0
    (sandbox.root / "requirements.txt").write_text(original)  # what stood there may be half replaced by now
    assert sandbox.run("setup_venv.sh", "requirements.txt").returncode == 0
    assert len([call for call in sandbox.module_calls("pip") if "install" in call]) == 1


def test_setup_says_what_is_missing(sandbox: Sandbox) -> None:
    for name in ("python3.11", "python3.12", "python3.13", "python3.14", "python3"):
        (sandbox.bin / name).write_text("#!/bin/bash\necho Python 3.9.2\nexit 1\n")
        (sandbox.bin / name).chmod(0o755)
    done = sandbox.run("setup_venv.sh", "requirements.txt")
    assert done.returncode == 1
    assert "3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "tag", "method"),
    [
        ([], {}, "lung-registration", "exec"),
        (["mine:1"], {"API_METHOD": ""}, "mine:1", "exec"),
        (["mine:1"], {"API_METHOD": "invoke"}, "mine:1", "invoke"),
    ],
)
def test_build_passes_on_tag_and_method(
    sandbox: Sandbox, arguments: list[str], environment: dict[str, str], tag: str, method: str
) -> None:
    done = sandbox.run("build.sh", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    (call,) = sandbox.calls
    assert call[0] == "build" and call[-3:] == ["--tag", tag, "."]
    assert {f"API_METHOD={method}", f"VERSION={__version__}"} <= set(call)


def test_build_refuses_another_method(sandbox: Sandbox) -> None:
    """The platform takes only images whose label is one of the two."""
    done = sandbox.run("build.sh", API_METHOD="server")
    assert (done.returncode, sandbox.calls) == (2, [])
    assert "'server', expected exec or invoke" in done.stderr
    stages = re.findall(
        r"^FROM .* AS api-(\S+)\n(?:.*\n)*?LABEL org.grand-challenge.api-method=(\S+)", DOCKERFILE, re.M
    )
    assert stages == [("exec", "exec"), ("invoke", "invoke")]
    assert DOCKERFILE.rstrip().endswith("FROM api-$API_METHOD")


def test_the_server_of_the_image_can_be_reached_from_outside_it() -> None:
    entry = re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.M)[1]
    arguments = json.loads(entry)
    assert arguments[:4] == ["python", "-m", "algorithm", "serve"]
    assert parse_serve(arguments[4:])[1:] == (4743, "0.0.0.0")

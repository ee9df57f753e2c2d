"""A wheel in a fresh environment, used from another folder: nothing of the repository is found there."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from algorithm import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = ("algorithm", "evaluation", "imagefiles", "weights")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    """From the root folder, without what would lead back to the repository."""
    unset = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [str(argument) for argument in arguments], cwd="/", env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "LICENSE", "README.md", *FOLDERS):
        (source / name).symlink_to(ROOT / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built)
    done = call(sys.executable, "-m", "pip", "wheel", "-q", *options, source)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The programs of an environment with the wheel; what it needs is that of this Python."""
    folder = tmp_path_factory.mktemp("environment")
    assert call(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    done = call(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_the_wheel_holds_weights_and_licence_and_no_more_than_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lungreg", "imagefiles", f"lung_registration-{__version__}.dist-info"}
    bundled = {name for name in names if name.startswith("lungreg/bundled_weights/")}
    assert {name.rpartition("/")[2] for name in bundled} == {"cascade.safetensors", "manifest.json", "README.md"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {f.relative_to(ROOT).as_posix() for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    places = (("evaluation/", "lungreg/evaluation/"), ("algorithm/", "lungreg/"), ("imagefiles/", "imagefiles/"))
    expected = {new + source.removeprefix(old) for source in sources for old, new in places if source.startswith(old)}
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_command_knows_its_version_and_all_commands(environment: Path) -> None:
    done = call(environment / "lungreg", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    for name in ("evaluate", "convert", "serve"):
        done = call(environment / "lungreg", name, "--help")
        assert done.returncode == 0 and f"lungreg {name}" in done.stdout, done.stderr


def test_the_package_finds_its_weights(environment: Path) -> None:
    code = "from lungreg.weights import find_weights, load_cascade; print(load_cascade(find_weights(None)).sha256)"
    done = call(environment / "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "weights" / "manifest.json").read_text()

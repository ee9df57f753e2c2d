"""A wheel in a fresh environment, used from another folder: nothing of the repository is found there."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

from algorithm import __version__

ROOT = Path(__file__).parent.parent
FOLDERS = ("algorithm", "evaluation", "imagefiles", "resultpages", "weights", "workflow")


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
    assert tops == {"lungreg", "imagefiles", "resultpages", f"lung_registration-{__version__}.dist-info"}
    bundled = {name for name in names if name.startswith("lungreg/bundled_weights/")}
    assert {name.rpartition("/")[2] for name in bundled} == {"cascade.safetensors", "manifest.json", "README.md"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {f.relative_to(ROOT).as_posix() for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    renamed = {re.sub("^algorithm/", "lungreg/", re.sub("^evaluation/", "lungreg/evaluation/", f)) for f in sources}
    assert {name for name in names if name.endswith(".py")} == renamed
    assert {"lungreg/workflow/Snakefile", "lungreg/workflow/profiles/slurm/config.yaml"} <= names
    assert {"resultpages/static/style.css", "resultpages/templates/registration.html.j2"} <= names


HELP = """
import sys
from lungreg.command import main
for name in sys.argv[1:]:
    sys.argv = ["lungreg", name, "--help"]
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    assert not code, name
"""
"""A program: the help of the named commands, one after the other."""


def test_the_command_knows_its_version_and_all_commands(environment: Path) -> None:
    done = call(environment / "lungreg", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    names = "points apply report slicer function match 4d dicom evaluate convert serve cohort cohort-table"
    done = call(environment / "python", "-c", HELP, *names.split())
    assert done.returncode == 0 and all(f"lungreg {name}" in done.stdout for name in names.split()), done.stderr


def test_the_package_finds_its_weights(environment: Path) -> None:
    code = (
        "from lungreg.cascade.weights import find_weights, load_cascade; print(load_cascade(find_weights(None)).sha256)"
    )
    done = call(environment / "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (ROOT / "weights" / "manifest.json").read_text()


def test_it_registers_and_all_that_is_done_with_a_result(environment: Path, example: Path, tmp_path: Path) -> None:
    """With the bundled weights; the landmarks of the phantom go to their places, both ways."""

    def lungreg(*arguments: object) -> str:
        done = call(environment / "lungreg", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out, labels, field = tmp_path / "out", tmp_path / "lobes.nii.gz", tmp_path / "field.nii.gz"
    fixed, moving = example / "fixed_landmarks.csv", example / "moving_landmarks.csv"
    lungreg("--refine=off", "--device=cpu", example / "fixed.mha", example / "moving.mha", out)
    before = float(np.linalg.norm(landmarks(fixed) - landmarks(moving), axis=1).mean())
    for of, source, target in (("fixed", fixed, moving), ("moving", moving, fixed)):
        assert f"points of the {of} scan" in lungreg("points", out, source, tmp_path / f"{of}.csv", "--from", of)
        after = np.linalg.norm(landmarks(tmp_path / f"{of}.csv") - landmarks(target), axis=1).mean()
        assert after < before / 2, (of, before, after)  # voxels of 8 mm
    lungreg("apply", out, example / "moving_lobes.mha", labels, "--onto=fixed", "--interpolation=nearest")
    lungreg("convert", out, field, "--inverse")
    code = f"import lungreg; lungreg.load({str(out)!r}).warp_labels({str(example / 'moving_lobes.mha')!r})"
    done = call(environment / "python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert labels.exists() and field.exists()


def landmarks(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 2))

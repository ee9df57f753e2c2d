"""What the user can put right: exit code 2, one sentence on stderr's last line that names it, and nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.cascade.weights import FILE, MANIFEST
from phantom.__main__ import input_files
from phantom.forms import write_input
from tests.support.dicom_series import write_series
from tests.support.refusals import sentence
from tests.support.running import call_main, files_below, pair_options

ROOT = Path(__file__).parent.parent


def refusal(capfd: pytest.CaptureFixture[str], output: Path, *options: str) -> str:
    """The sentence with which the main program refuses the options; nothing is written to ``output``.

    ``capfd`` sees what SimpleITK prints from C++, too.
    """
    before = files_below(output) if output.is_dir() else output.exists()
    assert call_main(*options) == 2
    assert (files_below(output) if output.is_dir() else output.exists()) == before
    return sentence(capfd.readouterr().err)


# --- scans -----------------------------------------------------------------------------------------------------------


def write(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (), vector: bool = False) -> None:
    image = sitk.GetImageFromArray(voxels, isVector=vector)
    image.SetSpacing(spacing or (8.0,) * image.GetDimension())
    sitk.WriteImage(image, str(path))


def constant(hu: int) -> Callable[[Path], None]:
    return lambda path: write(path, np.full((34, 30, 36), hu, dtype=np.int16))


def truncated(path: Path) -> None:
    constant(-500)(path)
    path.write_bytes(path.read_bytes()[:-1000])


def mostly_nan(path: Path) -> None:
    voxels = np.full((34, 30, 36), -500, dtype=np.float32)
    voxels[:20] = np.nan
    write(path, voxels)


def scaled(low: float, high: float) -> Callable[[Path], None]:
    """Air to bone as a chest has them, but not in HU."""
    shares = np.linspace(0, 1, 34 * 30 * 36, dtype=np.float32).reshape(34, 30, 36)
    return lambda path: write(path, low + (high - low) * shares)


def two_dicom_series(path: Path) -> None:
    for number in (1, 2):
        image = sitk.GetImageFromArray(NOISE[:2])
        write_series(path, image, {"0020|000e": f"1.2.{number}"}, f"{number}{{}}.dcm")


NOISE = np.random.default_rng(0).integers(-1000, 200, size=(20, 20, 20), dtype=np.int16)
BAD_SCANS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be opened"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 40), "no readable header"),
    "empty": (lambda path: path.touch(), "no readable header"),
    "an empty folder": (lambda path: path.mkdir(), "no DICOM image"),
    "two DICOM series": (two_dicom_series, "2 DICOM series"),
    "truncated": (truncated, "cannot be read"),
    "2-D": (lambda path: write(path, NOISE[0]), "expected a 3-D image"),
    "vectors": (lambda path: write(path, np.stack([NOISE] * 3, axis=-1), vector=True), "values per voxel"),
    "4-D": (lambda path: write(path, np.stack([NOISE] * 2)), "expected a 3-D image"),
    "air": (constant(-1000), "holds no lung"),
    "water": (constant(0), "holds no lung"),
    "mostly NaN": (mostly_nan, "NaN"),
    "0 to 1": (scaled(0.0, 1.0), "expected Hounsfield units"),
    "0 to 255": (scaled(0.0, 255.0), "expected Hounsfield units"),
    "inverted": (scaled(1000.0, -400.0), "sign"),
    "spacing in metres": (lambda path: write(path, NOISE, (0.008, 0.008, 0.008)), "spacing"),
    "spacing in micrometres": (lambda path: write(path, NOISE, (8000.0, 8000.0, 8000.0)), "spacing"),
    "too small": (lambda path: write(path, NOISE[:8]), "at least 16 voxels"),
}


@pytest.mark.parametrize(
    ("kind", "role"),
    [*((kind, "fixed") for kind in BAD_SCANS), *((kind, "moving") for kind in ("missing", "truncated", "2-D", "air"))],
)
def test_bad_scan(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str], kind: str, role: str
) -> None:
    make, says = BAD_SCANS[kind]
    bad = tmp_path / f"bad {role}.mha"
    make(bad)
    options = pair_options(example, tmp_path / "out", small_weights)
    message = refusal(capfd, tmp_path / "out", *options, f"--{role}={bad}")  # the last option counts
    assert str(bad) in message and says in message


def one_voxel(image: sitk.Image) -> sitk.Image:
    empty = image * 0
    empty[15, 15, 15] = 1
    return empty


def elsewhere(image: sitk.Image) -> sitk.Image:
    image.SetOrigin(np.add(image.GetOrigin(), (0.0, 250.0, 0.0)).tolist())
    return image


@pytest.mark.parametrize("role", ["fixed", "moving"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [(lambda image: image * 0, "no voxel above 0"), (one_voxel, "expected lungs of"), (elsewhere, "lies outside")],
)
def test_bad_mask(
    tmp_path: Path,
    example: Path,
    small_weights: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[sitk.Image], sitk.Image],
    says: str,
    role: str,
) -> None:
    bad = tmp_path / "bad mask.mha"
    sitk.WriteImage(spoil(sitk.ReadImage(str(example / f"{role}_lobes.mha"))), str(bad))
    options = pair_options(example, tmp_path / "out", small_weights)
    message = refusal(capfd, tmp_path / "out", *options, f"--{role}-mask={bad}")
    assert str(bad) in message and says in message


def test_unknown_ending(tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(example / "fixed.mha", tmp_path / "fixed.dcm")
    options = pair_options(example, tmp_path / "out", small_weights)
    message = refusal(capfd, tmp_path / "out", *options, f"--fixed={tmp_path / 'fixed.dcm'}")
    assert "fixed.dcm" in message and ".mha" in message and "folder" in message


def test_files_of_another_program_stay(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "displacement-field").mkdir(parents=True)
    for name in ("results.json", "images/displacement-field/old.mha"):
        (tmp_path / name).write_text("old")
    constant(0)(tmp_path / "water.mha")
    options = pair_options(example, tmp_path, small_weights)
    refusal(capfd, tmp_path, *options, f"--fixed={tmp_path / 'water.mha'}")
    assert (tmp_path / "results.json").read_text() == "old"
    assert (tmp_path / "images/displacement-field/old.mha").read_text() == "old"


@pytest.mark.parametrize("wrong", ["fixed", "weights", "moving is missing"])
def test_a_refused_case_is_not_taken_for_the_one_before(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str], wrong: str
) -> None:
    """Whatever is wrong, results.json goes first. On the command line the images stay until new ones are there."""
    output = tmp_path / "out"
    masks = [f"--{role}-mask={example / f'{role}_lobes.mha'}" for role in ("fixed", "moving")]
    options = [*pair_options(example, output, small_weights), *masks]
    assert call_main(*options) == 0
    images = files_below(output) - {"results.json"}
    assert len(images) == 2
    spoilt = {"fixed": [f"--fixed={tmp_path / 'none.mha'}"], "weights": [f"--weights={tmp_path}"]}
    options = [o for o in options if "--moving=" not in o] if wrong == "moving is missing" else options
    assert call_main(*options, *spoilt.get(wrong, [])) == 2
    assert wrong == "fixed" or wrong in capfd.readouterr().err
    assert files_below(output) == images


def test_a_refused_case_of_the_platform_leaves_nothing_of_the_one_before(
    tmp_path: Path, example: Path, small_weights: Path
) -> None:
    write_input(tmp_path / "input", "socket", input_files(example, True))
    options = [f"--input={tmp_path / 'input'}", f"--output={tmp_path / 'out'}", f"--weights={small_weights}"]
    options.append("--device=cpu")
    assert call_main(*options) == 0
    assert len(files_below(tmp_path / "out")) == 3
    next((tmp_path / "input" / "images" / "fixed").iterdir()).write_text("no image")
    assert call_main(*options) == 2
    assert files_below(tmp_path / "out") == set()


def test_folder_without_a_moving_image(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(example / "fixed.mha", tmp_path / "fixed.mha")
    for source, says in ((tmp_path, "moving"), (tmp_path / "nowhere", "no such folder")):
        options = [f"--input={source}", f"--output={tmp_path / 'out'}", f"--weights={small_weights}"]
        message = refusal(capfd, tmp_path / "out", *options)
        assert str(source) in message and says in message


# --- output, device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["results", "results/below"])
def test_output_that_cannot_be_a_folder(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "results").touch()
    message = refusal(capfd, tmp_path / place, *pair_options(example, tmp_path / place, small_weights))
    assert str(tmp_path / place) in message and "cannot be written" in message


def test_no_gpu(
    tmp_path: Path,
    example: Path,
    small_weights: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = pair_options(example, tmp_path / "out", small_weights)
    assert "--device cuda" in refusal(capfd, tmp_path / "out", *options, "--device=cuda")


# --- weights ---------------------------------------------------------------------------------------------------------


def edited(**changes: object) -> Callable[[Path], None]:
    """Changes entries of the manifest; None takes one out."""

    def edit(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text()) | changes
        (folder / MANIFEST).write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))

    return edit


def altered(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)


BAD_WEIGHTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, MANIFEST),
    "no weights": (lambda folder: (folder / FILE).unlink(), FILE),
    "altered weights": (altered, FILE),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST),
    "no hash": (edited(sha256=None), MANIFEST),
    "another network": (edited(settings={"features": [8], "factors": [1], "network_size": [32, 32, 32]}), FILE),
}
"""The loader has tests of its own; here it is about the sentence and the exit code."""


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    spoil, names = BAD_WEIGHTS[kind]
    folder = shutil.copytree(small_weights, tmp_path / "weights")
    spoil(folder)
    message = refusal(capfd, tmp_path / "out", *pair_options(example, tmp_path / "out", folder))
    assert str(folder) in message and names in message


# --- processes of their own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "water", "unknown option"])
def test_exit_code_and_stderr_of_a_process(tmp_path: Path, example: Path, small_weights: Path, kind: str) -> None:
    options, names = pair_options(example, tmp_path / "out", small_weights), "--nonsense"
    if kind == "unknown option":
        options.append("--nonsense")
    else:
        names = str(tmp_path / "bad.mha")
        BAD_SCANS[kind][0](tmp_path / "bad.mha")
        options.append(f"--fixed={names}")
    command = [sys.executable, "-m", "algorithm", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert names in sentence(done.stderr)
    assert not (tmp_path / "out").exists()

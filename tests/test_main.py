"""``python -m algorithm`` on good input: what it accepts, what it leaves in /output, and what when it is cut off."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.fields.transform import Transform
from algorithm.files.writing import PARTIAL
from tests.support.running import (
    HANGS_HALF_WAY,
    call_main,
    field_array,
    field_image,
    files_below,
    pair_options,
    results,
    warped_image,
)

ROOT = Path(__file__).parent.parent
SLUGS = ("fixed-image", "moving-image", "fixed-mask", "moving-mask")


def masks_of(example: Path) -> tuple[Path, Path]:
    return example / "fixed_lobes.mha", example / "moving_lobes.mha"


def place(files: dict[str, Path], root: Path) -> Path:
    """Copies each file to its name below ``root``."""
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name)
    return root


def expected_files(name: str) -> set[str]:
    return {f"images/displacement-field/{name}.mha", f"images/warped-moving/{name}.mha", "results.json"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> Path:
    """The output for fixed.mha and moving.mha in one folder; lung masks are made from the HU."""
    output = tmp_path_factory.mktemp("plain") / "not" / "yet" / "there"
    assert call_main(f"--input={example}", f"--output={output}", f"--weights={small_weights}", "--device=cpu") == 0
    return output


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> Path:
    """The output with the phantom's own lung masks, all files given as options."""
    output = tmp_path_factory.mktemp("masked")
    fixed, moving = masks_of(example)
    options = pair_options(example, output, small_weights)
    assert call_main(*options, f"--fixed-mask={fixed}", f"--moving-mask={moving}") == 0
    return output


# --- input -----------------------------------------------------------------------------------------------------------


def test_plain_files_give_the_field_on_the_fixed_grid_and_the_warped_image(plain: Path, example: Path) -> None:
    assert files_below(plain) == expected_files("fixed")
    fixed = sitk.ReadImage(str(example / "fixed.mha"))
    for image, kind in ((field_image(plain), sitk.sitkVectorFloat32), (warped_image(plain), sitk.sitkInt16)):
        assert image.IsSameImageGeometryAs(fixed)
        assert image.GetPixelID() == kind
    assert 1 < np.abs(field_array(plain)).max() < 100


def test_folders_give_the_same_and_name_it_after_the_fixed_image(
    tmp_path: Path, plain: Path, example: Path, small_weights: Path
) -> None:
    files = {"images/fixed/a b.c.mha": example / "fixed.mha", "images/moving-image/x.mha": example / "moving.mha"}
    source, output = place(files, tmp_path / "input"), tmp_path / "output"
    assert call_main(f"--input={source}", f"--output={output}", f"--weights={small_weights}", "--device=cpu") == 0
    assert files_below(output) == expected_files("a b.c")
    np.testing.assert_array_equal(field_array(output), field_array(plain))


@pytest.mark.parametrize("key", ["socket", "interface"])
def test_platform_gives_the_same_in_four_dimensions(
    tmp_path: Path, masked: Path, example: Path, small_weights: Path, key: str
) -> None:
    sources = (example / "fixed.mha", example / "moving.mha", *masks_of(example))
    source = place({f"images/{s}/{s[:3]}.mha": file for s, file in zip(SLUGS, sources, strict=True)}, tmp_path / "in")
    entries = [{"pk": 1, key: {"slug": slug, "relative_path": f"images/{slug}"}} for slug in SLUGS]
    (source / "inputs.json").write_text(json.dumps(entries))
    output = tmp_path / "output"
    assert call_main(f"--input={source}", f"--output={output}", f"--weights={small_weights}", "--device=cpu") == 0
    assert files_below(output) == expected_files("fix")

    field, expected = field_image(output), field_image(masked)
    assert field.GetPixelID() == sitk.sitkFloat32
    assert field.GetSize() == (*expected.GetSize(), 3)
    np.testing.assert_array_equal(field_array(output), field_array(masked))
    assert sitk.Compose([field[..., i] for i in range(3)]).IsSameImageGeometryAs(expected)
    np.testing.assert_array_equal(*(sitk.GetArrayFromImage(warped_image(o)) for o in (output, masked)))


def test_given_masks_are_used(plain: Path, masked: Path) -> None:
    difference_mm = np.abs(field_array(masked) - field_array(plain))
    assert 0.1 < difference_mm.max() < 30


def test_nifti_gives_nearly_the_same(tmp_path: Path, masked: Path, example: Path, small_weights: Path) -> None:
    """Its header holds the geometry in single precision only, so the pre-alignment, on voxels of 8 mm, may stop a
    hundredth of a voxel elsewhere; measured: mean 0.09, largest 0.34 mm."""
    for name in ("fixed", "moving", "fixed-mask", "moving-mask"):
        image = sitk.ReadImage(str(example / f"{name.replace('mask', 'lobes').replace('-', '_')}.mha"))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"), useCompression=True)
    output = tmp_path / "output"
    assert call_main(f"--input={tmp_path}", f"--output={output}", f"--weights={small_weights}", "--device=cpu") == 0
    assert files_below(output) == expected_files("fixed")
    difference_mm = np.abs(field_array(output) - field_array(masked))
    assert difference_mm.mean() < 0.2
    assert difference_mm.max() < 0.8


# --- output ----------------------------------------------------------------------------------------------------------


def test_next_run_replaces_everything_of_the_last(
    tmp_path: Path, plain: Path, masked: Path, example: Path, small_weights: Path
) -> None:
    output, scans = shutil.copytree(plain, tmp_path / "output"), tmp_path / "scans"
    (output / "images" / "displacement-field" / PARTIAL.format("0a" * 16)).touch()  # of a run that was killed
    (output / "notes.txt").touch()
    place({"case.mha": example / "fixed.mha", "moving.mha": example / "moving.mha"}, scans)
    fixed, moving = masks_of(example)
    options = [f"--fixed={scans / 'case.mha'}", f"--moving={scans / 'moving.mha'}", "--field-layout=grand-challenge"]
    options += [f"--fixed-mask={fixed}", f"--moving-mask={moving}", f"--output={output}", f"--weights={small_weights}"]
    assert call_main(*options, "--device=cpu") == 0
    assert files_below(output) == expected_files("case") | {"notes.txt"}
    assert results(output)["fixed"] == "case.mha"
    assert field_image(output).GetDimension() == 4
    np.testing.assert_array_equal(field_array(output), field_array(masked))


# --- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["field_slabs", "warped_slabs"])
def test_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, example: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch, capfd, method: str
) -> None:
    whole = getattr(Transform, method)

    def half(self: Transform, *arguments: object) -> Iterator[torch.Tensor]:
        slab = next(whole(self, *arguments))
        yield slab[:, :, : slab.shape[2] // 2].contiguous()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Transform, method, half)
    fixed, moving = masks_of(example)
    options = pair_options(example, tmp_path, small_weights)
    assert call_main(*options, f"--fixed-mask={fixed}", f"--moving-mask={moving}") == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert "No space left" in message and str(tmp_path) in message
    done = {"images/displacement-field/fixed.mha"} if method == "warped_slabs" else set()
    assert files_below(tmp_path) == done
    assert not done or np.isfinite(field_array(tmp_path)).all()


@pytest.mark.parametrize("method", ["field_slabs", "warped_slabs"])
def test_killed_half_way_leaves_no_part_of_a_file_in_place(
    tmp_path: Path, masked: Path, example: Path, small_weights: Path, method: str
) -> None:
    output = shutil.copytree(masked, tmp_path / "output")
    before = field_array(output)
    fixed, moving = masks_of(example)
    options = [*pair_options(example, output, small_weights), f"--fixed-mask={moving}", f"--moving-mask={fixed}"]
    command = [sys.executable, "-c", HANGS_HALF_WAY.format(method=method), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "half-way\n" for line in process.stdout)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    visible = {name for name in files_below(output) if not Path(name).name.startswith(".")}
    assert visible == expected_files("fixed") - {"results.json"}  # without it, a run is not complete
    after = read_whole(output / "images" / "displacement-field" / "fixed.mha")
    assert np.array_equal(after, before) == (method == "field_slabs")
    read_whole(output / "images" / "warped-moving" / "fixed.mha")


def read_whole(path: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return array


# --- a process of its own --------------------------------------------------------------------------------------------


def test_runs_as_a_command_from_another_folder_without_a_home(
    tmp_path: Path, masked: Path, example: Path, small_weights: Path
) -> None:
    fixed, moving = masks_of(example)
    options = pair_options(example, Path("out"), small_weights)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    command = [sys.executable, "-m", "algorithm", *options, f"--fixed-mask={fixed}", f"--moving-mask={moving}"]
    command.append("--refine=off")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[1/12] Reading the scans ...\n" in done.stdout and "[12/12] Making the page to look at: " in done.stdout
    assert "Done: moving.mha is registered to fixed.mha" in done.stdout and "out/report.html" in done.stdout
    assert files_below(tmp_path / "out") == expected_files("fixed") | {"report.html"}
    # the full pre-alignment against the coarse one
    assert np.abs(field_array(tmp_path / "out") - field_array(masked)).mean() < 2

"""The conventional baseline: the outputs of the algorithm, and a better alignment than before."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import SimpleITK as sitk

from baselines import ruehaak
from phantom.__main__ import write_pair
from phantom.pair import PhantomSettings, chest_grid, make_pair
from tests.golden_check import landmark_errors_mm, read_transform
from tests.running import files_below, prealignment_errors_mm, results


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ruehaak", *map(str, arguments), "--device=cpu"])
    return ruehaak.main()


def test_registers_a_phantom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    levels = (8.0, 4.0)
    coarse = replace(ruehaak.CONVENTIONAL, spacing_mm=levels, steps=(30, 20), weights=ruehaak.CONVENTIONAL.weights[:2])
    monkeypatch.setattr(ruehaak, "CONVENTIONAL", coarse)
    grid = chest_grid((64, 56, 60))
    write_pair(tmp_path / "in", make_pair(PhantomSettings(fixed_grid=grid, moving_grid=grid)))
    example, output = tmp_path / "in", tmp_path / "out"
    assert call(monkeypatch, example / "fixed.mha", example / "moving.mha", output) == 0
    fixed = sitk.ReadImage(str(example / "fixed.mha"))
    transform = read_transform(output / "images" / "displacement-field", fixed)
    before, prealigned = prealignment_errors_mm(output, example)
    assert landmark_errors_mm(transform, example).mean() < 0.75 * prealigned < prealigned < before
    said = results(output)
    assert said["method"] == "ruehaak" and said["jacobian"]["folded_voxels"] == 0
    assert {"keypoints", "minimise"} <= said["timings_s"].keys()
    assert files_below(output) == {
        "images/displacement-field/fixed.mha",
        "images/warped-moving/fixed.mha",
        "results.json",
    }


def test_a_missing_file_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path / "no.mha", tmp_path / "no.mha", tmp_path / "out") == 2
    assert "no.mha" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()

"""The conventional baseline: the outputs of the algorithm, and a better alignment than before."""

from dataclasses import replace
from pathlib import Path

import pytest
import SimpleITK as sitk

from baselines import ruehaak
from benchmarks import landmarks
from phantom.__main__ import write_pair
from phantom.pair import PhantomSettings, chest_grid, make_pair
from tests.support.golden_check import landmark_errors_mm, read_transform
from tests.support.running import coarsely, exit_code, files_below, prealignment_errors_mm, results


def call(*arguments: object) -> int:
    with coarsely("baselines.ruehaak"):
        return exit_code(ruehaak.main, "ruehaak", *arguments, "--device=cpu")


def test_registers_a_phantom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    levels = (8.0, 4.0)
    coarse = replace(ruehaak.CONVENTIONAL, spacing_mm=levels, steps=(30, 20), weights=ruehaak.CONVENTIONAL.weights[:2])
    monkeypatch.setattr(ruehaak, "CONVENTIONAL", coarse)
    grid = chest_grid((64, 56, 60))
    write_pair(tmp_path / "in", make_pair(PhantomSettings(fixed_grid=grid, moving_grid=grid)))
    example, output = tmp_path / "in", tmp_path / "out"
    assert call(example / "fixed.mha", example / "moving.mha", output) == 0
    fixed = sitk.ReadImage(str(example / "fixed.mha"))
    transform = read_transform(output / "images" / "displacement-field", fixed)
    before, prealigned = prealignment_errors_mm(output, example)
    assert landmark_errors_mm(transform, example).mean() < 0.75 * prealigned < prealigned < before
    said = results(output)
    assert said["method"] == "ruehaak" and said["jacobian"]["folded_voxels"] == 0
    assert {"keypoints", "minimise"} <= said["timings_s"].keys()
    assert "inconsistency_mm" not in said["quality"]["after"]  # one direction
    assert files_below(output) == {
        "images/displacement-field/fixed.mha",
        "images/warped-moving/fixed.mha",
        "results.json",
    }


def test_the_terms_are_those_of_the_paper() -> None:
    theirs, ours = ruehaak.CONVENTIONAL, ruehaak.REFINEMENT
    assert theirs.similarity == "ngf" and not theirs.both_directions
    for weights in theirs.weights:
        assert weights.diffusion == 0 < min(weights.alpha, weights.gamma, weights.delta)
    assert ours.both_directions and all(weights.diffusion > 0 for weights in ours.weights)


def test_our_refinement_from_the_prealignment_goes_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, example: Path
) -> None:
    coarse = replace(ruehaak.REFINEMENT, spacing_mm=(16.0,), steps=(5,), weights=ruehaak.REFINEMENT.weights[:1])
    monkeypatch.setattr(ruehaak, "REFINEMENT", coarse)
    made = landmarks.command("refinement", example, tmp_path, [])
    assert made[1:3] == ["-m", "baselines.ruehaak"]
    assert call(*made[3:]) == 0
    said = results(tmp_path)
    assert said["method"] == "refinement" and said["quality"]["after"]["inconsistency_mm"] > 0


def test_a_missing_file_is_one_sentence_and_exit_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path / "no.mha", tmp_path / "no.mha", tmp_path / "out") == 2
    assert "no.mha" in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()

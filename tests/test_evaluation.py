"""``python -m evaluation``: which field belongs to which case, what comes out, and what when something is missing.

The metrics have tests of their own. The cases are those of `made_up_cases.py`: their errors are known by hand.
"""

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from evaluation.__main__ import main, write_report
from evaluation.cases import FOLDER, Case, find_cases
from evaluation.errors import CaseError, InputError
from evaluation.evaluate import (
    BY_LABEL,
    BYTES_PER_VOXEL,
    JACOBIAN,
    LANDMARKS,
    METRICS,
    SUMMARY,
    TRE,
    _case_bytes,
    aggregate,
    aggregate_all,
    evaluate,
    evaluate_case,
    failed_result,
)
from evaluation.fields import write_learn2reg
from evaluation.ground_truth import mask_on, read_labels
from evaluation.landmarks import read_landmarks
from evaluation.tables import write_csv, write_json
from evaluation.workers import each, workers_for
from tests.support.dying import double_or_die
from tests.support.golden_check import landmark_errors_mm, read_transform
from tests.support.made_up_cases import (
    CASES,
    OFF_CENTRE,
    SIGNS,
    SIZE,
    SPACING,
    WIDTHS,
    as_image,
    check,
    check_result,
    field_image,
    job,
    labels,
    make,
    read_strictly,
    write_field,
)
from tests.support.running import call_main, pair_options

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Both cases in plain folders."""
    return make("folders", tmp_path / "folders")


@pytest.fixture
def platform(tmp_path: Path) -> Path:
    """Both cases as on grand-challenge.org."""
    return make("platform", tmp_path / "platform")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting others takes seconds."""
    monkeypatch.setattr("evaluation.evaluate.each", lambda function, cases, workers: enumerate(map(function, cases)))


def cases_in(folder: Path) -> list[Case]:
    return find_cases(folder / "input", folder / "ground_truth")


def case_in(folder: Path, name: str) -> Case:
    return next(case for case in cases_in(folder) if case.name == name)


def field_of(folder: Path, name: str) -> Path:
    field = case_in(folder, name).field
    assert field is not None
    return field


def edit_jobs(platform: Path, *jobs: dict[str, Any]) -> None:
    (platform / "input" / "predictions.json").write_text(json.dumps(jobs))


def call(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``python -m evaluation``, in a process of its own."""
    paths = [f"--{name.replace('_', '-')}={folder / name}" for name in ("input", "ground_truth", "output")]
    command = [sys.executable, "-m", "evaluation", *paths, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- which field belongs to which case -------------------------------------------------------------------------------


def test_folders_as_the_algorithm_writes_them(folders: Path) -> None:
    cases = cases_in(folders)
    assert [case.name for case in cases] == list(CASES)
    for case in cases:
        assert case.field == folders / "input" / case.name / FOLDER / "fixed.mha"
        assert case.ground_truth == folders / "ground_truth" / case.name
        assert case.error is None


@pytest.mark.parametrize(
    "name", ["case_1.mha", "case_1.nii.gz", "case_1.nrrd", "case_1.mhd", "disp_case_1.npz", "case_1.h5"]
)
def test_a_file_per_case(folders: Path, name: str) -> None:
    shutil.rmtree(folders / "input" / "case_1")
    (folders / "input" / name).touch()
    (folders / "input" / f".{name}").touch()  # hidden files are nobody's result
    assert field_of(folders, "case_1") == folders / "input" / name


def test_the_folder_of_an_empire10_case(folders: Path) -> None:
    shutil.rmtree(folders / "input" / "case_1" / "images")
    for axis in "XYZ":
        (folders / "input" / "case_1" / f"def{axis}.mhd").touch()
    assert field_of(folders, "case_1") == folders / "input" / "case_1"


def test_two_fields_for_a_case_are_an_error_of_that_case(folders: Path) -> None:
    for second in (folders / "input" / "case_1" / FOLDER / "other.mha", folders / "input" / "case_1.nrrd"):
        second.touch()
        error = case_in(folders, "case_1").error
        assert error is not None
        assert "fixed.mha" in error and second.name in error and "exactly one" in error
        second.unlink()
        assert case_in(folders, "case_1").error is None


def test_a_missing_field_is_an_error_of_that_case(folders: Path) -> None:
    shutil.rmtree(folders / "input" / "case_1")
    missing, there = cases_in(folders)
    assert missing.field is None and missing.error is not None and "no displacement field" in missing.error
    assert there.field is not None and there.error is None


def test_fields_without_ground_truth_are_warned_of(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_field(folders / "input" / "stranger.mha", 0)
    write_field(folders / "input" / "visitor" / FOLDER / "fixed.mha", 0)
    with caplog.at_level(logging.WARNING):
        assert [case.name for case in cases_in(folders)] == list(CASES)
    assert "stranger, visitor" in caplog.text


def test_platform_jobs_come_in_any_order(platform: Path) -> None:
    jobs = json.loads((platform / "input" / "predictions.json").read_text())
    expected = cases_in(platform)
    assert [case.name for case in expected] == list(CASES)
    assert [case.field for case in expected] == [
        platform / "input" / f"pk-of-{name}" / "output" / FOLDER / "a1b2.mha" for name in CASES
    ]
    edit_jobs(platform, *reversed(jobs))
    assert cases_in(platform) == expected


@pytest.mark.parametrize("keys", [("socket",), ("interface",), ("socket", "interface")])
def test_platform_sockets_and_interfaces(platform: Path, keys: tuple[str, ...]) -> None:
    edit_jobs(platform, *(job(f"pk-of-{name}", name, keys) for name in CASES))
    assert all(case.field for case in cases_in(platform))


def test_platform_cases_are_told_by_their_images_names(platform: Path) -> None:
    """With case.json, the folder's name does not matter; one fixed image may belong to two cases."""
    for name, moving in (("case_1", "early.mha"), ("case_2", "late.nii.gz")):
        content = {"fixed": "inhale.mha", "moving": moving}
        (platform / "ground_truth" / name / "case.json").write_text(json.dumps(content))
    jobs = [job("pk-of-case_2", "-"), job("pk-of-case_1", "-")]
    for entry, moving in zip(jobs, ("late", "early"), strict=True):
        entry["inputs"][0]["image"]["name"], entry["inputs"][1]["image"]["name"] = f"{moving}.mha", "inhale.mha"
    edit_jobs(platform, *jobs)
    assert [str(case.field).split("/")[-5] for case in cases_in(platform)] == ["pk-of-case_1", "pk-of-case_2"]


def test_platform_output_may_lie_elsewhere(platform: Path) -> None:
    jobs = [job(f"pk-of-{name}", name) for name in CASES]
    for entry in jobs:
        entry["outputs"][0]["socket"] = {"slug": "displacement-field", "relative_path": "images/dvf"}
        root = platform / "input" / entry["pk"] / "output" / "images"
        (root / "displacement-field").rename(root / "dvf")
    edit_jobs(platform, *jobs)
    assert all(case.field and case.field.parent.name == "dvf" for case in cases_in(platform))


def test_platform_failed_missing_and_double_jobs_are_errors_of_their_cases(platform: Path) -> None:
    jobs = [job(f"pk-of-{name}", name) for name in CASES]
    edit_jobs(platform, {**jobs[0], "status": "Failed"}, jobs[1])
    failed, good = cases_in(platform)
    assert failed.field is None and failed.error is not None and "'Failed'" in failed.error
    assert good.field is not None
    for wrong, number in ([jobs[1]], "0"), ([jobs[0], jobs[1], jobs[0]], "2"):
        edit_jobs(platform, *wrong)
        bad, good = cases_in(platform)
        assert bad.error == f"predictions.json has {number} jobs for this case, expected one"
        assert good.field is not None


def test_platform_jobs_without_ground_truth_are_warned_of(platform: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_jobs(platform, job("pk-of-case_1", "case_1"), job("pk-of-case_2", "case_2"), job("x", "case_10"))
    with caplog.at_level(logging.WARNING):
        assert all(case.field for case in cases_in(platform))
    assert "case_10" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "not valid JSON"),
        ('{"pk": 1}', "expected a list of jobs"),
        ("[3]", "entry 1 is no job"),
        (json.dumps([{**job("a", "case_1"), "outputs": 5}]), "lists of inputs and outputs"),
        (json.dumps([{**job("a", "case_1"), "outputs": True}]), "lists of inputs and outputs"),
        ("[]", "nothing"),
        (json.dumps([job("a", "unknown")]), "unknown_fixed"),
        (json.dumps([job("../elsewhere", "case_1")]), "expected one inside"),
        (json.dumps([{"pk": "a", "inputs": [None, {"image": None}, {"image": {"name": 3}}]}]), "no images"),
    ],
)
def test_platform_predictions_that_cannot_be_used(platform: Path, content: str, words: str) -> None:
    (platform / "input" / "predictions.json").write_text(content)
    with pytest.raises(InputError, match=words):
        cases_in(platform)


def test_a_job_that_belongs_to_two_cases_is_refused(platform: Path) -> None:
    for name in CASES:
        (platform / "ground_truth" / name / "case.json").write_text('{"fixed": "case_1_fixed.mha"}')
    with pytest.raises(InputError, match="case_1, case_2"):
        cases_in(platform)


@pytest.mark.parametrize("content", ["[]", "{}", '{"fixed": 3}', "{"])
def test_a_case_json_that_cannot_be_used_is_an_error_of_that_case(platform: Path, content: str) -> None:
    (platform / "ground_truth" / "case_1" / "case.json").write_text(content)
    bad, good = cases_in(platform)
    assert bad.field is None and bad.error is not None and "case.json" in bad.error
    assert good.field is not None


def test_a_path_that_cannot_be_listed_is_an_error_of_that_case(
    folders: Path, platform: Path, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_jobs(platform, job("a" * 5000, "case_1"), job("pk-of-case_2", "case_2"))
    bad, good = cases_in(platform)
    assert bad.error is not None and "cannot be listed" in bad.error and len(bad.error) < 300
    assert good.field is not None

    iterdir = Path.iterdir

    def forbidden(folder: Path) -> Iterator[Path]:
        if "case_1" in folder.parts:
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    both = cases_in(folders)
    monkeypatch.setattr(Path, "iterdir", forbidden)
    bad, good = cases_in(folders)
    assert bad.error is not None and "Permission denied" in bad.error
    assert good.field is not None
    metrics, _ = evaluate(both, tmp_path)  # the ground truth of case_1 cannot be listed, but read
    for result, wrong_by in zip(metrics["results"], CASES.values(), strict=True):
        check_result(result, wrong_by)
    monkeypatch.setattr("evaluation.evaluate.read_ground_truth", forbidden)
    assert "Permission denied" in evaluate_case(both[0])[0]["error"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are UTF-8")
def test_names_that_are_not_utf8_are_errors_of_their_cases(folders: Path, one_process: None) -> None:
    """SimpleITK would end the process at such a name."""
    odd = "odd\udcff"
    shutil.copytree(folders / "ground_truth" / "case_1", folders / "ground_truth" / odd)
    write_field(folders / "input" / "a.mha", 0)
    (folders / "input" / "a.mha").rename(folders / "input" / f"{odd}.mha")
    (folders / "ground_truth" / "case_2" / f"{odd}.mha").touch()  # nobody asks for it
    field = field_of(folders, "case_1")
    field.rename(field.with_name(f"{odd}.mha"))
    metrics, landmarks = evaluate(cases_in(folders), folders)
    one, two, three = read_strictly(folders / "metrics.json")["results"]
    for result, name in ((one, "case_1"), (three, "odd\\udcff")):
        assert result["case"] == name
        assert "odd\\udcff" in result["error"] and "UTF-8" in result["error"]
    check_result(two, 1)
    write_report(metrics, landmarks, cases_in(folders), folders)
    assert "odd\\udcff" in (folders / "report.html").read_text(encoding="utf-8")


def test_folders_that_nobody_made_are_no_cases(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lost+found", "__MACOSX", ".Trash-0"):
        (folders / "ground_truth" / name).mkdir()
    with caplog.at_level(logging.INFO):
        assert [case.name for case in cases_in(folders)] == list(CASES)
    assert "no cases: .Trash-0, __MACOSX, lost+found" in caplog.text


def test_nothing_to_evaluate_is_refused(folders: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for predictions, truth, words in (
        (folders / "input", empty, "holds no folders"),
        (folders / "input", empty / "not there", "cannot be listed"),
        (empty, folders / "ground_truth", "no displacement field for case_1, case_2"),
        (empty / "not there", folders / "ground_truth", "no such folder"),
    ):
        with pytest.raises(InputError, match=words):
            find_cases(predictions, truth)


# --- one case --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["folders", "platform"])
def test_a_case_has_the_errors_that_it_was_made_with(tmp_path: Path, mode: str) -> None:
    for case, wrong_by in zip(cases_in(make(mode, tmp_path / mode)), CASES.values(), strict=True):
        result, landmarks = evaluate_case(case)
        check_result(result, wrong_by)
        assert result["case"] == case.name
        assert list(landmarks) == list(LANDMARKS)
        assert landmarks["landmark"].tolist() == [1, 2, 3]
        assert set(landmarks["case"]) == {case.name}
        assert landmarks["tre_mm"].mean() == result["tre_mm"]["mean"]


def on_half_voxels(folder: Path) -> None:
    """The field of case_1 on a grid of other voxels, whose centres lie between those of the images."""
    path = field_of(folder, "case_1")
    size = [3 + n // 2 for n in SIZE]
    motion = np.broadcast_to(SIGNS * SPACING, (*size[::-1], 3)).astype(np.float32)
    field = sitk.GetImageFromArray(motion, isVector=True)
    field.SetDirection(labels(0).GetDirection())
    field.SetSpacing((2.1 * SPACING).tolist())
    field.SetOrigin(labels(0).TransformContinuousIndexToPhysicalPoint((-1.4, -1.4, -1.4)))
    sitk.WriteImage(field, str(path))


@pytest.mark.parametrize("grid_from", ["fixed_lobes", "moving", "fixed_lung_mask", "fixed", None])
def test_snapping_does_not_depend_on_the_fields_grid(folders: Path, grid_from: str | None) -> None:
    """As long as there is any image in the ground truth; of a scan the header is enough."""
    truth = folders / "ground_truth" / "case_1"
    on_half_voxels(folders)
    if grid_from != "fixed_lobes":
        for path in truth.glob("*.mha"):
            path.unlink()
        if grid_from:
            sitk.WriteImage(labels(0) > 0, str(truth / f"{grid_from}.mha"))
    if grid_from in ("fixed", "moving"):
        (truth / f"{grid_from}.mha").write_bytes((truth / f"{grid_from}.mha").read_bytes()[:-50])
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None
    assert result["tre_mm"]["max"] == pytest.approx(0, abs=1e-4)
    snapped_mm = pytest.approx(SPACING[0] * OFF_CENTRE, abs=1e-4)
    assert (result["tre_snapped_mm"]["max"] == snapped_mm) == (grid_from is not None)


def test_snapping_is_to_the_moving_grid_where_it_is_another(folders: Path) -> None:
    """Its voxel centres lie where the moving landmarks do."""
    truth = folders / "ground_truth" / "case_1"
    for path in truth.glob("*lobes.mha"):
        path.unlink()
    moving = labels(0)
    moving.SetOrigin(moving.TransformContinuousIndexToPhysicalPoint((OFF_CENTRE, 0, 0)))
    sitk.WriteImage(moving, str(truth / "moving.nrrd"))
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert result["tre_snapped_mm"]["max"] == pytest.approx(0, abs=1e-4)


def test_the_scans_say_where_a_learn2reg_field_lies(folders: Path) -> None:
    truth = folders / "ground_truth" / "case_1"
    for path in truth.glob("*.mha"):
        path.unlink()
    shutil.rmtree(folders / "input" / "case_1")
    moving = sitk.RegionOfInterest(labels(1), [20, 15, 12], [2, 3, 4])
    write_learn2reg(field_image(0), folders / "input" / "disp_case_1.npz", moving)
    assert "expected an image on the fixed grid" in evaluate_case(case_in(folders, "case_1"))[0]["error"]
    for name, scan in (("fixed", labels(0)), ("moving", moving)):
        sitk.WriteImage(scan, str(truth / f"{name}.nii.gz"))
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None
    assert result["tre_mm"]["max"] == pytest.approx(0, abs=1e-4)


def test_the_entry_has_every_key_of_the_schema(folders: Path) -> None:
    result, _ = evaluate_case(case_in(folders, "case_2"))
    assert list(result) == ["case", *METRICS, "counted", "remarks", "error"]
    for name in TRE:
        assert list(result[name]) == ["mean", "std", "median", "p75", "p95", "max"]
    for name in BY_LABEL:
        assert list(result[name]) == ["1", "5", "mean"]
    for name in JACOBIAN:
        assert isinstance(result[name], float)
    failed = failed_result("a", "why")
    assert list(failed) == list(result)
    assert all(set(failed[name]) == set(SUMMARY) for name in TRE)


def test_dice_by_hand(folders: Path) -> None:
    """The warp of case_2 by hand: the true labels, one column of voxels aside."""
    result, _ = evaluate_case(case_in(folders, "case_2"))
    fixed = sitk.GetArrayFromImage(labels(0))
    warped = np.roll(fixed, -1, axis=2)
    for label in (1, 5):
        a, b = fixed == label, warped == label
        assert result["dice"][str(label)] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_without_landmarks_there_are_labels(folders: Path) -> None:
    for name in ("fixed", "moving"):
        (folders / "ground_truth" / "case_1" / f"{name}_landmarks.csv").unlink()
    result, landmarks = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None
    assert all(value is None for name in TRE for value in result[name].values())
    assert result["dice"]["mean"] == 1.0
    assert result["folding_percent"] == 0.0
    assert (list(landmarks), len(landmarks)) == (list(LANDMARKS), 0)


def test_without_lobes_there_are_landmarks(folders: Path) -> None:
    for name in ("fixed_lobes", "moving_lobes", "fixed_lung_mask"):
        (folders / "ground_truth" / "case_2" / f"{name}.mha").unlink()
    result, landmarks = evaluate_case(case_in(folders, "case_2"))
    assert result["error"] is None
    assert result["tre_mm"]["mean"] == pytest.approx(1.5)
    assert all(result[name] == {"mean": None} for name in BY_LABEL)
    assert result["folding_percent"] is None  # there is no lung to count in
    assert result["folding_percent_all"] == 0.0
    assert len(landmarks) == 3


def test_without_a_lung_mask_folding_is_counted_in_the_lobes(folders: Path) -> None:
    """A fold outside the lobes, at the far corner."""
    case = case_in(folders, "case_1")
    assert case.field is not None
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(case.field)))
    field[-3:, -3:, -3:, :] *= -20
    sitk.WriteImage(as_image(field), str(case.field))
    result, _ = evaluate_case(case)
    assert result["folding_percent_all"] > 0
    (case.ground_truth / "fixed_lung_mask.mha").unlink()
    without, _ = evaluate_case(case)
    assert without == result
    assert result["folding_percent"] == 0.0


def break_truth(folder: Path, name: str, content: str | sitk.Image | None) -> None:
    """Replaces a file of the ground truth, or takes it away."""
    path = folder / name
    path.unlink()
    if isinstance(content, sitk.Image):
        sitk.WriteImage(content, str(path))
    elif content is not None:
        path.write_text(content)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"fixed_landmarks.csv": None, "fixed_lobes.mha": None}, "missing"),
        ({"moving_landmarks.csv": None}, "moving_landmarks.csv is missing"),
        ({"moving_lobes.mha": None}, "moving_lobes.mha is missing"),
        ({"moving_lobes.mha": "no image"}, "moving_lobes.mha cannot be read"),
        ({"moving_landmarks.csv": "x,y,z\n1,2,3\n"}, "3 fixed and 1 moving landmarks"),
        ({"fixed_lobes.mha": (labels(0) == 5) * 7, "moving_lobes.mha": labels(1)}, "[7] in fixed_lobes and [1, 5]"),
        ({"fixed_lobes.mha": labels(0) * 0, "moving_lobes.mha": labels(1) * 0}, "at least one"),
        ({"fixed_lobes.mha": sitk.Cast(labels(0), sitk.sitkFloat32) / 2}, "whole numbers"),
        ({"fixed_lobes.mha": sitk.Cast(labels(0), sitk.sitkInt16) * -1}, "whole numbers"),
        ({"fixed_lung_mask.mha": labels(0) * 0}, "lung mask is empty"),
        ({"fixed_lobes.mha": field_image(0)}, "has 3 components, expected one"),
        ({"fixed_lobes.mha": labels(0)[:, :, 3]}, "expected a 3-D image"),
    ],
)
def test_ground_truth_that_is_missing_or_broken_is_an_error_of_that_case(
    folders: Path, files: dict[str, str | sitk.Image | None], words: str
) -> None:
    for name, content in files.items():
        break_truth(folders / "ground_truth" / "case_1", name, content)
    result, landmarks = evaluate_case(case_in(folders, "case_1"))
    assert words in result["error"]
    assert result == failed_result("case_1", result["error"])
    assert len(landmarks) == 0


@pytest.mark.parametrize("name", ["fixed_lung_mask.mha", "fixed_landmarks.csv", "fixed_lobes.mha"])
def test_a_link_to_nowhere_is_an_error_of_that_case(folders: Path, name: str) -> None:
    path = folders / "ground_truth" / "case_1" / name
    path.unlink()
    path.symlink_to("nowhere")
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert f"case_1/{name}" in result["error"] and "cannot be read" in result["error"]


def test_memory_is_estimated_from_headers(folders: Path) -> None:
    """Also of arrays; what cannot be read counts as nothing."""
    case = case_in(folders, "case_1")
    assert _case_bytes(case) == BYTES_PER_VOXEL * math.prod(SIZE)
    large = folders / "large.npz"
    np.savez_compressed(large, np.zeros((50, 60, 70, 3), np.float16))
    assert _case_bytes(replace(case, field=large)) == BYTES_PER_VOXEL * 50 * 60 * 70
    large.write_bytes(b"PK")
    assert _case_bytes(replace(case, field=large)) == BYTES_PER_VOXEL * math.prod(SIZE)


def test_without_landmarks_and_lobes_the_field_is_measured_all_the_same(folders: Path) -> None:
    """Where there is a mask or a scan to show it on."""
    truth = folders / "ground_truth" / "case_1"
    for name in ("fixed_landmarks.csv", "moving_landmarks.csv", "fixed_lobes.mha", "moving_lobes.mha"):
        break_truth(truth, name, None)
    result, landmarks = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None and len(landmarks) == 0
    assert result["tre_mm"]["mean"] is None and result["dice"] == {"mean": None}
    assert result["folding_percent"] == 0 and result["jacobian_min"] > 0
    assert [remark for remark in result["remarks"] if "neither landmarks nor lobes" in remark]
    assert result["counted"]["std_log_jacobian"] == result["std_log_jacobian"]


def test_an_empty_ground_truth_is_an_error_of_that_case(folders: Path) -> None:
    truth = folders / "ground_truth" / "case_1"
    for path in truth.iterdir():
        path.unlink()
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert "neither landmarks" in result["error"] and "nor lobes" in result["error"]


def test_a_label_that_the_warp_leaves_empty_is_an_error_of_that_case(folders: Path) -> None:
    case = case_in(folders, "case_1")
    assert case.field is not None
    write_field(case.field, -10)  # the small box goes beyond the image
    result, _ = evaluate_case(case)
    assert "label 5" in result["error"]
    assert result == failed_result("case_1", result["error"], result["counted"])
    counted = result["counted"]
    assert counted["tre_mm"] == pytest.approx(10 * SPACING[0])  # worse than without registration
    assert counted["dice"] == 0  # nothing is left of one box, and the other is beside itself
    assert counted["hd_mm"] == pytest.approx((15 + np.linalg.norm(SPACING)) / 2)  # as it came out, and as it was
    assert counted["folding_percent"] == 0.0


def counts_as_not_registered(counted: dict[str, float | None]) -> None:
    """The boxes one voxel apart along each axis, from the making of the cases; folding as bad as can be."""
    initial_mm = float(np.linalg.norm(SPACING))
    assert counted["tre_mm"] == counted["tre_initial_mm"] == pytest.approx(initial_mm)
    assert counted["dice"] == pytest.approx(np.mean([(w - 1) / w * 0.9 * 7 / 8 for w in WIDTHS.values()]))
    assert counted["hd_mm"] == pytest.approx(initial_mm)
    assert (counted["folding_percent"], counted["std_log_jacobian"]) == (100, None)


def test_a_field_that_is_missing_counts_as_not_registered(folders: Path, one_process: None) -> None:
    """Of a case whose ground truth cannot be used nothing counts."""
    shutil.rmtree(folders / "input" / "case_1")
    metrics, _ = evaluate(cases_in(folders), folders)
    failed, good = metrics["results"]
    counts_as_not_registered(failed["counted"])
    assert good["counted"]["tre_mm"] == good["tre_mm"]["mean"] == pytest.approx(1.5)
    over_all, some = metrics["aggregates_all"], metrics["aggregates"]
    assert (some["tre_mm"]["n"], over_all["tre_mm"]["n"]) == (1, 2)
    assert over_all["tre_mm"]["mean"] == pytest.approx((np.linalg.norm(SPACING) + 1.5) / 2)
    assert over_all["folding_percent"]["mean"] == 50 and some["folding_percent"]["mean"] == 0
    assert over_all["std_log_jacobian"]["n"] == 2  # as the worst of the others
    assert read_strictly(folders / "metrics.json")["aggregates_all"] == over_all
    table = pd.read_csv(folders / "cases.csv").set_index("case")
    assert table.loc["case_1", "counted_tre_mm"] == pytest.approx(np.linalg.norm(SPACING))
    write_report(metrics, pd.DataFrame(), [], folders)
    page = (folders / "report.html").read_text(encoding="utf-8")
    assert "over all cases" in page and "over those that did not fail" in page
    (folders / "ground_truth" / "case_1" / "fixed_landmarks.csv").write_text("x,y,z\n1,2,3\n")
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert set(result["counted"].values()) == {None}
    assert aggregate_all([result, good])["tre_mm"]["n"] == aggregate_all([result, good])["std_log_jacobian"]["n"] == 1


def test_scans_that_lie_apart_have_surfaces_without_registration(folders: Path) -> None:
    """The moving scan is in another world, 500 mm along x, and its field is lost."""
    truth = folders / "ground_truth" / "case_1"
    moving = labels(1)
    moving.SetOrigin(np.add(moving.GetOrigin(), [500, 0, 0]))
    sitk.WriteImage(moving, str(truth / "moving_lobes.mha"))
    field_of(folders, "case_1").write_bytes(b"")
    counted = evaluate_case(case_in(folders, "case_1"))[0]["counted"]
    assert counted["dice"] == 0 and 490 < counted["asd_mm"] <= counted["hd_mm"] < 510


@pytest.mark.parametrize("lone", ["fixed", "moving"])
def test_a_label_that_only_one_scan_has_is_null(folders: Path, lone: str) -> None:
    """As after a lobectomy; the mean is of the others."""
    other, shift = ("moving", 1) if lone == "fixed" else ("fixed", 0)
    without = sitk.GetArrayFromImage(labels(shift))
    without[without == 5] = 0
    sitk.WriteImage(as_image(without), str(folders / "ground_truth" / "case_2" / f"{other}_lobes.mha"))
    result, _ = evaluate_case(case_in(folders, "case_2"))
    assert result["error"] is None
    for name in BY_LABEL:
        assert result[name]["5"] is None and result[name]["mean"] == result[name]["1"]
    assert result["dice"]["1"] == pytest.approx(7 / 8)
    assert f"label 5 is only in {lone}_lobes" in result["remarks"][0]


# --- remarks ---------------------------------------------------------------------------------------------------------


def change_points(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = folder / "ground_truth" / "case_1" / f"{name}_landmarks.csv"
    points = change(pd.read_csv(path).to_numpy())
    pd.DataFrame(points, columns=["x", "y", "z"]).to_csv(path, index=False)


def in_voxels(points: np.ndarray) -> np.ndarray:
    return np.array([labels(0).TransformPhysicalPointToContinuousIndex(point) for point in points.tolist()])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda points: points * [-1, -1, 1], "if the moving landmarks were RAS, not LPS"),
        (in_voxels, "if the moving landmarks were voxel indices, not mm"),
        (lambda points: points[[1, 2, 0]], "if the moving landmarks were in another order of rows"),
        (lambda points: np.add(points, [-20, 0, 0]), "hardly smaller than the"),
        (lambda points: np.add(points, [0, 0, 1000]), "3 of 3 moving landmarks lie outside the moving scan"),
    ],
)
def test_moving_landmarks_that_cannot_be_right_are_remarked_upon(
    folders: Path, change: Callable[[np.ndarray], np.ndarray], says: str
) -> None:
    assert evaluate_case(case_in(folders, "case_1"))[0]["remarks"] == []
    change_points(folders, "moving", change)
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None
    assert says in " ".join(result["remarks"])


def test_remarks_are_on_the_page_and_in_the_table(folders: Path, one_process: None) -> None:
    change_points(folders, "moving", lambda points: points * [-1, -1, 1])
    metrics, landmarks = evaluate(cases_in(folders), folders)
    write_report(metrics, landmarks, cases_in(folders), folders)
    for name in ("metrics.json", "cases.csv", "report.html"):
        assert "RAS, not LPS" in (folders / name).read_text(encoding="utf-8")


def test_outside_the_field_landmarks_and_labels_count_as_not_registered(folders: Path) -> None:
    """A field that covers the lower part only: zero elsewhere for both, with a remark for both, and no error."""
    path = field_of(folders, "case_1")
    sitk.WriteImage(field_image(0)[:, :, :11], str(path))
    result, landmarks = evaluate_case(case_in(folders, "case_1"))
    assert result["error"] is None
    assert landmarks["tre_mm"].tolist() == pytest.approx([0, 0, np.linalg.norm(SPACING)], abs=1e-4)
    assert 0.6 < result["dice"]["1"] < 1
    said = " ".join(result["remarks"])
    assert "1 of 3 fixed landmarks lie outside the displacement field, where it counts as zero" in said
    assert "of the voxels of fixed_lobes lie outside the displacement field, where it counts as zero" in said


# --- landmarks of 3D Slicer ------------------------------------------------------------------------------------------


def write_slicer(path: Path, points: np.ndarray, system: str) -> None:
    """LPS points as 3D Slicer's documentation has its files; 0 is RAS and 1 LPS in old ones."""
    stored = points * ([-1, -1, 1] if system in ("RAS", "0") else [1, 1, 1])
    if path.suffix == ".fcsv":
        head = ["# Markups fiducial file version = 4.13", f"# CoordinateSystem = {system}"]
        head += ["# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"]
        rows = [f"{n},{x!r},{y!r},{z!r},0,0,0,1,1,1,0,F-{n},," for n, (x, y, z) in enumerate(stored.tolist())]
        path.write_text("\n".join([*head, *rows]) + "\n")
    else:
        control = [{"id": str(n), "label": f"F-{n}", "position": p} for n, p in enumerate(stored.tolist())]
        markups = {"type": "Fiducial", "coordinateSystem": system, "coordinateUnits": "mm", "controlPoints": control}
        path.write_text(json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": [markups]}))


@pytest.mark.parametrize(
    ("ending", "system"),
    [*((".fcsv", system) for system in ("LPS", "RAS", "0", "1")), (".mrk.json", "LPS"), (".mrk.json", "RAS")],
)
def test_landmarks_of_3d_slicer(folders: Path, ending: str, system: str) -> None:
    truth = folders / "ground_truth" / "case_2"
    for name in ("fixed", "moving"):
        csv = truth / f"{name}_landmarks.csv"
        write_slicer(truth / f"{name}_landmarks{ending}", read_landmarks(csv), system)
        np.testing.assert_allclose(read_landmarks(truth / f"{name}_landmarks{ending}"), read_landmarks(csv))
        csv.unlink()
    check_result(evaluate_case(case_in(folders, "case_2"))[0], 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.fcsv", "0,1,2,3\n", "names no coordinate system, expected LPS or RAS"),
        ("a.fcsv", "# CoordinateSystem = 2\n0,1,2,3\n", "names the coordinate system '2', expected LPS or RAS"),
        ("a.fcsv", "# CoordinateSystem = LPS\n# columns = id,x,y\n0,1,2\n", "has the columns"),
        ("a.fcsv", "# CoordinateSystem = LPS\n0,1,2\n", "empty cells"),
        ("a.fcsv", "# CoordinateSystem = LPS\n", "holds 0 landmarks"),
        ("a.mrk.json", "no json", "cannot be read"),
        ("a.mrk.json", "{}", "holds no lists of points"),
        ("a.mrk.json", '{"markups": [{}, {}]}', "holds 2 lists of points"),
        ("a.mrk.json", '{"markups": [{}]}', "no list of controlPoints"),
        ("a.mrk.json", '{"markups": [{"coordinateUnits": "cm"}]}', "coordinateUnits are 'cm'"),
        ("a.mrk.json", '{"markups": [{"controlPoints": []}]}', "names no coordinate system"),
        ("a.mrk.json", '{"markups": [{"coordinateSystem": "LPS", "controlPoints": []}]}', "holds 0 landmarks"),
        ("a.mrk.json", '{"markups": [{"controlPoints": [{"position": [1, 2]}]}]}', "point 1 has no position"),
        ("a.mrk.json", '{"markups": [{"controlPoints": [{"position": [1, 2, true]}]}]}', "no number"),
        (
            "a.mrk.json",
            '{"markups": [{"controlPoints": [{"position": [1, 2, 3], "positionStatus": "undefined"}]}]}',
            "point 1 has no position",
        ),
    ],
)
def test_landmarks_of_3d_slicer_that_cannot_be_used(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CaseError, match=words):
        read_landmarks(tmp_path / name)


@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_broken_field_is_an_error_of_that_case(folders: Path, content: bytes) -> None:
    field_of(folders, "case_1").write_bytes(content)
    result, _ = evaluate_case(case_in(folders, "case_1"))
    assert "fixed.mha" in result["error"]
    assert "\n" not in result["error"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_field_that_is_not_finite_is_an_error_of_that_case(folders: Path, value: float) -> None:
    case = case_in(folders, "case_1")
    assert case.field is not None
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(case.field)))
    field[7, 8, 9, 1] = value
    sitk.WriteImage(as_image(field), str(case.field))
    result, _ = evaluate_case(case)
    assert result["error"] is not None
    assert result == failed_result("case_1", result["error"], result["counted"])
    counts_as_not_registered(result["counted"])


def test_labels_of_any_whole_type_and_ending(tmp_path: Path) -> None:
    for kind, expected in ((sitk.sitkFloat64, sitk.sitkUInt8), (sitk.sitkInt32, sitk.sitkUInt8)):
        sitk.WriteImage(sitk.Cast(labels(0), kind), str(tmp_path / "a.nii.gz"))
        read = read_labels(tmp_path / "a.nii.gz")
        assert read.GetPixelID() == expected
        np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (read, labels(0))))
    sitk.WriteImage(sitk.Cast(labels(0), sitk.sitkInt32) * 300, str(tmp_path / "a.nii.gz"))
    assert sitk.GetArrayFromImage(read_labels(tmp_path / "a.nii.gz")).max() == 1500


def test_the_mask_may_lie_on_another_grid_than_the_field() -> None:
    field, mask = labels(0), labels(0) > 0
    expected = sitk.GetArrayFromImage(mask) > 0
    np.testing.assert_array_equal(mask_on(field, mask), expected)
    finer = sitk.Expand(mask, [3, 3, 3], sitk.sitkNearestNeighbor)
    np.testing.assert_array_equal(mask_on(field, finer), expected)
    finer.SetOrigin((1000.0, 0.0, 0.0))
    with pytest.raises(CaseError, match="empty"):
        mask_on(field, finer)


# --- all cases -------------------------------------------------------------------------------------------------------


def result_with(case: str, tre: float | None, dice: float | None, error: str | None = None) -> dict[str, Any]:
    result = failed_result(case, "")
    result |= {"tre_mm": {**result["tre_mm"], "mean": tre}, "dice": {"1": dice, "mean": dice}, "error": error}
    return result


def test_aggregates_by_hand() -> None:
    values = [4.0, 1.0, 2.0, 10.0]  # 30 % of four cases, rounded up: two
    results = [result_with(str(v), v, v / 10) for v in values]
    results += [result_with("failed", None, None, "why"), result_with("without landmarks", None, 0.5)]
    figures = aggregate(results)
    assert figures["tre_mm"] == {
        "n": 4,
        "mean": 4.25,
        "std": pytest.approx(np.sqrt((0.25**2 + 3.25**2 + 2.25**2 + 5.75**2) / 4)),
        "median": 3.0,
        "min": 1.0,
        "max": 10.0,
        "worst30": 7.0,
    }
    assert figures["dice"]["n"] == 5
    assert figures["dice"]["mean"] == pytest.approx(2.2 / 5)
    assert figures["dice"]["worst30"] == pytest.approx(0.15)
    assert figures["hd_mm"] == {"n": 0, **dict.fromkeys(("mean", "std", "median", "min", "max", "worst30"))}
    assert (figures["cases"], figures["failed"]) == (6, 1)
    assert list(figures) == [*METRICS, "cases", "failed"]


@pytest.mark.parametrize(("count", "worst"), [(1, 1), (3, 1), (4, 2), (10, 3), (11, 4), (20, 6)])
def test_worst30_is_of_thirty_percent_rounded_up(count: int, worst: int) -> None:
    figures = aggregate([result_with(str(i), float(i), float(i)) for i in range(count)])
    assert figures["dice"]["worst30"] == pytest.approx(np.mean(range(worst)))
    assert figures["tre_mm"]["worst30"] == pytest.approx(np.mean(range(count - worst, count)))


def test_command_line_writes_all_results(folders: Path) -> None:
    """A broken field costs its case only; the csv files hold what metrics.json holds."""
    write_field(folders / "input" / "case_0.mha", 0)
    (folders / "ground_truth" / "case_0").mkdir()
    done = call(folders)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("1 of 3 cases failed; case_0: case_0 has neither landmarks")
    output = folders / "output"
    assert {path.name for path in output.iterdir()} == {"metrics.json", "cases.csv", "landmarks.csv", "report.html"}
    metrics = read_strictly(output / "metrics.json")
    assert metrics["aggregates"]["cases"] == 3
    assert metrics["aggregates"]["failed"] == 1
    results = metrics["results"]
    assert [result["case"] for result in results] == ["case_0", *CASES]
    check_result(results[1], 0)
    check_result(results[2], 1)
    assert "3/3" in done.stdout

    table = pd.read_csv(output / "cases.csv", dtype={"case": str}).set_index("case")
    assert list(table.index) == ["case_0", *CASES]
    assert list(table)[:6] == [f"tre_mm_{key}" for key in SUMMARY]
    assert list(table)[-1] == "error"
    assert {"dice_1", "dice_5", "dice_mean", "folding_percent"} < set(table)
    assert table.drop(columns="error").loc["case_0"].isna().all()
    assert table.loc["case_2", "dice_5"] == pytest.approx(0.75)
    assert table["error"].isna().tolist() == [False, True, True]
    landmarks = pd.read_csv(output / "landmarks.csv")
    assert list(landmarks) == list(LANDMARKS)
    assert landmarks["case"].tolist() == ["case_1"] * 3 + ["case_2"] * 3
    assert landmarks["tre_mm"].tolist() == pytest.approx([0.0] * 3 + [1.5] * 3, abs=1e-4)


def test_command_line_refuses_with_a_sentence(folders: Path) -> None:
    for path in folders.glob("input/*/images/*/*"):
        path.write_bytes(b"no image")
    done = call(folders, "--no-report", "--workers=1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("2 of 2 cases failed; case_1: ")
    check(read_strictly(folders / "output" / "metrics.json"), 2)
    assert not (folders / "output" / "report.html").exists()


def test_command_line_refuses_before_anything_is_done(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, options)])
        try:
            assert main() == 2
        except SystemExit as end:
            assert end.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    truth, output = f"--ground-truth={folders / 'ground_truth'}", folders / "output"
    assert "no such folder" in refusal("--input=nowhere", truth, f"--output={output}")
    assert "no whole number above 0" in refusal("--workers=0")
    assert "--unknown" in refusal("--unknown")
    assert not output.exists()
    output.touch()
    assert "cannot be written" in refusal(f"--input={folders / 'input'}", truth, f"--output={output}")


def test_a_page_that_cannot_be_made_leaves_the_figures(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "evaluation.report", None)
    write_report({}, None, [], folders)
    assert "report.html could not be made (ModuleNotFoundError)" in capsys.readouterr().err


def test_results_do_not_depend_on_the_number_of_workers(platform: Path, tmp_path: Path) -> None:
    cases = [case for case in cases_in(platform) for _ in range(2)]
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        metrics, _ = evaluate(cases, tmp_path / str(workers), workers)
        assert [result["case"] for result in metrics["results"]] == ["case_1", "case_1", "case_2", "case_2"]
    for name in ("metrics.json", "cases.csv", "landmarks.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_json_without_nan_all_or_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert read_strictly(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(OSError):
        write_csv(tmp_path / "missing" / "a.csv", pd.DataFrame({"a": [1]}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_its_own_case_only() -> None:
    outcomes = dict(each(double_or_die, [1, 13, 7, 4], workers=2))
    assert (outcomes[0], outcomes[3]) == (2, 8)
    assert isinstance(outcomes[1], BrokenProcessPool)
    assert isinstance(outcomes[2], RuntimeError)


def test_a_worker_that_dies_gives_its_case_an_error(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(function: object, cases: list[Case], workers: int) -> list[tuple[int, Any]]:
        return [(1, BrokenProcessPool("killed\nby the system")), (0, evaluate_case(cases[0]))]

    monkeypatch.setattr("evaluation.evaluate.each", outcomes)
    metrics, landmarks = evaluate(cases_in(folders), tmp_path)
    check_result(metrics["results"][0], 0)
    assert metrics["results"][1]["error"] == "the evaluation failed: BrokenProcessPool: killed by the system"
    assert len(landmarks) == 3


def test_workers_are_bounded_by_cores_cases_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.workers.cores", lambda: 4)
    monkeypatch.setattr("evaluation.workers.memory_bytes", lambda: 8 * 2**30)
    assert workers_for(0, 100) == 4
    assert workers_for(2**20, 3) == 3
    assert workers_for(3 * 2**30, 100) == 2
    assert workers_for(100 * 2**30, 100) == 1


# --- with the algorithm ----------------------------------------------------------------------------------------------


def test_the_algorithms_own_output_goes_through(tmp_path: Path, example: Path, small_weights: Path) -> None:
    output = tmp_path / "predictions" / "phantom"
    assert call_main(*pair_options(example, output, small_weights)) == 0
    (tmp_path / "truth").mkdir()
    shutil.copytree(example, tmp_path / "truth" / "phantom")
    (case,) = find_cases(tmp_path / "predictions", tmp_path / "truth")
    result, landmarks = evaluate_case(case)
    assert result["error"] is None
    fixed = sitk.ReadImage(str(example / "fixed.mha"))
    expected_mm = landmark_errors_mm(read_transform(output / FOLDER, fixed), example)
    np.testing.assert_allclose(landmarks["tre_mm"], expected_mm, atol=1e-3)
    identity_mm = landmark_errors_mm(sitk.Transform(3, sitk.sitkIdentity), example).mean()
    assert result["tre_initial_mm"]["mean"] == pytest.approx(identity_mm, abs=1e-3)
    assert 0 < result["dice"]["mean"] <= 1
    assert result["folding_percent"] == 0.0

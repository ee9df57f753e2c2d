"""Two small cases with an error known by hand, for the evaluation's tests and its container's.

    python -m tests.support.made_up_cases make folders|platform FOLDER    FOLDER/input and FOLDER/ground_truth
    python -m tests.support.made_up_cases check METRICS_JSON FAILED       what must come out; the first FAILED fail

The true motion is one voxel in each axis. The field of case_1 is exact, that of case_2 one voxel wrong along the
first axis: 1.5 mm for each landmark, and a column too few or too many in each label.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import SimpleITK as sitk

SPACING = np.array([1.5, 2.0, 2.5])
SIGNS = np.array([-1.0, 1.0, -1.0])
"""The direction: not the world's axes, so that an error in the order or sign of axes shows."""
SIZE = (24, 20, 16)
BOXES = {1: np.s_[4:12, 4:14, 4:12], 5: np.s_[5:13, 5:15, 14:18]}
"""(z, y, x) of the fixed labels; 8 and 4 voxels wide along x, 10 along y, 8 along z."""
CASES = {"case_1": 0, "case_2": 1}
"""Voxels by which the field is wrong along x."""
WIDTHS = {"1": 8, "5": 4}
OFF_CENTRE = 0.25
"""Voxels along x from the nearest voxel centre to each landmark: what snapping takes away."""


def as_image(array: np.ndarray) -> sitk.Image:
    """(z, y, x) or (z, y, x, 3) on the cases' grid."""
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    image.SetSpacing(SPACING.tolist())
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection(np.diag(SIGNS).ravel().tolist())
    return image


def labels(shift: int) -> sitk.Image:
    """The boxes, moved by so many voxels in each axis."""
    array = np.zeros(SIZE[::-1], np.uint8)
    for label, box in BOXES.items():
        array[tuple(slice(s.start + shift, s.stop + shift) for s in box)] = label
    return as_image(array)


def field_image(wrong_by: int) -> sitk.Image:
    """A constant displacement of one voxel in each axis, in mm; along x, ``wrong_by`` more."""
    displacement = SIGNS * SPACING * np.array([1 + wrong_by, 1, 1])
    return as_image(np.broadcast_to(displacement, (*SIZE[::-1], 3)).astype(np.float32))


def write_ground_truth(folder: Path) -> None:
    """Landmarks and labels."""
    folder.mkdir(parents=True)
    fixed = labels(0)
    points = np.array([fixed.TransformIndexToPhysicalPoint(index) for index in ((6, 6, 6), (10, 12, 8), (15, 9, 11))])
    points[:, 0] += SIGNS[0] * SPACING[0] * OFF_CENTRE
    for name, mm in (("fixed", points), ("moving", points + SIGNS * SPACING)):
        pd.DataFrame(mm, columns=["x", "y", "z"]).to_csv(folder / f"{name}_landmarks.csv", index=False)
    sitk.WriteImage(fixed, str(folder / "fixed_lobes.mha"))
    sitk.WriteImage(labels(1), str(folder / "moving_lobes.mha"))
    sitk.WriteImage(fixed > 0, str(folder / "fixed_lung_mask.mha"))


def write_field(path: Path, wrong_by: int, layout: Literal["itk", "grand-challenge"] = "itk") -> None:
    """A displacement field in one of the two layouts."""
    field = field_image(wrong_by)
    if layout == "grand-challenge":
        field = sitk.JoinSeries([sitk.VectorIndexSelectionCast(field, i) for i in range(3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(field, str(path))


def job(pk: str, case: str, keys: tuple[str, ...] = ("socket", "interface")) -> dict[str, Any]:
    """An entry of predictions.json."""
    images = {slug: {"name": f"{case}_{slug.split('-')[0]}.nii.gz"} for slug in ("moving-image", "fixed-image")}
    field = {"slug": "displacement-field", "relative_path": "images/displacement-field"}
    inputs = [{"image": image, **{key: {"slug": slug} for key in keys}} for slug, image in images.items()]
    return {"pk": pk, "status": "Succeeded", "inputs": inputs, "outputs": [dict.fromkeys(keys, field)]}


def make(mode: str, folder: Path) -> Path:
    """Both cases as the platform shows them (the last job first), or as the algorithm writes them."""
    jobs: list[dict[str, Any]] = []
    for case, wrong_by in CASES.items():
        write_ground_truth(folder / "ground_truth" / case)
        if mode == "platform":
            path = folder / "input" / f"pk-of-{case}" / "output" / "images" / "displacement-field" / "a1b2.mha"
            write_field(path, wrong_by, "grand-challenge")
            jobs.insert(0, job(f"pk-of-{case}", case))
        else:
            write_field(folder / "input" / case / "images" / "displacement-field" / "fixed.mha", wrong_by)
    if mode == "platform":
        (folder / "input" / "predictions.json").write_text(json.dumps(jobs))
    return folder


def check_result(result: dict[str, Any], wrong_by: int) -> None:
    """AssertionError unless an entry of metrics.json is what follows from the case's making."""
    assert result["error"] is None, result["error"]
    error_mm, initial_mm = SPACING[0] * wrong_by, float(np.linalg.norm(SPACING))
    snapped_mm = SPACING[0] * abs(wrong_by - OFF_CENTRE)
    for name, expected in (("tre_mm", error_mm), ("tre_snapped_mm", snapped_mm), ("tre_initial_mm", initial_mm)):
        for key in ("mean", "median", "p75", "p95", "max"):
            np.testing.assert_allclose(result[name][key], expected, atol=1e-4, err_msg=f"{name} {key}")
    for label, width in WIDTHS.items():
        np.testing.assert_allclose(result["dice"][label], (width - wrong_by) / width)
        np.testing.assert_allclose(result["hd_mm"][label], error_mm)
        np.testing.assert_allclose(result["hd95_mm"][label], error_mm)
        # an end plane and the middle of the other one lie beside the other border, 10 x 8 and 8 x 6 voxels
        np.testing.assert_allclose(result["asd_mm"][label], error_mm * (80 + 48) / (80 * width - 48 * (width - 2)))
    np.testing.assert_allclose(result["dice"]["mean"], np.mean([(w - wrong_by) / w for w in WIDTHS.values()]))
    for name in ("folding_percent", "folding_percent_all", "std_log_jacobian"):
        np.testing.assert_allclose(result[name], 0, atol=1e-6)
    for name in ("jacobian_min", "jacobian_max"):
        np.testing.assert_allclose(result[name], 1, atol=1e-6)


def read_strictly(path: Path) -> dict[str, Any]:
    """JSON by the letter: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path} holds {constant}, which is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return content


def check(metrics: dict[str, Any], failed: int) -> None:
    """AssertionError unless the results are the expected ones, the first ``failed`` of them errors."""
    assert [result["case"] for result in metrics["results"]] == list(CASES)
    assert (metrics["aggregates"]["cases"], metrics["aggregates"]["failed"]) == (len(CASES), failed)
    for number, (result, wrong_by) in enumerate(zip(metrics["results"], CASES.values(), strict=True)):
        if number < failed:
            assert result["error"] and result["tre_mm"]["mean"] is None
        else:
            check_result(result, wrong_by)


if __name__ == "__main__":
    what, first, second = sys.argv[1:]
    if what == "make":
        make(first, Path(second))
    else:
        check(read_strictly(Path(first)), int(second))
        print(f"made_up_cases: {first} is as expected")

"""The page and its pictures: what they show, that they load nothing, and that nothing in a result can break them."""

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from evaluation.cases import Case
from evaluation.evaluate import aggregate, evaluate_case
from evaluation.fields import write_learn2reg
from evaluation.pictures import (
    BEFORE,
    Slices,
    box_plots,
    coronal_slices,
    cumulative_errors,
    jacobian_overlay,
    panels,
    svg,
    values_by_label,
)
from evaluation.report import main, pictured, write_page
from resultpages.colours import FOLDED_RGB
from resultpages.pictures import jpeg
from tests.support.pages import Reader

ROTATED = [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
"""Index axes along -y, -z, x: rows of coronal slices are along the first one."""


def image(array: np.ndarray, direction: list[list[float]] | None = None, vector: bool = False) -> sitk.Image:
    made = sitk.GetImageFromArray(array, isVector=vector)
    made.SetSpacing((1.5, 2.0, 3.0))
    made.SetOrigin((-20.0, 30.0, 10.0))
    made.SetDirection(np.ravel(np.eye(3) if direction is None else direction).tolist())
    return made


def shifted_pair(direction: list[list[float]] | None = None) -> tuple[sitk.Image, sitk.Image, sitk.Image]:
    """A field that pulls from 4 mm farther along world x, a smooth image, and that image moved there."""
    u = np.zeros((12, 14, 16, 3), np.float32)
    u[..., 0] = 4.0
    field = image(u, direction, vector=True)
    axes = np.reshape(field.GetDirection(), (3, 3)) * field.GetSpacing()
    k, j, i = np.indices((12, 14, 16))
    world = np.stack([i, j, k], axis=-1) @ axes.T + field.GetOrigin()
    ramp = -600 + 10 * world[..., 0] + 3 * world[..., 2]
    fixed, moving = (image((ramp + shift).astype(np.float32), direction) for shift in (0.0, -40.0))
    return field, fixed, moving


def result(name: str, tre_mm: float | None, error: str | None = None) -> dict[str, Any]:
    tre = {"mean": tre_mm, "p95": tre_mm}
    dice = {"mean": None} if tre_mm is None else {"1": 0.9, "2": 0.8, "mean": 0.85}
    return {"case": name, "tre_mm": tre, "tre_initial_mm": tre, "dice": dice, "folding_percent": None, "error": error}


def metrics_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    values = [r["tre_mm"]["mean"] for r in results if r["error"] is None]
    of = dict.fromkeys(("mean", "std", "median", "min", "max", "worst30"), 7.77 if values else None)
    failed = sum(r["error"] is not None for r in results)
    aggregates = {"tre_mm": of, "tre_initial_mm": of, "cases": len(results), "failed": failed}
    return {"results": results, "aggregates": aggregates}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A case with everything: prediction, labels, images."""
    field, fixed, moving = shifted_pair()
    truth = tmp_path / "truth" / "a"
    truth.mkdir(parents=True)
    sitk.WriteImage(field, str(tmp_path / "a.mha"))
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[3:9, 3:11, 4:12] = 1
    for name, content in (("fixed", fixed), ("moving", moving)):
        sitk.WriteImage(content, str(truth / f"{name}.mha"))
        sitk.WriteImage(image(labels), str(truth / f"{name}_lobes.mha"))
    return tmp_path


def landmark_table() -> pd.DataFrame:
    return pd.DataFrame({"case": ["a"] * 9, "tre_mm": np.arange(9.0), "tre_initial_mm": np.arange(9.0) + 5})


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", [None, ROTATED], ids=["straight", "rotated"])
def test_warped_slice_is_the_fixed_one(direction: list[list[float]] | None) -> None:
    field, fixed, moving = shifted_pair(direction)
    slices = coronal_slices(field, None, fixed, moving)
    assert slices.fixed is not None and slices.moving is not None and slices.warped is not None
    seen = slices.warped > -1000
    seen[:, -3:] = False  # beyond the last voxel centre the border value holds
    assert seen.mean() > 0.5
    np.testing.assert_allclose(slices.warped[seen], slices.fixed[seen], atol=0.01)
    np.testing.assert_allclose(slices.determinant, 1.0, atol=1e-5)
    difference = slices.fixed - slices.moving
    assert np.median(difference) == pytest.approx(40.0, abs=0.01)


@pytest.mark.parametrize("direction", [None, ROTATED], ids=["straight", "rotated"])
def test_slices_show_the_head_above_and_the_left_on_the_right(direction: list[list[float]] | None) -> None:
    """The image rises by 10 HU per mm to the patient's left (+x) and 3 to the head (+z); pixels are square."""
    field, fixed, _ = shifted_pair(direction)
    shown = coronal_slices(field, None, fixed).fixed
    assert shown is not None
    middle = tuple(slice(n // 4, 3 * n // 4) for n in shown.shape)
    down, right = (np.diff(shown[middle], axis=axis).mean() for axis in (0, 1))
    assert right > 0 > down
    assert right / -down == pytest.approx(10 / 3, rel=0.01)


def test_the_row_is_where_the_lungs_are() -> None:
    field, _, _ = shifted_pair()
    y = np.broadcast_to(np.arange(14, dtype=np.float32)[:, None], (12, 14, 16))
    lungs = np.zeros((12, 14, 16), np.uint8)
    lungs[2:10, 9:12, 2:14] = 1
    shown = coronal_slices(field, image(lungs), image(np.ascontiguousarray(y))).fixed
    assert shown is not None and np.median(shown) == pytest.approx(10)


def test_folded_pixels_are_magenta_inside_the_lungs_only() -> None:
    determinant = np.array([[1.0, -0.5], [0.0, -0.5]])
    inside = np.array([[True, True], [True, False]])
    picture = jacobian_overlay(Slices(determinant, inside))
    magenta = np.array(FOLDED_RGB)
    is_magenta = np.abs(picture.astype(float) - magenta).max(axis=-1) <= 1
    np.testing.assert_array_equal(is_magenta, [[False, True], [True, False]])


def test_a_folded_field_is_shown_folded() -> None:
    """u = -2x turns the axis round: det = -1."""
    field, _, _ = shifted_pair()
    u = sitk.GetArrayFromImage(field)
    u[..., 0] = -2 * 1.5 * np.arange(16)
    np.testing.assert_allclose(coronal_slices(image(u, vector=True), None).determinant, -1.0, atol=1e-4)


def test_panels_are_those_that_can_be_made() -> None:
    field, fixed, moving = shifted_pair()
    assert list(panels(coronal_slices(field, None))) == ["Jacobian determinant"]
    assert list(panels(coronal_slices(field, None, fixed))) == ["fixed F", "Jacobian determinant"]
    every = panels(coronal_slices(field, None, fixed, moving))
    assert len(every) == 6 and every["after: F − M(y)"].shape == every["fixed F"].shape
    assert abs(int(np.median(every["after: F − M(y)"])) - 128) <= 1  # no difference is grey
    assert int(np.median(every["before: F − M"])) == pytest.approx(128 + 40 / 1000 * 255, abs=1)


def test_jpeg_holds_the_picture() -> None:
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, 12:] = 200
    head, data = jpeg(picture).split(",")
    assert head == "data:image/jpeg;base64"
    read = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="jpg")
    assert read.shape == (16, 24)  # one channel where all are the same
    np.testing.assert_allclose(read[:, [2, 20]], picture[:, [2, 20], 0], atol=4)
    picture[..., 0] = 100
    read = matplotlib.image.imread(io.BytesIO(base64.b64decode(jpeg(picture).split(",")[1])), format="jpg")
    assert read.shape == (16, 24, 3)
    np.testing.assert_allclose(read[:, [2, 20]], picture[:, [2, 20]], atol=6)


def test_cumulative_curve_passes_through_the_quantiles() -> None:
    """Errors 0 ... 100: x % of them are within x mm; the curve goes on at 100 % to the end of the axis."""
    figure = cumulative_errors({"a": np.arange(101.0), "b": np.arange(101.0) / 10})
    lines = figure.axes[0].lines
    x, percent = (np.asarray(v, float) for v in lines[0].get_data())
    np.testing.assert_allclose(x[:-1], percent[:-1], atol=1e-9)
    assert lines[2].get_xdata()[-1] == pytest.approx(98) and lines[2].get_ydata()[-1] == 100
    assert "a: 75 % within 75.00 mm" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize("name", ["_hidden", "a$x^$", "before"])
def test_legends_have_every_name_as_it_is(name: str) -> None:
    curves = cumulative_errors({name: np.arange(9.0)}, np.arange(9.0) + 1)
    boxes = box_plots({name: {"mean": [0.3, 0.5]}, "b": {"mean": [0.3, 0.9]}}, "Dice")
    for figure, text in ((curves, f"{name}: 75 % within 6.00 mm"), (boxes, name)):
        assert svg(figure)
        assert figure.axes[0].get_legend().get_texts()[0].get_text() == text
    colours = [line.get_color() for line in curves.axes[0].lines[:4]]
    assert colours[0] == colours[1] != BEFORE and colours[2] == colours[3] == BEFORE


def test_boxes_by_label() -> None:
    results = [{"dice": {"10": 0.1, "2": 0.2, "mean": 0.15}}, {"dice": {"mean": None}}, {"dice": None}]
    values = values_by_label(results, "dice")
    assert values == {"mean": [0.15], "2": [0.2], "10": [0.1]} and list(values) == ["mean", "2", "10"]
    figure = box_plots({"a": values, "b": {"mean": [0.3, 0.5, 0.9]}}, "Dice")
    medians = [
        line.get_ydata()[0]
        for line in figure.axes[0].lines
        if line.get_color() == "black" and len(line.get_xdata()) == 2
    ]
    assert 0.5 in medians and [t.get_text() for t in figure.axes[0].get_xticklabels()] == [
        "mean",
        "label 2",
        "label 10",
    ]


def test_svg_is_the_same_every_time() -> None:
    one, other = (svg(box_plots({"a": {"mean": [0.3, 0.5]}}, "Dice")) for _ in range(2))
    assert one == other and one.startswith("data:image/svg+xml;base64,")


# --- the page --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_page_of_a_case(folder: Path) -> None:
    case = Case("a", folder / "a.mha", folder / "truth" / "a")
    path = write_page(metrics_of([result("a", 4.25)]), landmark_table(), [case], folder)
    page = read(path)
    assert path == folder / "report.html"
    for text in ("1 case, none failed", "TRE (mm)", "7.77", "4.25", "Jacobian determinant", "Definitions"):
        assert text in page.text, text
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert sum(s.startswith("data:image/jpeg") for s in sources if s) == 6
    assert sum(s.startswith("data:image/svg") for s in sources if s) == 1  # landmarks
    assert not list(folder.glob(".*"))


def test_a_single_case_has_values_and_no_boxes_ranks_or_deviations(folder: Path) -> None:
    case = Case("a", folder / "a.mha", folder / "truth" / "a")
    text = read(write_page(metrics_of([result("a", 4.25)]), landmark_table(), [case], folder)).text
    assert "By label" in text and "0.900" in text and "0.800" in text
    for absent in ("of every case", "All cases", "Worst cases", "±", "30 % worst: "):
        assert absent not in text, absent


def test_several_cases_have_boxes(tmp_path: Path) -> None:
    page = read(write_page(metrics_of([result("a", 4.25), result("b", 5.0)]), landmark_table(), [], tmp_path))
    assert (
        "Dice30" in page.text
        and "Dice of every case, by label" in page.text
        and "All cases" in page.text
        and "By label" not in page.text
    )
    assert sum((a["src"] or "").startswith("data:image/svg") for tag, a in page.tags if tag == "img") == 2


def test_a_case_without_landmarks_and_lobes_has_pictures(folder: Path) -> None:
    truth = folder / "truth" / "a"
    for name in ("fixed_lobes.mha", "moving_lobes.mha"):
        (truth / name).unlink()
    case = Case("a", folder / "a.mha", truth)
    alone, _ = evaluate_case(case)
    assert alone["error"] is None
    metrics = {"results": [alone], "aggregates": aggregate([alone])}
    page = read(write_page(metrics, pd.DataFrame(), [case], folder))
    assert sum((a["src"] or "").startswith("data:image/jpeg") for tag, a in page.tags if tag == "img") == 6
    assert "neither landmarks nor lobes" in page.text and "SDlogJ" in page.text


def test_page_loads_nothing_and_runs_only_its_script(folder: Path) -> None:
    case = Case("a", folder / "a.mha", folder / "truth" / "a")
    path = write_page(metrics_of([result("a", 4.25)]), landmark_table(), [case], folder)
    page, text = read(path), path.read_text(encoding="utf-8")
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(v is not None and v.startswith("data:image/") for v in addresses)
    assert "@import" not in text and "url(" not in text
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and policy is not None and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_names_and_errors_cannot_break_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    results = [result(evil, 1.0), result("b" + evil, None, f"error {evil}")]
    path = write_page(metrics_of(results), pd.DataFrame(), [Case(evil, None, tmp_path)], tmp_path)
    page = read(path)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert evil in page.text and f"error {evil}" in page.text
    assert [a["data-value"] for _, a in page.tags if "title" in a] == [evil, "b" + evil]


def test_failed_cases_are_said_first(tmp_path: Path) -> None:
    results = [result("good", 1.0), result("bad", None, "bad.mha cannot be read")]
    text = read(write_page(metrics_of(results), pd.DataFrame(), [], tmp_path)).text
    assert "2 cases, 1 of them failed" in text
    assert text.index("bad.mha cannot be read") < text.index("Summary")


def test_all_failed(tmp_path: Path) -> None:
    path = write_page(metrics_of([result("a", None, "nothing there")]), pd.DataFrame(), [], tmp_path)
    text = read(path).text
    assert "No case could be evaluated" in text and "nothing there" in text


def test_a_broken_picture_is_said_and_the_page_stands(folder: Path) -> None:
    (folder / "truth" / "a" / "moving.mha").write_text("no image")
    case = Case("a", folder / "a.mha", folder / "truth" / "a")
    text = read(write_page(metrics_of([result("a", 4.25)]), landmark_table(), [case], folder)).text
    assert "No pictures: a/moving.mha cannot be read" in text and "Definitions" in text


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    """Cells carry what the script sorts by: all digits, empty where there is no value."""
    results = [result("a", 10.123456), result("b", 9.5), result("c", None, "x")]
    page = read(write_page(metrics_of(results), pd.DataFrame(), [], tmp_path))
    values = [a["data-value"] for tag, a in page.tags if tag == "td" and "data-value" in a]
    assert {"10.123456", "9.5", ""} <= set(values)
    assert sum(tag == "button" for tag, _ in page.tags) == len(values) / 3


def test_which_cases_are_pictured() -> None:
    results = [result(str(i), float(i)) for i in range(9)] + [result("x", None, "x")]
    assert pictured(results) == [
        ("4", "median, TRE 4.00 mm"),
        ("8", "worst, TRE 8.00 mm"),
        ("7", "2nd worst, TRE 7.00 mm"),
        ("6", "3rd worst, TRE 6.00 mm"),
    ]
    assert pictured(results[:1]) == [("0", "TRE 0.00 mm")] and pictured(results[-1:]) == []
    by_dice = [{"case": n, "dice": {"mean": d}} for n, d in (("a", 0.9), ("b", 0.5))]
    assert pictured(by_dice) == [("b", "worst, Dice 0.500"), ("a", "2nd worst, Dice 0.900")]


def test_command_takes_images_from_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, images = folder / "truth", folder / "images" / "a"
    images.mkdir(parents=True)
    for name in ("fixed.mha", "moving.mha"):
        (truth / "a" / name).rename(images / name)
    (folder / "metrics.json").write_text(json.dumps(metrics_of([result("a", 4.25)])))
    arguments = [str(folder), "--input", str(folder), "--ground-truth", str(truth)]
    assert main(arguments) == 0
    assert "warped M(y)" not in read(folder / "report.html").text
    assert main([*arguments, "--images", str(images.parent)]) == 0
    assert "warped M(y)" in read(folder / "report.html").text
    assert main([str(images), *arguments[1:]]) == 2
    assert "metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("landmarks.csv", "", "landmarks.csv: cannot be read"),
        ("landmarks.csv", "x,y,z\n1,2,3\n", "landmarks.csv: has the columns"),
        ("landmarks.csv", "case,tre_mm,tre_initial_mm\na,b,c\n", "landmarks.csv: holds something that is no number"),
        ("metrics.json", '{"results": [{"case": "a", "dice": {"1": "x"}}]}', "dice of the case a holds 'x'"),
    ],
)
def test_command_refuses_results_of_others(
    folder: Path, name: str, content: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "metrics.json").write_text('{"results": [{"case": "a"}]}')
    arguments = [str(folder), "--input", str(folder), "--ground-truth", str(folder / "truth")]
    assert main(arguments) == 0  # the aggregates follow from the results
    assert "1 case, none failed" in read(folder / "report.html").text
    (folder / name).write_text(content)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_learn2reg_fields_are_shown_as_they_are_measured(folder: Path) -> None:
    """In voxels of a moving grid that is another: without it, the picture would be of another field."""
    truth, field = folder / "truth" / "a", sitk.ReadImage(str(folder / "a.mha"))
    moving = sitk.Image(40, 40, 40, sitk.sitkUInt8)
    moving.SetOrigin((-30.0, 20.0, 0.0))
    sitk.WriteImage(moving, str(truth / "moving_lobes.mha"))
    write_learn2reg(field, folder / "disp_a.npz", moving)
    by_layout = []
    for name in ("a.mha", "disp_a.npz"):
        page = read(
            write_page(metrics_of([result("a", 4.25)]), pd.DataFrame(), [Case("a", folder / name, truth)], folder)
        )
        sources = [a["src"] for tag, a in page.tags if tag == "img" and "jpeg" in (a["src"] or "")]
        pictures = [base64.b64decode((source or "").split(",")[1]) for source in sources]
        by_layout.append([matplotlib.image.imread(io.BytesIO(p), format="jpg").astype(int) for p in pictures])
    assert len(by_layout[0]) == len(by_layout[1]) == 6
    assert all(np.abs(one - other).max() <= 8 for one, other in zip(*by_layout, strict=True))

"""report.html: what is on it, that it holds all it shows, and that nothing in a case can break it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithm.fields.transform import Transform
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid
from algorithm.lungs import LungMask
from algorithm.pages.page import registration_page
from algorithm.pages.pictures import arrows
from algorithm.pages.view import AXIS, ExpectedError, Pair, flat, seen, slice_view, volume_view
from algorithm.preparation.subject import Subject
from algorithm.report import NO_GPU, Report
from algorithm.results.ownership import PAGE_MARK, is_own_page
from algorithm.results.summary import figures, in_words
from phantom.pair import PhantomPair
from resultpages import viewer
from tests.support.pages import Reader
from tests.support.running import call_main, files_below, pair_options, results

pytestmark = pytest.mark.usefixtures("one_thread")

MOST_BYTES = 5_000_000
"""Of the pages of small phantoms; about one on a real pair."""
EVIL = "<script>alert(1)<img src=x>\"'&.mha"


def find_lungs(hu: torch.Tensor, lobes: torch.Tensor, grid: Grid, name: str) -> Subject:
    return Subject(Image(hu.round().short(), grid, Path(name)), LungMask(lobes > 0, grid))


@pytest.fixture(scope="module")
def pair(example_pair: PhantomPair) -> Pair:
    """The phantom with its exact field, and an expected error that rises towards the head."""
    p = example_pair
    fixed = find_lungs(p.fixed, p.fixed_lobes, p.fixed_grid, "fixed.mha")
    moving = find_lungs(p.moving, p.moving_lobes, p.moving_grid, "moving.mha")
    expected = torch.linspace(0, 4, p.fixed_grid.size[2])[None, None, :, None, None].expand(1, 1, *p.fixed_grid.shape)
    error = ExpectedError(expected, torch.ones_like(expected), p.fixed_grid)
    return Pair(fixed, moving, Transform(p.displacement_mm, p.fixed_grid), error)


def said(pair: Pair, **more: Any) -> dict[str, Any]:
    report = Report()
    names = {"fixed": pair.fixed.image.path.name, "moving": pair.moving.image.path.name}
    report.set(**names, **figures(pair.fixed, pair.moving, pair.transform), **more)
    return report.to_dict()


# --- what there is to see --------------------------------------------------------------------------------------------


def test_after_the_exact_field_the_scans_are_alike(pair: Pair) -> None:
    view = volume_view(pair)
    before, after = (np.abs(view.fixed_hu - moved)[view.lungs].mean() for moved in (view.before_hu, view.warped_hu))
    assert after < 0.6 * before
    litres = view.lungs.sum() * np.prod(view.grid.spacing) * 1e-6
    assert litres == pytest.approx(pair.fixed.lungs.litres, rel=0.05)


@pytest.mark.parametrize("plane", AXIS)
def test_pictures_have_the_head_above_and_the_right_on_the_left(pair: Pair, plane: Any) -> None:
    """A scan that rises by 10 HU per mm to the left, 3 to the back and 1 to the head, on square pixels."""
    grid = pair.fixed.image.grid
    k, j, i = np.indices(grid.shape)
    world = grid.to_world(np.stack([i, j, k], axis=-1))
    ramp = torch.from_numpy(world @ np.array([10.0, 3.0, 1.0])).float()[None, None]
    image = replace(pair.fixed.image, voxels=ramp)
    view = slice_view(replace(pair, fixed=Subject(image, pair.fixed.lungs)), plane)
    shown = flat(view.fixed_hu, plane)
    middle = shown[tuple(slice(2 * n // 5, 3 * n // 5) for n in shown.shape)]
    down, right = (float(np.median(np.diff(middle, axis=axis))) for axis in (0, 1))
    pixel = view.grid.spacing[0 if plane != "sagittal" else 1]
    expected = {"coronal": (-1.0, 10.0), "sagittal": (-1.0, 3.0), "axial": (3.0, 10.0)}[plane]
    np.testing.assert_allclose((down / pixel, right / pixel), expected, rtol=0.05)
    assert flat(view.lungs, plane).any()


def test_arrows_point_where_the_tissue_lies_in_the_moving_scan(pair: Pair) -> None:
    """20 mm to the left, 10 to the back and 30 to the head."""
    shift = torch.tensor([20.0, 10.0, 30.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *pair.fixed.image.grid.shape)
    moved = replace(pair, transform=Transform(shift, pair.fixed.image.grid))
    for plane, (right_mm, down_mm) in (("coronal", (20, -30)), ("sagittal", (10, -30)), ("axial", (20, 10))):
        view = slice_view(moved, plane)
        found = re.findall(r"M\d+,\d+l(-?[\d.]+),(-?[\d.]+)M", arrows(view, plane))
        pixels = [view.grid.spacing[a] for a in range(3) if a != AXIS[plane]]
        expected = (right_mm / pixels[0], down_mm / pixels[1])
        assert found
        np.testing.assert_allclose(np.array(found, float), np.broadcast_to(expected, (len(found), 2)), atol=0.06)


def test_volume_change_is_that_of_the_whole_transform(pair: Pair) -> None:
    grid = pair.fixed.image.grid
    transform = Transform(torch.zeros(1, 3, *grid.shape), grid, Affine.from_arrays(0.8 * np.eye(3), np.zeros(3)))
    shrunk = replace(pair, transform=transform)
    view = seen(shrunk, grid, pair.fixed.image, pair.moving.image)
    np.testing.assert_allclose(view.determinant, 0.8**3, rtol=1e-4)


def test_scans_that_lie_apart_are_compared_after_the_prealignment(pair: Pair) -> None:
    assert not pair.far
    away = replace(pair.moving.lungs.grid, origin=(900.0, 0.0, 0.0))
    lungs = LungMask(pair.moving.lungs.mask, away)
    moving = Subject(replace(pair.moving.image, grid=away), lungs)
    affine = Affine(offset=(950.0, 0.0, 0.0))
    far = replace(pair, moving=moving, transform=Transform(pair.transform.displacement, pair.transform.grid, affine))
    assert far.far and far.before == affine
    assert "lie far apart" in Reader(registration_page(far, said(far))).text


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_of_a_phantom(pair: Pair) -> None:
    error = {"mean_mm": 1.23, "p95_mm": 2.34, "share_above_3mm": 0.0456}
    jacobian = {"folded_voxels": 0, "voxels": 36720}
    text = registration_page(pair, said(pair, expected_error=error, jacobian=jacobian, weights_sha256="0123abc"))
    assert len(text.encode()) < MOST_BYTES
    page = Reader(text)
    assert page.tags[0] == ("html", {"lang": "en"})
    for words in ("No warnings", f"{pair.fixed.lungs.litres:.2f} l", "1.2 mm", "4.6 % of them beyond 3 mm", "0123abc"):
        assert words in page.text, words
    assert "Expected error" in page.text and "magenta" in page.text and "Histograms" in page.text
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)][:2] == ["h1", "h2"]
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) == 3 * (1 + 4 + 2) and all(a["alt"] for a in pictures)
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert drawings and all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert sum("histogram" in (a["class"] or "") for a in drawings) == 4


def test_without_an_expected_error_there_is_none(pair: Pair) -> None:
    alone = replace(pair, expected=None)
    page = Reader(registration_page(alone, said(alone)))
    assert "xpected error" not in page.text
    assert len([a for tag, a in page.tags if tag == "img"]) == 3 * (1 + 4 + 1)


def test_page_loads_nothing_and_runs_only_its_scripts(pair: Pair) -> None:
    text = registration_page(pair, said(pair), PAGE_MARK)
    page = Reader(text)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy and "img-src data:" in policy
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(v is not None and v.startswith(("data:image/jpeg", "#")) for v in addresses)
    assert not re.search(r"https?://", text) and "@import" not in text and "url(" not in text


def test_that_there_is_no_gpu_is_no_reason_to_doubt_the_result(pair: Pair) -> None:
    no_gpu = f"{NO_GPU} (there is none)."
    for warnings, doubted in (([no_gpu], False), ([no_gpu, "It folds."], True)):
        text = Reader(registration_page(pair, said(pair) | {"warnings": warnings})).text
        assert ("No warnings" in text) != doubted == ("It folds." in text)
        assert "No GPU" not in text


def test_names_and_warnings_cannot_break_the_page(pair: Pair) -> None:
    image = replace(pair.fixed.image, path=Path("folder") / EVIL)
    evil = replace(pair, fixed=Subject(image, pair.fixed.lungs))
    report = said(evil) | {"warnings": [f"{EVIL}: odd."]}
    page = Reader(registration_page(evil, report))
    ordinary = Reader(registration_page(pair, said(pair)))
    scripts = [sum(tag == "script" for tag, _ in one.tags) for one in (page, ordinary)]
    assert scripts[0] == scripts[1]
    assert page.text.count(EVIL) >= 2 and f"{EVIL}: odd." in page.text
    assert page.text.index(": odd.") < page.text.index("What was registered")


def test_without_the_viewer_the_pictures_are_the_page(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("algorithm.pages.page.library", lambda: None)
    page = Reader(registration_page(pair, said(pair)))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "NiiVue" not in page.text and not [a for _, a in page.tags if a.get("id") in ("canvas", "niivue", "layers")]


def test_volumes_of_the_viewer_are_small_and_licensed(pair: Pair) -> None:
    if viewer.library() is None:
        pytest.skip("the viewer was not fetched: python -m resultpages.fetch")
    text = registration_page(pair, said(pair))
    found = re.search(r'<script type="application/json" id="layers">(.*?)</script>', text, re.S)
    assert found
    layers = json.loads(found[1])
    assert [one["key"] for one in layers] == ["fixed", "warped", "difference", "motion", "volume", "error"]
    assert all(bool(one["data"]) != (one["key"] == "difference") for one in layers)
    assert "Redistributions in binary form" in Reader(text).text


# --- in words --------------------------------------------------------------------------------------------------------


def test_the_summary_is_in_words_with_units(pair: Pair, tmp_path: Path) -> None:
    from algorithm.results.outputs import prepare_outputs

    error = {"mean_mm": 1.23, "p95_mm": 2.34, "share_above_3mm": 0.0456}
    report = said(pair, jacobian={"folded_voxels": 0, "voxels": 10}, expected_error=error)
    text = "\n".join(in_words(report, prepare_outputs(tmp_path, "fixed", page=True)))
    for words in (
        "l fixed",
        "mm in the mean over the fixed lungs",
        "1.2 mm in the mean, 95 % of the lungs within 2.3 mm",
    ):
        assert words in text, words
    assert "Foldings:        none" in text and "Warnings:        none" in text and "report.html" in text
    assert not re.search(r"[{}_]", text.replace(str(tmp_path), ""))
    plain = "\n".join(in_words(said(pair), prepare_outputs(tmp_path, "fixed")))
    assert "Expected error" not in plain and "report.html" not in plain


def test_motion_is_measured_in_the_lungs(pair: Pair) -> None:
    shift = torch.tensor([3.0, 0.0, 4.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *pair.fixed.image.grid.shape)
    of = figures(pair.fixed, pair.moving, Transform(shift, pair.fixed.image.grid))["motion_mm"]
    assert of == pytest.approx({"mean": 5.0, "p95": 5.0, "max": 5.0})


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_writes_the_page_and_replaces_its_own_only(
    tmp_path: Path, example: Path, small_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = pair_options(example, tmp_path / "out", small_weights)
    page = tmp_path / "out" / "report.html"
    assert call_main(*options, "--report=auto") == 0
    assert is_own_page(page) and "write page" in results(tmp_path / "out")["timings_s"]
    assert 0 < results(tmp_path / "out")["motion_mm"]["mean"] <= results(tmp_path / "out")["motion_mm"]["max"]
    assert call_main(*options, "--report=off") == 0  # an earlier page is of an earlier case
    assert not page.exists()
    page.write_text("<!DOCTYPE html>\nmine")
    capfd.readouterr()
    assert call_main(*options, "--report=on") == 2
    assert "report.html: was not written by this program" in capfd.readouterr().err.splitlines()[-1]
    assert page.read_text().endswith("mine")
    assert call_main(*options, "--report=off") == 0
    assert page.read_text().endswith("mine")


def test_a_fault_in_the_page_does_not_take_the_results_with_it(
    tmp_path: Path, example: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("nothing")

    monkeypatch.setattr("algorithm.pages.page.registration_page", broken)
    assert call_main(*pair_options(example, tmp_path, small_weights), "--report=on") == 0
    assert "report.html" not in files_below(tmp_path)
    assert any("report.html could not be made" in warning for warning in results(tmp_path)["warnings"])

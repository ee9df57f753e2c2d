"""What both pages are made of: colours, charts, small volumes, templates, and the viewer's library."""

import base64
import gzip
import html
from pathlib import Path

import nibabel
import numpy as np
import pytest

from resultpages import fetch, viewer
from resultpages.charts import colour_bar, histogram, round_up
from resultpages.colours import CT, FOLDED_RGB, GOOD_TO_BAD, LEAST_TO_MOST, VOLUME, Scale, over
from resultpages.page import render, static
from resultpages.volumes import nifti


@pytest.mark.parametrize("colours", [LEAST_TO_MOST, GOOD_TO_BAD])
def test_scales_get_lighter_all_the_way(colours: tuple[str, ...]) -> None:
    lightness = Scale(0.0, 1.0, colours).table() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1.0).all() and lightness[-1] - lightness[0] > 150


def test_no_change_of_volume_is_white_and_the_ends_are_alike_in_weight() -> None:
    assert VOLUME.share(np.array([0.4, 1.0, 2.5, 0.5, 2.0])) == pytest.approx([0, 0.5, 1, 0.122, 0.878], abs=1e-3)
    assert (VOLUME.rgb(np.array([[1.0]])) >= 240).all()
    less, more = VOLUME.rgb(np.array([[0.6, 1 / 0.6]]))[0].astype(int)
    assert less[2] > less[0] + 60 and more[0] > more[2] + 60  # blue, orange
    assert not (VOLUME.table() == FOLDED_RGB).all(axis=1).any()
    assert (VOLUME.rgb(np.array([[-1.0]])) == VOLUME.rgb(np.array([[0.1]]))).all()


def test_colours_lie_over_a_part_only() -> None:
    grey = CT.rgb(np.full((2, 2), -400.0))
    red = np.broadcast_to(np.array([200, 0, 0], np.uint8), (2, 2, 3))
    mixed = over(grey, red, np.array([[True, False], [False, False]]), 0.5)
    assert mixed[0, 0].tolist() == [164, 64, 64] and (mixed[1] == grey[1]).all()


def test_histogram_counts_the_ends_and_is_told_in_words() -> None:
    chart = histogram("Title", "mm", {"a": np.array([-5.0, 0.5, 0.5, 99.0]), "none": np.array([])}, 0.0, 1.0, bins=2)
    assert chart.series[0].path == "M0,120V80.0H170.0V0.0H340.0V120Z"  # 1 and 3 of 4
    assert "a: median 0.5" in chart.alt and "none: no values" in chart.alt
    assert chart.ticks[0].text == "0"


def test_ticks_lie_where_the_colours_do() -> None:
    bar = colour_bar(VOLUME, "volume", (0.4, 1.0, 2.5), digits=1)
    assert [(round(t.at, 3), t.text) for t in bar.ticks] == [(0, "0.4"), (0.5, "1"), (1, "2.5")]
    assert bar.colours[0] == "#053061" and bar.colours[-1] == "#6b3002"


@pytest.mark.parametrize(("value", "end"), [(1.0, 1.0), (11.0, 15.0), (34.5, 40.0), (0.7, 0.8), (99.0, 100.0)])
def test_scales_end_on_round_numbers(value: float, end: float) -> None:
    assert round_up(value) == pytest.approx(end)


@pytest.mark.parametrize("turned", [False, True])
def test_volumes_lie_where_the_grid_says(turned: bool) -> None:
    """Read by nibabel: the same value at the same place, RAS."""
    axes = np.diag([2.0, 2.5, 3.0])
    if turned:
        c, s = np.cos(0.3), np.sin(0.3)
        axes = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ axes
    origin, voxels = np.array([-30.0, 12.0, 100.0]), np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    image = nibabel.Nifti1Image.from_bytes(nifti(voxels, axes, origin))
    data = np.asarray(image.dataobj)
    assert data.dtype == np.uint8 and data.shape == (5, 4, 3)
    for z, y, x in ((0, 0, 0), (2, 1, 3)):
        world = axes @ [x, y, z] + origin
        place = np.rint(np.linalg.inv(image.affine) @ [-world[0], -world[1], world[2], 1])[:3].astype(int)
        assert data[tuple(place)] == voxels[z, y, x]
    if not turned:
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")


def test_layers_hold_what_they_show() -> None:
    values = np.array([[[0.0, 5.0, 10.0, np.nan, 99.0]]])
    made = viewer.layer("key", "Title", "mm", values, Scale(0.0, 10.0, LEAST_TO_MOST), np.eye(3), np.zeros(3))
    stored = gzip.decompress(base64.b64decode(made.data))[352:]
    assert list(stored) == [255, 0, 255, 128, 1]  # backwards along x; 0 is nothing


def test_a_page_is_escaped_and_may_run_nothing_else(tmp_path: Path) -> None:
    assert static("style.css") and "</" not in static("viewer.js")
    values = dict.fromkeys(("failed", "remarks", "cards", "summaries", "charts", "worst", "pictured"), ())
    values |= dict.fromkeys(("labels", "none_left", "case_heads", "case_lines", "definitions"), ())
    text = render("evaluation.html.j2", title="<b>&", lead="<i>", **values)
    assert "&lt;b&gt;&amp;" in text and "<i>" not in text and "script-src 'none'" in html.unescape(text)


def test_only_the_tested_library_is_used(tmp_path: Path) -> None:
    viewer.library.cache_clear()
    other = tmp_path / "niivue.umd.js"
    assert viewer.library(other) is None
    other.write_text("alert(1)")
    viewer.library.cache_clear()
    assert viewer.library(other) is None
    viewer.library.cache_clear()
    with pytest.raises(ValueError, match="not the package that was tested"):
        fetch.member(b"something else")


def test_without_npm_it_is_said_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "library", lambda: None)
    monkeypatch.setattr(fetch, "npm", lambda: None)
    assert fetch.main() == 0
    assert "still pictures and no viewer" in capsys.readouterr().err

"""The page in a browser: no script error, the viewer draws, the slider moves. Skipped where there is no Chromium."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from algorithm.pages.page import registration_page
from algorithm.pages.view import Pair
from algorithm.results.ownership import PAGE_MARK
from resultpages.viewer import library
from tests.support.pages import browse, needs_chromium
from tests.test_page import pair, said  # noqa: F401  (a fixture)

pytestmark = [needs_chromium, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def page(tmp_path: Path, pair: Pair) -> Path:  # noqa: F811
    path = tmp_path / "report.html"
    path.write_text(registration_page(pair, said(pair), PAGE_MARK), encoding="utf-8")
    return path


@pytest.mark.skipif(library() is None, reason="the viewer was not fetched: python -m resultpages.fetch")
def test_the_viewer_draws_without_a_script_error(page: Path, tmp_path: Path) -> None:
    became, said_there = browse(page, tmp_path, "--dump-dom")
    assert not [line for line in said_there if re.search("error|refused|uncaught", line, re.I)], said_there
    assert 'data-viewer="ready"' in became
    assert re.search(r"<output [^>]*>Fixed scan: [−\d]+ HU", became)
    alone = (
        "<style>main > :not(.on-screen), .on-screen > :not(.viewer), header, footer { display: none }</style></head>"
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</head>", alone, 1), encoding="utf-8")
    browse(page, tmp_path, f"--screenshot={tmp_path / 'shot.png'}")
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    coloured = np.ptp(pixels, axis=-1) > 60
    grey = (np.ptp(pixels, axis=-1) < 6) & (pixels.mean(axis=-1) > 40) & (pixels.mean(axis=-1) < 200)
    assert coloured.mean() > 0.001 and grey.mean() > 0.05  # cross-hair, scan


def test_without_webgl_the_pictures_stand_and_no_script_fails(page: Path, tmp_path: Path) -> None:
    became, said_there = browse(page, tmp_path, "--dump-dom", "--disable-3d-apis")
    assert not [line for line in said_there if re.search("error|refused|uncaught", line, re.I)], said_there
    assert "data-viewer" not in became and 'class="scripted"' in became
    assert re.search(r'<div class="viewer" hidden', became)

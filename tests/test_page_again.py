"""report.html of a result in a folder: the page that the run wrote, made again from its files."""

import json
import re
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk

from algorithm.cascade.weights import save_errors
from algorithm.fields.expected_error import ErrorModels
from algorithm.results.ownership import is_own_page
from tests.support.made_up_results import MODEL
from tests.support.pages import Reader
from tests.support.running import call_main, files_below, lungreg, pair_options, results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> Path:
    """Both scans, and a result with all there is."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("fixed", "moving"):
        shutil.copy(example / f"{name}.mha", folder)
    shutil.copytree(small_weights, folder / "weights")
    save_errors(folder / "weights", ErrorModels(MODEL, MODEL), {})
    options = pair_options(folder, folder / "out", folder / "weights")
    assert call_main(*options, "--report=on", "--transforms=on", "--names=kind") == 0
    return folder


@pytest.fixture
def study(tmp_path: Path, finished: Path) -> Path:
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


def told(page: Path) -> list[str]:
    """The texts of the page, but for how it was made, which has a step more the second time, and digits."""
    text = Reader(page.read_text()).text.rpartition("How it was made")[0]
    return re.sub(r"\d+\.\d+", "_", text).split()


def test_it_is_the_page_that_the_run_wrote(study: Path) -> None:
    page = study / "out" / "report.html"
    before, first = told(page), Reader(page.read_text())
    for again in (False, True):  # the page is gone, or there
        if not again:
            page.unlink()
        assert lungreg("report", study / "out") == 0
        assert is_own_page(page) and told(page) == before
    second = Reader(page.read_text())
    pictures = [sum(tag == "img" for tag, _ in one.tags) for one in (first, second)]
    assert pictures[0] == pictures[1] == 21 and "Expected error" in second.text and len(before) > 200


def test_the_histograms_are_nearly_the_same(study: Path) -> None:
    """Drawn from transform.h5, which is the field to a ten-thousandth of a mm."""
    page = study / "out" / "report.html"
    before = re.findall(r'aria-label="([^"]*)"', page.read_text())
    assert lungreg("report", study / "out") == 0
    after = re.findall(r'aria-label="([^"]*)"', page.read_text())
    assert len(before) == len(after) > 0


@pytest.mark.parametrize("layout", ["itk", "grand-challenge"])
def test_it_comes_of_the_field_alone_too(tmp_path: Path, example: Path, small_weights: Path, layout: str) -> None:
    """As the platform keeps it: no transforms, no page; and the scans lie elsewhere."""
    shutil.copytree(example, tmp_path / "in")
    options = pair_options(tmp_path / "in", tmp_path / "out", small_weights)
    assert call_main(*options, f"--field-layout={layout}") == 0
    assert "report.html" not in files_below(tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "moved")
    given = [f"--{name}={tmp_path / 'moved' / name}.mha" for name in ("fixed", "moving")]
    assert lungreg("report", tmp_path / "out", *given) == 0
    text = Reader((tmp_path / "out" / "report.html").read_text()).text
    assert "fixed.mha" in text and "xpected error" not in text


def test_what_is_missing_or_in_the_way_is_said(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, page = study / "out", study / "out" / "report.html"

    def refused(*arguments: object) -> str:
        assert lungreg("report", *arguments) == 2
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return said.err

    assert "results.json: cannot be read" in refused(study)
    before = page.read_bytes()
    assert "another grid than the moving scan" in refused(out, "--moving", study / "fixed.mha")
    (study / "moving.mha").rename(study / "other.mha")
    assert "moving.mha: the moving scan is not there any more, expected --moving" in refused(out)
    assert page.read_bytes() == before
    assert lungreg("report", out, "--moving", study / "other.mha") == 0
    shifted = sitk.ReadImage(str(study / "other.mha"))
    shifted.SetOrigin([value + 5 for value in shifted.GetOrigin()])
    sitk.WriteImage(shifted, str(study / "shifted.mha"))
    assert "another grid than the moving scan" in refused(out, "--moving", study / "shifted.mha")
    page.write_text("mine")
    assert "was not written by this program" in refused(out, "--moving", study / "other.mha")
    assert page.read_text() == "mine"
    figures = results(out)
    del figures["version"]
    (out / "results.json").write_text(json.dumps(figures))
    assert "has no version" in refused(out, "--moving", study / "other.mha")

"""The script for 3D Slicer, run with a stand-in for Slicer's modules that writes down what is called."""

import ast
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import SimpleITK as sitk

from algorithm.files.writing import write_image
from algorithm.tools.slicer import NAME
from tests.support.grids import sitk_image
from tests.support.made_up_results import EXPECTED, FIXED, MOVING, blobs, write_result
from tests.support.running import lungreg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with both scans, and the result below it."""
    folder = tmp_path / 'a study\'s "files"'
    folder.mkdir()
    for name, grid in (("now", FIXED), ("before", MOVING)):
        sitk.WriteImage(sitk_image(blobs(grid, "int16"), grid), str(folder / f"{name}.nii.gz"))
    result = write_result(folder / "result")
    for kind, grid in (("warped-moving", FIXED), ("expected-error", EXPECTED.grid)):
        (result / "images" / kind).mkdir(parents=True)
        values = EXPECTED.at(grid)
        write_image(result / "images" / kind / "now_of.nrrd", values, grid)
    text = (result / "results.json").read_text()
    paths = '"paths": {"fixed": "../now.nii.gz", "moving": "../before.nii.gz"}, '
    (result / "results.json").write_text(text.replace("{", "{" + paths, 1))
    return folder


class Slicer(ModuleType):
    """What the script uses of it. Each file must be there, and one that the program named can read."""

    def __init__(self) -> None:
        super().__init__("slicer")
        self.loaded: dict[str, Path] = {}
        self.nodes: dict[str, MagicMock] = {}
        self.layers: dict[str, Any] = {}
        self.util = SimpleNamespace(
            loadVolume=self.load_volume, loadTransform=self.load_transform, setSliceViewerLayers=self.show
        )
        self.mrmlScene = SimpleNamespace(GetNodeByID=lambda name: self.nodes[name])

    def load_volume(self, path: str, properties: dict[str, str]) -> MagicMock:
        sitk.ReadImage(path)
        return self.node(properties["name"], path)

    def load_transform(self, path: str) -> MagicMock:
        sitk.ReadTransform(path)
        return self.node("transform", path)

    def node(self, name: str, path: str) -> MagicMock:
        assert Path(path).is_absolute()
        self.loaded[name] = Path(path).resolve()
        self.nodes[name] = MagicMock(name=name)
        return self.nodes[name]

    def show(self, **layers: Any) -> None:
        self.layers = layers


def run(script: Path, monkeypatch: pytest.MonkeyPatch) -> Slicer:
    slicer = Slicer()
    monkeypatch.setitem(sys.modules, "slicer", slicer)
    exec(compile(script.read_text(), str(script), "exec"), {"__file__": str(script), "__name__": "__main__"})
    return slicer


def test_it_opens_everything(study: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert lungreg("slicer", study / "result") == 0
    script = study / "result" / NAME
    assert f"Slicer --python-script {script}" in capfd.readouterr().out
    slicer = run(script, monkeypatch)
    assert slicer.loaded == {
        "fixed": (study / "now.nii.gz").resolve(),
        "moving": (study / "before.nii.gz").resolve(),
        "moving, registered": (study / "result/images/warped-moving/now_of.nrrd").resolve(),
        "expected error (mm)": (study / "result/images/expected-error/now_of.nrrd").resolve(),
        "transform": (study / "result/transform.h5").resolve(),
    }
    assert slicer.layers["background"] is slicer.nodes["fixed"]
    assert slicer.layers["foreground"] is slicer.nodes["moving, registered"]
    slicer.nodes["transform"].SetName.assert_called_once_with("fixed to moving")
    display = slicer.nodes["expected error (mm)"].GetDisplayNode()
    display.SetWindowLevelMinMax.assert_called_once_with(0.0, 5.0)
    display.SetAndObserveColorNodeID.assert_called_once()
    assert display.SetThreshold.call_args[0][0] == 0 and display.SetApplyThreshold.call_args[0] == (True,)
    for name in ("fixed", "moving", "moving, registered"):
        slicer.nodes[name].GetDisplayNode().SetWindowLevelMinMax.assert_called_once_with(-1350.0, 150.0)


def test_the_study_may_be_moved_as_a_whole(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lungreg("slicer", study / "result") == 0
    study.rename(tmp_path / "elsewhere")
    slicer = run(tmp_path / "elsewhere" / "result" / NAME, monkeypatch)
    assert all(path.is_relative_to((tmp_path / "elsewhere").resolve()) for path in slicer.loaded.values())
    assert lungreg("slicer", tmp_path / "elsewhere" / "result") == 0  # in place of the first one


def test_the_script_may_lie_elsewhere_and_the_scans_too(study: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (study / "now.nii.gz").rename(tmp_path / "moved.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert lungreg("slicer", study / "result", "look.py", "--fixed", "moved.nii.gz") == 0
    slicer = run(Path("look.py"), monkeypatch)
    assert slicer.loaded["fixed"] == (tmp_path / "moved.nii.gz").resolve()
    assert slicer.loaded["moving"] == (study / "before.nii.gz").resolve()


def test_without_transforms_and_expected_error(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(study / "result" / "images" / "expected-error")
    path = study / "result" / "results.json"
    path.write_text(path.read_text().replace("inverse_residual_mm", "left_out"))
    assert lungreg("slicer", study / "result") == 0
    slicer = run(study / "result" / NAME, monkeypatch)
    assert slicer.loaded.keys() == {"fixed", "moving", "moving, registered"}


def test_a_dicom_series_comes_by_slicers_database(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (study / "series").mkdir()
    asked: list[Any] = []

    class Database:
        def __enter__(self) -> SimpleNamespace:
            return SimpleNamespace(patients=lambda: ["p"])

        def __exit__(self, *_: object) -> None:
            asked.append("closed")

    utils = SimpleNamespace(
        TemporaryDICOMDatabase=Database,
        importDicom=lambda folder, _: asked.append(Path(folder).resolve()),
        loadPatientByUID=lambda _: ["node1"],
    )
    module = ModuleType("DICOMLib")
    module.DICOMUtils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "DICOMLib", module)
    assert lungreg("slicer", study / "result", "--moving", study / "series") == 0
    monkeypatch.setattr(Slicer, "__init__", with_node(Slicer.__init__))
    slicer = run(study / "result" / NAME, monkeypatch)
    slicer.nodes["node1"].SetName.assert_called_once_with("moving")
    assert asked == [(study / "series").resolve(), "closed"]


def with_node(init: Any) -> Any:
    def made(self: Slicer) -> None:
        init(self)
        self.nodes["node1"] = MagicMock()

    return made


def test_what_is_missing_or_in_the_way_is_said(study: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert lungreg("slicer", *arguments) == 2
        return capfd.readouterr().err

    result = study / "result"
    assert "results.json: cannot be read" in refused(tmp_path)
    assert "ends in .py" in refused(result, tmp_path / "a.txt")
    (result / NAME).write_text("mine")
    assert f"{NAME}: is there already" in refused(result)
    assert (result / NAME).read_text() == "mine"
    assert lungreg("slicer", result, "--overwrite") == 0
    assert "expected the moving scan" in refused(result, "--moving", "nowhere.mha")
    (study / "before.nii.gz").unlink()
    assert "is not there any more, expected --moving" in refused(result)
    path = result / "results.json"
    path.write_text(path.read_text().replace('"paths"', '"left_out"'))
    assert "does not say where the fixed scan lies, expected --fixed" in refused(result)
    shutil.rmtree(result / "images")
    given = ("--fixed", study / "now.nii.gz", "--moving", study / "now.nii.gz")
    assert "has 0 images in images/warped-moving" in refused(result, *given)


def test_the_script_needs_nothing_of_ours(study: Path) -> None:
    """Slicer's Python is another one, which may be older."""
    assert lungreg("slicer", study / "result") == 0
    ast.parse((study / "result" / NAME).read_text(), feature_version=(3, 9))
    assert "algorithm" not in (study / "result" / NAME).read_text()

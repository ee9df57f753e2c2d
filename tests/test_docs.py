"""The pages on use: every command and every line of Python in them is run, on a result that was made up."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import algorithm
from algorithm import __main__ as container
from algorithm.cascade.weights import save_errors
from algorithm.fields.expected_error import ErrorModels
from algorithm.fields.frame import framed
from algorithm.files.writing import write_field, write_image
from algorithm.options import Options
from tests.support.grids import sitk_image
from tests.support.made_up_results import EXPECTED, FIXED, MODEL, MOVING, WAVY, blobs, write_result
from tests.support.point_files import POINTS, fcsv, stl
from tests.support.running import coarsely, lungreg

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = Path(__file__).parent.parent / "docs" / "use"
COMMANDS = [
    (page.name, line.partition("#")[0].strip())
    for page in sorted(PAGES.glob("*.md"))
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    write_result(folder / "result")
    images = folder / "result" / "images"
    for kind in ("displacement-field", "warped-moving", "expected-error"):
        (images / kind).mkdir(parents=True)
    write_field(images / "displacement-field" / "later_field.nii.gz", FIXED, [framed(WAVY).field(FIXED)], "itk")
    write_image(images / "warped-moving" / "later_warped.nii.gz", torch.full((1, 1, *FIXED.shape), 7.0), FIXED)
    write_image(images / "expected-error" / "later_error.nii.gz", EXPECTED.at(FIXED), FIXED)
    figures = json.loads((folder / "result" / "results.json").read_text())
    figures["paths"] = {"fixed": "../later.nii.gz", "moving": "../earlier.nii.gz"}
    (folder / "result" / "results.json").write_text(json.dumps(figures))
    for name in ("onto_later", "later_segmentations"):
        (folder / name).mkdir()
    for name, grid in (("later", FIXED), ("earlier", MOVING), ("other_grid", FIXED), ("lungs", FIXED)):
        sitk.WriteImage(sitk_image(blobs(grid, "int16"), grid), str(folder / f"{name}.nii.gz"))
    for name, grid in (("now", FIXED), ("before", MOVING)):  # as results.json has them
        sitk.WriteImage(sitk_image(blobs(grid, "int16"), grid), str(folder / f"{name}.mha"))
    sitk.WriteImage(sitk_image(blobs(MOVING, "uint8"), MOVING), str(folder / "lobes.nii.gz"))
    (folder / "nodule.fcsv").write_text(fcsv(POINTS, "LPS"))
    (folder / "vessels.stl").write_bytes(stl(POINTS, True))
    rows = "".join(f"{x},{y},{z}\n" for x, y, z in POINTS)
    for name in ("points.csv", "there.csv", "nodules_earlier.csv", "nodules_later.csv"):
        (folder / name).write_text(f"x,y,z\n{rows}")
    return folder


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20 and {page for page, _ in COMMANDS} >= {"points.md", "apply.md", "other_programs.md"}
    pages = {page.name for page in PAGES.iterdir()} - {"README.md"}
    assert all(f"({name})" in (PAGES / "README.md").read_text() for name in pages)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value if value.startswith("lung") else None)
def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], made_up: Path, page: str,
    command: str,
) -> None:  # fmt: skip
    shutil.copytree(made_up, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if command.endswith("there.csv --from fixed"):
        Path("there.csv").unlink()
    taken: list[Options] = []
    monkeypatch.setattr(container, "run_once", taken.append)
    program, *arguments = shlex.split(command)
    assert program == "lungreg"
    assert lungreg(*arguments) == 0, capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err
    for options in taken:
        assert options.output == Path("result") and options.inputs().fixed.name == "later.nii.gz"


@pytest.fixture
def scans(
    tmp_path: Path, example: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch, made_up: Path
) -> Iterator[None]:
    """A pair to register, quickly, in the folder where the test then is; `lungreg` is the package."""
    for name, of in (("later", "fixed"), ("earlier", "moving")):
        shutil.copy(example / f"{of}.mha", tmp_path / f"{name}.mha")
        sitk.WriteImage(sitk.ReadImage(str(example / f"{of}.mha")), str(tmp_path / f"{name}.nii.gz"))
    sitk.WriteImage(sitk.ReadImage(str(example / "moving_lobes.mha")), str(tmp_path / "lobes.nii.gz"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lungreg", algorithm)
    shutil.copytree(small_weights, tmp_path / "weights")
    save_errors(tmp_path / "weights", ErrorModels(MODEL, MODEL), {})
    monkeypatch.setattr("algorithm.cascade.weights.BUNDLED", tmp_path / "weights")
    with coarsely("algorithm.registration"):
        yield


@pytest.mark.usefixtures("scans")
def test_python() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / "python.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"pairs": [("later.mha", "earlier.mha", "other")]}
    for block in blocks:
        exec(block.replace('refine="fast"', 'refine="off"').replace("(fixed, moving)", '(fixed, moving, "off")'), names)
    assert (Path("result") / "transform.h5").exists() and (Path("other") / "transform.h5").exists()


def test_lines_for_simpleitk(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made_up)
    (block,) = re.findall(r"^```python\n(.*?)^```", (PAGES / "other_programs.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {"sitk": sitk, "point_in_fixed": POINTS[0].tolist()}
    names |= {"fixed": sitk.ReadImage("later.nii.gz"), "moving": sitk.ReadImage("earlier.nii.gz")}
    exec(block, names)
    assert np.linalg.norm(np.array(names["point_in_fixed"]) - POINTS[0]) < 0.2


def test_lines_for_a_field_in_nifti(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimpleITK and nibabel move a voxel to the same place."""
    monkeypatch.chdir(made_up)
    blocks = re.findall(r"^```python\n(.*?)^```", (PAGES / "formats.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {"sitk": sitk, "nibabel": nibabel, "voxel": (9, 7, 5)}
    names |= {"fixed": sitk.ReadImage("later.nii.gz"), "moving": sitk.ReadImage("earlier.nii.gz")}
    for block in blocks:
        exec(block, names)
    field = sitk.ReadImage("result/images/displacement-field/later_field.nii.gz", sitk.sitkVectorFloat64)
    by_simpleitk = sitk.DisplacementFieldTransform(field).TransformPoint(FIXED.to_world(np.array((9, 7, 5))).tolist())
    np.testing.assert_allclose(names["point_in_moving"] * [-1, -1, 1], by_simpleitk, atol=1e-3)
    assert len(blocks) == 2 and isinstance(names["warped"], sitk.Image)


@pytest.mark.usefixtures("scans")
def test_notebook() -> None:
    """Cell by cell; the last line of one that compares is true."""
    names: dict[str, object] = {}
    cells = json.loads((PAGES / "lungreg.ipynb").read_text())["cells"]
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        *before, last = source.splitlines()
        exec("\n".join(before), names)
        if re.search(" [<>] ", last):
            assert eval(last, names), last
        else:
            exec(last, names)
    assert isinstance(names["there"], np.ndarray) and Path("result").is_dir()

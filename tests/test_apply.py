"""Images, labels and surfaces through a result, onto either scan; the second opinion is SimpleITK's, by the files."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.files.writing import write_field
from algorithm.geometry import Grid
from algorithm.results.ownership import TRANSFORMS
from algorithm.results.result import Scan, read_result
from tests.support.grids import sitk_image
from tests.support.made_up_results import FIXED, MOVING, WAVY, blobs, write_result
from tests.support.running import lungreg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(tmp_path_factory.mktemp("result"))


def expected(result: Path, source: Path, onto: Scan, interpolator: int, background: float) -> np.ndarray:
    transform = sitk.ReadTransform(str(result / TRANSFORMS[onto == "moving"]))
    reference = sitk_image(np.zeros((FIXED if onto == "fixed" else MOVING).shape), FIXED if onto == "fixed" else MOVING)
    of = sitk.ReadImage(str(source))
    pixel = of.GetPixelID() if background == 0 else sitk.sitkFloat64
    return sitk.GetArrayFromImage(sitk.Resample(of, reference, transform, interpolator, background, pixel))


@pytest.mark.parametrize("onto", ["fixed", "moving"])
@pytest.mark.parametrize(
    ("dtype", "interpolation", "interpolator", "background"),
    [
        ("int16", "linear", sitk.sitkLinear, -1000),
        ("float32", "bspline", sitk.sitkBSpline, -1000),
        ("uint8", "nearest", sitk.sitkNearestNeighbor, 0),
        ("uint8", "majority", sitk.sitkLabelLinear, 0),
    ],
)
def test_images_are_those_that_simpleitk_makes(
    tmp_path: Path, result: Path, onto: Scan, dtype: str, interpolation: str, interpolator: int, background: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("algorithm.results.apply.SLAB_VOXELS", 2000)  # several slabs
    grid = MOVING if onto == "fixed" else FIXED
    source, out = tmp_path / "a.nrrd", tmp_path / "b.mha"
    sitk.WriteImage(sitk_image(blobs(grid, dtype), grid), str(source))
    assert lungreg("apply", result, source, out, "--onto", onto, "--interpolation", interpolation) == 0
    found, on = sitk.ReadImage(str(out)), FIXED if onto == "fixed" else MOVING
    assert (found.GetSize(), found.GetSpacing(), found.GetOrigin()) == (on.size, on.spacing, on.origin)
    np.testing.assert_allclose(found.GetDirection(), np.ravel(on.direction), atol=1e-12)
    values, theirs = sitk.GetArrayFromImage(found), expected(result, source, onto, interpolator, background)
    assert values.dtype == dtype and len(np.unique(values)) > 3
    np.testing.assert_allclose(values, np.rint(theirs) if dtype == "int16" else theirs, atol=1e-2)
    assert 0.02 < (values == background).mean() < 0.9


@pytest.mark.parametrize("onto", ["fixed", "moving"])
def test_an_image_goes_where_its_points_go(tmp_path: Path, result: Path, onto: Scan) -> None:
    """A bright voxel of one scan is on the other where `lungreg points` says."""
    grid, of = (MOVING, "moving") if onto == "fixed" else (FIXED, "fixed")
    values = np.zeros(grid.shape, np.float32)
    values[13, 14, 15] = 1
    sitk.WriteImage(sitk.SmoothingRecursiveGaussian(sitk_image(values, grid), 8.0), str(tmp_path / "a.mha"))
    centre = ",".join(map(str, grid.to_world(np.array([15, 14, 13]))))
    (tmp_path / "a.csv").write_text(f"x,y,z\n{centre}\n")
    assert lungreg("apply", result, tmp_path / "a.mha", tmp_path / "a.csv", tmp_path, "--onto", onto) == 0
    found = sitk.ReadImage(str(tmp_path / f"a_on_{onto}.mha"))
    z, y, x = np.unravel_index(np.argmax(sitk.GetArrayViewFromImage(found)), found.GetSize()[::-1])
    brightest = found.TransformIndexToPhysicalPoint((int(x), int(y), int(z)))
    point = np.array((tmp_path / f"a_on_{onto}.csv").read_text().splitlines()[1].split(",")[:3], float)
    assert np.linalg.norm(point - brightest) < 8
    assert np.linalg.norm(point - grid.to_world(np.array([15, 14, 13]))) > 20
    np.testing.assert_allclose(
        point, read_result(result).mapped(grid.to_world(np.array([[15, 14, 13]])), of)[0], atol=1e-3
    )


def test_another_grid_and_background(tmp_path: Path, result: Path) -> None:
    reference = Grid((9, 8, 7), (20.0, 20.0, 30.0), (-100.0, -100.0, 80.0))
    sitk.WriteImage(sitk_image(np.zeros(reference.shape, np.uint8), reference), str(tmp_path / "reference.nii.gz"))
    sitk.WriteImage(sitk_image(blobs(MOVING, "float32"), MOVING), str(tmp_path / "a.nii.gz"))
    options = ("--onto=fixed", f"--reference={tmp_path / 'reference.nii.gz'}", "--background=7")
    assert lungreg("apply", result, tmp_path / "a.nii.gz", tmp_path / "b.nii.gz", *options) == 0
    found = sitk.ReadImage(str(tmp_path / "b.nii.gz"))
    assert (found.GetSize(), found.GetSpacing()) == (reference.size, reference.spacing)
    assert (sitk.GetArrayViewFromImage(found) == 7).mean() > 0.3


def test_labels_that_vanish_are_named(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = blobs(MOVING, "uint8")
    values[0, 0, 0] = 77
    sitk.WriteImage(sitk_image(values, MOVING), str(tmp_path / "a.mha"))
    assert lungreg("apply", result, tmp_path / "a.mha", tmp_path / "b.mha", "--onto=fixed") == 0
    said = capfd.readouterr().out
    assert "if these are labels, --interpolation nearest" in said
    assert "of the moving scan (before.mha), brought onto the fixed scan (now.mha)" in said
    options = ("--onto=fixed", "--interpolation=nearest", "--overwrite")
    assert lungreg("apply", result, tmp_path / "a.mha", tmp_path / "b.mha", *options) == 0
    assert "no voxel is left of the label(s) 77" in capfd.readouterr().out


def test_a_result_without_transforms_still_brings_images_onto_the_fixed_scan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images" / "displacement-field"
    folder.mkdir(parents=True)
    write_field(folder / "a.mha", FIXED, [WAVY.field(FIXED)], "itk")
    (tmp_path / "results.json").write_text("{}")
    source, reference = tmp_path / "a.mha", tmp_path / "r.mha"
    sitk.WriteImage(sitk_image(blobs(MOVING, "int16"), MOVING), str(source))
    sitk.WriteImage(sitk_image(np.zeros(FIXED.shape, np.uint8), FIXED), str(reference))
    assert lungreg("apply", tmp_path, source, tmp_path / "b.mha", "--onto=fixed") == 2
    assert "expected --reference" in capfd.readouterr().err
    assert lungreg("apply", tmp_path, source, tmp_path / "b.mha", "--onto=fixed", f"--reference={reference}") == 0
    field = sitk.ReadImage(str(folder / "a.mha"), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    theirs = sitk.Resample(sitk.ReadImage(str(source)), sitk.ReadImage(str(reference)), transform, sitk.sitkLinear, -1000.0, sitk.sitkFloat64)  # fmt: skip  # noqa: E501
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "b.mha"))), np.rint(sitk.GetArrayFromImage(theirs))
    )
    assert lungreg("apply", tmp_path, source, tmp_path / "c.mha", "--onto=moving", f"--reference={reference}") == 2
    assert "--transforms on" in capfd.readouterr().err


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.mha"
    sitk.WriteImage(sitk_image(blobs(MOVING, "int16"), MOVING), str(source))
    sitk.WriteImage(sitk.Image((5, 5, 5, 2), sitk.sitkInt16), str(tmp_path / "four.mha"))
    (tmp_path / "b").mkdir()
    before = {path.name for path in tmp_path.rglob("*")}
    for arguments, says in (
        ([source], "OUT is missing"),
        ([source, source, "--overwrite"], "is what is read"),
        ([source, tmp_path / "b.dcm"], "b.dcm: is no name for an image"),
        ([source, tmp_path / "b.csv"], "b.csv: is of another kind"),
        ([source, source, tmp_path / "c"], "c: is no folder"),
        ([source, source, tmp_path / "b"], "would have one name"),
        ([tmp_path / "four.mha", tmp_path / "b.mha"], "expected a 3-D scalar image"),
        ([tmp_path / "none.mha", tmp_path / "b.mha"], "none.mha"),
        ([source, tmp_path / "b.mha", "--interpolation=best"], "--interpolation"),
        ([source, tmp_path / "b.mha", "--reference", tmp_path / "none.mha"], "none.mha"),
    ):
        assert lungreg("apply", result, *arguments, "--onto=fixed") == 2, arguments
        said = capfd.readouterr().err
        assert says in said and "Traceback" not in said
    assert lungreg("apply", result, source, tmp_path / "b.mha") == 2
    assert "--onto" in capfd.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == before

"""Results into the formats of other programs, and back by our readers; by theirs where they are installed."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.fields.frame import framed
from algorithm.files.writing import write_field
from algorithm.results.ownership import TRANSFORMS
from evaluation.convert import main
from evaluation.fields import read_field
from tests.support.grids import sitk_image
from tests.support.made_up_results import FIXED, MOVING, WAVY, write_result

pytestmark = pytest.mark.usefixtures("one_thread")

THERE = framed(WAVY).field(FIXED)[0].permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the field on the fixed grid, too."""
    folder = write_result(tmp_path_factory.mktemp("result"))
    (folder / "images" / "displacement-field").mkdir(parents=True)
    write_field(folder / "images" / "displacement-field" / "a.mha", FIXED, [framed(WAVY).field(FIXED)], "itk")
    return folder


def vectors(field: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(field)


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd", "warp.nii.gz", "a.h5", "a.tfm", "ras.nii.gz", "empire10", "a.txt"])
def test_a_result_is_the_same_map_in_every_format(tmp_path: Path, result: Path, name: str) -> None:
    out, fixed = tmp_path / name, tmp_path / "fixed.mha"
    sitk.WriteImage(sitk_image(np.zeros(FIXED.shape, np.uint8), FIXED), str(fixed))
    options = ["--to", "nifti"] if name.startswith("ras") else []
    assert main([str(result), str(out), *options]) == 0
    read = tmp_path / "a_field.mha" if name == "a.txt" else out
    np.testing.assert_allclose(vectors(read_field(read, sitk.ReadImage(str(fixed)))), THERE, atol=1e-3)


def test_learn2reg_counts_in_the_voxels_of_the_moving_scan(tmp_path: Path, result: Path) -> None:
    assert main([str(result), str(tmp_path / "disp_1.nii.gz")]) == 0
    voxels = nibabel.load(tmp_path / "disp_1.nii.gz").get_fdata()
    for index in ((3, 4, 5), (20, 11, 9)):
        moved = FIXED.to_world(np.array(index)) + THERE[index[::-1]]
        np.testing.assert_allclose(index + voxels[index], MOVING.to_index(moved), atol=1e-3)


@pytest.mark.parametrize("name", ["a.mha", "a.tfm"])
def test_the_inverse_lies_on_the_moving_scan(tmp_path: Path, result: Path, name: str) -> None:
    assert main([str(result), str(tmp_path / name), "--inverse"]) == 0
    theirs = sitk.ReadTransform(str(result / TRANSFORMS[1]))
    if name == "a.mha":
        field = sitk.ReadImage(str(tmp_path / name))
        assert (field.GetSize(), field.GetSpacing()) == (MOVING.size, MOVING.spacing)
        found = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    else:
        found = sitk.ReadTransform(str(tmp_path / name))
    for index in ((5, 4, 3), (20, 22, 19)):
        point = MOVING.to_world(np.array(index)).tolist()
        np.testing.assert_allclose(found.TransformPoint(point), theirs.TransformPoint(point), atol=1e-3)


def test_without_its_field_the_transform_is_sampled(tmp_path: Path, result: Path) -> None:
    shutil.copytree(result, tmp_path / "r", ignore=shutil.ignore_patterns("images"))
    assert main([str(tmp_path / "r"), str(tmp_path / "a.mha")]) == 0
    np.testing.assert_allclose(vectors(sitk.ReadImage(str(tmp_path / "a.mha"))), THERE, atol=1e-3)


def test_a_result_that_lacks_what_is_asked_for(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(result, tmp_path / "r", ignore=shutil.ignore_patterns("images", "*.h5"))
    for options, says in (([], "has no transform.h5"), (["--inverse"], "has no inverse.h5")):
        assert main([str(tmp_path / "r"), str(tmp_path / "a.mha"), *options]) == 2
        assert says in capfd.readouterr().err and not (tmp_path / "a.mha").exists()


def test_nifti_vectors_say_what_they_are(tmp_path: Path, result: Path) -> None:
    """nibabel reads RAS mm at RAS positions."""
    assert main([str(result), str(tmp_path / "a.nii.gz"), "--to", "nifti"]) == 0
    found = nibabel.load(tmp_path / "a.nii.gz")
    assert found.header.get_intent()[0] == "displacement vector" and found.shape == (*FIXED.size, 1, 3)
    at = found.affine @ [3, 4, 5, 1]
    np.testing.assert_allclose(at[:3] * [-1, -1, 1], FIXED.to_world(np.array([3, 4, 5])), atol=1e-4)
    np.testing.assert_allclose(found.get_fdata()[3, 4, 5, 0] * [-1, -1, 1], THERE[5, 4, 3], atol=1e-4)


# --- other programs --------------------------------------------------------------------------------------------------


@pytest.fixture
def moving_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    smooth = sitk.SmoothingRecursiveGaussian(sitk_image(rng.normal(size=MOVING.shape).astype(np.float32), MOVING), 12.0)
    sitk.WriteImage(smooth * 1000, str(tmp_path / "moving.nii.gz"))
    return tmp_path / "moving.nii.gz"


@pytest.mark.parametrize("onto", ["fixed", "moving"])
@pytest.mark.parametrize("form", ["h5", "warp"])
def test_ants_applies_it_as_simpleitk(tmp_path: Path, result: Path, moving_file: Path, onto: str, form: str) -> None:
    ants = pytest.importorskip("ants")
    grid = FIXED if onto == "fixed" else MOVING
    reference = tmp_path / "reference.nii.gz"
    sitk.WriteImage(sitk_image(np.zeros(grid.shape, np.float32), grid), str(reference))
    name = str(result / TRANSFORMS[onto == "moving"])
    if form == "warp":
        name = str(tmp_path / "warp.nii.gz")
        assert main([str(result), name, *(["--inverse"] if onto == "moving" else [])]) == 0
    read = [ants.image_read(str(path)) for path in (reference, moving_file)]
    found = ants.apply_transforms(*read, [name], interpolator="linear", defaultvalue=0)
    ants.image_write(found, str(tmp_path / "ants.nii.gz"))
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "ants.nii.gz")))
    transform = sitk.ReadTransform(str(result / TRANSFORMS[onto == "moving"]))
    source = sitk.ReadImage(str(moving_file))
    ours = sitk.GetArrayFromImage(
        sitk.Resample(source, sitk.ReadImage(str(reference)), transform, sitk.sitkLinear, 0.0)
    )
    far = np.abs(theirs - ours) > 0.5
    assert far.mean() < 2e-3, far.mean()  # the outermost voxels
    assert np.abs(ours).max() > 50


@pytest.mark.parametrize("onto", ["fixed", "moving"])
def test_transformix_applies_it_as_simpleitk(tmp_path: Path, result: Path, moving_file: Path, onto: str) -> None:
    itk = pytest.importorskip("itk")
    grid, options = (FIXED, []) if onto == "fixed" else (MOVING, ["--inverse"])
    assert main([str(result), str(tmp_path / "parameters.txt"), *options]) == 0
    parameters = itk.ParameterObject.New()
    parameters.ReadParameterFile(str(tmp_path / "parameters.txt"))
    theirs = itk.array_from_image(itk.transformix_filter(itk.imread(str(moving_file), itk.F), parameters))
    transform = sitk.ReadTransform(str(result / TRANSFORMS[onto == "moving"]))
    reference = sitk_image(np.zeros(grid.shape, np.float32), grid)
    ours = sitk.Resample(sitk.ReadImage(str(moving_file)), reference, transform, sitk.sitkLinear, -1000.0)
    far = np.abs(theirs - sitk.GetArrayFromImage(ours)) > 0.5
    assert far.mean() < 2e-3, far.mean()

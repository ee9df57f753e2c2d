"""What is written does not fold, or says so."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from algorithm.deliver import FieldGrid, deliver, write_unfolded
from algorithm.errors import InputError
from algorithm.fields.transform import Transform
from algorithm.files.images import Image, Layout, read_field, read_image
from algorithm.geometry import Affine, Grid, jacobian_determinant, validity
from algorithm.lungs import LungMask
from algorithm.preparation.subject import Subject
from algorithm.report import Report
from algorithm.results.outputs import prepare_outputs
from algorithm.results.ownership import TRANSFORMS
from tests.support.grids import sitk_image
from tests.support.running import field_image
from tests.support.strategies import smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

COARSE = Grid((16, 14, 12), (4.0, 4.0, 4.0), (-30.0, -20.0, 100.0))
OUTPUT = Grid((40, 30, 21), (1.5, 1.9, 2.4), (-28.0, -19.0, 99.0), ((0.8, -0.6, 0.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0)))
LUNGS = LungMask(torch.ones(1, 1, *COARSE.shape, dtype=torch.bool), COARSE)


def smallest_written(path: Path) -> float:
    """The smallest determinant of the field in the file, by `jacobian_determinant`."""
    field, grid = read_field(path)
    return float(jacobian_determinant(field.double(), grid).min())


def spikes() -> Tensor:
    u = smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0))
    u[0, :, 6, 7, 8] += 15.0
    u[0, 2, 3, 3, 3] -= 20.0
    return u


def test_a_smooth_field_is_written_as_it_is(tmp_path: Path) -> None:
    report, transform = Report(), Transform(smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0)), COARSE)
    assert write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, "itk", report) is transform
    jacobian = report.to_dict()["jacobian"]
    assert jacobian["jacobian_min_everywhere"] == pytest.approx(smallest_written(tmp_path / "u.mha"), abs=1e-4)
    assert jacobian["folded_voxels"] == 0 and report.to_dict()["warnings"] == []


@pytest.mark.parametrize("layout", ["itk", "grand-challenge"])
def test_a_field_that_folds_is_repaired_before_it_is_left(tmp_path: Path, layout: str) -> None:
    report, transform = Report(), Transform(spikes(), COARSE, Affine.from_arrays(np.eye(3) * 1.1, np.zeros(3)))
    folded = transform.field(OUTPUT)
    assert (jacobian_determinant(folded, OUTPUT) <= 0).any()
    written = write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, layout, report)
    assert smallest_written(tmp_path / "u.mha") > 0
    said = report.to_dict()
    assert said["jacobian"]["folded_voxels"] == 0
    assert all("smoothed" in warning for warning in said["warnings"]) and said["warnings"]
    changed = (written.displacement != transform.displacement).any(dim=1)
    assert 0 < changed.float().mean() < 0.5


def test_what_cannot_be_repaired_is_said_with_the_count(tmp_path: Path) -> None:
    """A pre-alignment that mirrors: no field in front of it helps."""
    mirror = Affine.from_arrays(np.diag([-1.0, 1.0, 1.0]), np.zeros(3))
    report, transform = Report(), Transform(torch.zeros(1, 3, *COARSE.shape), COARSE, mirror)
    write_unfolded(tmp_path / "u.mha", OUTPUT, transform, LUNGS, "itk", report)
    said = report.to_dict()
    assert said["jacobian"]["folded_voxels"] == OUTPUT.size[0] * OUTPUT.size[1] * OUTPUT.size[2]
    warning = said["warnings"][-1]
    assert str(said["jacobian"]["folded_voxels"]) in warning and "repair failed" in warning


# --- on the grid of its computation ----------------------------------------------------------------------------------

AFFINE = Affine.from_arrays(
    np.array([[1.1, 0.1, 0.0], [-0.1, 0.9, 0.05], [0.0, 0.02, 1.05]]), np.array([9.0, -4.0, 60])
)


def noise() -> Tensor:
    """A scan on `OUTPUT`, -900 to -501 HU."""
    return torch.randint(-900, -500, (1, 1, *OUTPUT.shape), generator=torch.Generator().manual_seed(1)).short()


def delivered(folder: Path, transform: Transform, field_grid: FieldGrid, layout: Layout = "itk") -> Path:
    """The results of a registration of two scans on `OUTPUT`."""
    subject = Subject(Image(noise(), OUTPUT, folder), LUNGS)
    report = Report()
    deliver(prepare_outputs(folder, "a"), OUTPUT, transform, subject, subject, layout, report, field_grid)
    return folder


@pytest.mark.parametrize("layout", ["itk", "grand-challenge"])
def test_the_small_field_resampled_by_simpleitk_is_the_large_one(tmp_path: Path, layout: Layout) -> None:
    transform = Transform(smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0)), COARSE, AFFINE)
    large, small = (delivered(tmp_path / kind, transform, kind, layout) for kind in ("fixed", "network"))
    (path,) = (small / "images" / "displacement-field").glob("*.mha")
    field, grid = read_field(path)
    assert grid == COARSE and field_image(small).GetDimension() == (3 if layout == "itk" else 4)
    assert path.stat().st_size < 12.1 * COARSE.size[0] * COARSE.size[1] * COARSE.size[2] + 1000
    vectors = sitk_image(field[0].permute(1, 2, 3, 0).contiguous().numpy(), grid)
    reference = sitk_image(np.zeros(OUTPUT.shape, np.uint8), OUTPUT)
    found = sitk.GetArrayFromImage(sitk.Resample(vectors, reference, sitk.Transform(), sitk.sitkLinear, 0.0))
    (path,) = (large / "images" / "displacement-field").glob("*.mha")
    expected = read_field(path)[0][0].permute(1, 2, 3, 0).numpy()
    inside = within_outermost_centres(OUTPUT, COARSE)
    assert 0.2 < inside.mean() < 1
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-3)
    assert np.abs(found[~inside] - expected[~inside]).max() > 1  # nothing there


def within_outermost_centres(grid: Grid, small: Grid) -> np.ndarray:
    """(z, y, x): the voxels of ``grid`` around which ``small`` has eight."""
    cells = small.cropped((0, 0, 0), (small.size[0] - 1, small.size[1] - 1, small.size[2] - 1))
    middles = Grid(cells.size, small.spacing, tuple(small.to_world(np.full(3, 0.5)).tolist()), small.direction)
    return validity(torch.zeros(1, 3, *grid.shape, dtype=torch.float64), grid, middles)[0, 0].numpy()


def test_the_warped_image_is_that_of_the_written_field_also_after_a_repair(tmp_path: Path) -> None:
    """SimpleITK resamples the moving image by the field in the file; where that leads outside it, there is air."""
    transform = Transform(spikes(), COARSE, Affine.from_arrays(np.eye(3) * 1.1, np.array([3.0, 2.0, -9.0])))
    folder = delivered(tmp_path, transform, "fixed")
    field, _ = read_field(next((folder / "images" / "displacement-field").glob("*.mha")))
    assert (field - transform.field(OUTPUT)).abs().max() > 1  # it was repaired
    warped = read_image(next((folder / "images" / "warped-moving").glob("*.mha"))).voxels[0, 0].numpy()
    vectors = sitk_image(field[0].permute(1, 2, 3, 0).double().contiguous().numpy(), OUTPUT)
    moving = sitk_image(noise()[0, 0].numpy(), OUTPUT)
    air = -1000.0
    transform_ = sitk.DisplacementFieldTransform(vectors)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, moving, transform_, sitk.sitkLinear, air, sitk.sitkFloat32))
    assert 0.05 < (expected == air).mean() < 0.5
    np.testing.assert_array_equal(warped == air, expected == air)
    assert np.percentile(np.abs(warped - expected), 99.9) < 1
    assert np.abs(warped - expected).max() < 3


def test_the_warped_image_does_not_depend_on_the_grid_of_the_field(tmp_path: Path) -> None:
    transform = Transform(smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0)), COARSE)
    images = []
    for kind in ("fixed", "network"):
        (path,) = (delivered(tmp_path / kind, transform, kind) / "images" / "warped-moving").glob("*.mha")
        images.append(read_image(path))
    assert images[0].grid == images[1].grid == OUTPUT
    assert torch.equal(images[0].voxels, images[1].voxels) and len(images[0].voxels.unique()) > 100


def test_folding_is_checked_and_repaired_on_the_grid_that_is_written(tmp_path: Path) -> None:
    report, transform = Report(), Transform(spikes(), COARSE)
    assert (jacobian_determinant(transform.field(COARSE), COARSE) <= 0).any()
    write_unfolded(tmp_path / "u.mha", COARSE, transform, LUNGS, "itk", report)
    assert smallest_written(tmp_path / "u.mha") > 0
    assert report.to_dict()["jacobian"]["voxels"] == COARSE.size[0] * COARSE.size[1] * COARSE.size[2]


# --- transforms for other programs -----------------------------------------------------------------------------------


def transforms_delivered(folder: Path, transform: Transform) -> Report:
    """The same with transform.h5 and inverse.h5."""
    subject, report = Subject(Image(noise(), OUTPUT, folder), LUNGS), Report()
    deliver(prepare_outputs(folder, "a", transforms=True), OUTPUT, transform, subject, subject, "itk", report)
    return report


def test_the_transforms_are_those_of_the_written_field(tmp_path: Path) -> None:
    """After its repair; SimpleITK takes both there and back."""
    report = transforms_delivered(tmp_path, Transform(spikes(), COARSE, AFFINE))
    field, grid = read_field(next((tmp_path / "images" / "displacement-field").glob("*.mha")))
    there, back = (sitk.ReadTransform(str(tmp_path / name)) for name in TRANSFORMS)
    inside = within_outermost_centres(OUTPUT, COARSE)
    index = np.argwhere(inside)[::37, ::-1]
    for (x, y, z), point in zip(index, grid.to_world(index), strict=True):
        moved = np.array(there.TransformPoint(point.tolist()))
        np.testing.assert_allclose(moved - point, field[0, :, z, y, x].numpy(), atol=2e-3)
        assert np.linalg.norm(np.array(back.TransformPoint(moved.tolist())) - point) < 1.0  # it was noise
    residual = report.to_dict()["inverse_residual_mm"]
    assert 0 < residual["mean"] < residual["p99"] <= residual["max"] < 5


def test_a_run_without_transforms_takes_those_of_an_earlier_one_away(tmp_path: Path) -> None:
    smooth = Transform(smooth_field(COARSE, 3.0, torch.Generator().manual_seed(0)), COARSE, AFFINE)
    transforms_delivered(tmp_path, smooth)
    assert all((tmp_path / name).exists() for name in TRANSFORMS)
    delivered(tmp_path, smooth, "fixed")
    assert not any((tmp_path / name).exists() for name in TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_another_program_is_refused_before_anything_is_computed(tmp_path: Path, name: str) -> None:
    sitk.WriteTransform(sitk.TranslationTransform(3), str(tmp_path / name))
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match="was not written by this program"):
        prepare_outputs(tmp_path, "a", transforms=True)
    delivered(tmp_path, Transform(torch.zeros(1, 3, *COARSE.shape), COARSE), "fixed")  # which asks for none
    assert (tmp_path / name).read_bytes() == before

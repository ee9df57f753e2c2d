"""The transforms for other programs: the same map in the box, affine far outside, and undone by the inverse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from algorithm.errors import InputError
from algorithm.fields.frame import framed
from algorithm.fields.inverse import inverse, residual_mm
from algorithm.fields.newton import derivative, displaced, undone
from algorithm.fields.transform import Transform
from algorithm.geometry import Affine, Grid, jacobian_determinant
from algorithm.lungs import LungMask
from algorithm.results.ownership import TRANSFORMS, is_own_transform
from algorithm.results.transformfiles import read_inverse, read_lungs, read_transform, write_inverse, write_transform
from tests.support.grids import sitk_image
from tests.support.made_up_results import AFFINE, BOX, FLIP, TURN, WAVY, lungs_at, points_in, wavy
from tests.support.remembered import remembered

TRANSFORM, INVERSE = TRANSFORMS

pytestmark = pytest.mark.usefixtures("one_thread")

SLOPE = derivative(WAVY.displacement, BOX), BOX
BALL = torch.zeros(1, 1, *BOX.shape, dtype=torch.bool)
BALL[..., 6:-6, 6:-6, 6:-6] = True


def moving_lungs(affine: Affine) -> LungMask:
    """A block in the middle of the box, in the moving world."""
    return lungs_at(affine(BOX.to_world(np.array([8, 8, 8]))))


def test_in_the_box_the_framed_map_is_the_same() -> None:
    found = framed(WAVY)
    points = points_in(BOX)
    np.testing.assert_allclose(
        displaced(points, found.displacement, found.grid), displaced(points, WAVY.displacement, BOX), atol=1e-4
    )
    assert found.affine == AFFINE


def test_the_frame_ends_at_zero_and_does_not_fold() -> None:
    found = framed(WAVY)
    for axis in (2, 3, 4):
        for end in (0, -1):
            assert found.displacement.select(axis, end).abs().max() == 0
    assert jacobian_determinant(found.displacement, found.grid).min() > 0.1
    around = points_in(BOX.padded(60), 4000)
    steps = np.linalg.norm(
        np.diff([displaced(around + d, found.displacement, found.grid) for d in (0, 0.01)], axis=0)[0] - 0.01, axis=1
    )
    assert steps.max() < 0.02  # no step anywhere


def test_a_frame_that_folds_is_made_wider() -> None:
    steep = WAVY.displacement.clone()
    steep[0, 0] += torch.linspace(-40, 40, BOX.size[0])  # stretches to the edge, of ± 48 mm
    narrow = framed(Transform(steep, BOX))
    assert jacobian_determinant(narrow.displacement, narrow.grid).min() > 0


def test_undone_is_the_inverse_at_points() -> None:
    points = torch.from_numpy(points_in(BOX, 2000)).float()
    there = torch.from_numpy(displaced(points.numpy(), WAVY.displacement, BOX))
    found = undone(there.double(), (WAVY.displacement.double(), BOX), SLOPE, there.double(), steps=6, close_mm=1e-4)
    assert float((found - points).abs().max()) < 1e-3


def test_undone_also_where_newton_does_not_come_home() -> None:
    """No step at all: half-steps from the target find it."""
    points = torch.from_numpy(points_in(BOX, 50))
    there = torch.from_numpy(displaced(points.numpy(), WAVY.displacement, BOX))
    found = undone(there, (WAVY.displacement.double(), BOX), SLOPE, there, steps=0, close_mm=1e-4)
    assert float((found - points).abs().max()) < 1e-3


@pytest.mark.parametrize("affine", [Affine(), AFFINE])
def test_the_inverse_undoes_the_transform_in_the_lungs(affine: Affine) -> None:
    there, lungs = framed(Transform(wavy(BOX), BOX, affine)), moving_lungs(affine)
    back = inverse(there, lungs)
    rest = residual_mm(there, back, lungs)
    assert len(rest) > 500 and rest.mean() < 0.02 and np.quantile(rest, 0.99) < 0.1  # waves as short as voxels allow
    for displacement, grid in (back.rough, back.rest):
        none = (torch.zeros_like(displacement), grid)
        without = replace(back, rough=none) if grid == back.rough[1] else replace(back, rest=none)
        assert residual_mm(there, without, lungs).mean() > 2 * rest.mean()
        assert all(displacement.select(axis, end).abs().max() < 1e-3 for axis in (2, 3, 4) for end in (0, -1))
    far = np.array([[5000.0, -300.0, 20.0], [0.0, 0.0, -4000.0]])
    np.testing.assert_allclose(back(affine(far)), far, atol=1e-6)


def test_the_inverse_of_lungs_that_lie_elsewhere_is_still_one() -> None:
    """The pre-alignment failed."""
    there = framed(WAVY)
    lungs = LungMask(torch.ones(1, 1, 9, 9, 9, dtype=torch.bool), Grid((9, 9, 9), (9.0, 9.0, 9.0), (900.0, 0.0, 0.0)))
    points = points_in(BOX)
    back = inverse(there, lungs)
    assert np.abs(back(there.affine(displaced(points, there.displacement, there.grid))) - points).max() < 1
    assert residual_mm(there, back, lungs).max() < 1e-3


def test_the_inverse_displaces_the_voxels_of_the_moving_scan_as_its_points() -> None:
    there, lungs = framed(WAVY), moving_lungs(AFFINE)
    back, grid = inverse(there, lungs), lungs.grid
    field = back.field(grid)[0].permute(1, 2, 3, 0).reshape(-1, 3).numpy()
    index = np.argwhere(np.ones(grid.shape))[:, ::-1]
    points = grid.to_world(index)
    np.testing.assert_allclose(points + field, back(points), atol=1e-3)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    there = framed(WAVY)
    write_transform(tmp_path / TRANSFORM, there, LungMask(BALL, BOX))
    write_inverse(tmp_path / INVERSE, remembered(inverse)(there, moving_lungs(AFFINE)), moving_lungs(AFFINE))
    return tmp_path


def test_simpleitk_maps_points_as_we_do(written: Path) -> None:
    points = points_in(BOX.padded(10), 300)
    there, back = read_transform(written / TRANSFORM), read_inverse(written / INVERSE)
    for name, ours in (
        (TRANSFORM, lambda p: there.affine(displaced(p, there.displacement, there.grid))),
        (INVERSE, back),
    ):
        theirs = sitk.ReadTransform(str(written / name))
        found = np.array([theirs.TransformPoint(point) for point in points.tolist()])
        np.testing.assert_allclose(found, ours(points), atol=1e-4)
        assert np.linalg.norm(found - points, axis=1).max() > 5


@pytest.mark.parametrize("direction", [FLIP, TURN])
def test_simpleitk_resamples_by_the_file_as_by_the_written_field(tmp_path: Path, direction: tuple) -> None:
    fixed = Grid((20, 18, 16), (6.0, 5.0, 7.0), (-40.0, -60.0, 110.0), direction)
    write_transform(tmp_path / TRANSFORM, framed(WAVY), LungMask(BALL, BOX))
    image = sitk_image(np.zeros(fixed.shape, np.float32), fixed)
    field = sitk.TransformToDisplacementField(
        sitk.ReadTransform(str(tmp_path / TRANSFORM)),
        sitk.sitkVectorFloat64,
        image.GetSize(),
        image.GetOrigin(),
        image.GetSpacing(),
        image.GetDirection(),
    )
    expected = framed(WAVY).field(fixed)[0].permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose(sitk.GetArrayFromImage(field), expected, atol=1e-3)


def test_what_is_read_is_what_was_written_to_a_ten_thousandth(written: Path) -> None:
    there, again = framed(WAVY), read_transform(written / TRANSFORM)
    assert (again.grid, again.affine) == (there.grid, there.affine)
    assert (again.displacement - there.displacement).abs().max() <= 2.0**-14 + 1e-6
    lungs = read_lungs(written / TRANSFORM)
    assert lungs.grid == BOX and torch.equal(lungs.mask, BALL)


def test_the_bytes_are_always_the_same_and_fewer_than_the_numbers(written: Path, tmp_path: Path) -> None:
    before = (written / TRANSFORM).read_bytes()
    write_transform(written / TRANSFORM, framed(WAVY), LungMask(BALL, BOX))
    assert (written / TRANSFORM).read_bytes() == before
    assert len(before) < 0.7 * 4 * framed(WAVY).displacement.numel()


def test_own_files_are_told_by_their_mark(written: Path) -> None:
    assert is_own_transform(written / TRANSFORM) and is_own_transform(written / INVERSE)
    (written / TRANSFORM).rename(written / "other.h5")
    assert not is_own_transform(written / "other.h5") and not is_own_transform(written / TRANSFORM)
    sitk.WriteTransform(sitk.ReadTransform(str(written / "other.h5")), str(written / TRANSFORM))
    assert not is_own_transform(written / TRANSFORM)
    (written / TRANSFORM).write_text("no HDF5")
    assert not is_own_transform(written / TRANSFORM)


def test_other_files_are_refused_with_a_reason(written: Path) -> None:
    with pytest.raises(InputError, match="expected CompositeTransform"):
        read_transform(written / INVERSE)
    (written / TRANSFORM).write_bytes((written / TRANSFORM).read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be read as a transform"):
        read_transform(written / TRANSFORM)
    with pytest.raises(InputError, match="cannot be read as a transform"):
        read_inverse(written / "nowhere.h5")


def test_the_edges_of_the_field_are_undone_on_its_own_grid() -> None:
    """Voxels of 4 to 5 mm are divided by four; without p more is left."""
    lungs, there = moving_lungs(Affine()), framed(Transform(wavy(BOX, 12.0), BOX))
    back = inverse(there, lungs)
    for _, grid in (back.rest, back.edges):
        np.testing.assert_allclose(grid.spacing, np.array(there.grid.spacing) / 4)
    without = replace(back, edges=(torch.zeros_like(back.edges[0]), back.edges[1]))
    assert residual_mm(there, without, lungs).mean() > residual_mm(there, back, lungs).mean()

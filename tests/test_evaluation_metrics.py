"""The metrics of the evaluation: exact truth by hand, properties, and second opinions that share no code with them."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from grand_challenge_metrics.stats import (
    hausdorff_distance,
    percentile_hausdorff_distance,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from algorithm.geometry import Grid
from evaluation.errors import CaseError
from evaluation.fields import axes_of
from evaluation.jacobian import jacobian_determinant, jacobian_statistics
from evaluation.labels import dice, warp_labels
from evaluation.landmarks import displacement_at, landmark_errors, read_landmarks
from evaluation.surfaces import SurfaceDistances, surface_distances, surface_points
from tests.support.grids import OBLIQUE, blank, noisy_field, sitk_image
from tests.support.strategies import as_matrix, examples, generators, grids, rotations, smooth_field

PROPERTY = examples(15)
MASKS = Path(__file__).parents[2] / "shared" / "data" / "motion" / "l2r_lungct_masks"


def constant(grid: Grid, vector_mm: object) -> sitk.Image:
    return sitk_image(np.full((*grid.shape, 3), vector_mm, np.float32), grid)


def linear(grid: Grid, gradient: np.ndarray) -> sitk.Image:
    """u(x) = gradient · (x - origin) in the world."""
    zyx = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)
    return sitk_image((zyx[..., ::-1] @ (gradient @ grid.axes).T).astype(np.float32), grid)


def box(shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    """True in start ≤ (z, y, x) < stop."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


def blob(shape: tuple[int, ...], seed: int, share: float = 0.4) -> np.ndarray:
    """A random mask with at least one voxel, smooth enough to have an inside."""
    values = np.random.default_rng(seed).random(shape)
    values = sum(np.roll(values, s, a) for a in range(3) for s in (-1, 0, 1))
    return np.asarray(values >= np.quantile(values, 1 - share))


# --- landmarks -------------------------------------------------------------------------------------------------------


def test_errors_of_a_translation_by_hand() -> None:
    """Along the index axes (x, y, z): 1, 0 and -1 voxels; the truth is off by (0.3, -0.4, 0) mm along them.

    The landmarks lie a fifth of a voxel off the centres, 0.5 mm along z, which snapping takes away.
    """
    direction = np.array(OBLIQUE.direction)
    points = OBLIQUE.to_world(np.array([[2.0, 3.0, 4.2], [5.0, 1.0, 7.2]]))
    field = constant(OBLIQUE, OBLIQUE.axes @ [1.0, 0.0, -1.0])
    truth = points + OBLIQUE.axes @ [1.0, 0.0, -1.0] + direction @ [0.3, -0.4, 0.0]
    errors = landmark_errors(field, points, truth)
    np.testing.assert_allclose(errors.initial_mm, np.linalg.norm([1.5 + 0.3, -0.4, -2.5]), atol=1e-4)
    np.testing.assert_allclose(errors.trilinear_mm, 0.5, atol=1e-4)
    np.testing.assert_allclose(errors.snapped_mm, np.linalg.norm([0.3, -0.4, 0.5]), atol=1e-4)


def test_snapping_moves_the_mapped_point_to_a_voxel_of_the_moving_grid() -> None:
    """By 0.4 voxels it goes back, by 0.6 on to the next; the truth is the start."""
    points = OBLIQUE.to_world(np.array([[4.0, 4.0, 4.0]]))
    for part, expected_mm in ((0.4, 0.0), (0.6, OBLIQUE.spacing[2])):
        errors = landmark_errors(constant(OBLIQUE, OBLIQUE.axes @ [0.0, 0.0, part]), points, points)
        np.testing.assert_allclose(errors.trilinear_mm, part * OBLIQUE.spacing[2], atol=1e-4)
        np.testing.assert_allclose(errors.snapped_mm, expected_mm, atol=1e-4)
    one_mm = blank(Grid((3, 3, 3), (1.0, 1.0, 1.0), (float(points[0, 0]), float(points[0, 1]), float(points[0, 2]))))
    errors = landmark_errors(constant(OBLIQUE, (0.0, 0.0, 0.7)), points, points, one_mm)
    np.testing.assert_allclose(errors.snapped_mm, 1.0, atol=1e-4)


@PROPERTY
@given(grid=grids(min_size=2), seed=st.integers(0, 2**31))
def test_the_field_between_voxels_is_what_sitk_has(grid: Grid, seed: int) -> None:
    field = noisy_field(grid)
    random = np.random.default_rng(seed)
    points = grid.to_world(random.uniform(-0.49, np.array(grid.size) - 0.51, (20, 3)))
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    expected = np.array([transform.TransformPoint(p) for p in points.tolist()])
    np.testing.assert_allclose(points + displacement_at(field, points), expected, atol=1e-4)


def test_outside_the_field_the_displacement_is_zero() -> None:
    """As for labels, and as ITK has it; where all lie outside, the field is of another place."""
    index = np.array([[3.0, 3.0, 3.0], [-0.49, 0.0, 0.0], [10.6, 0.0, 0.0], [0.0, 0.0, -40.0]])
    points = OBLIQUE.to_world(index)
    errors = landmark_errors(noisy_field(OBLIQUE), points, points + 1.0)
    assert (errors.trilinear_mm == errors.initial_mm).tolist() == [False, False, True, True]
    transform = sitk.DisplacementFieldTransform(sitk.Cast(noisy_field(OBLIQUE), sitk.sitkVectorFloat64))
    expected = np.array([transform.TransformPoint(p) for p in points.tolist()])
    np.testing.assert_allclose(points + displacement_at(noisy_field(OBLIQUE), points), expected, atol=1e-4)
    with pytest.raises(CaseError, match="all 2 fixed landmarks lie outside the displacement field"):
        landmark_errors(noisy_field(OBLIQUE), points[2:], points[2:])
    with pytest.raises(CaseError, match="4 fixed and 3 moving"):
        landmark_errors(noisy_field(OBLIQUE), points, points[:3])


def test_a_wrong_sign_and_swapped_components_raise_the_error() -> None:
    points = OBLIQUE.to_world(np.random.default_rng(0).uniform(1, 8, (10, 3)))
    motion = np.array([2.0, 5.0, -9.0])
    for vector, low, high in ((motion, 0, 1e-3), (-motion, 20, 22), (motion[::-1], 15, 16)):
        errors = landmark_errors(constant(OBLIQUE, vector), points, points + motion)
        assert low <= errors.trilinear_mm.mean() <= high


def test_landmark_files(tmp_path: Path) -> None:
    path = tmp_path / "fixed_landmarks.csv"
    for text in ("name, z, y, x\na, 3, 2, 1.5\n", "\ufeff x ,y,z,\n1.5,2,3,,\n\n  \n", 'x,y,z\n"1.5", "2",3'):
        path.write_text(text)
        assert read_landmarks(path).tolist() == [[1.5, 2.0, 3.0]]
    for text, words in (
        ("x,y,z\n7,1,2,3\n8,4,5,6\n", "has the line 7,1,2,3, expected 3 cells"),
        ("x,y,z,x\n7,1,2,3\n", "has the columns"),
        ("x,y,z\n1,2\n", "empty cells"),
        (f"x,y,z\n1,2,{'9' * 400}\n", "finite"),
        ("1,2,3\n4,5,6\n", "has the columns"),
        ("x,y,z\n1,2,three\n", "no number"),
        ("x,y,z\n1,2,\n", "empty cells"),
        ("x,y,z\n1,2,inf\n", "finite"),
        ("x,y,z\n", "0 landmarks"),
        ("", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(CaseError, match=words):
            read_landmarks(path)
    path.write_bytes(b"x,y,z\n1,2,3\xff\n")
    with pytest.raises(CaseError, match="cannot be read"):
        read_landmarks(path)
    with pytest.raises(CaseError, match="cannot be read"):
        read_landmarks(tmp_path / "missing.csv")


# --- labels ----------------------------------------------------------------------------------------------------------


def random_labels(grid: Grid, seed: int = 0, dtype: type = np.uint8) -> sitk.Image:
    return sitk_image(np.random.default_rng(seed).integers(0, 6, grid.shape).astype(dtype), grid)


def test_labels_move_by_whole_voxels() -> None:
    """warped(i) = moving(i + (1, 0, -2)) along the index axes, 0 where that is outside."""
    moving = random_labels(OBLIQUE)
    warped = warp_labels(moving, constant(OBLIQUE, OBLIQUE.axes @ [1.0, 0.0, -2.0]), blank(OBLIQUE))
    labels = sitk.GetArrayFromImage(moving)
    np.testing.assert_array_equal(warped[2:, :, :-1], labels[:-2, :, 1:])
    assert not warped[:2].any()
    assert not warped[:, :, -1].any()


def test_half_a_voxel_goes_one_way() -> None:
    labels = random_labels(OBLIQUE, dtype=np.uint16)
    warped = warp_labels(labels, constant(OBLIQUE, OBLIQUE.axes @ [0.5, 0.0, 0.0]), blank(OBLIQUE))
    assert warped.dtype == np.uint16
    np.testing.assert_array_equal(warped[:, :, :-1], sitk.GetArrayFromImage(labels)[:, :, 1:])


@PROPERTY
@given(fixed=grids(min_size=5), moving=grids(min_size=5), seed=st.integers(0, 2**31))
def test_the_warp_is_that_of_sitk_between_any_two_grids(fixed: Grid, moving: Grid, seed: int) -> None:
    """But where the position is within 1e-4 voxels of the middle of two. One voxel of each grid is brought together."""
    middle, partner = (tuple(n // 2 for n in grid.size) for grid in (fixed, moving))
    to_moving = moving.to_world(np.array(partner)) - fixed.to_world(np.array(middle))
    shake = sitk.GetArrayFromImage(noisy_field(fixed, 2.0))
    shake[middle[::-1]] = 0
    vectors = shake + to_moving.astype(np.float32)
    field, labels = sitk_image(vectors, fixed), random_labels(moving, seed)
    labels[partner] = 5
    warped = warp_labels(labels, field, blank(fixed))
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    expected = sitk.Resample(labels, blank(fixed), transform, sitk.sitkNearestNeighbor, 0)
    zyx = np.stack(np.meshgrid(*(np.arange(n) for n in fixed.shape), indexing="ij"), axis=-1)
    index = moving.to_index(fixed.to_world(zyx[..., ::-1]) + vectors)
    clear = (np.abs(index - np.floor(index) - 0.5) > 1e-4).all(axis=-1)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(warped[clear], sitk.GetArrayFromImage(expected)[clear])
    assert warped[middle[::-1]] == 5


def test_a_field_on_another_grid_is_interpolated() -> None:
    """A linear field loses nothing that way, where it covers the labels."""
    coarse = Grid((8, 8, 8), (3.0, 2.0, 5.0), OBLIQUE.origin, OBLIQUE.direction).padded(1)
    gradient = np.diag([0.1, -0.2, 0.05])
    labels = random_labels(OBLIQUE)
    on_own = warp_labels(labels, linear(OBLIQUE, gradient), blank(OBLIQUE))
    shifted = sitk.GetArrayFromImage(linear(coarse, gradient))
    shifted += (gradient @ (np.array(coarse.origin) - OBLIQUE.origin)).astype(np.float32)
    on_other = warp_labels(labels, sitk_image(shifted, coarse), blank(OBLIQUE))
    assert (on_own == on_other).mean() > 0.99  # the rest are ties
    assert (on_own != sitk.GetArrayFromImage(labels)).mean() > 0.2


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(CaseError, match="32-bit float, expected 8-bit"):
        warp_labels(random_labels(OBLIQUE, dtype=np.float32), noisy_field(OBLIQUE), blank(OBLIQUE))


def test_dice_by_hand() -> None:
    """8 voxels and 12, 4 of them common: 2 · 4 / 20."""
    fixed = np.zeros((6, 6, 6), np.uint8)
    warped = np.zeros((6, 6, 6), np.uint8)
    fixed[1:3, 1:3, 1:3] = 5
    warped[1:3, 1:3, 2:5] = 5
    warped[5] = 2
    assert dice(fixed, warped, 5) == pytest.approx(0.4)
    assert dice(fixed, warped, 2) == 0
    assert dice(fixed, warped, 3) is None


@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_dice_is_symmetric_within_bounds_and_that_of_sitk(seed: int) -> None:
    a, b = random_labels(OBLIQUE, seed), random_labels(OBLIQUE, seed + 1)
    x, y = sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(a, b)
    for label in range(1, 6):
        ours = dice(x, y, label)
        assert ours is not None
        assert 0 <= ours <= 1
        assert ours == dice(y, x, label) == pytest.approx(overlap.GetDiceCoefficient(label), abs=1e-12)
        assert dice(x, x, label) == 1


# --- surfaces --------------------------------------------------------------------------------------------------------


def distances(x: np.ndarray, y: np.ndarray, axes: np.ndarray) -> SurfaceDistances:
    result = surface_distances(x, y, axes)
    assert result is not None
    return result


def brute_force(x: np.ndarray, y: np.ndarray, axes: np.ndarray) -> tuple[float, float, float]:
    """ASD, HD, HD95 from all pairs of border voxels, the borders by erosion."""
    points = [np.argwhere(m & ~binary_erosion(m))[:, ::-1] @ axes.T for m in (x, y)]
    table = cdist(*points)
    a, b = table.min(axis=1), table.min(axis=0)
    return np.concatenate([a, b]).mean(), max(a.max(), b.max()), max(np.percentile(a, 95), np.percentile(b, 95))


def test_a_box_moved_along_x_on_an_oblique_grid() -> None:
    """4³ voxels moved by 2 steps of 1.5 mm. Each border is two full planes of 16 voxels with two rings of 12 between.

    From the fixed box: its first plane is 3 mm away, the ring behind it 1.5 mm, the next ring lies in the other's first
    plane; the last plane lies on a ring but for its 4 middle voxels, which have it 0.75 mm away, one step along y.
    """
    shape = (9, 9, 11)
    result = distances(box(shape, (2, 2, 2), (6, 6, 6)), box(shape, (2, 2, 4), (6, 6, 8)), OBLIQUE.axes)
    assert result.asd_mm == pytest.approx((16 * 3 + 12 * 1.5 + 4 * 0.75) / 56)
    assert (result.hd_mm, result.hd95_mm) == pytest.approx((3, 3))


def test_single_voxels_and_plates() -> None:
    """Two voxels 3, 4, 0 steps apart are 5 mm apart; parallel plates everywhere by their gap."""
    a, b = box((6, 6, 6), (1, 1, 1), (2, 2, 2)), box((6, 6, 6), (1, 5, 4), (2, 6, 5))
    assert distances(a, b, np.eye(3)) == SurfaceDistances(5.0, 5.0, 5.0)
    a, b = box((6, 5, 5), (0, 0, 0), (1, 5, 5)), box((6, 5, 5), (4, 0, 0), (5, 5, 5))
    gap = distances(a, b, OBLIQUE.axes)
    assert (gap.asd_mm, gap.hd_mm, gap.hd95_mm) == pytest.approx((10.0, 10.0, 10.0))


def test_an_outlier_moves_the_maximum_not_the_percentile() -> None:
    fixed = box((30, 14, 14), (2, 2, 2), (12, 12, 12))
    warped = fixed | box(fixed.shape, (28, 5, 5), (29, 6, 6))
    result = distances(fixed, warped, np.eye(3))
    assert (result.hd_mm, result.hd95_mm) == (17.0, 0.0)
    assert result.asd_mm == pytest.approx(17 / (488 + 489))


def test_an_empty_mask_has_no_surface() -> None:
    full, empty = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    assert surface_distances(full, empty, np.eye(3)) is None
    assert surface_distances(empty, full, np.eye(3)) is None
    assert surface_distances(empty, empty, np.eye(3)) is None
    assert len(surface_points(full, np.eye(3))) == 26  # the edge of the volume is an edge of the mask


@PROPERTY
@given(grid=grids(min_size=3), seed=st.integers(0, 2**31))
def test_surfaces_against_brute_force_and_symmetry(grid: Grid, seed: int) -> None:
    x, y = blob(grid.shape, seed), blob(grid.shape, seed + 1, 0.2)
    result = distances(x, y, grid.axes)
    assert (result.asd_mm, result.hd_mm, result.hd95_mm) == pytest.approx(brute_force(x, y, grid.axes), abs=1e-9)
    back = distances(y, x, grid.axes)
    assert (result.asd_mm, result.hd_mm, result.hd95_mm) == pytest.approx((back.asd_mm, back.hd_mm, back.hd95_mm))
    assert 0 <= result.asd_mm <= result.hd_mm * (1 + 1e-12)  # a mean of equal numbers may be a hair above them
    assert result.hd95_mm <= result.hd_mm
    assert distances(x, x, grid.axes) == SurfaceDistances(0.0, 0.0, 0.0)


@PROPERTY
@given(grid=grids(min_size=4, oblique=False), seed=st.integers(0, 2**31))
def test_surfaces_against_evalutils(grid: Grid, seed: int) -> None:
    """The same HD and directed percentiles, but for its percentile, which takes the rank below, not between: so it is
    at most ours, and at least when it takes the rank above.
    """
    x, y = blob(grid.shape, seed), blob(grid.shape, seed + 1)
    result, spacing = distances(x, y, np.diag(grid.spacing)), grid.spacing[::-1]
    assert result.hd_mm == pytest.approx(hausdorff_distance(x, y, spacing))
    fewest = min(len(surface_points(mask, np.diag(grid.spacing))) for mask in (x, y))
    above = min(1.0, 0.95 + 1 / max(fewest - 1, 1) + 1e-9)
    low, high = (percentile_hausdorff_distance(x, y, part, spacing) for part in (0.95, above))
    assert low - 1e-9 <= result.hd95_mm <= high + 1e-9


@PROPERTY
@given(seed=st.integers(0, 2**31))
def test_hausdorff_of_sitk_measures_to_the_object(seed: int) -> None:
    """It takes distances from voxels of one mask to the other *mask*, so at most ours; the same for thin masks."""
    x, y = blob((7, 8, 9), seed), blob((7, 8, 9), seed + 1)
    x &= ~binary_erosion(x)
    y &= ~binary_erosion(y)
    hausdorff = sitk.HausdorffDistanceImageFilter()
    hausdorff.Execute(*(sitk_image(m.astype(np.uint8), Grid((9, 8, 7), (0.75, 1.5, 2.5))) for m in (x, y)))
    ours = distances(x, y, np.diag([0.75, 1.5, 2.5]))
    assert not (binary_erosion(x).any() or binary_erosion(y).any())
    assert hausdorff.GetHausdorffDistance() == pytest.approx(ours.hd_mm, rel=1e-5)


# --- determinants ----------------------------------------------------------------------------------------------------


def test_a_translation_changes_no_volume() -> None:
    statistics = jacobian_statistics(constant(OBLIQUE, (30.0, -7.0, 2.0)), np.ones(OBLIQUE.shape, bool))
    assert (statistics.folding_percent, statistics.folding_percent_all) == (0, 0)
    assert (statistics.jacobian_min, statistics.jacobian_max) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert statistics.std_log_jacobian == pytest.approx(0, abs=1e-5)


@PROPERTY
@given(grid=grids(), seed=st.integers(0, 2**31))
def test_a_linear_field_has_one_determinant(grid: Grid, seed: int) -> None:
    """det(I + gradient), up to the border, for any spacing and direction, left-handed ones too."""
    gradient = np.random.default_rng(seed).uniform(-0.3, 0.3, (3, 3))
    determinant = jacobian_determinant(linear(grid, gradient))
    np.testing.assert_allclose(determinant, np.linalg.det(np.eye(3) + gradient), atol=2e-4)


def test_a_mirror_folds_everywhere() -> None:
    statistics = jacobian_statistics(linear(OBLIQUE, np.diag([-2.0, 0.0, 0.0])), np.ones(OBLIQUE.shape, bool))
    assert (statistics.folding_percent, statistics.folding_percent_all) == (100, 100)
    assert statistics.jacobian_max == pytest.approx(-1, abs=1e-4)
    assert statistics.std_log_jacobian is None


def test_a_field_that_makes_the_lung_flat_folds_everywhere() -> None:
    """Onto a plane oblique to the grid: det = 0, but for the rounding of up to 80 mm in float32."""
    grid = Grid((40, 40, 40), OBLIQUE.spacing, OBLIQUE.origin, OBLIQUE.direction)
    normal = np.array([2.0, -3.0, 6.0]) / 7
    field = linear(grid, -np.outer(normal, normal))
    statistics = jacobian_statistics(field, np.ones(grid.shape, bool))
    assert np.abs(jacobian_determinant(field)).max() < 1e-4
    assert (statistics.folding_percent, statistics.folding_percent_all) == (100, 100)
    assert statistics.std_log_jacobian is None
    assert jacobian_statistics(linear(grid, np.diag([-0.999, 0, 0])), None).folding_percent_all == 0


def test_folds_are_counted_where_they_are() -> None:
    """The part z ≥ 5 of ten slices is mirrored along z: in slice 4 the central difference sees half of it."""
    slope = np.where(np.arange(10) < 5, 0.0, -2 * 2.5)
    along_z = np.concatenate([[0.0], np.cumsum(slope[1:])])
    field = sitk_image(
        (along_z[:, None, None, None] * np.array(OBLIQUE.direction)[:, 2]).repeat(9, 1).repeat(11, 2).astype("f4"),
        OBLIQUE,
    )
    determinant = jacobian_determinant(field)
    np.testing.assert_allclose(determinant[:, 4, 4], [1, 1, 1, 1, 0, -1, -1, -1, -1, -1], atol=1e-5)
    upper, lower = np.zeros(OBLIQUE.shape, bool), np.zeros(OBLIQUE.shape, bool)
    upper[6:], lower[:4] = True, True
    assert jacobian_statistics(field, upper).folding_percent == 100
    below = jacobian_statistics(field, lower)
    assert (below.folding_percent, below.jacobian_max) == (0, pytest.approx(1, abs=1e-5))
    assert 50 <= below.folding_percent_all <= 60
    everywhere = jacobian_statistics(field, None)
    assert everywhere.folding_percent is None
    assert everywhere.jacobian_min == pytest.approx(-1, abs=1e-5)


def test_sdlogj_of_two_halves() -> None:
    """Along x the steps are 1 and 2: log det is 0 in one half and ln 2 in the other."""
    grid = Grid((20, 6, 7), (2.0, 1.0, 1.0))
    u = np.maximum(np.arange(20) - 10, 0) * 2.0
    field = sitk_image(
        np.stack([np.broadcast_to(u, grid.shape), *np.zeros((2, *grid.shape))], axis=-1).astype("f4"), grid
    )
    mask = np.ones(grid.shape, bool)
    mask[:, :, 9:12] = False  # around the kink
    mask[:, :, 0] = False  # 8 voxels in each half
    mask[5:] = False
    statistics = jacobian_statistics(field, mask)
    assert statistics.std_log_jacobian == pytest.approx(np.log(2) / 2, abs=1e-5)
    assert (statistics.jacobian_min, statistics.jacobian_max) == pytest.approx((1.0, 2.0), abs=1e-5)


@PROPERTY
@given(grid=grids(min_size=5, max_size=12), generator=generators())
def test_slabs_make_the_whole(grid: Grid, generator: object) -> None:
    """Of whole arrays, np.gradient and world coordinates; the filter of SimpleITK agrees for the identity direction."""
    vectors = smooth_field(grid, 3.0, generator)[0].permute(1, 2, 3, 0).numpy()  # type: ignore[arg-type]
    field = sitk_image(vectors, grid)
    by_index = np.stack([np.stack(np.gradient(vectors[..., c].astype(float))[::-1], -1) for c in range(3)], -2)
    expected = np.linalg.det(np.eye(3) + by_index @ np.linalg.inv(grid.axes))
    determinant = jacobian_determinant(field)
    np.testing.assert_allclose(determinant, expected, atol=1e-3)
    mask = blob(grid.shape, 0)
    statistics = jacobian_statistics(field, mask)
    inside = determinant[mask]
    positive = inside[inside > 0]
    assert statistics.folding_percent == pytest.approx(100 * (inside <= 0).mean())
    assert statistics.folding_percent_all == pytest.approx(100 * (determinant <= 0).mean())
    assert (statistics.jacobian_min, statistics.jacobian_max) == (inside.min(), inside.max())
    assert len(positive) == 0 or statistics.std_log_jacobian == pytest.approx(np.log(positive).std(), abs=1e-4)
    field.SetDirection(np.eye(3).ravel())
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))
    inner = (slice(1, -1),) * 3  # at the border theirs repeats the field, ours is one-sided
    np.testing.assert_allclose(jacobian_determinant(field)[inner], theirs[inner], atol=1e-3)


def test_masks_and_fields_without_a_determinant() -> None:
    for mask, words in ((np.zeros(OBLIQUE.shape, bool), "is empty"), (np.ones((3, 3, 3), bool), "expected as many")):
        with pytest.raises(CaseError, match=words):
            jacobian_statistics(noisy_field(OBLIQUE), mask)
    with pytest.raises(CaseError, match="at least 2"):
        jacobian_statistics(noisy_field(Grid((5, 5, 1))), None)


# --- the world -------------------------------------------------------------------------------------------------------


@PROPERTY
@given(rotation=rotations(), generator=generators())
def test_nothing_changes_when_the_world_is_turned(rotation: np.ndarray, generator: object) -> None:
    """Rotate and move everything, images, vectors and points: all metrics stay."""
    offset = np.array([40.0, -90.0, 15.0])
    origin = rotation @ np.array(OBLIQUE.origin) + offset
    turned = Grid(
        OBLIQUE.size,
        OBLIQUE.spacing,
        (float(origin[0]), float(origin[1]), float(origin[2])),
        as_matrix(rotation @ np.array(OBLIQUE.direction)),
    )
    vectors = smooth_field(OBLIQUE, 2.5, generator)[0].permute(1, 2, 3, 0).numpy()  # type: ignore[arg-type]
    points = OBLIQUE.to_world(np.random.default_rng(1).uniform(0, 8, (10, 3)))
    labels = blob(OBLIQUE.shape, 1).astype(np.uint8)
    truth = points + np.array([1.0, 2.0, -0.5])
    results = []
    for grid, turn, shift in ((OBLIQUE, np.eye(3), np.zeros(3)), (turned, rotation, offset)):
        field = sitk_image((vectors @ turn.T).astype(np.float32), grid)
        errors = landmark_errors(field, points @ turn.T + shift, truth @ turn.T + shift)
        warped = warp_labels(sitk_image(labels, grid), field, blank(grid))
        surfaces = distances(labels == 1, warped == 1, axes_of(field))
        jacobian = jacobian_statistics(field, labels == 1)
        overlap = dice(labels, warped, 1)
        assert overlap is not None
        results.append(
            [
                *errors.initial_mm,
                *errors.trilinear_mm,
                overlap,
                surfaces.asd_mm,
                jacobian.jacobian_min,
                jacobian.jacobian_max,
            ]
        )
    np.testing.assert_allclose(results[0], results[1], atol=2e-2)  # a tie of the labels may go the other way


# --- real lungs ------------------------------------------------------------------------------------------------------


def by_distance_maps(x: sitk.Image, y: sitk.Image) -> tuple[float, float, float]:
    """ASD, HD, HD95 by SimpleITK: contours, and Maurer's distance maps of them. On the grid of ``x``."""
    contours = [sitk.BinaryContour(sitk.GetImageFromArray(sitk.GetArrayFromImage(m)), False) for m in (x, y)]
    for contour in contours:
        contour.SetSpacing(x.GetSpacing())
    maps = [sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True) for c in contours]
    borders = [sitk.GetArrayFromImage(c) > 0 for c in contours]
    a, b = (np.abs(sitk.GetArrayFromImage(m))[border] for m, border in zip(maps[::-1], borders, strict=True))
    return np.concatenate([a, b]).mean(), max(a.max(), b.max()), max(np.percentile(a, 95), np.percentile(b, 95))


@pytest.mark.real
def test_real_lungs_against_evalutils_sitk_and_brute_force() -> None:
    """Exhale and inhale of one patient at a third of the resolution, as they lie."""
    files = [MASKS / f"LungCT_CT_0004_000{n}.nii.gz" for n in (0, 1)]
    if not all(f.exists() for f in files):
        pytest.skip(f"no masks in {MASKS.name}")
    fixed, moving = (sitk.ReadImage(str(f))[::3, ::3, ::3] for f in files)
    x, y = (sitk.GetArrayFromImage(i).astype(bool) for i in (fixed, moving))
    result, spacing = distances(x, y, axes_of(fixed)), fixed.GetSpacing()[::-1]
    asd_mm, hd_mm, hd95_mm = brute_force(x, y, axes_of(fixed))
    assert (result.asd_mm, result.hd_mm, result.hd95_mm) == pytest.approx((asd_mm, hd_mm, hd95_mm), abs=1e-9)
    assert result.hd_mm == pytest.approx(hausdorff_distance(x, y, spacing))
    assert result.hd95_mm == pytest.approx(percentile_hausdorff_distance(x, y, 0.95, spacing), abs=0.2)
    assert (result.asd_mm, result.hd_mm, result.hd95_mm) == pytest.approx(by_distance_maps(fixed, moving), rel=1e-5)
    still = sitk_image(np.zeros((*x.shape, 3), np.float32), Grid(fixed.GetSize()))
    still.CopyInformation(fixed)
    np.testing.assert_array_equal(warp_labels(moving, still, fixed), sitk.GetArrayFromImage(moving))
    overlap = dice(sitk.GetArrayFromImage(fixed), sitk.GetArrayFromImage(moving), 1)
    assert overlap is not None
    assert 0.5 < overlap < 1
    assert result.asd_mm > 1

"""Refinement against phantoms with a known field, and what must not change its result."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import algorithm.refinement.refine
from algorithm.files.images import Image
from algorithm.geometry import Affine, Grid, displacement_at, doubled, resample, restored, warp, world_displacement
from algorithm.lungs import LungMask
from algorithm.objective import Keypoints, Weights
from algorithm.objective.control_grid import smoothed
from algorithm.objective.local_correlation import dilated
from algorithm.objective.sampled_correlation import applies
from algorithm.preparation.subject import Subject
from algorithm.refinement.refine import (
    Refined,
    RefineSettings,
    Similarity,
    _Level,
    distance,
    for_lungs,
    for_voxels,
    minimise,
    refine,
    swapped,
)
from tests.support.strategies import as_matrix, smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid((32, 28, 30), (2.0, 2.0, 2.0), (-30.0, -20.0, 100.0))
QUICK = RefineSettings(spacing_mm=(4.0, 2.0), steps=(40, 30), margin_mm=4.0)
NOWHERE = Path("phantom")


def weighted(**weights: float) -> tuple[Weights, Weights]:
    """The same weights for both levels, those not named 0."""
    off = Weights(alpha=0.0, beta=0.0, gamma=0.0, delta=0.0)
    return replace(off, **weights), replace(off, **weights)


def texture(grid: Grid, seed: int = 0) -> Tensor:
    """Vessels, so to speak: smooth noise of some 6 mm, -900 to -300 HU."""
    noise = torch.randn(1, 1, *grid.shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        noise = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)
    return -600 + 250 * noise / noise.std()


def ball(grid: Grid, share: float = 0.42) -> Tensor:
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid.shape), indexing="ij")
    return ((x**2 + y**2 + z**2) < (2 * share) ** 2)[None, None]


def find_lungs(voxels: Tensor, grid: Grid) -> Subject:
    return Subject(Image(voxels, grid, NOWHERE), LungMask(ball(grid), grid))


def known_pair(amplitude_mm: float = 3.0) -> tuple[Subject, Subject, Tensor]:
    """Fixed = moving ∘ (x + u), by trilinear interpolation of the moving one, with u known; another brightness."""
    u = smooth_field(GRID, amplitude_mm, torch.Generator().manual_seed(3))
    moving = texture(GRID)
    return find_lungs(0.8 * warp(moving, GRID, u, GRID) - 100, GRID), find_lungs(moving, GRID), u


def nothing(grid: Grid = GRID) -> tuple[Tensor, Grid]:
    small = grid.resized((4, 4, 4))
    return torch.zeros(1, 3, 4, 4, 4), small


def error_mm(result: Refined, u: Tensor) -> Tensor:
    """|found - u| in the lungs."""
    return (resample(result.displacement, result.grid, GRID) - u).norm(dim=1, keepdim=True)[ball(GRID)]


@pytest.mark.parametrize("similarity", ["local correlation", "ngf", "mind"])
def test_a_known_field_is_recovered_to_a_fraction_of_a_voxel(similarity: Similarity) -> None:
    fixed, moving, u = known_pair()
    weight = 0.05 if similarity != "local correlation" else 0.3
    settings = replace(QUICK, similarity=similarity, weights=weighted(diffusion=weight), both_directions=False)
    before = u.norm(dim=1, keepdim=True)[ball(GRID)].mean()
    after = error_mm(refine(fixed, moving, Affine(), *nothing(), settings), u).mean()
    assert before > 1.5
    assert after < 0.5


def test_both_directions_agree() -> None:
    fixed, moving, u = known_pair()
    settings = replace(QUICK, weights=weighted(diffusion=0.3))
    both = refine(fixed, moving, Affine(), *nothing(), settings)
    one = refine(fixed, moving, Affine(), *nothing(), replace(settings, both_directions=False))
    assert one.inconsistency_mm is None and both.inconsistency_mm is not None
    lungs = resample(ball(GRID).float(), GRID, both.grid) > 0.5
    assert both.inconsistency_mm[lungs].mean() < 0.6
    assert error_mm(both, u).mean() < 0.3


def test_the_compiled_way_leads_to_the_same_field(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    fixed, moving, u = known_pair()
    settings = replace(QUICK, margin_mm=12.0, weights=weighted(alpha=20.0))
    made: list[bool] = []
    answers = {"compiled": lambda *images: made.append(applies(*images)) or made[-1], "general": lambda *_: False}
    found = {}
    for name, answer in answers.items():
        monkeypatch.setattr(algorithm.refinement.refine, "applies", answer)
        found[name] = refine(fixed, moving, Affine(), *nothing(), settings)
    assert made == [True] * 4  # two levels, two directions
    apart = (found["compiled"].displacement - found["general"].displacement).norm(dim=1, keepdim=True)
    lungs = resample(ball(GRID).float(), GRID, found["general"].grid) > 0.5
    assert apart[lungs].mean() < 0.02
    assert error_mm(found["compiled"], u).mean() < error_mm(found["general"], u).mean() + 0.01


def test_same_input_same_output_and_nothing_is_changed() -> None:
    fixed, moving, _ = known_pair()
    start, grid = nothing()
    copies = [t.clone() for t in (fixed.image.voxels, moving.image.voxels, start)]
    settings = replace(QUICK, steps=(5, 3))
    first = refine(fixed, moving, Affine(), start, grid, settings)
    refine(moving, fixed, Affine(), start, grid, settings)
    again = refine(fixed, moving, Affine(), start, grid, settings)
    assert torch.equal(first.displacement, again.displacement)
    for copy, tensor in zip(copies, (fixed.image.voxels, moving.image.voxels, start), strict=True):
        assert torch.equal(copy, tensor)


def test_no_steps_nearly_give_the_start() -> None:
    fixed, moving, u = known_pair()
    settings = replace(QUICK, spacing_mm=(2.0,), steps=(0,), weights=QUICK.weights[:1], both_directions=False)
    assert error_mm(refine(fixed, moving, Affine(), u, GRID, settings), u).mean() < 0.1 * u.norm(dim=1).mean()
    there_and_back = refine(fixed, moving, Affine(), u, GRID, replace(settings, both_directions=True))
    assert there_and_back.inconsistency_mm is not None
    lungs = resample(ball(GRID).float(), GRID, there_and_back.grid) > 0.5
    assert there_and_back.inconsistency_mm[lungs].mean() < 0.1 * u.norm(dim=1).mean()


def flipped(subject: Subject) -> Subject:
    """The same scan in a world whose x and z are mirrored: other direction of the axes, same voxels."""
    mirror = torch.diag(torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64)).numpy()

    def turn(grid: Grid) -> Grid:
        a, b, c = (tuple(float(v) + 0.0 for v in row) for row in mirror @ grid.direction)
        x, y, z = (float(v) for v in mirror @ grid.origin)
        return replace(grid, direction=(a, b, c), origin=(x, y, z))

    image, lungs = subject
    return Subject(Image(image.voxels, turn(image.grid), NOWHERE), LungMask(lungs.mask, turn(lungs.grid)))


def test_mirroring_the_world_mirrors_the_field() -> None:
    fixed, moving, _ = known_pair()
    plain = refine(fixed, moving, Affine(), *nothing(), QUICK)
    mirrored = refine(flipped(fixed), flipped(moving), Affine(), *nothing(flipped(fixed).image.grid), QUICK)
    signs = torch.tensor([-1.0, 1.0, -1.0]).reshape(1, 3, 1, 1, 1)
    assert (mirrored.displacement * signs - plain.displacement).abs().max() < 0.05


def test_storing_the_scan_the_other_way_round_changes_little() -> None:
    fixed, moving, _ = known_pair()
    settings = replace(QUICK, weights=weighted(diffusion=0.3), both_directions=False)
    plain = refine(fixed, moving, Affine(), *nothing(), settings)
    grid = restored(GRID, (2, 0, 1), (True, False, True))
    voxels = resample(moving.image.voxels, GRID, grid)
    other = refine(fixed, Subject(Image(voxels, grid, NOWHERE), moving.lungs), Affine(), *nothing(), settings)
    assert (other.displacement - plain.displacement).abs().max() < 0.05


TURN = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
AFFINE = Affine.from_arrays(TURN @ np.diag([1.1, 0.9, 1.05]), np.array([40.0, -30.0, 200.0]))


def test_an_affine_map_is_taken_along() -> None:
    """The moving image stored elsewhere, turned and stretched by an affine map, and given that map: the same field."""
    fixed, moving, u = known_pair()
    settings = replace(QUICK, weights=weighted(diffusion=0.3))
    axes = np.array(AFFINE.matrix) @ GRID.axes
    spacing = np.linalg.norm(axes, axis=0)
    x, y, z = (float(v) for v in AFFINE(np.array(GRID.origin)))
    sx, sy, sz = (float(v) for v in spacing)
    away = Grid(GRID.size, (sx, sy, sz), (x, y, z), as_matrix(axes / spacing))
    moved = Subject(Image(moving.image.voxels, away, NOWHERE), LungMask(moving.lungs.mask, away))
    plain = refine(fixed, moving, Affine(), *nothing(), settings)
    found = refine(fixed, moved, AFFINE, *nothing(), settings)
    assert error_mm(found, u).mean() < 0.3
    lungs = resample(ball(GRID).float(), GRID, plain.grid) > 0.5
    assert (found.displacement - plain.displacement).norm(dim=1, keepdim=True)[lungs].mean() < 0.2


def test_keypoints_of_the_way_back_lead_back() -> None:
    points = Keypoints(torch.randn(9, 3).double() * 50, torch.randn(9, 3).double() * 50)
    there = swapped(points, AFFINE)
    np.testing.assert_allclose(there.fixed_mm.numpy(), AFFINE(points.moving_mm.numpy()))
    again = swapped(there, AFFINE.inverse())
    torch.testing.assert_close(again.fixed_mm, points.fixed_mm)
    torch.testing.assert_close(again.moving_mm, points.moving_mm)


def test_keypoints_pull_the_field_where_the_images_say_nothing() -> None:
    flat = find_lungs(torch.full((1, 1, *GRID.shape), -700.0), GRID)
    index = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 14 + 8
    points = torch.from_numpy(GRID.to_world(index.numpy()))
    shift = torch.tensor([4.0, -3.0, 2.0], dtype=torch.float64)
    settings = replace(QUICK, weights=weighted(delta=1.0, diffusion=0.05))
    result = refine(flat, flat, Affine(), *nothing(), settings, Keypoints(points, points + shift))
    found = displacement_at(points, result.displacement.double(), result.grid)
    assert (found - shift).norm(dim=1).mean() < 0.5


@pytest.mark.parametrize("both", [False, True])
def test_what_the_moving_image_does_not_show_does_not_pull(both: bool) -> None:
    """The upper half of the moving image is missing: below, the field is as with all of it."""
    fixed, moving, u = known_pair(2.0)
    settings = replace(QUICK, weights=weighted(diffusion=0.3), both_directions=both)
    half = GRID.cropped((0, 0, 0), (32, 28, 17))
    cut = Subject(Image(moving.image.voxels[:, :, :17], half, NOWHERE), moving.lungs)
    result = refine(fixed, cut, Affine(), *nothing(), settings)
    lower = ball(GRID).clone()
    lower[:, :, 14:] = False
    error = (resample(result.displacement, result.grid, GRID) - u).norm(dim=1, keepdim=True)
    assert error[lower].mean() < 0.5
    assert torch.isfinite(result.displacement).all()
    assert error[ball(GRID)].max() < 8  # nothing runs away where there is no image


def test_the_images_count_where_both_are_seen() -> None:
    """Lungs everywhere, but the fixed image lacks the lowest slices and the moving one a side: D is taken on the rest.

    Of the fixed image also not next to its end, where the filling makes an edge. By hand, position for position.
    """
    everywhere = LungMask(torch.ones(1, 1, *GRID.shape, dtype=torch.bool), GRID)
    above, left = GRID.cropped((0, 0, 9), (32, 28, 21)), GRID.cropped((0, 0, 0), (20, 28, 30))
    fixed = Subject(Image(texture(above), above, NOWHERE), everywhere)
    moving = Subject(Image(texture(left), left, NOWHERE), everywhere)
    level = _Level(fixed, moving, Affine(offset=(2.0, 0.0, 0.0)), 2.0, QUICK, torch.device("cpu"))
    used: list[Tensor] = []

    def keep_mask(warped: Tensor, mask: Tensor) -> Tensor:
        used.append(mask)
        return warped.sum()

    level.distance, level.sampled = keep_mask, None
    u_mm = (6.5, -1.0, 3.0)
    level._distance(torch.tensor(u_mm).reshape(1, 3, 1, 1, 1).expand(1, 3, *level.grid.coarsened().shape))

    z, y, x = np.meshgrid(*(np.arange(n) for n in level.grid.shape), indexing="ij")
    index = np.stack([x, y, z], axis=-1)

    def seen(grid: Grid, points_mm: np.ndarray) -> np.ndarray:
        position = grid.to_index(points_mm)
        inside: np.ndarray = ((position >= -0.5) & (position < np.array(grid.size) - 0.5)).all(axis=-1)
        return inside

    around = [level.grid.to_world(index + np.array(step) - 1) for step in np.ndindex(3, 3, 3)]
    of_fixed = np.all([seen(above, points) for points in around], axis=0)
    of_moving = seen(left, level.grid.to_world(index) + u_mm + np.array([2.0, 0.0, 0.0]))
    lungs = np.all([seen(GRID, points) for points in around], axis=0)  # and a voxel farther in
    assert (
        min((lungs & part).sum() for part in (of_fixed & of_moving, ~of_fixed & of_moving, of_fixed & ~of_moving)) > 500
    )
    np.testing.assert_array_equal(used[0][0, 0].numpy()[lungs], (of_fixed & of_moving)[lungs])


@pytest.mark.parametrize("similarity", ["local correlation", "ngf", "mind"])
def test_taylor_of_the_distance_in_the_field(similarity: Similarity) -> None:
    """f(p + h v) - f(p) - h ⟨∇f, v⟩ falls with h², through smoothing, warping and distance, in double precision."""
    fine = GRID.cropped((0, 0, 0), (16, 14, 12))
    coarse = fine.coarsened()
    image, moving = texture(fine).double(), texture(fine, seed=1).double()
    compare = distance(image, fine, replace(QUICK, similarity=similarity))
    generator = torch.Generator().manual_seed(0)
    start, direction = (
        world_displacement(torch.randn(1, 3, *coarse.shape, generator=generator, dtype=torch.float64), coarse)
        for _ in range(2)
    )
    mask = torch.ones(1, 1, *fine.shape, dtype=torch.bool)

    def value(control: Tensor) -> Tensor:
        return compare(warp(moving, fine, doubled(smoothed(control, 2)), fine), mask)

    point = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(point), point)
    along = float((slope * direction).sum())

    def remainder(h: float) -> float:
        return abs(float(value(start + h * direction) - value(start)) - h * along)

    assert abs(along) > 1e-6
    assert remainder(1e-4) < 0.02 * abs(1e-4 * along)


def test_smoothing_keeps_constants_and_dilation_is_a_cube() -> None:
    constant = torch.full((1, 3, 5, 6, 7), 2.5)
    torch.testing.assert_close(smoothed(constant, 3), constant)
    spike = torch.zeros(1, 3, 9, 9, 9)
    spike[..., 4, 4, 4] = 27.0**2
    assert smoothed(spike, 2)[0, 0, 4, 4, 4] == pytest.approx(27)
    mask = torch.zeros(1, 1, 9, 9, 9, dtype=torch.bool)
    mask[..., 4, 4, 4] = True
    assert dilated(mask, 2).sum() == 125
    assert torch.equal(dilated(mask, 0), mask)


def test_levels_are_no_finer_than_the_scans() -> None:
    fine, coarse = replace(GRID, spacing=(0.7, 0.7, 5.0)), replace(GRID, spacing=(5.0, 5.0, 5.0))
    assert for_voxels(QUICK, fine, GRID).spacing_mm == (4.0, 2.0)
    assert for_voxels(QUICK, fine, coarse).spacing_mm == pytest.approx((10.0, 5.0))
    assert for_voxels(QUICK, coarse, fine) == for_voxels(QUICK, fine, coarse)


def test_levels_are_finer_for_lungs_smaller_than_an_adults() -> None:
    grid = Grid((100, 100, 100), (2.0, 2.0, 2.0))
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    for voxels, factor in ((100, 1.0), (50, 1.0), (25, 0.5), (10, 0.2)):  # 8, 1, 0.125 and 0.008 l
        mask[:] = False
        mask[..., :voxels, :voxels, :voxels] = True
        assert for_lungs(QUICK, LungMask(mask, grid)).spacing_mm == pytest.approx((4.0 * factor, 2.0 * factor))


def test_settings_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="2 spacings, 3 numbers of steps and 2 weights"):
        RefineSettings(spacing_mm=(4.0, 2.0), steps=(1, 2, 3))
    with pytest.raises(ValueError, match="beta 0"):
        RefineSettings(weights=(Weights(), Weights()))


def test_one_direction_is_what_minimise_gives() -> None:
    fixed, moving, _ = known_pair()
    settings = replace(QUICK, steps=(3, 2), both_directions=False)
    field, grid = minimise(fixed, moving, Affine(), *nothing(), settings)
    result = refine(fixed, moving, Affine(), *nothing(), settings)
    assert grid == result.grid and torch.equal(field, result.displacement)

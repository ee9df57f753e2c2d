"""Keypoints: the Förstner operator against brute force, matching against known motion, brightness and grids."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import Grid, warp
from algorithm.objective.mind import mind_ssc
from algorithm.refinement.keypoints import (
    DetectSettings,
    KeypointSettings,
    MatchSettings,
    displacements,
    distinctive_points,
    find_keypoints,
    match,
)
from algorithm.refinement.keypoints.detect import distinctiveness, structure_tensor
from algorithm.refinement.keypoints.match import (
    best_offsets,
    features,
    lower_envelope,
    nearest,
    patch_costs,
    search,
    search_margin,
)
from tests.support.grids import ROTATION
from tests.support.strategies import smooth_field

GRID = Grid((36, 32, 30), (2.0, 2.1, 1.9), (-40.0, 12.0, 300.0))
ROTATED = replace(GRID, direction=ROTATION)
SETTINGS = MatchSettings(radius_mm=6.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def texture(grid: Grid, seed: int = 0) -> Tensor:
    """Random blobs of about 2 voxels, around -800 HU."""
    noise = np.random.default_rng(seed).standard_normal(grid.shape)
    smooth = ndimage.gaussian_filter(noise, 1.5)
    return torch.from_numpy((smooth / smooth.std() * 100 - 800).astype(np.float32))[None, None]


def lungs(grid: Grid, border: int = 5) -> Tensor:
    """All but ``border`` voxels on every side."""
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    inner = slice(border, -border)
    mask[..., inner, inner, inner] = True
    return mask


def residuals(points: Tensor, offset: Tensor, field: Tensor) -> Tensor:
    """Distances (mm) of offsets found at voxels from a field on the same grid."""
    x, y, z = points.unbind(1)
    return (offset - field[0, :, z, y, x].T).norm(dim=1)


# ---- detection


def test_structure_tensor_and_distinctiveness_are_those_of_scipy() -> None:
    image = texture(GRID).double()
    spacing = GRID.spacing[::-1]

    def gaussian(volume: np.ndarray, sigma_mm: float) -> np.ndarray:
        for axis, s in enumerate(spacing):
            radius = max(1, math.ceil(3 * sigma_mm / s))
            volume = ndimage.gaussian_filter1d(volume, sigma_mm / s, axis, mode="nearest", radius=radius)
        return volume

    gz, gy, gx = np.gradient(gaussian(image[0, 0].numpy(), 2.0), *spacing)
    products = [gx * gx, gy * gy, gz * gz, gx * gy, gx * gz, gy * gz]
    xx, yy, zz, xy, xz, yz = expected = np.stack([gaussian(p, 3.0) for p in products])
    np.testing.assert_allclose(structure_tensor(image, GRID, 2.0, 3.0)[0].numpy(), expected, atol=1e-6)
    tensors = np.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], axis=-1).reshape(*GRID.shape, 3, 3)
    inverse_trace = np.trace(np.linalg.inv(tensors), axis1=-2, axis2=-1)
    settings = DetectSettings(image_sigma_mm=2.0, tensor_sigma_mm=3.0)
    np.testing.assert_allclose(distinctiveness(image, GRID, settings)[0, 0].numpy(), 1 / inverse_trace, rtol=1e-5)


def test_an_edge_and_a_straight_vessel_are_not_distinctive() -> None:
    nz, ny, nx = GRID.shape
    y, x = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
    vessel = (-800 + 700 * torch.exp(-((y - 15.0) ** 2 + (x - 18.0) ** 2) / 8)).expand(1, 1, nz, ny, nx)
    edge = torch.where(x > 18, 0.0, -800.0).expand(1, 1, nz, ny, nx)
    for image in (vessel, edge, torch.full_like(edge, -800.0)):
        assert len(distinctive_points(image, lungs(GRID), GRID)) == 0


def test_blobs_are_found_where_they_are_the_strongest_first() -> None:
    centres = np.array([[10, 10, 10], [24, 12, 18], [14, 22, 20]])
    index = np.stack(np.meshgrid(*(np.arange(n) for n in GRID.size), indexing="ij"), axis=-1)
    heights = (500.0, 300.0, 400.0)
    spheres = [
        h * np.exp(-((((index - c) * np.array(GRID.spacing)) ** 2).sum(axis=-1) / 18))
        for h, c in zip(heights, centres, strict=True)
    ]
    image = torch.from_numpy((np.sum(spheres, axis=0) - 900).transpose(2, 1, 0).astype(np.float32).copy())[None, None]
    points = distinctive_points(image, lungs(GRID), GRID, DetectSettings(number=3, spacing_mm=8.0, tensor_sigma_mm=4.0))
    assert points.tolist() == centres[[0, 2, 1]].tolist()


def test_points_lie_in_the_eroded_mask_apart_from_each_other_and_not_too_many() -> None:
    mask = lungs(GRID)
    settings = DetectSettings(spacing_mm=6.0, erosion_mm=4.0)  # 3 voxels; 2 voxels
    points = distinctive_points(texture(GRID), mask, GRID, settings)
    assert len(points) > 10
    assert (points >= 7).all()
    assert (points < torch.tensor(GRID.size) - 7).all()
    apart = (points[:, None] - points).abs().amax(dim=2) + 1000 * torch.eye(len(points), dtype=torch.long)
    assert apart.min() > 3
    fewer = distinctive_points(texture(GRID), mask, GRID, replace(settings, number=5))
    assert fewer.tolist() == points[:5].tolist()
    assert distinctive_points(texture(GRID), mask.float() * 0.4, GRID).shape == (0, 3)


# ---- the parts of matching


def test_mind_is_blind_to_brightness_and_contrast_not_to_shape() -> None:
    image = texture(GRID)
    plain = mind_ssc(image)
    assert plain.shape == (1, 12, *GRID.shape)
    assert plain.amax(dim=1).min() == 1  # the least difference of each voxel
    torch.testing.assert_close(mind_ssc(-0.3 * image + 40), plain, atol=2e-3, rtol=0)
    assert (mind_ssc(texture(GRID, seed=1)) - plain).abs().mean() > 0.1
    assert (mind_ssc(torch.full_like(image, -1000.0)) == 1).all()


def test_patch_costs_are_those_of_a_loop() -> None:
    grid = GRID.cropped((0, 0, 0), (12, 11, 10))
    here, there = features(texture(grid), None, (0, 0, 0)), features(texture(grid, seed=1), None, (0, 0, 0))
    settings = MatchSettings(radius_mm=4.0, patch_mm=2.0)
    points = torch.tensor([[5, 5, 5], [6, 4, 5]])
    costs = patch_costs(here, there, points, grid.spacing, settings)
    assert costs.shape == (2, 5, 5, 5)

    def patch(volume: Tensor, x: int, y: int, z: int) -> Tensor:
        return volume[z - 1 : z + 2, y - 1 : y + 2, x - 1 : x + 2]

    for p, (x, y, z) in enumerate(points.tolist()):
        for dz, dy, dx in np.ndindex(5, 5, 5):
            moved = patch(there.values, x + dx - 2, y + dy - 2, z + dz - 2)
            expected = ((patch(here.values, x, y, z) - moved) ** 2).mean()
            assert float(costs[p, dz, dy, dx]) == pytest.approx(float(expected), abs=1e-5)
    outside = patch_costs(here, there, torch.tensor([[0, 5, 5]]), grid.spacing, settings)
    assert (outside[..., :2] == 1).all()
    assert (outside[..., 2:] < 1).all()


def test_lower_envelope_is_that_of_brute_force() -> None:
    spacing, weight = (1.0, 2.0, 1.5), 0.03
    costs = torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, y, x = (torch.arange(n) for n in costs.shape[1:])
    places = torch.cartesian_prod(z, y, x) * torch.tensor(spacing[::-1], dtype=torch.float64)
    distance = torch.cdist(places, places) ** 2
    expected = (costs.flatten(1)[:, None] + weight * distance).amin(dim=2).reshape(costs.shape)
    torch.testing.assert_close(lower_envelope(costs, spacing, weight), expected)


def test_best_offsets_is_exact_for_a_parabola_and_stays_at_the_border() -> None:
    z, y, x = torch.meshgrid(*(torch.arange(-n, n + 1.0) for n in (2, 3, 4)), indexing="ij")
    inner = (x - 1.3) ** 2 + 2 * (y + 0.6) ** 2 + 3 * (z - 0.2) ** 2
    border = (x - 9) ** 2 + y**2 + z**2
    whole, fine = best_offsets(torch.stack([inner, border]))
    assert whole.tolist() == [[1, -1, 0], [4, 0, 0]]
    torch.testing.assert_close(fine, torch.tensor([[1.3, -0.6, 0.2], [4.0, 0.0, 0.0]]))


def test_nearest_neighbours() -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [7, 0, 0]])
    assert nearest(points, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert nearest(points, 9).shape == (4, 3)
    assert nearest(points[:1], 2).shape == (1, 0)


# ---- matching


def test_a_shift_of_whole_voxels_is_recovered_with_another_brightness() -> None:
    margin = search_margin(GRID, SETTINGS)
    assert margin == (4, 4, 4)
    around = GRID.padded(4)
    big = texture(around)
    shift = (2, -1, 1)
    fixed = big[..., 4:-4, 4:-4, 4:-4]
    warped = 0.6 * torch.roll(big, shift[::-1], dims=(2, 3, 4)) - 300
    points = distinctive_points(fixed, lungs(GRID), GRID)
    offset, keep = match(fixed, warped, GRID, points, SETTINGS)
    expected = torch.tensor(GRID.axes @ shift, dtype=torch.float32)
    assert len(points) > 50
    assert keep.float().mean() > 0.99
    error = (offset[keep] - expected).abs()
    assert error.max() < 0.9  # the same whole voxel
    assert error.mean() < 0.2


@pytest.mark.parametrize("grid", [GRID, ROTATED])
def test_a_smooth_motion_is_recovered_with_and_without_a_start(grid: Grid) -> None:
    field = smooth_field(grid, 2.5, torch.Generator().manual_seed(3))
    moving_grid = grid.padded(6)
    moving = texture(moving_grid)
    fixed = 0.7 * warp(moving, moving_grid, field, grid) - 200
    points = distinctive_points(fixed, lungs(grid), grid)
    for start in (None, 0.8 * field):
        offset, keep = displacements(fixed, grid, moving, moving_grid, points, start, SETTINGS)
        error = residuals(points, offset, field)
        assert keep.float().mean() > 0.9
        assert error[keep].mean() < 0.7  # a third of a voxel
        assert error[keep].quantile(0.95) < 1.5
    assert residuals(points, torch.zeros_like(offset), field).mean() > 1.5
    wrong_sign, _ = displacements(fixed, grid, moving, moving_grid, points, -field, SETTINGS)
    assert residuals(points, -wrong_sign, field).mean() > 2.0


def test_keypoints_do_not_depend_on_the_storage_order_nor_on_the_position_of_the_world() -> None:
    moving_grid = GRID.padded(6)
    moving = texture(moving_grid)
    field = smooth_field(GRID, 2.5, torch.Generator().manual_seed(3))
    fixed = warp(moving, moving_grid, field, GRID)
    plain = find_keypoints(fixed, lungs(GRID), GRID, moving, moving_grid, settings=KeypointSettings(match=SETTINGS))

    # stored backwards along x, the same voxels in the same world
    x, y, z = GRID.to_world(np.array([GRID.size[0] - 1, 0, 0]))
    backwards = replace(GRID, origin=(x, y, z), direction=((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    again = find_keypoints(
        fixed.flip(4), lungs(GRID), backwards, moving, moving_grid, settings=KeypointSettings(match=SETTINGS)
    )
    assert len(again.fixed_mm) == pytest.approx(len(plain.fixed_mm), abs=2)
    distance, closest = torch.cdist(plain.fixed_mm, again.fixed_mm).min(dim=1)
    same = distance < 1e-3
    assert same.float().mean() > 0.9  # of neighbours at equal distance, the order of storage decides which count
    torch.testing.assert_close(again.moving_mm[closest[same]], plain.moving_mm[same], atol=0.05, rtol=0)

    # the whole world turned about its origin
    turn = np.array(ROTATED.direction)
    turned_fixed, turned_moving = (
        replace(g, direction=ROTATED.direction, origin=tuple((turn @ np.array(g.origin)).tolist()))
        for g in (GRID, moving_grid)
    )
    turned = find_keypoints(
        fixed, lungs(GRID), turned_fixed, moving, turned_moving, settings=KeypointSettings(match=SETTINGS)
    )
    torch.testing.assert_close(turned.fixed_mm, plain.fixed_mm @ torch.tensor(turn.T).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(turned.moving_mm, plain.moving_mm @ torch.tensor(turn.T).float(), atol=2e-2, rtol=0)


def test_the_offset_is_the_mean_of_both_directions_and_better_than_one() -> None:
    field = smooth_field(GRID, 2.5, torch.Generator().manual_seed(3))
    around = GRID.padded(4)
    noise = 40 * torch.randn(1, 1, *GRID.shape, generator=torch.Generator().manual_seed(4))
    warped = texture(around)
    fixed = warp(warped, around, field, GRID) + noise
    points = distinctive_points(fixed, lungs(GRID), GRID)
    offset, keep = match(fixed, warped, GRID, points, SETTINGS)

    here, there = features(fixed, None, (0, 0, 0)), features(warped, None, (4, 4, 4))
    neighbours = nearest(points * torch.tensor(GRID.spacing), SETTINGS.neighbours)
    steps, forward = search(here, there, points, neighbours, GRID.spacing, SETTINGS)
    _, backward = search(there, here, points + steps, neighbours, GRID.spacing, SETTINGS)
    axes = torch.tensor(GRID.axes, dtype=torch.float32)
    torch.testing.assert_close(offset, (forward - backward) / 2 @ axes.T)
    both, one = (residuals(points, found, field)[keep].mean() for found in (offset, forward @ axes.T))
    assert both < 0.95 * one


def test_most_matches_in_a_foreign_image_are_dropped() -> None:
    fixed, foreign = texture(GRID), texture(GRID.padded(4), seed=7)
    points = distinctive_points(fixed, lungs(GRID), GRID)
    _, keep = match(fixed, foreign, GRID, points, SETTINGS)
    assert keep.float().mean() < 0.4


def test_places_outside_the_moving_image_are_dropped() -> None:
    moving_grid = GRID.cropped((-6, -6, 15), (48, 44, 30))  # the lower half is missing
    moving = texture(moving_grid)
    whole = GRID.cropped((-6, -6, -6), (48, 44, 51))
    full = texture(whole)
    full[..., 21:, :, :] = moving
    fixed = warp(full, whole, None, GRID)
    filled = torch.where(torch.arange(51)[:, None, None] < 21, -1000.0, full)  # or there is fill in its place
    points = distinctive_points(fixed, lungs(GRID), GRID)
    for image, grid in ((moving, moving_grid), (filled, whole)):
        _, keep = displacements(fixed, GRID, image, grid, points, None, SETTINGS)
        assert keep[points[:, 2] > 16].float().mean() > 0.9
        below = points[:, 2] < 13
        assert below.sum() > 20
        assert keep[below].float().mean() < 0.1


def test_an_empty_mask_and_constant_images_give_no_keypoints() -> None:
    start = smooth_field(GRID, 1.0, torch.Generator().manual_seed(0))
    for image, mask in ((texture(GRID), lungs(GRID) & False), (torch.full((1, 1, *GRID.shape), -800.0), lungs(GRID))):
        for field in (None, start):
            found = find_keypoints(image, mask, GRID, image, GRID, field)
            assert found.fixed_mm.shape == found.moving_mm.shape == (0, 3)


def test_settings_without_sense_are_refused() -> None:
    for setting in ("radius_mm", "tolerance_mm"):
        with pytest.raises(InputError, match=setting):
            MatchSettings(**{setting: 0.0})
    with pytest.raises(InputError, match="share"):
        MatchSettings(share=-1.0)
    with pytest.raises(InputError, match="spacing_mm"):
        DetectSettings(spacing_mm=math.nan)
    with pytest.raises(InputError, match="at least 1"):
        DetectSettings(number=0)
    with pytest.raises(ValueError, match="expected"):
        match(texture(GRID), texture(GRID), GRID, torch.zeros(1, 3, dtype=torch.long), SETTINGS)

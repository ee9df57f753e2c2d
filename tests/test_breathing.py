"""Simulated breathing: the field is the exact motion of the images, and everything is within its stated range."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithm.geometry import Grid, jacobian_determinant, linear_index_map, warp
from algorithm.network import AIR_HU
from training import breathing
from training.breathing import BreathingSettings, SimulatedPair, bspline_basis, motion, simulate

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = settings(deadline=None, max_examples=8)
GRID = Grid((36, 32, 40), spacing=(7.0, 7.5, 6.0), origin=(-120.0, -110.0, 50.0))
QUIET = BreathingSettings(noise_hu=0.0, offset_hu=0.0, truncation=0.0)
SEEDS = st.integers(0, 2**31)


@pytest.fixture
def unscanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No blur along z, which is drawn whatever the settings."""
    monkeypatch.setattr(breathing, "_scanned", lambda image, *_: image)


def positions(grid: Grid) -> Tensor:
    """World positions (1, 3, z, y, x) of the voxels."""
    axes, origin = torch.from_numpy(grid.axes).float(), torch.tensor(grid.origin)
    return linear_index_map(axes, origin, grid.shape).permute(0, 4, 1, 2, 3)


def two_lungs(grid: Grid = GRID) -> Tensor:
    """Two ellipsoids of 45 × 70 × 90 mm, side by side."""
    x = positions(grid) - torch.from_numpy(grid.to_world((np.array(grid.size) - 1) / 2)).float().reshape(1, 3, 1, 1, 1)
    shifted = torch.stack([x[:, 0].abs() - 60, x[:, 1], x[:, 2]], 1)
    radii = torch.tensor([45.0, 70.0, 90.0]).reshape(1, 3, 1, 1, 1)
    return ((shifted / radii).square().sum(dim=1, keepdim=True) < 1).float()


LUNGS = two_lungs()


def textured(low_hu: float, high_hu: float) -> Tensor:
    """Soft tissue with a smooth pattern between two values in the lungs."""
    waves = torch.sin(positions(GRID) / 12).mean(dim=1, keepdim=True)
    return torch.where(LUNGS > 0.5, low_hu + (high_hu - low_hu) * (waves + 1) / 2, breathing.SOFT_TISSUE_HU)


def pair_of(scan: Tensor, seed: int, settings_: BreathingSettings = QUIET) -> SimulatedPair:
    return simulate(scan, LUNGS, GRID, torch.Generator().manual_seed(seed), settings_)


def deep(pair: SimulatedPair) -> Tensor:
    """Fixed lung voxels whose neighbours (two voxels around) and their partners are all lung."""
    surely = (pair.fixed_lungs > 0.999).float()
    partners = warp(pair.moving_lungs, pair.grid, pair.displacement, pair.grid, fill=0.0)
    return (-F.max_pool3d(-surely * (partners > 0.999), 5, stride=1, padding=2)) > 0.5


def drawn(seed: int, settings_: BreathingSettings = QUIET) -> Tensor:
    return motion(LUNGS, GRID, torch.Generator().manual_seed(seed), settings_)


# --- the pair --------------------------------------------------------------------------------------------------------


@given(SEEDS)
@PROPERTY
def test_everything_follows_from_the_generator(seed: int) -> None:
    scan = textured(-900, -800)
    pairs = [pair_of(scan, s, BreathingSettings()) for s in (seed, seed, seed + 1)]
    for name in ("fixed", "moving", "fixed_lungs", "moving_lungs", "displacement"):
        one, same, _ = (getattr(pair, name) for pair in pairs)
        assert torch.equal(one, same), name
    assert not torch.allclose(pairs[0].displacement, pairs[2].displacement, atol=0.1)
    assert not torch.allclose(pairs[0].fixed, pairs[2].fixed, atol=1.0)


@given(SEEDS)
@PROPERTY
def test_the_inputs_stay_as_they_are(seed: int) -> None:
    scan, lungs = textured(-900, -800), LUNGS.clone()
    before = scan.clone()
    simulate(scan, lungs, GRID, torch.Generator().manual_seed(seed), replace(QUIET, truncation=1.0))
    assert torch.equal(scan, before)
    assert torch.equal(lungs, LUNGS)


@pytest.mark.usefixtures("unscanned")
@pytest.mark.parametrize("seed", range(6))
def test_the_moving_image_warped_by_the_exact_field_is_the_fixed_one(seed: int) -> None:
    pair = pair_of(textured(0, 350), seed)  # far denser than parenchyma: such values do not change with volume
    warped = warp(pair.moving, GRID, pair.displacement, GRID)
    inner = deep(pair)
    assert inner.sum() > 1000
    torch.testing.assert_close(warped[inner], pair.fixed[inner], atol=0.5, rtol=0)
    still = (pair.moving - pair.fixed)[inner].abs().mean()
    wrong = (warp(pair.moving, GRID, -pair.displacement, GRID) - pair.fixed)[inner].abs().mean()
    assert (warped - pair.fixed)[inner].abs().mean() < 0.1 * min(still, wrong)


@pytest.mark.usefixtures("unscanned")
@pytest.mark.parametrize("seed", range(6))
def test_the_lungs_lose_density_where_they_grow(seed: int) -> None:
    """(F + 1000) / (M + 1000) = det(I + ∇u)^g with one g, drawn between 0.5 and 1.2."""
    pair = pair_of(textured(-850, -850), seed)
    inner = deep(pair)
    growth = jacobian_determinant(pair.displacement, GRID)[:, None][inner].log()
    density = ((pair.fixed[inner] + 1000) / 150).log()
    exponent = (growth @ density) / (growth @ growth)
    assert 0.45 < exponent < 1.25
    assert growth.abs().max() > 0.05
    torch.testing.assert_close(density, exponent * growth, atol=0.02, rtol=0.05)


@given(SEEDS)
@PROPERTY
def test_the_fixed_lungs_are_the_pulled_back_lungs(seed: int) -> None:
    pair = pair_of(textured(-900, -800), seed)
    assert torch.equal(pair.moving_lungs, LUNGS)
    assert torch.equal(pair.fixed_lungs, warp(LUNGS, GRID, pair.displacement, GRID, fill=0.0))
    volume = jacobian_determinant(pair.displacement, GRID)[:, None][pair.fixed_lungs > 0.5].sum()
    assert volume / LUNGS.sum() == pytest.approx(1, abs=0.05)  # ∫ det(I + ∇u) over the fixed lungs


@pytest.mark.usefixtures("unscanned")
@given(seed=SEEDS)
@PROPERTY
def test_no_lung_is_seen_outside_the_fixed_lungs(seed: int) -> None:
    pair = pair_of(textured(-900, -800), seed)
    outside = F.max_pool3d(pair.fixed_lungs, 3, stride=1, padding=1) == 0
    assert pair.fixed[outside].min() > -230  # half lung, half tissue is filled by half: a quarter of 930 HU remains
    assert (pair.fixed[outside] < -50).float().mean() < 0.01
    assert pair.fixed[pair.fixed_lungs > 0.999].mean() < -700


@pytest.mark.usefixtures("unscanned")
def test_truncated_scans_end_in_air() -> None:
    scan = textured(-900, -800)
    ends = []
    for seed in range(12):
        pair = pair_of(scan, seed, replace(QUIET, truncation=1.0))
        missing = (pair.moving == AIR_HU).all(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()
        kept = [z for z in range(40) if z not in missing]
        assert len(missing) <= 0.15 * 40
        assert kept == list(range(kept[0], kept[-1] + 1))
        assert torch.equal(pair.moving[:, :, kept], scan[:, :, kept])
        ends += [missing[0] == 0] if missing else []
    assert set(ends) == {True, False}  # sometimes at the lower, sometimes at the upper end
    assert torch.equal(pair_of(scan, 0).moving, scan)


@given(SEEDS)
@PROPERTY
def test_noise_and_offset_have_the_stated_size(seed: int) -> None:
    flat = torch.full_like(LUNGS, -500.0)
    generator = torch.Generator().manual_seed(seed)
    scanned = breathing._scanned(flat, generator, BreathingSettings(noise_hu=30.0, offset_hu=15.0))
    assert (scanned.mean() + 500).abs() < 16
    assert scanned.std() < 33
    other = breathing._scanned(flat, generator, QUIET)
    torch.testing.assert_close(other, flat)


# --- the motion ------------------------------------------------------------------------------------------------------


@given(SEEDS)
@PROPERTY
def test_nothing_folds_in_the_lungs(seed: int) -> None:
    strong = BreathingSettings(mean_motion_mm=(8.0, 12.0), detail_mm=(4.0, 4.0, 3.0, 1.0))
    displacement = drawn(seed, strong)
    determinant = jacobian_determinant(displacement, GRID)[:, None]
    assert determinant[LUNGS > 0.5].min() >= strong.least_determinant
    fixed_lungs = warp(LUNGS, GRID, displacement, GRID, fill=0.0)
    assert determinant[fixed_lungs > 0.5].min() > 0


def test_the_bound_on_the_determinant_damps_the_motion() -> None:
    strong = BreathingSettings(mean_motion_mm=(12.0, 12.0), affine_mm=0.0)
    free, bound = (drawn(0, replace(strong, least_determinant=least)) for least in (-1e9, 0.7))
    inner = LUNGS > 0.5
    assert jacobian_determinant(free, GRID)[:, None][inner].min() < 0.7
    assert jacobian_determinant(bound, GRID)[:, None][inner].min() >= 0.7
    ratio = (bound.norm() / free.norm()).log() / np.log(0.85)
    assert ratio.round() >= 1
    torch.testing.assert_close(bound, 0.85 ** int(ratio.round()) * free, atol=1e-4, rtol=1e-4)


@given(SEEDS, st.floats(0.5, 10.0))
@PROPERTY
def test_the_mean_motion_is_the_one_asked_for(seed: int, mean_mm: float) -> None:
    exact = replace(QUIET, mean_motion_mm=(mean_mm, mean_mm), affine_mm=0.0, least_determinant=-1e9)
    length = drawn(seed, exact).norm(dim=1, keepdim=True)[LUNGS > 0.5]
    assert length.mean().item() == pytest.approx(mean_mm, rel=1e-3)


def test_the_mean_motion_spreads_over_its_range() -> None:
    settings_ = replace(QUIET, mean_motion_mm=(1.0, 4.0), affine_mm=0.0)
    means = [drawn(seed, settings_).norm(dim=1, keepdim=True)[LUNGS > 0.5].mean().item() for seed in range(12)]
    assert 0.85**3 < min(means) < 1.7
    assert 2.4 < max(means) < 4.001


@given(SEEDS)
@PROPERTY
def test_without_the_pre_alignment_s_error_no_affine_part_is_left(seed: int) -> None:
    inner = (LUNGS > 0.5)[0, 0]
    points = positions(GRID)[0][:, inner].T.numpy()
    homogeneous = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
    for affine_mm, few in ((0.0, True), (3.0, False)):
        values = drawn(seed, replace(QUIET, affine_mm=affine_mm))[0][:, inner].T.numpy()
        fit = homogeneous @ np.linalg.lstsq(homogeneous, values)[0]
        assert (np.abs(fit).max() < 0.01) == few
        assert np.abs(values).mean() > 0.1


def test_the_grid_s_direction_turns_the_diaphragm_with_it() -> None:
    turn = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    turned_grid = replace(GRID, direction=turn)
    plain, turned = (
        breathing._diaphragm(LUNGS, grid, torch.Generator().manual_seed(0), QUIET) for grid in (GRID, turned_grid)
    )
    torch.testing.assert_close(turned, torch.einsum("ij,njzyx->nizyx", torch.tensor(turn), plain), atol=1e-4, rtol=0)
    cranial = plain[0, 2]
    assert cranial[0].abs().mean() > 3 * cranial[-8:].abs().mean()  # the base moves, the apex rests


# --- B-splines -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.floats(0.7, 40.0))
@settings(deadline=None, max_examples=40)
def test_b_splines_sum_to_one_and_reproduce_straight_lines(size: int, knot_spacing: float) -> None:
    basis = bspline_basis(size, knot_spacing).double()
    torch.testing.assert_close(basis.sum(dim=1), torch.ones(size).double(), atol=1e-5, rtol=0)
    assert basis.min() >= 0
    control = (torch.arange(basis.shape[1]) - 2).double() * knot_spacing  # two knots lie before the first voxel
    torch.testing.assert_close(basis @ control, torch.arange(size).double(), atol=1e-3, rtol=0)


def test_b_splines_have_the_known_values() -> None:
    basis = bspline_basis(5, 2.0)
    torch.testing.assert_close(basis[0, 1:4], torch.tensor([1 / 6, 2 / 3, 1 / 6]))
    torch.testing.assert_close(basis[1, 1:5], torch.tensor([1 / 48, 23 / 48, 23 / 48, 1 / 48]))


def test_b_splines_are_twice_continuously_differentiable() -> None:
    basis = bspline_basis(401, 100.0).double()
    second = (basis[2:] - 2 * basis[1:-1] + basis[:-2]) * 100**2
    assert (second[1:] - second[:-1]).abs().max() < 0.15  # a kink would jump by 1 and more
    assert second.abs().max() == pytest.approx(2, abs=0.1)

"""Simulated breathing: the field is the exact motion of the images, and everything is within its stated range."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from algorithm.geometry import jacobian_determinant, resample, warp
from algorithm.hounsfield import AIR_HU
from tests.support.made_up_lungs import GRID, LUNGS, SEEDS, positions
from tests.support.strategies import examples
from training import breathing
from training.breathing import AT_REST, BREATH_HOLD, BreathingSettings, deformed, scanned, simulate
from training.pairs import TrainingPair
from training.random_motion import MotionSettings, draw_motion

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(8)
QUIET = BreathingSettings(noise_hu=0.0, offset_hu=0.0, truncation=0.0)
HELD = replace(BREATH_HOLD, noise_hu=0.0, offset_hu=0.0, truncation=0.0)


def textured(low_hu: float, high_hu: float) -> Tensor:
    """Soft tissue with a smooth pattern between two values in the lungs."""
    waves = torch.sin(positions(GRID) / 12).mean(dim=1, keepdim=True)
    return torch.where(LUNGS > 0.5, low_hu + (high_hu - low_hu) * (waves + 1) / 2, breathing.SOFT_TISSUE_HU)


def pair_of(scan: Tensor, seed: int, settings_: BreathingSettings = QUIET) -> TrainingPair:
    """Before the scanner leaves its marks."""
    return deformed(scan, LUNGS, GRID, torch.Generator().manual_seed(seed), settings_)


def field(pair: TrainingPair) -> Tensor:
    """The displacement on the fixed image's grid."""
    return resample(pair.displacement, pair.displacement_grid, pair.grid)


def inner(pair: TrainingPair) -> Tensor:
    """Voxels that are nothing but lung."""
    return pair.fixed_lungs > 0.999


def deep(pair: TrainingPair) -> Tensor:
    """Fixed lung voxels whose neighbours, two voxels around, are all lung."""
    return -F.max_pool3d(-inner(pair).float(), 5, stride=1, padding=2) > 0.5


def drawn(seed: int, settings_: BreathingSettings = QUIET) -> Tensor:
    return draw_motion(LUNGS, GRID, torch.Generator().manual_seed(seed), settings_.motion).forward


# --- the pair --------------------------------------------------------------------------------------------------------


@given(SEEDS)
@PROPERTY
def test_everything_follows_from_the_generator(seed: int) -> None:
    scan = textured(-900, -800)
    pairs = [simulate(scan, LUNGS, GRID, torch.Generator().manual_seed(s), AT_REST) for s in (seed, seed, seed + 1)]
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


@pytest.mark.parametrize("seed", range(6))
def test_the_moving_image_warped_by_the_exact_field_is_the_fixed_one(seed: int) -> None:
    pair = pair_of(textured(0, 350), seed)  # far denser than parenchyma: such values do not change with volume
    assert pair.grid == pair.moving_grid == pair.displacement_grid == GRID
    warped = warp(pair.moving, GRID, pair.displacement, GRID)
    lung = inner(pair)
    assert lung.sum() > 1000
    torch.testing.assert_close(warped[lung], pair.fixed[lung], atol=0.5, rtol=0)
    still = (pair.moving - pair.fixed)[lung].abs().mean()
    wrong = (warp(pair.moving, GRID, -pair.displacement, GRID) - pair.fixed)[lung].abs().mean()
    assert (warped - pair.fixed)[lung].abs().mean() < 0.1 * min(still, wrong)


@pytest.mark.parametrize(("spacing_mm", "factor"), [(8.0, 2), (16.0, 4)])
@pytest.mark.parametrize("seed", range(2))
def test_fine_images_follow_the_trilinear_field_of_a_coarser_grid(spacing_mm: float, factor: int, seed: int) -> None:
    settings_ = replace(QUIET, motion=MotionSettings(spacing_mm=spacing_mm, mean_motion_mm=(6.0, 6.0)))
    pair = pair_of(textured(0, 350), seed, settings_)
    assert pair.grid == pair.moving_grid == GRID
    assert pair.displacement_grid == GRID.coarsened(factor)
    assert pair.displacement.shape[2:] == pair.displacement_grid.shape
    lung = inner(pair)
    assert lung.sum() > 1000
    torch.testing.assert_close(warp(pair.moving, GRID, field(pair), GRID)[lung], pair.fixed[lung], atol=0.5, rtol=0)
    assert torch.equal(pair.fixed_lungs, warp(LUNGS, GRID, field(pair), GRID, fill=0.0))
    still = (pair.moving - pair.fixed)[lung].abs().mean()
    assert still > 10


@pytest.mark.parametrize("seed", range(6))
def test_the_lungs_lose_density_where_they_grow(seed: int) -> None:
    """(F + 1000) / (M + 1000) = det(I + ∇u)^g with one g, drawn between 0.5 and 1.2."""
    pair = pair_of(textured(-850, -850), seed, replace(QUIET, volume_ratio=1.0))
    lung = deep(pair)
    growth = jacobian_determinant(pair.displacement, GRID)[:, None][lung].log()
    density = ((pair.fixed[lung] + 1000) / 150).log()
    exponent = (growth @ density) / (growth @ growth)
    assert 0.45 < exponent < 1.25
    assert growth.abs().max() > 0.05
    torch.testing.assert_close(density, exponent * growth, atol=0.02, rtol=0.05)


def test_the_lungs_volume_is_seen_in_the_density_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Density changes by v^g, where ln v = s · ln(volume_ratio), -1 ≤ s ≤ 1, and 0.5 ≤ g ≤ 1.2."""
    scan = textured(-920, -880)
    exponents, draws = [], []
    uniform = breathing.uniform

    def watched(*arguments: Any) -> float:
        draws.append((arguments[1:], uniform(*arguments)))
        return draws[-1][1]

    monkeypatch.setattr(breathing, "uniform", watched)
    for seed in range(8):
        settings_ = replace(QUIET, motion=MotionSettings(mean_motion_mm=(3.0, 3.0)))
        plain, twice, four_times = (pair_of(scan, seed, replace(settings_, volume_ratio=v)) for v in (1.0, 2.0, 4.0))
        for name in ("moving", "fixed_lungs", "moving_lungs", "displacement"):
            assert torch.equal(getattr(plain, name), getattr(twice, name)), name
        outside = plain.fixed_lungs == 0
        assert torch.equal(plain.fixed[outside], twice.fixed[outside])
        lung = inner(plain)
        change, more = (((other.fixed + 1000) / (plain.fixed + 1000))[lung].log() for other in (twice, four_times))
        exponents.append(float(change.mean() / np.log(2)))
        at = [ranges for ranges, _ in draws].index((0.5, 1.2))
        (ranges, s), (_, g) = draws[at - 1 : at + 1]
        assert ranges == (-1.0, 1.0)
        assert exponents[-1] == pytest.approx(s * g, abs=0.01)
        draws.clear()
        torch.testing.assert_close(change, change.mean().expand_as(change), atol=0.01, rtol=0.02)
        torch.testing.assert_close(more, 2 * change, atol=0.01, rtol=0.02)
    assert -1.2 < min(exponents) < -0.2
    assert 0.2 < max(exponents) < 1.2


@given(SEEDS)
@PROPERTY
def test_the_fixed_lungs_are_the_pulled_back_lungs(seed: int) -> None:
    pair = pair_of(textured(-900, -800), seed)
    assert torch.equal(pair.moving_lungs, LUNGS)
    assert torch.equal(pair.fixed_lungs, warp(LUNGS, GRID, pair.displacement, GRID, fill=0.0))
    volume = jacobian_determinant(pair.displacement, GRID)[:, None][pair.fixed_lungs > 0.5].sum()
    assert volume / LUNGS.sum() == pytest.approx(1, abs=0.05)  # ∫ det(I + ∇u) over the fixed lungs


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


# --- around the lungs ------------------------------------------------------------------------------------------------


def body_scan(lung_hu: float = -870.0) -> Tensor:
    """Lungs whose edge is blurred over a voxel or two, in tissue of -60 to 120 HU."""
    tissue = 30 + 90 * torch.sin(positions(GRID) / 15).mean(dim=1, keepdim=True)
    share = F.avg_pool3d(LUNGS, 3, stride=1, padding=1)
    return torch.lerp(tissue, torch.full_like(tissue, lung_hu), share)


def shifted(voxels: float) -> Tensor:
    """A displacement to the left."""
    shift = torch.zeros(1, 3, *GRID.shape)
    shift[:, 0] = voxels * GRID.spacing[0]
    return shift


def pulled(scan: Tensor, displacement: Tensor, body: Tensor) -> tuple[Tensor, Tensor]:
    """Image and lungs, without a change of density."""
    fixed_lungs = warp(LUNGS, GRID, displacement, GRID, fill=0.0)
    one = torch.ones_like(scan)
    return breathing._pulled(scan, LUNGS, fixed_lungs, displacement, body, GRID, one), fixed_lungs


def grown(mask: Tensor, voxels: int) -> Tensor:
    """All voxels up to so far away, along the axes and diagonals."""
    return F.max_pool3d(mask.float(), 2 * voxels + 1, stride=1, padding=voxels) > 0


@given(SEEDS)
@PROPERTY
def test_without_sliding_the_image_is_the_warped_one_everywhere(seed: int) -> None:
    displacement = drawn(seed)
    image, _ = pulled(body_scan(), displacement, displacement)
    torch.testing.assert_close(image, warp(body_scan(), GRID, displacement, GRID), atol=0.01, rtol=0)


@pytest.mark.parametrize("voxels", [4.0, -5.5])
def test_the_body_slides_along_the_lungs(voxels: float) -> None:
    displacement, body = shifted(-1.0), shifted(voxels)
    image, fixed_lungs = pulled(body_scan(), displacement, body)
    lung = fixed_lungs == 1
    torch.testing.assert_close(image[lung], warp(body_scan(), GRID, displacement, GRID)[lung])
    body_lungs = warp(grown(LUNGS, 2).float(), GRID, body, GRID)
    outside = ~grown(fixed_lungs > 0, 2) & (body_lungs == 0)  # neither lung nor where the body's lungs would be
    torch.testing.assert_close(image[outside], warp(body_scan(), GRID, body, GRID)[outside], atol=0.01, rtol=0)
    uncovered = ~grown(fixed_lungs > 0, 2) & (warp(LUNGS, GRID, body, GRID) == 1)
    assert uncovered.sum() > 100
    torch.testing.assert_close(image[uncovered], torch.full((int(uncovered.sum()),), breathing.SOFT_TISSUE_HU))


@pytest.mark.parametrize("seed", range(6))
def test_no_rim_of_lung_stays_where_the_body_slid_away(seed: int) -> None:
    """Next to the fixed lungs and their blurred edge nothing is darker than the tissue, or the fat put in its place."""
    settings_ = replace(QUIET, body_mm=5.0)
    pair = pair_of(body_scan(), seed, settings_)
    outside = ~grown(pair.fixed_lungs > 0, 2)
    near = outside & grown(pair.fixed_lungs > 0, 6)
    assert near.sum() > 1000
    assert pair.fixed[near].min() > -101
    assert pair.fixed[inner(pair)].mean() < -600
    rim = ~(pair.fixed_lungs > 0) & grown(pair.fixed_lungs > 0, 2)
    unslid = warp(body_scan(), GRID, field(pair), GRID)
    assert (pair.fixed[rim] < -150).float().mean() < (unslid[rim] < -150).float().mean() + 0.02


@given(SEEDS)
@PROPERTY
def test_the_body_s_motion_does_not_reach_into_the_lungs(seed: int) -> None:
    still, moved = (pair_of(body_scan(), seed, replace(QUIET, body_mm=mm)) for mm in (0.0, 20.0))
    for name in ("moving", "fixed_lungs", "moving_lungs", "displacement"):
        assert torch.equal(getattr(still, name), getattr(moved, name)), name
    lung = inner(still)
    torch.testing.assert_close(still.fixed[lung], moved.fixed[lung], atol=1.0, rtol=0)


def test_the_body_moves_in_most_pairs() -> None:
    scan = body_scan()
    changes = []
    for seed in range(10):
        still, moved = (pair_of(scan, seed, replace(QUIET, body_mm=mm)) for mm in (0.0, 20.0))
        changes.append(float((still.fixed - moved.fixed)[~grown(still.fixed_lungs > 0, 2)].abs().mean()))
    assert 0 < sum(change == 0 for change in changes) < 5
    assert np.median(changes) > 5


# --- the scanner -----------------------------------------------------------------------------------------------------


@given(SEEDS)
@PROPERTY
def test_noise_and_offset_have_the_stated_size(seed: int) -> None:
    flat = torch.full_like(LUNGS, -500.0)
    generator = torch.Generator().manual_seed(seed)
    noisy = breathing._scanned(flat, generator, BreathingSettings(noise_hu=30.0, offset_hu=15.0))
    assert (noisy.mean() + 500).abs() < 16
    assert noisy.std() < 33
    torch.testing.assert_close(breathing._scanned(flat, generator, QUIET), flat)


def test_kernel_and_thick_slices_keep_the_mean() -> None:
    """Softer, sharper and blurred along z; the means of small windows sum to the image where its border is flat."""
    scan = torch.zeros_like(LUNGS)
    scan[:, :, 2:-2, 2:-2, 2:-2] = 300 * torch.randn(36, 28, 32, generator=torch.Generator().manual_seed(0))
    kinds = set()
    for seed in range(30):
        result = breathing._scanned(scan, torch.Generator().manual_seed(seed), QUIET)
        assert result.double().mean() == pytest.approx(scan.double().mean().item(), abs=1e-3)
        along_z, along_x = ((v[1:] * v[:-1]).mean() / v.var() for v in (result[0, 0], result[0, 0].permute(2, 1, 0)))
        ratio = result.std() / scan.std()
        if ratio > 1.01:
            kinds.add("sharp")
        elif ratio < 0.99:
            kinds.add("thick" if along_z > 5 * along_x.abs() else "soft")
        else:
            kinds.add("as it is")
    assert kinds == {"sharp", "soft", "thick", "as it is"}


def test_the_two_images_are_scanned_independently() -> None:
    flat = torch.zeros_like(LUNGS)
    pair = TrainingPair(
        flat, flat, LUNGS, LUNGS, torch.zeros(1, 3, *GRID.shape), torch.zeros(1, 3, *GRID.shape), GRID, GRID, GRID
    )
    result = scanned(pair, torch.Generator().manual_seed(5), BreathingSettings())
    both = torch.stack([result.fixed.flatten(), result.moving.flatten()])
    assert (both.std(dim=1) > 0.1).all()
    assert torch.corrcoef(both)[0, 1].abs() < 0.02
    assert result.fixed.mean() != result.moving.mean()
    assert torch.equal(result.fixed_lungs, LUNGS)
    assert torch.equal(pair.fixed, flat)  # the pair itself stays


def test_trapped_air_keeps_its_density() -> None:
    """The same draws with and without: the density changes no more anywhere, and in some regions hardly at all."""
    scan = textured(-850, -850)
    least = []
    for seed in range(6):
        free, trapped = (pair_of(scan, seed, replace(HELD, trapping=share)) for share in (0.0, 1.0))
        assert torch.equal(free.displacement, trapped.displacement)
        lung = deep(free)
        before, after = (((pair.fixed[lung] + 1000) / 150).log() for pair in (free, trapped))
        kept = after[before.abs() > 0.02] / before[before.abs() > 0.02]
        assert -0.01 < kept.min() < kept.max() < 1.01
        least.append(float(kept.min()))
    assert 0.1 < min(least) < 0.6
    assert sum(value < 0.8 for value in least) > 3


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_the_other_way_round(seed: int) -> None:
    pair = pair_of(textured(0, 350), seed, HELD)
    other = pair.swapped()
    assert other.swapped() == pair
    assert torch.equal(other.fixed, pair.moving)
    lung = deep(other)
    still = (other.moving - other.fixed)[lung].abs().mean()
    warped = warp(other.moving, GRID, field(other), GRID)
    assert (warped - other.fixed)[lung].abs().mean() < 0.5 * still  # interpolated twice

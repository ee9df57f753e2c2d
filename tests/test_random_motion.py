"""Random motion: exact in both directions, never folded, of the stated length."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.geometry import Affine, compose, jacobian_determinant
from tests.support.made_up_lungs import GRID, LUNGS, SEEDS, positions
from tests.support.strategies import examples
from training import random_motion
from training.breathing import AT_REST, BREATH_HOLD
from training.data import save_arrays
from training.random_motion import (
    Motion,
    MotionSettings,
    bspline_basis,
    draw_motion,
    flow,
    load_real_motions,
    random_affine,
    random_splines,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(8)

QUIET = MotionSettings()
KINDS = {"at rest": AT_REST.motion, "breath-hold": BREATH_HOLD.motion}


def both(seed: int, settings_: MotionSettings = QUIET, real: Tensor | None = None) -> Motion:
    return draw_motion(LUNGS, GRID, torch.Generator().manual_seed(seed), settings_, real)


def drawn(seed: int, settings_: MotionSettings = QUIET) -> Tensor:
    return both(seed, settings_).forward


def brought(real: Tensor, seed: int) -> Tensor:
    """Real motion in these lungs."""
    return random_motion._real(LUNGS, GRID, torch.Generator().manual_seed(seed), real)


# --- the flow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(SEEDS)
@example(3306)
@PROPERTY
def test_nothing_folds(kind: str, seed: int) -> None:
    """In the lungs, which alone count; of 2000 breath-holds one folded elsewhere, at a single voxel of 7 mm."""
    motion = both(seed, KINDS[kind])
    for direction in (motion.forward, motion.backward):
        determinant = jacobian_determinant(direction, GRID)
        assert determinant[LUNGS[:, 0] > 0.5].min() > 0
        assert (determinant <= 0).sum() <= 1


@given(SEEDS)
@PROPERTY
def test_one_direction_undoes_the_other(seed: int) -> None:
    motion = both(seed, BREATH_HOLD.motion)
    there_and_back = compose(motion.forward, GRID, motion.backward, GRID).norm(dim=1, keepdim=True)
    assert there_and_back[LUNGS > 0.5].mean() < 0.2 * motion.forward.norm(dim=1, keepdim=True)[LUNGS > 0.5].mean()


def test_the_flow_of_a_linear_velocity_is_its_steps_composed() -> None:
    """v = -x/2 along one axis, twice a step of a quarter: (3/4)² x."""
    centre = torch.from_numpy(GRID.to_world((np.array(GRID.size) - 1) / 2)).float().reshape(1, 3, 1, 1, 1)
    x = positions(GRID) - centre
    velocity = torch.zeros_like(x)
    velocity[:, 2] = -0.5 * x[:, 2]
    expected = (0.75**2 - 1) * x[:, 2]
    torch.testing.assert_close(flow(velocity, GRID)[:, 2], expected, atol=0.01, rtol=1e-3)
    assert flow(velocity, GRID)[:, :2].abs().max() < 1e-4


def test_a_constant_velocity_is_a_shift() -> None:
    shift = torch.tensor([3.0, -2.0, 40.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *GRID.shape)
    torch.testing.assert_close(flow(shift, GRID), shift.contiguous())


# --- what is drawn ---------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.5, 6.0))
@PROPERTY
def test_the_mean_motion_is_about_the_one_asked_for(seed: int, mean_mm: float) -> None:
    """It is that of the velocity; the flow's is a little different."""
    exact = replace(QUIET, mean_motion_mm=(mean_mm, mean_mm), affine_mm=(0.0, 0.0))
    length = drawn(seed, exact).norm(dim=1, keepdim=True)[LUNGS > 0.5]
    assert length.mean().item() == pytest.approx(mean_mm, rel=0.15)


def test_no_motion_is_longer_than_the_longest() -> None:
    settings_ = replace(BREATH_HOLD.motion, mean_motion_mm=(30.0, 30.0), most_motion_mm=20.0, affine_mm=(0.0, 0.0))
    for seed in range(4):
        length = drawn(seed, settings_).norm(dim=1, keepdim=True)[LUNGS > 0.5]
        assert 10 < length.max() < 25


@given(SEEDS)
@PROPERTY
def test_without_the_pre_alignment_s_error_no_affine_part_is_left(seed: int) -> None:
    inner = (LUNGS > 0.5)[0, 0]
    points = positions(GRID)[0][:, inner].T.numpy()
    homogeneous = np.column_stack([points - points.mean(axis=0), np.ones(len(points))])
    for affine_mm, few in ((0.0, True), (3.0, False)):
        values = drawn(seed, replace(QUIET, affine_mm=(affine_mm, affine_mm)))[0][:, inner].T.numpy()
        fit = homogeneous @ np.linalg.lstsq(homogeneous, values)[0]
        assert (np.abs(fit).max() < 0.01) == few
        assert np.abs(values).mean() > 0.1


def test_a_random_affine_map_moves_the_surface_by_its_deviation() -> None:
    edge = GRID.to_world((np.array(GRID.size) - 1) * np.array([0.5, 0.5, 1.0]))
    moved = [random_affine(GRID, torch.Generator().manual_seed(seed), 4.0)(edge) - edge for seed in range(200)]
    assert np.std(moved) == pytest.approx(4.0 / 2 * math.sqrt(2), rel=0.15)  # shift and one column
    assert random_affine(GRID, torch.Generator().manual_seed(0), 0.0) == Affine()


def test_the_grid_s_direction_turns_the_diaphragm_with_it() -> None:
    turn = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    turned_grid = replace(GRID, direction=turn)
    plain, turned = (
        random_motion._diaphragm(LUNGS, grid, torch.Generator().manual_seed(0), replace(QUIET, dome=0.5))
        for grid in (GRID, turned_grid)
    )
    torch.testing.assert_close(turned, torch.einsum("ij,njzyx->nizyx", torch.tensor(turn), plain), atol=1e-4, rtol=0)
    cranial = plain[0, 2]
    assert cranial[0].abs().mean() > 3 * cranial[-8:].abs().mean()  # the base moves, the apex rests


def test_real_motion_is_brought_to_the_box_of_the_lungs(tmp_path: Path) -> None:
    """A field that is linear in the box, relative to its edges, is the same linear field around these lungs."""
    n = 8
    z = ((torch.arange(n) + 0.5) / n).reshape(1, n, 1, 1).expand(3, n, n, n)
    real = torch.zeros(1, 3, n, n, n)
    real[0, 2] = 0.1 * z[0]
    save_arrays(tmp_path / "real.npz", {"fields": real.numpy()})
    motion = random_motion._real(
        LUNGS, GRID, torch.Generator().manual_seed(0), load_real_motions(tmp_path / "real.npz")
    )
    inside = (LUNGS[0, 0] > 0.5).nonzero()
    low, high = (int(v) for v in (inside[:, 0].min(), inside[:, 0].max()))
    height = (high - low + 1) * GRID.spacing[2]
    rows = motion[0, 2, :, 16, 18]
    middle = slice(low + 4, high - 3)
    expected = 0.1 * height * (torch.arange(GRID.size[2]) - low + 0.5) / (high - low + 1)
    torch.testing.assert_close(rows[middle], expected[middle], atol=0.05, rtol=0)
    assert motion[0, :2].abs().max() < 1e-5


def test_real_motion_takes_the_place_of_the_diaphragm() -> None:
    settings_ = replace(BREATH_HOLD.motion, real=1.0, detail_mm=(0.0,) * 4, affine_mm=(0.0, 0.0))
    real = torch.randn(2, 3, 6, 6, 6, generator=torch.Generator().manual_seed(3)) * 0.03
    one, other = both(1, settings_, real), both(1, settings_)
    assert not torch.allclose(one.forward, other.forward, atol=0.5)


def test_real_motion_comes_mirrored_as_well() -> None:
    real = torch.randn(1, 3, 6, 6, 6, generator=torch.Generator().manual_seed(3)) * 0.03
    mirrored = real.flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).reshape(1, 3, 1, 1, 1)
    ways, others = (
        {tuple(np.round(brought(fields, seed)[0, :, 20, 16, 18].numpy(), 3).tolist()) for seed in range(8)}
        for fields in (real, mirrored)
    )
    assert len(ways) == 2
    assert ways == others


def test_detail_has_the_stated_deviation() -> None:
    """Cubic B-splines keep (151/315)^3 of the variance of their control points: ≈ 1/8, which is made up for."""
    variances = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        variances.append(float(random_splines(GRID, (30.0,), (2.0,), generator).square().mean()))
    expected = 2.0**2 * (4 / 3) * (2 * 151 / 315) ** 3  # E[s²] = 4/3 for s uniform in 0..2
    assert np.mean(variances) == pytest.approx(expected, rel=0.35)
    assert max(variances) / min(variances) > 10


# --- B-splines -------------------------------------------------------------------------------------------------------


@given(st.integers(2, 60), st.floats(0.7, 40.0))
@examples(40)
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

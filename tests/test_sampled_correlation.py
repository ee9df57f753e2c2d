"""The local correlation at the voxels of a mask: value and gradient are those of the general functions."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from algorithm.geometry import Affine, Grid, doubled, index_map, inside, moving_index, sample
from algorithm.objective.local_correlation import local_correlation_distance
from algorithm.objective.sampled_correlation import SampledCorrelation, applies, runs_of

pytest.importorskip("numba")

GRID = Grid((26, 20, 16), (2.0, 2.5, 3.0), (-20.0, 7.0, 31.0))
AFFINE = Affine.from_arrays(
    np.array([[1.02, 0.05, 0], [-0.04, 0.97, 0.03], [0, 0.02, 1.01]]), np.array([1.0, -2.0, 0.5])
)
NOISE_HU = 20.0


def images(seed: int, moving_grid: Grid) -> tuple[Tensor, Tensor]:
    """Noise, somewhat smooth."""
    generator = torch.Generator().manual_seed(seed)
    rough = (-700 + 300 * torch.randn(1, 1, *grid.shape, generator=generator) for grid in (GRID, moving_grid))
    fixed, moving = (F.avg_pool3d(v, 3, stride=1, padding=1) for v in rough)
    return fixed, moving


def lungs(inset: int = 2) -> Tensor:
    """Two boxes, and a single voxel in the corner that is still allowed."""
    mask = torch.zeros(1, 1, *GRID.shape, dtype=torch.bool)
    mask[:, :, 3:12, 4:15, 3:10] = True
    mask[:, :, 4:13, 5:16, 14:22] = True
    mask[:, :, -1 - inset, inset, -1 - inset] = True
    return mask


def dense(control: Tensor, fixed: Tensor, mask: Tensor, moving: Tensor, moving_grid: Grid) -> Tensor:
    """D by the functions for any image, in double precision."""
    u, fixed, moving = doubled(control.double()), fixed.double(), moving.double()
    index = moving_index(GRID, moving_grid, u, AFFINE, u)
    valid = inside(index.detach(), moving_grid.shape)[:, None]
    return local_correlation_distance(fixed, sample(moving, index), mask & valid, noise_hu=NOISE_HU)


def control_points(seed: int, length_mm: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return length_mm * torch.randn(1, 3, *GRID.coarsened().shape, generator=generator)


def value_and_gradient(distance: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(distance, control)
    return distance.detach(), gradient


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("length_mm", [0.0, 1.5, 8.0])
def test_value_and_gradient_are_those_of_any_image(length_mm: float, threads: int) -> None:
    moving_grid = Grid((22, 24, 18), (2.3, 2.2, 2.7), (-18.0, 3.0, 30.0))
    fixed, moving = images(1, moving_grid)
    mask = lungs()
    assert applies(mask, moving)
    sampled = SampledCorrelation(fixed, mask, moving, index_map(GRID, moving_grid, AFFINE), NOISE_HU)
    for seed in (2, 3):  # nothing stays from the call before
        control = control_points(seed, length_mm).requires_grad_()
        wanted, slope = value_and_gradient(dense(control, fixed, mask, moving, moving_grid), control)
        found, found_slope = value_and_gradient(2 * sampled(control), control)
        assert float(found) == pytest.approx(2 * float(wanted), abs=1e-5)
        assert (found_slope / 2 - slope).norm() < 1e-3 * slope.norm()
        assert slope.norm() > 0


def test_nothing_seen_is_zero_without_a_slope() -> None:
    far = Grid((8, 8, 8), (2.0, 2.0, 2.0), (5000.0, 0.0, 0.0))
    fixed, moving = images(7, far)
    sampled = SampledCorrelation(fixed, lungs(), moving, index_map(GRID, far, Affine()), NOISE_HU)
    control = control_points(8, 1.0).requires_grad_()
    value, gradient = value_and_gradient(sampled(control), control)
    assert value == 0
    assert not gradient.any()
    empty = SampledCorrelation(fixed, lungs() & False, moving, index_map(GRID, far, Affine()), NOISE_HU)
    assert empty(control) == 0


def test_a_mask_at_the_border_is_left_to_the_general_functions() -> None:
    _, moving = images(9, GRID)
    assert applies(lungs(2), moving)
    assert not applies(lungs(1), moving)
    assert not applies(lungs(), moving[:, :, :1])


def test_runs_are_the_mask() -> None:
    mask = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    again = torch.zeros_like(mask)
    for z, y, start, end in runs_of(mask).tolist():
        assert start < end
        assert not again[z, y, start:end].any()
        again[z, y, start:end] = True
    assert torch.equal(again, mask)

"""Every term against values worked out by hand, on anisotropic grids with any direction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import Affine, Grid, warp, with_affine
from algorithm.objective import (
    curvature,
    edge_parameter,
    keypoint_distance,
    mask_distance,
    ngf_distance,
    one_hot,
    psi,
    volume_change,
)
from algorithm.objective.curvature import laplacian
from algorithm.objective.ngf import gradient
from tests.support.grids import ROTATION
from tests.support.strategies import examples, generators, grids

PROPERTY = examples(20)
GRID = Grid(size=(9, 8, 7), spacing=(0.7, 1.1, 2.5), origin=(-120.0, 33.0, 410.0), direction=ROTATION)
INTERIOR = (..., slice(1, -1), slice(1, -1), slice(1, -1))


def world(grid: Grid) -> Tensor:
    """World positions (1, 3, z, y, x) of the voxel centres, in double precision."""
    nz, ny, nx = grid.shape
    k, j, i = np.meshgrid(np.arange(nz), np.arange(ny), np.arange(nx), indexing="ij")
    points = grid.to_world(np.stack([i, j, k], axis=-1))
    return torch.from_numpy(points).permute(3, 0, 1, 2)[None]


def centred(grid: Grid) -> Tensor:
    """`world` from the grid's origin, lest tests of second differences measure rounding."""
    return world(grid) - torch.tensor(grid.origin, dtype=torch.float64)[None, :, None, None, None]


def ramp(grid: Grid, slope: tuple[float, float, float]) -> Tensor:
    return torch.einsum("j,njzyx->nzyx", torch.tensor(slope, dtype=torch.float64), centred(grid))[:, None]


def linear(grid: Grid, matrix: Tensor) -> Tensor:
    return torch.einsum("ij,njzyx->nizyx", matrix, centred(grid))


# D: normalised gradient fields


@PROPERTY
@given(grid=grids(), noise=generators())
def test_ngf_of_ramps(grid: Grid, noise: torch.Generator) -> None:
    f, w = (20 * torch.randn(3, generator=noise, dtype=torch.float64) for _ in range(2))
    e = 3.0
    fixed, warped = ramp(grid, tuple(f.tolist())), ramp(grid, tuple(w.tolist()))
    expected = 1 - (f @ w + e**2) ** 2 / ((f @ f + e**2) * (w @ w + e**2))
    torch.testing.assert_close(ngf_distance(fixed, warped, grid, None, e), expected)


def test_ngf_parallel_crossed_and_flat() -> None:
    along, across = ramp(GRID, (100.0, 0.0, 0.0)), ramp(GRID, (0.0, 100.0, 0.0))
    flat = torch.full_like(along, -800.0)
    assert float(ngf_distance(along, 5 * along - 300, GRID, None, 1e-3)) == pytest.approx(0, abs=1e-9)
    assert float(ngf_distance(along, -2 * along, GRID, None, 1e-3)) == pytest.approx(0, abs=1e-9)
    assert float(ngf_distance(along, across, GRID, None, 1e-3)) == pytest.approx(1)
    assert float(ngf_distance(flat, flat + 90, GRID, None, 1.0)) == 0
    # an edge of size ε on flat: 1 - ε⁴ / (2 ε² · ε²)
    assert float(ngf_distance(along, flat, GRID, None, 100.0)) == pytest.approx(0.5)


def test_ngf_counts_epsilon_once() -> None:
    """Opposite gradients of size ε: ⟨f, -f⟩_ε = -ε² + ε² = 0. With 3 ε², as printed, it would be 1 - (2/4)²."""
    image = ramp(GRID, (0.0, 7.0, 0.0))
    assert float(ngf_distance(image, -image, GRID, None, 7.0)) == pytest.approx(1)


@PROPERTY
@given(grid=grids(), noise=generators())
def test_gradient_is_numpys(grid: Grid, noise: torch.Generator) -> None:
    image = torch.randn(2, 1, *grid.shape, generator=noise, dtype=torch.float64)
    expected = np.gradient(image.numpy(), *grid.spacing, axis=(-1, -2, -3))
    for ours, theirs in zip(gradient(image, grid), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


def test_ngf_averages_over_the_mask_only() -> None:
    """Half the images parallel, half crossed; the mask chooses, its weights mix."""
    along, across = ramp(GRID, (100.0, 0.0, 0.0)), ramp(GRID, (0.0, 100.0, 0.0))
    warped = along.clone()
    warped[..., 5:] = across[..., 5:]
    mask = torch.zeros(1, 1, *GRID.shape)
    mask[..., 0:3, 0:2, 0:2] = 1.0  # 12 parallel voxels
    assert float(ngf_distance(along, warped, GRID, mask > 0, 1e-3)) == pytest.approx(0, abs=1e-9)
    mask[..., 2, 3, 7] = 4.0  # one crossed
    assert float(ngf_distance(along, warped, GRID, mask, 1e-3)) == pytest.approx(4 / 16)


def test_edge_parameter_is_the_mean_gradient_times_the_noise() -> None:
    image = ramp(GRID, (2.0, 3.0, 6.0))  # ‖∇I‖ = 7
    assert edge_parameter(image, GRID, None, 0.1) == pytest.approx(0.7)
    image[..., -1, :, :] = 1e4
    mask = torch.ones(1, 1, *GRID.shape, dtype=torch.bool)
    mask[..., -2:, :, :] = False
    assert edge_parameter(image, GRID, mask, 2.0) == pytest.approx(14)
    assert edge_parameter(image, GRID, torch.zeros_like(mask), 2.0) == 0


def test_ngf_in_single_precision_on_hounsfield_units() -> None:
    noise = torch.Generator().manual_seed(1)
    fixed, warped = (3000 * torch.randn(1, 1, *GRID.shape, generator=noise, dtype=torch.float64) for _ in range(2))
    exact = ngf_distance(fixed, warped, GRID, None, 1.0)
    assert float(ngf_distance(fixed.float(), warped.float(), GRID, None, 1.0)) == pytest.approx(float(exact), rel=1e-5)


# R: curvature


@PROPERTY
@given(grid=grids(), noise=generators())
def test_curvature_of_affine_fields_is_zero(grid: Grid, noise: torch.Generator) -> None:
    matrix = torch.randn(3, 3, generator=noise, dtype=torch.float64)
    assert float(curvature(linear(grid, matrix) + 5, grid)) < 1e-20


@PROPERTY
@given(grid=grids(min_size=3), noise=generators())
def test_laplacian_of_quadratic_fields(grid: Grid, noise: torch.Generator) -> None:
    """u_j = ½ xᵀ H_j x: Δu_j = trace H_j, exactly, in the interior."""
    hessians = torch.randn(3, 3, 3, generator=noise, dtype=torch.float64)
    x = centred(grid)
    field = 0.5 * torch.einsum("nazyx,jab,nbzyx->njzyx", x, hessians, x)
    traces = torch.einsum("jaa->j", hessians)[None, :, None, None, None]
    inside = laplacian(field, grid)[INTERIOR]
    torch.testing.assert_close(inside, traces.expand_as(inside), rtol=1e-8, atol=1e-8)
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    mask[INTERIOR] = True
    torch.testing.assert_close(curvature(field, grid, mask), (traces**2).sum(), rtol=1e-7, atol=1e-10)


def test_laplacian_at_the_border_by_hand() -> None:
    """u = x² + 10 y² on unit voxels, one slice thick enough to differentiate: ends lose their own axis only."""
    grid = Grid(size=(4, 3, 2))
    x, y, _ = world(grid)[0]
    field = torch.stack([x**2 + 10 * y**2, torch.zeros_like(x), torch.zeros_like(x)])[None]
    expected = torch.tensor([[0.0, 2.0, 2.0, 0.0], [20.0, 22.0, 22.0, 20.0], [0.0, 2.0, 2.0, 0.0]]).double()
    torch.testing.assert_close(laplacian(field, grid)[0, 0], expected.expand(2, 3, 4))
    assert float(curvature(field, grid)) == pytest.approx((4 * 2**2 + 2 * 20**2 + 2 * 22**2) / 12)


@PROPERTY
@given(grid=grids(min_size=3), noise=generators())
def test_laplacian_of_a_sine(grid: Grid, noise: torch.Generator) -> None:
    """A plane wave sin(k · x) is an eigenvector of the stencil: -Σ (2 - 2 cos(k_i h_i)) / h_i²."""
    k = 0.3 * torch.randn(3, generator=noise, dtype=torch.float64)
    wave = torch.sin(torch.einsum("j,njzyx->nzyx", k, centred(grid)))[:, None]
    field = torch.cat([wave, -2 * wave, 3 * wave], dim=1)
    step = torch.from_numpy(grid.axes.T) @ k
    eigenvalue = -((2 - 2 * step.cos()) / torch.tensor(grid.spacing) ** 2).sum()
    torch.testing.assert_close(laplacian(field, grid)[INTERIOR], (eigenvalue * field)[INTERIOR], rtol=1e-6, atol=1e-8)


def test_curvature_does_not_depend_on_the_resolution() -> None:
    """One period of a sine, amplitude A, over L: R = ½ A² (2π/L)⁴ on every grid fine enough, steep ends or not."""
    values = []
    for n in (24, 48):
        grid = Grid(size=(n, 4, 4), spacing=(96.0 / n, 1.0, 1.0))
        x = world(grid)[:, :1]
        field = torch.cat([10 * torch.sin(2 * torch.pi * x / 96), 0 * x, 0 * x], dim=1)
        values.append(float(curvature(field, grid)))
    assert values == pytest.approx([0.5 * 100 * (2 * math.pi / 96) ** 4] * 2, rel=0.02)


# V: volume change


def equation_6(v: float, t: float) -> float:
    return (v - 1) ** 2 / v if v >= t else (1 - 1 / t**2) * v + 2 * (1 - t) / t


@PROPERTY
@given(v=st.floats(-1e3, 1e3), t=st.floats(0.01, 0.99))
def test_psi_is_equation_6(v: float, t: float) -> None:
    assert float(psi(torch.tensor(v, dtype=torch.float64), t)) == pytest.approx(equation_6(v, t), rel=1e-9, abs=1e-9)


@PROPERTY
@given(v=st.floats(0.05, 20.0))
def test_psi_is_symmetric(v: float) -> None:
    once, twice = psi(torch.tensor([v, 1 / v], dtype=torch.float64), 0.049)
    assert float(once) == pytest.approx(float(twice), rel=1e-9, abs=1e-12)
    assert float(once) >= 0


@PROPERTY
@given(t=st.floats(0.01, 0.99))
def test_psi_meets_at_t_in_value_and_slope(t: float) -> None:
    v = torch.tensor([t - 1e-9, t, t + 1e-9], dtype=torch.float64, requires_grad=True)
    values = psi(v, t)
    slopes = torch.autograd.grad(values.sum(), v)[0]
    expected = torch.full((3,), 1 - 1 / t**2, dtype=torch.float64)
    torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, torch.full_like(values, (t - 1) ** 2 / t), rtol=1e-4, atol=1e-4)


def test_psi_has_its_minimum_at_one_and_no_nan() -> None:
    v = torch.tensor([1.0, 0.0, -0.0, 1e-38, -1e30, 1e30, 0.05], requires_grad=True)
    values = psi(v, 0.05)
    values.sum().backward()
    assert values[0] == 0 and v.grad is not None and v.grad[0] == 0
    assert torch.isfinite(values).all() and torch.isfinite(v.grad).all()
    assert float(values[1].detach()) == pytest.approx(38)


def test_lower_t_punishes_folding_more() -> None:
    folded = torch.tensor([-0.5])
    assert psi(folded, 0.2) < psi(folded, 0.1) < psi(folded, 0.05)


@PROPERTY
@given(grid=grids(), noise=generators())
def test_volume_change_of_affine_fields(grid: Grid, noise: torch.Generator) -> None:
    matrix = 0.4 * torch.randn(3, 3, generator=noise, dtype=torch.float64)
    determinant = float(torch.linalg.det(torch.eye(3) + matrix))
    value = float(volume_change(linear(grid, matrix), grid, 0.1))
    assert value == pytest.approx(equation_6(determinant, 0.1), rel=1e-6, abs=1e-9)


def test_volume_change_by_an_affine_after_the_field() -> None:
    """Doubling every length after u = 0: the determinant is 8."""
    growth = Affine(matrix=((2.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 2.0)))
    field = with_affine(torch.zeros(1, 3, *GRID.shape, dtype=torch.float64), GRID, growth)
    assert float(volume_change(field, GRID, 0.1)) == pytest.approx(49 / 8)


def test_volume_change_of_a_quadratic_and_a_mirrored_field() -> None:
    """u_x = ½ c x² along the first axis: det = 1 + c x inside; y_x = -x: det = -1 everywhere."""
    grid = Grid(size=(6, 3, 3), spacing=(0.5, 2.0, 1.0))
    x = world(grid)[:, :1]
    zero = torch.zeros_like(x)
    mask = torch.zeros(1, 1, *grid.shape, dtype=torch.bool)
    mask[..., 1:-1] = True
    expected = np.mean([(0.4 * v) ** 2 / (1 + 0.4 * v) for v in (0.5, 1.0, 1.5, 2.0)])
    field = torch.cat([0.2 * x**2, zero, zero], dim=1)
    assert float(volume_change(field, grid, 0.1, mask)) == pytest.approx(expected)
    mirrored = torch.cat([-2 * x, zero, zero], dim=1)
    assert float(volume_change(mirrored, grid, 0.1)) == pytest.approx(99 + 18)


# B: masks


def boxes(shift: int) -> Tensor:
    """Label 4 and label 7, side by side along x: 4 × 5 × 3 voxels each."""
    labels = torch.zeros(1, 1, 10, 12, 14, dtype=torch.int64)
    labels[..., 2:6, 3:8, 3 + shift : 6 + shift] = 4
    labels[..., 2:6, 3:8, 6 + shift : 9 + shift] = 7
    return labels


def test_one_hot() -> None:
    encoded = one_hot(boxes(0), (7, 4))
    assert encoded.dtype == torch.float32 and encoded.shape == (1, 2, 10, 12, 14)
    assert torch.equal(encoded[0, 0], (boxes(0)[0, 0] == 7).float())
    assert torch.equal(encoded[0, 1], (boxes(0)[0, 0] == 4).float())
    assert float(one_hot(boxes(0), (4,)).sum()) == 60


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_mask_distance_of_shifted_boxes(shift: int) -> None:
    """Per voxel of shift: two faces of 4 × 5 against background (½ each), one of label against label (1)."""
    fixed, moved = one_hot(boxes(0), (4, 7)), one_hot(boxes(shift), (4, 7))
    assert float(mask_distance(fixed, moved)) == pytest.approx(shift * 20 * (0.5 + 0.5 + 1) / (10 * 12 * 14))
    mask = torch.zeros(1, 1, 10, 12, 14)
    mask[..., 2:6, 3:8, 6] = 1.0  # where label 7 was and label 4 comes
    assert float(mask_distance(fixed, moved, mask)) == pytest.approx(float(shift > 0))


def test_mask_distance_after_half_a_voxel_of_linear_warp() -> None:
    grid = Grid(size=(14, 12, 10), spacing=(2.0, 1.0, 3.0), direction=ROTATION)
    along_x = torch.from_numpy(grid.axes[:, 0]).float()[None, :, None, None, None]
    encoded = one_hot(boxes(0), (4, 7))
    warped = warp(encoded, grid, (0.5 * along_x).expand(1, 3, *grid.shape), grid, fill=0.0)
    # each of the outer faces: one voxel off by ½ in one channel; the inner one: off by ½ in both
    assert float(mask_distance(encoded, warped)) == pytest.approx(20 * 0.5 * (0.25 + 0.25 + 0.5) / (10 * 12 * 14))


# K: keypoints


@PROPERTY
@given(grid=grids(), noise=generators())
def test_keypoint_distance_of_linear_fields(grid: Grid, noise: torch.Generator) -> None:
    """A linear field is exact between the voxels: moving points off by a known vector are off by its square."""
    matrix = 0.3 * torch.randn(3, 3, generator=noise, dtype=torch.float64)
    index = torch.rand(6, 3, generator=noise, dtype=torch.float64) * (torch.tensor(grid.size) - 1)
    fixed = torch.from_numpy(grid.to_world(index.numpy()))
    origin = torch.tensor(grid.origin, dtype=torch.float64)
    arrived = fixed + (fixed - origin) @ matrix.T
    off = torch.randn(6, 3, generator=noise, dtype=torch.float64)
    field = linear(grid, matrix)
    assert float(keypoint_distance(fixed, arrived, field, grid)) < 1e-6
    distance = keypoint_distance(fixed, arrived + off, field, grid)
    torch.testing.assert_close(distance, (off**2).sum(1).mean(), rtol=1e-3, atol=1e-3)


def test_keypoint_weights() -> None:
    field = torch.zeros(1, 3, *GRID.shape)
    fixed = torch.from_numpy(GRID.to_world(np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])))
    moving = fixed + torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])  # 25 and 1 mm²
    assert float(keypoint_distance(fixed, moving, field, GRID)) == pytest.approx(13, rel=1e-5)
    weighted = keypoint_distance(fixed, moving, field, GRID, torch.tensor([1.0, 3.0]))
    assert float(weighted) == pytest.approx(28 / 4, rel=1e-5)


# What must fail


def test_settings_out_of_range_are_refused() -> None:
    image = ramp(GRID, (1.0, 0.0, 0.0))
    with pytest.raises(InputError, match="NGF edge parameter"):
        ngf_distance(image, image, GRID, None, 0.0)
    for t in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="threshold t"):
            psi(torch.ones(3), t)


def test_volumes_that_do_not_fit_are_refused() -> None:
    other = Grid(size=(9, 8, 6))
    with pytest.raises(ValueError, match="expected a volume of shape"):
        ngf_distance(ramp(GRID, (1.0, 0.0, 0.0)), ramp(GRID, (1.0, 0.0, 0.0)), other, None, 1.0)
    for term in (curvature, lambda u, g: volume_change(u, g, 0.1)):
        with pytest.raises(ValueError, match="expected a volume of shape"):
            term(torch.zeros(1, 3, *GRID.shape), other)


def test_a_single_slice_is_refused() -> None:
    grid = Grid(size=(5, 5, 1))
    with pytest.raises(ValueError, match="two voxels"):
        curvature(torch.zeros(1, 3, *grid.shape), grid)
    with pytest.raises(ValueError, match="two voxels"):
        gradient(torch.zeros(1, 1, *grid.shape), grid)

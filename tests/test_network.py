"""The U-Net and the cascade: shapes, cost, resolution levels, and composition against calculus by hand."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from algorithm.cascade.network import Cascade, CascadeSettings, UNet, normalise
from algorithm.geometry import (
    Grid,
    downsample,
    downsample_by,
    index_displacement,
    linear_index_map,
    warp,
    world_displacement,
)
from tests.support.grids import ROTATION
from tests.support.strategies import as_matrix, examples, generators, grids, rotations

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(10)
TINY = CascadeSettings(features=(4, 8), factors=(2, 1), network_size=(16, 12, 20))


def linear(grid: Grid, matrix: np.ndarray, offset: np.ndarray) -> Tensor:
    """The field (1, 3, z, y, x) or, of one row, ramp (1, 1, z, y, x) ``matrix · x + offset`` of world positions."""
    axes, origin = torch.from_numpy(grid.axes), torch.tensor(grid.origin, dtype=torch.float64)
    world = linear_index_map(axes, origin, grid.shape)
    values = world @ torch.from_numpy(matrix).T + torch.from_numpy(offset)
    return values.permute(0, 4, 1, 2, 3).float()


def images(grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two smooth random images of lung-like HU."""
    noise = torch.randn(1, 2, *grid.shape, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.avg_pool3d(noise, 3, stride=1, padding=1) * 800 - 600
    return smooth[:, :1], smooth[:, 1:]


def lively(settings_: CascadeSettings = TINY, voxels: float = 1.0, seed: int = 0) -> Cascade:
    """An untrained cascade that nevertheless predicts motion of about so many voxels."""
    torch.manual_seed(seed)
    cascade = Cascade(settings_).eval().requires_grad_(False)
    for level in cascade.levels:
        level.last.weight.mul_(100 * voxels)  # undoes the small start
    return cascade


# --- the U-Net -------------------------------------------------------------------------------------------------------


def parameters_by_hand(features: tuple[int, ...]) -> int:
    def block(a: int, b: int) -> int:
        return 27 * a * b + 27 * b * b + 2 * 2 * b  # two convolutions without bias, two affine norms

    encoder = sum(block(a, b) for a, b in zip((2, *features), features, strict=False))
    pairs = list(itertools.pairwise(features))
    decoder = sum(8 * wide * narrow + narrow + block(2 * narrow, narrow) for narrow, wide in pairs)
    return encoder + decoder + 3 * features[0] + 3


@pytest.mark.parametrize("features", [(4, 8), (3, 6, 12), (5,), (16, 32, 64, 128)])
def test_number_of_parameters(features: tuple[int, ...]) -> None:
    assert sum(p.numel() for p in UNet(features).parameters()) == parameters_by_hand(features)


def test_the_default_cascade_has_three_equal_levels() -> None:
    cascade = Cascade()
    assert [sum(p.numel() for p in level.parameters()) for level in cascade.levels] == [
        parameters_by_hand((16, 32, 64, 128))
    ] * 3
    assert cascade.settings.factors == (4, 2, 1)
    assert cascade.settings.network_size == (192, 160, 192)
    assert sum(p.numel() for p in cascade.parameters()) == 4_205_193


@pytest.mark.parametrize("shape", [(16, 8, 8), (8, 24, 40), (24, 16, 8)])
def test_output_has_the_size_of_the_input(shape: tuple[int, int, int]) -> None:
    network = UNet((2, 4, 8, 16))
    assert network(torch.randn(2, 2, *shape)).shape == (2, 3, *shape)


def test_sizes_that_cannot_be_halved_fail() -> None:
    with pytest.raises(RuntimeError):
        UNet((2, 4, 8))(torch.randn(1, 2, 8, 8, 10))


def test_three_levels_take_728_gflop() -> None:
    settings_ = CascadeSettings()
    with FlopCounterMode(display=False) as counter:
        UNet(settings_.features)(torch.zeros(1, 2, 16, 16, 16))
    per_voxel = counter.get_total_flops() / 16**3
    voxels = sum(math.prod(settings_.network_size) / factor**3 for factor in settings_.factors)
    assert per_voxel * voxels == pytest.approx(728e9, rel=0.05)


def test_an_untrained_cascade_predicts_hardly_any_motion() -> None:
    torch.manual_seed(0)
    grid = Grid(TINY.network_size, spacing=(2.0, 2.0, 2.0))
    displacement, _ = Cascade(TINY)(images(grid)[0], grid, images(grid)[1], grid)
    assert 0 < displacement.abs().max() < 0.1 * 2
    moved, _ = lively()(images(grid)[0], grid, images(grid)[1], grid)
    assert moved.abs().max() > 1


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    network = UNet((3, 6, 12))
    network(torch.randn(1, 2, 8, 8, 12)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_differs_little() -> None:
    grid = Grid((32, 24, 16), spacing=(1.5, 1.5, 1.5))
    cascade = lively(CascadeSettings((8, 16, 32), (2, 1), (32, 24, 16)))
    exact, _ = cascade(images(grid)[0], grid, images(grid)[1], grid)
    cascade.precision = torch.bfloat16
    rough, _ = cascade(images(grid)[0], grid, images(grid)[1], grid)
    assert rough.dtype == torch.float32
    difference = (rough - exact).norm() / exact.norm()
    assert 0 < difference < 0.03


@given(st.lists(st.integers(-3024, 3000), min_size=1, max_size=8))
@PROPERTY
def test_normalise_maps_the_lung_window(values: list[int]) -> None:
    hu = torch.tensor(values).float().reshape(1, 1, 1, 1, -1)
    expected = [(min(max(v, -1000), 200) + 1000) / 1000 for v in values]
    assert normalise(hu).flatten().tolist() == pytest.approx(expected, abs=1e-6)


# --- resolution levels -----------------------------------------------------------------------------------------------


@given(grids(max_size=5), generators())
@PROPERTY
def test_downsample_is_the_binomial_filter(grid: Grid, generator: torch.Generator) -> None:
    nz, ny, nx = (2 * n for n in grid.shape)
    volume = torch.randn(2, 2, nz, ny, nx, generator=generator, dtype=torch.float64)
    expected = volume.numpy()
    for axis in (2, 3, 4):
        n = expected.shape[axis] // 2
        padded = np.pad(expected, [(int(a == axis), int(a == axis)) for a in range(5)], mode="edge")
        taps = [np.take(padded, 2 * np.arange(n) + k, axis) for k in range(4)]
        expected = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
    np.testing.assert_allclose(downsample(volume).numpy(), expected, atol=1e-12)


@given(grids(min_size=3, max_size=5), generators(), st.sampled_from([2, 4]))
@PROPERTY
def test_downsampling_belongs_to_the_coarsened_grid(grid: Grid, generator: torch.Generator, factor: int) -> None:
    x, y, z = (factor * n for n in grid.size)
    fine = replace(grid, size=(x, y, z))
    # 1 to 2 along every index axis, so that half a voxel makes a difference
    along_axes = 1 + torch.rand(1, 3, generator=generator, dtype=torch.float64).numpy()
    slope = along_axes @ np.array(grid.direction).T
    ramp, coarse = (linear(g, slope, -slope @ grid.origin) for g in (fine, fine.coarsened(factor)))
    inner = (..., *[slice(1, -1)] * 3)
    torch.testing.assert_close(downsample_by(ramp, factor)[inner], coarse[inner], atol=1e-3, rtol=0)
    shifted = replace(fine.coarsened(factor), origin=fine.origin)  # without the half voxel
    assert not torch.allclose(
        downsample_by(ramp, factor)[inner], linear(shifted, slope, -slope @ grid.origin)[inner], atol=1e-3
    )


def test_downsample_by_one_is_the_volume_itself() -> None:
    volume = torch.randn(1, 1, 4, 4, 4)
    assert torch.equal(downsample_by(volume, 1), volume)


@pytest.mark.parametrize("factor", [0, -2, 3, 6])
def test_only_powers_of_two_downsample(factor: int) -> None:
    with pytest.raises(ValueError, match=f"by {factor}: expected a power of two"):
        downsample_by(torch.zeros(1, 1, 12, 12, 12), factor)


# --- composition -----------------------------------------------------------------------------------------------------


class Stub(nn.Module):
    """In place of a U-Net: always the same displacement (voxels). Keeps the images that it was shown."""

    def __init__(self, displacement_mm: Tensor, grid: Grid) -> None:
        super().__init__()
        self.voxels = index_displacement(displacement_mm, grid)
        self.seen: Tensor | None = None

    def forward(self, pair: Tensor) -> Tensor:
        self.seen = pair
        return self.voxels


def stubbed(grid: Grid, functions: list[Callable[[Grid], Tensor]]) -> tuple[Cascade, list[Stub]]:
    """A cascade of levels 4, 2 and 1 that predicts these fields (mm)."""
    cascade = Cascade(replace(TINY, factors=(4, 2, 1)))
    level_grids = [grid.coarsened(4), grid.coarsened(2), grid]
    stubs = [Stub(function(g), g) for function, g in zip(functions, level_grids, strict=True)]
    cascade.levels = nn.ModuleList(stubs)
    return cascade, stubs


@given(rotations(), generators())
@PROPERTY
def test_constant_motions_add_up(turn: np.ndarray, generator: torch.Generator) -> None:
    grid = Grid((8, 12, 16), (1.0, 1.5, 2.0), (30.0, -70.0, 500.0), as_matrix(turn))
    shifts = torch.randn(3, 3, generator=generator)

    def constant(shift: Tensor) -> Callable[[Grid], Tensor]:
        return lambda g: shift.reshape(1, 3, 1, 1, 1).expand(1, 3, *g.shape)

    cascade, _ = stubbed(grid, [constant(shift) for shift in shifts])
    image = torch.zeros(1, 1, *grid.shape)
    for levels in (1, 2, 3):
        field, field_grid = cascade(image, grid, image, grid, levels)
        assert field_grid == grid.coarsened((4, 2, 1)[levels - 1])
        expected = shifts[:levels].sum(dim=0).reshape(1, 3, 1, 1, 1).expand_as(field)
        torch.testing.assert_close(field, expected, atol=1e-4, rtol=0)


def test_linear_motions_are_composed_and_not_added() -> None:
    grid = Grid((32, 32, 32), (1.0, 1.2, 1.5), (10.0, -20.0, 30.0), ROTATION)
    centre = grid.to_world(np.array([15.5, 15.5, 15.5]))
    random = np.random.default_rng(0)
    matrices, shifts = 0.06 * random.normal(size=(3, 3, 3)), random.normal(size=(3, 3))

    def level(a: np.ndarray, shift: np.ndarray) -> Callable[[Grid], Tensor]:
        return lambda g: linear(g, a, shift - a @ centre)

    cascade, stubs = stubbed(grid, [level(a, b) for a, b in zip(matrices, shifts, strict=True)])
    slope = np.array([[3.0, -4.0, 5.0]])
    moving_grid = grid.padded(6)
    fixed, moving = (linear(g, slope, -slope @ centre - 500) for g in (grid, moving_grid))
    found, found_grid = cascade(fixed, grid, moving, moving_grid)
    assert found_grid == grid

    # x ↦ x + v(x) of the finest level first, then the middle, then the coarsest
    whole, offset = np.eye(3), np.zeros(3)
    after_level = []
    for a, b in zip(matrices, shifts, strict=True):
        offset = whole @ b + offset
        whole = whole @ (np.eye(3) + a)
        after_level.append((whole.copy(), offset.copy()))
    inner = (..., *[slice(9, -9)] * 3)
    expected = linear(grid, whole - np.eye(3), offset - (whole - np.eye(3)) @ centre)
    torch.testing.assert_close(found[inner], expected[inner], atol=1e-3, rtol=0)
    added = linear(grid, matrices.sum(axis=0), shifts.sum(axis=0) - matrices.sum(axis=0) @ centre)
    assert (added - expected)[inner].abs().max() > 0.05

    # each level saw the fixed image and moving(x + u(x)), u the composition of the levels before, at its resolution
    before = [(np.eye(3), np.zeros(3)), *after_level[:2]]
    for stub, factor, (matrix, shift) in zip(stubs, (4, 2, 1), before, strict=True):
        level_grid = grid.coarsened(factor) if factor > 1 else grid
        warped = linear(level_grid, slope @ matrix, slope @ (shift - matrix @ centre) - 500)
        core = (..., *[slice(8 // factor, -8 // factor)] * 3)
        assert stub.seen is not None
        torch.testing.assert_close(stub.seen[:, :1], normalise(downsample_by(fixed, factor)))
        torch.testing.assert_close(stub.seen[:, 1:][core], normalise(warped)[core], atol=1e-4, rtol=0)
        assert np.ptp(normalise(warped)[core].numpy()) > 0.05


def test_the_cascade_is_the_formula_of_its_docstring() -> None:
    cascade = lively(voxels=0.5)
    grid = Grid(TINY.network_size, (1.0, 1.5, 2.0), direction=ROTATION)
    fixed, moving = images(grid)
    coarse = grid.coarsened()
    first = world_displacement(cascade.levels[0](normalise(downsample(torch.cat([fixed, moving], 1)))), coarse)
    warped = warp(moving, grid, warp(first, coarse, None, grid), grid)
    second = world_displacement(cascade.levels[1](normalise(torch.cat([fixed, warped], 1))), grid)
    expected = second + warp(first, coarse, second, grid)
    found, _ = cascade(fixed, grid, moving, grid)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found.norm(dim=1).mean() > 0.5


def test_a_level_is_applied_again_until_it_adds_little() -> None:
    """The first one, of a voxel of 2 mm at a time, as often as it may; the second, of 0.05 voxels, once of twice."""
    grid = Grid(TINY.network_size)
    cascade = Cascade(replace(TINY, applications=(3, 2)))
    calls = []

    def constant(level: int, x_vox: float) -> Callable[[Tensor], Tensor]:
        def predict(pair: Tensor) -> Tensor:
            calls.append(level)
            return torch.tensor([x_vox, 0.0, 0.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, *pair.shape[2:])

        return predict

    for level, x_vox in enumerate((1.0, 0.05)):
        cascade.levels[level].forward = constant(level, x_vox)
    image = torch.zeros(1, 1, *grid.shape)
    field, field_grid = cascade(image, grid, image, grid)
    assert calls == [0, 0, 0, 1] and field_grid == grid
    expected = torch.tensor([3 * 2 + 0.05, 0.0, 0.0]).reshape(1, 3, 1, 1, 1).expand_as(field)
    torch.testing.assert_close(field, expected, atol=1e-4, rtol=0)


def test_images_that_already_are_coarse() -> None:
    cascade = lively(CascadeSettings((4, 8), (4, 2, 1), (32, 24, 16)))
    grid = Grid((32, 24, 16), (1.0, 1.5, 2.0), direction=ROTATION)
    fixed, moving = images(grid)
    expected, expected_grid = cascade(fixed, grid, moving, grid, 1)
    coarse = grid.coarsened()
    found, found_grid = cascade(downsample(fixed), coarse, downsample(moving), coarse, 1, 2)
    assert found_grid.size == expected_grid.size
    np.testing.assert_allclose(found_grid.origin, expected_grid.origin, atol=1e-9)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_no_level_at_all_is_refused() -> None:
    image = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="at least one level"):
        lively()(image, Grid((8, 8, 8)), image, Grid((8, 8, 8)), 0)


@given(rotations(), st.floats(0.5, 3.0), st.sampled_from([-1.0, 1.0]))
@PROPERTY
def test_the_field_turns_and_grows_with_the_grid(turn: np.ndarray, scale: float, flip: float) -> None:
    cascade = lively()
    grid = Grid(TINY.network_size, (1.0, 1.5, 2.0), (5.0, 6.0, 7.0))
    x, y, z = (scale * s for s in grid.spacing)
    matrix = turn @ np.diag([flip, 1.0, 1.0])
    other = Grid(grid.size, (x, y, z), (-300.0, 900.0, 0.0), as_matrix(matrix))
    fixed, moving = images(grid)
    plain, _ = cascade(fixed, grid, moving, grid)
    turned, _ = cascade(fixed, other, moving, other)
    expected = scale * torch.einsum("ij,njzyx->nizyx", torch.from_numpy(matrix).float(), plain)
    torch.testing.assert_close(turned, expected, atol=0.02, rtol=0)
    assert plain.abs().max() > 1


# --- settings --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.tuples(*[st.integers(8, 256)] * 3))
@PROPERTY
def test_settings_survive_json(features: list[int], size: tuple[int, int, int]) -> None:
    settings_ = CascadeSettings(tuple(features), (8, 2), size)
    assert CascadeSettings.from_dict(json.loads(json.dumps(settings_.to_dict()))) == settings_
    assert math.prod(settings_.factors) == 16

"""The loop of `warp` against its definition by `sample`, which is checked against ITK in `test_geometry`."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithm.geometry import Affine, Grid, inside, moving_index, resample, restored, sample, warp, warp_image, warping
from tests.support.strategies import examples, generators, grids, numbers, rotations

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not warping.has_loop(), reason="numba is not installed"),
]
FILL = -7.0
STILL = Affine()


@pytest.fixture(autouse=True)
def always_by_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(warping, "LEAST_VOXELS", 0)
    yield


@st.composite
def affines(draw: st.DrawFn, grid: Grid) -> Affine:
    """A turn and a stretch about the middle of the grid, and a shift."""
    middle = grid.to_world((np.array(grid.size) - 1) / 2)
    matrix = draw(rotations(0.5)) * [draw(numbers(0.7, 1.4)) for _ in range(3)]
    return Affine.from_arrays(matrix, middle - matrix @ middle + [draw(numbers(-2, 2)) for _ in range(3)])


@examples(60)
@given(
    data=st.data(),
    moving_grid=grids(min_size=1),
    generator=generators(),
    channels=st.integers(1, 3),
    fill=st.sampled_from([None, FILL]),
    threads=st.integers(1, 3),
)
def test_it_is_the_definition(
    data: st.DataObject, moving_grid: Grid, generator: torch.Generator, channels: int, fill: float | None, threads: int
) -> None:
    size = st.integers(1, 8)
    grid = moving_grid.resized((data.draw(size), data.draw(size), data.draw(size)))
    u_grid = grid.resized((data.draw(size), data.draw(size), data.draw(size)))
    if data.draw(st.booleans()):  # u does not reach as far as the grid, and is stored the other way round
        u_grid = restored(u_grid.cropped((0, 1, 0), u_grid.size), (0, 1, 2), (True, False, True))
    affine = data.draw(affines(grid))
    moving = torch.randn(1, channels, *moving_grid.shape, generator=generator)
    u = 4 * torch.randn(1, 3, *u_grid.shape, generator=generator)
    torch.set_num_threads(threads)
    found = warp(moving, moving_grid, u, grid, displacement_grid=u_grid, affine=affine, fill=fill)
    index = moving_index(grid, moving_grid, resample(u.double(), u_grid, grid), affine, u.double())
    expected = sample(moving.double(), index, fill)
    rim = ((index - index.floor() - 0.5).abs() < 1e-4).any(dim=-1)[:, None].expand_as(expected)
    keep = ~rim if fill is not None else torch.ones_like(rim)
    torch.testing.assert_close(found.double()[keep], expected[keep], atol=1e-4, rtol=0)


@examples(20)
@given(grid=grids(), generator=generators())
def test_without_a_displacement_the_image_itself(grid: Grid, generator: torch.Generator) -> None:
    image = torch.randn(1, 2, *grid.shape, generator=generator)
    torch.testing.assert_close(warp(image, grid, None, grid), image, atol=1e-5, rtol=0)


def test_no_number_gets_it_out_of_the_volume() -> None:
    grid = Grid((4, 3, 5))
    image = torch.arange(60.0).reshape(1, 1, 5, 3, 4)
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        found = warp(image, grid, torch.full((1, 3, *grid.shape), value), grid)
        assert ((found >= 0) & (found <= 59)).all()
    assert (warp(image, grid, torch.full((1, 3, *grid.shape), torch.nan), grid, fill=FILL) == FILL).all()


def test_a_derivative_does_not_come_from_the_loop() -> None:
    grid = Grid((4, 3, 5))
    image = torch.arange(60.0).reshape(1, 1, 5, 3, 4)
    u = torch.full((1, 3, *grid.shape), 0.25, requires_grad=True)
    warp(image, grid, u, grid).sum().backward()
    assert u.grad is not None and u.grad[0, 0, 2, 1, 1] == 1


@examples(30)
@given(data=st.data(), source=grids(min_size=3, max_size=14), generator=generators(), reach=numbers(0, 30))
def test_of_an_image_only_a_part_is_read_and_none_is_missed(
    data: st.DataObject, source: Grid, generator: torch.Generator, reach: float
) -> None:
    size = st.integers(1, 6)
    grid = source.resized((data.draw(size), data.draw(size), data.draw(size)))
    image = torch.randint(-1000, 400, (1, 1, *source.shape), generator=generator, dtype=torch.int16)
    u = reach * torch.randn(1, 3, *grid.shape, generator=generator)
    index = moving_index(grid, source, u.double(), STILL, u.double())
    expected = sample(image.double(), index, FILL)
    rim = ((index - index.floor() - 0.5).abs() < 1e-3).any(dim=-1)[:, None]
    found = warp_image(image, source, u, grid, fill=FILL)
    torch.testing.assert_close(found.double()[~rim], expected[~rim], atol=0.05, rtol=0)
    assert ((found == FILL) == ~inside(index, source.shape)[:, None])[~rim].all()

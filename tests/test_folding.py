"""The check of the written field and the repair of one that folds: calculus by hand, whole volumes, numpy."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.fields import determinant as determinant_module
from algorithm.fields import folding
from algorithm.fields.determinant import DeterminantStatistics, checked
from algorithm.fields.folding import UnfoldSettings, smallest_determinant, unfold
from algorithm.geometry import Grid, jacobian_determinant, resample, world_displacement
from tests.support.grids import ROTATION
from tests.support.strategies import as_matrix, examples, generators, grids, smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(12)
OBLIQUE = Grid((22, 20, 24), (1.5, 1.8, 1.6), (-120.0, 33.0, 410.0), ROTATION)


# --- what the tests share --------------------------------------------------------------------------------------------


def indices(grid: Grid) -> Iterator[Tensor]:
    """The x, y and z index of every voxel, (z, y, x) each."""
    z, y, x = torch.meshgrid(*(torch.arange(float(n)) for n in grid.shape), indexing="ij")
    yield from (x, y, z)


def in_voxels(grid: Grid, *components: Tensor | float) -> Tensor:
    """A field (mm) of displacements in voxels along the index axes."""
    return world_displacement(torch.stack([torch.as_tensor(c).expand(grid.shape) for c in components])[None], grid)


def noise(grid: Grid, amplitude_mm: float, seed: int = 0) -> Tensor:
    return amplitude_mm * torch.randn(1, 3, *grid.shape, generator=torch.Generator().manual_seed(seed))


def cut(field: Tensor, depths: list[int]) -> list[Tensor]:
    """Slabs along z of these thicknesses, over and over."""
    slabs, z = [], 0
    for depth in itertools.cycle(depths):
        slabs.append(field[:, :, z : z + depth])
        z += depth
        if z >= field.shape[2]:
            return slabs
    raise AssertionError


def statistics_of(
    field: Tensor,
    grid: Grid,
    lungs: Tensor | None = None,
    lungs_grid: Grid | None = None,
    depths: tuple[int, ...] = (3,),
) -> DeterminantStatistics:
    statistics = DeterminantStatistics()
    lungs = torch.ones(1, 1, *grid.shape) if lungs is None else lungs
    for _ in checked(cut(field, list(depths)), grid, lungs, lungs_grid or grid, statistics):
        pass
    return statistics


def determinants(field: Tensor, grid: Grid) -> Tensor:
    """The determinants (z, y, x) that the check sees, collected by a statistics that keeps them."""
    kept = []

    class Keeping(DeterminantStatistics):
        def add(self, determinant: Tensor, lungs: Tensor | None, grid: Grid) -> None:
            kept.append(determinant)

    for _ in checked(cut(field, [2, 1, 5]), grid, torch.ones(1, 1, *grid.shape), grid, Keeping()):
        pass
    return torch.stack(kept)


def schemes(field: Tensor, grid: Grid) -> Iterator[Tensor]:
    """det(I + ∇u) by all eight mixes of forward and backward differences, each where it exists; in float64."""
    voxels = np.linalg.inv(grid.axes) @ field[0].double().reshape(3, -1).numpy()
    values = voxels.reshape(3, *grid.shape)
    inner = tuple(slice(1, -1) for _ in range(3))
    for sides in itertools.product((0, 1), repeat=3):
        columns = []
        for axis, side in zip((3, 2, 1), sides, strict=True):
            difference = np.diff(values, axis=axis)
            window = [slice(None), *inner]
            window[axis] = slice(side, difference.shape[axis] - 1 + side)
            columns.append(difference[tuple(window)])
        jacobian = np.eye(3) + np.moveaxis(np.stack(columns, axis=1), (0, 1), (-2, -1))
        yield torch.from_numpy(np.linalg.det(jacobian))


def other_grids(grid: Grid) -> list[Grid]:
    """Output grids over the same place and beyond: finer, anisotropic and rotated, rotated with thick slices."""
    centre = grid.to_world((np.array(grid.size) - 1) / 2)
    result = []
    for turn, spacing in (
        (np.eye(3), (0.7, 0.8, 0.75)),
        (ROTATION, (0.9, 1.1, 2.3)),
        (np.transpose(ROTATION), (0.8, 0.8, 5.0)),
    ):
        direction = np.array(grid.direction) @ turn
        x, y, z = (int(1.2 * extent / s) for extent, s in zip(grid.extent_mm, spacing, strict=True))
        ox, oy, oz = centre - direction @ (np.array(spacing) * (np.array([x, y, z]) - 1) / 2)
        result.append(Grid((x, y, z), spacing, (float(ox), float(oy), float(oz)), as_matrix(direction)))
    return result


# --- check -----------------------------------------------------------------------------------------------------------


def test_determinant_of_an_affine_field() -> None:
    matrix = torch.tensor([[0.1, 0.2, -0.1], [0.0, -0.3, 0.05], [0.15, 0.1, 0.2]])
    world = torch.stack(list(indices(OBLIQUE))).reshape(3, -1).double()
    world = torch.from_numpy(OBLIQUE.axes) @ world
    field = (matrix @ world.float()).reshape(1, 3, *OBLIQUE.shape)
    expected = float(torch.linalg.det(torch.eye(3) + matrix))
    statistics = statistics_of(field, OBLIQUE)
    assert statistics.fine
    assert statistics.minimum == pytest.approx(expected, abs=1e-4)
    assert statistics.maximum_in_lungs == pytest.approx(expected, abs=1e-4)
    assert statistics.std_log_jacobian == pytest.approx(0, abs=1e-4)


def test_compression_along_one_axis_in_closed_form() -> None:
    """v = a sin(kx): the central difference is 1 + a cos(kx) sin(k)."""
    x, _, _ = indices(OBLIQUE)
    field = in_voxels(OBLIQUE, 3 * torch.sin(0.5 * x), 0.0, 0.0)
    expected = (1 + 3 * torch.cos(0.5 * x) * math.sin(0.5))[:, :, 1:-1]
    torch.testing.assert_close(determinants(field, OBLIQUE)[:, :, 1:-1], expected, atol=2e-5, rtol=0)
    assert statistics_of(field, OBLIQUE).folded >= int((expected <= 0).sum()) > 1000


@PROPERTY
@given(grid=grids(), generator=generators(), depths=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_slabs_give_what_the_whole_volume_gives(grid: Grid, generator: torch.Generator, depths: list[int]) -> None:
    field = torch.randn(1, 3, *grid.shape, generator=generator)
    expected = jacobian_determinant(field.double(), grid)[0]
    torch.testing.assert_close(determinants(field, grid).double(), expected, atol=1e-3, rtol=1e-4)
    slabs = cut(field, depths)
    statistics, whole = DeterminantStatistics(), statistics_of(field, grid, depths=(grid.size[2],))
    passed = list(checked(slabs, grid, torch.ones(1, 1, *grid.shape), grid, statistics))
    assert all(a is b for a, b in zip(passed, slabs, strict=True))
    assert statistics.figures() == whole.figures()
    assert torch.equal(statistics.points_mm, whole.points_mm)


def test_bands_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    field = noise(OBLIQUE, 1.0)
    whole = determinants(field, OBLIQUE)
    for voxels in (1, 50, 200):
        monkeypatch.setattr(determinant_module, "_BAND_VOXELS", voxels)
        assert torch.equal(determinants(field, OBLIQUE), whole)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_of_one_voxel_has_no_derivative(axis: int) -> None:
    """As if the field went on unchanged along it."""
    size = [6, 5, 7]
    size[axis] = 1
    thin = Grid((size[0], size[1], size[2]), (1.0, 2.0, 0.5))
    size[axis] = 3
    thick = Grid((size[0], size[1], size[2]), (1.0, 2.0, 0.5))
    field = torch.randn(1, 3, *thin.shape, generator=torch.Generator().manual_seed(1))
    expected = jacobian_determinant(field.expand(1, 3, *thick.shape).contiguous(), thick)[0].narrow(2 - axis, 1, 1)
    torch.testing.assert_close(determinants(field, thin), expected, atol=1e-5, rtol=1e-5)


def test_statistics_are_those_of_numpy() -> None:
    field = noise(OBLIQUE, 0.6)
    lungs = torch.rand(1, 1, *OBLIQUE.shape, generator=torch.Generator().manual_seed(3))
    statistics = statistics_of(field, OBLIQUE, lungs)
    determinant = jacobian_determinant(field.double(), OBLIQUE)[0].numpy()
    inside = lungs[0, 0].numpy() > 0.5
    folded = determinant <= 0
    assert 10 < folded[inside].sum() < folded.sum()
    assert statistics.voxels == determinant.size
    assert statistics.lung_voxels == inside.sum()
    assert (statistics.folded, statistics.folded_in_lungs) == (folded.sum(), folded[inside].sum())
    values = determinant[inside]
    assert statistics.minimum == pytest.approx(determinant.min(), abs=1e-4)
    assert statistics.minimum_in_lungs == pytest.approx(values.min(), abs=1e-4)
    assert statistics.maximum_in_lungs == pytest.approx(values.max(), abs=1e-4)
    assert statistics.std_log_jacobian == pytest.approx(np.log(values[values > 0]).std(), rel=1e-3)
    z, y, x = np.nonzero(folded)
    np.testing.assert_allclose(statistics.points_mm, OBLIQUE.to_world(np.stack([x, y, z], axis=1)))
    assert not statistics.fine
    assert statistics.figures()["folding_fraction"] == folded[inside].sum() / inside.sum()


def test_positions_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(determinant_module, "MOST_POINTS", 7)
    statistics = statistics_of(noise(OBLIQUE, 2.0), OBLIQUE)
    assert len(statistics.points_mm) == 7 < statistics.folded


@PROPERTY
@given(mask_grid=grids(4, 9, oblique=False), grid=grids(4, 9, oblique=False), generator=generators())
def test_lungs_on_another_grid(mask_grid: Grid, grid: Grid, generator: torch.Generator) -> None:
    """Parallel axes, permuted and flipped: what nearest resampling of each position gives; outside there are none."""
    grid = Grid(grid.size, grid.spacing, mask_grid.origin, grid.direction)
    mask = torch.rand(1, 1, *mask_grid.shape, generator=generator)
    x, y, z = (axis.numpy() for axis in indices(grid))
    index = mask_grid.to_index(grid.to_world(np.stack([x, y, z], axis=-1)))
    near = np.rint(index).astype(int)
    valid = ((near >= 0) & (near < mask_grid.size)).all(axis=-1)
    i, j, k = np.moveaxis(np.clip(near, 0, np.array(mask_grid.size) - 1), -1, 0)
    clear = bool((np.abs(index - np.floor(index) - 0.5) > 1e-6).all())
    expected = int((valid & (mask[0, 0].numpy()[k, j, i] > 0.5)).sum())
    statistics = statistics_of(torch.zeros(1, 3, *grid.shape), grid, mask, mask_grid)
    assert statistics.lung_voxels == expected or not clear


@pytest.mark.parametrize("oblique", [False, True])
def test_lungs_are_a_ball_on_any_grid(oblique: bool) -> None:
    """A ball of 10 mm in the world, its mask turned against the field's grid or not, has its volume there."""
    mask_grid = Grid((30, 31, 32), (1.0, 1.0, 1.0), direction=ROTATION if oblique else as_matrix(np.diag([-1, 1, -1])))
    x, y, z = indices(mask_grid)
    ball = ((x - 15) ** 2 + (y - 15) ** 2 + (z - 15) ** 2 <= 100)[None, None]
    centre = mask_grid.to_world(np.array([15.0, 15.0, 15.0]))
    grid = Grid((60, 50, 40), (0.7, 0.8, 1.3), tuple(float(v) for v in centre - [20.0, 20.0, 25.0]))
    statistics = statistics_of(torch.zeros(1, 3, *grid.shape), grid, ball, mask_grid)
    assert statistics.lung_voxels * 0.7 * 0.8 * 1.3 == pytest.approx(4 / 3 * math.pi * 1000, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_displacements_that_are_no_numbers_are_counted(value: float) -> None:
    field = torch.zeros(1, 3, *OBLIQUE.shape)
    field[0, 1, 4, 5, 6] = field[0, 2, 4, 5, 6] = field[0, 0, -1, -1, -1] = value
    statistics = statistics_of(field, OBLIQUE)
    assert statistics.non_finite == 2
    assert not statistics.fine
    assert statistics.folded >= 9  # the neighbours, whose determinants are no numbers
    assert statistics.minimum == statistics.maximum_in_lungs == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        unfold(field, OBLIQUE)


def test_nothing_to_tell_without_lungs() -> None:
    figures = statistics_of(torch.zeros(1, 3, *OBLIQUE.shape), OBLIQUE, torch.zeros(1, 1, *OBLIQUE.shape)).figures()
    assert figures["jacobian_min"] is figures["std_log_jacobian"] is figures["folding_fraction"] is None
    assert figures["jacobian_min_everywhere"] == 1


@pytest.mark.parametrize("depth", [23, 25])
def test_slabs_that_do_not_fill_the_grid(depth: int) -> None:
    with pytest.raises(ValueError, match="slices"):
        statistics_of(torch.zeros(1, 3, depth, *OBLIQUE.shape[1:]), OBLIQUE)


# --- repair ----------------------------------------------------------------------------------------------------------


def folded_fields() -> dict[str, Tensor]:
    """Fields on `OBLIQUE` that fold in all the ways we can think of."""
    x, y, z = indices(OBLIQUE)
    spike = torch.zeros(1, 3, *OBLIQUE.shape)
    spike[0, :, 12, 9, 10] = 30
    sign = 1.0 - 2 * ((x + y + z) % 2)
    block = ((x - 11).abs() <= 10) & ((z - 12).abs() <= 10) & ((y - 10).abs() <= 9)
    return {
        "spike": spike,
        "checkerboard": in_voxels(OBLIQUE, 0.6 * sign, 0.0, 0.0),
        "plane folded over": in_voxels(OBLIQUE, torch.where(x > 10, -4.0, 0.0), 0.0, 0.0),
        "block folded over": in_voxels(OBLIQUE, torch.where(block, -1.5 * (x - 11), 0.0), 0.0, 0.0),
        "mirrored": in_voxels(OBLIQUE, 0.0, -2 * (y - 9.5), 0.0),
        "half turn": in_voxels(OBLIQUE, -2 * (x - 10.5), -2 * (y - 9.5), 0.0),  # folds only beyond the grid
        "collapsed": in_voxels(OBLIQUE, -(x - 10.5), -(y - 9.5), -(z - 11.5)),
        "noise": noise(OBLIQUE, 1.0),
        "wild noise": noise(OBLIQUE, 1000.0),
    }


@pytest.mark.parametrize("name", folded_fields())
def test_no_folding_is_left(name: str) -> None:
    field = folded_fields()[name]
    assert smallest_determinant(field, OBLIQUE) <= 0
    repaired, changed = unfold(field, OBLIQUE)
    assert changed == int((repaired != field).any(dim=1).sum()) > 0
    assert float(jacobian_determinant(repaired, OBLIQUE).min()) > 0
    assert all(float(determinant.min()) > 0 for determinant in schemes(repaired, OBLIQUE))
    assert smallest_determinant(repaired, OBLIQUE) >= UnfoldSettings().least
    for grid in other_grids(OBLIQUE):
        assert float(jacobian_determinant(resample(repaired, OBLIQUE, grid), grid).min()) > 0
    again, none = unfold(repaired, OBLIQUE)
    assert again is repaired
    assert none == 0


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_folds_beyond_one_end_of_one_axis_are_found_and_repaired(axis: int, last: bool) -> None:
    """A twist about the middle of one face, by 120° and less and less away from it, which keeps all volumes.

    Beyond that face the field goes on with its border values: there, and only there, it folds.
    """
    size, radius = [6, 6, 6], 15.0
    along, across = axis, (axis + 1) % 3
    size[along], size[across] = 18, 34
    grid = Grid((size[0], size[1], size[2]), (1.5, 1.8, 1.6), (-120.0, 33.0, 410.0), ROTATION)
    index = list(indices(grid))
    p, q = index[across] - (size[across] - 1) / 2, index[along] - (size[along] - 1) * last
    angle = math.radians(120) * (1 - ((p**2 + q**2) / radius**2).clamp(max=1)) ** 2
    components: list[Tensor | float] = [0.0, 0.0, 0.0]
    components[across] = torch.cos(angle) * p - torch.sin(angle) * q - p
    components[along] = torch.sin(angle) * p + torch.cos(angle) * q - q
    field, around = in_voxels(grid, *components), grid.padded(2)
    assert float(jacobian_determinant(field, grid).min()) > 0.8
    assert float(jacobian_determinant(resample(field, grid, around), around).min()) < -0.4
    assert smallest_determinant(field, grid) < -0.4
    repaired, _ = unfold(field, grid)
    assert float(jacobian_determinant(resample(repaired, grid, around), around).min()) > 0


def test_central_differences_miss_the_checkerboard() -> None:
    """Hence the other schemes, and the finer grids on which it shows."""
    field = folded_fields()["checkerboard"]
    inner = (0, slice(1, -1), slice(1, -1), slice(1, -1))
    assert float(jacobian_determinant(field, OBLIQUE)[inner].min()) > 0.9
    assert min(float(determinant.min()) for determinant in schemes(field, OBLIQUE)) < 0
    finer = other_grids(OBLIQUE)[0]
    assert float(jacobian_determinant(resample(field, OBLIQUE, finer), finer).min()) < 0


@examples(25)
@given(grid=grids(2, 12), generator=generators(), amplitude=st.floats(-2, 3))
def test_any_field_ends_unfolded(grid: Grid, generator: torch.Generator, amplitude: float) -> None:
    field = 10**amplitude * torch.randn(1, 3, *grid.shape, generator=generator)
    before = field.clone()
    repaired, changed = unfold(field, grid)
    assert torch.equal(field, before)  # not in place
    assert (changed == 0) == torch.equal(repaired, field)
    assert float(jacobian_determinant(repaired, grid).min()) > 0
    assert smallest_determinant(repaired, grid) >= 0.049
    assert torch.equal(unfold(field, grid)[0], repaired)  # deterministic


@PROPERTY
@given(grid=grids(4, 12), generator=generators())
def test_smooth_fields_come_back_unchanged(grid: Grid, generator: torch.Generator) -> None:
    field = smooth_field(grid, 0.01 * min(grid.spacing), generator)
    repaired, changed = unfold(field, grid)
    assert repaired is field
    assert changed == 0


def test_far_from_folds_every_bit_stays() -> None:
    """Two spikes in one field: repaired each for itself, up to the radius and no farther. Also the sign of -0."""
    grid = Grid((60, 24, 22), (1.5, 1.5, 1.5))
    field = smooth_field(grid, 2.0, torch.Generator().manual_seed(0))
    field[:, :, :, :, 25:35] = -0.0
    field[:, :, :, :, 20:25] *= torch.linspace(1, 0, 6)[:5]
    field[:, :, :, :, 35:40] *= torch.linspace(0, 1, 6)[1:]
    assert unfold(field, grid)[1] == 0
    spikes = [(10, 11, 30), (12, 12, 50)]
    spiked = field.clone()
    for z, y, x in spikes:
        spiked[0, :, z, y, x] += 5
    repaired, changed = unfold(spiked, grid)
    x, y, z = indices(grid)
    distance = torch.stack([((x - c) ** 2 + (y - b) ** 2 + (z - a) ** 2).sqrt() for a, b, c in spikes]).amin(dim=0)
    touched = (repaired != spiked).any(dim=1)[0]
    assert 2 <= changed == int(touched.sum())
    assert float(distance[touched].max()) < math.sqrt(3) + 3
    far = (distance > 5).expand(3, -1, -1, -1)
    bits, expected = repaired[0][far].view(torch.int32), spiked[0][far].view(torch.int32)
    assert torch.equal(bits, expected)
    assert bool((expected == -(2**31)).any())
    assert float((repaired - field).abs().max()) < 0.5 * 5  # the spikes are gone, what was below them is back


def test_many_spikes_are_repaired_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    field = torch.zeros(1, 3, *OBLIQUE.shape)
    field[:, :, 4::16, 4::12, 4::14] = 5
    apart = unfold(field, OBLIQUE)[0]
    monkeypatch.setattr(folding, "_MOST_BOXES", 1)
    torch.testing.assert_close(unfold(field, OBLIQUE)[0], apart, atol=1e-4, rtol=0)


def test_given_points_are_smoothed_in_any_case() -> None:
    """A rough but unfolded field changes around the points, wider with each attempt; beyond the grid, at its edge."""
    field = noise(OBLIQUE, 0.1)
    assert unfold(field, OBLIQUE)[1] == 0
    point = torch.from_numpy(OBLIQUE.to_world(np.array([[10.2, 8.9, 12.0]])))
    repaired, changed = unfold(field, OBLIQUE, points_mm=point)
    touched = (repaired != field).any(dim=1)[0]
    x, y, z = indices(OBLIQUE)
    distance = ((x - 10) ** 2 + (y - 9) ** 2 + (z - 12) ** 2).sqrt()
    assert bool(touched[12, 9, 10])
    assert float(distance[touched].max()) < 3
    _, wider = unfold(field, OBLIQUE, points_mm=point, attempt=1)
    assert wider > 4 * changed
    halved, everywhere = unfold(field, OBLIQUE, points_mm=point, attempt=6)
    assert torch.equal(halved, field / 2)
    assert everywhere == OBLIQUE.size[0] * OBLIQUE.size[1] * OBLIQUE.size[2]
    outside = torch.from_numpy(OBLIQUE.to_world(np.array([[-50.0, 8.9, 12.0]])))
    touched = (unfold(field, OBLIQUE, points_mm=outside)[0] != field).any(dim=1)[0]
    assert bool(touched[12, 9, 0])
    assert not bool(touched[:, :, 3:].any())


def test_check_and_repair_together_end_without_folds() -> None:
    """A certificate of the own grid is none for another: the points that fold there are smoothed until none does."""
    loose = UnfoldSettings(least=1e-4)
    grid = OBLIQUE
    field, _ = unfold(noise(grid, 0.55, seed=5), grid, loose)
    for target in other_grids(grid):
        for attempt in range(8):
            statistics = statistics_of(resample(field, grid, target), target, depths=(5, 1))
            if statistics.fine:
                break
            field, changed = unfold(field, grid, loose, statistics.points_mm, attempt)
            assert changed > 0
        assert statistics.fine


def test_smallest_determinant_bounds_the_field_between_its_voxels() -> None:
    """Of a random field, at random points inside cells, also beyond the grid; and it is not far below the truth."""
    grid = Grid((6, 5, 7), (1.0, 1.0, 1.0))
    field = noise(grid, 0.1).double()
    bound = smallest_determinant(field, grid)
    assert bound <= min(float(determinant.min()) for determinant in schemes(field, grid))
    step = 1e-3
    generator = np.random.default_rng(0)
    lowest = math.inf
    for _ in range(200):
        origin = generator.uniform(-0.9, np.array(grid.size) - 0.1)
        tiny = Grid((2, 2, 2), (step, step, step), (float(origin[0]), float(origin[1]), float(origin[2])))
        if (np.floor(origin) == np.floor(origin + step)).all():  # all in one cell
            lowest = min(lowest, float(jacobian_determinant(resample(field, grid, tiny), tiny).min()))
    assert bound - 1e-6 <= lowest < bound + 0.5

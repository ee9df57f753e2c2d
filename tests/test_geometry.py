"""The conventions: grids, warping, composition and derivatives, against ITK, brute force and calculus by hand."""

import ast
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from algorithm.geometry import (
    Affine,
    Grid,
    Vector,
    canonical_axes,
    compose,
    displacement_at,
    doubled,
    index_displacement,
    inside,
    invert,
    jacobian_determinant,
    resample,
    resample_image,
    restored,
    sample,
    sampling,
    validity,
    warp,
    warp_image,
    with_affine,
    world_displacement,
)
from tests.support.grids import ROTATION, sitk_image
from tests.support.strategies import as_matrix, examples, generators, grids, numbers, rotations, smooth_field

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(20)
FILL = -1000.0
OBLIQUE = Grid(
    size=(9, 8, 7),
    spacing=(0.7, 1.1, 2.5),
    origin=(-120.0, 33.0, 410.0),
    direction=ROTATION,
)


# --- what the tests share --------------------------------------------------------------------------------------------


def positions(grid: Grid) -> np.ndarray:
    """World positions (z, y, x, 3) of all voxels, one after the other as the header defines them."""
    nx, ny, nz = grid.size
    index = np.array([[[(i, j, k) for i in range(nx)] for j in range(ny)] for k in range(nz)])
    return np.array(grid.origin) + np.einsum("rc,zyxc->zyxr", np.array(grid.direction), index * grid.spacing)


def field_of(function: Callable[[np.ndarray], np.ndarray], grid: Grid) -> Tensor:
    """A field (1, 3, z, y, x) of a function of world positions (..., 3), in double precision."""
    return torch.from_numpy(np.moveaxis(function(positions(grid)), -1, 0).copy())[None]


def vectors(field: Tensor) -> np.ndarray:
    """(z, y, x, 3) of a field."""
    return np.moveaxis(field[0].numpy(), 0, -1)


def interpolated(volume: Tensor, index: np.ndarray) -> np.ndarray:
    """Brute force: one channel at continuous indices (..., 3), trilinear, outside the border values."""
    flat = index.reshape(-1, 3)[:, ::-1].T
    values: np.ndarray = ndimage.map_coordinates(volume.numpy(), flat, order=1, mode="nearest")
    return values.reshape(index.shape[:-1])


def random_volume(grid: Grid, generator: torch.Generator, channels: int = 1) -> Tensor:
    return 100 * torch.randn(1, channels, *grid.shape, generator=generator, dtype=torch.float64)


def moved_to(grid: Grid, centre: np.ndarray) -> Grid:
    """The grid with its middle elsewhere."""
    x, y, z = np.array(grid.origin) + centre - grid.to_world((np.array(grid.size) - 1) / 2)
    return replace(grid, origin=(float(x), float(y), float(z)))


def middle(grid: Grid) -> np.ndarray:
    return grid.to_world((np.array(grid.size) - 1) / 2)


def sitk_transform(displacement: Tensor, grid: Grid, affine: Affine) -> sitk.Transform:
    """x ↦ affine(x + u(x)); a composite applies its last transform first."""
    linear = sitk.AffineTransform(3)
    linear.SetMatrix(np.array(affine.matrix).ravel().tolist())
    linear.SetTranslation(affine.offset)
    field = sitk.DisplacementFieldTransform(sitk_image(vectors(displacement).copy(), grid))
    return sitk.CompositeTransform([linear, field])


@st.composite
def affines(draw: st.DrawFn) -> Affine:
    """Maps that turn, scale by 0.7 to 1.4 along turned axes, and shift by up to 3 mm."""
    turn, axes = draw(rotations()), draw(rotations())
    scale = [draw(numbers(0.7, 1.4)) for _ in range(3)]
    matrix = turn @ axes @ np.diag(scale) @ axes.T
    return Affine.from_arrays(matrix, np.array([draw(numbers(-3, 3)) for _ in range(3)]))


@st.composite
def overlapping_grids(draw: st.DrawFn, **options: float) -> tuple[Grid, Grid]:
    """A fixed and a moving grid, unrelated but for their middles, which are 4 mm apart at most."""
    fixed, moving = draw(grids(**options)), draw(grids(**options))
    return fixed, moved_to(moving, middle(fixed) + [draw(numbers(-4, 4)) for _ in range(3)])


@st.composite
def affine_about(draw: st.DrawFn, centre: np.ndarray) -> Affine:
    affine = draw(affines())
    matrix = np.array(affine.matrix)
    return Affine.from_arrays(matrix, np.array(affine.offset) + centre - matrix @ centre)


# --- grids and affine maps -------------------------------------------------------------------------------------------


@given(grids())
@PROPERTY
def test_world_and_index_are_itk_s(grid: Grid) -> None:
    reference = sitk_image(np.zeros(grid.shape, np.float32), grid)
    index = np.array([0.3, -1.7, 2.5])
    np.testing.assert_allclose(
        grid.to_world(index), reference.TransformContinuousIndexToPhysicalPoint(index.tolist()), atol=1e-9
    )
    corners = np.array(list(itertools.product(*((0, n - 1) for n in grid.size))))
    np.testing.assert_allclose(
        grid.to_world(corners), [reference.TransformIndexToPhysicalPoint(c.tolist()) for c in corners], atol=1e-9
    )
    np.testing.assert_allclose(grid.to_index(grid.to_world(corners + 0.25)), corners + 0.25, atol=1e-9)
    assert grid.shape == np.zeros(grid.size).T.shape
    assert np.prod(grid.extent_mm) == pytest.approx(abs(np.linalg.det(grid.axes)) * np.prod(grid.size))


@given(grids(min_size=3), st.data())
@PROPERTY
def test_cropped_and_padded_voxels_stay_in_place(grid: Grid, data: st.DataObject) -> None:
    start = np.array([data.draw(st.integers(-3, n - 1)) for n in grid.size])
    i, j, k = start.tolist()
    cropped = grid.cropped((i, j, k), (4, 5, 6))
    assert cropped.size == (4, 5, 6)
    np.testing.assert_allclose(
        cropped.to_world(np.array([3, 2, 1])), grid.to_world(np.add(start, (3, 2, 1))), atol=1e-9
    )
    padded = grid.padded(2)
    assert padded.size == tuple(n + 4 for n in grid.size)
    np.testing.assert_allclose(padded.to_world(np.array([2, 2, 2])), grid.origin, atol=1e-9)
    far = np.array(grid.size)
    np.testing.assert_allclose(padded.to_world(far + 3), grid.to_world(far + 1), atol=1e-9)


@given(grids(), st.tuples(*[st.integers(1, 12)] * 3))
@PROPERTY
def test_resized_grids_fill_the_same_box(grid: Grid, size: tuple[int, int, int]) -> None:
    other = grid.resized(size)
    assert other.size == size
    for corner in itertools.product((0, 1), repeat=3):
        edge, other_edge = (np.array(corner) * g.size - 0.5 for g in (grid, other))
        np.testing.assert_allclose(other.to_world(other_edge), grid.to_world(edge), atol=1e-9)
    back = other.resized(grid.size)
    np.testing.assert_allclose(back.origin, grid.origin, atol=1e-9)
    np.testing.assert_allclose(back.spacing, grid.spacing, rtol=1e-12)


@given(grids(max_size=4), st.sampled_from([2, 3]))
@PROPERTY
def test_a_coarse_voxel_is_the_middle_of_its_fine_ones(grid: Grid, factor: int) -> None:
    x, y, z = (factor * n for n in grid.size)
    fine = replace(grid, size=(x, y, z))
    blocks = positions(fine).reshape(grid.shape[0], factor, grid.shape[1], factor, grid.shape[2], factor, 3)
    np.testing.assert_allclose(positions(fine.coarsened(factor)), blocks.mean(axis=(1, 3, 5)), atol=1e-9)
    assert fine.coarsened(factor).origin != fine.origin  # the half voxel


def test_a_grid_that_does_not_divide_is_not_coarsened() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5, 6\).*coarsened by 2"):
        Grid((4, 5, 6)).coarsened()


@given(affines())
@PROPERTY
def test_affine_inverse(affine: Affine) -> None:
    points = np.array([[0.0, 0, 0], [100, -50, 25], [-3000, 7, 4000]])
    np.testing.assert_allclose(affine.inverse()(affine(points)), points, atol=1e-8)
    np.testing.assert_allclose(affine(affine.inverse()(points)), points, atol=1e-8)
    expected = [np.array(affine.matrix) @ point + affine.offset for point in points]
    np.testing.assert_allclose(affine(points), expected, atol=1e-9)


def test_a_singular_affine_has_no_inverse() -> None:
    with pytest.raises(ValueError, match="singular"):
        Affine(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.0))).inverse()


# --- sampling and warping --------------------------------------------------------------------------------------------


@given(st.data(), overlapping_grids(), generators(), st.booleans())
@PROPERTY
def test_warp_is_itk_s(data: st.DataObject, pair: tuple[Grid, Grid], generator: torch.Generator, nearest: bool) -> None:
    fixed, moving = pair
    affine = data.draw(affine_about(middle(fixed)))
    volume = random_volume(moving, generator)
    displacement = 3 * torch.randn(1, 3, *fixed.shape, generator=generator, dtype=torch.float64)
    ours = warp(volume, moving, displacement, fixed, affine=affine, fill=FILL, nearest=nearest)[0, 0].numpy()
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(
            sitk_image(volume[0, 0].numpy(), moving),
            sitk_image(np.zeros(fixed.shape), fixed),
            sitk_transform(displacement, fixed, affine),
            sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
            FILL,
        )
    )
    index = moving.to_index(affine(positions(fixed) + vectors(displacement)))
    undecided = (np.abs(index - np.floor(index) - 0.5) < 1e-6).any(axis=-1)  # a hair decides whether it is inside
    np.testing.assert_allclose(ours[~undecided], theirs[~undecided], atol=1e-6)
    covered = ((index > -0.5) & (index < np.array(moving.size) - 0.5)).all(axis=-1)
    np.testing.assert_array_equal((ours != FILL)[~undecided], covered[~undecided])
    decided = validity(displacement, fixed, moving, affine=affine)[0, 0].numpy()
    np.testing.assert_array_equal(decided[~undecided], covered[~undecided])


@given(overlapping_grids(), generators())
@PROPERTY
def test_without_fill_the_border_value_holds_everywhere(pair: tuple[Grid, Grid], generator: torch.Generator) -> None:
    fixed, moving = pair
    volume = random_volume(moving, generator, channels=2)
    displacement = 20 * torch.randn(1, 3, *fixed.shape, generator=generator, dtype=torch.float64)
    index = moving.to_index(positions(fixed) + vectors(displacement))
    expected = np.stack([interpolated(channel, index) for channel in volume[0]])
    np.testing.assert_allclose(warp(volume, moving, displacement, fixed)[0].numpy(), expected, atol=1e-8)


def test_the_rim_is_half_a_voxel_wide() -> None:
    volume = torch.arange(1.0, 5.0).reshape(1, 1, 1, 1, 4)
    x = torch.tensor([-0.51, -0.5, -0.49, 0.0, 0.25, 3.0, 3.49, 3.5])
    index = torch.stack([x, torch.zeros(8), torch.zeros(8)], dim=-1)[None, None, None]
    values = sample(volume, index, fill=FILL).flatten().tolist()
    assert values == [FILL, 1, 1, 1, 1.25, 4, 4, FILL]
    assert sample(volume, index).flatten().tolist() == [1, 1, 1, 1, 1.25, 4, 4, 4]
    assert sample(volume, index, nearest=True).flatten().tolist() == [1, 1, 1, 1, 1, 4, 4, 4]
    assert inside(index, (1, 1, 4)).flatten().tolist() == [False, *[True] * 6, False]


@given(grids(min_size=5), generators())
@PROPERTY
def test_a_ramp_warped_by_a_translation_is_exact_inside(grid: Grid, generator: torch.Generator) -> None:
    slope, shift = torch.randn(2, 3, generator=generator, dtype=torch.float64).numpy()
    shift *= 0.5 / np.linalg.norm(shift) * min(grid.spacing)
    ramp = torch.from_numpy(positions(grid) @ slope)[None, None]
    displacement = field_of(lambda x: np.broadcast_to(shift, x.shape), grid)
    warped = warp(ramp, grid, displacement, grid)
    difference = (warped - ramp)[0, 0, 1:-1, 1:-1, 1:-1].numpy()
    np.testing.assert_allclose(difference, slope @ shift, atol=1e-9)
    expected = interpolated(ramp[0, 0], grid.to_index(positions(grid) + shift))  # not so at the border
    np.testing.assert_allclose(warped[0, 0].numpy(), expected, atol=1e-8)


@given(grids(), generators())
@PROPERTY
def test_no_displacement_changes_nothing(grid: Grid, generator: torch.Generator) -> None:
    volume = random_volume(grid, generator, channels=2)
    zero = torch.zeros(1, 3, *grid.shape, dtype=torch.float64)
    for warped in (
        warp(volume, grid, None, grid, fill=FILL),
        warp(volume, grid, zero, grid),
        resample(volume, grid, grid),
    ):
        torch.testing.assert_close(warped, volume, atol=1e-9, rtol=0)


def test_batches_go_with_single_volumes() -> None:
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randn(2, 1, *OBLIQUE.shape, generator=generator)
    fields = torch.randn(2, 3, *OBLIQUE.shape, generator=generator)

    def alone(volume: int, field: int) -> Tensor:
        return warp(volumes[volume, None], OBLIQUE, fields[field, None], OBLIQUE, fill=FILL)

    def together(volume: Tensor, field: Tensor) -> Tensor:
        return warp(volume, OBLIQUE, field, OBLIQUE, fill=FILL)

    assert torch.equal(together(volumes, fields), torch.cat([alone(0, 0), alone(1, 1)]))
    assert torch.equal(together(volumes[:1], fields), torch.cat([alone(0, 0), alone(0, 1)]))


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    volume = torch.randn(1, 2, *OBLIQUE.shape, generator=generator)
    index = 10 * torch.rand(1, 12, 3, 5, 3, generator=generator) - 1
    one = sample(volume, index), sample(volume, index, nearest=True)
    parts: list[int] = []
    grid_sample = sampling.F.grid_sample

    def counting(source: Tensor, position: Tensor, **options: object) -> Tensor:
        parts.append(len(position))
        return grid_sample(source, position, **options)

    monkeypatch.setattr(sampling.F, "grid_sample", counting)
    torch.set_num_threads(threads)
    several = sample(volume, index), sample(volume, index, nearest=True)
    assert parts == [threads, threads]
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_gradients_through_warp() -> None:
    generator = torch.Generator().manual_seed(3)
    fixed, moving = (
        replace(OBLIQUE, size=(3, 2, 2)),
        moved_to(replace(OBLIQUE, size=(4, 5, 3)), np.array([-119.5, 33, 411])),
    )
    volume = torch.randn(1, 1, *moving.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    displacement = torch.randn(1, 3, *fixed.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, u: warp(v, moving, u, fixed), (volume, displacement))
    assert torch.autograd.gradcheck(lambda v, u: warp(v, moving, u, fixed, fill=0.0), (volume, displacement))
    slope = torch.autograd.grad(warp(volume, moving, displacement, fixed).sum(), displacement)[0]
    assert (slope != 0).float().mean() > 0.3


def test_shapes_that_do_not_fit_are_refused() -> None:
    volume, field = torch.zeros(1, 1, *OBLIQUE.shape), torch.zeros(1, 3, *OBLIQUE.shape)
    other = replace(OBLIQUE, size=OBLIQUE.shape)
    with pytest.raises(ValueError, match=r"does not fit a grid of \(9, 8, 7\)"):
        warp(volume, other, field, OBLIQUE)
    with pytest.raises(ValueError, match="does not fit"):
        warp(volume, OBLIQUE, field, other)


# --- fields ----------------------------------------------------------------------------------------------------------


@given(overlapping_grids(min_size=3), generators())
@PROPERTY
def test_compose_is_itk_s_composite_transform(pair: tuple[Grid, Grid], generator: torch.Generator) -> None:
    first_grid, then_grid = pair
    first, then = (smooth_field(grid, 2.0, generator).double() for grid in pair)
    composed = vectors(compose(first, first_grid, then, then_grid)).reshape(-1, 3)
    fields = [sitk_image(vectors(f).copy(), g) for f, g in ((then, then_grid), (first, first_grid))]
    chain = sitk.CompositeTransform([sitk.DisplacementFieldTransform(f) for f in fields])
    points = positions(first_grid).reshape(-1, 3)
    index = then_grid.to_index(points + vectors(first).reshape(-1, 3))
    covered = ((index > -0.49) & (index < np.array(then_grid.size) - 0.51)).all(axis=1)  # ITK: no motion outside
    expected = np.array([chain.TransformPoint(point.tolist()) for point in points]) - points
    np.testing.assert_allclose(composed[covered], expected[covered], atol=1e-9)
    brute = np.stack([interpolated(component, index) for component in then[0]], axis=-1)
    np.testing.assert_allclose(composed, vectors(first).reshape(-1, 3) + brute, atol=1e-9)


def test_composing_affine_maps_multiplies_them() -> None:
    a, b = 0.1 * np.random.default_rng(0).normal(size=(2, 3, 3))
    first = field_of(lambda x: (x - middle(OBLIQUE)) @ a.T, OBLIQUE)
    large = OBLIQUE.padded(6)
    then = field_of(lambda x: (x - middle(OBLIQUE)) @ b.T, large)
    product = (np.eye(3) + b) @ (np.eye(3) + a) - np.eye(3)
    expected = field_of(lambda x: (x - middle(OBLIQUE)) @ product.T, OBLIQUE)
    torch.testing.assert_close(compose(first, OBLIQUE, then, large), expected, atol=1e-9, rtol=0)


@given(st.data(), grids(), generators())
@PROPERTY
def test_with_affine_is_the_whole_transform(data: st.DataObject, grid: Grid, generator: torch.Generator) -> None:
    affine = data.draw(affine_about(middle(grid)))
    displacement = smooth_field(grid, 5.0, generator).double()
    points = positions(grid)
    expected = affine(points + vectors(displacement)) - points
    np.testing.assert_allclose(vectors(with_affine(displacement, grid, affine)), expected, atol=1e-8)


def test_with_affine_keeps_its_precision_far_from_the_origin() -> None:
    grid = replace(OBLIQUE, origin=(8000.0, -7000.0, 9000.0))
    matrix = np.array([[1.02, 0.01, 0.0], [-0.01, 0.97, 0.02], [0.0, -0.02, 1.05]])
    affine = Affine.from_arrays(matrix, np.array([-5000.0, 1.0, 2.0]))
    displacement = smooth_field(grid, 5.0, torch.Generator().manual_seed(0))
    expected = affine(positions(grid) + vectors(displacement)) - positions(grid)
    assert displacement.dtype == torch.float32
    np.testing.assert_allclose(vectors(with_affine(displacement, grid, affine)), expected, atol=2e-3)


def test_the_inverse_of_an_affine_field_inside() -> None:
    a = 0.1 * np.random.default_rng(1).normal(size=(3, 3))
    field = field_of(lambda x: (x - middle(OBLIQUE)) @ a.T, OBLIQUE)
    inverse = np.linalg.inv(np.eye(3) + a) - np.eye(3)
    expected = field_of(lambda x: (x - middle(OBLIQUE)) @ inverse.T, OBLIQUE)
    found = invert(field, OBLIQUE, OBLIQUE)
    torch.testing.assert_close(found[..., 2:-2, 2:-2, 2:-2], expected[..., 2:-2, 2:-2, 2:-2], atol=1e-8, rtol=0)
    nothing = compose(field, OBLIQUE, expected, OBLIQUE)[..., 2:-2, 2:-2, 2:-2]
    assert nothing.abs().max() < 1e-9


@given(grids(min_size=6, min_spacing=1.0), generators())
@PROPERTY
def test_a_field_after_its_inverse_is_nothing(grid: Grid, generator: torch.Generator) -> None:
    field = smooth_field(grid, 0.1 * min(grid.spacing), generator).double()
    inverse = invert(field, grid, grid)
    assert inverse.abs().max() > 0.01 * min(grid.spacing)
    assert compose(inverse, grid, field, grid).abs().max() < 1e-6


@given(grids(min_size=6, min_spacing=1.0), generators())
@PROPERTY
def test_the_inverse_through_an_affine_map_leads_back(grid: Grid, generator: torch.Generator) -> None:
    affine = Affine.from_arrays(
        np.array([[1.1, 0.05, 0.0], [-0.05, 0.9, 0.1], [0.0, -0.1, 1.2]]), np.array([9.0, -5, 2])
    )
    target = replace(grid, size=(5, 4, 3))
    field = smooth_field(grid, 0.1 * min(grid.spacing), generator).double()
    inverse = invert(field, grid, target, affine)
    points = positions(target).reshape(-1, 3)
    there = affine(points + vectors(inverse).reshape(-1, 3))
    back = affine.inverse()(there + displacement_at(torch.from_numpy(there), field, grid).numpy())
    np.testing.assert_allclose(back, points, atol=1e-6)


@PROPERTY
@given(
    start=st.tuples(*[numbers(-6, 3)] * 3),
    steps=st.tuples(*[numbers(0.2, 2.5)] * 3),
    flipped=st.tuples(*[st.booleans()] * 3),
    source=grids(),
    generator=generators(),
)
def test_resampling_along_parallel_axes_is_warping_without_a_displacement(
    start: Vector, steps: Vector, flipped: tuple[bool, bool, bool], source: Grid, generator: torch.Generator
) -> None:
    """Border values go on, also where the target leaves the source."""
    step = np.array([-s if f else s for s, f in zip(steps, flipped, strict=True)])
    first = np.where(flipped, np.array(source.size) - 1 - np.array(start), start)
    x, y, z = source.to_world(first)
    signs = np.diag(np.sign(step))
    target = Grid(
        (9, 8, 7),
        tuple(np.array(source.spacing) * np.abs(step)),
        (float(x), float(y), float(z)),
        as_matrix(np.array(source.direction) @ signs),
    )
    volume = torch.randn(2, 3, *source.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(resample(volume, source, target), warp(volume, source, None, target), atol=1e-5, rtol=0)


@given(grids(min_size=2), st.integers(1, 3), generators())
@PROPERTY
def test_doubled_is_resampling_to_the_finer_grid(grid: Grid, channels: int, generator: torch.Generator) -> None:
    fine = grid.resized((2 * grid.size[0], 2 * grid.size[1], 2 * grid.size[2]))
    volume = torch.randn(1, channels, *grid.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(doubled(volume), resample(volume, fine.coarsened(), fine))


@given(grids(), generators())
@PROPERTY
def test_displacement_at_points(grid: Grid, generator: torch.Generator) -> None:
    field = smooth_field(grid, 5.0, generator).double().requires_grad_()
    index = (torch.rand(20, 3, generator=generator, dtype=torch.float64) * torch.tensor(grid.size)).numpy() - 0.5
    points = torch.from_numpy(grid.to_world(index))
    found = displacement_at(points, field, grid)
    expected = np.stack([interpolated(component, index) for component in field[0].detach()], axis=-1)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), field)
    assert gradient.sum().item() == pytest.approx(60)  # trilinear weights sum to one


@given(grids(), generators())
@PROPERTY
def test_voxels_and_mm_are_one_displacement(grid: Grid, generator: torch.Generator) -> None:
    field = smooth_field(grid, 5.0, generator).double()
    voxels = index_displacement(field, grid)
    expected = grid.to_index(positions(grid) + vectors(field)) - grid.to_index(positions(grid))
    np.testing.assert_allclose(vectors(voxels), expected, atol=1e-9)
    torch.testing.assert_close(world_displacement(voxels, grid), field, atol=1e-9, rtol=0)


# --- the Jacobian determinant ----------------------------------------------------------------------------------------


@given(grids(), generators())
@PROPERTY
def test_determinant_of_an_affine_field(grid: Grid, generator: torch.Generator) -> None:
    a = 0.4 * torch.randn(3, 3, generator=generator, dtype=torch.float64).numpy()
    determinant = jacobian_determinant(field_of(lambda x: (x - middle(grid)) @ a.T, grid), grid)
    np.testing.assert_allclose(determinant.numpy(), np.linalg.det(np.eye(3) + a), atol=1e-8)


@given(grids(min_size=3), generators())
@PROPERTY
def test_determinant_of_a_quadratic_field_is_exact_inside(grid: Grid, generator: torch.Generator) -> None:
    q = 0.02 * torch.randn(3, 3, 3, generator=generator, dtype=torch.float64).numpy()
    q = q + q.transpose(0, 2, 1)  # u_c = xᵀ Q_c x / 2, so ∂u_c/∂x = Q_c x
    centre = middle(grid)
    field = field_of(lambda x: np.einsum("...i,cij,...j->...c", x - centre, q, x - centre) / 2, grid)
    gradient = np.einsum("cij,zyxj->zyxci", q, positions(grid) - centre)
    expected = np.linalg.det(np.eye(3) + gradient)[1:-1, 1:-1, 1:-1]
    np.testing.assert_allclose(jacobian_determinant(field, grid)[0, 1:-1, 1:-1, 1:-1].numpy(), expected, atol=1e-8)


def test_determinant_of_a_sine_field_converges_with_the_square_of_the_spacing() -> None:
    amplitude, k = np.array([3.0, 4.0, 5.0]), 2 * np.pi / 25

    def motion(x: np.ndarray) -> np.ndarray:  # u = (a sin ky, b sin kz, c sin kx)
        return amplitude * np.sin(k * x[..., [1, 2, 0]])

    errors = []
    for size in ((24, 20, 16), (48, 40, 32)):
        grid = replace(OBLIQUE, size=(12, 10, 8), spacing=(0.8, 1.0, 1.2)).resized(size)
        expected = 1 + np.prod(amplitude * k * np.cos(k * positions(grid)), axis=-1)
        found = jacobian_determinant(field_of(motion, grid), grid)[0].numpy()
        errors.append(np.abs(found - expected)[1:-1, 1:-1, 1:-1].max())
        assert np.ptp(expected) > 0.2
    assert errors[0] < 0.01
    assert 3.5 < errors[0] / errors[1] < 4.5


@given(grids(min_size=3), generators())
@PROPERTY
def test_a_mirrored_field_is_folded_everywhere(grid: Grid, generator: torch.Generator) -> None:
    normal = torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0).numpy()
    mirror = field_of(lambda x: -2 * ((x - middle(grid)) @ normal)[..., None] * normal, grid)
    np.testing.assert_allclose(jacobian_determinant(mirror, grid).numpy(), -1, atol=1e-8)


def test_folds_are_found_where_they_are() -> None:
    grid = Grid((64, 3, 3), spacing=(0.5, 2.0, 2.0), direction=as_matrix(np.diag([-1.0, 1.0, 1.0])))
    k = 2 * np.pi / 16
    field = field_of(lambda x: -2 / k * np.sin(k * x) * np.array([1, 0, 0]), grid)  # ∂u/∂x = -2 cos kx
    folded = (jacobian_determinant(field, grid) <= 0)[0, 1, 1, 1:-1].numpy()
    expected = np.cos(k * positions(grid)[1, 1, 1:-1, 0]) >= 0.5
    edge = np.abs(np.cos(k * positions(grid)[1, 1, 1:-1, 0]) - 0.5) < 0.05
    np.testing.assert_array_equal(folded[~edge], expected[~edge])
    assert 0.2 < folded.mean() < 0.5


# --- images ----------------------------------------------------------------------------------------------------------


@given(overlapping_grids(), generators())
@PROPERTY
def test_a_constant_image_stays_constant(pair: tuple[Grid, Grid], generator: torch.Generator) -> None:
    source, target = pair
    image = torch.full((1, 1, *source.shape), -700, dtype=torch.int16)
    resampled = resample_image(image, source, target, least=-1000.0, fill=FILL)[0, 0].numpy()
    index = source.to_index(positions(target))
    distance = np.minimum(index + 0.5, np.array(source.size) - 0.5 - index).min(axis=-1)
    np.testing.assert_allclose(resampled[distance > 1e-4], -700, atol=1e-3)
    np.testing.assert_array_equal(resampled[distance < -1e-4], FILL)


@given(st.data(), overlapping_grids(min_size=4), generators())
@PROPERTY
def test_resample_image_is_warp_where_nothing_gets_coarser(
    data: st.DataObject, pair: tuple[Grid, Grid], generator: torch.Generator
) -> None:
    source, target = pair
    target = moved_to(replace(target, spacing=(0.3, 0.4, 0.25)), middle(target))
    affine = data.draw(affine_about(middle(target)))
    image = random_volume(source, generator).round().short()
    ours = resample_image(image, source, target, affine=affine, least=-1e9, fill=FILL)
    expected = warp(image.float(), source, None, target, affine=affine, fill=FILL)
    index = source.to_index(affine(positions(target)))
    undecided = (np.abs(index - np.floor(index) - 0.5) < 1e-3).any(axis=-1)
    np.testing.assert_allclose(ours[0, 0].numpy()[~undecided], expected[0, 0].numpy()[~undecided], atol=0.1)


def test_fine_patterns_become_flat_on_a_coarse_grid() -> None:
    source = Grid((36, 36, 36), spacing=(0.7, 0.8, 1.0), origin=(5.0, 6.0, 7.0), direction=OBLIQUE.direction)
    i, j, k = torch.meshgrid(*[torch.arange(36)] * 3, indexing="xy")
    for pattern in ((i + j + k) % 2, i % 2, j % 2, k % 2):
        image = (200 * pattern - 100)[None, None].short()
        coarse = source.resized((12, 12, 12))  # centres on every third voxel
        assert warp(image.float(), source, None, coarse).abs().min() > 99  # aliased, without the smoothing
        smooth = resample_image(image, source, coarse, least=-1000.0, fill=FILL)
        assert smooth[..., 1:-1, 1:-1, 1:-1].abs().max() < 10  # a Gaussian of 0.8 voxels leaves 7 %


def test_only_axes_that_become_coarser_are_smoothed() -> None:
    source = Grid((16, 16, 18))
    target = source.resized((16, 16, 6))
    j = torch.arange(16)[:, None].expand(18, 16, 16)
    image = (200 * (j % 2) - 100)[None, None].float()
    resampled = resample_image(image, source, target, least=-1000.0, fill=FILL)
    torch.testing.assert_close(resampled, image[:, :, ::3], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("factor", "tolerance"), [(2, 0.15), (3, 0.05), (4, 0.05), (5, 0.05)])
def test_the_smoothing_has_the_variance_of_the_voxel_box(factor: int, tolerance: float) -> None:
    n = 9 * factor
    square = (torch.arange(n) - (n - 1) / 2).square()
    image = square[None, None, None, None, :].expand(1, 1, n, n, n)
    source = Grid((n, n, n))
    coarse = source.resized((9, 9, 9))
    centres = torch.from_numpy(source.to_index(positions(coarse))[4, 4, 3:6, 0]) - (n - 1) / 2
    interpolation = 0.25 if factor % 2 == 0 else 0.0  # trilinear between two voxels: variance 1/4
    added = resample_image(image, source, coarse, least=-1.0, fill=FILL)[0, 0, 4, 4, 3:6] - centres.square()
    np.testing.assert_allclose(added - interpolation, (factor**2 - 1) / 12, rtol=tolerance)


@given(grids(min_size=4, max_size=5, max_spacing=1.5), generators())
@PROPERTY
def test_a_ramp_is_a_ramp_at_every_resolution(grid: Grid, generator: torch.Generator) -> None:
    slope = torch.randn(3, generator=generator, dtype=torch.float64).numpy()
    x, y, z = (3 * n for n in grid.size)
    fine = replace(grid, size=(x, y, z))
    coarse = fine.coarsened(3)
    image = torch.from_numpy((positions(fine) - middle(fine)) @ slope)[None, None]
    expected = (positions(coarse) - middle(fine)) @ slope
    found = resample_image(image, fine, coarse, least=-1e6, fill=FILL)[0, 0].numpy()
    np.testing.assert_allclose(found[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-3)


@pytest.mark.parametrize("size", [(4, 4, 4), (12, 12, 12), (20, 20, 20)])
def test_padding_is_raised_before_any_smoothing(size: tuple[int, int, int]) -> None:
    source = Grid((12, 12, 12), direction=OBLIQUE.direction)
    padded = torch.full((1, 1, 12, 12, 12), -700, dtype=torch.int16)
    padded[..., :5] = -3024
    air = padded.clamp(min=-1000)
    target = source.resized(size)
    ours = resample_image(padded, source, target, least=-1000.0, fill=FILL)
    assert torch.equal(ours, resample_image(air, source, target, least=-1000.0, fill=FILL))
    assert torch.equal(ours, resample_image(padded.float(), source, target, least=-1000.0, fill=FILL))
    assert ours.min() >= -1000.001
    assert ours.max() <= -699.999


def test_a_part_is_the_part_of_the_whole() -> None:
    source = replace(OBLIQUE, size=(36, 33, 30))
    image = 100 * torch.randn(1, 1, *source.shape, generator=torch.Generator().manual_seed(5))
    coarse = source.coarsened(3)
    whole = resample_image(image, source, coarse, least=-1e6, fill=FILL)
    part = resample_image(image, source, coarse.cropped((5, 4, 3), (3, 4, 5)), least=-1e6, fill=FILL)
    torch.testing.assert_close(part, whole[:, :, 3:8, 4:8, 5:8], atol=1e-3, rtol=0)


@given(grids(min_size=3, max_size=6), rotations(), numbers(0.4, 4.0), generators())
@PROPERTY
def test_an_affine_map_moves_the_target_s_voxels(
    source: Grid, turn: np.ndarray, scale: float, generator: torch.Generator
) -> None:
    image = random_volume(source, generator).float()
    target = moved_to(Grid((5, 4, 3), direction=OBLIQUE.direction), np.array([900.0, -40.0, 7.0]))
    affine = Affine.from_arrays(scale * turn, middle(source) - scale * turn @ middle(target))
    moved = replace(target, spacing=(scale, scale, scale), direction=as_matrix(turn @ target.direction))
    expected = resample_image(image, source, moved_to(moved, middle(source)), least=-1e6, fill=FILL)
    found = resample_image(image, source, target, affine=affine, least=-1e6, fill=FILL)
    index = source.to_index(positions(moved_to(moved, middle(source))))
    undecided = (np.abs(index - np.floor(index) - 0.5) < 1e-3).any(axis=-1)
    np.testing.assert_allclose(found[0, 0].numpy()[~undecided], expected[0, 0].numpy()[~undecided], atol=0.1)


def test_only_the_needed_part_is_read() -> None:
    generator = torch.Generator().manual_seed(4)
    source = replace(OBLIQUE, size=(40, 40, 40))
    image = torch.randn(1, 1, 40, 40, 40, generator=generator)
    target = source.cropped((10, 12, 14), (6, 6, 6)).coarsened(3)
    expected = resample_image(image, source, target, least=-1e6, fill=FILL)
    elsewhere = torch.full_like(image, torch.nan)
    elsewhere[..., 3:32, 2:30, 1:28] = image[..., 3:32, 2:30, 1:28]
    assert torch.equal(resample_image(elsewhere, source, target, least=-1e6, fill=FILL), expected)


@given(overlapping_grids(), generators(), st.sampled_from([torch.int16, torch.float32]), numbers(0, 30))
@PROPERTY
def test_warp_image_is_warp_with_fill(
    pair: tuple[Grid, Grid], generator: torch.Generator, kind: torch.dtype, amplitude_mm: float
) -> None:
    fixed, moving = pair
    image = random_volume(moving, generator).to(kind)
    displacement = smooth_field(fixed, amplitude_mm, generator)
    ours = warp_image(image, moving, displacement, fixed, fill=FILL)
    assert ours.dtype == torch.float32
    expected = warp(image.float(), moving, displacement, fixed, fill=FILL)
    torch.testing.assert_close(ours, expected, atol=0.05, rtol=0)


def test_warp_image_far_outside_is_all_fill() -> None:
    image = torch.zeros(1, 1, *OBLIQUE.shape, dtype=torch.int16)
    away = torch.full((1, 3, *OBLIQUE.shape), 500.0)
    assert (warp_image(image, OBLIQUE, away, OBLIQUE, fill=FILL) == FILL).all()


# --- where the conventions are kept ----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
FOLDERS = ("algorithm", "imagefiles", "phantom", "resultpages", "training")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Names of the packages that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.add(path.relative_to(ROOT).parts[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_grids_are_normalised_in_one_file_only() -> None:
    for word, files in (("grid_sample", ["sampling.py"]), ("align_corners", ["resampling.py", "sampling.py"])):
        assert [path.name for path in sources(*FOLDERS) if word in path.read_text()] == files
    assert [path.name for path in sources(*FOLDERS) if "affine_grid" in path.read_text()] == []


def test_simpleitk_is_used_at_the_door_only() -> None:
    """Reading, and what is done with a finished result; registering does without."""
    found = {path.name for path in sources("algorithm") if "SimpleITK" in imported(path)}
    assert found == {"api.py", "apply.py", "dicom.py", "given.py", "images.py"}


def test_imports_go_one_way() -> None:
    forbidden = {
        "imagefiles": {"algorithm", "phantom", "training", "evaluation", "tests", "torch"},
        "resultpages": {"algorithm", "phantom", "training", "evaluation", "tests", "torch"},
        "algorithm": {"phantom", "training", "evaluation", "tests"},
        "evaluation": {"algorithm", "phantom", "training", "tests", "torch"},
        "phantom": {"training", "evaluation", "tests"},
        "training": {"tests"},
    }
    for folder, names in forbidden.items():
        files = sources(folder)
        assert any(folder in imported(path) for path in files)
        assert {path.name: imported(path) & names for path in files if imported(path) & names} == {}


def test_canonical_axes_do_not_depend_on_the_storage_order_at_45_degrees() -> None:
    half = 0.5**0.5
    for rows in (
        ((half, -half, 0.0), (half, half, 0.0), (0.0, 0.0, 1.0)),
        ((1.0, 0.0, 0.0), (0.0, half, half), (0.0, -half, half)),
    ):
        grid = Grid((3, 4, 5), (1.0, 1.5, 2.0), (7.0, -8.0, 9.0), rows)
        found = set()
        for axes in itertools.permutations(range(3)):
            for flips in itertools.product((False, True), repeat=3):
                other = restored(grid, axes, flips)
                canonical = restored(other, *canonical_axes(other))
                found.add((canonical.size, *(round(v, 6) + 0.0 for row in canonical.direction for v in row)))
        assert len(found) == 1


def test_a_box_within_another() -> None:
    grid = Grid((10, 10, 10), (2.0, 2.0, 2.0), (1.0, 1.0, 1.0))  # edges from 0 to 20
    other = Grid((8, 30, 5), (1.0, 1.0, 1.0), (-1.5, -4.5, 10.5))  # from -2 to 6, -5 to 25, 10 to 15
    part = grid.within(other, (2, 2, 2))
    np.testing.assert_allclose(part.to_world(np.full(3, -0.5)), (0, 0, 10), atol=1e-12)
    np.testing.assert_allclose(part.to_world(np.full(3, 1.5)), (6, 20, 15), atol=1e-12)
    backwards = restored(other, (0, 1, 2), (True, False, True))
    np.testing.assert_allclose(grid.within(backwards, (2, 2, 2)).to_world(np.full(3, 1.5)), (6, 20, 15), atol=1e-12)


def test_a_box_within_one_that_is_turned_or_elsewhere_stays() -> None:
    grid = Grid((10, 10, 10), (2.0, 2.0, 2.0))
    turned = replace(grid, direction=as_matrix(Rotation.from_euler("z", 20, degrees=True).as_matrix()))
    for other in (turned, replace(grid, origin=(500.0, 0.0, 0.0))):
        assert grid.within(other, grid.size) == grid

"""From scans to the written field: any grids, any storage, odd chests; SimpleITK has the second opinion."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from algorithm.fields.transform import Transform
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Grid, displacement_at, restored, slabs
from phantom.__main__ import write_pair
from phantom.pair import PhantomSettings, chest_grid, make_pair
from tests.support.golden_check import landmark_errors_mm, read_transform
from tests.support.running import (
    call_main,
    field_array,
    field_image,
    pair_options,
    prealignment_errors_mm,
    results,
    warped_image,
)
from tests.support.strategies import as_matrix, examples, generators, grids, numbers, rotations, smooth_field

few = examples(15)
MIRRORED = ((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0))


def rotation(axis: tuple[float, float, float], degrees: float) -> np.ndarray:
    """(3, 3), by SimpleITK."""
    return np.array(sitk.VersorTransform(axis, np.deg2rad(degrees)).GetMatrix()).reshape(3, 3)


TURNED = as_matrix(rotation((1, 2, 3), 14))
POSE = Affine.from_arrays(rotation((2, -1, 1), 8), np.array([30.0, -45.0, 60.0]))


# --- the whole transform ---------------------------------------------------------------------------------------------


@st.composite
def affines(draw: st.DrawFn) -> Affine:
    """Rotations with unequal scales from 0.7 to 1.4 and shifts up to half a metre."""
    scale = [draw(numbers(0.7, 1.4)) for _ in range(3)]
    return Affine.from_arrays(draw(rotations()) * scale, np.array([draw(numbers(-500, 500)) for _ in range(3)]))


def voxel_centres(grid: Grid) -> np.ndarray:
    """World positions (z, y, x, 3) in mm."""
    nx, ny, nz = grid.size
    k, j, i = np.meshgrid(np.arange(nz), np.arange(ny), np.arange(nx), indexing="ij")
    return grid.to_world(np.stack([i, j, k], axis=-1))


@few
@given(grids(), grids(), affines(), generators())
def test_field_is_the_affine_map_of_the_moved_points_also_outside(
    network_grid: Grid, grid: Grid, affine: Affine, generator: torch.Generator
) -> None:
    """Against scipy in float64. Outside the network grid u stays as on its border, so the affine part goes on."""
    u = smooth_field(network_grid, 20.0, generator)
    points = voxel_centres(grid)
    index = np.moveaxis(network_grid.to_index(points), -1, 0)[::-1]
    moved = points + np.stack([map_coordinates(c.double().numpy(), index, order=1, mode="nearest") for c in u[0]], -1)
    expected = affine(moved) - points
    found = Transform(u, network_grid, affine).field(grid)[0].permute(1, 2, 3, 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.02)


def test_affine_part_is_exact_far_outside_the_network_grid() -> None:
    """Origins of metres do not cost precision: the displacement itself is small."""
    grid = Grid((3, 3, 3), (400.0, 400.0, 400.0), (4000.0, -5000.0, 3000.0))
    affine = Affine.from_arrays(np.diag([1.02, 0.97, 1.01]), np.array([-80.0, -140.0, -30.0]))
    transform = Transform(torch.zeros(1, 3, 4, 4, 4), Grid((4, 4, 4), (5.0, 5.0, 5.0), grid.origin), affine)
    expected = affine(voxel_centres(grid)) - voxel_centres(grid)
    np.testing.assert_allclose(transform.field(grid)[0].permute(1, 2, 3, 0).numpy(), expected, atol=1e-3)


@few
@given(grids(), grids(), affines(), generators(), st.integers(1, 1000))
def test_thickness_of_slabs_does_not_matter(
    network_grid: Grid, grid: Grid, affine: Affine, generator: torch.Generator, most_voxels: int
) -> None:
    transform = Transform(smooth_field(network_grid, 20.0, generator), network_grid, affine)
    whole = transform.field(grid)
    pieces = list(slabs(grid, most_voxels))
    assert all(piece.shape[0] == 1 or np.prod(piece.size) <= most_voxels for piece in pieces)
    torch.testing.assert_close(torch.cat([transform.field(piece) for piece in pieces], dim=2), whole, atol=2e-3, rtol=0)


def test_slabs_are_the_whole_field() -> None:
    """More than one slab of the size in use."""
    grid = Grid((1500, 1500, 4), (0.2, 0.2, 2.0), direction=TURNED)
    network_grid = Grid((6, 5, 4), (50.0, 60.0, 4.0), direction=MIRRORED)
    transform = Transform(smooth_field(network_grid, 5.0, torch.Generator().manual_seed(0)), network_grid, POSE)
    parts: Iterator[torch.Tensor] = transform.field_slabs(grid)
    depths = []
    for part, slab in zip(parts, slabs(grid), strict=True):
        torch.testing.assert_close(part, transform.field(slab))
        depths.append(part.shape[2])
    assert depths == [1, 1, 1, 1]
    point = grid.to_world(np.array([700, 20, 3]))
    u = displacement_at(torch.from_numpy(point[None]), transform.displacement.double(), network_grid)[0].numpy()
    np.testing.assert_allclose(part[0, :, 0, 20, 700], POSE(point + u) - point, atol=1e-3)


# --- written and read back on all kinds of grids ---------------------------------------------------------------------

PLAIN = chest_grid((36, 30, 34))
THICK_SLICES = chest_grid((52, 44, 20))
GRIDS = {
    "mirrored": PhantomSettings(fixed_grid=chest_grid((36, 30, 34), MIRRORED), moving_grid=PLAIN),
    "turned": PhantomSettings(fixed_grid=chest_grid((36, 30, 34), TURNED), moving_grid=THICK_SLICES),
    "thick slices": PhantomSettings(fixed_grid=THICK_SLICES, moving_grid=chest_grid((30, 34, 40), MIRRORED)),
    "permuted": PhantomSettings(
        fixed_grid=restored(PLAIN, (2, 0, 1), (True, False, True)),
        moving_grid=restored(THICK_SLICES, (1, 2, 0), (False, True, False)),
    ),
    "another posture": PhantomSettings(
        fixed_grid=restored(chest_grid((36, 30, 34), TURNED), (0, 2, 1), (False, True, True)),
        moving_grid=chest_grid((40, 34, 30), as_matrix(np.array(POSE.matrix) @ TURNED), POSE.offset),
        moving_pose=POSE,
    ),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_written_field_in_simpleitk_gives_our_warped_image(tmp_path: Path, small_weights: Path, kind: str) -> None:
    write_pair(tmp_path, make_pair(GRIDS[kind]))
    masks = [f"--{name}-mask={tmp_path / name}_lobes.mha" for name in ("fixed", "moving")]
    assert call_main(*pair_options(tmp_path, tmp_path / "out", small_weights), *masks) == 0

    fixed, moving, lobes = (sitk.ReadImage(str(tmp_path / f"{n}.mha")) for n in ("fixed", "moving", "fixed_lobes"))
    assert field_image(tmp_path / "out").IsSameImageGeometryAs(fixed)
    lung = sitk.GetArrayFromImage(lobes) > 0
    ours = sitk.GetArrayFromImage(warped_image(tmp_path / "out")).astype(float)

    def difference_hu(transform: sitk.Transform) -> np.ndarray:
        image = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1000.0, sitk.sitkFloat32)
        difference: np.ndarray = np.abs(sitk.GetArrayFromImage(image) - ours)[lung]
        return difference

    transform = read_transform(tmp_path / "out" / "images" / "displacement-field", fixed)
    difference = difference_hu(transform)
    assert np.median(difference) <= 1
    assert np.percentile(difference, 99) <= 1
    backwards = sitk.GetImageFromArray(-field_array(tmp_path / "out").astype(float), isVector=True)
    backwards.CopyInformation(fixed)
    assert np.median(difference_hu(sitk.DisplacementFieldTransform(backwards))) > 20
    before, after = prealignment_errors_mm(tmp_path / "out", tmp_path)
    assert after < before


def restored_by_simpleitk(image: sitk.Image) -> sitk.Image:
    return sitk.Flip(sitk.PermuteAxes(image, [2, 0, 1]), [False, True, True])


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> Path:
    """A turned pair and, in out/, its registration; the lung masks are ours."""
    folder = tmp_path_factory.mktemp("turned")
    write_pair(folder, make_pair(GRIDS["turned"]))
    assert call_main(*pair_options(folder, folder / "out", small_weights)) == 0
    return folder


def test_storage_order_does_not_change_the_field(tmp_path: Path, turned: Path, small_weights: Path) -> None:
    """SimpleITK re-stores both scans, no voxel changes its place in the world."""
    for name in ("fixed", "moving"):
        image = restored_by_simpleitk(sitk.ReadImage(str(turned / f"{name}.mha")))
        sitk.WriteImage(image, str(tmp_path / f"{name}.mha"))
    assert call_main(*pair_options(tmp_path, tmp_path / "out", small_weights)) == 0

    fixed = sitk.ReadImage(str(tmp_path / "fixed.mha"))
    assert fixed.GetDirection() != sitk.ReadImage(str(turned / "fixed.mha")).GetDirection()
    stored = read_transform(tmp_path / "out" / "images" / "displacement-field", fixed)
    field = field_image(turned / "out")
    for index in np.random.default_rng(0).integers(field.GetSize(), size=(300, 3)).tolist():
        point = field.TransformIndexToPhysicalPoint(index)
        expected = np.add(point, field[index])
        assert np.linalg.norm(stored.TransformPoint(point) - expected) < 1e-4


# --- odd chests ------------------------------------------------------------------------------------------------------


ODD: dict[str, PhantomSettings] = {
    "left lung only": PhantomSettings(fixed_grid=PLAIN, lungs="left"),
    "right lung only, exhale is fixed": PhantomSettings(fixed_grid=PLAIN, lungs="right", fixed_phase="exhale"),
    "padding of -3024": PhantomSettings(fixed_grid=PLAIN, outside_hu=-3024.0, fixed_phase="exhale"),
    "opacity": PhantomSettings(fixed_grid=PLAIN, opacity_mm=60.0),
    "bases cut off": PhantomSettings(fixed_grid=PLAIN.cropped((0, 0, 12), (36, 30, 22)), moving_grid=PLAIN),
    "apices and a side cut off": PhantomSettings(
        fixed_grid=PLAIN.cropped((7, 0, 0), (29, 30, 26)), moving_grid=PLAIN.cropped((7, 0, 0), (29, 30, 28))
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_chests_are_registered(tmp_path: Path, small_weights: Path, kind: str) -> None:
    write_pair(tmp_path, make_pair(ODD[kind]))
    assert call_main(*pair_options(tmp_path, tmp_path / "out", small_weights), "--refine=full") == 0
    before, prealigned = prealignment_errors_mm(tmp_path / "out", tmp_path)
    assert prealigned < (before if "cut off" in kind else 4)
    fixed = sitk.ReadImage(str(tmp_path / "fixed.mha"))
    transform = read_transform(tmp_path / "out" / "images" / "displacement-field", fixed)
    assert landmark_errors_mm(transform, tmp_path).mean() < prealigned
    assert np.isfinite(field_array(tmp_path / "out")).all()
    assert results(tmp_path / "out")["jacobian"]["folded_voxels"] == 0


def test_float_scans_give_a_float_image_and_nearly_the_same_field(
    tmp_path: Path, small_weights: Path, example: Path
) -> None:
    pair = make_pair(ODD["left lung only"])
    outputs = []
    for name, convert in (("float", lambda hu: hu), ("int", lambda hu: hu.round().short())):
        folder = tmp_path / name
        folder.mkdir()
        write_image(folder / "fixed.mha", convert(pair.fixed), pair.fixed_grid)
        write_image(folder / "moving.mha", convert(pair.moving), pair.moving_grid)
        outputs.append(folder / "out")
        assert call_main(*pair_options(folder, folder / "out", small_weights)) == 0
    assert [warped_image(output).GetPixelID() for output in outputs] == [sitk.sitkFloat32, sitk.sitkInt16]
    as_float, as_int = map(field_array, outputs)
    difference_mm = np.abs(as_float - as_int)
    # voxels have 8 mm; what refinement and untrained networks make of half a HU: measured 0.22 and 1.0 mm, the most of
    # it around the lungs
    assert difference_mm.mean() < 0.4
    assert difference_mm.max() < 2
    assert results(outputs[0])["jacobian"]["folded_voxels"] == 0

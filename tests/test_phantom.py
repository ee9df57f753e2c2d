"""The phantom: its truth is exact, its images follow from it, and each setting does what it says."""

import json
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.errors import InputError
from algorithm.files.folders import find_inputs
from algorithm.geometry import Affine, compose, displacement_at, jacobian_determinant, warp
from phantom import PhantomPair, PhantomSettings, chest_grid, make_pair, shapes
from phantom.__main__ import main
from phantom.forms import FORMS, write_input
from phantom.motion import Breathing
from phantom.trees import Branches, Tubes, grow_tree
from tests.support.strategies import examples

MEDIUM = PhantomSettings(fixed_grid=chest_grid((100, 79, 93)), noise_hu=0.0)
SMALL = PhantomSettings(fixed_grid=chest_grid((40, 32, 38)), noise_hu=0.0, detail_mm=1.0)


@pytest.fixture(scope="module")
def pair() -> PhantomPair:
    return make_pair(MEDIUM)


@pytest.fixture(scope="module")
def swapped() -> PhantomPair:
    return make_pair(replace(MEDIUM, fixed_phase="exhale"))


@pytest.fixture(scope="module")
def small() -> PhantomPair:
    return make_pair(SMALL)


def eroded(mask: Tensor, times: int = 1) -> Tensor:
    """The mask without its outermost voxels."""
    outside = 1 - mask.float()
    for _ in range(times):
        outside = F.max_pool3d(outside, 3, stride=1, padding=1)
    return outside == 0


def dice(a: Tensor, b: Tensor) -> float:
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def landmark_errors_mm(pair: PhantomPair, field: Tensor) -> np.ndarray:
    fixed = torch.from_numpy(pair.fixed_landmarks_mm)
    error = fixed + displacement_at(fixed, field, pair.fixed_grid) - torch.from_numpy(pair.moving_landmarks_mm)
    return error.norm(dim=1).numpy()


def warped_moving(pair: PhantomPair) -> Tensor:
    return warp(pair.moving, pair.moving_grid, pair.displacement_mm, pair.fixed_grid)


def lobe_overlaps(pair: PhantomPair) -> list[float]:
    """Dice of each lobe with the warped lobe of the moving image, trilinear and cut at one half."""
    overlaps = []
    for label in pair.fixed_lobes.unique()[1:]:
        moving = (pair.moving_lobes == label).float()
        warped = warp(moving, pair.moving_grid, pair.displacement_mm, pair.fixed_grid, fill=0.0)
        overlaps.append(dice(warped > 0.5, pair.fixed_lobes == label))
    return overlaps


def test_landmarks_follow_the_field(pair: PhantomPair) -> None:
    assert len(pair.fixed_landmarks_mm) == 300
    assert landmark_errors_mm(pair, pair.displacement_mm).max() < 0.2


def test_a_field_with_the_wrong_sign_or_swapped_axes_misses_the_landmarks(pair: PhantomPair) -> None:
    initial = landmark_errors_mm(pair, torch.zeros_like(pair.displacement_mm)).mean()
    assert landmark_errors_mm(pair, -pair.displacement_mm).mean() > 1.9 * initial
    assert landmark_errors_mm(pair, pair.displacement_mm.flip(1)).mean() > initial


def test_motion_has_the_size_of_breathing(pair: PhantomPair) -> None:
    assert 8 < landmark_errors_mm(pair, torch.zeros_like(pair.displacement_mm)).mean() < 10
    motion = torch.where(pair.fixed_lobes > 0, pair.displacement_mm.norm(dim=1, keepdim=True), 0)
    assert 20 < motion.max() < 25
    place = pair.fixed_grid.to_world(np.argwhere(motion[0, 0].numpy() == motion.max().item())[0][::-1])
    assert place[2] < -60  # at the base
    assert place[1] > 20  # and at the back


def test_exact_field_explains_the_images_up_to_density(pair: PhantomPair) -> None:
    lung = eroded(pair.fixed_lobes > 0, 2)
    volume_ratio = jacobian_determinant(pair.displacement_mm, pair.fixed_grid)[None]
    predicted = (warped_moving(pair) + 1000) * volume_ratio - 1000
    before, after = ((image - pair.fixed)[lung].abs() for image in (pair.moving, predicted))
    assert after.mean() < 0.4 * before.mean()
    assert after.median() < 25
    unmoved, explained = (
        torch.corrcoef(torch.stack([image[lung], pair.fixed[lung]]))[0, 1] for image in (pair.moving, predicted)
    )
    assert unmoved < 0.4
    assert explained > 0.9


def test_lobes_follow_the_field(pair: PhantomPair) -> None:
    overlaps = lobe_overlaps(pair)
    assert len(overlaps) == 5
    assert min(overlaps) > 0.97
    unmoved = [dice(pair.moving_lobes == label, pair.fixed_lobes == label) for label in range(1, 6)]
    assert max(unmoved) < 0.95
    inner = torch.stack([eroded(pair.fixed_lobes == label) for label in range(1, 6)]).any(0)
    labels = pair.moving_lobes.float()
    warped = warp(labels, pair.moving_grid, pair.displacement_mm, pair.fixed_grid, nearest=True)
    assert (warped[inner] == pair.fixed_lobes[inner]).float().mean() > 0.999


def test_lungs_do_not_fold(pair: PhantomPair, swapped: PhantomPair) -> None:
    for one in (pair, swapped):
        determinant = jacobian_determinant(one.displacement_mm, one.fixed_grid)[None]
        assert determinant[eroded(one.fixed_lobes > 0)].min() > 0.4


def test_lungs_keep_their_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parenchyma at inhale and exhale, carried to exhale by the other direction's field.

    Without vessels and airways: they keep their HU, so their mass shrinks with the volume.
    """
    monkeypatch.setattr(Tubes, "occupancy", lambda self, points, *_, **__: torch.zeros(len(points)))
    bare = replace(MEDIUM, fixed_grid=chest_grid((64, 50, 60)))
    pair, back = make_pair(bare), make_pair(replace(bare, fixed_phase="exhale"))
    inhale = eroded(pair.fixed_lobes > 0).float()
    exhale = warp(inhale, pair.fixed_grid, back.displacement_mm, back.fixed_grid)
    assert exhale.sum() < 0.88 * inhale.sum()  # same grids: less volume
    mass, moved_mass = (inhale * (pair.fixed + 1000)).sum(), (exhale * (pair.moving + 1000)).sum()
    assert (moved_mass / mass).item() == pytest.approx(1, abs=0.02)


def test_lung_slides_along_the_ribs(pair: PhantomPair) -> None:
    """A row through the right side wall, low in the chest: upward motion is smooth inside and jumps at the pleura."""
    _, y, z = np.round(pair.fixed_grid.to_index(np.array([0.0, 0.0, -60.0]))).astype(int)
    lung = pair.fixed_lobes[0, 0, z, y] > 0
    upward = pair.displacement_mm[0, 2, z, y]
    wall = int(lung.nonzero()[0])
    assert (upward[wall] - upward[wall - 1]).abs() > 10
    inside = upward[wall : wall + 6]
    assert inside.diff().abs().max() < 1.5
    inward = pair.displacement_mm[0, 0, z, y]
    assert (inward[wall] - inward[wall - 1]).abs() < 1  # no gap opens


def test_directions_are_each_other_s_inverse(pair: PhantomPair, swapped: PhantomPair) -> None:
    torch.testing.assert_close(swapped.fixed, pair.moving)
    torch.testing.assert_close(swapped.moving, pair.fixed)
    np.testing.assert_array_equal(swapped.fixed_landmarks_mm, pair.moving_landmarks_mm)
    both = compose(pair.displacement_mm, pair.fixed_grid, swapped.displacement_mm, swapped.fixed_grid)
    assert both.norm(dim=1, keepdim=True)[eroded(pair.fixed_lobes > 0, 2)].max() < 0.25  # trilinear


@examples(10)
@given(seed=st.integers(0, 2**32), diaphragm=st.floats(0, 35), detail=st.floats(0, 3))
def test_breathing_is_inverted_exactly(seed: int, diaphragm: float, detail: float) -> None:
    breathing = Breathing(diaphragm, 6.0, 3.0, 3.0, detail, seed)
    points = torch.from_numpy(np.random.default_rng(seed).uniform(-120, 120, size=(500, 3)))
    back = breathing.core_to_inhale(points + breathing.core(points))
    assert (back - points).norm(dim=1).max() < 0.01
    back = breathing.cage_to_inhale(points + breathing.cage(points))
    assert (back - points).norm(dim=1).max() < 0.01


def test_no_amplitude_is_no_motion() -> None:
    still = make_pair(
        replace(SMALL, diaphragm_mm=0.0, chest_ap_mm=0.0, chest_lateral_mm=0.0, ribs_mm=0.0, detail_mm=0.0)
    )
    assert still.displacement_mm.abs().max() == 0
    torch.testing.assert_close(still.moving, still.fixed)


@examples(5)
@given(st.integers(0, 2**32))
def test_depths_are_distances_near_the_surface(seed: int) -> None:
    """|∇depth| ≈ 1 where depth ≈ 0, by automatic differentiation."""
    box = np.random.default_rng(seed).uniform([-140, -110, -120], [140, 110, 70], size=(20000, 3))
    for depth in (shapes.trunk_depth, shapes.cavity_depth, shapes.heart_depth, shapes.oblique_height):
        points = torch.from_numpy(box).requires_grad_()
        value = depth(points)
        (gradient,) = torch.autograd.grad(value.sum(), points)
        slope = gradient.norm(dim=1)[value.abs() < 2]
        assert len(slope) > 20
        assert 0.8 < slope.median() < 1.25


def test_same_seed_same_pair(small: PhantomPair) -> None:
    again, other = make_pair(SMALL), make_pair(replace(SMALL, seed=1))
    for name in ("fixed", "moving", "displacement_mm", "fixed_lobes", "moving_lobes"):
        assert torch.equal(getattr(again, name), getattr(small, name))
    np.testing.assert_array_equal(again.fixed_landmarks_mm, small.fixed_landmarks_mm)
    assert not torch.equal(other.fixed, small.fixed)
    assert not torch.equal(other.displacement_mm, small.displacement_mm)


def test_looks_like_a_chest(pair: PhantomPair) -> None:
    voxel_litres = np.prod(pair.fixed_grid.spacing) / 1e6
    litres = pair.fixed_lobes.flatten().bincount()[1:] * voxel_litres
    assert ((litres > 0.2) & (litres < 1.5)).all()
    smaller = pair.moving_lobes.flatten().bincount()[1:] * voxel_litres / litres
    assert ((smaller > 0.75) & (smaller < 0.95)).all()
    x = torch.from_numpy(pair.fixed_grid.to_world(np.argwhere(pair.fixed_lobes[0, 0].numpy() > 0)[:, ::-1])[:, 0])
    assert torch.equal(x > 0, pair.fixed_lobes[pair.fixed_lobes > 0] <= 2)
    lung = pair.fixed[pair.fixed_lobes > 0]
    assert -900 < lung.median() < -820
    assert 0.03 < (lung > -500).float().mean() < 0.15  # vessels
    assert pair.fixed.max() > 400  # bone
    assert pair.fixed[..., 0, :].max() < -990  # air in front
    assert pair.moving[pair.moving_lobes > 0].median() > lung.median() + 10  # exhale is denser


def test_noise_is_white_and_independent(small: PhantomPair) -> None:
    noisy = make_pair(replace(SMALL, noise_hu=25.0))
    fixed, moving = (noisy.fixed - small.fixed).flatten(), (noisy.moving - small.moving).flatten()
    for noise in (fixed, moving):
        assert noise.std().item() == pytest.approx(25, rel=0.02)
        assert noise.mean().abs() < 0.5
    assert torch.corrcoef(torch.stack([fixed, moving]))[0, 1].abs() < 0.02


def test_flipped_grid_shows_the_same_chest(small: PhantomPair) -> None:
    flips = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))
    flipped = make_pair(replace(SMALL, fixed_grid=chest_grid(SMALL.fixed_grid.size, flips)))
    torch.testing.assert_close(flipped.fixed.flip(-1, -2), small.fixed, atol=0.5, rtol=0)
    torch.testing.assert_close(flipped.displacement_mm.flip(-1, -2), small.displacement_mm, atol=1e-3, rtol=0)


def test_moving_image_on_another_grid_metres_away() -> None:
    c, s = float(np.cos(0.15)), float(np.sin(0.15))
    pose = Affine(((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)), (1500.0, -40.0, -2300.0))
    flips = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0))
    there = chest_grid((72, 60, 75), flips, centre_mm=(1500.0, -40.0, -2300.0))
    pair = make_pair(replace(SMALL, fixed_grid=chest_grid((70, 56, 66)), moving_grid=there, moving_pose=pose))
    assert pair.moving_grid == there
    assert pair.moving.shape[2:] == (75, 60, 72)
    assert landmark_errors_mm(pair, pair.displacement_mm).max() < 0.25
    assert min(lobe_overlaps(pair)) > 0.94  # 4 mm voxels
    lung = eroded(pair.fixed_lobes > 0, 2) & (pair.fixed < -800)
    assert (warped_moving(pair) - pair.fixed)[lung].abs().mean() < 60


def test_moving_grid_follows_the_pose_when_none_is_given(small: PhantomPair) -> None:
    shifted = make_pair(replace(SMALL, moving_pose=Affine(offset=(0.0, 0.0, 1000.0))))
    assert shifted.moving_grid.origin[2] == small.moving_grid.origin[2] + 1000
    torch.testing.assert_close(shifted.moving, small.moving, atol=0.5, rtol=0)
    torch.testing.assert_close(shifted.displacement_mm[:, 2], small.displacement_mm[:, 2] + 1000, atol=1e-3, rtol=0)


@pytest.mark.parametrize("outside_hu", [-1000.0, -2048.0, -3024.0])
def test_padding_fills_the_corners(outside_hu: float) -> None:
    noisy = replace(SMALL, noise_hu=25.0)
    padded, plain = make_pair(replace(noisy, outside_hu=outside_hu)), make_pair(noisy)
    for image, full in ((padded.fixed, plain.fixed), (padded.moving, plain.moving)):
        same = image == full
        assert (image[~same] == outside_hu).all()
        assert (image[..., 0, 0] == outside_hu).all()
        assert 0.02 < (~same).float().mean() < 0.25
        assert same[padded.fixed_lobes > 0].all()


@pytest.mark.parametrize(("side", "labels"), [("left", [0, 1, 2]), ("right", [0, 3, 4, 5])])
def test_one_lung(small: PhantomPair, side: str, labels: list[int]) -> None:
    single = make_pair(replace(SMALL, lungs=side))  # type: ignore[arg-type]
    assert single.fixed_lobes.unique().tolist() == labels
    kept = torch.isin(small.fixed_lobes, torch.tensor(labels[1:], dtype=torch.uint8))
    assert torch.equal(single.fixed_lobes > 0, kept)
    missing = eroded((small.fixed_lobes > 0) & ~kept, 2)
    assert single.fixed[missing].min() > -200
    sign = 1 if side == "left" else -1
    assert (sign * single.fixed_landmarks_mm[:, 0] > 0).all()


def test_opacity_hides_the_right_base_only(small: PhantomPair) -> None:
    opaque = make_pair(replace(SMALL, opacity_mm=50.0))
    for image, before, lobes in (
        (opaque.fixed, small.fixed, opaque.fixed_lobes),
        (opaque.moving, small.moving, opaque.moving_lobes),
    ):
        hidden = (image - before) > 400
        assert 0.03 < hidden[lobes == 5].float().mean() < 0.7
        assert image[hidden].max() < 200
        assert not hidden[(lobes == 1) | (lobes == 2) | (lobes == 3)].any()
    assert torch.equal(opaque.fixed_lobes, small.fixed_lobes)


def test_cropped_grid_cuts_the_lungs(small: PhantomPair) -> None:
    crop = SMALL.fixed_grid.cropped((0, 0, 12), (40, 32, 16))
    cropped = make_pair(replace(SMALL, fixed_grid=crop, moving_grid=SMALL.fixed_grid))
    torch.testing.assert_close(cropped.fixed, small.fixed[:, :, 12:28], atol=0.5, rtol=0)
    assert (cropped.fixed_lobes[:, :, [0, -1]] > 0).any()
    index = crop.to_index(cropped.fixed_landmarks_mm)
    assert len(index) > 20
    assert ((index > 0) & (index < np.array(crop.size) - 1)).all()


def test_table_is_seen_and_rests(small: PhantomPair) -> None:
    without = make_pair(replace(SMALL, table=False))
    for image, plain in ((small.fixed, without.fixed), (small.moving, without.moving)):
        table = image - plain > 100
        assert table[..., -4:, :].any()
        assert not table[..., :-4, :].any()
    assert without.fixed[..., -1, :].max() < -900


def test_tree_reaches_every_target_and_follows_murray() -> None:
    targets = np.random.default_rng(0).uniform(-30, 30, size=(37, 3))
    tree, forks = grow_tree(np.array([0.0, 0.0, 60.0]), targets, 0.5)
    assert len(forks) == 36
    assert len(tree.end) == 73
    ends = {tuple(e) for e in tree.end}
    assert all(tuple(t) in ends for t in targets)
    for fork in forks:
        parent = tree.radius_mm[(tree.end == fork).all(1)]
        children = tree.radius_mm[(tree.start == fork).all(1)]
        assert len(parent) == 1
        assert (children**3).sum() == pytest.approx(parent[0] ** 3)


def test_tree_without_targets_is_empty() -> None:
    tree, forks = grow_tree(np.zeros(3), np.zeros((0, 3)), 0.5)
    assert len(tree.end) == len(forks) == 0


def test_tubes_fill_their_cross_section() -> None:
    """The occupancy of a straight tube, summed over a plane of voxels, is its cross-section π r²; it ends outside."""
    for radius in (0.4, 3.0):
        line = Branches(np.array([[0.0, 0.0, -20.0]]), np.array([[0.0, 0.0, 20.0]]), np.array([radius]))
        axis = torch.arange(-8, 8.01, 0.5)
        plane = torch.cartesian_prod(axis, axis, torch.zeros(1))
        filled = Tubes(line, 0.1).occupancy(plane, 2.0)
        area = filled.sum().item() * 0.25
        assert area == pytest.approx(np.pi * radius**2, rel=0.4)
        assert filled[plane.norm(dim=1) > radius + 2].max() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        replace(SMALL, diaphragm_mm=150.0),
        replace(SMALL, detail_mm=60.0),
        replace(SMALL, chest_ap_mm=200.0),
        replace(SMALL, moving_pose=Affine(((1.1, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))),
        replace(SMALL, noise_hu=-1.0),
    ],
)
def test_impossible_settings_are_refused(wrong: PhantomSettings) -> None:
    with pytest.raises(InputError, match="expected"):
        make_pair(wrong)


def test_too_few_voxels_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2"):
        chest_grid((1, 20, 20))


def test_written_pair_opens_in_simpleitk(tmp_path: Path) -> None:
    assert (
        main([str(tmp_path / "out"), "--size", "40", "32", "38", "--seed", "3", "--moving-size", "36", "32", "30"]) == 0
    )
    out = tmp_path / "out"
    field = sitk.ReadImage(out / "displacement_field.mha", sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    fixed, moving = (pd.read_csv(out / f"{name}_landmarks.csv") for name in ("fixed", "moving"))
    assert list(fixed.columns) == ["x", "y", "z"]
    mapped = np.array([transform.TransformPoint(point) for point in fixed.to_numpy().tolist()])
    assert np.linalg.norm(mapped - moving.to_numpy(), axis=1).max() < 0.8
    for name, kind, size in (
        ("fixed", sitk.sitkInt16, (40, 32, 38)),
        ("moving", sitk.sitkInt16, (36, 32, 30)),
        ("fixed_lobes", sitk.sitkUInt8, (40, 32, 38)),
        ("moving_lobes", sitk.sitkUInt8, (36, 32, 30)),
    ):
        image = sitk.ReadImage(out / f"{name}.mha")
        assert (image.GetPixelID(), image.GetSize()) == (kind, size)


@pytest.mark.parametrize("masks", [False, True])
def test_pair_is_written_as_input_folders(tmp_path: Path, masks: bool) -> None:
    arguments = [str(tmp_path), "--size", "12", "10", "11", "--inputs", *FORMS, *(["--masks"] if masks else [])]
    assert main(arguments) == 0
    for form in FORMS:
        found = find_inputs(tmp_path / "inputs" / form)
        assert found.fixed.read_bytes() == (tmp_path / "fixed.mha").read_bytes()
        assert found.moving.read_bytes() == (tmp_path / "moving.mha").read_bytes()
        given = [mask.read_bytes() for mask in (found.fixed_mask, found.moving_mask) if mask]
        lobes = [(tmp_path / f"{name}_lobes.mha").read_bytes() for name in ("fixed", "moving")]
        assert given == (lobes if masks else [])
        assert found.platform == (form in ("socket", "interface"))


def test_platform_files_are_complete(tmp_path: Path) -> None:
    """The entries by the letter, since the algorithm reads only some of what they say."""
    files = {role: tmp_path / "scan.mha" for role in ("fixed", "moving-mask")}
    (tmp_path / "scan.mha").touch()
    for form, keys in (("socket", ("socket", "interface")), ("interface", ("interface",))):
        for _ in range(2):  # the second time over what is there
            write_input(tmp_path / form, form, files)
        fixed, mask = json.loads((tmp_path / form / "inputs.json").read_text())
        assert fixed.keys() == {"pk", "value", "file", "image", *keys}
        for key in keys:
            assert fixed[key] == {
                "pk": 1,
                "title": "Fixed image",
                "slug": "fixed-image",
                "kind": "Image",
                "super_kind": "Image",
                "relative_path": "images/fixed",
                "description": "",
                "default_value": None,
                "overlay_segments": [],
                "look_up_table": None,
            }
        assert (mask["interface"]["slug"], mask["interface"]["kind"]) == ("moving-mask", "Segmentation")
        assert [path.name for path in (tmp_path / form / "images" / "fixed").iterdir()] == [
            f"{fixed['image']['pk']}.mha"
        ]
        assert str(uuid.UUID(fixed["image"]["pk"])) == fixed["image"]["pk"]


def test_command_says_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path), "--size", "12", "12", "12", "--diaphragm-mm", "500"]) == 2
    assert "amplitudes are too large" in caplog.text

"""The lung mask on synthetic chests whose lungs are known, and on real scans where they are at hand."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import Grid, resample
from algorithm.lungs import LungMask, crop_grid, lung_mask
from algorithm.lungs.mask import _left_and_right, _without_fragments

REAL_SCANS = Path(__file__).parents[2] / "shared" / "data"
SPACING = 3.0
CENTRE = np.array([144.0, 108.0, 120.0])
"""mm from the first voxel; the phantom is 288 × 216 × 240 mm, x right to left, y front to back, z upwards."""


def ellipsoid(x: np.ndarray, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    """(z, y, x) mask of an ellipsoid; centre relative to `CENTRE`, both in mm."""
    return (((x - CENTRE - np.array(centre)) / np.array(radii)) ** 2).sum(axis=-1) <= 1


def cylinder(x: np.ndarray, centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """(z, y, x) mask of an upright elliptic cylinder."""
    return (((x - CENTRE)[..., :2] - np.array(centre)) ** 2 / np.array(radii) ** 2).sum(axis=-1) <= 1


@dataclass(frozen=True)
class Chest:
    """HU (z, y, x) on a grid of 3 mm, and the lungs in it, vessels included."""

    hu: np.ndarray
    lungs: np.ndarray
    trachea: np.ndarray
    """Above the carina."""
    x: np.ndarray
    """Positions (z, y, x, 3) in mm."""
    grid: Grid

    def scan(self, hu: np.ndarray | None = None) -> Tensor:
        """Voxels (1, 1, z, y, x), int16."""
        return torch.from_numpy(np.round(self.hu if hu is None else hu).astype(np.int16))[None, None]


@cache
def chest(lung_hu: float = -850, lungs: str = "both", noise_hu: float = 15, seed: int = 0) -> Chest:
    """An elliptic body with two lungs with vessels, a trachea with two main bronchi into them, and a table behind.

    Above the carina the right lung touches the trachea over 40 mm without a wall between.
    """
    grid = Grid((96, 72, 80), (SPACING,) * 3, (-144.0, -108.0, 40.0))
    x = np.moveaxis(np.indices(grid.shape)[::-1], 0, -1) * SPACING
    rng = np.random.default_rng(seed)
    hu = np.full(grid.shape, -1000.0)
    hu[cylinder(x, (0, 0), (120, 84))] = 40
    hu[(abs(x[..., 0] - 144) < 120) & (abs(x[..., 1] - 200) < 3)] = -300  # table: shell ...
    hu[(abs(x[..., 0] - 144) < 120) & (x[..., 1] > 203)] = -930  # ... and foam
    trachea = cylinder(x, (0, 20), (9, 9)) & (x[..., 2] > 130)
    mask = np.zeros(grid.shape, dtype=bool)
    for side, dx in {"right": -54.0, "left": 54.0}.items():
        if lungs in ("both", side):
            mask |= ellipsoid(x, (dx, 0, 0), (42, 60, 88)) & ~ellipsoid(x, (dx, 0, -120), (56, 80, 68))
    if lungs != "left":
        mask |= ellipsoid(x, (-22, 20, 45), (20, 20, 20))
    mask &= ~trachea
    hu[mask] = lung_hu
    for y, z in rng.uniform((50, 50), (166, 190), (30, 2)):  # vessels along x
        hu[mask & ((x[..., 1] - y) ** 2 + (x[..., 2] - z) ** 2 < 9)] = 0
    branch = abs(x[..., 0] - 144)
    bronchi = ((x[..., 1] - 128) ** 2 + (x[..., 2] - 132 + branch) ** 2 < 72) & (branch < 24)
    hu[trachea | bronchi] = -990
    return Chest(hu + rng.normal(0, noise_hu, hu.shape), mask, trachea & (x[..., 2] > 145), x, grid)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def on_grid(lungs: LungMask, grid: Grid) -> np.ndarray:
    return (resample(lungs.mask.float(), lungs.grid, grid, fill=0.0)[0, 0] > 0.5).numpy()


def agreement(case: Chest, hu: np.ndarray | None = None, truth: np.ndarray | None = None) -> float:
    """Dice of the mask found in a changed copy of the chest with the true lungs."""
    return dice(on_grid(lung_mask(case.scan(hu), case.grid), case.grid), case.lungs if truth is None else truth)


@cache
def plain_mask() -> LungMask:
    return lung_mask(chest().scan(), chest().grid)


# ---- the plain case and the interface


def test_finds_both_lungs_without_the_trachea() -> None:
    case = chest()
    found = plain_mask()
    mask = on_grid(found, case.grid)
    assert dice(mask, case.lungs) > 0.97
    assert mask[case.trachea].mean() < 0.05
    assert found.litres == pytest.approx(case.lungs.sum() * SPACING**3 * 1e-6, rel=0.03)
    assert found.mask.shape[2:] == found.grid.shape
    assert max(found.grid.spacing) < 2.6 and found.grid.extent_mm == pytest.approx(case.grid.extent_mm)


def test_vessels_belong_to_the_lung() -> None:
    case = chest()
    vessels = case.lungs & (case.hu > -300)
    inner = ellipsoid(case.x, (54, 0, 0), (36, 52, 78)) & vessels
    assert inner.sum() > 100
    assert on_grid(plain_mask(), case.grid)[inner].mean() > 0.99


def test_float_voxels_give_the_same_mask() -> None:
    case = chest()
    a, b = plain_mask(), lung_mask(case.scan().float(), case.grid)
    assert torch.equal(a.mask, b.mask) and a.grid == b.grid


@pytest.mark.parametrize("spacing", [(0.9, 0.9, 1.5), (1.5, 1.5, 6.0)])
def test_any_voxel_size(spacing: tuple[float, float, float]) -> None:
    case = chest()
    x, y, z = (round(e / s) for e, s in zip(case.grid.extent_mm, spacing, strict=True))
    grid = case.grid.resized((x, y, z))
    voxels = resample(case.scan().float(), case.grid, grid).round().to(torch.int16)
    assert dice(on_grid(lung_mask(voxels, grid), case.grid), case.lungs) > 0.95


@pytest.mark.parametrize(
    ("order", "flips"),
    [
        ((0, 1, 2), (False, False, True)),
        ((2, 0, 1), (True, False, False)),
        ((1, 0, 2), (True, True, True)),
    ],
)
def test_storage_order_does_not_matter(order: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> None:
    case = chest()
    reference = sitk.GetImageFromArray(case.scan()[0, 0].numpy())
    reference.SetSpacing(case.grid.spacing)
    reference.SetOrigin(case.grid.origin)
    image = sitk.Flip(sitk.PermuteAxes(reference, order), flips)
    d = image.GetDirection()
    stored = Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), (d[:3], d[3:6], d[6:]))
    voxels = torch.from_numpy(sitk.GetArrayFromImage(image))[None, None]
    assert stored.direction != case.grid.direction
    other = lung_mask(voxels, stored)
    assert dice(on_grid(other, plain_mask().grid), plain_mask().mask[0, 0].numpy()) > 0.98


def test_upside_down_storage_with_a_false_header() -> None:
    case = chest()
    assert agreement(case, case.hu[::-1], case.lungs[::-1]) > 0.95


# ---- what is around the lungs


@pytest.mark.parametrize(
    ("shape", "padding_hu"),
    [("cylinder", -1000), ("cylinder", -2048), ("box", -1000), ("box", -3024)],
)
def test_padding_is_not_lung_even_where_it_cuts_the_lungs(shape: str, padding_hu: int) -> None:
    case = chest()
    inside = {"cylinder": cylinder(case.x, (0, 0), (84, 88)), "box": abs(case.x - CENTRE)[..., 0] < 80}[shape]
    assert (case.lungs & ~inside).sum() > 1000  # it does cut
    hu = np.where(inside, case.hu, padding_hu)
    mask = on_grid(lung_mask(case.scan(hu), case.grid), case.grid)
    assert dice(mask, case.lungs & inside) > 0.985
    assert mask[~inside].sum() < 0.005 * mask.sum()


@pytest.mark.parametrize(
    "cut",
    [
        (slice(None), slice(20, None), slice(None)),
        (slice(None), slice(None, 48), slice(None)),
        (slice(None, 52), slice(None), slice(None)),
        (slice(36, None), slice(None), slice(None)),
        (slice(None), slice(None), slice(24, None)),
        (slice(None), slice(None), slice(None, 48)),
        (slice(None), slice(20, None), slice(24, None)),
        (slice(46, 66), slice(20, None), slice(24, None)),
        (slice(16, 64), slice(20, 52), slice(22, 74)),
    ],
    ids=["front", "back", "top", "bottom", "right", "one lung", "front and right", "all but left", "all six"],
)
def test_lungs_cut_by_the_image_border(cut: tuple[slice, slice, slice]) -> None:
    case = chest()
    start = tuple(s.start or 0 for s in reversed(cut))
    part = case.lungs[cut]
    assert part.sum() < case.lungs.sum()
    z, y, x = part.shape
    grid = case.grid.cropped((start[0], start[1], start[2]), (x, y, z))
    found = lung_mask(case.scan(case.hu[cut]), grid)
    assert dice(on_grid(found, grid), part) > 0.95


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_lung(side: str) -> None:
    assert agreement(chest(lungs=side)) > 0.97


def test_lungs_that_touch_are_parted() -> None:
    x = chest().x
    left, right = ellipsoid(x, (48, 0, 0), (50, 50, 80)), ellipsoid(x, (-48, 0, 0), (50, 50, 80))
    both = left | right
    depth = ndimage.distance_transform_edt(both, sampling=SPACING).astype(np.float32)
    parts = _left_and_right(both, depth, (SPACING,) * 3)
    assert (left & right).any() and len(parts) == 2
    assert not (parts[0] & parts[1]).any() and ((parts[0] | parts[1]) == both).all()
    assert max(dice(parts[0], left), dice(parts[1], left)) > 0.98


def test_specks_do_not_stretch_the_bounding_box() -> None:
    mask = np.zeros((30, 30, 30), dtype=bool)
    mask[:10, :10, :10] = mask[15:17, :20, :20] = True  # 27 and 21.6 ml
    speck = mask.copy()
    speck[28:, 20:, :10] = True  # 5.4 ml
    assert (_without_fragments(speck, (SPACING,) * 3) == mask).all()


def test_vessel_at_the_border_that_cuts_a_lung_is_closed_over() -> None:
    case = chest()
    vessel = ellipsoid(case.x, (54, -48, 0), (6, 12, 6)) & case.lungs
    hu = np.where(vessel, 30.0, case.hu)[:, 20:]
    found = lung_mask(case.scan(hu), case.grid.cropped((0, 20, 0), (96, 52, 80)))
    assert vessel[:, 20].sum() >= 9
    assert on_grid(found, case.grid)[vessel & (case.x[..., 1] >= 60)].all()


def gas_with_wall(case: Chest, centre: tuple[float, float, float], radius: float, gas_hu: float) -> np.ndarray:
    """HU of the chest with a ball of gas in a wall of 6 mm, noise included."""
    ball, wall = (ellipsoid(case.x, centre, (r, r, r)) for r in (radius, radius + 6))
    noise = np.random.default_rng(1).normal(0, 15, case.hu.shape)
    return np.where(ball, gas_hu + noise, np.where(wall, 40 + noise, case.hu))


@pytest.mark.parametrize("gas_hu", [-1000, -700], ids=["stomach", "colon with contents"])
def test_bowel_gas_below_the_lungs_is_left_out(gas_hu: float) -> None:
    case = chest()
    hu = gas_with_wall(case, (54, 0, -85), 25, gas_hu)
    mask = on_grid(lung_mask(case.scan(hu), case.grid), case.grid)
    assert not mask[ellipsoid(case.x, (54, 0, -85), (25, 25, 25)) & (case.x[..., 2] < 55)].any()
    assert dice(mask, case.lungs & ~ellipsoid(case.x, (54, 0, -85), (31, 31, 31))) > 0.95


def test_gas_beside_the_only_lung_is_left_out() -> None:
    case = chest(lungs="right")
    assert agreement(case, gas_with_wall(case, (54, 0, 10), 35, -1000)) > 0.95


# ---- what is in the lungs


@pytest.mark.parametrize("lung_hu", [-600, -700, -950])
def test_expiration_and_emphysema(lung_hu: int) -> None:
    assert agreement(chest(lung_hu=lung_hu)) > 0.96


def test_opacities_and_nodules_are_closed_over() -> None:
    case = chest()
    ground_glass = ellipsoid(case.x, (-66, 24, 10), (25, 25, 25)) & case.lungs
    nodule = ellipsoid(case.x, (54, 0, 10), (12, 12, 12))
    hu = case.hu.copy()
    hu[ground_glass], hu[nodule] = -450, 30
    mask = on_grid(lung_mask(case.scan(hu), case.grid), case.grid)
    assert mask[ground_glass].mean() > 0.95 and mask[nodule].all()


def test_effusion_is_no_lung_but_does_not_hinder() -> None:
    case = chest()
    effusion = case.lungs & (case.x[..., 0] < 144) & (case.x[..., 2] < 120)
    hu = np.where(effusion, 15.0, case.hu)
    assert agreement(case, hu, case.lungs & ~effusion) > 0.95


@pytest.mark.parametrize("offset_hu", [-40, 40])
def test_offset_of_the_values(offset_hu: int) -> None:
    case = chest()
    shifted = lung_mask(case.scan(case.hu + offset_hu), case.grid)
    assert dice(plain_mask().mask.numpy(), shifted.mask.numpy()) > 0.98


def test_noise() -> None:
    case = chest()
    noisy = lung_mask(case.scan(case.hu + np.random.default_rng(2).normal(0, 80, case.hu.shape)), case.grid)
    assert dice(plain_mask().mask.numpy(), noisy.mask.numpy()) > 0.97


# ---- no lungs


def head(case: Chest) -> np.ndarray:
    hu = np.full(case.hu.shape, -1000.0)
    hu[ellipsoid(case.x, (0, 0, 0), (75, 90, 105))] = 40
    hu[ellipsoid(case.x, (20, -60, -30), (14, 14, 16)) | ellipsoid(case.x, (-20, -60, -30), (14, 14, 16))] = -990
    return hu + np.random.default_rng(3).normal(0, 10, hu.shape)


@pytest.mark.parametrize(
    "content", ["air", "exactly air", "water", "head", "bowel gas only", "stored with an offset of 1024"]
)
def test_no_lung_is_an_input_error_that_names_the_image(content: str) -> None:
    case = chest()
    noise = np.random.default_rng(4).normal(0, 10, case.hu.shape)
    hu = {
        "air": noise - 1000,
        "exactly air": np.full(case.hu.shape, -1000.0),
        "water": noise,
        "head": head(case),
        "bowel gas only": gas_with_wall(
            replace(case, hu=np.where(case.hu > -950, 40.0, -1000.0)), (0, 0, 0), 50, -1000
        ),
        "stored with an offset of 1024": case.hu + 1024,
    }[content]
    with pytest.raises(InputError, match=r"^moving\.mha holds no lung: .* 0\.\d l, at least 0\.3 l expected"):
        lung_mask(case.scan(hu), case.grid, "moving.mha")


def test_a_single_slice_is_an_input_error() -> None:
    case = chest()
    with pytest.raises(InputError):
        lung_mask(case.scan(case.hu[40:41]), replace(case.grid, size=(96, 72, 1)))


# ---- the crop box


def test_crop_box_holds_the_lungs_and_the_margin() -> None:
    mask = torch.zeros(1, 1, 10, 20, 30, dtype=torch.bool)
    mask[0, 0, 2:5, 4:10, 6:20] = True
    grid = Grid((30, 20, 10), (2.0, 3.0, 4.0), (10.0, -20.0, 5.0), ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
    box = crop_grid(LungMask(mask, grid), 12.0, (16, 15, 18))
    assert box.size == (16, 15, 18) and box.direction == grid.direction
    # 14 × 6 × 3 voxels of 2, 3, 4 mm, and 12 mm on either side
    assert box.extent_mm == pytest.approx((28 + 24, 18 + 24, 12 + 24))
    first_edge = grid.to_index(box.to_world(np.array([-0.5, -0.5, -0.5])))
    assert first_edge == pytest.approx([6 - 0.5 - 6, 4 - 0.5 - 4, 2 - 0.5 - 3])


def test_crop_box_of_a_chest_is_not_stretched_by_the_trachea() -> None:
    case = chest()
    top = crop_grid(plain_mask(), 0.0)
    edge = top.to_world(np.array(top.size) - 0.5)[2]
    lung_top = case.grid.to_world(np.argwhere(case.lungs)[:, ::-1].max(axis=0) + 0.5)[2]
    assert case.trachea[-1].any()
    assert edge == pytest.approx(lung_top, abs=5)


# ---- real scans


def read(path: Path) -> tuple[Tensor, Grid]:
    image = sitk.DICOMOrient(sitk.ReadImage(path), "LPS")
    d = image.GetDirection()
    grid = Grid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), (d[:3], d[3:6], d[6:]))
    return torch.from_numpy(sitk.GetArrayFromImage(image))[None, None], grid


@pytest.mark.real
@pytest.mark.skipif(not REAL_SCANS.is_dir(), reason="needs the real scans in ../shared/data")
@pytest.mark.parametrize("name", ["fixed", "moving"])
def test_right_lung_as_its_authors_drew_it(name: str) -> None:
    folder = REAL_SCANS / "pairs" / "elastix_right_lung"
    voxels, grid = read(folder / f"{name}.mha")
    expert = read(folder / f"{name}_mask.mha")[0][0, 0].numpy() > 0
    assert dice(on_grid(lung_mask(voxels, grid), grid), expert) > 0.98


@pytest.mark.real
@pytest.mark.skipif(not REAL_SCANS.is_dir(), reason="needs the real scans in ../shared/data")
@pytest.mark.parametrize(
    ("scan", "litres"),
    [
        ("single/cc_by/covidctmd_cap001", 6.0),  # trachea opens into outside air, thin chest wall
        ("single/cc_by/tcga_de_a4ma", 3.7),  # foam behind the patient
        ("pairs/dirlab4dct_01/moving", 2.1),  # clothes, padding -1000
    ],
)
def test_real_scans_keep_their_volume(scan: str, litres: float) -> None:
    voxels, grid = read(REAL_SCANS / f"{scan}.mha")
    assert lung_mask(voxels, grid).litres == pytest.approx(litres, abs=0.1)  # of masks that were looked at

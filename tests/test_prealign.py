"""The pre-alignment finds known affine maps, and takes no harm from what scans are like."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from algorithm.errors import InputError
from algorithm.geometry import Affine, Grid, resample_image
from algorithm.preparation import prealign as module
from algorithm.preparation.prealign import prealign, starts
from algorithm.preparation.scan import PrealignSettings, Scan
from phantom import PhantomPair, PhantomSettings, chest_grid, make_pair
from tests.support.strategies import as_matrix

SIZE = (36, 30, 34)
"""Voxels of 8 mm: half of what the program uses, to be quick."""
ROOMY = Grid((40, 40, 40), spacing=(8.0, 8.0, 8.0))
"""Takes the chest however it is turned."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On volumes as small as these, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def breathing() -> PhantomPair:
    return make_pair(PhantomSettings(fixed_grid=chest_grid(SIZE)))


@pytest.fixture(scope="module")
def fixed(breathing: PhantomPair) -> Scan:
    return Scan(breathing.fixed.clamp(-1000, 200), (breathing.fixed_lobes > 0).float(), breathing.fixed_grid)


@pytest.fixture(scope="module")
def exhaled(breathing: PhantomPair) -> Scan:
    return Scan(breathing.moving.clamp(-1000, 200), (breathing.moving_lobes > 0).float(), breathing.moving_grid)


def moved(scan: Scan, affine: Affine, grid: Grid, noise_hu: float = 20.0) -> Scan:
    """The scan of a chest moved by ``affine``, on ``grid``, with noise of its own."""
    inverse = affine.inverse()
    voxels = resample_image(scan.voxels, scan.grid, grid, affine=inverse, least=-1000.0, fill=-1000.0)
    noise = torch.randn(voxels.shape, generator=torch.Generator().manual_seed(1))
    lungs = resample_image(scan.lungs, scan.grid, grid, affine=inverse, least=0.0, fill=0.0)
    return Scan((voxels + noise_hu * noise).clamp(-1000, 200), lungs, grid)


def placed(grid: Grid, affine: Affine, direction: np.ndarray) -> Grid:
    """A grid of that size and spacing around the moved chest, which lay in the middle of the world."""
    middle = (np.array(grid.size) - 1) / 2
    turned = replace(grid, origin=(0.0, 0.0, 0.0), direction=as_matrix(direction))
    x, y, z = np.array(affine.offset) - turned.to_world(middle)
    return replace(turned, origin=(float(x), float(y), float(z)))


def error_mm(found: Affine, expected: Affine, scan: Scan) -> float:
    """Mean over the lungs."""
    points = scan.lung_points_mm()
    return float(np.linalg.norm(found(points) - expected(points), axis=1).mean())


SHEARED = np.array([[1.06, 0.05, -0.03], [-0.04, 0.95, 0.06], [0.03, -0.05, 0.9]])
"""Some degrees of rotation and a tenth of scaling."""
FLIPS = {
    "as it is": np.eye(3),
    "flipped in x and z": np.diag([-1.0, 1.0, -1.0]),
    "axes permuted": np.eye(3)[:, [2, 0, 1]],
}


@pytest.mark.parametrize("storage", FLIPS)
def test_a_known_affine_map_is_found_however_the_scan_is_stored(fixed: Scan, storage: str) -> None:
    affine = Affine.from_arrays(SHEARED, np.array([12.0, -8.0, 15.0]))
    moving = moved(fixed, affine, placed(ROOMY, affine, FLIPS[storage]))
    assert error_mm(Affine(), affine, fixed) > 15
    assert error_mm(prealign(fixed, moving), affine, fixed) < 1.2  # voxels of 8 mm


@pytest.mark.parametrize(("degrees", "axis"), [(25, (1, 2, 3)), (60, (-3, 1, 1)), (80, (2, -1, 0))])
def test_a_patient_who_is_turned(fixed: Scan, degrees: int, axis: tuple[int, int, int]) -> None:
    rotation = Rotation.from_rotvec(np.deg2rad(degrees) * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    affine = Affine.from_arrays(rotation @ SHEARED, np.array([12.0, -8.0, 15.0]))
    moving = moved(fixed, affine, placed(ROOMY, affine, np.eye(3)))
    assert error_mm(prealign(fixed, moving), affine, fixed) < 1


def test_no_rotation_is_far_from_those_that_are_tried() -> None:
    tried = module._all_rotations()
    some = Rotation.random(500, random_state=0)
    assert max(float((rotation.inv() * tried).magnitude().min()) for rotation in some) < np.deg2rad(40)
    assert all((rotation.inv() * tried).magnitude().min() < 1e-6 for rotation in Rotation.create_group("O"))


def test_worlds_metres_apart(fixed: Scan) -> None:
    affine = Affine.from_arrays(SHEARED, np.array([3000.0, -1500.0, 5000.0]))
    moving = moved(fixed, affine, placed(fixed.grid, affine, np.eye(3)))
    assert "identity" not in starts(fixed, moving)
    assert error_mm(prealign(fixed, moving), affine, fixed) < 1


def without_base(scan: Scan, share: float) -> Scan:
    """The scan less its lowest slices, which hold that share of the lungs; even sizes."""
    slices = scan.lungs.sum(dim=(0, 1, 3, 4))
    start = 2 * int((slices.cumsum(0) < share * slices.sum()).sum() / 2)
    nx, ny, nz = scan.grid.size
    lungs = scan.lungs[:, :, start:]
    assert lungs.sum() < (1 - 0.5 * share) * slices.sum()
    return Scan(scan.voxels[:, :, start:], lungs, scan.grid.cropped((0, 0, start), (nx, ny, nz - start)))


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_a_moving_scan_without_the_base(fixed: Scan, share: float) -> None:
    affine = Affine.from_arrays(SHEARED, np.array([5.0, 6.0, -700.0]))
    moving = without_base(moved(fixed, affine, placed(fixed.grid, affine, np.eye(3))), share)
    assert error_mm(prealign(fixed, moving), affine, fixed) < 1.5


def test_a_fixed_scan_without_the_base(fixed: Scan) -> None:
    affine = Affine.from_arrays(SHEARED, np.array([5.0, 6.0, -700.0]))
    moving = moved(fixed, affine, placed(fixed.grid, affine, np.eye(3)))
    short = without_base(fixed, 0.3)
    assert error_mm(prealign(short, moving), affine, short) < 1


def test_identical_scans_stay_where_they_are(fixed: Scan) -> None:
    assert error_mm(prealign(fixed, fixed), Affine(), fixed) < 0.1


def test_breathing_is_reduced_to_what_an_affine_map_cannot_do(
    breathing: PhantomPair, fixed: Scan, exhaled: Scan
) -> None:
    points, targets = breathing.fixed_landmarks_mm, breathing.moving_landmarks_mm
    homogeneous = np.column_stack([points, np.ones(len(points))])
    best = np.linalg.norm(homogeneous @ np.linalg.lstsq(homogeneous, targets)[0] - targets, axis=1).mean()
    before = np.linalg.norm(points - targets, axis=1).mean()
    after = np.linalg.norm(prealign(fixed, exhaled)(points) - targets, axis=1).mean()
    assert best < after < 1.25 * best  # 1.15 at 4 mm; these are 8
    assert after < 0.6 * before


def test_the_result_is_the_same_every_time(fixed: Scan, exhaled: Scan) -> None:
    quick = PrealignSettings(iterations=4, polish=2)
    assert prealign(fixed, exhaled, quick) == prealign(fixed, exhaled, quick)


def test_starts_by_hand() -> None:
    def box(grid: Grid, low: tuple[int, int, int], high: tuple[int, int, int]) -> Scan:
        lungs = torch.zeros(1, 1, *grid.shape)
        lungs[..., low[2] : high[2], low[1] : high[1], low[0] : high[0]] = 1
        return Scan(torch.full_like(lungs, -800.0), lungs, grid)

    fixed_ = box(Grid((40, 40, 40)), (10, 10, 10), (30, 30, 30))
    moving = box(Grid((40, 40, 40), spacing=(1.0, 1.0, 1.2), origin=(7.0, 0.0, 0.0)), (10, 10, 5), (30, 30, 30))
    found = starts(fixed_, moving)
    centre, apex = np.array([19.5, 19.5, 19.5]), np.array([19.5, 19.5, 29.0])
    moving_centre, moving_apex = np.array([26.5, 19.5, 17 * 1.2]), np.array([26.5, 19.5, 29 * 1.2])
    np.testing.assert_allclose(found["boxes"](np.array([centre, apex])), [moving_centre, moving_apex], atol=0.5)
    np.testing.assert_allclose(found["centres"](centre), moving_centre, atol=1e-6)
    np.testing.assert_allclose(found["apices"](apex), moving_apex, atol=0.5)
    assert found["identity"] == Affine()
    assert found["centres"].matrix == found["apices"].matrix == Affine().matrix


def test_a_start_that_loses_the_lungs_is_passed_over(
    fixed: Scan, exhaled: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = PrealignSettings(iterations=3, polish=2)
    expected = prealign(fixed, exhaled, quick)
    found = starts(fixed, exhaled)
    nowhere = Affine(offset=(0.0, 1000.0, 0.0))  # nothing there: no lung, no difference
    monkeypatch.setattr(module, "starts", lambda *_: {"nowhere": nowhere} | found)
    assert prealign(fixed, exhaled, quick) == expected


def test_a_moving_image_that_shows_too_little_is_refused(fixed: Scan) -> None:
    grid = fixed.grid.cropped((8, 12, 14), (6, 6, 6))
    part = Scan(fixed.voxels[:, :, 14:20, 12:18, 8:14], torch.ones(1, 1, 6, 6, 6), grid)
    with pytest.raises(InputError, match="less than 30% of the fixed lungs"):
        prealign(fixed, part, PrealignSettings(iterations=3, polish=3))

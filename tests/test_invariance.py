"""The same scans give the same result in the world, however they are stored, wherever they lie, whatever they show."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from algorithm.files.images import Image, read_field, read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Size, displacement_at, moved
from algorithm.preparation.prealign import prealign, searched_starts, starts
from algorithm.preparation.scan import PrealignSettings, Scan
from benchmarks.invariance import Change, carried, cut, padded, same, shown, stored
from phantom.__main__ import write_pair
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair
from tests.support.running import call_main, pair_options, results
from tests.support.strategies import examples

few = examples(3, suppress=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
FAR_MM = (5000.0, -12000.0, 800.0)
AWAY_MM = (-3000.0, 700.0, 9000.0)

Flips = tuple[bool, bool, bool]
orders = st.tuples(st.sampled_from(list(itertools.permutations(range(3)))), st.tuples(*[st.booleans()] * 3))


@dataclass(frozen=True)
class Registered:
    """What came of changed scans, brought back to the worlds of the original ones."""

    output: Path
    fixed_world: Affine
    moving_world: Affine

    def __call__(self, points_mm: np.ndarray) -> np.ndarray:
        """Original fixed points (n, 3) → original moving points, through the written field."""
        field, grid = read_field(next((self.output / "images" / "displacement-field").glob("*.mha")))
        here = self.fixed_world(points_mm)
        u = displacement_at(torch.from_numpy(here), field.double(), grid).numpy()
        return self.moving_world.inverse()(here + u)

    @property
    def warnings(self) -> str:
        return " ".join(results(self.output)["warnings"])


@dataclass(frozen=True)
class Bench:
    """A folder to work in, weights, and the scans that are changed there."""

    folder: Path
    weights: Path
    fixed: Image
    moving: Image

    def register(self, fixed_change: Change = same, moving_change: Change = same, refine: str = "fast") -> Registered:
        """The changed scans, written and registered by the main program."""
        fixed, moving = fixed_change(self.fixed), moving_change(self.moving)
        self.folder.mkdir(exist_ok=True)
        for name, scan in (("fixed", fixed), ("moving", moving)):
            write_image(self.folder / f"{name}.mha", scan.image.voxels, scan.image.grid)
        output = self.folder / "out"
        assert call_main(*pair_options(self.folder, output, self.weights), f"--refine={refine}") == 0
        return Registered(output, fixed.world, moving.world)


def bench(folder: Path, weights: Path, pair: Path) -> Bench:
    return Bench(folder, weights, read_image(pair / "fixed.mha"), read_image(pair / "moving.mha"))


def lung_points_mm(pair: PhantomPair) -> np.ndarray:
    """The centres of the fixed lung voxels, (n, 3)."""
    return pair.fixed_grid.to_world(pair.fixed_lobes[0, 0].nonzero().numpy()[:, ::-1])


def true_mm(pair: PhantomPair) -> np.ndarray:
    """Where they belong in the moving world."""
    z, y, x = pair.fixed_lobes[0, 0].nonzero().T
    return lung_points_mm(pair) + pair.displacement_mm[0, :, z, y, x].T.numpy()


# --- storage, and the place of the world -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, example_pair: PhantomPair, example: Path, small_weights: Path
) -> np.ndarray:
    """Where the lung points of the example go when nothing is changed."""
    folder = tmp_path_factory.mktemp("unchanged")
    return bench(folder, small_weights, example).register()(lung_points_mm(example_pair))


@few
@given(orders, orders)
def test_storage_order_does_not_matter(
    tmp_path: Path,
    small_weights: Path,
    example: Path,
    example_pair: PhantomPair,
    expected: np.ndarray,
    fixed_order: tuple[Size, Flips],
    moving_order: tuple[Size, Flips],
) -> None:
    found = bench(tmp_path, small_weights, example).register(stored(*fixed_order), stored(*moving_order))
    assert np.abs(found(lung_points_mm(example_pair)) - expected).max() < 1e-3


def test_worlds_metres_away(
    tmp_path: Path, small_weights: Path, example: Path, example_pair: PhantomPair, expected: np.ndarray
) -> None:
    found = bench(tmp_path, small_weights, example).register(carried(FAR_MM), carried(AWAY_MM))
    assert np.abs(found(lung_points_mm(example_pair)) - expected).max() < 0.1


def test_value_of_the_padding_does_not_matter(
    tmp_path: Path, small_weights: Path, example: Path, example_pair: PhantomPair
) -> None:
    points = lung_points_mm(example_pair)
    found = [
        bench(tmp_path / str(value), small_weights, example).register(padded(value, 3), padded(value, 3), "off")(points)
        for value in (-2048.0, -3024.0)
    ]
    assert np.abs(found[0] - found[1]).max() < 1e-3


# --- what the scans show: accuracy against the exact motion ----------------------------------------------------------

SMALL = chest_grid((36, 30, 34))
BOTH_LUNGS = PhantomSettings(fixed_grid=SMALL)
LEFT_LUNG = PhantomSettings(fixed_grid=SMALL, lungs="left")


@dataclass(frozen=True)
class Case:
    """Phantom scans of which parts are shown, and what has to be warned of ("" when nothing in particular)."""

    fixed: PhantomSettings = BOTH_LUNGS
    moving: PhantomSettings | None = None
    """Of another chest with the same motion; None: the same."""
    fixed_change: Change = same
    moving_change: Change = same
    warning: str = ""


OUTSIDE = "outside the moving field of view"
MOST_MM = 4.0
"""Half a voxel of the phantom, with untrained weights."""
CASES = {
    "fixed left lung, moving both": Case(LEFT_LUNG, moving=BOTH_LUNGS),
    "moving left half": Case(moving_change=cut((0.5, 0, 0), (1, 1, 1)), warning=OUTSIDE),
    "fixed upper half": Case(fixed_change=cut((0, 0, 0.5), (1, 1, 1))),
    "both cut everywhere": Case(
        fixed_change=cut((0.15, 0.2, 0.3), (0.85, 0.8, 0.8)), moving_change=cut((0.12, 0.15, 0.3), (0.85, 0.8, 0.85))
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_accuracy_where_both_show_the_lungs(tmp_path: Path, small_weights: Path, kind: str) -> None:
    case = CASES[kind]
    pair = make_pair(case.fixed)
    write_pair(tmp_path / "fixed", pair)
    write_pair(tmp_path / "moving", make_pair(case.moving) if case.moving else pair)
    fixed, moving = (read_image(tmp_path / name / f"{name}.mha") for name in ("fixed", "moving"))
    found = Bench(tmp_path, small_weights, fixed, moving).register(case.fixed_change, case.moving_change)

    points, targets = lung_points_mm(pair), true_mm(pair)
    both = shown(points, case.fixed_change(fixed).image.grid) & shown(targets, case.moving_change(moving).image.grid)
    error = np.linalg.norm(found(points[both]) - targets[both], axis=1).mean()
    assert both.mean() > 0.2
    assert error < MOST_MM < np.linalg.norm(points - targets, axis=1)[both].mean()
    assert case.warning in found.warnings


# --- pre-alignment: turned patients, and half a field of view in another world ---------------------------------------


@pytest.fixture(scope="module")
def scans(example_pair: PhantomPair) -> tuple[Scan, Scan]:
    """Fixed and moving phantom, with their true lungs, as the pre-alignment sees them."""
    fixed = Scan(example_pair.fixed.clamp(max=200), (example_pair.fixed_lobes > 0).float(), example_pair.fixed_grid)
    lungs = (example_pair.moving_lobes > 0).float()
    return fixed, Scan(example_pair.moving.clamp(max=200), lungs, example_pair.moving_grid)


def prealignment_error_mm(pair: PhantomPair, fixed: Scan, moving: Scan, world: Affine) -> float:
    """Mean over the landmarks that the moving scan shows, whose world was carried by ``world``."""
    targets = world(pair.moving_landmarks_mm)
    there = shown(targets, moving.grid)
    found = prealign(fixed, moving)(pair.fixed_landmarks_mm)
    return float(np.linalg.norm(found - targets, axis=1)[there].mean())


@pytest.mark.parametrize("degrees, axis", [(35, (1.0, 2.0, 3.0)), (90, (1.0, 0.0, 0.0)), (180, (0.0, 0.0, 1.0))])
def test_turned_patients(
    example_pair: PhantomPair, scans: tuple[Scan, Scan], degrees: float, axis: tuple[float, float, float]
) -> None:
    fixed, moving = scans
    rotation = np.array(sitk.VersorTransform(axis, np.deg2rad(degrees)).GetMatrix()).reshape(3, 3)
    world = Affine.from_arrays(rotation, np.array(AWAY_MM))
    turned = replace(moving, grid=moved(moving.grid, world))
    assert prealignment_error_mm(example_pair, fixed, turned, world) < 4


HALVES = {"lower": ((0, 0, 0), (34, 32, 18)), "right": ((0, 0, 0), (16, 32, 36)), "left": ((18, 0, 0), (16, 32, 36))}


@pytest.mark.parametrize("part", HALVES)
def test_half_a_moving_field_of_view_metres_away(
    example_pair: PhantomPair, scans: tuple[Scan, Scan], part: str
) -> None:
    fixed, moving = scans
    (x, y, z), (nx, ny, nz) = HALVES[part]
    voxels, lungs = (v[:, :, z : z + nz, y : y + ny, x : x + nx] for v in (moving.voxels, moving.lungs))
    world = Affine(offset=AWAY_MM)
    half = Scan(voxels, lungs, moved(moving.grid.cropped(*HALVES[part]), world))
    assert prealignment_error_mm(example_pair, fixed, half, world) < 4


def test_nothing_is_searched_where_the_boxes_around_the_lungs_fit(scans: tuple[Scan, Scan]) -> None:
    fixed, moving = (scan.coarsened() for scan in scans)
    assert searched_starts(fixed, moving, list(starts(*scans).values()), PrealignSettings()) == {}

"""Statistics of motion: analytic fields have the lengths and variograms that one can work out by hand."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from algorithm.errors import InputError, exit_code
from algorithm.geometry import Grid
from tests.support.made_up_lungs import made_scan, scan_files, two_lungs
from tests.support.strategies import examples
from training import motion
from training.motion import L2R_SPACING_MM, LAGS_MM, MotionStatistics, correspondences, of_pair, plot, statistics
from training.pairs import TrainingPair

pytestmark = pytest.mark.usefixtures("one_thread")

SQRT_2 = math.sqrt(2)


def cloud(seed: int, number: int = 2500, edge_mm: float = 120.0) -> np.ndarray:
    """Points all over a box."""
    return np.random.default_rng(seed).uniform(0, edge_mm, (number, 3)) - 30


def affine_motion(points: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    motion_mm: np.ndarray = points @ generator.normal(0, 0.2, (3, 3)) + generator.normal(0, 20, 3)
    return motion_mm


# --- statistics ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
@examples(8)
def test_of_an_affine_motion_nothing_is_left(seed: int) -> None:
    points = cloud(seed, 200)
    for vectors in (affine_motion(points, seed), np.zeros_like(points)):
        result = statistics(points, vectors)
        assert (result.mean_mm, result.p95_mm) == (0.0, 0.0)
        assert np.isnan([*result.shares, *result.variogram]).all()


@pytest.mark.parametrize("number", [1, 3, 4])
def test_few_points_always_move_by_an_affine_map(number: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(number, 3))
    assert statistics(cloud(0, number), vectors).mean_mm == 0.0


@given(st.integers(0, 2**31))
@examples(5)
def test_an_affine_part_changes_nothing(seed: int) -> None:
    points = cloud(seed)
    vectors = 3 * np.sin(points / 9)
    one, other = (statistics(points, v) for v in (vectors, vectors + affine_motion(points, seed)))
    for name in ("mean_mm", "p95_mm", "shares", "variogram"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9)


def test_independent_residuals_differ_by_root_two_of_their_length_at_every_lag() -> None:
    points = cloud(0)
    result = statistics(points, np.random.default_rng(1).normal(0, 2.0, (2500, 3)))
    assert result.variogram == pytest.approx([SQRT_2] * len(LAGS_MM), abs=0.05)
    assert result.shares == pytest.approx([1 / math.sqrt(3)] * 3, abs=0.02)
    assert result.mean_mm == pytest.approx(2 * math.sqrt(8 / math.pi), rel=0.03)  # of Maxwell's distribution, σ = 2
    assert result.p95_mm == pytest.approx(2 * 2.7955, rel=0.03)


def test_lengths_are_mm_and_shape_is_relative() -> None:
    points = cloud(2)
    vectors = np.random.default_rng(3).normal(size=points.shape)
    one, ten = statistics(points, vectors), statistics(points, 10 * vectors)
    assert (ten.mean_mm, ten.p95_mm) == pytest.approx((10 * one.mean_mm, 10 * one.p95_mm))
    assert ten.shares == pytest.approx(one.shares)
    assert ten.variogram == pytest.approx(one.variogram)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shares_tell_the_components_apart(axis: int) -> None:
    points = cloud(4)
    vectors = np.zeros_like(points)
    vectors[:, axis] = np.cos(points[:, 0] / 7)
    assert statistics(points, vectors).shares == pytest.approx(np.eye(3)[axis], abs=1e-9)


def test_a_cosine_along_a_line_has_its_known_variogram() -> None:
    """a cos(kx): E[(u(x) - u(x + h))²] = a² (1 - cos kh) over whole periods, the mean square a² / 2."""
    length, wavelength = 1200.0, 60.0
    x = np.random.default_rng(5).uniform(0, length, 3000)
    points = np.column_stack([x, np.zeros_like(x), np.zeros_like(x)])
    k = 2 * np.pi / wavelength
    vectors = np.column_stack([np.zeros_like(x), np.zeros_like(x), 4 * np.cos(k * x)])
    result = statistics(points, vectors)
    for value, (low, high) in zip(result.variogram, LAGS_MM, strict=True):
        h = np.linspace(low, high, 500)
        expected = np.sqrt(2 * np.average(1 - np.cos(k * h), weights=length - h))  # short lags are more frequent
        assert value == pytest.approx(expected, rel=0.03)
    assert result.variogram[0] < 0.7 < 1.5 < result.variogram[3]
    assert result.mean_mm == pytest.approx(4 * 2 / math.pi, rel=0.03)


def test_the_drawn_point_pairs_stand_for_all_of_them() -> None:
    points = cloud(6, 600)
    vectors = 2 * np.cos(points[:, [1, 2, 0]] / 11)
    basis = np.column_stack([np.ones(len(points)), points])
    residual = vectors - basis @ np.linalg.solve(basis.T @ basis, basis.T @ vectors)
    lag, difference = pdist(points), pdist(residual)
    root = math.sqrt((residual**2).sum(axis=1).mean())
    expected = [np.sqrt((difference[(lag > low) & (lag <= high)] ** 2).mean()) / root for low, high in LAGS_MM]
    assert statistics(points, vectors).variogram == pytest.approx(expected, abs=0.03)


def test_lags_without_points_have_no_value() -> None:
    points = np.stack(np.meshgrid(*[np.arange(5) * 10.0] * 3), axis=-1).reshape(-1, 3)  # none nearer than 10 mm
    variogram = statistics(points, np.random.default_rng(0).normal(size=points.shape)).variogram
    assert np.isnan(variogram).tolist() == [True, False, False, False, False]


def test_many_points_are_thinned_the_same_way_every_time() -> None:
    points = cloud(7, 5000)
    vectors = np.random.default_rng(8).normal(size=points.shape)
    assert statistics(points, vectors) == statistics(points, vectors)
    whole, thinned = statistics(points, vectors, 5000), statistics(points, vectors, 1000)
    assert thinned != whole
    assert thinned.mean_mm == pytest.approx(whole.mean_mm, rel=0.05)


def test_a_simulated_pair_counts_inside_its_lungs_only() -> None:
    grid = Grid((32, 28, 32), (8.0, 8.0, 8.0))
    lungs = two_lungs(grid)
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(1, 3, *grid.shape, generator=generator) * lungs
    image = torch.zeros_like(lungs)
    pair = TrainingPair(image, image, lungs, lungs, inside, -inside, grid, grid, grid)
    result = of_pair(pair)
    assert result == of_pair(replace(pair, displacement=inside + 1000 * (1 - lungs)))
    assert result.mean_mm == pytest.approx(math.sqrt(8 / math.pi), rel=0.05)
    index = (lungs[0, 0] > 0.5).nonzero().numpy()
    assert result == statistics(grid.to_world(index[:, ::-1]), inside[0].numpy()[:, *index.T].T)


def test_a_pair_s_coarser_field_is_read_in_its_own_world() -> None:
    grid = Grid((32, 28, 32), (8.0, 8.0, 8.0), origin=(5.0, 6.0, 7.0))
    coarse, lungs = grid.coarsened(4), two_lungs(grid)
    x = torch.arange(coarse.shape[2]) * coarse.spacing[0] + coarse.origin[0]
    displacement = torch.zeros(1, 3, *coarse.shape)
    displacement[:, 2] = 0.1 * x
    image = torch.zeros_like(lungs)
    pair = TrainingPair(image, image, lungs, lungs, displacement, -displacement, grid, grid, coarse)
    assert of_pair(pair).mean_mm < 0.001  # linear, hence affine


# --- files -----------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: np.ndarray) -> Path:
    np.savetxt(path, rows, delimiter=",")
    return path


def test_correspondences_are_points_and_vectors(tmp_path: Path) -> None:
    points, vectors = cloud(0, 5), np.random.default_rng(1).normal(size=(5, 3))
    path = write_csv(tmp_path / "a.csv", np.column_stack([points, points + vectors]))
    for found, expected in zip(correspondences(path), (points, vectors), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_learn2reg_correspondences_are_in_voxels(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", np.array([[100.0, 80.0, 40.0, 101.0, 82.0, 44.0]]))
    points, vectors = correspondences(path, L2R_SPACING_MM)
    np.testing.assert_allclose(points, [[175.0, 100.0, 70.0]])
    np.testing.assert_allclose(vectors, [[1.75, 2.5, 7.0]])


@pytest.mark.parametrize(
    ("text", "came"),
    [
        ("1,2,3\n4,5,6\n", "has 3 columns"),
        ("1,2,3,4,5,6,7\n", "has 7 columns"),
        ("", "has 0 columns"),
        ("x,y,z,x,y,z\n1,2,3,4,5,6\n", "is no csv of numbers"),
        ("1,2,3,4,5,6\n1,2,3\n", "is no csv of numbers"),
        ("1 2 3 4 5 6\n", "is no csv of numbers"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, text: str, came: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=came) as raised:
        correspondences(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "expected six numbers a line" in message
    assert "\n" not in message


# --- picture and command line ----------------------------------------------------------------------------------------


def assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_the_picture_bears_groups_without_any_shape(tmp_path: Path) -> None:
    nothing = MotionStatistics(0.0, 0.0, (math.nan,) * 3, (math.nan,) * len(LAGS_MM))
    some = MotionStatistics(2.0, 4.0, (0.5, 0.5, 0.7), (0.3, math.nan, 0.9, 1.1, 1.4))
    plot({"nothing": [nothing], "some": [some, nothing]}, tmp_path / "motion.png")
    assert_picture(tmp_path / "motion.png")
    assert motion.summary([nothing]).startswith("1 pairs, mean 0.0 mm (0.0 to 0.0), p95/mean nan")
    assert "p95/mean 2.00, shares [0.5 0.5 0.7], variogram [0.3 nan 0.9 1.1 1.4]" in motion.summary([some, nothing])


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line with two files of either kind, and two scans."""
    monkeypatch.setattr(motion, "load_scan", made_scan)
    (tmp_path / "packed").mkdir()
    scan_files(tmp_path / "packed")
    files = []
    for i in range(4):
        points = cloud(i, 300)
        rows = np.column_stack([points, points + (i + 1) * np.cos(points / 13)])
        files.append(str(write_csv(tmp_path / f"{i}.csv", rows)))
    train, out = str(tmp_path / "packed"), str(tmp_path / "motion.png")
    return ["motion", "--real", *files[:2], "--l2r", *files[2:], "--train", train, "--number", "2", "--out", out]


def test_the_command_line_writes_the_picture_and_a_line_for_every_group(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    with caplog.at_level(logging.INFO):
        motion.main()
    assert_picture(tmp_path / "motion.png")
    lines = [record.getMessage() for record in caplog.records if record.name == "training.motion"]
    assert [line.split(",")[0] for line in lines] == [
        "Lung250M: 2 pairs",
        "Learn2Reg: 2 pairs",
        *(f"simulated {kind}: 2 pairs" for kind in ("at rest", "breath-hold")),
    ]


def test_the_command_line_says_what_is_wrong(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    (tmp_path / "0.csv").write_text("1,2\n")
    assert exit_code(motion.main) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path / '0.csv'} has 2 columns")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", ["motion", "--train", str(tmp_path / "empty"), "--out", str(tmp_path / "b.png")])
    assert exit_code(motion.main) == 2
    assert "holds no .npz scans" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()

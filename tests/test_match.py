"""Nodules of two scans: which are the same, by every other way of pairing them; growth by hand; the files."""

import csv
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithm.files.writing import write_image
from algorithm.results.result import read_result
from algorithm.tools.match import doubling_days, matched, sphere_mm3
from tests.support.made_up_results import FIXED_LUNGS, MOVING_LUNGS, points_in, write_result
from tests.support.point_files import fcsv, markups
from tests.support.running import lungreg
from tests.support.strategies import examples

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(60)


# --- the matching ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(seed=st.integers(0, 10_000), numbers=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_no_other_pairing_is_better(seed: int, numbers: tuple[int, int]) -> None:
    """Against all of them: most pairs within the radius first, then the least sum of distances."""
    rng, radius = np.random.default_rng(seed), 8.0
    prior, now = (rng.uniform(0, 20, (n, 3)) for n in numbers)
    found = matched(prior, now, radius)
    assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)

    def worth(pairs: list[tuple[int, int]]) -> tuple[int, float]:
        distances = [float(np.linalg.norm(prior[i] - now[j])) for i, j in pairs]
        assert all(distance <= radius for distance in distances)
        return -len(pairs), sum(distances)

    near = [
        (i, j)
        for i, j in itertools.product(range(numbers[0]), range(numbers[1]))
        if np.linalg.norm(prior[i] - now[j]) <= radius
    ]
    best = (0, 0.0)
    for number in range(1, min(numbers) + 1):
        for pairs in itertools.combinations(near, number):
            if len({i for i, _ in pairs}) == len({j for _, j in pairs}) == number:
                best = min(best, worth(list(pairs)))
    assert worth(found) == pytest.approx(best)


def test_the_nearest_is_not_always_the_partner() -> None:
    """One by one, the first would take the second's only partner."""
    prior = np.array([[0.0, 0, 0], [4, 0, 0]])
    now = np.array([[3.0, 0, 0], [-6, 0, 0]])
    assert sorted(matched(prior, now, 6.5)) == [(0, 1), (1, 0)]
    assert matched(prior, now, 5.0) == [(1, 0)]


def test_doubling_time_by_hand() -> None:
    assert doubling_days(100.0, 200.0, 182.0) == pytest.approx(182)
    assert doubling_days(100.0, 400.0, 182.0) == pytest.approx(91)
    assert doubling_days(100.0, 50.0, 182.0) == pytest.approx(-182)
    assert doubling_days(100.0, 100.0, 182.0) is None
    assert doubling_days(100.0, 200.0, None) is None and doubling_days(None, 200.0, 10.0) is None
    assert sphere_mm3(10.0) == pytest.approx(523.6, abs=0.1)


# --- the files -------------------------------------------------------------------------------------------------------

PRIOR = points_in(MOVING_LUNGS.grid, 3, margin=4)
DIAMETERS = (6.0, 8.0, 5.0)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an expected error of 1.5 mm in the lower half of its lungs, and none above."""
    folder = write_result(tmp_path_factory.mktemp("result"), expected=None)
    grid = FIXED_LUNGS.grid
    error = torch.full((1, 1, *grid.shape), -1.0)
    error[:, :, : grid.size[2] // 2] = 1.5
    path = folder / "images" / "expected-error" / "now.mha"
    path.parent.mkdir(parents=True)
    write_image(path, error, grid)
    return folder


@pytest.fixture
def files(tmp_path: Path, result: Path) -> tuple[Path, Path]:
    """Of the earlier scan three nodules; in the later one two of them, 1 and 2 mm away and in another order, and a new
    one; the first has doubled its volume in 182 days."""
    prior, now = tmp_path / "prior.csv", tmp_path / "now.csv"
    rows = zip("abc", PRIOR, DIAMETERS, strict=True)
    prior.write_text(
        "name,x,y,z,diameter_mm,date\n" + "".join(f"{n},{x},{y},{z},{d},2025-01-01\n" for n, (x, y, z), d in rows)
    )
    there = read_result(result).to_fixed(PRIOR)
    places = [there[1] + [0, 2, 0], there[0] + [1, 0, 0], there[2] + [0, 0, 11]]
    rows = zip(("B", "A", "new"), places, (8.0, 6.0 * 2 ** (1 / 3), 4.0), strict=True)
    now.write_text(
        "name,x,y,z,diameter_mm,date\n" + "".join(f"{n},{x},{y},{z},{d},2025-07-02\n" for n, (x, y, z), d in rows)
    )
    return prior, now


def table(path: Path) -> dict[str, dict[str, str]]:
    """By both names."""
    return {row["prior"] + row["now"]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


def test_nodules_are_followed(
    tmp_path: Path, result: Path, files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert lungreg("match", result, *files, out) == 0
    said = capfd.readouterr().out
    assert "Earlier: the moving scan (before.mha); later: the fixed scan (now.mha)." in said
    assert "Within 10 mm, 2 nodules are matched, 1 are new, 1 are gone." in said
    rows = table(out)
    assert {key: row["state"] for key, row in rows.items()} == {
        "aA": "matched", "bB": "matched", "c": "gone", "new": "new",
    }  # fmt: skip
    assert float(rows["aA"]["distance_mm"]) == pytest.approx(1, abs=0.01)
    assert float(rows["bB"]["distance_mm"]) == pytest.approx(2, abs=0.01)
    assert (rows["aA"]["days"], rows["aA"]["doubling_days"]) == ("182", "182")
    assert float(rows["aA"]["growth_mm"]) == pytest.approx(6 * (2 ** (1 / 3) - 1), abs=0.01)
    assert (rows["bB"]["growth_mm"], rows["bB"]["doubling_days"]) == ("0.00", "")
    assert rows["c"]["now_diameter_mm"] == rows["new"]["prior_diameter_mm"] == ""
    for row in rows.values():
        index = FIXED_LUNGS.grid.to_index(np.array([float(row[axis]) for axis in "xyz"]))
        inside = bool(((np.rint(index) >= 0) & (np.rint(index) < FIXED_LUNGS.grid.size)).all())
        lower = inside and np.rint(index[2]) < FIXED_LUNGS.grid.size[2] // 2
        assert row["expected_error_mm"] == ("1.50" if lower else "")
        assert row["in_lungs"] == ("yes" if inside else "no")
    assert {row["expected_error_mm"] for row in rows.values()} >= {"1.50"}


def test_radius_days_and_the_other_direction(
    tmp_path: Path, result: Path, files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """A radius of 1.5 mm loses a nodule; the days of the option come before the dates; the roles can be swapped."""
    assert lungreg("match", result, *files, tmp_path / "near.csv", "--radius=1.5", "--days=91") == 0
    rows = table(tmp_path / "near.csv")
    assert {key for key, row in rows.items() if row["state"] == "matched"} == {"aA"}
    assert rows["aA"]["doubling_days"] == "91"
    assert lungreg("match", result, files[1], files[0], "--prior-is=fixed", "--days=10") == 0
    said = capfd.readouterr().out
    assert "Earlier: the fixed scan (now.mha); later: the moving scan (before.mha)." in said
    rows = {row["prior"] + row["now"]: row for row in csv.DictReader(io.StringIO(said.partition("\n\n")[2]))}
    assert rows["Aa"]["state"] == "matched" and rows["Aa"]["doubling_days"] == "-10"
    a = [float(rows["Aa"][axis]) for axis in "xyz"]
    np.testing.assert_allclose(a, PRIOR[0], atol=0.01)  # positions are those of the later scan


def test_other_kinds_of_files_and_volumes(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = read_result(result).to_fixed(PRIOR)
    (tmp_path / "a.fcsv").write_text(fcsv(PRIOR * [-1, -1, 1], "RAS"))
    (tmp_path / "b.mrk.json").write_text(markups(there, "LPS"))
    assert lungreg("match", result, tmp_path / "a.fcsv", tmp_path / "b.mrk.json") == 0
    assert "3 nodules are matched, 0 are new, 0 are gone" in capfd.readouterr().out
    (tmp_path / "none.csv").write_text("x,y,z,volume_mm3\n")
    rows = "".join(f"{x},{y},{z},{sphere_mm3(7.0):.4f}\n" for x, y, z in there)
    (tmp_path / "c.csv").write_text(f"x,y,z,volume_mm3\n{rows}")
    assert lungreg("match", result, tmp_path / "none.csv", tmp_path / "c.csv", tmp_path / "out.csv") == 0
    found = table(tmp_path / "out.csv")
    assert {row["state"] for row in found.values()} == {"new"} and found["1"]["now_diameter_mm"] == "7.00"


@pytest.mark.parametrize(
    ("cells", "options", "says"),
    [
        ("x,y,z\n1,2,three\n", [], "cannot be read as .csv"),
        ("x,y,z,diameter_mm\n1,2,3,big\n", [], "has a size that is no number"),
        ("x,y,z,diameter_mm\n1,2,3,-4\n", [], "has a size that is not above 0"),
        ("x,y,z,date\n1,2,3,yesterday\n", [], "has a date that cannot be read"),
        ("x,y,z\n1,2,3\n", ["--radius=0"], "--radius is 0"),
        ("x,y,z\n1,2,3\n", ["--days=-5"], "--days is -5"),
    ],
    ids=["place", "size", "negative", "date", "radius", "days"],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str], cells: str, options: list[str], says: str
) -> None:
    (tmp_path / "a.csv").write_text(cells)
    assert lungreg("match", result, tmp_path / "a.csv", tmp_path / "a.csv", tmp_path / "out.csv", *options) == 2
    assert says in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "out.csv").exists()


def test_nothing_is_replaced_and_the_order_of_dates_is_looked_at(
    tmp_path: Path, result: Path, files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    assert lungreg("match", result, *files, out) == 2
    assert "is there already" in capfd.readouterr().err and out.read_text() == "mine"
    assert lungreg("match", result, *files, files[0], "--overwrite") == 2
    assert "is what is read" in capfd.readouterr().err
    assert lungreg("match", result, *files, tmp_path / "out.txt") == 2
    assert "ends in .csv" in capfd.readouterr().err
    assert lungreg("match", result, *files, out, "--overwrite") == 0 and "matched" in out.read_text()
    files[0].write_text(files[0].read_text().replace("2025-01-01", "2026-01-01"))
    capfd.readouterr()
    assert lungreg("match", result, *files) == 2
    assert "expected one before 2025-07-02" in capfd.readouterr().err


@pytest.mark.parametrize("ending", [".mha", ".nii.gz", ".nrrd"])
def test_the_expected_error_comes_from_an_image_of_any_format(result: Path, ending: str) -> None:
    (image,) = (result / "images" / "expected-error").iterdir()
    read = sitk.ReadImage(str(image))
    image.unlink()
    sitk.WriteImage(read, str(image.parent / f"now{ending}"))
    inside = FIXED_LUNGS.grid.to_world(np.array([3, 4, 5]))
    values = read_result(result).expected_error_at(inside + np.array([[0, 0, 0], [0, 0, 1000]]))
    assert values is not None and values.tolist() == [1.5, -1]

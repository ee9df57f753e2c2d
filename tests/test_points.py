"""Points through a result, in every kind of file, both ways; SimpleITK, by the transforms, is the second opinion."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.errors import InputError
from algorithm.files.pointfiles import ENDINGS, read_points
from algorithm.files.writing import write_field, write_image
from algorithm.geometry import jacobian_determinant
from algorithm.results.ownership import TRANSFORMS
from algorithm.results.points import map_points
from algorithm.results.result import Scan, read_result
from tests.support.made_up_results import (
    AFFINE,
    BOX,
    EXPECTED,
    FIXED,
    MOVING_LUNGS,
    WAVY,
    points_in,
    write_result,
)
from tests.support.point_files import POINTS, RAS, fcsv, markups, stl, vtk
from tests.support.running import lungreg

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(tmp_path_factory.mktemp("result"))


def by_simpleitk(result: Path, points: np.ndarray, of: Scan) -> np.ndarray:
    transform = sitk.ReadTransform(str(result / TRANSFORMS[of == "moving"]))
    return np.array([transform.TransformPoint(point) for point in points.tolist()])


# --- the map ---------------------------------------------------------------------------------------------------------


def test_points_go_to_the_moving_scan_as_simpleitk_takes_them(result: Path) -> None:
    points = points_in(BOX.padded(20))
    np.testing.assert_allclose(read_result(result).to_moving(points), by_simpleitk(result, points, "fixed"), atol=1e-3)


def test_points_come_back_to_where_they_were(result: Path) -> None:
    """Also those outside the field; the inverse for other programs does so in the lungs, to its residual."""
    read, points = read_result(result), points_in(BOX.padded(20), 2000)
    assert np.abs(read.to_fixed(read.to_moving(points)) - points).max() < 1e-3
    moving = points_in(MOVING_LUNGS.grid)
    apart = np.linalg.norm(read.to_fixed(moving) - by_simpleitk(result, moving, "moving"), axis=1)
    assert apart.mean() < 0.03 and np.quantile(apart, 0.95) < 0.1


def test_the_volume_change_is_that_of_the_map(result: Path) -> None:
    read, points, step = read_result(result), points_in(BOX, 200, margin=2), 0.5
    columns = [(read.to_moving(points + d) - read.to_moving(points - d)) / (2 * step) for d in step * np.eye(3)]
    expected = np.linalg.det(np.stack(columns, axis=-1))
    found = read.jacobian_at(points)
    assert np.std(found) > 0.05
    assert np.abs(found - expected).mean() < 0.03  # trilinear: it has edges
    everywhere = float(jacobian_determinant(WAVY.displacement, BOX).mean()) * np.linalg.det(AFFINE.matrix)
    assert read.jacobian_at(points_in(BOX, 3000)).mean() == pytest.approx(everywhere, abs=0.01)


def test_a_result_without_transforms_has_its_field(tmp_path: Path, result: Path) -> None:
    folder = tmp_path / "images" / "displacement-field"
    folder.mkdir(parents=True)
    write_field(folder / "a.mha", FIXED, [WAVY.field(FIXED)], "itk")
    (tmp_path / "results.json").write_text("{}")
    points, read = points_in(FIXED, margin=1), read_result(tmp_path)
    near = np.abs(read.to_moving(points) - read_result(result).to_moving(points)).max(axis=1) < 0.5
    assert near.mean() > 0.6  # on another grid, and constant outside the field's box
    assert np.abs(read.to_fixed(read.to_moving(points)) - points).max() < 1e-3
    assert read.in_lungs(points, "fixed") is None


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"results.json: cannot be read .* expected a folder that a registration"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="0 displacement fields"):
        read_result(tmp_path)


# --- files -----------------------------------------------------------------------------------------------------------

FILES = {
    "a.csv": (
        "name,X,y,z,size\n" + "".join(f'"n, {n}",{x},{y},{z},007\n' for n, (x, y, z) in enumerate(POINTS)),
        False,
    ),
    "ras.csv": ("x,y,z\n" + "".join(f"{x},{y},{z}\n" for x, y, z in RAS), True),
    "lps.fcsv": (fcsv(POINTS, "LPS"), False),
    "old.fcsv": (fcsv(RAS, "0"), False),
    "lps.mrk.json": (markups(POINTS, "LPS"), True),
    "ras.mrk.json": (markups(RAS, "RAS"), False),
    "ascii.vtk": (vtk(POINTS, "ASCII"), False),
    "binary.vtk": (vtk(RAS, "BINARY"), True),
    "slicer.vtk": (vtk(RAS, "BINARY", "3D Slicer output. SPACE=RAS"), False),
    "binary.stl": (stl(POINTS, True), False),
    "ascii.STL": (stl(RAS, False), True),
}


def written(folder: Path, name: str) -> tuple[Path, bool]:
    content, ras = FILES[name]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name, ras


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("of", ["fixed", "moving"])
def test_every_kind_of_file_is_read_and_written_in_its_own_coordinates(
    tmp_path: Path, result: Path, name: str, of: Scan
) -> None:
    source, ras = written(tmp_path, name)
    out = tmp_path / f"out_{name}"
    map_points(result, source, out, of, ras)
    before, after = (read_points(path, ras).points_mm for path in (source, out))
    np.testing.assert_allclose(before, POINTS[: len(before)], atol=1e-4)
    np.testing.assert_allclose(after, read_result(result).mapped(before, of), atol=2e-4)


def test_other_columns_stay_and_what_is_known_of_the_points_is_added(tmp_path: Path, result: Path) -> None:
    source, _ = written(tmp_path, "a.csv")
    with source.open("a") as file:
        file.write("far,0,0,-3000,\n")
    map_points(result, source, tmp_path / "b.csv", "fixed")
    with (tmp_path / "b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "X", "y", "z", "size", "in_lungs", "jacobian", "expected_error_mm"]
    assert [(row["name"], row["size"]) for row in rows] == [*((f"n, {n}", "007") for n in range(4)), ("far", "")]
    assert [row["in_lungs"] for row in rows] == ["yes"] * 4 + ["no"]
    expected = read_result(result).jacobian_at(POINTS)
    np.testing.assert_allclose([float(row["jacobian"]) for row in rows[:4]], expected, atol=1e-4)
    map_points(result, tmp_path / "b.csv", tmp_path / "c.csv", "moving")  # back
    with (tmp_path / "c.csv").open(newline="") as file:
        back = list(csv.reader(file))
    np.testing.assert_allclose(np.array([row[1:4] for row in back[1:5]], float), POINTS, atol=1e-3)
    np.testing.assert_allclose([float(row[-2]) for row in back[1:5]], 1 / expected, atol=1e-3)


@pytest.mark.parametrize("of", ["fixed", "moving"])
def test_the_expected_error_is_that_of_the_place_in_the_fixed_scan(tmp_path: Path, result: Path, of: Scan) -> None:
    """Trilinear between voxels, nothing where nothing is said: in the last voxels along z, and outside the lungs."""
    grid, read = EXPECTED.grid, read_result(result)
    index = np.array([[3.25, 7.0, 5.5], [10.0, 2.5, 0.0], [6.0, 6.0, 13.4], [6.0, -9.0, 6.0]])
    fixed = grid.to_world(index)
    np.testing.assert_allclose(read.expected_error_at(fixed), [0.825, 1.5, -1, -1], atol=1e-5)
    points = fixed if of == "fixed" else read.to_moving(fixed)
    (tmp_path / "a.csv").write_text("x,y,z\n" + "".join(f"{x:.6f},{y:.6f},{z:.6f}\n" for x, y, z in points))
    map_points(result, tmp_path / "a.csv", tmp_path / "b.csv", of)
    with (tmp_path / "b.csv").open(newline="") as file:
        found = [row["expected_error_mm"] for row in csv.DictReader(file)]
    assert [float(value) for value in found[:2]] == pytest.approx([0.825, 1.5], abs=0.006) and found[2:] == ["", ""]
    (tmp_path / "a.fcsv").write_text(fcsv(points, "LPS"))
    map_points(result, tmp_path / "a.fcsv", tmp_path / "b.fcsv", of)
    said = [line.split(",")[12] for line in (tmp_path / "b.fcsv").read_text().splitlines()[3:]]
    assert "expected_error_mm 0.8" in said[0]
    (tmp_path / "c.fcsv").write_text(fcsv(points[3:], "LPS"))
    map_points(result, tmp_path / "c.fcsv", tmp_path / "d.fcsv", of)
    assert "jacobian" in (tmp_path / "d.fcsv").read_text() and "expected" not in (tmp_path / "d.fcsv").read_text()


def test_the_expected_error_of_a_result_without_transforms_is_that_of_its_image(tmp_path: Path, result: Path) -> None:
    for kind in ("displacement-field", "expected-error"):
        (tmp_path / "images" / kind).mkdir(parents=True)
    write_field(tmp_path / "images" / "displacement-field" / "a.nrrd", FIXED, [WAVY.field(FIXED)], "itk")
    (tmp_path / "results.json").write_text("{}")
    assert read_result(tmp_path).expected_error_at(POINTS) is None
    fine = EXPECTED.grid.resized((30, 30, 30))
    write_image(tmp_path / "images" / "expected-error" / "a.nrrd", EXPECTED.at(fine), fine)
    found, expected = (read_result(folder).expected_error_at(POINTS) for folder in (tmp_path, result))
    np.testing.assert_allclose(found, expected, atol=0.06)


def test_slicers_files_keep_all_but_positions_and_empty_descriptions(tmp_path: Path, result: Path) -> None:
    map_points(result, written(tmp_path, "lps.fcsv")[0], tmp_path / "b.fcsv", "fixed")
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("lps.fcsv", "b.fcsv"))
    assert before[:3] == after[:3]
    cells = [line.split(",") for line in after[3:]]
    assert [row[0] for row in cells] == ["f_0", "f_1", "f_2", "f_3"]
    assert cells[0][12].startswith("in_lungs yes; jacobian ") and cells[1][12] == "1"
    map_points(result, written(tmp_path, "ras.mrk.json")[0], tmp_path / "b.mrk.json", "fixed")
    points = json.loads((tmp_path / "b.mrk.json").read_text())["markups"][0]["controlPoints"]
    assert points[-1] == {"id": "9", "position": [0, 0, 0], "positionStatus": "undefined"}
    assert points[0]["label"] == "F-0" and points[0]["description"].startswith("in_lungs yes")


def test_a_surface_keeps_its_triangles(tmp_path: Path, result: Path) -> None:
    for name in ("ascii.vtk", "binary.vtk"):
        source, ras = written(tmp_path, name)
        map_points(result, source, tmp_path / f"b_{name}", "fixed", ras)
        content = source.read_bytes()
        tail = content[content.index(b"\nPOLYGONS") :]
        assert (tmp_path / f"b_{name}").read_bytes().endswith(tail)
    map_points(result, written(tmp_path, "binary.stl")[0], tmp_path / "b.stl", "fixed")
    facet = np.frombuffer((tmp_path / "b.stl").read_bytes()[84:96], "<f4")
    assert np.linalg.norm(facet) == pytest.approx(1)
    a, b, c = read_points(tmp_path / "b.stl").points_mm
    assert abs(facet @ (b - a)) + abs(facet @ (c - a)) < 1e-3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "a,b,c\n1,2,3\n", "columns a, b, c"),
        ("a.csv", "x,y,z\n1,2,three\n", "three"),
        ("a.csv", "x,y,z\n1,2,nan\n", "no number"),
        ("a.csv", "x,y,z\n1,2\n", "expected points in mm"),
        ("a.csv", "x,y,z\n", "no points"),
        ("a.csv", "", "expected points in mm"),
        ("a.fcsv", "# columns = id,x,y,z\na,1,2,3\n", "neither LPS nor RAS"),
        ("a.mrk.json", "{}", "markups"),
        ("a.mrk.json", "[", "expected points in mm"),
        ("a.vtk", "# vtk DataFile Version 4.2\nx\nASCII\nDATASET POLYDATA\nPOINTS 2 float\n1 2 3 4\n", "4 of 6"),
        ("a.vtk", "nonsense", "legacy VTK"),
        ("a.stl", "nonsense", "STL"),
        ("a.txt", "1 2 3", ", ".join(ENDINGS)),
    ],
)
def test_what_is_no_list_of_points_is_refused(
    tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str], name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    assert lungreg("points", result, tmp_path / name, tmp_path / f"out_{name}", "--from", "fixed") == 2
    said = capfd.readouterr().err
    assert says in said and str(tmp_path / name) in said.replace("out_", "") and "Traceback" not in said
    assert not (tmp_path / f"out_{name}").exists()


def test_no_file_is_replaced_unless_told_to(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, _ = written(tmp_path, "a.csv")
    out = tmp_path / "b.csv"
    out.write_text("mine")
    for arguments, says in (
        ([source, out], "b.csv: is there already"),
        ([source, source, "--overwrite"], "a.csv: is what is read"),
        ([source, tmp_path / "b.fcsv"], "is of another kind than a.csv"),
        ([source, tmp_path / "nowhere" / "b.csv"], "its folder is not there"),
        ([tmp_path / "c.csv", tmp_path / "d.csv"], "c.csv: cannot be read"),
    ):
        assert lungreg("points", result, *arguments, "--from=moving") == 2
        assert says in capfd.readouterr().err
    assert out.read_text() == "mine"
    assert lungreg("points", result, source, out, "--from=moving", "--overwrite") == 0
    assert "in_lungs" in out.read_text()


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("fixed", "4 points of the fixed scan (now.mha) were carried to their places in the moving scan (before.mha)"),
        ("moving", "4 points of the moving scan (before.mha) were carried to their places in the fixed scan (now.mha)"),
    ],
)
def test_it_says_in_words_which_way(
    tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str], of: Scan, says: str
) -> None:
    source, _ = written(tmp_path, "a.csv")
    assert lungreg("points", result, source, tmp_path / "b.csv", "--from", of) == 0
    assert says in capfd.readouterr().out


def test_the_direction_must_be_said(tmp_path: Path, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, _ = written(tmp_path, "a.csv")
    assert lungreg("points", result, source, tmp_path / "b.csv") == 2
    assert "--from" in capfd.readouterr().err

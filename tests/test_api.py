"""The registration from Python: the same as the command's, for scans in files and in memory."""

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import algorithm
from algorithm.errors import InputError
from algorithm.files.images import read_image
from algorithm.given import scan
from algorithm.results.ownership import TRANSFORMS
from tests.support.grids import sitk_image
from tests.support.made_up_results import FIXED, FIXED_LUNGS, MOVING, blobs, points_in, write_result
from tests.support.running import call_main, coarsely, files_below, lungreg, pair_options, results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def registrar(small_weights: Path) -> algorithm.Registrar:
    return algorithm.Registrar(small_weights, "cpu")


@pytest.fixture(scope="module")
def registration(example: Path, registrar: algorithm.Registrar) -> algorithm.Registration:
    with coarsely("algorithm.registration"):
        return registrar.register(example / "fixed.mha", example / "moving.mha", refine="off")


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> Path:
    out = tmp_path_factory.mktemp("command")
    assert call_main(*pair_options(example, out, small_weights), "--transforms=on", "--names=kind", "--report=on") == 0
    return out


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, algorithm; print(sorted({'torch', 'SimpleITK', 'numpy', 'cyclopts'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert set(algorithm.__all__) == {"Registrar", "Registration", "__version__", "load", "register"}
    with pytest.raises(AttributeError, match="nonsense"):
        algorithm.nonsense  # noqa: B018


def test_what_it_saves_is_what_the_command_writes(
    tmp_path: Path, registration: algorithm.Registration, by_command: Path
) -> None:
    registration.save(tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(by_command)
    for name in files_below(by_command) - {"results.json", "report.html"}:  # these two say when
        assert (tmp_path / "out" / name).read_bytes() == (by_command / name).read_bytes(), name
    ours, theirs = results(tmp_path / "out"), results(by_command)
    for out, said in ((tmp_path / "out", ours), (by_command, theirs)):  # as seen from each folder
        assert {name: (out / path).resolve().name for name, path in said["paths"].items()} == {
            "fixed": "fixed.mha",
            "moving": "moving.mha",
        }
    changing = ("timings_s", "peak_memory_mb", "paths")
    assert {k: v for k, v in ours.items() if k not in changing} == {
        k: v for k, v in theirs.items() if k not in changing
    }
    registration.save(tmp_path / "out", transforms=False)  # in place of the earlier one
    assert not any((tmp_path / "out" / name).exists() for name in TRANSFORMS)
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(InputError, match="was not written by this program"):
        registration.save(tmp_path / "out")


def test_what_is_loaded_maps_as_what_was_just_done(registration: algorithm.Registration, by_command: Path) -> None:
    loaded, grid = algorithm.load(by_command), registration._result.transform.grid
    points = points_in(grid)
    np.testing.assert_allclose(loaded.to_moving(points), registration.to_moving(points), atol=1e-3)
    np.testing.assert_allclose(loaded.to_fixed(points), registration.to_fixed(points), atol=1e-3)
    np.testing.assert_allclose(loaded.jacobian_at(points), registration.jacobian_at(points), atol=1e-3)
    np.testing.assert_array_equal(loaded.in_lungs(points, "fixed"), registration.in_lungs(points, "fixed"))
    assert loaded.quality["quality"] == registration.quality["quality"]
    for what in ("sitk_transform", "inverse"):
        of = getattr(loaded, what)(), getattr(registration, what)()
        for point in points[:20].tolist():
            np.testing.assert_allclose(of[0].TransformPoint(point), of[1].TransformPoint(point), atol=1e-3)
    with pytest.raises(InputError, match="was loaded"):
        loaded.save("anywhere")
    with pytest.raises(InputError, match="was loaded"):
        loaded.warp()


def test_the_moving_scan_comes_onto_the_fixed_one(registration: algorithm.Registration, by_command: Path) -> None:
    found = registration.warp()
    written = sitk.ReadImage(str(next((by_command / "images" / "warped-moving").glob("*.mha"))))
    assert (found.GetSize(), found.GetSpacing(), found.GetOrigin()) == (
        written.GetSize(),
        written.GetSpacing(),
        written.GetOrigin(),
    )
    ours, theirs = sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(written)
    index = np.argwhere(np.ones(ours.shape))[:, ::-1]
    points = [found.TransformIndexToPhysicalPoint(voxel) for voxel in index.tolist()]
    inside = registration.in_lungs(points, "fixed")
    assert inside is not None and 500 < inside.sum() < 0.5 * inside.size  # beyond the field they differ
    assert ours.dtype == theirs.dtype and np.abs(ours - theirs).ravel()[inside].max() <= 1


def test_scans_in_memory_are_those_in_files(
    example: Path, registrar: algorithm.Registrar, by_command: Path, tmp_path: Path
) -> None:
    fixed, moving = (sitk.ReadImage(str(example / f"{name}.mha")) for name in ("fixed", "moving"))
    with coarsely("algorithm.registration"):
        found = registrar.register(fixed, moving, refine="off")
    points = points_in(found._result.transform.grid)
    expected = algorithm.load(by_command).to_moving(points)
    np.testing.assert_allclose(found.to_moving(points), expected, atol=1e-3)
    found.save(tmp_path / "out")
    assert results(tmp_path / "out")["fixed"] == "fixed"


def test_masks_in_memory_count(example: Path, registrar: algorithm.Registrar) -> None:
    masks = [example / "fixed_lobes.mha", example / "moving_lobes.mha"]
    with coarsely("algorithm.registration"):
        found = [
            registrar.register(example / "fixed.mha", example / "moving.mha", "off", *given)
            for given in (masks, [sitk.ReadImage(str(path)) for path in masks])
        ]
    points = points_in(found[0]._result.transform.grid)
    np.testing.assert_allclose(found[0].to_moving(points), found[1].to_moving(points), atol=1e-6)


@pytest.mark.parametrize("grid", [FIXED, MOVING])
def test_images_of_nibabel_lie_where_simpleitk_puts_them(tmp_path: Path, grid: algorithm.geometry.Grid) -> None:
    given = sitk_image(blobs(grid, "int16"), grid)
    sitk.WriteImage(given, str(tmp_path / "a.nii.gz"))
    by_file = read_image(tmp_path / "a.nii.gz")
    for found in (scan(given, "x"), scan(nibabel.load(tmp_path / "a.nii.gz"), "x")):
        assert (found.voxels == by_file.voxels).all() and found.voxels.dtype == by_file.voxels.dtype
        assert found.grid.size == grid.size
        np.testing.assert_allclose(found.grid.origin, grid.origin, atol=1e-4)
        np.testing.assert_allclose(found.grid.axes, grid.axes, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (7, "fixed: is a int"),
        (sitk.Image((20, 20), sitk.sitkInt16), r"fixed: has size \(20, 20\)"),
        (sitk.Image((20, 20, 3), sitk.sitkInt16), "fixed: has .* voxels"),
        (nibabel.Nifti1Image(np.zeros((20, 20, 20, 2), np.int16), np.eye(4)), "fixed: has the shape"),
        ("nowhere.mha", "nowhere.mha"),
    ],
)
def test_what_is_no_scan_is_refused(registrar: algorithm.Registrar, given: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        registrar.register(given, given)


def test_labels_and_points_are_checked(tmp_path: Path) -> None:
    loaded = algorithm.load(write_result(tmp_path / "result"))
    labels = sitk_image(blobs(MOVING, "uint8"), MOVING)
    sitk.WriteImage(labels, str(tmp_path / "a.mha"))
    options = ("--onto=fixed", "--interpolation=nearest")
    assert lungreg("apply", tmp_path / "result", tmp_path / "a.mha", tmp_path / "b.mha", *options) == 0
    by_command = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "b.mha")))
    for given in (labels, tmp_path / "a.mha", str(tmp_path / "a.mha")):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(loaded.warp_labels(given)), by_command)
    assert loaded.warp(labels, onto="moving", reference=labels).GetSize() == MOVING.size
    with pytest.raises(InputError, match=r"expected \(n, 3\)"):
        loaded.to_fixed([[1.0, 2.0]])
    jacobian = loaded.jacobian()
    point = FIXED_LUNGS.grid.to_world(np.array([[10, 10, 10]]))
    x, y, z = jacobian.TransformPhysicalPointToIndex(point[0].tolist())
    here = np.array([jacobian.TransformIndexToPhysicalPoint((x, y, z))])
    assert jacobian[x, y, z] == pytest.approx(loaded.jacobian_at(here)[0], abs=0.01)


CHOICES = """
import algorithm
for wrong in ({"refine": "quick"}, {"device": "gpu"}):
    try:
        algorithm.register("none.mha", "none.mha", **wrong)
    except ValueError as error:
        print(error)
"""


def test_what_is_no_choice_is_refused_before_anything_is_read() -> None:
    """In a process of its own: here the checks of types that tests add would refuse it."""
    done = subprocess.run([sys.executable, "-c", CHOICES], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [
        "refine is 'quick', expected off, fast or full",
        "device is 'gpu', expected auto, cuda or cpu",
    ]

"""Data sets in their original formats: a landmark lies on the voxel it named, and bad files leave nothing behind."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from algorithm.cascade.network import CascadeSettings
from algorithm.geometry import Affine
from algorithm.preparation import prepare
from tests.support.running import files_below
from training import data
from training.data import load_validation_pair, pack_pair
from training.datasets.__main__ import main
from training.datasets.dirlab import COPDGENE, FOUR_D_CT, read_landmarks

SHARED = Path(__file__).parents[2] / "shared" / "data"
COPD_LANDMARKS = SHARED / "landmarks" / "dirlab_copd"
COLUMNS, SLICES, PIXEL_MM = 18, 21, 1.5
GRID_8_MM = (36, 30, 34)
Sides = tuple[np.ndarray, np.ndarray]


def convert(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Half air, half tissue, in HU; hardly a value occurs twice."""
    generator = np.random.default_rng(seed)
    air = generator.random(shape) < 0.5
    return np.where(air, generator.integers(-1024, -700, shape), generator.integers(-100, 3000, shape)).astype(np.int16)


def some_voxels(size: tuple[int, int, int], seed: int) -> np.ndarray:
    """Indices (x, y, z) from 0: two opposite corners, and others."""
    inner = np.random.default_rng(seed).integers(0, size, (30, 3))
    return np.vstack([np.zeros((1, 3), dtype=int), np.array([size]) - 1, inner])


def check_landmarks(pair: Path, voxels: Sides, index: Sides) -> None:
    """Seen through SimpleITK, row i of the landmarks is the centre of a voxel with the value at ``index[i]``."""
    for name, array, points in zip(("fixed", "moving"), voxels, index, strict=True):
        image = sitk.ReadImage(str(pair / f"{name}.mha"))
        assert image.GetPixelID() == sitk.sitkInt16
        landmarks = pd.read_csv(pair / f"{name}_landmarks.csv")
        assert list(landmarks.columns) == ["x", "y", "z"] and len(landmarks) == len(points)
        for world, (x, y, z) in zip(landmarks.to_numpy().tolist(), points.tolist(), strict=True):
            found = np.array(image.TransformPhysicalPointToContinuousIndex(world))
            assert np.abs(found - found.round()).max() < 1e-3
            assert image.GetPixel(*found.round().astype(int).tolist()) == array[z, y, x]


# --- DIR-Lab ---------------------------------------------------------------------------------------------------------

FOUR_D_NAMES = {
    1: ("Case1Pack/Images/case1_T{}_s.img", "Case1Pack/ExtremePhases/Case1_300_T{}_xyz.txt", "00", "50"),
    2: ("Case2Pack/Images/case2_T{}-ssm.img", "Case2Pack/ExtremePhases/Case2_300_T{}_xyz.txt", "00", "50"),
    8: ("Case8Deploy/Images/case8_T{}.img", "Case8Deploy/extremePhases/case8_dirLab300_T{}_xyz.txt", "00", "50"),
}
COPD_NAMES = ("copd7/copd7/copd7_{}BHCT.img", "copd7/copd7/copd7_300_{}BH_xyz_r1.txt", "i", "e")


def write_case(
    source: Path, image: str, landmarks: str, fixed: str, moving: str, head: str = ""
) -> tuple[Sides, Sides]:
    """The files of a small case; its voxels in HU and its landmarks from 0."""
    size = (COLUMNS, COLUMNS, SLICES)
    voxels = noise(size[::-1], 0), noise(size[::-1], 1)
    index = some_voxels(size, 0), some_voxels(size, 1)
    for side, hu, points in zip((fixed, moving), voxels, index, strict=True):
        for name in (image, landmarks):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
        (hu + 1024).astype("<i2").tofile(source / image.format(side))
        rows = "\n".join("\t ".join(f"{v:.6f}" for v in row) for row in points + 1)
        (source / landmarks.format(side)).write_text(f"{head}{rows}\n")
    return voxels, index


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for cases in (FOUR_D_CT.cases, COPDGENE.cases):
        for case in cases:
            monkeypatch.setitem(cases, case, (COLUMNS, SLICES, PIXEL_MM))


@pytest.mark.parametrize("case", FOUR_D_NAMES)
def test_dirlab_4dct_landmarks_stay_on_their_voxels(tmp_path: Path, case: int, small_cases: None) -> None:
    voxels, index = write_case(tmp_path / "in", *FOUR_D_NAMES[case])
    (tmp_path / "in" / "notes.txt").write_text("other files do no harm")
    assert convert("dirlab4dct", tmp_path / "in", tmp_path / "out") == 0
    pair = tmp_path / "out" / f"dirlab4dct_{case:02d}"
    assert files_below(tmp_path / "out") == {
        f"{pair.name}/{name}{ending}" for name in ("fixed", "moving") for ending in (".mha", "_landmarks.csv")
    }
    check_landmarks(pair, voxels, index)


@pytest.mark.parametrize("head", ["", "index \n32\n "])
def test_dirlab_copdgene_in_both_directions(tmp_path: Path, head: str, small_cases: None) -> None:
    voxels, index = write_case(tmp_path / "in", *COPD_NAMES, head=head)
    assert convert("copdgene", tmp_path / "in", tmp_path / "out") == 0
    check_landmarks(tmp_path / "out" / "dirlab_copdgene_07", voxels, index)
    assert convert("copdgene", tmp_path / "in", tmp_path / "out", "--swap") == 0
    check_landmarks(tmp_path / "out" / "dirlab_copdgene_07_swapped", voxels[::-1], index[::-1])


def test_dirlab_scans_are_in_hu_and_lps(tmp_path: Path, small_cases: None) -> None:
    voxels, _ = write_case(tmp_path / "in", *FOUR_D_NAMES[1])
    raw = (voxels[0] + 1024).astype("<i2")
    raw[0, 0, 0] = -2000  # nothing was reconstructed there
    raw.tofile(tmp_path / "in" / FOUR_D_NAMES[1][0].format("00"))
    assert convert("dirlab4dct", tmp_path / "in", tmp_path / "out") == 0
    image = sitk.ReadImage(str(tmp_path / "out" / "dirlab4dct_01" / "fixed.mha"))
    assert image.GetSpacing() == (PIXEL_MM, PIXEL_MM, 2.5)
    array = sitk.GetArrayFromImage(image)
    assert array[0, 0, 0] == -1024
    assert (array.ravel()[1:] == voxels[0].ravel()[1:]).all()
    # right to left, front to back, head to feet
    start, end = (np.array(image.TransformIndexToPhysicalPoint(i)) for i in ((0, 0, 0), (4, 6, 8)))
    assert (end - start).tolist() == [4 * PIXEL_MM, 6 * PIXEL_MM, -8 * 2.5]


def test_real_size(tmp_path: Path) -> None:
    size = (256, 256, 94)
    image, landmarks, *sides = FOUR_D_NAMES[1]
    raw = np.arange(np.prod(size)).astype("<i2") % 3000
    for side in sides:
        for name, content in ((image, raw.tobytes()), (landmarks, b"256 256 94\n")):
            path = tmp_path / "in" / name.format(side)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    assert convert("dirlab4dct", tmp_path / "in", tmp_path / "out") == 0
    last = sitk.ReadImage(str(tmp_path / "out" / "dirlab4dct_01" / "moving.mha"))[255, 255, 93]
    assert last == max(int(raw[-1]) - 1024, -1024)


PUBLISHED_COPDGENE_MM = {1: 26.33, 2: 21.79, 3: 12.64, 4: 29.58}


@pytest.mark.real
@pytest.mark.skipif(not COPD_LANDMARKS.is_dir(), reason="needs the DIR-Lab landmarks in ../shared/data")
@pytest.mark.parametrize("case", PUBLISHED_COPDGENE_MM)
def test_published_errors_before_registration(case: int) -> None:
    inhale, exhale = (read_landmarks(COPD_LANDMARKS / f"copd{case}_300_{phase}BH_xyz_r1.txt") for phase in ("i", "e"))
    grid = COPDGENE.grid(case)
    assert len(inhale) == len(exhale) == 300
    for points in (inhale, exhale):
        assert (points >= 0).all() and (points < grid.size).all()
    motion = grid.to_world(exhale) - grid.to_world(inhale)
    assert np.linalg.norm(motion, axis=1).mean() == pytest.approx(PUBLISHED_COPDGENE_MM[case], abs=0.006)
    # with the head at +z, the lowest third of the lungs is wider than the highest one, and moves more
    world = grid.to_world(inhale)
    low, high = (world[:, 2] < np.quantile(world[:, 2], 1 / 3)), (world[:, 2] > np.quantile(world[:, 2], 2 / 3))
    assert world[low, 0].std() > 1.2 * world[high, 0].std()
    assert np.linalg.norm(motion[low], axis=1).mean() > 1.1 * np.linalg.norm(motion[high], axis=1).mean()


@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "pairs").is_dir(), reason="needs the DIR-Lab pairs in ../shared/data")
@pytest.mark.parametrize("case", [1, 2, 3, 5])
def test_spacings_fit_landmarks_placed_on_voxels(case: int) -> None:
    points = pd.read_csv(SHARED / "pairs" / f"dirlab4dct_{case:02d}" / "fixed_landmarks.csv").to_numpy()
    steps = (points - points[0]) / FOUR_D_CT.grid(case).spacing
    assert np.abs(steps - steps.round()).max() < 1e-3


# --- files with a header ---------------------------------------------------------------------------------------------


def write_scan(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((8.0, 7.0, 9.0))
    image.SetOrigin((5.0, -20.0, 100.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # as Learn2Reg's
    sitk.WriteImage(image, str(path))


def write_named(source: Path, images: str, masks: str, endings: tuple[str, str]) -> Sides:
    """Two scans and their masks, everything asymmetric; the voxels in HU."""
    voxels = noise(GRID_8_MM[::-1], 2), noise(GRID_8_MM[::-1], 3)
    for shift, (ending, array) in enumerate(zip(endings, voxels, strict=True)):
        lungs = np.zeros(array.shape, dtype=np.uint8)
        lungs[4:16, 3:14, 6 + shift : 25] = 1
        write_scan(source / images / ending, array)
        write_scan(source / masks / ending, lungs)
    return voxels


def check_mask(pair: Path, name: str, source: Path) -> None:
    """In the world, the written mask is the one in ``source``."""
    expected = sitk.ReadImage(str(source))
    written = sitk.ReadImage(str(pair / f"{name}_lung_mask.mha"))
    there = sitk.Resample(written, expected, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert sitk.GetArrayFromImage(expected).any()
    assert (sitk.GetArrayFromImage(there) == sitk.GetArrayFromImage(expected)).all()


CHALLENGE = ("imagesTr", "masksTr", ("LungCT_0001_0000.nii.gz", "LungCT_0001_0001.nii.gz"))
ZENODO = ("scans", "lungMasks", ("case_001_exp.nii.gz", "case_001_insp.nii.gz"))


@pytest.mark.parametrize("layout", [CHALLENGE, ZENODO])
def test_learn2reg(tmp_path: Path, layout: tuple[str, str, tuple[str, str]]) -> None:
    source, (images, masks, endings) = tmp_path / "in", layout
    voxels = write_named(source, *layout)
    index = some_voxels(GRID_8_MM, 2), some_voxels(GRID_8_MM, 3)
    tables = {"keypoints/case_001.csv": np.hstack(index)}
    if layout is CHALLENGE:
        tables = {f"keypointsTr/LungCT_0001_000{i}.csv": points for i, points in enumerate(index)}
    for name, table in tables.items():
        (source / name).parent.mkdir(exist_ok=True)
        np.savetxt(source / name, table, delimiter=",", fmt="%.3f")
    name = "LungCT_0001" if layout is CHALLENGE else "case_001"

    assert convert("learn2reg", source, tmp_path / "plain") == 0
    endings_of_one = {".mha", "_lung_mask.mha"}
    assert files_below(tmp_path / "plain") == {f"{name}/{n}{e}" for n in ("fixed", "moving") for e in endings_of_one}
    assert convert("learn2reg", source, tmp_path / "out", "--keypoints") == 0
    check_landmarks(tmp_path / "out" / name, voxels, index)
    for side, ending in zip(("fixed", "moving"), endings, strict=True):
        check_mask(tmp_path / "out" / name, side, source / masks / ending)
        written, original = (
            sitk.ReadImage(str(p)) for p in (tmp_path / "out" / name / f"{side}.mha", source / images / ending)
        )
        assert np.allclose(written.GetOrigin(), original.GetOrigin(), atol=1e-4)
        assert written.GetDirection() == original.GetDirection()


def test_empire10(tmp_path: Path) -> None:
    write_named(tmp_path / "in", "scans", "lungMasks", ("03_Fixed.mhd", "03_Moving.mhd"))
    assert convert("empire10", tmp_path / "in", tmp_path / "out") == 0
    check_mask(tmp_path / "out" / "empire10_03", "moving", tmp_path / "in" / "lungMasks" / "03_Moving.mhd")
    fixed = [sitk.ReadImage(str(tmp_path / p)) for p in ("out/empire10_03/fixed.mha", "in/scans/03_Fixed.mhd")]
    assert (sitk.GetArrayFromImage(fixed[0]) == sitk.GetArrayFromImage(fixed[1])).all()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of two subjects, one with a mask, and below IN the files that it names."""
    for name, seed in (("a/insp.nrrd", 4), ("a/exp.nii.gz", 5), ("b/1.mha", 6), ("b/2.mha", 7)):
        array = noise(GRID_8_MM[::-1], seed)
        write_scan(tmp_path / "in" / name, array.astype(np.float32) + 0.25 if name == "b/1.mha" else array)
    lungs = np.zeros(GRID_8_MM[::-1], dtype=np.uint8)
    lungs[4:16, 3:14, 6:25] = 1
    write_scan(tmp_path / "in" / "a" / "lobes.nii.gz", lungs)
    path = tmp_path / "table.csv"
    path.write_text(
        "subject,fixed,moving,moving_mask\nA-1,a/insp.nrrd,a/exp.nii.gz,a/lobes.nii.gz\nB,b/1.mha,b/2.mha\n"
    )
    return path


def test_table(tmp_path: Path, table: Path) -> None:
    assert convert("pairs", "--table", table, tmp_path / "in", tmp_path / "out") == 0
    files = {"A-1/fixed.mha", "A-1/moving.mha", "A-1/moving_lung_mask.mha", "B/fixed.mha", "B/moving.mha"}
    assert files_below(tmp_path / "out") == files
    check_mask(tmp_path / "out" / "A-1", "moving", tmp_path / "in" / "a" / "lobes.nii.gz")
    rounded = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "B" / "fixed.mha")))
    assert rounded.dtype == np.int16 and (rounded == noise(GRID_8_MM[::-1], 6)).all()


def test_a_converted_pair_can_be_packed(
    tmp_path: Path, example: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phantom in Learn2Reg's format: its landmarks come back in the packed pair."""
    expected = []
    for i, name in enumerate(("fixed", "moving")):
        image = sitk.ReadImage(str(example / f"{name}.mha"))
        for folder in ("imagesTr", "keypointsTr"):
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "in" / "imagesTr" / f"P_0001_000{i}.nii.gz"))
        expected.append(pd.read_csv(example / f"{name}_landmarks.csv").to_numpy())
        index = [image.TransformPhysicalPointToContinuousIndex(point) for point in expected[-1].tolist()]
        np.savetxt(tmp_path / "in" / "keypointsTr" / f"P_0001_000{i}.csv", index, delimiter=",")
    assert convert("learn2reg", "--keypoints", tmp_path / "in", tmp_path / "out") == 0
    monkeypatch.setattr(data, "CascadeSettings", lambda: CascadeSettings(network_size=(32, 24, 32)))
    monkeypatch.setattr(prepare, "prealign", lambda *_: Affine())
    pack_pair(tmp_path / "out" / "P_0001", tmp_path / "pair.npz")
    pair = load_validation_pair(tmp_path / "pair.npz")
    assert np.allclose(pair.fixed_landmarks_mm, expected[0], atol=1e-3)
    assert np.allclose(pair.moving_landmarks_mm, expected[1], atol=1e-3)


# --- what is there already, and what is wrong ------------------------------------------------------------------------


def test_pairs_in_the_output_are_left_alone(tmp_path: Path, table: Path) -> None:
    (tmp_path / "out" / "B").mkdir(parents=True)
    (tmp_path / "out" / ".partial-A-1").mkdir()
    (tmp_path / "out" / ".partial-A-1" / "from a run that was killed").touch()
    assert convert("pairs", "--table", table, tmp_path / "in", tmp_path / "out") == 0
    assert files_below(tmp_path / "out") == {"A-1/fixed.mha", "A-1/moving.mha", "A-1/moving_lung_mask.mha"}


def check_refused(capsys: pytest.CaptureFixture[str], out: Path, expected: str, *arguments: object) -> None:
    assert convert(*arguments, out) == 2
    message = capsys.readouterr().err
    assert expected in message and "expected" in message and message.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def edited(name: str, edit: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda source: (source / name).write_text(edit((source / name).read_text()))


def in_front(fixed: str, moving: str) -> Callable[[Path], object]:
    """One more landmark, before all others."""
    lines = ((FIXED_POINTS, fixed), (MOVING_POINTS, moving))
    return lambda source: [edited(name, partial("{}\n{}".format, line))(source) for name, line in lines]


FIXED_IMAGE, MOVING_IMAGE = (FOUR_D_NAMES[1][0].format(phase) for phase in ("00", "50"))
FIXED_POINTS, MOVING_POINTS = (FOUR_D_NAMES[1][1].format(phase) for phase in ("00", "50"))
DIRLAB_FAULTS: dict[str, Callable[[Path], object]] = {
    "there is none": lambda source: (source / MOVING_IMAGE).unlink(),
    "Case1_300_T50_xyz.txt and": lambda s: (s / "Case1_300_T50_xyz.txt").write_text("1 1 1\n"),
    f"has {2 * COLUMNS**2 * SLICES - 2} bytes": lambda s: (s / MOVING_IMAGE).write_bytes(
        (s / MOVING_IMAGE).read_bytes()[:-2]
    ),
    "0.0% above -200 HU": lambda s: (s / MOVING_IMAGE).write_bytes(bytes(2 * COLUMNS**2 * SLICES)),
    "32 fixed and 31 moving landmarks": edited(MOVING_POINTS, lambda text: text.split("\n", 1)[1]),
    "landmark 1 at voxel (0.0, 0.0, 21.0)": in_front("1 1 21", "1 1 22"),
    "landmark 1 at voxel (-1.0, 4.0, 4.0)": in_front("1 5 5", "0 5 5"),
    "a line that is no landmark": edited(FIXED_POINTS, lambda text: text + "1 2\n"),
    "an array (0,)": edited(FIXED_POINTS, lambda text: ""),
    "holds 32 landmarks, expected 300": edited(FIXED_POINTS, lambda text: f"index\n300\n{text}"),
}


@pytest.mark.parametrize("message", DIRLAB_FAULTS)
def test_faulty_dirlab_case(
    tmp_path: Path, message: str, small_cases: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "in", *FOUR_D_NAMES[1])
    DIRLAB_FAULTS[message](tmp_path / "in")
    check_refused(capsys, tmp_path / "out", message, "dirlab4dct", tmp_path / "in")


def test_wrong_offset(tmp_path: Path, small_cases: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path / "in", *FOUR_D_NAMES[1])
    check_refused(capsys, tmp_path / "out", "--hu-offset", "dirlab4dct", "--hu-offset", 0, tmp_path / "in")


@pytest.mark.parametrize("name", ["dirlab4dct", "copdgene", "learn2reg", "empire10"])
def test_nothing_there(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(capsys, tmp_path / "out", "holds no pair", name, tmp_path / "in")


NAMED_FAULTS: dict[str, Callable[[Path], object]] = {
    "LungCT_0001_0001.nii.gz: is missing": lambda s: (s / "imagesTr" / "LungCT_0001_0001.nii.gz").unlink(),
    "LungCT_0001_0000.nii.gz: is missing": lambda s: (s / "masksTr" / "LungCT_0001_0000.nii.gz").unlink(),
    "LungCT_0001_0000.csv: is missing": lambda s: None,
    "is no table of numbers": lambda s: [
        (s / "keypointsTr").mkdir(),
        (s / "keypointsTr" / "LungCT_0001_0000.csv").write_text("x,y,z\n1,2,3\n"),
    ],
    "expected finite numbers in columns 1 to 3": lambda s: [
        (s / "keypointsTr").mkdir(),
        (s / "keypointsTr" / "LungCT_0001_0000.csv").write_text("1,2\n3,4\n"),
    ],
}


@pytest.mark.parametrize("message", NAMED_FAULTS)
def test_faulty_learn2reg(tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_named(tmp_path / "in", *CHALLENGE)
    NAMED_FAULTS[message](tmp_path / "in")
    check_refused(capsys, tmp_path / "out", message, "learn2reg", "--keypoints", tmp_path / "in")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,fixed\nA,a/exp.nii.gz\n", "has the columns subject,fixed,"),
        ("", "is no table"),
        ("subject,fixed,moving\n../A,b/1.mha,b/2.mha\n", "names the subject '../A'"),
        ("subject,fixed,moving\nA,b/1.mha,b/2.mha\nA,b/1.mha,b/2.mha\n", "names the subject 'A'"),
        ("subject,fixed,moving\nA,b/1.mha,a\n", "a DICOM series must be converted"),
        ("subject,fixed,moving\nA,b/1.mha,b/3.mha\n", "3.mha: is missing"),
        ("subject,fixed,moving,fixed_mask\nA,b/1.mha,b/2.mha,c.mha\n", "c.mha: is missing"),
    ],
)
def test_faulty_table(tmp_path: Path, table: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    table.write_text(text)
    check_refused(capsys, tmp_path / "out", message, "pairs", "--table", table, tmp_path / "in")

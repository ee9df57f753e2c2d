"""``lungreg dicom``: the object's own equation says where points go; contours and dose are carried as images are."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from algorithm.errors import InputError
from algorithm.files.images import read_grid
from algorithm.geometry import Grid
from algorithm.radiotherapy.dicomobjects import (
    DOSE,
    Reference,
    decimal,
    mapped_by,
    new_object,
    read_dose,
    read_reference,
    write_object,
)
from algorithm.radiotherapy.structuresets import Structure, outlines, read_structures, shares, structure_set
from algorithm.results.result import read_result
from tests.support.dicom_series import write_series
from tests.support.grids import sitk_image
from tests.support.made_up_results import FIXED, FIXED_LUNGS, MOVING, MOVING_LUNGS, blobs, points_in, write_result
from tests.support.plastimatch import needs_plastimatch, plastimatch
from tests.support.running import lungreg
from tests.support.strategies import examples

pytestmark = pytest.mark.usefixtures("one_thread")

PROPERTY = examples(200)
TAGS = {"0010|0010": "Doe^Jane", "0010|0020": "7", "0020|000d": "1.2.3"}
FRAMES = {"later": "1.2.3.100", "earlier": "1.2.3.200"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that was made up, the DICOM series of both scans, and their grids as DICOM has them."""
    folder = tmp_path_factory.mktemp("case")
    write_result(folder / "result")
    for name, grid, number in (("later", FIXED, "5"), ("earlier", MOVING, "6")):
        tags = TAGS | {"0020|0052": FRAMES[name], "0020|000e": f"1.2.3.{number}"}
        write_series(folder / name, sitk_image(blobs(grid, "int16"), grid), tags)
    figures = json.loads((folder / "result" / "results.json").read_text())
    figures["grids"] = {
        scan: asdict(read_grid(folder / name)) for scan, name in (("fixed", "later"), ("moving", "earlier"))
    }
    (folder / "result" / "results.json").write_text(json.dumps(figures))
    return folder


def call(case: Path, out: Path, *options: object) -> int:
    return lungreg("dicom", case / "result", out, f"--fixed={case / 'later'}", f"--moving={case / 'earlier'}", *options)


# --- the registration ------------------------------------------------------------------------------------------------


def test_the_object_takes_points_where_the_result_does(case: Path, tmp_path: Path) -> None:
    """By the standard's equation, at the grid's own points; both frames of reference are the right way round."""
    assert call(case, tmp_path / "out") == 0
    data = pydicom.dcmread(tmp_path / "out" / "registration.dcm")
    assert (data.Modality, str(data.PatientName), data.FrameOfReferenceUID) == ("REG", "Doe^Jane", FRAMES["later"])
    frames = [item.SourceFrameOfReferenceUID for item in data.DeformableRegistrationSequence]
    assert frames == [FRAMES["later"], FRAMES["earlier"]]
    result = read_result(case / "result")
    grid = result.transform.grid
    index = np.rint(grid.to_index(points_in(FIXED_LUNGS.grid, 300)))
    points = grid.to_world(index)
    expected = result.to_moving(points)
    assert np.linalg.norm(expected - points, axis=1).mean() > 5
    np.testing.assert_allclose(mapped_by(data, points), expected, atol=1e-3)
    slices = {str(pydicom.dcmread(path).SOPInstanceUID) for path in (case / "earlier").iterdir()}
    referenced = data.DeformableRegistrationSequence[1].ReferencedImageSequence
    assert {item.ReferencedSOPInstanceUID for item in referenced} == slices


@PROPERTY
@given(value=st.floats(-1e9, 1e9, allow_nan=False))
def test_decimal_strings_are_short_and_exact(value: float) -> None:
    text = decimal(value)
    assert len(text) <= 16 and float(text) == pytest.approx(value, rel=1e-8, abs=1e-9)


# --- structures ------------------------------------------------------------------------------------------------------


def ball(centre_mm: np.ndarray, radius_mm: float, grid: Grid) -> np.ndarray:
    """Shares: how much lies inside, to a voxel."""
    k, j, i = np.indices(grid.shape)
    distance = np.linalg.norm(grid.to_world(np.stack([i, j, k], axis=-1)) - centre_mm, axis=-1)
    return np.clip((radius_mm - distance) / min(grid.spacing) + 0.5, 0, 1).astype(np.float32)


def in_order(folder: Path, grid: Grid) -> list[str]:
    """The UIDs of the slices, from the first on."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    headers.sort(key=lambda header: grid.to_index(np.array(header.ImagePositionPatient, float))[2])
    return [str(header.SOPInstanceUID) for header in headers]


def test_contours_and_masks_have_the_volume_of_the_ball() -> None:
    grid, radius = Grid((60, 56, 30), (1.0, 1.0, 2.0), (-30.0, -28.0, 5.0)), 20.0
    values = ball(np.array([0.0, 0.0, 34.0]), radius, grid)
    contours = [contour for _, contour in outlines(values, grid)]
    back = shares(contours, grid)
    voxel, true = np.prod(grid.spacing), 4 / 3 * np.pi * radius**3
    area = sum(0.5 * abs(np.dot(c[:, 0], np.roll(c[:, 1], 1)) - np.dot(c[:, 1], np.roll(c[:, 0], 1))) for c in contours)
    assert area * grid.spacing[2] == pytest.approx(true, rel=0.02)
    assert back.sum() * voxel == pytest.approx(true, rel=0.02)
    assert np.abs(back - values)[values.round() == values].mean() < 0.02


def test_a_hole_is_left_out() -> None:
    grid = Grid((20, 20, 3))
    squares = [np.array([[a, a, 1.0], [b, a, 1.0], [b, b, 1.0], [a, b, 1.0]]) for a, b in ((3.5, 15.5), (6.5, 10.5))]
    found = shares(squares, grid)
    assert found[0].max() == found[2].max() == 0
    assert found.sum() == pytest.approx(12**2 - 4**2, abs=1)
    with pytest.raises(InputError, match="lies in no slice"):
        shares([squares[0] + [0, 0, 5]], grid)


def test_structures_are_carried_as_masks_are(case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A ball in the moving lungs: written, read, carried; SimpleITK carries its mask."""
    earlier = read_reference(case / "earlier")
    grid = read_grid(case / "earlier")
    centre = MOVING_LUNGS.grid.to_world(np.full(3, 12.5))
    before = ball(centre, 28.0, grid)
    drawn = Structure("GTV", [contour for _, contour in outlines(before, grid)], [255, 0, 0], "GTV")
    write_object(tmp_path / "RS.dcm", structure_set([drawn], grid, in_order(case / "earlier", grid), earlier))
    assert call(case, tmp_path / "out", f"--rtstruct={tmp_path / 'RS.dcm'}") == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert "structures.dcm: of the moving scan, on the fixed one: GTV" in said
    carried = read_structures(tmp_path / "out" / "structures.dcm")
    (gtv,) = carried.structures
    assert (gtv.name, gtv.colour, gtv.kind, carried.frame) == ("GTV", [255, 0, 0], "GTV", FRAMES["later"])
    target = read_grid(case / "later")
    transform = sitk.ReadTransform(str(case / "result" / "transform.h5"))
    reference = sitk_image(np.zeros(target.shape, np.float32), target)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(sitk_image(before, grid), reference, transform, sitk.sitkLinear, 0.0)
    )
    found = shares(gtv.contours, target)
    assert found.sum() == pytest.approx(expected.sum(), rel=0.05)  # voxels of 5 to 7 mm
    assert 2 * np.minimum(found, expected).sum() / (found.sum() + expected.sum()) > 0.93
    slices = {str(pydicom.dcmread(path).SOPInstanceUID) for path in (case / "later").iterdir()}
    for item in carried.data.ROIContourSequence[0].ContourSequence:
        uid = item.ContourImageSequence[0].ReferencedSOPInstanceUID
        assert uid in slices


@needs_plastimatch
def test_plastimatch_reads_structures_and_dose(case: Path, tmp_path: Path) -> None:
    """On the slices that they refer to: the volume of the structure, and the dose, are those that we wrote."""
    grid = read_grid(case / "earlier")
    centre = MOVING_LUNGS.grid.to_world(np.full(3, 12.5))
    before = ball(centre, 28.0, grid)
    drawn = Structure("GTV", [contour for _, contour in outlines(before, grid)], [255, 0, 0], "GTV")
    write_object(tmp_path / "RS.dcm", structure_set([drawn], grid, in_order(case / "earlier", grid), _of(case)))
    doses = dose_object(_of(case), 60 * before, grid, False)
    write_object(tmp_path / "RD.dcm", doses)
    assert call(case, tmp_path / "out", f"--rtstruct={tmp_path / 'RS.dcm'}", f"--rtdose={tmp_path / 'RD.dcm'}") == 0
    names = {kind: tmp_path / f"{kind}.mha" for kind in ("labels", "dose")}
    target = read_grid(case / "later")
    sitk.WriteImage(sitk_image(np.zeros(target.shape, np.int16), target), str(tmp_path / "later.mha"))
    of_later = ("--referenced-ct", case / "later", "--fixed", tmp_path / "later.mha")
    plastimatch(
        "convert", "--input", tmp_path / "out" / "structures.dcm", *of_later, "--output-labelmap", names["labels"]
    )
    labels = sitk.ReadImage(str(names["labels"]))
    theirs = (sitk.GetArrayFromImage(labels) > 0).sum() * np.prod(labels.GetSpacing())
    (gtv,) = read_structures(tmp_path / "out" / "structures.dcm").structures
    ours = shares(gtv.contours, target).sum() * np.prod(target.spacing)
    assert theirs == pytest.approx(ours, rel=0.05)
    plastimatch("convert", "--input", tmp_path / "out" / "dose.dcm", "--output-dose-img", names["dose"])
    dose, read = sitk.ReadImage(str(names["dose"])), read_dose(tmp_path / "out" / "dose.dcm")
    place = read.grid.to_world(np.array(read.grid.size) // 2)
    index = dose.TransformPhysicalPointToIndex(place.tolist())
    nx, ny, nz = (n // 2 for n in read.grid.size)
    assert dose[index] == pytest.approx(float(read.values[nz, ny, nx]), abs=0.01)
    assert sitk.GetArrayFromImage(dose).max() == pytest.approx(float(read.values.max()), abs=0.01)


def _of(case: Path) -> Reference:
    return read_reference(case / "earlier")


# --- dose ------------------------------------------------------------------------------------------------------------


def dose_object(of: Reference, values: np.ndarray, grid: Grid, backwards: bool) -> Dataset:
    """As a planning system writes it, by hand."""
    data = new_object(of, DOSE, "RTDOSE", "dose")
    direction, order = np.array(grid.direction), -1 if backwards else 1
    last = grid.to_world(np.array([0, 0, grid.size[2] - 1])) if backwards else np.array(grid.origin)
    data.ImagePositionPatient = [decimal(v) for v in last]
    data.ImageOrientationPatient = [decimal(v) for v in direction[:, :2].T.ravel()]
    data.PixelSpacing = [decimal(grid.spacing[1]), decimal(grid.spacing[0])]
    data.GridFrameOffsetVector = [decimal(order * grid.spacing[2] * n) for n in range(grid.size[2])]
    data.Rows, data.Columns, data.NumberOfFrames = grid.size[1], grid.size[0], grid.size[2]
    data.FrameOfReferenceUID, data.DoseUnits, data.DoseType = of.frame, "GY", "PHYSICAL"
    data.DoseSummationType, data.DoseGridScaling = "PLAN", "0.001"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelData = np.rint(values[::order] / 0.001).astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    return data


@pytest.mark.parametrize("backwards", [False, True], ids=["upwards", "downwards"])
def test_dose_is_carried_as_images_are(
    case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], backwards: bool
) -> None:
    grid = replace(read_grid(case / "earlier").resized((30, 32, 20)))
    values = 60 * ball(MOVING_LUNGS.grid.to_world(np.full(3, 12.5)), 25.0, grid)
    write_object(tmp_path / "RD.dcm", dose_object(read_reference(case / "earlier"), values, grid, backwards))
    read = read_dose(tmp_path / "RD.dcm")
    np.testing.assert_allclose(read.values, values, atol=1e-3)
    np.testing.assert_allclose(read.grid.origin, grid.origin, atol=1e-4)
    assert call(case, tmp_path / "out", f"--rtdose={tmp_path / 'RD.dcm'}") == 0, capfd.readouterr().err
    carried = read_dose(tmp_path / "out" / "dose.dcm")
    assert str(carried.data.FrameOfReferenceUID) == FRAMES["later"] and carried.data.DoseUnits == "GY"
    transform = sitk.ReadTransform(str(case / "result" / "transform.h5"))
    reference = sitk_image(np.zeros(carried.grid.shape, np.float32), carried.grid)
    expected = sitk.GetArrayFromImage(
        sitk.Resample(sitk_image(values, grid), reference, transform, sitk.sitkLinear, 0.0)
    )
    assert expected.max() > 50
    np.testing.assert_allclose(carried.values, expected, atol=1e-3)


def test_what_is_wrong_is_said_and_nothing_is_written(
    case: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = new_object(read_reference(case / "later"), DOSE, "RTDOSE", "no dose")
    write_object(tmp_path / "none.dcm", other)
    stranger = dose_object(
        replace(read_reference(case / "later"), header=_elsewhere(case)), np.ones(FIXED.shape), FIXED, False
    )
    write_object(tmp_path / "stranger.dcm", stranger)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out, options, says in (
        ("full", [], "is there already"),
        ("out", [f"--rtdose={tmp_path / 'none.dcm'}"], "cannot be read as an RT Dose"),
        ("out", [f"--rtstruct={tmp_path / 'none.dcm'}"], "cannot be read as an RT structure set"),
        ("out", [f"--rtdose={tmp_path / 'stranger.dcm'}"], "neither scan has its frame of reference"),
    ):
        assert call(case, tmp_path / out, *options) == 2
        assert says in capfd.readouterr().err.splitlines()[-1]
    swapped = [f"--fixed={case / 'earlier'}", f"--moving={case / 'later'}"]
    assert lungreg("dicom", case / "result", tmp_path / "out", *swapped) == 2
    assert "lies on another grid than the fixed scan" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call(case, tmp_path / "out", f"--rtdose={tmp_path / 'stranger.dcm'}", "--of=moving") == 0


def _elsewhere(case: Path) -> Dataset:
    header = pydicom.dcmread(next(iter((case / "later").iterdir())), stop_before_pixels=True)
    header.FrameOfReferenceUID = "1.2.3.300"
    return header

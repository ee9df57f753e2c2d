"""DICOM folders, written by SimpleITK from the phantom; SimpleITK's own reader of series has the second opinion."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from pydicom import uid

from algorithm.errors import InputError
from algorithm.files.dicom import find_series, holds_dicom
from algorithm.files.folders import find_inputs, image_name
from algorithm.files.images import read_image
from algorithm.geometry import resample
from phantom.pair import PhantomPair
from tests.support.dicom_series import (
    PIXELS,
    write_companions,
    write_enhanced,
    write_object,
    write_series,
    write_slice,
    write_two_acquisitions,
)
from tests.support.refusals import refusal
from tests.support.running import call_main, files_below, pair_options, warped_image


def overwrite(path: Path, old: str, new: bytes) -> None:
    """Puts a tag's text into a file that SimpleITK would not write; of equal length, blanks at the end."""
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    path.write_bytes(content.replace(old.encode(), new.ljust(len(old))))


def file_of(folder: Path, z: int) -> Path:
    return folder / f"im{7 * z % 101:03}.dcm"


def chest(size: tuple[int, int, int] = (20, 17, 18)) -> sitk.Image:
    """HU of air to bone without any chest in it; oblique, anisotropic."""
    voxels = np.random.default_rng(0).integers(-1024, 1500, size[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((2.0, 2.5, 3.0))
    image.SetOrigin((-30.5, 12.25, -700.0))
    image.SetDirection(sitk.VersorTransform((0.2, -0.1, 0.9), 0.3).GetMatrix())
    return image


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("dicom") / "study.7", chest())


@pytest.fixture
def spoilt(tmp_path: Path, series: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(series, tmp_path / "copy")


# --- what is read ----------------------------------------------------------------------------------------------------


def test_reads_what_was_written(series: Path) -> None:
    image, truth = read_image(series), chest()
    assert image.voxels.dtype == torch.int16 and image.path == series and image.remarks == ()
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), sitk.GetArrayFromImage(truth))
    assert image.grid.size == truth.GetSize()
    np.testing.assert_allclose(image.grid.spacing, truth.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(image.grid.origin, truth.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(np.ravel(image.grid.direction), truth.GetDirection(), atol=1e-6)


def test_agrees_with_simpleitk_on_a_series_stored_from_top_to_bottom(tmp_path: Path) -> None:
    flipped = sitk.Flip(chest(), (False, False, True))
    assert flipped.GetDirection() != chest().GetDirection()
    folder = write_series(tmp_path / "a", flipped)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs, ours = reader.Execute(), read_image(folder)
    np.testing.assert_array_equal(ours.voxels[0, 0].numpy(), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(ours.grid.spacing, theirs.GetSpacing(), atol=1e-5)
    np.testing.assert_allclose(ours.grid.origin, theirs.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(np.ravel(ours.grid.direction), theirs.GetDirection(), atol=1e-5)


def test_rescaling_may_differ_from_slice_to_slice(spoilt: Path) -> None:
    image = chest() * 2  # even numbers: no rounding with a slope of 2
    for z in range(image.GetDepth()):
        write_slice(file_of(spoilt, z), image, z, {"0028|1053": str(1 + z % 2)}, np.zeros(3))
    read = read_image(spoilt)
    assert read.voxels.dtype == torch.int16
    np.testing.assert_array_equal(read.voxels[0, 0].numpy(), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize(("compressor", "syntax"), [("JPEG", b"1.2.840.10008.1.2.4.70"), ("JPEG2000", b"1.2.4.90")])
def test_compressed_files(spoilt: Path, compressor: str, syntax: bytes) -> None:
    """Both lossless."""
    for z in range(chest().GetDepth()):
        write_slice(file_of(spoilt, z), chest(), z, {}, np.zeros(3), compressor)
        assert syntax in file_of(spoilt, z).read_bytes()[:1000]
    np.testing.assert_array_equal(read_image(spoilt).voxels[0, 0].numpy(), sitk.GetArrayFromImage(chest()))


def test_other_files_folders_and_endings_do_not_matter(spoilt: Path) -> None:
    expected = read_image(spoilt).voxels
    for number, path in enumerate(sorted(spoilt.iterdir())):
        path.rename(spoilt / f"{number}")
    (spoilt / "notes.txt").write_text("none of it is DICOM")
    (spoilt / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (spoilt / ".hidden.dcm").write_bytes(b"x")
    write_series(spoilt / "below", chest(), {"0020|000e": "1.9"})
    assert holds_dicom(spoilt)
    assert torch.equal(read_image(spoilt).voxels, expected)


def test_other_objects_among_the_slices_are_left_out_with_a_remark(spoilt: Path) -> None:
    """Structure set, plan, dose, reports, presentation state, PET, a maker's own, a screenshot and a scout view."""
    expected = read_image(spoilt)
    write_companions(spoilt)
    shutil.copy(spoilt / "RS.dcm", spoilt / "RS2")
    image = read_image(spoilt)
    assert torch.equal(image.voxels, expected.voxels) and image.grid == expected.grid
    (remark,) = image.remarks
    assert remark.startswith("copy: what is no CT slice was left out: 2 × RT Structure Set Storage, 1 × ")
    assert remark.endswith(" and others.")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RS", "1 × RT Structure Set Storage"),
        ("SR", "1 × X-Ray Radiation Dose SR Storage"),
        ("PR", "1 × Grayscale Softcopy Presentation State Storage"),
        ("own", "1 × 1.3.12.2.1107.5.9.1"),
        ("RD", "1 × modality RTDOSE"),
        ("PT", "1 × modality PT"),
        ("screen", "1 × screenshot"),
        ("scout", "1 × localizer"),
    ],
)
def test_remarks_name_what_was_left_out(spoilt: Path, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "all").mkdir()
    write_companions(tmp_path / "all")
    shutil.copy(tmp_path / "all" / f"{name}.dcm", spoilt)
    (remark,) = read_image(spoilt).remarks
    assert says in remark
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "all" / f"{name}.dcm", tmp_path / "alone")
    assert says in refusal(read_image, tmp_path / "alone")


def test_a_damaged_slice_is_never_left_out(spoilt: Path) -> None:
    """Unlike a structure set it is an image by its file's header."""
    write_object(file_of(spoilt, 17), uid.CTImageStorage, "CT")  # the last one: no gap would tell
    assert "expected a whole CT slice" in refusal(read_image, spoilt)


ORDERS = {"as stacked": range(18), "from the top": range(17, -1, -1), "halves exchanged": [*range(9, 18), *range(9)]}


@pytest.mark.parametrize("slopes", [[1.0], [2.0], [1.0, 2.0, 0.5]], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_enhanced_ct_in_any_order_with_rescaling_of_every_frame(
    tmp_path: Path, order: str, slopes: list[float]
) -> None:
    even = sitk.Cast(chest() / 2, sitk.sitkInt16) * 2
    (tmp_path / "a").mkdir()
    write_enhanced(tmp_path / "a" / "1.dcm", even, list(ORDERS[order]), slopes)
    image = read_image(tmp_path / "a")
    assert image.voxels.dtype == torch.int16 and image.remarks == ()
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), sitk.GetArrayFromImage(even))
    np.testing.assert_allclose(image.grid.spacing, even.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(image.grid.origin, even.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(np.ravel(image.grid.direction), even.GetDirection(), atol=1e-6)


def test_enhanced_ct_in_several_files(tmp_path: Path) -> None:
    for part in range(3):
        write_enhanced(tmp_path / f"{part}.dcm", chest(), list(range(part, 18, 3)), [1.0])
    np.testing.assert_array_equal(read_image(tmp_path).voxels[0, 0].numpy(), sitk.GetArrayFromImage(chest()))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refuses_folders_without_dicom(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 500)
    assert not holds_dicom(tmp_path)
    assert "no DICOM image" in refusal(read_image, tmp_path)


def test_refuses_several_series_with_a_list(spoilt: Path) -> None:
    write_series(spoilt, chest((20, 17, 3)), {"0020|000e": "1.2.3.5", "0008|103e": "thin lung"}, "other{}.dcm")
    message = refusal(read_image, spoilt)
    assert "2 DICOM series" in message
    assert "1.2.3.4: 18 slice(s) of chest" in message and "1.2.3.5: 3 slice(s) of thin lung" in message


def test_lists_only_a_few_of_many_series(tmp_path: Path) -> None:
    for number in range(80):
        write_series(tmp_path, chest((20, 17, 1)), {"0020|000e": f"1.2.{number}"}, f"{number}{{}}.dcm")
    message = refusal(read_image, tmp_path)
    assert "80 DICOM series" in message and "; and 76 more" in message and message.count("slice(s)") == 4


@pytest.mark.parametrize(
    ("tags", "says"),
    [
        ({"0008|0060": "MR"}, "modality MR"),
        ({"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"}, "localizer"),
    ],
)
def test_refuses_what_is_no_ct_volume(tmp_path: Path, tags: dict[str, str], says: str) -> None:
    assert says in refusal(read_image, write_series(tmp_path / "a", chest((20, 17, 3)), tags))


def test_refuses_a_missing_slice(spoilt: Path) -> None:
    file_of(spoilt, 5).unlink()
    message = refusal(read_image, spoilt)
    assert "6 mm apart where 3 mm is usual" in message
    assert file_of(spoilt, 4).name in message and file_of(spoilt, 6).name in message


def test_refuses_uneven_spacing_but_not_rounded_positions(tmp_path: Path) -> None:
    upright = chest()
    upright.SetDirection(np.eye(3).ravel())
    rounded = write_series(tmp_path / "a", upright, shift_mm=lambda z: (0.0, 0.0, 0.05 * (-1) ** z))
    np.testing.assert_allclose(read_image(rounded).grid.spacing[2], 3.0, atol=0.01)
    message = refusal(
        read_image, write_series(tmp_path / "b", upright, shift_mm=lambda z: (0.0, 0.0, 2.0 * max(0, z - 12)))
    )
    assert "5 mm apart where 3 mm is usual" in message


def test_refuses_a_slice_that_is_there_twice(spoilt: Path) -> None:
    shutil.copy(file_of(spoilt, 3), spoilt / "twin.dcm")
    message = refusal(read_image, spoilt)
    assert "twin.dcm" in message and file_of(spoilt, 3).name in message and "same place" in message


def test_refuses_a_tilted_gantry(tmp_path: Path) -> None:
    upright = chest()
    upright.SetDirection(np.eye(3).ravel())
    message = refusal(
        read_image, write_series(tmp_path / "a", upright, shift_mm=lambda z: (0.0, 3 * z * np.tan(0.1), 0.0))
    )
    assert "shifted sideways by up to 5.117 mm" in message


def test_refuses_one_slice_and_too_few(tmp_path: Path, series: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(file_of(series, 3), tmp_path / "one")
    assert "one DICOM slice" in refusal(read_image, tmp_path / "one")
    assert "at least 16 voxels" in refusal(read_image, write_series(tmp_path / "few", chest((20, 17, 5))))


@pytest.mark.parametrize("tag", ["0020|0032", "0020|0037"])
@pytest.mark.parametrize("value", [b"", b"1\\2", b"a\\b\\c", b"nan\\0\\0"])
def test_refuses_slices_without_a_place(spoilt: Path, tag: str, value: bytes) -> None:
    image = sitk.ReadImage(str(file_of(spoilt, 3)))
    overwrite(file_of(spoilt, 3), image.GetMetaData(tag).strip(), value)
    message = refusal(read_image, spoilt)
    assert "ImagePositionPatient" in message or "ImageOrientationPatient" in message


def test_refuses_unequal_slices(spoilt: Path) -> None:
    write_slice(file_of(spoilt, 3), chest((21, 17, 18)), 3, {}, np.zeros(3))
    assert "differs in size" in refusal(read_image, spoilt)
    write_slice(file_of(spoilt, 3), chest(), 3, {"0020|0037": "1\\0\\0\\0\\1\\0"}, np.zeros(3))
    assert "ImageOrientationPatient from" in refusal(read_image, spoilt)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.7, 0.999])
def test_refuses_a_file_cut_short(spoilt: Path, kept: float) -> None:
    path = file_of(spoilt, 3)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert str(path) in refusal(read_image, spoilt)


def test_refuses_axes_that_are_not_square(tmp_path: Path) -> None:
    upright = chest()
    upright.SetDirection(np.eye(3).ravel())
    folder = write_series(tmp_path / "a", upright)
    for path in folder.iterdir():
        overwrite(path, "1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\1\\0")
    assert "orthonormal" in refusal(read_image, folder)


@pytest.mark.parametrize("places", [0, 17])
def test_refuses_frames_without_places(tmp_path: Path, places: int) -> None:
    write_enhanced(tmp_path / "a.dcm", chest(), list(range(18)), [1.0], places)
    assert f"has 18 frames, and positions for {places} of them" in refusal(read_image, tmp_path)


def test_refuses_frames_that_are_no_enhanced_ct(tmp_path: Path) -> None:
    pixels = {**PIXELS, "Rows": 17, "Columns": 20, "NumberOfFrames": 18, "PixelData": bytes(2 * 17 * 20 * 18)}
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    write_object(tmp_path / "a.dcm", uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage, "CT", **pixels, **place)
    assert "has 18 frames, and positions for 0 of them" in refusal(read_image, tmp_path)


def test_refuses_an_enhanced_ct_with_several_phases(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "a.dcm", chest(), [*range(18), *range(18)], [1.0])
    assert "2 slices or more at each of 18 places" in refusal(read_image, tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_refuses_an_enhanced_ct_cut_short(tmp_path: Path, kept: float) -> None:
    path = write_enhanced(tmp_path / "a.dcm", chest(), list(range(18)), [1.0])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert str(path) in refusal(read_image, tmp_path)


def test_refuses_phases_at_the_same_places(tmp_path: Path) -> None:
    for phase in range(3):
        write_series(tmp_path / "a", chest(), {"0020|0100": str(phase)}, f"{phase} {{}}")
    assert "3 slices or more at each of 18 places" in refusal(read_image, tmp_path / "a")


def test_refuses_acquisitions_among_each_other_but_not_one_after_the_other(tmp_path: Path) -> None:
    message = refusal(read_image, write_two_acquisitions(tmp_path / "a", chest(), chest(), ("1", "2")))
    assert "AcquisitionNumber 1: 18 slices, 2: 18 slices" in message and "folder of their own" in message
    for z in range(18):  # as of a scanner that moves the table from slice to slice, or goes on after a pause
        for folder, number in (("b", z), ("c", z // 9)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_slice(tmp_path / folder / f"{z}", chest(), z, {"0020|0012": str(number)}, np.zeros(3))
    for folder in ("b", "c"):
        np.testing.assert_array_equal(
            read_image(tmp_path / folder).voxels[0, 0].numpy(), sitk.GetArrayFromImage(chest())
        )


def scan(voxels: torch.Tensor, spacing: float) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels[0, 0].round().short().numpy())
    image.SetSpacing((8.0, 8.0, spacing))
    return image


def test_refuses_two_phases_in_turn_that_no_tag_tells(tmp_path: Path, example_pair: PhantomPair) -> None:
    """Slices of 4 mm, of inhale and of exhale in turn; with the same phase twice, its noise apart, it is a volume."""
    grid = example_pair.fixed_grid
    upper = replace(grid, origin=tuple(grid.to_world(np.array([0, 0, 0.5]))))
    one, same = (scan(resample(example_pair.fixed, grid, g), 8.0) for g in (grid, upper))
    other = scan(resample(example_pair.moving, example_pair.moving_grid, upper), 8.0)
    assert read_image(write_two_acquisitions(tmp_path / "a", one, same, ("1", "1"))).grid.spacing[2] == 4.0
    message = refusal(read_image, write_two_acquisitions(tmp_path / "b", one, other, ("1", "1")))
    assert "neighbouring slices differ more than every second one" in message


# --- as input of the program -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["images/fixed", "images/fixed-image", "fixed"])
def test_folders_are_found(tmp_path: Path, series: Path, place: str) -> None:
    shutil.copytree(series, tmp_path / place)
    moving = place.replace("fixed", "moving")
    shutil.copytree(series, tmp_path / moving)
    found = find_inputs(tmp_path)
    assert (found.fixed, found.moving) == (tmp_path / place, tmp_path / moving)
    assert image_name(found.fixed) == Path(place).name
    (tmp_path / place / "too.mha").touch()
    if place != "fixed":
        with pytest.raises(InputError, match="exactly one"):
            find_inputs(tmp_path)


def test_a_mask_is_never_a_folder(tmp_path: Path, series: Path) -> None:
    for place in ("images/fixed", "images/moving", "images/fixed-mask"):
        shutil.copytree(series, tmp_path / place)
    assert find_inputs(tmp_path).fixed_mask is None


def test_a_pair_of_dicom_and_a_file(tmp_path: Path, example: Path, small_weights: Path) -> None:
    fixed = sitk.ReadImage(str(example / "fixed.mha"))
    folder = write_series(tmp_path / "case.1", fixed, name="{}")
    options = [*pair_options(example, tmp_path / "out", small_weights), f"--fixed={folder}"]
    assert call_main(*options) == 0
    assert "images/displacement-field/case.1.mha" in files_below(tmp_path / "out")
    warped = warped_image(tmp_path / "out")
    assert warped.GetSize() == fixed.GetSize()
    np.testing.assert_allclose(warped.GetOrigin(), fixed.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(warped.GetDirection(), fixed.GetDirection(), atol=1e-6)


def test_series_is_read_without_a_second_copy(series: Path) -> None:
    voxels = find_series(series).read()
    assert voxels.flags.owndata and voxels.shape == (18, 17, 20)

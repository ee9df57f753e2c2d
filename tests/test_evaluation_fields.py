"""Displacement fields in the formats of ITK, grand-challenge, Learn2Reg and EMPIRE10: round trips, bytes, refusals."""

import gzip
import itertools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from scipy.ndimage import zoom

from algorithm.geometry import Grid
from evaluation.convert import main
from evaluation.errors import CaseError
from evaluation.fields import (
    EMPIRE10,
    axes_of,
    npz_header,
    read_field,
    same_grid,
    write_empire10,
    write_grand_challenge,
    write_itk,
    write_learn2reg,
    write_transform,
)
from evaluation.ground_truth import read_labels
from evaluation.images import read_image
from evaluation.pictures import read_scan
from tests.support.grids import OBLIQUE, blank, noisy_field, sitk_image
from tests.support.strategies import examples, grids

PROPERTY = examples(8)


def assert_same(a: sitk.Image, b: sitk.Image, atol: float = 1e-5) -> None:
    assert same_grid(a, b)
    assert a.GetPixelID() == sitk.sitkVectorFloat32
    np.testing.assert_allclose(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b), atol=atol)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nii", "a.nii.gz", "a.nrrd"])
def test_itk_formats_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    write_itk(noisy_field(OBLIQUE), tmp_path / name)
    assert_same(read_field(tmp_path / name), noisy_field(OBLIQUE), atol=1e-6)


def test_float64_vectors_become_float32(tmp_path: Path) -> None:
    write_itk(sitk.Cast(noisy_field(OBLIQUE), sitk.sitkVectorFloat64), tmp_path / "a.mha")
    assert_same(read_field(tmp_path / "a.mha"), noisy_field(OBLIQUE))


def test_the_platforms_layout_has_four_axes(tmp_path: Path) -> None:
    write_grand_challenge(noisy_field(OBLIQUE), tmp_path / "a.mha")
    stored = sitk.ReadImage(str(tmp_path / "a.mha"))
    assert stored.GetSize() == (*OBLIQUE.size, 3)
    assert stored.GetNumberOfComponentsPerPixel() == 1
    assert_same(sitk.Compose([stored[:, :, :, c] for c in range(3)]), noisy_field(OBLIQUE))
    assert_same(read_field(tmp_path / "a.mha"), noisy_field(OBLIQUE))


@pytest.mark.parametrize("name", ["disp_0001_0001.nii.gz", "disp_0001_0001.npz", "any.npz"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_learn2reg_round_trip(tmp_path: Path, name: str, channels_first: bool) -> None:
    write_learn2reg(noisy_field(OBLIQUE), tmp_path / name, channels_first=channels_first)
    assert_same(read_field(tmp_path / name, blank(OBLIQUE)), noisy_field(OBLIQUE))


@PROPERTY
@given(fixed=grids(), moving=grids())
def test_learn2reg_round_trip_between_any_two_grids(
    tmp_path_factory: pytest.TempPathFactory, fixed: Grid, moving: Grid
) -> None:
    path = tmp_path_factory.mktemp("field") / "disp.npz"
    write_learn2reg(noisy_field(fixed), path, blank(moving))
    field = read_field(path, blank(fixed), blank(moving))
    assert_same(field, noisy_field(fixed), atol=5e-3)  # float32 voxels over up to 2 m


def test_learn2reg_holds_voxels_in_the_order_that_nibabel_reads(tmp_path: Path) -> None:
    """index_moving = index_fixed + v, from the raw bytes: one voxel up along y, half a voxel down along z."""
    path = tmp_path / "disp_0001_0001.nii.gz"
    shift_mm = np.array(OBLIQUE.direction) @ [0.0, 0.75, -1.25]
    write_learn2reg(sitk_image(np.full((*OBLIQUE.shape, 3), shift_mm, np.float32), OBLIQUE), path)
    data = gzip.decompress(path.read_bytes())
    assert struct.unpack_from("<5h", data, 40) == (4, *OBLIQUE.size, 3)
    start = int(struct.unpack_from("<f", data, 108)[0])
    voxels = np.frombuffer(data, "<f4", offset=start).reshape((*OBLIQUE.size, 3), order="F")
    np.testing.assert_allclose(voxels, np.broadcast_to([0.0, 1.0, -0.5], voxels.shape), atol=1e-5)


def test_learn2reg_between_grids_is_the_moving_index(tmp_path: Path) -> None:
    """What a Learn2Reg evaluation does, index + v in the moving image, is ITK's transform of the same point."""
    moving = Grid((8, 12, 9), (1.25, 1.0, 2.0), (-110.0, 30.0, 405.0))
    write_learn2reg(noisy_field(OBLIQUE), tmp_path / "disp.npz", blank(moving))
    with np.load(tmp_path / "disp.npz") as arrays:
        voxels = arrays["arr_0"]
    transform = sitk.DisplacementFieldTransform(sitk.Cast(noisy_field(OBLIQUE), sitk.sitkVectorFloat64))
    for index in [(0, 0, 0), (3, 7, 2), (10, 8, 9)]:
        point = transform.TransformPoint(blank(OBLIQUE).TransformIndexToPhysicalPoint(index))
        expected = blank(moving).TransformPhysicalPointToContinuousIndex(point)
        np.testing.assert_allclose(np.array(index) + voxels[index], expected, atol=1e-4)


def test_empire10_round_trip(tmp_path: Path) -> None:
    write_empire10(noisy_field(OBLIQUE), tmp_path / "01")
    assert_same(read_field(tmp_path / "01", blank(OBLIQUE)), noisy_field(OBLIQUE))
    assert_same(read_field(tmp_path / "01" / "defX.mhd", blank(OBLIQUE)), noisy_field(OBLIQUE))


def test_empire10_is_mm_along_the_axes_of_the_image(tmp_path: Path) -> None:
    along_y = np.array(OBLIQUE.direction) @ [0.0, 7.0, 0.0]
    write_empire10(sitk_image(np.full((*OBLIQUE.shape, 3), along_y, np.float32), OBLIQUE), tmp_path)
    for name, expected in zip(EMPIRE10, (0.0, 7.0, 0.0), strict=True):
        image = sitk.ReadImage(str(tmp_path / name))
        assert image.GetOrigin() == (0, 0, 0)
        assert image.GetDirection() == tuple(np.eye(3).ravel())
        assert image.GetSpacing() == OBLIQUE.spacing
        np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected, atol=1e-5)


# --- NIfTI: in which world the vectors are ---------------------------------------------------------------------------


def ras(field: sitk.Image) -> np.ndarray:
    """(x, y, z, 3) in RAS, as nibabel holds it."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(field).transpose(2, 1, 0, 3) * np.float32([-1, -1, 1]))


def write_by_nibabel(path: Path, array: np.ndarray, grid: Grid, intent: int, name: str = "", p1: float = 0) -> None:
    """On the grid, in NIfTI's world."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.block([[grid.axes, np.array(grid.origin)[:, None]], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_intent(intent, name=name, allow_unknown=True)
    image.header["intent_p1"] = p1
    nibabel.save(image, path)


@pytest.mark.parametrize(("axes", "intent", "name"), [(4, 1006, ""), (5, 1006, ""), (4, 1007, ""), (5, 1007, "NREG")])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_vectors_in_ras_become_lps(tmp_path: Path, axes: int, intent: int, name: str, ending: str) -> None:
    """As SynthMorph, nibabel and NiftyReg write them."""
    array = ras(noisy_field(OBLIQUE))
    path = tmp_path / f"a{ending}"
    write_by_nibabel(path, array if axes == 4 else array[:, :, :, None], OBLIQUE, intent, name and "NREG_TRANS", 1)
    assert_same(read_field(path), noisy_field(OBLIQUE), atol=1e-4)


def test_nifti_vectors_by_itk_are_lps(tmp_path: Path) -> None:
    """Intent 1007 in five axes; with nibabel, which keeps the header, they stay what they are."""
    write_itk(noisy_field(OBLIQUE), tmp_path / "a.nii.gz")
    stored = nibabel.load(tmp_path / "a.nii.gz")
    assert stored.shape[3:] == (1, 3) and stored.header["intent_code"] == 1007
    nibabel.save(nibabel.Nifti1Image(stored.get_fdata(dtype=np.float32), None, stored.header), tmp_path / "b.nii.gz")
    for name in ("a.nii.gz", "b.nii.gz"):
        assert_same(read_field(tmp_path / name), noisy_field(OBLIQUE), atol=1e-4)


def test_nifti_agrees_with_what_itk_itself_makes_of_displacement_vectors(tmp_path: Path) -> None:
    write_by_nibabel(tmp_path / "a.nii", ras(noisy_field(OBLIQUE))[:, :, :, None], OBLIQUE, 1006)
    theirs = sitk.Cast(sitk.ReadImage(str(tmp_path / "a.nii")), sitk.sitkVectorFloat32)
    assert_same(read_field(tmp_path / "a.nii"), theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "intent", "name", "p1", "words"),
    [
        (4, 0, "", 0, "does not say whether its vectors are RAS or LPS"),
        (5, 0, "", 0, "does not say whether its vectors are RAS or LPS"),
        (5, 1007, "", 0, "does not say whether its vectors are RAS or LPS"),
        (4, 2006, "", 0, "does not say whether its vectors are RAS or LPS"),
        (5, 1007, "NREG_TRANS", 0, "kind 0, expected displacements"),
    ],
)
def test_nifti_vectors_of_an_unknown_world_are_refused(
    tmp_path: Path, axes: int, intent: int, name: str, p1: float, words: str
) -> None:
    array = ras(noisy_field(OBLIQUE))
    write_by_nibabel(tmp_path / "a.nii.gz", array if axes == 4 else array[:, :, :, None], OBLIQUE, intent, name, p1)
    refused(tmp_path / "a.nii.gz", words)


def test_nifti_vectors_that_are_voxels_by_name_and_mm_by_header_are_refused(tmp_path: Path) -> None:
    write_by_nibabel(tmp_path / "disp_1_1.nii.gz", ras(noisy_field(OBLIQUE)), OBLIQUE, 1006)
    refused(tmp_path / "disp_1_1.nii.gz", "its name says voxels", blank(OBLIQUE))


def test_learn2reg_in_nifti_needs_no_place(tmp_path: Path) -> None:
    array = np.random.default_rng(1).normal(size=(*OBLIQUE.size, 3)).astype(np.float32)
    for name, affine in (("disp_1_1.nii.gz", None), ("disp_2_2.nii.gz", np.eye(4))):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / name)
    assert nibabel.load(tmp_path / "disp_1_1.nii.gz").header["sform_code"] == 0
    placed = read_field(tmp_path / "disp_2_2.nii.gz", blank(OBLIQUE))
    assert_same(read_field(tmp_path / "disp_1_1.nii.gz", blank(OBLIQUE)), placed)


# --- Learn2Reg at half the resolution --------------------------------------------------------------------------------


def test_learn2reg_at_half_the_resolution(tmp_path: Path) -> None:
    """From corner to corner, in voxels of the whole resolution; its splines flatten at the edges."""
    grid = Grid((24, 20, 28), (1.5, 0.75, 2.5), (-120.0, 33.0, 410.0), OBLIQUE.direction)
    path = tmp_path / "disp_1_1.npz"

    def linear(size: tuple[int, ...]) -> np.ndarray:
        x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in size), indexing="ij")
        return np.stack([2 * x + y, 3 * y - z, z - 4 * x])

    np.savez(path, linear((12, 10, 14)).astype(np.float16))
    np.savez(tmp_path / "whole.npz", linear(grid.size))
    half, whole = (sitk.GetArrayFromImage(read_field(p, blank(grid))) for p in (path, tmp_path / "whole.npz"))
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(half[inner], whole[inner], atol=0.01)
    by_challenge = [zoom(component.astype(np.float32), 2, order=2) for component in np.load(path)["arr_0"]]
    np.savez(tmp_path / "whole.npz", np.stack(by_challenge))
    assert_same(read_field(path, blank(grid)), read_field(tmp_path / "whole.npz", blank(grid)))
    np.savez(path, np.zeros((3, 12, 10, 13), np.float16))
    refused(path, r"or \(3, 12, 10, 14\) for every second one", blank(grid))


# --- ITK's transforms ------------------------------------------------------------------------------------------------


def as_transform(field: sitk.Image) -> sitk.DisplacementFieldTransform:
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))


def turn() -> sitk.Euler3DTransform:
    return sitk.Euler3DTransform(OBLIQUE.origin, 0.02, -0.03, 0.01, (1.0, -2.0, 3.0))


@pytest.mark.parametrize("ending", [".h5", ".hdf5", ".tfm"])
def test_transforms_that_are_fields_have_their_own_grid(tmp_path: Path, ending: str) -> None:
    write_transform(noisy_field(OBLIQUE), tmp_path / f"a{ending}")
    assert_same(read_field(tmp_path / f"a{ending}"), noisy_field(OBLIQUE))
    assert_same(read_field(tmp_path / f"a{ending}", blank(Grid((4, 4, 4)))), noisy_field(OBLIQUE))
    path = str(tmp_path / f"only{ending}")
    sitk.WriteTransform(sitk.CompositeTransform([as_transform(noisy_field(OBLIQUE))]), path)
    assert_same(read_field(Path(path)), noisy_field(OBLIQUE), atol=1e-4)


@pytest.mark.parametrize("ending", [".h5", ".hdf5", ".tfm"])
@pytest.mark.parametrize("field_last", [False, True])
def test_composites_are_what_sitk_makes_of_points(tmp_path: Path, ending: str, field_last: bool) -> None:
    """Not as many voxels, nor the same ones, as the field inside; where there is no fixed grid, its own."""
    fixed = Grid((7, 6, 8), (1.2, 1.0, 1.4), (-117.0, 34.0, 414.0), OBLIQUE.direction)
    parts = [turn(), as_transform(noisy_field(OBLIQUE))]
    transform = sitk.CompositeTransform(parts[:: 1 if field_last else -1])
    path = tmp_path / f"a{ending}"
    sitk.WriteTransform(transform, str(path))
    for grid, field in ((fixed, read_field(path, blank(fixed))), (OBLIQUE, read_field(path))):
        assert same_grid(field, blank(grid))
        for index in [(0, 0, 0), (3, 5, 2), (6, 5, 7)]:
            point = blank(grid).TransformIndexToPhysicalPoint(index)
            np.testing.assert_allclose(point + np.array(field[index]), transform.TransformPoint(point), atol=1e-4)


def test_transforms_that_cannot_be_used(tmp_path: Path) -> None:
    sitk.WriteTransform(turn(), str(tmp_path / "a.tfm"))
    refused(tmp_path / "a.tfm", "expected an image on the fixed grid")
    np.testing.assert_allclose(
        OBLIQUE.origin + np.array(read_field(tmp_path / "a.tfm", blank(OBLIQUE))[0, 0, 0]),
        turn().TransformPoint(OBLIQUE.origin),
        atol=1e-4,
    )
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "two.tfm"))
    refused(tmp_path / "two.tfm", "in 2 dimensions")
    refused(tmp_path / "none.h5", "cannot be read")
    for name in ("a.h5", "a.tfm"):
        write_transform(noisy_field(OBLIQUE), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for share in (0, 0.5, 0.9):
            (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
            refused(tmp_path / name, "cannot be read|without voxels")


# --- what must fail --------------------------------------------------------------------------------------------------


def refused(path: Path, words: str, fixed: sitk.Image | None = None) -> None:
    with pytest.raises(CaseError, match=words) as caught:
        read_field(path, fixed)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e4])
def test_values_that_are_no_displacement(tmp_path: Path, value: float) -> None:
    vectors = sitk.GetArrayFromImage(noisy_field(OBLIQUE))
    vectors[9, 3, 2, 1] = value
    write_itk(sitk_image(vectors, OBLIQUE), tmp_path / "a.mha")
    refused(tmp_path / "a.mha", "finite")


@pytest.mark.parametrize("name", ["a.mha", "a.nii", "a.nii.gz", "a.nrrd", "disp.npz", "disp_1_1.nii.gz"])
def test_a_file_cut_short(tmp_path: Path, name: str) -> None:
    write = write_learn2reg if name.startswith("disp") else write_itk
    write(noisy_field(OBLIQUE), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    refused(tmp_path / name, "cannot be read|cut short", blank(OBLIQUE))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("read", [read_field, read_image, read_labels, lambda path: read_scan(path.parent, "a")])
def test_a_nifti_file_that_lacks_a_few_voxels(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    """Fewer bytes than its header has: SimpleITK reads zeros for them."""
    image = noisy_field(OBLIQUE) if read is read_field else blank(OBLIQUE)
    sitk.WriteImage(image, str(tmp_path / "whole.nii"))
    short = (tmp_path / "whole.nii").read_bytes()[:-100]
    (tmp_path / name).write_bytes(gzip.compress(short) if name.endswith(".gz") else short)
    with pytest.raises(CaseError, match="cut short at"):
        read(tmp_path / name)


def test_an_array_of_another_shape_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disp_1_1.npz"
    np.savez(path, np.zeros((4, 5, 6, 3), np.float64))
    assert npz_header(path) == ((4, 5, 6, 3), np.dtype(float))
    monkeypatch.setattr(np, "load", None)
    refused(path, "is an array of", blank(OBLIQUE))


def test_no_file_and_no_field(tmp_path: Path) -> None:
    refused(tmp_path / "a.mha", "cannot be read")
    sitk.WriteImage(blank(OBLIQUE), str(tmp_path / "scan.mha"))
    refused(tmp_path / "scan.mha", "3-D with 3 components")
    refused(tmp_path / "a.txt", "no known kind")
    (tmp_path / "text.mha").write_text("text")
    refused(tmp_path / "text.mha", "cannot be read")


def test_learn2reg_fields_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "disp_1_1.npz"
    write_learn2reg(noisy_field(OBLIQUE), path)
    refused(path, "expected an image on the fixed grid")
    refused(path, "a vector for each voxel", blank(Grid((5, 5, 5))))
    np.savez(path, np.array(["a"], dtype=object))
    refused(path, "expected numbers", blank(OBLIQUE))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no array")
    refused(path, "cannot be read", blank(OBLIQUE))
    np.savez(path, np.zeros(1), np.zeros(1))
    refused(path, "expected one", blank(OBLIQUE))


def test_empire10_fields_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "01"
    write_empire10(noisy_field(OBLIQUE), folder)
    refused(folder, "expected", blank(Grid((5, 5, 5))))
    (folder / "defZ.mhd").unlink()
    refused(folder, "has no defZ.mhd")
    for name in EMPIRE10:
        sitk.WriteImage(sitk.Image(5, 5, sitk.sitkFloat32), str(folder / name))
    refused(folder, "defX.mhd has the size")


# --- the command -----------------------------------------------------------------------------------------------------


def test_convert_there_and_back(tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.mha"
    sitk.WriteImage(blank(OBLIQUE), str(fixed))
    names = ["a.mha", "four/b.mha", "disp_1_1.nii.gz", "empire10", "c.nrrd", "d.h5", "e.tfm", "f.hdf5", "h.nii.gz"]
    write_itk(noisy_field(OBLIQUE), tmp_path / names[0])
    for source, target in itertools.pairwise(names):
        extra = ["--to", "grand-challenge"] if target == "four/b.mha" else []
        assert main([str(tmp_path / source), str(tmp_path / target), "--fixed", str(fixed), *extra]) == 0
    assert_same(read_field(tmp_path / names[-1]), noisy_field(OBLIQUE))
    assert sitk.ReadImage(str(tmp_path / "four" / "b.mha")).GetDimension() == 4


@pytest.mark.parametrize("name", ["a.mhd", "empire10"])
def test_convert_leaves_no_half_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Writing fails after the first file of several: what was there before stays as it was."""
    write_itk(noisy_field(OBLIQUE), tmp_path / "b.mha")
    assert main([str(tmp_path / "b.mha"), str(tmp_path / name)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(image: sitk.Image, path: str) -> None:
        Path(path).write_text("half a field")
        raise RuntimeError("disk\nfull")

    monkeypatch.setattr(sitk, "WriteImage", fail)
    assert main([str(tmp_path / "b.mha"), str(tmp_path / name)]) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mha", "b.mha"], "missing.mha cannot be read"),
        (["a.mha", "b.dcm"], "b.dcm: is no name for itk"),
        (["a.mha", "b.txt", "--to", "itk"], "b.txt: is no name for itk"),
        (["a.mha", "b.mha", "--to", "transformix"], "b.mha: is no name for transformix"),
        (["a.mha", "b.mha", "--to", "nifti"], "b.mha: is no name for nifti"),
        (["a.mha", "b.mha", "--inverse"], "--inverse: expected the folder of a result"),
        (["a.mha", "folder.mha"], "folder.mha: is a folder"),
        (["a.mha", "a.mha/b.mha"], "a.mha: cannot be written"),
        (["a.mha", "a", "--fixed", "b\udcff.mha"], "b.*: its path is not in UTF-8"),
        (["a.mha", "b\udcff.mha"], "b.*mha: is not in UTF-8"),
        (["a.mha", "b.mha", "--to", "empire10"], "b.mha: is no name for empire10"),
        (["a.mha", "b.mha", "--fixed", "missing.mha"], "missing.mha cannot be read"),
    ],
)
def test_convert_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_itk(noisy_field(OBLIQUE), tmp_path / "a.mha")
    (tmp_path / "folder.mha").mkdir()
    assert main(arguments) == 2
    assert re.search(words, capfd.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "b.mha").exists()


def test_same_grid_sees_a_tenth_of_a_voxel() -> None:
    assert same_grid(blank(OBLIQUE), blank(OBLIQUE))
    moved = blank(OBLIQUE)
    moved.SetOrigin(np.array(OBLIQUE.origin) + axes_of(moved) @ [0.1, 0, 0])
    assert not same_grid(blank(OBLIQUE), moved)
    assert not same_grid(blank(OBLIQUE), blank(OBLIQUE)[:-1])

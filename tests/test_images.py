"""Reading, checking, re-storing and writing, against SimpleITK and against damaged files."""

import errno
import gzip
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from torch import Tensor

from algorithm.errors import InputError
from algorithm.files.images import Image, Layout, canonical, read_field, read_image, read_mask
from algorithm.files.writing import write_field, write_image, write_image_slabs
from algorithm.geometry import Affine, Grid, moving_index, warp
from tests.support.grids import grid_of, sitk_image
from tests.support.refusals import refusal
from tests.support.strategies import SIGNED_PERMUTATIONS, as_matrix, examples, generators, grids, smooth_field

few = examples(15, suppress=[HealthCheck.differing_executors])
scan_grids = grids(min_size=16, max_size=19, min_spacing=1.9)
layouts = pytest.mark.parametrize("layout", ["itk", "grand-challenge"])
SCAN = Grid((17, 16, 18), (2.0, 2.5, 3.0), (-10.0, 20.0, 5.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def slabs_of(volume: Tensor, thickness: int) -> Iterator[Tensor]:
    return (volume[:, :, z : z + thickness] for z in range(0, volume.shape[2], thickness))


def hounsfield(grid: Grid, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3071, grid.shape).astype(np.int16)


# --- what we write, SimpleITK reads ----------------------------------------------------------------------------------


@few
@given(grids(), generators(), st.integers(1, 5), st.sampled_from([torch.float32, torch.int16, torch.uint8]))
def test_written_image_reads_back_identical(folder, grid, generator, thickness, dtype):
    voxels = (torch.rand(1, 1, *grid.shape, generator=generator) * 255).to(dtype)
    path = folder / "image.mha"
    write_image_slabs(path, grid, slabs_of(voxels, thickness), dtype)
    image = sitk.ReadImage(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), voxels[0, 0].numpy())
    assert sitk.GetArrayFromImage(image).dtype == voxels.numpy().dtype
    assert grid_of(image) == grid  # to the last bit
    whole = folder / "whole.mha"
    write_image(whole, voxels, grid)
    assert whole.read_bytes() == path.read_bytes()


@few
@given(grids(), generators(), st.integers(1, 5))
def test_written_fields_read_back_identical(folder, grid, generator, thickness):
    field = torch.randn(1, 3, *grid.shape, generator=generator) * 20
    write_field(folder / "itk.mha", grid, slabs_of(field, thickness), "itk")
    write_field(folder / "gc.mha", grid, slabs_of(field, thickness), "grand-challenge")
    vectors, scalars = sitk.ReadImage(folder / "itk.mha"), sitk.ReadImage(folder / "gc.mha")
    assert scalars.GetSize() == (*grid.size, 3) and scalars.GetNumberOfComponentsPerPixel() == 1
    assert vectors.GetSize() == grid.size and vectors.GetNumberOfComponentsPerPixel() == 3
    composed = sitk.Compose([scalars[:, :, :, i] for i in range(3)])
    for image in (vectors, composed):
        assert grid_of(image) == grid
        np.testing.assert_array_equal(np.moveaxis(sitk.GetArrayFromImage(image), -1, 0), field[0].numpy())
    for name in ("itk.mha", "gc.mha"):
        read, read_grid = read_field(folder / name)
        assert torch.equal(read, field)
        np.testing.assert_allclose(read_grid.axes, grid.axes, atol=1e-9)


@examples(30, suppress=[HealthCheck.differing_executors])
@given(grids(8, 13), grids(8, 13), generators())
def test_written_field_warps_in_sitk_as_geometry_warps(folder, grid, moving_grid, generator):
    centre = grid.to_world((np.array(grid.size) - 1) / 2)
    x, y, z = np.array(moving_grid.origin) + centre - moving_grid.to_world((np.array(moving_grid.size) - 1) / 2)
    moving_grid = replace(moving_grid, origin=(float(x), float(y), float(z)))
    field = smooth_field(grid, 2.0, generator)
    moving = torch.rand(1, 1, *moving_grid.shape, generator=generator) * 2000 - 1000
    # borders are a matter of rounding: keep away from those of either grid
    index = moving_index(grid, moving_grid, field, affine=Affine(), like=field)[0]
    last = torch.tensor(moving_grid.size) - 1
    inner = ((index > 0.01) & (index < last - 0.01)).all(-1)
    border = torch.ones_like(inner)
    border[1:-1, 1:-1, 1:-1] = False
    inner &= ~border
    assume(inner.sum() >= 10)
    write_field(folder / "warp.mha", grid, [field], "itk")
    transform = sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(folder / "warp.mha"), sitk.sitkVectorFloat64))
    theirs = sitk.Resample(
        sitk_image(moving[0, 0].numpy(), moving_grid),
        sitk_image(np.zeros(grid.shape), grid),
        transform,
        sitk.sitkLinear,
    )
    ours = warp(moving, moving_grid, field, grid)[0, 0]
    assert (ours - torch.from_numpy(sitk.GetArrayFromImage(theirs))).abs()[inner].max() < 1e-2


def test_field_layouts_differ_only_in_order(folder):
    field = torch.arange(3 * 2 * 2 * 2, dtype=torch.float32).reshape(1, 3, 2, 2, 2)
    grid = Grid((2, 2, 2))
    write_field(folder / "a.mha", grid, [field], "itk")
    write_field(folder / "b.mha", grid, [field], "grand-challenge")
    itk, gc = (np.frombuffer((folder / n).read_bytes()[-96:], "<f4") for n in ("a.mha", "b.mha"))
    assert itk[:3].tolist() == [0, 8, 16]  # the three components of the first voxel
    assert gc.tolist() == list(range(24))


# --- what others write, we read --------------------------------------------------------------------------------------


@few
@given(scan_grids, st.sampled_from([".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".MHA", ".NII.GZ"]), st.booleans())
def test_reads_every_format(tmp_path_factory, grid, kind, compressed):
    folder = tmp_path_factory.mktemp("formats")
    voxels = hounsfield(grid)
    written = folder / f"scan{kind.lower()}"
    sitk.WriteImage(sitk_image(voxels, grid), written, compressed)
    path = written.rename(folder / f"scan{kind}") if kind != kind.lower() else written
    image = read_image(path)
    assert image.path == path and image.voxels.dtype == torch.int16
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), voxels)
    exact = 1e-4 if "nii" in kind.lower() else 1e-12  # NIfTI keeps float32
    assert image.grid.size == grid.size
    np.testing.assert_allclose(image.grid.axes, grid.axes, atol=exact)
    np.testing.assert_allclose(image.grid.origin, grid.origin, atol=exact)


@pytest.mark.parametrize(
    ("stored", "scale", "expected"),
    [
        (np.int16, 1.0, torch.int16),
        (np.uint8, 0.0, torch.int16),
        (np.int8, 0.0, torch.int16),
        (np.uint16, 1.0, torch.int16),
        (np.int32, 1.0, torch.int16),
        (np.int64, 1.0, torch.int16),
        (np.float32, 1.0, torch.int16),
        (np.float32, 0.5, torch.float32),
        (np.float64, 1.0, torch.int16),
        (np.float64, 0.25, torch.float32),
    ],
)
def test_int16_only_where_it_loses_nothing(tmp_path, stored, scale, expected):
    voxels = (hounsfield(SCAN).astype(np.float64) * scale).clip(0 if stored == np.uint16 else None).astype(stored)
    sitk.WriteImage(sitk_image(voxels, SCAN), tmp_path / "a.mha")
    image = read_image(tmp_path / "a.mha")
    assert image.voxels.dtype == expected and image.remarks == ()
    np.testing.assert_array_equal(image.voxels[0, 0].numpy().astype(np.float64), voxels.astype(np.float64))


@pytest.mark.parametrize("stored", [np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64])
def test_values_beyond_int16_are_clipped_with_a_remark(tmp_path, stored):
    """Padding of 1e9 and the like must not double the memory."""
    voxels = hounsfield(SCAN).clip(0 if np.dtype(stored).kind == "u" else None).astype(stored)
    voxels[2, 3, 4], voxels[5, 6, 7] = (60000, 40000) if stored == np.uint16 else (10**9, 32768)
    if np.dtype(stored).kind != "u":
        voxels[8, 8, 8] = -(10**9)
    sitk.WriteImage(sitk_image(voxels, SCAN), tmp_path / "a.mha")
    image = read_image(tmp_path / "a.mha")
    assert image.voxels.dtype == torch.int16
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), voxels.clip(-32768, 32767).astype(np.int16))
    (remark,) = image.remarks
    assert remark.startswith(f"a.mha: {2 if np.dtype(stored).kind == 'u' else 3} value(s) outside -32768 to 32767")


def test_voxels_outlive_the_reader(tmp_path):
    """SimpleITK frees its memory when its image goes."""
    sitk.WriteImage(sitk_image(hounsfield(SCAN), SCAN), tmp_path / "a.mha")
    images = [read_image(tmp_path / "a.mha") for _ in range(20)]
    assert len({image.voxels.data_ptr() for image in images}) == 20
    assert all((image.voxels[0, 0].numpy() == hounsfield(SCAN)).all() for image in images)


def test_rescaled_nifti_reads_as_int16(tmp_path):
    """CT in NIfTI often is uint16 with slope 1 and intercept -1024, which SimpleITK returns as floats."""
    voxels = hounsfield(SCAN)
    sitk.WriteImage(sitk_image((voxels + 1024).astype(np.uint16), SCAN), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2f", raw, 112, 1.0, -1024.0)
    (tmp_path / "a.nii").write_bytes(raw)
    image = read_image(tmp_path / "a.nii")
    assert image.voxels.dtype == torch.int16
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), voxels)


@pytest.mark.parametrize("kind", [".mha", ".nii.gz", ".nrrd"])
def test_trailing_axis_of_one_is_dropped(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    grid = replace(SCAN, direction=as_matrix(SIGNED_PERMUTATIONS[11]))
    sitk.WriteImage(sitk.JoinSeries([sitk_image(hounsfield(grid), grid)]), path)
    image = read_image(path)
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), hounsfield(grid))
    np.testing.assert_allclose(image.grid.axes, grid.axes, atol=1e-6)


def test_mask_is_what_lies_above_zero(tmp_path):
    labels = hounsfield(SCAN).clip(-1, 2)
    sitk.WriteImage(sitk_image(labels, SCAN), tmp_path / "mask.nrrd")
    mask, grid = read_mask(tmp_path / "mask.nrrd")
    assert grid == SCAN
    np.testing.assert_array_equal(mask[0, 0].numpy(), labels > 0)
    sitk.WriteImage(sitk_image(np.zeros_like(labels), SCAN), tmp_path / "empty.mha")
    assert "no voxel above 0" in refusal(read_mask, tmp_path / "empty.mha")


@layouts
@pytest.mark.parametrize("kind", [".mha", ".mhd", ".nii", ".nii.gz", ".nrrd"])
def test_reads_fields_in_every_format(tmp_path, layout: Layout, kind):
    grid = replace(SCAN, size=(3, 4, 5), direction=as_matrix(SIGNED_PERMUTATIONS[11]))
    field = smooth_field(grid, 10.0, torch.Generator().manual_seed(1))
    vectors = sitk_image(field[0].permute(1, 2, 3, 0).contiguous().numpy(), grid)
    parts = sitk.JoinSeries([sitk.VectorIndexSelectionCast(vectors, i) for i in range(3)])
    sitk.WriteImage(vectors if layout == "itk" else parts, tmp_path / f"field{kind}")
    read, read_grid = read_field(tmp_path / f"field{kind}")
    assert torch.equal(read, field)
    np.testing.assert_allclose(read_grid.axes, grid.axes, atol=1e-6)
    np.testing.assert_allclose(read_grid.origin, grid.origin, atol=1e-5)


@pytest.mark.parametrize(("size", "components"), [((3, 4, 5), 2), ((3, 4, 5, 3), 3), ((3, 4, 5, 2), 1)])
def test_refuses_fields_of_other_shapes(tmp_path, size, components):
    sitk.WriteImage(sitk.Image(size, sitk.sitkVectorFloat32, components), tmp_path / "a.mha")
    assert f"{components} component" in refusal(read_field, tmp_path / "a.mha")


# --- headers that are refused ----------------------------------------------------------------------------------------


def meta_file(path: Path, **changes: str) -> Path:
    """A plain MetaImage file of 20³ voxels of 2 mm; keywords replace header entries."""
    header = {
        "NDims": "3",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "2 2 2",
        "DimSize": "20 20 20",
        "ElementType": "MET_SHORT",
    }
    lines = ["ObjectType = Image", *(f"{k} = {v}" for k, v in {**header, **changes}.items())]
    lines += ["BinaryData = True", "BinaryDataByteOrderMSB = False", "ElementDataFile = LOCAL\n"]
    path.write_bytes("\n".join(lines).encode() + bytes(16000))
    return path


def test_accepts_the_file_that_the_next_test_spoils(tmp_path):
    assert read_image(meta_file(tmp_path / "a.mha")).grid == Grid((20, 20, 20), (2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ElementSpacing": "0 2 2"}, "positive"),
        ({"ElementSpacing": "-2 2 2"}, "positive"),
        ({"ElementSpacing": "nan 2 2"}, "positive"),
        ({"ElementSpacing": "0.04 2 2"}, "0.05 to 20.0 mm"),
        ({"ElementSpacing": "2 2 20.5"}, "0.05 to 20.0 mm"),
        ({"ElementSpacing": "1.4 2 2"}, "28.0 × 40.0 × 40.0 mm"),
        ({"DimSize": "20 20 15"}, "16 voxels"),
        ({"DimSize": "0 20 20"}, "positive sizes"),
        ({"DimSize": "70000 70000 70000"}, "2^31"),
        ({"DimSize": "99999999999 20 20"}, "2^31"),
        ({"ElementNumberOfChannels": "3"}, "3 values per voxel"),
        ({"TransformMatrix": "1 0.01 0 0 1 0 0 0 1"}, "orthonormal"),
        ({"TransformMatrix": "1 nan 0 0 1 0 0 0 1"}, "orthonormal"),
        ({"TransformMatrix": "1 0 0 0 1 0 0 0 0"}, "orthonormal"),
        ({"TransformMatrix": "2 0 0 0 2 0 0 0 2"}, "orthonormal"),
        ({"NDims": "two"}, "no readable header"),
        ({"ElementType": "MET_UNHEARD_OF"}, "no readable header"),
        ({"DimSize": "20 20 200"}, "cannot be read"),
    ],
)
def test_refuses_a_bad_header(tmp_path, changes, says):
    assert says in refusal(read_image, meta_file(tmp_path / "a.mha", **changes))


@pytest.mark.parametrize(("size", "dimension"), [((64, 64), 2), ((16, 16, 16, 2), 4)])
def test_refuses_what_is_not_3d(tmp_path, size, dimension):
    image = sitk.Image(size, sitk.sitkInt16)
    image.SetSpacing([2.0] * dimension)
    sitk.WriteImage(image, tmp_path / "a.mha")
    assert f"{dimension} axes" in refusal(read_image, tmp_path / "a.mha")
    assert "displacement field" in refusal(read_field, tmp_path / "a.mha")


def test_slight_skew_is_made_orthonormal(tmp_path):
    c, s = np.cos(0.3), np.sin(0.3)
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    skewed = direction + np.array([[0, 3e-4, 0], [0, 0, -2e-4], [1e-4, 0, 0]])
    numbers = " ".join(f"{v:.17g}" for v in skewed.T.ravel())
    found = np.array(read_image(meta_file(tmp_path / "a.mha", TransformMatrix=numbers)).grid.direction)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(found, direction, atol=5e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("half", [0.0, 0.5])
def test_few_non_finite_values_become_air_with_their_count(tmp_path, bad, half):
    voxels = hounsfield(SCAN) + half
    voxels[0, 0, 0] = voxels[5, 6, 7] = voxels[-1, -1, -1] = bad
    sitk.WriteImage(sitk_image(voxels, SCAN), tmp_path / "a.mha")
    image = read_image(tmp_path / "a.mha")
    assert image.remarks == (f"a.mha: 3 of {voxels.size} values are NaN or infinite; they were taken for air.",)
    assert image.voxels.dtype == (torch.float32 if half else torch.int16)
    expected = np.where(np.abs(voxels) < 1e9, voxels, -1000)
    np.testing.assert_array_equal(image.voxels[0, 0].numpy(), expected)
    field = np.stack([voxels] * 3, axis=-1)
    sitk.WriteImage(sitk_image(field, SCAN), tmp_path / "f.mha")
    assert "9 value(s) are NaN or infinite" in refusal(read_field, tmp_path / "f.mha")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_a_scan_that_is_mostly_not_finite(tmp_path, bad):
    voxels = hounsfield(SCAN).astype(np.float32)
    voxels[:9] = bad
    sitk.WriteImage(sitk_image(voxels, SCAN), tmp_path / "a.mha")
    assert read_image(tmp_path / "a.mha").remarks  # just half of it
    voxels[9, 0, 0] = bad
    sitk.WriteImage(sitk_image(voxels, SCAN), tmp_path / "a.mha")
    assert f"{9 * 16 * 17 + 1} of {voxels.size} values are NaN" in refusal(read_image, tmp_path / "a.mha")


@pytest.mark.parametrize("spacing", [0.0, -1.0, float("nan")])
def test_refuses_nifti_spacing_that_itk_would_replace(tmp_path, spacing):
    sitk.WriteImage(sitk_image(hounsfield(SCAN), SCAN), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<f", raw, 80, spacing)
    (tmp_path / "a.nii").write_bytes(raw)
    assert "positive" in refusal(read_image, tmp_path / "a.nii")


def test_refuses_nifti_whose_voxels_itk_would_take_from_another_file(tmp_path):
    other = hounsfield(SCAN, seed=1)
    sitk.WriteImage(sitk_image(hounsfield(SCAN), SCAN), tmp_path / "a.nii.gz")
    sitk.WriteImage(sitk_image(other, SCAN), tmp_path / "a.nii")
    assert "a.nii beside it" in refusal(read_image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").voxels[0, 0].numpy(), other)


def test_refuses_sheared_nifti(tmp_path):
    sitk.WriteImage(sitk_image(hounsfield(SCAN), SCAN), tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2h", raw, 252, 0, 1)  # no quaternion, only a matrix
    struct.pack_into("<12f", raw, 280, 2, 0.5, 0, 0, 0, 2.5, 0, 0, 0, 0, 3, 0)
    (tmp_path / "a.nii").write_bytes(raw)
    assert "orthonormal" in refusal(read_image, tmp_path / "a.nii")


# --- files that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [read_image, read_mask, read_field])
def test_refuses_files_that_are_none(tmp_path, read):
    assert "No such file" in refusal(read, tmp_path / "none.mha")
    (tmp_path / "folder.mha").mkdir()
    says = "no DICOM image" if read is read_image else "directory"
    assert says in refusal(read, tmp_path / "folder.mha")
    (tmp_path / "scan.dcm").write_bytes(b"DICM")
    assert ".mha, .mhd, .nii, .nii.gz, .nrrd" in refusal(read, tmp_path / "scan.dcm")
    assert "known kind" in refusal(read, tmp_path / "scan.Nii")


@pytest.mark.parametrize("kind", [".mha", ".mhd", ".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01hello" * 100, b"\x1f\x8b" + b"x" * 500, gzip.compress(b"no", mtime=0)]
)
def test_refuses_garbage(tmp_path, kind, content):
    (tmp_path / f"a{kind}").write_bytes(content)
    refusal(read_image, tmp_path / f"a{kind}")


def test_refuses_a_name_that_would_abort_simpleitk(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff.mha")
    meta_file(path)
    with pytest.raises(InputError, match=r"a\\udcff\.mha.*UTF-8"):
        read_image(path)


def test_refuses_what_may_not_be_read(tmp_path):
    path = meta_file(tmp_path / "a.mha")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "Permission denied" in refusal(read_image, path)
    finally:
        os.seteuid(user)


def write_scan(path: Path, compressed: bool, size: int = 40) -> None:
    grid = Grid((size, size, size), (2.0, 2.0, 2.0))
    sitk.WriteImage(sitk_image(hounsfield(grid), grid), path, compressed)


PLAIN = [".mha", ".nii", ".nrrd"]
COMPRESSED = [".mha", ".nii.gz", ".nrrd"]


@pytest.mark.parametrize(
    ("kind", "compressed"), [*((k, False) for k in PLAIN), *((k, True) for k in COMPRESSED)], ids=str
)
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9999])
def test_refuses_a_file_cut_short(tmp_path, kind, compressed, kept):
    path = tmp_path / f"a{kind}"
    write_scan(path, compressed)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refusal(read_image, path)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_refuses_a_stream_without_its_checksum(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    write_scan(path, compressed=True, size=100)
    path.write_bytes(path.read_bytes()[:-2])
    assert "ends early" in refusal(read_image, path)


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("place", [0.5, 0.9])
def test_refuses_one_flipped_bit_in_compressed_voxels(tmp_path, kind, place):
    path = tmp_path / f"a{kind}"
    write_scan(path, compressed=True, size=100)  # large enough for the header to be read before the fault is met
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(read_image, path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fault", ["missing", "short"])
def test_refuses_mhd_with_bad_data_file(tmp_path, compressed, fault):
    path = tmp_path / "a.mhd"
    write_scan(path, compressed)
    data = tmp_path / ("a.zraw" if compressed else "a.raw")
    content = data.read_bytes()
    data.unlink()
    if fault == "short":
        data.write_bytes(content[: len(content) // 2])
    refusal(read_image, path)


def test_compressed_stream_shorter_than_the_header_says(tmp_path):
    write_scan(tmp_path / "a.nii", compressed=False)
    content = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(content[:-2]))
    assert "cut short" in refusal(read_image, tmp_path / "short.nii.gz")
    # while several gzip members in a row are one valid file
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert torch.equal(read_image(tmp_path / "b.nii.gz").voxels, read_image(tmp_path / "a.nii").voxels)


# --- canonical -------------------------------------------------------------------------------------------------------


def numbered(grid: Grid) -> Image:
    """Every voxel has its own value."""
    count = int(np.prod(grid.size))
    return Image(torch.arange(count, dtype=torch.int16).reshape(1, 1, *grid.shape), grid, Path("numbered.mha"))


def world_by_value(image: Image) -> np.ndarray:
    """World position of each value of a `numbered` image, by value."""
    nz, ny, nx = image.grid.shape
    index = np.stack(np.meshgrid(range(nz), range(ny), range(nx), indexing="ij"), -1)[..., ::-1].reshape(-1, 3)
    return image.grid.to_world(index)[np.argsort(image.voxels.numpy().ravel())]


def check_canonical(image: Image) -> Image:
    stored = canonical(image)
    assert stored.voxels.is_contiguous() and stored.path == image.path
    assert sorted(stored.grid.size) == sorted(image.grid.size)
    np.testing.assert_allclose(world_by_value(stored), world_by_value(image), atol=1e-9)
    # closest to the identity of all re-storings, by brute force
    original = np.array(image.grid.direction)
    best = max(float(np.trace(original @ p)) for p in SIGNED_PERMUTATIONS)
    assert np.trace(np.array(stored.grid.direction)) == pytest.approx(best, abs=1e-5)
    again = canonical(stored)
    assert again.grid == stored.grid and torch.equal(again.voxels, stored.voxels)
    return stored


@pytest.mark.parametrize("matrix", SIGNED_PERMUTATIONS)
def test_canonical_turns_all_48_orientations_into_one(matrix):
    stored = check_canonical(numbered(Grid((3, 4, 5), (0.7, 1.1, 2.5), (7.0, -8.0, 9.0), as_matrix(matrix))))
    assert stored.grid.direction == Grid((1, 1, 1)).direction


@few
@given(grids(max_size=6))
def test_canonical_keeps_every_voxel_in_place(grid):
    check_canonical(numbered(grid))


def test_canonical_settles_ties_the_same_way_despite_rounding():
    s = np.sqrt(0.5)
    tie = np.array([[s, -s, 0], [s, s, 0], [0, 0, 1]])
    stored = [
        canonical(numbered(Grid((3, 4, 5), direction=as_matrix(tie + 1e-12 * np.array(noise).reshape(3, 3)))))
        for noise in ([0] * 9, [1, 0, 0, 0, 1, 0, 0, 0, 0], [-1, 0, 0, 0, -1, 0, 0, 0, 0])
    ]
    for other in stored[1:]:
        assert torch.equal(stored[0].voxels, other.voxels)


# --- all or nothing --------------------------------------------------------------------------------------------------

GRID = Grid((3, 4, 6))


def failing(slab: Tensor) -> Iterator[Tensor]:
    yield slab
    raise RuntimeError("half-way")


@layouts
@pytest.mark.parametrize("existing", [False, True])
def test_failure_half_way_leaves_everything_as_it_was(tmp_path, layout: Layout, existing):
    path = tmp_path / "field.mha"
    if existing:
        path.write_bytes(b"the old one")
    with pytest.raises(RuntimeError, match="half-way"):
        write_field(path, GRID, failing(torch.zeros(1, 3, 2, 4, 3)), layout)
    with pytest.raises(RuntimeError, match="half-way"):
        write_image_slabs(path, GRID, failing(torch.zeros(1, 1, 2, 4, 3)), torch.float32)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"the old one"] if existing else [])


@layouts
@pytest.mark.parametrize("rows", [[], [5], [2, 2, 3], [7]])
def test_refuses_a_wrong_number_of_rows(tmp_path, layout: Layout, rows):
    with pytest.raises(ValueError, match=r"rows.*expected"):
        write_field(tmp_path / "a.mha", GRID, (torch.zeros(1, 3, n, 4, 3) for n in rows), layout)
    assert not list(tmp_path.iterdir())


def test_refuses_slabs_of_another_type_or_width(tmp_path):
    with pytest.raises(ValueError, match="int16"):
        write_image_slabs(tmp_path / "a.mha", GRID, (torch.zeros(1, 1, 6, 4, 3) for _ in "a"), torch.int16)
    with pytest.raises(ValueError, match="4, 3"):
        write_image_slabs(tmp_path / "a.mha", GRID, (torch.zeros(1, 1, 6, 3, 4) for _ in "a"), torch.float32)
    with pytest.raises(ValueError, match="float64"):
        write_image(tmp_path / "a.mha", torch.zeros(1, 1, 6, 4, 3, dtype=torch.float64), GRID)
    assert not list(tmp_path.iterdir())


def test_full_disk_and_missing_folder_name_the_target(tmp_path, monkeypatch):
    path = tmp_path / "none" / "a.mha"
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        write_image(path, torch.zeros(1, 1, 6, 4, 3), GRID)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write: No space left on device") as caught:
        write_image(tmp_path / "a.mha", torch.zeros(1, 1, 6, 4, 3), GRID)
    assert caught.value.filename == str(tmp_path / "a.mha") and caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_written_file_is_readable_by_others(tmp_path):
    """Another user fetches the container's output: the usual permissions, not those of a temporary file."""
    old = os.umask(0o022)
    try:
        write_image(tmp_path / "a.mha", torch.zeros(1, 1, 6, 4, 3), GRID)
    finally:
        os.umask(old)
    assert (tmp_path / "a.mha").stat().st_mode & 0o777 == 0o644

"""The formats of results: the same image for SimpleITK, nibabel and our readers in each, and whose file it is."""

import gzip
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithm import load
from algorithm.files.formats import gzipped, header
from algorithm.files.images import read_field, read_image, read_volume
from algorithm.files.writing import write_field, write_image_slabs
from algorithm.geometry import Grid
from algorithm.results.ownership import is_own_image, result_mark
from evaluation.fields import read_field as evaluation_field
from tests.support.made_up_results import FIXED, FLIP, TURN
from tests.support.running import call_main, files_below, lungreg, pair_options, results
from tests.support.strategies import examples, grids

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = (".mha", ".nrrd", ".nii.gz")
SIZE, SPACING, ORIGIN = (7, 6, 5), (0.7, 1.25, 2.5), (-31.4, 120.0, -987.6)
GRIDS = [Grid(SIZE, SPACING, ORIGIN, direction) for direction in (FLIP, TURN, Grid(SIZE).direction)]


def slabs_of(volume: torch.Tensor, rows: int = 2) -> Iterator[torch.Tensor]:
    yield from volume.split(rows, dim=2)


def scalars(grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    values = 500 * torch.randn(1, 1, *grid.shape, generator=torch.Generator().manual_seed(0))
    return values.abs().clamp(max=255).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def vectors(grid: Grid) -> torch.Tensor:
    return 9 * torch.randn(1, 3, *grid.shape, generator=torch.Generator().manual_seed(1))


def check_grid(image: sitk.Image, grid: Grid) -> None:
    assert image.GetSize() == grid.size
    for found, expected in (
        (image.GetSpacing(), grid.spacing),
        (image.GetOrigin(), grid.origin),
        (image.GetDirection(), np.ravel(grid.direction)),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.uint8])
def test_an_image_is_the_same_for_everyone(tmp_path: Path, kind: str, grid: Grid, dtype: torch.dtype) -> None:
    values, path = scalars(grid, dtype), tmp_path / f"a{kind}"
    write_image_slabs(path, grid, slabs_of(values), dtype, result_mark(path))
    image = sitk.ReadImage(str(path))
    check_grid(image, grid)
    expected = values[0, 0].numpy()
    assert sitk.GetArrayViewFromImage(image).dtype == expected.dtype
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image), expected)
    np.testing.assert_array_equal(read_volume(path)[0], expected)
    if kind == ".nii.gz":
        theirs = nibabel.load(path)
        assert theirs.get_data_dtype() == expected.dtype and theirs.header.get_slope_inter() in ((1, 0), (None, None))
        np.testing.assert_array_equal(np.asarray(theirs.dataobj).T, expected)
        at = theirs.affine @ [3, 2, 1, 1]
        np.testing.assert_allclose(at[:3] * [-1, -1, 1], grid.to_world(np.array([3, 2, 1])), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_field_is_the_same_displacement_for_everyone(tmp_path: Path, kind: str, grid: Grid) -> None:
    values, path = vectors(grid), tmp_path / f"a{kind}"
    write_field(path, grid, slabs_of(values), "itk", result_mark(path))
    expected = values[0].permute(1, 2, 3, 0).numpy()
    image = sitk.ReadImage(str(path))
    check_grid(image, grid)
    assert image.GetPixelID() == sitk.sitkVectorFloat32
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image), expected)
    ours, read = read_field(path)
    assert torch.equal(ours, values)
    np.testing.assert_allclose(read.origin, grid.origin, atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(evaluation_field(path)), expected)
    index = (4, 3, 2)
    point, place = grid.to_world(np.array(index)), expected[index[::-1]] + grid.to_world(np.array(index))
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    np.testing.assert_allclose(transform.TransformPoint(point.tolist()), place, atol=1e-3)
    if kind == ".nii.gz":
        theirs = nibabel.load(path)
        assert theirs.header.get_intent()[0] == "displacement vector" and theirs.shape == (*grid.size, 1, 3)
        moved = theirs.affine[:3] @ [*index, 1] + theirs.get_fdata()[(*index, 0)]
        np.testing.assert_allclose(moved * [-1, -1, 1], place, atol=1e-3)


@examples(20)
@given(grids(), st.sampled_from(KINDS), st.integers(1, 9))
def test_the_thickness_of_slabs_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, grid: Grid, kind: str, rows: int
) -> None:
    path = tmp_path_factory.mktemp("a") / f"a{kind}"
    write_field(path, grid, slabs_of(vectors(grid), rows), "itk")
    assert torch.equal(read_field(path)[0], vectors(grid))


@pytest.mark.parametrize("kind", KINDS)
def test_its_bytes_are_always_the_same_and_say_whose_it_is(tmp_path: Path, kind: str) -> None:
    path, grid = tmp_path / f"a{kind}", GRIDS[0]
    contents = []
    for _ in range(2):
        write_field(path, grid, slabs_of(vectors(grid)), "itk", result_mark(path))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] and is_own_image(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.rename(tmp_path / f"b{kind}")
    assert not is_own_image(tmp_path / f"b{kind}")
    write_field(path, grid, slabs_of(vectors(grid)), "itk")
    assert not is_own_image(path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.mha"):
        write_image_slabs(tmp_path / "a.png", GRIDS[0], [], torch.int16)
    with pytest.raises(ValueError, match=r"expected one of torch\.float32"):
        header(".nrrd", GRIDS[0], torch.float64)
    with pytest.raises(ValueError, match=r"as \.nii\.gz, expected \.mha"):
        write_field(tmp_path / "a.nii.gz", GRIDS[0], [], "grand-challenge")
    assert not list(tmp_path.iterdir())


# --- compression -----------------------------------------------------------------------------------------------------


def test_compressed_is_one_stream_that_every_program_can_read() -> None:
    pieces = [b"a" * 1000, b"", np.arange(5000, dtype="<f4").data, b"end"]
    packed = b"".join(gzipped(pieces, "whose"))
    assert gzip.decompress(packed) == b"".join(bytes(piece) for piece in pieces)
    assert packed.count(b"\x1f\x8b\x08") == 1 and b"whose" in packed[:20]
    assert gzip.decompress(b"".join(gzipped([]))) == b""


def test_compression_does_not_run_ahead_of_what_is_written() -> None:
    """Slabs are made one by one: a whole field would not fit into memory."""
    made: list[int] = []

    def pieces() -> Iterator[bytes]:
        for number in range(50):
            made.append(number)
            yield bytes(1000)

    packed = gzipped(pieces())
    next(packed)  # the header
    next(packed)
    time.sleep(0.05)
    assert len(made) <= torch.get_num_threads() + 1
    packed.close()  # type: ignore[attr-defined]
    assert threading.active_count() < 20


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_format(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> dict[str, Path]:
    """The same registration, written in each format."""
    folders = {}
    for kind in KINDS:
        out = folders[kind] = tmp_path_factory.mktemp("out")
        options = pair_options(example, out, small_weights)
        assert call_main(*options, "--names=kind", f"--format={kind[1:]}", "--transforms=on") == 0
    return folders


def test_a_run_writes_all_images_in_the_format(by_format: dict[str, Path]) -> None:
    images = {}
    for kind, out in by_format.items():
        found = {name for name in files_below(out) if name.startswith("images")}
        assert found == {f"images/displacement-field/fixed_field{kind}", f"images/warped-moving/fixed_warped{kind}"}
        images[kind] = [sitk.GetArrayFromImage(sitk.ReadImage(str(out / name))) for name in sorted(found)]
    for kind in KINDS[1:]:
        for ours, theirs in zip(images[kind], images[".mha"], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("transforms", ["with", "without"])
def test_every_command_finds_and_reads_the_result(
    tmp_path: Path, by_format: dict[str, Path], example: Path, transforms: str
) -> None:
    points, lobes, found = example / "moving_landmarks.csv", example / "moving_lobes.mha", {}
    for kind, out in by_format.items():
        folder = tmp_path / f"result{kind}"
        folder.mkdir()
        (folder / "images").symlink_to(out / "images")
        figures = (out / "results.json").read_text()
        if transforms == "with":
            for name in ("transform.h5", "inverse.h5"):
                (folder / name).symlink_to(out / name)
        else:
            figures = figures.replace("inverse_residual_mm", "left_out")
        (folder / "results.json").write_text(figures)
        there = [tmp_path / f"{name}{kind}" for name in ("points.csv", "lobes.mha", "field.mha")]
        for path in there:
            path.parent.mkdir(exist_ok=True)
        csv, labels, field = tmp_path / f"p{kind}.csv", tmp_path / f"l{kind}.mha", tmp_path / f"f{kind}.mha"
        assert lungreg("points", folder, points, csv, "--from=moving") == 0
        assert lungreg("apply", folder, lobes, labels, "--onto=fixed", "--interpolation=nearest") == 0
        assert lungreg("convert", folder, field) == 0
        mapped = np.loadtxt(csv, delimiter=",", skiprows=1, usecols=(0, 1, 2))
        np.testing.assert_allclose(load(folder).to_fixed(read_points(points)), mapped, atol=1e-3)
        found[kind] = mapped, *(sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (labels, field))
    for kind in KINDS[1:]:
        np.testing.assert_allclose(found[kind][0], found[".mha"][0], atol=2e-3)
        assert (found[kind][1] != found[".mha"][1]).mean() < 1e-4
        np.testing.assert_allclose(found[kind][2], found[".mha"][2], atol=1e-4)


def read_points(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1, 2))


def test_the_evaluation_measures_it(tmp_path: Path, by_format: dict[str, Path], example: Path) -> None:
    truth, predictions = tmp_path / "truth", tmp_path / "predictions"
    for kind, out in by_format.items():
        case = truth / f"case{kind.replace('.', '_')}"
        case.mkdir(parents=True)
        for name in ("fixed_landmarks.csv", "moving_landmarks.csv", "fixed_lobes.mha", "moving_lobes.mha"):
            (case / name).symlink_to(example / name)
        predictions.mkdir(exist_ok=True)
        (predictions / case.name).symlink_to(out)
    arguments = ("--input", predictions, "--ground-truth", truth, "--output", tmp_path / "scores")
    assert lungreg("evaluate", *arguments) == 0
    rows = (tmp_path / "scores" / "cases.csv").read_text().splitlines()
    assert len(rows) == 4
    errors = np.array([row.split(",")[1:5] for row in rows[1:]], float)
    np.testing.assert_allclose(errors, np.broadcast_to(errors[0], errors.shape), atol=1e-4)
    assert errors.min() > 0.1


def test_another_format_takes_the_place_of_the_first(tmp_path: Path, example: Path, small_weights: Path) -> None:
    for kind in KINDS:
        assert call_main(*pair_options(example, tmp_path, small_weights), f"--format={kind[1:]}") == 0
        assert {name for name in files_below(tmp_path) if "images" in name} == {
            f"images/{folder}/fixed{kind}" for folder in ("displacement-field", "warped-moving")
        }


def test_scans_are_found_again_by_results_json(tmp_path: Path, example: Path, by_format: dict[str, Path]) -> None:
    for out in by_format.values():
        for name, path in results(out)["paths"].items():
            assert (out / path).resolve() == (example / f"{name}.mha").resolve()
            assert read_image(out / path).grid.size


def test_fixed_is_a_grid_of_its_own() -> None:
    """Otherwise the tests above would pass with any axes."""
    assert len(set(FIXED.size)) == 3 and len(set(SIZE)) == 3

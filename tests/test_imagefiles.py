"""Files whose bytes are not those that their header promises, or whose header contradicts itself, through both readers.

The algorithm's reader and the evaluation's say why; neither returns other values than were written.
"""

import gzip
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from algorithm.errors import InputError
from algorithm.files.images import read_field, read_image
from evaluation import fields as evaluated
from evaluation import images as evaluated_images
from evaluation.errors import CaseError

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-1000, 400, (16, 17, 18)).astype(np.int16)
VECTORS = RNG.normal(0, 5, (16, 17, 18, 3)).astype(np.float32)
PLAIN = ["mha", "mhd", "nii", "nrrd", "nhdr"]
COMPRESSED = ["mha", "mhd", "nii.gz", "nrrd", "nhdr"]
kinds = pytest.mark.parametrize("kind", ["scan", "vectors", "four axes"])


def scan() -> sitk.Image:
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((3.0, 2.5, 2.0))
    image.SetOrigin((5.0, 6.0, -7.0))
    return image


def made(kind: str) -> sitk.Image:
    if kind == "scan":
        return scan()
    field = sitk.GetImageFromArray(VECTORS, isVector=True)
    field.CopyInformation(scan())
    if kind == "vectors":
        return field
    return sitk.JoinSeries([sitk.VectorIndexSelectionCast(field, i) for i in range(3)])


def write(folder: Path, kind: str, ending: str, compressed: bool = False) -> tuple[Path, Path]:
    """The header's file and that of the voxels, often the same."""
    path = folder / f"a.{ending}"
    sitk.WriteImage(made(kind), path, compressed)
    return path, next((p for p in folder.iterdir() if p != path), path)


def read_twice(path: Path, kind: str = "scan") -> list[np.ndarray | str]:
    """What the two readers make of it, (z, y, x) or (z, y, x, 3); or their sentences."""
    found: list[np.ndarray | str] = []
    try:
        if kind == "scan":
            found.append(read_image(path).voxels[0, 0].numpy())
        else:
            found.append(np.moveaxis(read_field(path)[0][0].numpy(), 0, -1))
    except InputError as error:
        found.append(str(error))
    try:
        read = evaluated_images.read_image if kind == "scan" else evaluated.read_field
        found.append(sitk.GetArrayFromImage(read(path)))
    except CaseError as error:
        found.append(str(error))
    return found


def check_refused(path: Path, says: str = "", kind: str = "scan") -> None:
    for sentence in read_twice(path, kind):
        assert isinstance(sentence, str)
        assert path.name in sentence and "expected" in sentence and says in sentence and "\n" not in sentence


def check_right(path: Path, kind: str = "scan") -> None:
    for voxels in read_twice(path, kind):
        np.testing.assert_array_equal(voxels, VOXELS if kind == "scan" else VECTORS)


def replaced(path: Path, pattern: bytes, by: bytes) -> Path:
    content = path.read_bytes()
    path.write_bytes(re.sub(pattern, lambda _: by, content, count=1))
    assert path.read_bytes() != content
    return path


# --- every byte that the header promises -----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    ("ending", "compressed"), [*((e, False) for e in PLAIN), *((e, True) for e in COMPRESSED)], ids=str
)
def test_whole_files_are_read_and_others_refused(tmp_path: Path, kind: str, ending: str, compressed: bool) -> None:
    path, data = write(tmp_path, kind, ending, compressed)
    if kind == "four axes" and ".nii" in path.name:
        found, said = read_twice(path, kind)  # NIfTI has to say whose axes these are; the evaluation asks for that
        np.testing.assert_array_equal(found, VECTORS)
        assert "does not say whether its vectors are RAS or LPS" in said
    else:
        check_right(path, kind)
    whole = data.read_bytes()
    for spoilt in (whole[:-1], whole[:-100], whole[: len(whole) // 2], whole + b"\n", whole + bytes(100)):
        data.write_bytes(spoilt)
        check_refused(path, kind=kind)


@kinds
@pytest.mark.parametrize("ending", COMPRESSED)
def test_no_flipped_bit_within_a_stream_is_read(tmp_path: Path, kind: str, ending: str) -> None:
    path, data = write(tmp_path, kind, ending, compressed=True)
    content = data.read_bytes()
    for place in np.linspace(len(content) // 8, len(content) - 1, 12).astype(int):
        spoilt = bytearray(content)
        spoilt[place] ^= 4
        data.write_bytes(spoilt)
        for found in read_twice(path, kind):
            assert isinstance(found, str) or np.array_equal(found, VOXELS if kind == "scan" else VECTORS)


@kinds
@pytest.mark.parametrize("ending", ["mha", "mhd"])
def test_the_length_of_the_stream_may_be_missing_but_not_wrong(tmp_path: Path, kind: str, ending: str) -> None:
    """SimpleITK reads memory that nobody wrote for a missing length, zeros at the end for one too small."""
    path, _ = write(tmp_path, kind, ending, compressed=True)
    content = path.read_bytes()
    length = int(re.search(rb"CompressedDataSize = (\d+)", content)[1])  # type: ignore[index]
    for wrong in (length - 100, length + 100, 1, 10**12):
        path.write_bytes(content)
        check_refused(replaced(path, rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % wrong), kind=kind)
    path.write_bytes(content)
    check_right(replaced(path, rb"CompressedDataSize = \d+\n", b""), kind)


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_stream_is_inflated_no_further_than_the_header_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path, data = write(tmp_path, "scan", ending, compressed=True)
    zeros = zlib.compressobj(wbits=zlib.MAX_WBITS if ending.startswith("mh") else 16 + zlib.MAX_WBITS)
    block = bytes(2**20)
    stream = b"".join([*(zeros.compress(block) for _ in range(200)), zeros.flush()])
    if ending == "nii.gz":
        stream = gzip.compress(gzip.decompress(data.read_bytes())[:352]) + stream
    else:
        end = {"mha": b"LOCAL\n", "nrrd": b"\n\n"}.get(ending)
        head = data.read_bytes()[: data.read_bytes().index(end) + len(end)] if end else b""
        stream = head + stream
    data.write_bytes(stream)
    if ending.startswith("mh"):
        replaced(path, rb"CompressedDataSize = \d+\n", b"")
    inflated = []
    plain = zlib.decompressobj

    class Counting:
        def __init__(self, wbits: int) -> None:
            self.inflater = plain(wbits)

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            inflated.append(self.inflater.decompress(data, most))
            return inflated[-1]

        def __getattr__(self, name: str) -> object:
            return getattr(self.inflater, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    check_refused(path, "more than the")
    assert sum(map(len, inflated)) < 2 * 5 * 2**20


@pytest.mark.parametrize("wide", [False, True])
def test_one_data_file_for_each_slice(tmp_path: Path, wide: bool) -> None:
    path, data = write(tmp_path, "scan", "mhd")
    names = [f"s{number:02d}.raw" for number in range(16)]
    for name, plane in zip(names, VOXELS, strict=True):
        (tmp_path / name).write_bytes(plane.tobytes())
    entry = "LIST\n" + "\n".join(names) if wide else "s%02d.raw 0 15 1"
    replaced(path, b"a.raw", entry.encode())
    check_right(path)
    (tmp_path / "s07.raw").write_bytes(bytes(100))
    check_refused(path, "s07.raw is cut short at 100 of 612 bytes")
    (tmp_path / "s07.raw").unlink()
    check_refused(path, "s07.raw")
    assert data.exists()


@pytest.mark.parametrize("encoding", ["ascii", "hex", "raw"])
@pytest.mark.parametrize("endian", ["little", "big"])
def test_other_encodings_of_nrrd(tmp_path: Path, encoding: str, endian: str) -> None:
    raw = VOXELS.astype("<i2" if endian == "little" else ">i2").tobytes()
    text = {"ascii": " ".join(map(str, VOXELS.ravel())).encode(), "hex": raw.hex().encode(), "raw": raw}[encoding]
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 18 17 16\nspacings: 2 2 2.5\nendian: {endian}\n"
    head += f"encoding: {encoding}\n\n"
    path = tmp_path / "a.nrrd"
    path.write_bytes(head.encode() + text)
    check_right(path)
    path.write_bytes(head.encode() + text[:-9])
    check_refused(path)


@pytest.mark.parametrize("axis", [0, 3])
def test_components_of_nrrd_first_or_last(tmp_path: Path, axis: int) -> None:
    stored = VECTORS if axis == 0 else np.moveaxis(VECTORS, -1, 0)
    kinds = ["domain"] * 3
    kinds.insert(axis, "vector")
    sizes, spacings = ["18", "17", "16"], ["2", "2", "2"]
    sizes.insert(axis, "3")
    spacings.insert(axis, "nan")
    head = f"NRRD0004\ntype: float\ndimension: 4\nsizes: {' '.join(sizes)}\nkinds: {' '.join(kinds)}\n"
    head += f"spacings: {' '.join(spacings)}\nendian: little\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + stored.tobytes())
    check_right(tmp_path / "a.nrrd", "vectors")


def nifti(path: Path, *numbers: tuple[str, int, tuple[float, ...]], image: sitk.Image | None = None) -> Path:
    """A plain file with these numbers (format, place) in its header."""
    sitk.WriteImage(scan() if image is None else image, path)
    content = bytearray(path.read_bytes())
    for form, place, values in numbers:
        struct.pack_into(f"<{form}", content, place, *values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (2.0, -1024.0), (0.5, 3.0)])
def test_nifti_values_are_those_of_simpleitk(tmp_path: Path, dtype: str, scale: tuple[float, float]) -> None:
    image = sitk.GetImageFromArray((VOXELS % 200).astype(dtype))
    image.CopyInformation(scan())
    path = nifti(tmp_path / "a.nii", ("2f", 112, scale), image=image)
    found = evaluated_images.read_image(path)
    theirs = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(theirs))
    assert found.GetOrigin() == theirs.GetOrigin() and found.GetDirection() == theirs.GetDirection()


def test_nifti_displacements_along_ras_are_turned_as_simpleitk_turns_them(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", ("h", 68, (1006,)), image=made("vectors"))
    for vectors in read_twice(path, "vectors"):
        np.testing.assert_array_equal(vectors, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
        np.testing.assert_array_equal(vectors, VECTORS * [-1, -1, 1])


# --- headers that contradict themselves ------------------------------------------------------------------------------

QFORM, SFORM = ("h", 252), ("h", 254)


def test_nifti_with_equal_forms_or_only_one_is_read(tmp_path: Path) -> None:
    for codes in ((1, 1), (2, 2), (1, 4), (0, 2), (1, 0)):
        check_right(nifti(tmp_path / "a.nii", ("2h", 252, codes)))


@pytest.mark.parametrize("codes", [(0, 1), (0, 2), (1, 1), (1, 4)])
def test_nifti_spacing_against_sform(tmp_path: Path, codes: tuple[int, int]) -> None:
    check_refused(nifti(tmp_path / "a.nii", ("2h", 252, codes), ("3f", 80, (1.0, 1.0, 1.0))), "sform has steps of 3 ×")


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1), (1, 4)])
def test_nifti_qform_against_sform(tmp_path: Path, codes: tuple[int, int]) -> None:
    """Shifted by 30 mm; turned by 180°."""
    check_refused(nifti(tmp_path / "a.nii", ("2h", 252, codes), ("f", 268, (25.0,))), "voxels apart")
    check_refused(nifti(tmp_path / "a.nii", ("2h", 252, codes), ("3f", 256, (1.0, 0.0, 0.0))), "voxels apart")


def test_nifti_of_a_bare_array(tmp_path: Path) -> None:
    unplaced = ("2h", 252, (0, 0))
    check_refused(nifti(tmp_path / "a.nii", unplaced, ("3f", 80, (1.0, 1.0, 1.0))), "neither a spacing nor a position")
    path = nifti(tmp_path / "a.nii", unplaced)
    check_right(path)
    (remark,) = read_image(path).remarks
    assert remark.startswith("a.nii: ") and "qform_code and sform_code are 0" in remark
    assert read_image(path).grid.origin == (0, 0, 0)


@pytest.mark.parametrize(
    ("ending", "pattern", "by"),
    [
        ("mha", rb"ElementSpacing = .*\n", b""),
        ("mhd", rb"ElementSpacing = .*\n", b""),
        ("nrrd", rb"space directions: .*\n", b""),
        ("nrrd", rb"space directions: .*\n", b"spacings: nan nan nan\n"),
        ("nrrd", rb"space directions: .*\n", b"spacings: 3 nan 2\n"),
        ("nhdr", rb"space directions: .*\n", b"space directions: none none none\n"),
    ],
)
def test_a_missing_spacing(tmp_path: Path, ending: str, pattern: bytes, by: bytes) -> None:
    path, _ = write(tmp_path, "scan", ending)
    check_refused(replaced(path, pattern, by), "spacing")


@pytest.mark.parametrize(
    "added", [b"ElementSpacing = 1 1 1\n", b"DimSize = 18 17 8\n", b"Position = 0 0 0\n", b"ElementByteOrderMSB = T\n"]
)
def test_one_thing_said_twice(tmp_path: Path, added: bytes) -> None:
    path, _ = write(tmp_path, "scan", "mha")
    check_refused(replaced(path, rb"ElementDataFile", added + b"ElementDataFile"))


# --- the data file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
@pytest.mark.parametrize("listed", [False, True])
def test_headers_that_lead_out_of_their_folder(tmp_path: Path, ending: str, listed: bool) -> None:
    (tmp_path / "in").mkdir()
    path, data = write(tmp_path / "in", "scan", ending)
    outside = data.rename(tmp_path / "a.raw")
    head = path.read_bytes()
    for name in ("../a.raw", str(outside), "b/../../a.raw", "../in2/a.raw"):
        path.write_bytes(head.replace(b"a.raw", (f"LIST\n{name}" if listed else name).encode()))
        check_refused(path, "outside its folder")


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
def test_data_files_in_or_below_the_folder(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = write(tmp_path, "scan", ending)
    (tmp_path / "below it").mkdir()
    moved = data.rename(tmp_path / "below it" / "a.raw")
    head = path.read_bytes()
    for name in ("below it/a.raw", "./below it/a.raw", str(moved)):
        path.write_bytes(head.replace(b"a.raw", name.encode()))
        check_right(path)
    data.symlink_to(moved)  # links are the user's own
    path.write_bytes(head)
    monkeypatch.chdir(tmp_path)
    check_right(Path(path.name))


@pytest.mark.parametrize("ending", ["mhd", "nhdr"])
def test_a_data_file_that_is_not_there_is_named(tmp_path: Path, ending: str) -> None:
    path, data = write(tmp_path, "scan", ending)
    data.unlink()
    check_refused(path, "'a.raw' cannot be read (No such file")
    data.symlink_to("gone.raw")
    check_refused(path, "a link to 'gone.raw'")
    data.unlink()
    os.mkfifo(data)
    check_refused(path, "no file")


def test_gzip_called_nii(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii")
    path.write_bytes(gzip.compress(path.read_bytes()))
    check_refused(path, "compressed with gzip though its name ends in .nii")


@pytest.mark.parametrize("read", [read_image, evaluated_images.read_image])
def test_a_link_to_nothing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "a.mha").symlink_to("gone.mha")
    with pytest.raises((InputError, CaseError), match=r"a link to 'gone\.mha', which is not there"):
        read(tmp_path / "a.mha")


# --- one home for both containers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dockerfile", "package"), [("Dockerfile", "algorithm"), ("evaluation/Dockerfile", "evaluation")]
)
def test_each_image_holds_its_package_and_the_reader(dockerfile: str, package: str) -> None:
    """And what is copied is not ignored."""
    copied = re.findall(r"(?m)^COPY (\S+)", (ROOT / dockerfile).read_text())
    assert {source.split("/")[0] for source in copied} & {"algorithm", "evaluation", "imagefiles", "resultpages"} == {
        package,
        "imagefiles",
        "resultpages",
    }
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) <= allowed and all(list(ROOT.glob(source)) for source in copied)


def test_the_evaluation_needs_neither_torch_nor_the_algorithm() -> None:
    program = (
        "import sys; sys.modules.update(torch=None, algorithm=None); import evaluation.__main__, evaluation.convert"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

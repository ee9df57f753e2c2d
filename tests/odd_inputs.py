"""Odd and bad inputs, and what has to become of each: a table for tests and users.

    python -m tests.odd_inputs > docs/robustness.md

Every input is made from a phantom pair and given to the main program by tests/test_odd_inputs.py.
"""

import gzip
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from algorithm.files.images import read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Grid
from benchmarks.invariance import Change, carried, cut, padded, spaced, stored
from phantom.pair import PhantomSettings, make_pair
from tests.support.dicom_series import write_companions, write_enhanced, write_series, write_two_acquisitions

Outcome = Literal["same result", "right result", "identity", "warned", "refused"]
FAR_MM = (5000.0, -12000.0, 800.0)


@dataclass(frozen=True)
class Desk:
    """A folder to make an input in, and the phantom pair."""

    folder: Path
    example: Path
    """As `phantom` writes it."""

    def scan(self, role: str = "fixed") -> sitk.Image:
        """The plain scan."""
        return sitk.ReadImage(str(self.example / f"{role}.mha"))

    def write(self, image: sitk.Image, name: str = "fixed.mha", compressed: bool = False) -> Path:
        """The image in a file of that name."""
        sitk.WriteImage(image, str(self.folder / name), compressed)
        return self.folder / name


@dataclass(frozen=True)
class Made:
    """Options of the command line for the input, and where its scans lie in the world."""

    options: tuple[str, ...]
    """After those for the plain pair, so that they come instead."""
    fixed_world: Affine = field(default_factory=Affine)
    """Takes the plain scan's positions to those of the odd one."""
    moving_world: Affine = field(default_factory=Affine)
    swapped: bool = False


Make = Callable[[Desk], Made]


@dataclass(frozen=True)
class OddInput:
    """One row of the table."""

    outcome: Outcome
    name: str
    make: Make
    says: str = ""
    """Words of the sentence on stderr, or of a warning in results.json; empty where nothing is warned of."""
    masks: bool = False
    """Whether lung masks are given, too: where the lungs are not the question, this is faster."""


# --- how inputs are made ---------------------------------------------------------------------------------------------


def role_file(make: Callable[[Desk], Path], role: str = "fixed") -> Make:
    """A file (or folder) for one role."""
    return lambda desk: Made((f"--{role}={make(desk)}",))


def in_folder(make: Callable[[Desk], object]) -> Make:
    """A whole /input folder."""

    def made(desk: Desk) -> Made:
        make(desk)
        return Made((f"--input={desk.folder}",))

    return made


def changed(fixed: Change | None = None, moving: Change | None = None) -> Make:
    """One or both scans, changed as in `benchmarks.invariance`."""

    def make(desk: Desk) -> Made:
        options, worlds = [], {"fixed": Affine(), "moving": Affine()}
        for role, change in (("fixed", fixed), ("moving", moving)):
            if change:
                placed = change(read_image(desk.example / f"{role}.mha"))
                path = desk.folder / f"{role}.mha"
                write_image(path, placed.image.voxels, placed.image.grid)
                options.append(f"--{role}={path}")
                worlds[role] = placed.world
        return Made(tuple(options), worlds["fixed"], worlds["moving"])

    return make


def values(change: Callable[[np.ndarray], np.ndarray], role: str = "fixed") -> Make:
    """The scan with other values; ``change`` gets float32, (z, y, x)."""

    def make(desk: Desk) -> Path:
        plain = desk.scan(role)
        image = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(plain).astype(np.float32)))
        image.CopyInformation(plain)
        return desk.write(image, f"{role}.mha")

    return role_file(make, role)


def shape(change: Callable[[sitk.Image], sitk.Image]) -> Make:
    """The fixed scan as another kind of image."""
    return role_file(lambda desk: desk.write(change(desk.scan())))


def header(**entries: str) -> Make:
    """The fixed scan with other entries in its MetaImage header."""

    def make(desk: Desk) -> Path:
        head, mark, voxels = (desk.example / "fixed.mha").read_bytes().partition(b"ElementDataFile = LOCAL\n")
        lines = [line for line in head.decode().splitlines() if line.split(" =")[0] not in entries]
        lines += [f"{key} = {value}" for key, value in entries.items()]
        (desk.folder / "fixed.mha").write_bytes("\n".join(lines).encode() + b"\n" + mark + voxels)
        return desk.folder / "fixed.mha"

    return role_file(make)


def spoilt(name: str, spoil: Callable[[bytearray], bytes], compressed: bool = False) -> Make:
    """The fixed scan in a file of that kind, its bytes spoilt."""

    def make(desk: Desk) -> Path:
        path = desk.write(desk.scan(), name, compressed)
        path.write_bytes(spoil(bytearray(path.read_bytes())))
        return path

    return role_file(make)


def renamed(written: str, name: str) -> Make:
    """The fixed scan, whole, under a name of its own."""
    return role_file(lambda desk: desk.write(desk.scan(), written).rename(desk.folder / name))


def dicom(spoil: Callable[[Path], object] = lambda folder: None) -> Make:
    """The fixed scan as a DICOM series, with a note and a DICOMDIR beside the slices."""

    def make(desk: Desk) -> Path:
        folder = write_series(desk.folder / "series", desk.scan(), name="{}")
        (folder / "notes.txt").write_text("no slice")
        (folder / "DICOMDIR").write_bytes(b"no slice")
        spoil(folder)
        return folder

    return role_file(make)


def mask(change: Callable[[sitk.Image], sitk.Image], role: str = "fixed") -> Make:
    """The lobes of one scan, changed, as its lung mask."""

    def make(desk: Desk) -> Path:
        return desk.write(change(sitk.ReadImage(str(desk.example / f"{role}_lobes.mha"))), "mask.mha")

    return role_file(make, f"{role}-mask")


# --- values and headers ----------------------------------------------------------------------------------------------


def some(value: float, count: int = 50) -> Callable[[np.ndarray], np.ndarray]:
    """The first voxels of a corner, in the air."""

    def change(hu: np.ndarray) -> np.ndarray:
        hu[0, 0].flat[:count] = value
        return hu

    return change


def mostly_nan(hu: np.ndarray) -> np.ndarray:
    hu[: 2 * len(hu) // 3] = np.nan
    return hu


def outside_circle(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """As scanners fill what lies outside their circular field of view."""

    def change(hu: np.ndarray) -> np.ndarray:
        y, x = (np.linspace(-1, 1, n) for n in hu.shape[1:])
        return np.where(y[:, None] ** 2 + x**2 > 1.1, value, hu).astype(np.float32)

    return change


def metal(hu: np.ndarray) -> np.ndarray:
    """An implant beside the spine."""
    hu[15:20, 22:24, 17:19] = 30000
    return hu


def enhanced(hu: np.ndarray) -> np.ndarray:
    """Vessels and heart under contrast."""
    hu[:, 8:20, 14:22][hu[:, 8:20, 14:22] > 0] += 250
    return hu


def as_type(dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: hu.astype(dtype)


def window(low: float, high: float, top: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hu: (hu.clip(low, high) - low) / (high - low) * np.float32(top)


def noise(hu: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 600, hu.shape).astype(np.int16)


def rescaled_nifti(desk: Desk) -> Path:
    """uint16 with slope 1 and intercept -1024."""
    path = desk.write(sitk.Cast(sitk.Clamp(desk.scan() + 1024, sitk.sitkInt16, 0, 4095), sitk.sitkUInt16), "fixed.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<2f", content, 112, 1.0, -1024.0)
    path.write_bytes(content)
    return path


def nan_origin(content: bytearray) -> bytes:
    """In both forms in which a NIfTI header has it."""
    for place in (268, 292):
        struct.pack_into("<f", content, place, np.nan)
    return content


# --- files -----------------------------------------------------------------------------------------------------------


def flipped_bit(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 4
    return content


def without_voxels(desk: Desk) -> Path:
    path = desk.write(desk.scan(), "fixed.mhd")
    path.with_suffix(".raw").unlink()
    return path


def short_voxels(desk: Desk) -> Path:
    path = desk.write(desk.scan(), "fixed.mhd")
    os.truncate(path.with_suffix(".raw"), 5000)
    return path


def voxels_elsewhere(desk: Desk) -> Path:
    """The header names its voxels by an absolute path."""
    path = desk.write(desk.scan(), "fixed.mhd")
    (desk.folder / "elsewhere").mkdir()
    raw = path.with_suffix(".raw").rename(desk.folder / "elsewhere" / "a.raw")
    path.write_text(path.read_text().replace("fixed.raw", str(raw)))
    return path


def detached_nrrd(desk: Desk) -> Path:
    """Header and voxels in two files."""
    path = desk.write(desk.scan(), "fixed.nhdr").rename(desk.folder / "fixed.nrrd")
    return path


def header_with(name: str, pattern: bytes, by: bytes, compressed: bool = False) -> Make:
    """The fixed scan in a file of that kind, its header changed."""

    def spoil(content: bytearray) -> bytes:
        spoilt = re.sub(pattern, by, content, count=1)
        assert spoilt != content
        return spoilt

    return spoilt(name, spoil, compressed)


def nifti_with(form: str, place: int, *numbers: float) -> Make:
    """The fixed scan in NIfTI, with other numbers in its header."""

    def spoil(content: bytearray) -> bytes:
        struct.pack_into(f"<{form}", content, place, *numbers)
        return content

    return spoilt("fixed.nii", spoil)


def bare_array(content: bytearray) -> bytes:
    """As nibabel writes an array without an affine."""
    struct.pack_into("<2h", content, 252, 0, 0)
    struct.pack_into("<3f", content, 80, 1.0, 1.0, 1.0)
    return content


def voxels_outside(desk: Desk) -> Path:
    """The header names its voxels in another folder."""
    (desk.folder / "header").mkdir()
    path = desk.write(desk.scan(), "header/fixed.mhd")
    path.with_suffix(".raw").rename(desk.folder / "fixed.raw")
    path.write_text(path.read_text().replace("fixed.raw", "../fixed.raw"))
    return path


def nrrd_outside(desk: Desk) -> Path:
    (desk.folder / "header").mkdir()
    path = desk.write(desk.scan(), "header/fixed.nhdr")
    raw = path.with_suffix(".raw").rename(desk.folder / "fixed.raw")
    path.write_text(path.read_text().replace("fixed.raw", str(raw)))
    return path


def inflated(desk: Desk) -> Path:
    """300 KB that become 300 MB."""
    path = desk.write(desk.scan(), "fixed.nii")
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(300 * 2**20)))
    return path.rename(desk.folder / "fixed.nii.gz")


def link_to_nothing(desk: Desk) -> None:
    copy(desk, "moving.mha")
    (desk.folder / "fixed.mha").symlink_to("elsewhere/scan.mha")


def link_loop(desk: Desk) -> Path:
    (desk.folder / "fixed.mha").symlink_to("moving.mha")
    (desk.folder / "moving.mha").symlink_to("fixed.mha")
    return desk.folder / "fixed.mha"


def empty_folder(desk: Desk) -> Path:
    (desk.folder / "fixed.mha").mkdir()
    return desk.folder / "fixed.mha"


def plain_beside_compressed(desk: Desk) -> Path:
    desk.write(desk.scan(), "fixed.nii")
    return desk.write(desk.scan(), "fixed.nii.gz")


def empty_with_line_break(desk: Desk) -> Path:
    (desk.folder / "first\nsecond.mha").touch()
    return desk.folder / "first\nsecond.mha"


def second_series(folder: Path) -> None:
    image = sitk.ReadImage(str(folder / "im000"))[:, :, :1]
    write_series(folder, image, {"0020|000e": "1.2.3.5"}, "other {}")


def enhanced_ct(desk: Desk) -> Path:
    """All slices in one file."""
    (desk.folder / "series").mkdir()
    write_enhanced(desk.folder / "series" / "1", desk.scan(), list(range(33, -1, -1)), [1.0])
    return desk.folder / "series"


def two_acquisitions(numbers: tuple[str, str]) -> Callable[[Desk], Path]:
    """Inhale, and exhale half a slice above, in one series."""

    def make(desk: Desk) -> Path:
        fixed = desk.scan()
        moving = sitk.Resample(desk.scan("moving"), fixed, sitk.Transform(), sitk.sitkLinear, -1000)
        return write_two_acquisitions(desk.folder / "series", fixed, moving, numbers)

    return make


def ten_phases(desk: Desk) -> Path:
    for phase in range(10):
        write_series(desk.folder / "series", desk.scan(), {"0020|0100": str(phase)}, f"{phase} {{}}")
    return desk.folder / "series"


def tenth_slice(folder: Path) -> Path:
    return sorted(folder.glob("im*"))[10]


# --- folders ---------------------------------------------------------------------------------------------------------


def copy(desk: Desk, *names: str) -> None:
    """Plain scans under other names: those with "moving" in it are the moving one."""
    for name in names:
        path = desk.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(desk.example / ("moving.mha" if "moving" in name else "fixed.mha"), path)


def platform(*entries: object) -> Callable[[Desk], None]:
    """An inputs.json with these entries; the scans are in images/."""

    def make(desk: Desk) -> None:
        copy(desk, "images/fixed/a.mha", "images/moving/b.mha")
        (desk.folder / "inputs.json").write_text(json.dumps(entries))

    return make


def socket(slug: str, relative_path: str) -> dict[str, object]:
    return {"socket": {"slug": slug, "relative_path": relative_path}}


def no_json(desk: Desk) -> None:
    copy(desk, "images/fixed/a.mha", "images/moving/b.mha")
    (desk.folder / "inputs.json").write_text('[{"socket": ')


def among_results(name: str) -> Make:
    """A file that lies in the output already."""

    def make(desk: Desk) -> Made:
        path = desk.folder / "out" / name
        path.parent.mkdir(parents=True)
        shutil.copy(desk.example / "fixed.mha", path)
        return Made((f"--output={desk.folder / 'out'}",))

    return make


def input_among_results(desk: Desk) -> Made:
    """As of an earlier run's output, which is registered once more."""
    path = desk.folder / "out" / "images" / "warped-moving" / "fixed.mha"
    path.parent.mkdir(parents=True)
    shutil.copy(desk.example / "moving.mha", path)
    return Made((f"--moving={path}", f"--output={desk.folder / 'out'}"))


# --- masks and pairs -------------------------------------------------------------------------------------------------


def half_as_fine(image: sitk.Image) -> sitk.Image:
    """Shares of lung as floats on a grid of 5 mm, larger than the scan."""
    lungs = sitk.Cast(image > 0, sitk.sitkFloat32)
    grid = Grid((70, 60, 70), (5.0, 5.0, 5.0), (-175.0, -150.0, -175.0))
    return sitk.Resample(
        lungs, grid.size, sitk.Transform(3, sitk.sitkIdentity), sitk.sitkLinear, grid.origin, grid.spacing
    )


def certain_shares(image: sitk.Image) -> sitk.Image:
    """As a network's last layer gives them: never quite 0 or 1."""
    return 0.001 + 0.998 * sitk.Cast(image > 0, sitk.sitkFloat32)


def whole_chest(image: sitk.Image) -> sitk.Image:
    """A box around the lungs, 40 mm wider; not up to the border."""
    return sitk.BinaryDilate(image > 0, [4, 4, 4], sitk.sitkBox)


def around(image: sitk.Image) -> sitk.Image:
    """Chest wall and mediastinum."""
    lungs = image > 0
    return sitk.BinaryDilate(lungs, [2, 2, 2]) - lungs


def one_voxel(image: sitk.Image) -> sitk.Image:
    empty = image * 0
    empty[15, 15, 15] = 1
    return empty


def aside(image: sitk.Image) -> sitk.Image:
    """The same, 30 mm to the left."""
    x, y, z = image.GetOrigin()
    image.SetOrigin((x + 30, y, z))
    return image


def one_lung(image: sitk.Image) -> sitk.Image:
    """The left one: lobes 4 and 5."""
    return image > 3


def elsewhere(image: sitk.Image) -> sitk.Image:
    image.SetOrigin((900.0, 250.0, 0.0))
    return image


def infant(*kinds: str) -> Make:
    """Lungs of 0.2 l: both scans, and their masks where ``kinds`` has lobes, with all lengths times 0.4."""
    shrunk = Affine.from_arrays(0.4 * np.eye(3), np.zeros(3))

    def make(desk: Desk) -> Made:
        options = []
        for role in ("fixed", "moving"):
            for kind, option in (("", role), ("_lobes", f"{role}-mask")):
                if kind in kinds:
                    image = sitk.ReadImage(str(desk.example / f"{role}{kind}.mha"))
                    image.SetSpacing([0.4 * s for s in image.GetSpacing()])
                    image.SetOrigin([0.4 * o for o in image.GetOrigin()])
                    options.append(f"--{option}={desk.write(image, f'{role}{kind}.mha')}")
        return Made(tuple(options), shrunk, shrunk)

    return make


def same_file(desk: Desk) -> Made:
    return Made((f"--moving={desk.example / 'fixed.mha'}",))


def swapped(desk: Desk) -> Made:
    return Made((f"--fixed={desk.example / 'moving.mha'}", f"--moving={desk.example / 'fixed.mha'}"), swapped=True)


def another_chest(desk: Desk) -> Path:
    """Other vessels, another motion, and one lung only."""
    grid = read_image(desk.example / "moving.mha").grid
    pair = make_pair(PhantomSettings(seed=7, fixed_grid=grid, lungs="right", detail_mm=6.0))
    write_image(desk.folder / "moving.mha", pair.moving.round().short(), grid)
    return desk.folder / "moving.mha"


def upper_and_lower(desk: Desk) -> Made:
    return changed(cut((0, 0, 0.5), (1, 1, 1)), cut((0, 0, 0), (1, 1, 0.5)))(desk)


# --- the table -------------------------------------------------------------------------------------------------------

NOT_OURS = "was not written by this program"
CLIPPED, MISSING, SUBTRACTED = "were clipped", "were taken for air", "was subtracted"
OUTSIDE = "outside the moving field of view"
NOT_HU = "expected Hounsfield units"

same = partial(OddInput, "same result")
right = partial(OddInput, "right result")
warned = partial(OddInput, "warned")
refused = partial(OddInput, "refused")
identity = partial(OddInput, "identity")

TABLE: dict[str, list[OddInput]] = {
    "Geometry": [
        same("an axis stored backwards (left-handed)", changed(stored((0, 1, 2), (True, False, False)))),
        same("moving with axes in another order", changed(None, stored((2, 0, 1), (False, True, False)))),
        right(
            "worlds metres apart, moving turned by 12°",
            changed(carried(FAR_MM), carried(degrees=12, axis=(1.0, 2.0, 3.0))),
        ),
        right("5 mm slices against 4 mm voxels", changed(spaced(8, 8, 5), spaced(4, 4, 4))),
        right("slices of 0.4 mm", changed(spaced(8, 8, 0.4))),
        right("moving with twice the field of view", changed(None, padded(-1000, 16))),
        right("one half of the chest", changed(cut((0.5, 0, 0), (1, 1, 1)))),
        right("moving lungs cut at the border", changed(None, cut((0, 0, 0), (1, 1, 0.7))), OUTSIDE),
        warned("upper half against lower half", upper_and_lower, "overlap"),
        refused("2-D", shape(lambda image: image[:, :, 10]), "expected a 3-D image"),
        same("4-D with one time point", shape(lambda image: sitk.JoinSeries([image])), masks=True),
        refused(
            "4-D with several time points", shape(lambda image: sitk.JoinSeries([image] * 2)), "expected a 3-D image"
        ),
        refused("several values per voxel", shape(lambda image: sitk.Compose([image] * 3)), "values per voxel"),
        refused("fewer than 16 slices", shape(lambda image: image[:, :, :12]), "at least 16 voxels"),
        refused("70000³ voxels by its header", header(DimSize="70000 70000 70000"), "2^31"),
        refused("more voxels by its header than are there", header(DimSize="360 300 340"), "cannot be read"),
        refused("spacing 0", header(ElementSpacing="8 0 8"), "spacing"),
        refused("spacing below 0", header(ElementSpacing="8 -8 8"), "spacing"),
        refused("spacing NaN", header(ElementSpacing="8 nan 8"), "spacing"),
        refused("spacing in metres", header(ElementSpacing="0.008 0.008 0.008"), "expected 0.05 to 20.0 mm"),
        refused("spacing in micrometres", header(ElementSpacing="8000 8000 8000"), "expected 0.05 to 20.0 mm"),
        refused("origin NaN", spoilt("fixed.nii", nan_origin), "finite origin"),
        refused("skewed axes", header(TransformMatrix="1 0.1 0 0 1 0 0 0 1"), "orthonormal"),
        refused("axes that span no volume", header(TransformMatrix="1 0 0 1 0 0 0 0 1"), "orthonormal"),
        refused(".mha without spacing", header_with("fixed.mha", rb"ElementSpacing = .*\n", b""), "no spacing"),
        refused(".nrrd without spacing", header_with("fixed.nrrd", rb"space directions: .*\n", b""), "no spacing"),
        refused(
            ".nrrd with spacings NaN",
            header_with("fixed.nrrd", rb"space directions: .*\n", b"spacings: nan nan nan\n"),
            "spacings 'nan nan nan'",
        ),
        refused("NIfTI made from an array", spoilt("fixed.nii", bare_array), "neither a spacing nor a position"),
        warned(
            "NIfTI with a spacing but without qform and sform",
            nifti_with("2h", 252, 0, 0),
            "does not say where it lies",
        ),
        refused("NIfTI with pixdim against sform", nifti_with("3f", 80, 1.0, 1.0, 1.0), "but its pixdim is 1 × 1 × 1"),
        refused("NIfTI with qform against sform", nifti_with("f", 268, 77.0), "voxels apart"),
        refused("two spacings", header_with("fixed.mha", rb"Elem", b"ElementSpacing = 1 1 1\nElem"), "twice"),
    ],
    "Values": [
        same("uint16, 1024 higher than HU", values(lambda hu: (hu + 1024).clip(0).astype(np.uint16)), SUBTRACTED),
        same("int32", values(as_type(np.int32)), masks=True),
        same("float64", values(as_type(np.float64)), masks=True),
        same("NIfTI with slope and intercept", role_file(rescaled_nifti), masks=True),
        same("a few NaN", values(some(np.nan)), MISSING, masks=True),
        same("a few infinite", values(some(-np.inf)), MISSING, masks=True),
        right("a few of 1e9", values(some(1000000000.0)), CLIPPED, masks=True),
        refused("mostly NaN", values(mostly_nan), "NaN or infinite"),
        same("padding of -3024", values(outside_circle(-3024))),
        same("padding of -32768 and int16", values(lambda hu: outside_circle(-32768)(hu).astype(np.int16)), masks=True),
        same("padding of 4095", values(outside_circle(4095)), "padding of 4095"),
        right("moving with a metal implant", values(metal, "moving")),
        right("moving with contrast agent", values(enhanced, "moving")),
        refused("0 to 1", values(window(-1024, 3071, 1.0)), NOT_HU),
        refused("uint8, windowed", values(lambda hu: window(-1350, 150, 255.0)(hu).astype(np.uint8)), NOT_HU),
        refused("g/ml", values(lambda hu: hu / 1000 + 1), NOT_HU),
        refused("inverted", values(lambda hu: -hu), "with the sign not inverted"),
        refused("constant", values(lambda hu: 0 * hu + 40), "holds no lung"),
        refused("air only", values(lambda hu: np.minimum(hu, -950)), "holds no lung"),
        refused("noise", values(noise), NOT_HU),
    ],
    "Files": [
        refused("no such file", role_file(lambda desk: desk.folder / "fixed.mha"), "No such file"),
        refused("empty", spoilt("fixed.mha", lambda content: b""), "no readable header"),
        refused("garbage", spoilt("fixed.nrrd", lambda content: bytes(range(256)) * 40), "no readable header"),
        refused(".mha cut short", spoilt("fixed.mha", lambda content: content[:-1000]), "expected a whole"),
        refused(".nii cut short", spoilt("fixed.nii", lambda content: content[:-1000]), "expected a whole"),
        refused(".nii.gz cut short", spoilt("fixed.nii.gz", lambda content: content[:-1000]), "expected a whole"),
        refused("compressed voxels with one bit flipped", spoilt("fixed.mha", flipped_bit, compressed=True), "damaged"),
        refused(".nrrd called .mha", renamed("a.nrrd", "fixed.mha"), "no readable header"),
        refused(".mha called .nii.gz", renamed("a.mha", "fixed.nii.gz"), "no readable header"),
        refused("an unknown ending", renamed("a.mha", "fixed.dcm"), "no known kind of image"),
        same("capital ending", renamed("a.nii.gz", "FIXED.NII.GZ"), masks=True),
        refused(".nii beside .nii.gz", role_file(plain_beside_compressed), "only one of the two"),
        refused(".mhd without its voxels", role_file(without_voxels), "cannot be read"),
        refused(".mhd with too few voxels", role_file(short_voxels), "cannot be read"),
        same(".mhd with voxels at an absolute path", role_file(voxels_elsewhere), masks=True),
        same(".nrrd with voxels in another file", role_file(detached_nrrd), masks=True),
        refused("symbolic links in a circle", role_file(link_loop), "cannot be opened"),
        refused("an empty folder called fixed.mha", role_file(empty_folder), "no DICOM image"),
        same("blanks, umlauts and a line break in the name", renamed("a.mha", "fixé  Ü\n肺.mha"), masks=True),
        refused("an empty file with a line break in its name", role_file(empty_with_line_break), "no readable header"),
        refused("a name that is not UTF-8", renamed("a.mha", os.fsdecode(b"fixed\xff.mha")), "not UTF-8"),
        same("DICOM, with other files beside the slices", dicom(), masks=True),
        refused("DICOM with a missing slice", dicom(lambda folder: tenth_slice(folder).unlink()), "without a gap"),
        refused("DICOM with two series", dicom(second_series), "2 DICOM series"),
        refused(
            "DICOM with a slice cut short",
            dicom(lambda folder: os.truncate(tenth_slice(folder), 900)),
            "expected a whole",
        ),
        same(
            "DICOM with structure set, plan, dose, reports, PET, scout and screenshot among the slices",
            dicom(write_companions),
            "no CT slice was left out",
            masks=True,
        ),
        same("enhanced (multi-frame) CT", role_file(enhanced_ct), masks=True),
        refused(
            "DICOM with two acquisitions in one series, half a slice apart",
            role_file(two_acquisitions(("1", "2"))),
            "lie among each other",
        ),
        refused(
            "DICOM with the slices of inhale and exhale in turn, and no acquisition numbers",
            role_file(two_acquisitions(("1", "1"))),
            "differ more than every second one",
        ),
        refused("DICOM with ten phases in one series", role_file(ten_phases), "10 slices or more at each of 34 places"),
        same(
            "compressed .mha without CompressedDataSize",
            header_with("fixed.mha", rb"CompressedDataSize = \d+\n", b"", compressed=True),
            masks=True,
        ),
        refused(
            "compressed .mha with a wrong CompressedDataSize",
            header_with("fixed.mha", rb"(CompressedDataSize = \d+)\d\d", rb"\g<1>00", compressed=True),
            "compressed bytes",
        ),
        refused("compressed .nrrd with one bit flipped", spoilt("fixed.nrrd", flipped_bit, compressed=True), "damaged"),
        refused("bytes after the voxels", spoilt("fixed.mha", lambda content: content + bytes(1000)), "promises"),
        refused("fewer slices by its header than are there", header(DimSize="36 30 30"), "promises"),
        refused("a small stream of 300 MB", role_file(inflated), "holds more than the"),
        refused(".mhd that names voxels in another folder", role_file(voxels_outside), "outside its folder"),
        refused(".nhdr that names voxels in another folder", role_file(nrrd_outside), "outside its folder"),
        same(".nhdr", role_file(lambda desk: desk.write(desk.scan(), "fixed.nhdr")), masks=True),
        refused(".mhd whose voxels are not there, by name", role_file(without_voxels), "'fixed.raw' cannot be read"),
        refused("gzip called .nii", spoilt("fixed.nii", lambda content: gzip.compress(content)), "expected .nii.gz"),
    ],
    "Folders": [
        refused(
            "two images for one role",
            in_folder(lambda desk: copy(desk, "fixed.mha", "moving.mha", "moving.nrrd")),
            "expected exactly one",
        ),
        refused(
            "no moving image", in_folder(lambda desk: copy(desk, "fixed.mha", "notes.txt")), "found no image for moving"
        ),
        refused("nothing at all", in_folder(lambda desk: None), "the folder has no files"),
        refused("a link to nothing", in_folder(link_to_nothing), "a link to 'elsewhere/scan.mha', which is not there"),
        refused("inputs.json that is no JSON", in_folder(no_json), "not valid JSON"),
        refused(
            "inputs.json without a moving image",
            in_folder(platform(socket("fixed-image", "images/fixed"))),
            "expected also moving-image",
        ),
        refused(
            "inputs.json that leads out of the folder",
            in_folder(platform(socket("fixed-image", "../images"))),
            "expected a path inside",
        ),
        refused(
            "inputs.json with two fixed images",
            in_folder(platform(*[socket("fixed-image", "images/fixed")] * 2)),
            "several entries for fixed-image",
        ),
    ],
    "The folder for the results": [
        refused("an own file among the results", among_results("images/displacement-field/own.nrrd"), NOT_OURS),
        refused(
            "a field of another program, of the same name",
            among_results("images/displacement-field/fixed.mha"),
            NOT_OURS,
        ),
        refused("the moving scan among the results", input_among_results, "is an input"),
        refused("results.json of another program", among_results("results.json"), NOT_OURS),
    ],
    "Masks": [
        right("labels of lobes", mask(lambda image: image)),
        right("shares of lung on another grid", mask(half_as_fine, "moving")),
        refused("empty", mask(lambda image: image * 0), "no voxel above 0"),
        refused("one voxel", mask(one_voxel), "expected lungs of"),
        refused("of another place", mask(elsewhere), "lies outside"),
        refused("2-D", mask(lambda image: image[:, :, 15]), "expected a 3-D image"),
        refused("of everything", mask(lambda image: image * 0 + 1), "0 outside the lungs"),
        refused("inverted", mask(lambda image: image == 0), "0 outside the lungs"),
        refused("10 in the background, 20 in the lungs", mask(lambda image: 10 + 10 * (image > 0)), "0 outside"),
        right("shares of 0.001 outside to 0.999 in the lungs", mask(certain_shares)),
        refused("of the whole chest", mask(whole_chest), "expected lungs of"),
        right("of an infant's lungs of 0.2 l, with its scans", infant("", "_lobes")),
        warned("of the tissue around the lungs", mask(around), "the median under the mask is"),
        warned("30 mm aside", mask(aside), "lies where the lungs end"),
        warned("of one lung", mask(one_lung), "One lung in the fixed scan"),
    ],
    "Pairs": [
        identity("one file for both", same_file),
        right("fixed and moving swapped", swapped),
        warned("another chest with one lung", role_file(another_chest, "moving"), "overlap"),
        refused("scans of an infant's lungs of 0.2 l, without masks", infant(""), "give lung masks"),
        refused("moving without lungs", values(lambda hu: np.where(hu < -300, 40, hu), "moving"), "holds no lung"),
    ],
}


INTRODUCTION = """\
# Odd and bad inputs

What becomes of them. Each row is made from a phantom pair and run by `tests/test_odd_inputs.py`; this page is written
by `python -m tests.odd_inputs > docs/robustness.md`. Where nothing else is said it is the fixed scan that is odd, and
the rest is as it should be.

- *refused*: exit code 2; the last line on stderr is one sentence with the file, what came and what was expected.
  Nothing is written.
- *same*: the result of the plain pair, to an eighth of a voxel.
- *registered*: with a mean landmark error below 3 mm where voxels have 8 mm, and a small untrained cascade.

Warnings are in `warnings` of results.json.
"""

FAULTS = {
    "bytes of a file are altered, lost or cut off": "refused, or read as the file now says; within compressed voxels "
    "damage is always found",
    "a full disk, a limit on files, no memory, a scan larger than the memory": "exit code 1 and one sentence; no part "
    "of a file is left",
    "the container's limit of memory (`test.sh`)": "the kernel stops it, exit code 137; nothing is in /output",
    "a container without any /tmp (`test.sh`)": "the same result",
    "Ctrl-C, SIGTERM": "exit code 130, 143 and one sentence; no part of a file is left",
    "SIGKILL": "the next run removes the hidden `.*.partial` that is left",
    "an input is a link, or another name, of a result of an earlier run": "refused, before anything is computed",
    "stopped while a new result replaces an old one": "each image is whole, old or new; results.json, the last, is not "
    "there",
    "stopped before that": "the old images are untouched; results.json is not there",
    "refused (exit code 2, or 422) where an earlier result lies": "results.json went first; on "
    "the platform (inputs.json, the server) the images, too; what another program wrote stays",
    "two runs at once into one folder": "one waits while the other writes; the result is that of the last",
    "stdout cannot be written": "it goes on without",
    "no home, no folder for temporary files": "neither is needed",
}
"""By tests/test_faults.py, test_bad_input.py, test_interface.py and test_serve.py."""

WORDS: dict[Outcome, str] = {
    "same result": "same",
    "right result": "registered",
    "identity": "registered: no displacement",
    "warned": "registered, not to be trusted",
    "refused": "refused",
}


def row(odd: OddInput) -> str:
    """A line of a table in Markdown."""
    becomes = WORDS[odd.outcome]
    if odd.says:
        becomes += f": “{odd.says}”" if odd.outcome == "refused" else f"; warning: “{odd.says}”"
    return f"| {odd.name} | {becomes} |"


def document() -> str:
    """docs/robustness.md."""
    lines = [INTRODUCTION]
    for group, inputs in TABLE.items():
        rows = map(row, inputs)
        lines += [f"## {group}\n", "| input | what becomes of it |", "| --- | --- |", *rows, ""]
    faults = [f"| {fault} | {becomes} |" for fault, becomes in FAULTS.items()]
    lines += ["## Faults (`tests/test_faults.py`)\n", "| what happens | what becomes of it |", "| --- | --- |", *faults]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

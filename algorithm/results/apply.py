"""``lungreg apply``: images, label maps and surfaces of one scan, brought onto the other.

Images are resampled by SimpleITK with the result's transforms, as antsApplyTransforms does with the same files.
Surfaces and other files with points go the other way than images: each of their points is carried along.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Shaped
from torch import Tensor

from imagefiles import ending

from ..errors import InputError
from ..files.folders import image_name
from ..files.images import read_grid, read_image, read_volume
from ..files.pointfiles import point_ending
from ..geometry import Affine, Grid
from ..hounsfield import AIR_HU
from ..lungs.sides import LEFT, RIGHT, UNKNOWN, left_and_right
from .ownership import TRANSFORMS
from .points import check_new, map_points
from .result import Result, Scan, read_result

Interpolation = Literal["linear", "bspline", "nearest", "majority"]
_INTERPOLATORS = {
    "linear": sitk.sitkLinear,
    "bspline": sitk.sitkBSpline,
    "nearest": sitk.sitkNearestNeighbor,
    "majority": sitk.sitkLabelLinear,
}
LABELS = ("nearest", "majority")
SLAB_VOXELS = 2**24
"""So many voxels are resampled at a time."""
HU_BELOW = -500
"""An image with such values is taken for CT: around it there is air."""
MOST_LABELS = 256
WRITTEN = (".mha", ".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class Applied:
    """How images are brought onto a scan."""

    onto: Scan
    interpolation: Interpolation = "linear"
    reference: Path | None = None
    """An image on whose grid the result is to be; None: the grid of the scan."""
    background: float | None = None
    """Where the other scan's image ends; None: air for CT, otherwise 0."""
    ras: bool = False
    """Of files with points that do not say so themselves."""


def apply(folder: Path, sources: list[Path], out: Path, how: Applied, overwrite: bool = False) -> list[str]:
    """Writes every source, of the scan that is not ``how.onto``, as it lies on that one; a sentence for each.

    ``out`` is a file for one source, or a folder that is there or ends in a slash, for any number. InputError for what
    the user can put right; names are checked before anything is computed.
    """
    targets = _targets(sources, out, how.onto)
    for source, target in zip(sources, targets, strict=True):
        check_new(target, overwrite, source)
        if (point_ending(source) is None) != (point_ending(target) is None):
            raise InputError(f"{target}: is of another kind than {source.name}, expected points for points only")
        if point_ending(source) is None and not target.name.lower().endswith(WRITTEN):
            raise InputError(f"{target}: is no name for an image, expected one that ends in {', '.join(WRITTEN)}")
    of: Scan = "moving" if how.onto == "fixed" else "fixed"
    said, images = [], None
    for source, target in zip(sources, targets, strict=True):
        if point_ending(source) is not None:
            said.append(map_points(folder, source, target, of, how.ras, overwrite))
            continue
        images = images or _Images(folder, how)
        said.append(images.write(source, target))
    return said


def _targets(sources: list[Path], out: Path, onto: Scan) -> list[Path]:
    """One name for each source: in a folder ``<name>_on_<scan>``."""
    if not sources:
        raise InputError("lungreg apply: got no image, expected RESULT IN... OUT")
    if not out.is_dir():
        if len(sources) > 1:
            raise InputError(f"{out}: is no folder, expected one that is there for {len(sources)} results")
        return [out]
    targets = []
    for source in sources:
        kind = point_ending(source)
        stem = source.name[: -len(kind)] if kind else image_name(source)
        suffix = kind or (ending(source) if (ending(source) or "") in WRITTEN else ".mha")
        targets.append(out / f"{stem}_on_{onto}{suffix}")
    if len(set(targets)) < len(targets):
        raise InputError(f"{out}: two results would have one name there, expected images of different names")
    return targets


class _Images:
    """Resamples image files by one result."""

    def __init__(self, folder: Path, how: Applied) -> None:
        result = read_result(folder)
        grid = result.grid(how.onto) if how.reference is None else read_grid(how.reference)
        self.resampling = Resampling(transform_onto(folder, result, how.onto), grid, how.interpolation, how.background)
        self.words = _words(result, how.onto)

    def write(self, source: Path, target: Path) -> str:
        """One image; what was done, and which labels it cost."""
        values, grid = read_any(source)
        found = self.resampling(values, grid)
        _write(target, placed(sitk.GetImageFromArray(found), self.resampling.grid))
        return f"{source.name}, {self.words}: {target}{self.resampling.doubts(values, found)}"


def read_any(source: Path) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    """A file, or a DICOM series in a folder."""
    if not source.is_dir():
        return read_volume(source)
    image = read_image(source)
    return image.voxels[0, 0].numpy(), image.grid


@dataclass(frozen=True)
class Resampling:
    """Images by one transform, from points of ``grid`` to where they are looked up."""

    transform: sitk.Transform
    grid: Grid
    interpolation: Interpolation = "linear"
    background: float | None = None
    """As in `Applied`."""

    def __call__(self, values: Shaped[np.ndarray, "z y x"], grid: Grid) -> np.ndarray:
        """The values that lie on another grid, on this one."""
        values = _numbers(values)
        return self._resampled(values, grid, self._background(values))

    def _background(self, values: Shaped[np.ndarray, "z y x"]) -> float:
        if self.background is not None:
            return self.background
        return AIR_HU if self.interpolation not in LABELS and values.min() < HU_BELOW else 0.0

    def _resampled(self, values: Shaped[np.ndarray, "z y x"], grid: Grid, background: float) -> np.ndarray:
        """In the type of the values; whole numbers are rounded, ITK would cut them off."""
        image, interpolator = placed(sitk.GetImageFromArray(values), grid), _INTERPOLATORS[self.interpolation]
        labels, exact = self.interpolation in LABELS, values.dtype.itemsize > 4 or values.dtype.kind in "iu"
        pixel = image.GetPixelID() if labels else sitk.sitkFloat64 if exact else sitk.sitkFloat32
        found = np.empty(self.grid.shape, values.dtype)
        for z, slab in self._slabs():
            part = sitk.Resample(
                image, slab.size, self.transform, interpolator, slab.origin, slab.spacing,
                np.ravel(slab.direction).tolist(), background, pixel,
            )  # fmt: skip
            array = sitk.GetArrayViewFromImage(part)
            found[z : z + slab.size[2]] = array if labels or values.dtype.kind == "f" else _rounded(array, values.dtype)
        return found

    def _slabs(self) -> Iterator[tuple[int, Grid]]:
        """All at once for B-splines, whose coefficients are worked out for the whole image each time."""
        nx, ny, nz = self.grid.size
        depth = nz if self.interpolation == "bspline" else max(1, SLAB_VOXELS // (nx * ny))
        for z in range(0, nz, depth):
            yield z, self.grid.cropped((0, 0, z), (nx, ny, min(depth, nz - z)))

    def doubts(self, values: np.ndarray, found: np.ndarray) -> str:
        """What the user should know of labels."""
        if self.interpolation in LABELS:
            lost = sorted(set(np.unique(values).tolist()) - set(np.unique(found).tolist()))
            return f"; no voxel is left of the label(s) {', '.join(map(str, lost))}" if lost else ""
        if values.dtype.kind in "iu" and values.min() >= 0 and len(np.unique(values)) <= MOST_LABELS:
            return "; if these are labels, --interpolation nearest or majority keeps them whole"
        return ""


def write_lungs(folder: Path, out: Path, of: Scan, reference: Path | None = None, overwrite: bool = False) -> str:
    """The lungs of a scan as a label map on its grid, or on that of ``reference``; a sentence with their volumes.

    InputError for what the user can put right.
    """
    if not out.name.lower().endswith(WRITTEN):
        raise InputError(f"{out}: is no name for an image, expected one that ends in {', '.join(WRITTEN)}")
    check_new(out, overwrite)
    result = read_result(folder)
    lungs = result.fixed_lungs if of == "fixed" else result.moving_lungs
    if lungs is None:
        raise InputError(f"{folder}: has no {TRANSFORMS[0]}, expected a result that was written with --transforms on")
    grid = result.grid(of) if reference is None else read_grid(reference)
    sides = left_and_right(lungs)[0, 0].numpy()
    found = Resampling(sitk.Transform(3, sitk.sitkIdentity), grid, "nearest")(sides, lungs.grid)
    _write(out, placed(sitk.GetImageFromArray(found), grid))
    litre = float(np.prod(lungs.grid.spacing)) * 1e-6
    names = {RIGHT: "right lung", LEFT: "left lung", UNKNOWN: "lungs, which could not be taken apart"}
    said = (
        f"{label}: {name}, {litre * (sides == label).sum():.2f} l" for label, name in names.items() if label in sides
    )
    return f"{out}, the lungs of the {of} scan ({result.figures.get(of, 'unnamed')}): {'; '.join(said)}"


def transform_onto(folder: Path, result: Result, onto: Scan) -> sitk.Transform:
    """From points of the scan that is sampled onto to those of the other: what pulls the image."""
    path = folder / TRANSFORMS[["fixed", "moving"].index(onto)]
    if "inverse_residual_mm" in result.figures:
        transform: sitk.Transform = sitk.ReadTransform(str(path))
        return transform
    if onto == "moving":
        raise InputError(f"{folder}: has no {path.name}, expected a result that was written with --transforms on")
    return field_transform(result.transform.displacement, result.transform.grid)


def field_transform(displacement: Float[Tensor, "1 3 z y x"], grid: Grid) -> sitk.Transform:
    """As SimpleITK has it: in double precision."""
    vectors = displacement[0].permute(1, 2, 3, 0).double().contiguous().numpy()
    return sitk.DisplacementFieldTransform(placed(sitk.GetImageFromArray(vectors, isVector=True), grid))


def affine_transform(affine: Affine) -> sitk.Transform:
    """As SimpleITK has it."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.ravel(affine.matrix).tolist())
    transform.SetTranslation(affine.offset)
    return transform


def _words(result: Result, onto: Scan) -> str:
    names = {scan: f"the {scan} scan ({result.figures.get(scan, 'unnamed')})" for scan in ("fixed", "moving")}
    return f"of {names['moving' if onto == 'fixed' else 'fixed']}, brought onto {names[onto]}"


def _numbers(values: np.ndarray) -> np.ndarray:
    """In a type that SimpleITK has, in the machine's byte order."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return values.astype(np.float32) if values.dtype == np.float16 else values


def placed(image: sitk.Image, grid: Grid) -> sitk.Image:
    """The image, on the grid."""
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(np.ravel(grid.direction).tolist())
    return image


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    rounded: np.ndarray = np.rint(values).clip(limits.min, limits.max).astype(dtype)
    return rounded


def _write(target: Path, image: sitk.Image) -> None:
    """All or nothing, compressed."""
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target.parent))
    try:
        sitk.WriteImage(image, str(folder / target.name), useCompression=True)
        (folder / target.name).replace(target)
    except RuntimeError as error:  # SimpleITK's only one
        raise OSError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(folder)

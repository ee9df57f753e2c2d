"""``lungreg apply``: maps images, label maps and surfaces of one scan onto the other.

Images are resampled by SimpleITK with the result's transforms, as antsApplyTransforms does with the same files.
Surfaces and other files with points use the opposite direction of the map: each of their points is mapped.
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
"""Number of voxels that are resampled at a time."""
HU_BELOW = -500
"""An image with values below this is treated as CT, and filled with air outside its extent."""
MOST_LABELS = 256
WRITTEN = (".mha", ".nii.gz", ".nii", ".nrrd")


@dataclass(frozen=True)
class Applied:
    """How images are mapped onto a scan."""

    onto: Scan
    interpolation: Interpolation = "linear"
    reference: Path | None = None
    """An image whose grid the result takes; None: the grid of the scan."""
    background: float | None = None
    """Value outside the extent of the other scan's image; None: air for CT, otherwise 0."""
    ras: bool = False
    """Whether files with points that do not name their coordinate system are in RAS."""


def apply(folder: Path, sources: list[Path], out: Path, how: Applied, overwrite: bool = False) -> list[str]:
    """Maps every source, a file of the other scan, onto ``how.onto`` and writes it; returns a sentence for each.

    ``out`` is a file for one source, or for any number of sources a folder that exists or ends in a slash. InputError
    for mistakes that the user can correct; names are checked before anything is computed.
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
    """One file name per source; in a folder it is ``<name>_on_<scan>``."""
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
    """Resamples image files with the map of one result."""

    def __init__(self, folder: Path, how: Applied) -> None:
        result = read_result(folder)
        grid = result.grid(how.onto) if how.reference is None else read_grid(how.reference)
        self.resampling = Resampling(transform_onto(folder, result, how.onto), grid, how.interpolation, how.background)
        self.words = _words(result, how.onto)

    def write(self, source: Path, target: Path) -> str:
        """Write one image; returns a sentence on what was done and which labels were lost."""
        values, grid = read_any(source)
        found = self.resampling(values, grid)
        _write(target, placed(sitk.GetImageFromArray(found), self.resampling.grid))
        return f"{source.name}, {self.words}: {target}{self.resampling.doubts(values, found)}"


def read_any(source: Path) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    """The values and the grid of an image file, or of a DICOM series in a folder."""
    if not source.is_dir():
        return read_volume(source)
    image = read_image(source)
    return image.voxels[0, 0].numpy(), image.grid


@dataclass(frozen=True)
class Resampling:
    """Resamples images with one transform, which maps points of ``grid`` to points of the image."""

    transform: sitk.Transform
    grid: Grid
    interpolation: Interpolation = "linear"
    background: float | None = None
    """As in `Applied`."""

    def __call__(self, values: Shaped[np.ndarray, "z y x"], grid: Grid) -> np.ndarray:
        """The values, given on their own ``grid``, resampled onto the grid of this object."""
        values = _numbers(values)
        return self._resampled(values, grid, self._background(values))

    def _background(self, values: Shaped[np.ndarray, "z y x"]) -> float:
        if self.background is not None:
            return self.background
        return AIR_HU if self.interpolation not in LABELS and values.min() < HU_BELOW else 0.0

    def _resampled(self, values: Shaped[np.ndarray, "z y x"], grid: Grid, background: float) -> np.ndarray:
        """The type of the values is kept; whole numbers are rounded, because ITK would truncate them."""
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
        """Slabs of the grid; one slab for B-splines, because ITK computes their coefficients for the whole image each
        time."""
        nx, ny, nz = self.grid.size
        depth = nz if self.interpolation == "bspline" else max(1, SLAB_VOXELS // (nx * ny))
        for z in range(0, nz, depth):
            yield z, self.grid.cropped((0, 0, z), (nx, ny, min(depth, nz - z)))

    def doubts(self, values: np.ndarray, found: np.ndarray) -> str:
        """Warnings for the user about labels."""
        if self.interpolation in LABELS:
            lost = sorted(set(np.unique(values).tolist()) - set(np.unique(found).tolist()))
            return f"; no voxel is left of the label(s) {', '.join(map(str, lost))}" if lost else ""
        if values.dtype.kind in "iu" and values.min() >= 0 and len(np.unique(values)) <= MOST_LABELS:
            return "; if these are labels, --interpolation nearest or majority keeps them whole"
        return ""


def write_lungs(folder: Path, out: Path, of: Scan, reference: Path | None = None, overwrite: bool = False) -> str:
    """Write the lungs of a scan as a label map on its grid or on that of ``reference``; returns a sentence with their
    volumes.

    InputError for mistakes that the user can correct.
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
    """The transform from points of the scan ``onto`` to points of the other one, as needed to resample images onto
    it."""
    path = folder / TRANSFORMS[["fixed", "moving"].index(onto)]
    if "inverse_residual_mm" in result.figures:
        transform: sitk.Transform = sitk.ReadTransform(str(path))
        return transform
    if onto == "moving":
        raise InputError(f"{folder}: has no {path.name}, expected a result that was written with --transforms on")
    return field_transform(result.transform.displacement, result.transform.grid)


def field_transform(displacement: Float[Tensor, "1 3 z y x"], grid: Grid) -> sitk.Transform:
    """The SimpleITK transform of a displacement field, in double precision."""
    vectors = displacement[0].permute(1, 2, 3, 0).double().contiguous().numpy()
    return sitk.DisplacementFieldTransform(placed(sitk.GetImageFromArray(vectors, isVector=True), grid))


def affine_transform(affine: Affine) -> sitk.Transform:
    """The SimpleITK transform of an affine map."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.ravel(affine.matrix).tolist())
    transform.SetTranslation(affine.offset)
    return transform


def _words(result: Result, onto: Scan) -> str:
    names = {scan: f"the {scan} scan ({result.figures.get(scan, 'unnamed')})" for scan in ("fixed", "moving")}
    return f"of {names['moving' if onto == 'fixed' else 'fixed']}, brought onto {names[onto]}"


def _numbers(values: np.ndarray) -> np.ndarray:
    """The values in a type that SimpleITK supports, in the byte order of the machine."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return values.astype(np.float32) if values.dtype == np.float16 else values


def placed(image: sitk.Image, grid: Grid) -> sitk.Image:
    """The image with spacing, origin and direction of the grid."""
    image.SetSpacing(grid.spacing)
    image.SetOrigin(grid.origin)
    image.SetDirection(np.ravel(grid.direction).tolist())
    return image


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    rounded: np.ndarray = np.rint(values).clip(limits.min, limits.max).astype(dtype)
    return rounded


def _write(target: Path, image: sitk.Image) -> None:
    """Write a compressed file, completely or not at all."""
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target.parent))
    try:
        sitk.WriteImage(image, str(folder / target.name), useCompression=True)
        (folder / target.name).replace(target)
    except RuntimeError as error:  # the only error that SimpleITK raises
        raise OSError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(folder)

"""Reads scans, masks and fields from files and checks them.

SimpleITK is used only here, in `.dicom`, and where a program passes images in memory (`given`, `api`, `apply`).
`imagefiles` reads the files, as in the evaluation; this module checks that they can show a chest.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float32, Int16, Shaped
from torch import Tensor

from imagefiles import ENDINGS, FileError, ending, open_image, read_voxels
from imagefiles import remarks as file_remarks

from ..errors import InputError
from ..geometry import Grid, Matrix, Size, Vector, canonical_axes, restored
from ..hounsfield import AIR_HU
from .formats import Layout as Layout

SPACING_MM = (0.05, 20.0)
MIN_VOXELS = 16
MIN_EXTENT_MM = 30.0
MAX_VOXELS = 2**31
MAX_SKEW = 1e-3
"""Largest entry of DᵀD - I that counts as rounding; the direction is then made orthonormal."""
EXACT_SKEW = 1e-6
"""Up to this value (float32 rounding in NIfTI headers) the direction is not changed, so that headers compare equal."""
MASK_ABOVE = 0.5
"""A voxel belongs to a mask when its value is larger. Shares count from one half, labels from 1."""
MOST_MISSING = 0.5
"""Largest accepted share of NaN and ±inf in a scan."""


@dataclass(frozen=True)
class Image:
    """A scan: its voxels (HU for CT), their grid, and the file they came from, for messages."""

    voxels: Int16[Tensor, "1 1 z y x"] | Float32[Tensor, "1 1 z y x"]
    grid: Grid
    path: Path
    """The file, or the folder for DICOM."""
    remarks: tuple[str, ...] = ()
    """Sentences for the user, one for each difference between the voxels and the stored values."""


def read_image(path: Path) -> Image:
    """A 3-D scalar scan from a file, or from a folder with one DICOM series; int16 when its values are integers, else
    float32.

    Values beyond the range of int16 are clipped to it, NaN and ±inf become air (-1000); `Image.remarks` says so. This
    function does not check whether the values are HU, see `..preparation.intensities`. The header is checked before the
    voxels are read. InputError when the file is missing, unreadable, damaged, not 3-D (a fourth axis of length one is
    dropped), not scalar, oddly spaced, skewed, too small, too large or holds more NaN and ±inf than numbers; for DICOM
    also as in `.dicom.find_series`.
    """
    if _is_folder(path):
        series = _series(path)
        grid = _chest_grid(path, series.size, series.spacing, series.origin, series.direction)
        voxels, remarks = _values(path, series.read())
        remarks = (*series.remarks, *remarks)
    else:
        reader = _open(path)
        grid = _scan_grid(path, reader)
        voxels, remarks = _values(path, _voxels(path, reader).reshape(grid.shape))
        remarks = (*(f"{path.name}: {remark}" for remark in file_remarks(path)), *remarks)
    return Image(voxels[None, None], grid, path, remarks)


def image_from(values: Shaped[np.ndarray, "z y x"], grid: Grid, name: str) -> Image:
    """As `read_image`, from values in memory; ``name`` stands for the file in messages and results."""
    path = Path(name)
    checked = _chest_grid(path, grid.size, grid.spacing, grid.origin, np.array(grid.direction))
    voxels, remarks = _values(path, values)
    return Image(voxels[None, None], checked, path, remarks)


def read_mask(path: Path) -> tuple[Bool[Tensor, "1 1 z y x"], Grid]:
    """The voxels of a mask above 0.5, on its own grid; InputError as in `read_image`, and for an empty mask.

    So labels count from 1, and shares (0 to 1, as floats) above one half.
    """
    reader = _open(path)
    grid = _scan_grid(path, reader)
    mask = torch.from_numpy(_voxels(path, reader).reshape(grid.shape) > MASK_ABOVE)[None, None]
    if not mask.any():
        raise InputError(f"{path}: the mask has no voxel above {MASK_ABOVE}, expected some")
    return mask, grid


def read_volume(path: Path) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    """A 3-D scalar image of any type, with its stored values; InputError as in `read_image`, but it need not show a
    chest."""
    reader = _open(path)
    size = reader.GetSize()
    if len(size) < 3 or any(n != 1 for n in size[3:]) or reader.GetNumberOfComponents() != 1:
        raise InputError(
            f"{path}: has size {size} and {reader.GetNumberOfComponents()} component(s), expected a 3-D scalar image"
        )
    grid = _grid(path, *_geometry(reader))
    return _voxels(path, reader).reshape(grid.shape), grid


def read_grid(path: Path) -> Grid:
    """The grid of a 3-D image, from its header, or of a DICOM series in a folder."""
    if _is_folder(path):
        series = _series(path)
        return _grid(path, series.size, series.spacing, series.origin, series.direction)
    return _grid(path, *_geometry(_open(path)))


def scan_grid(path: Path) -> Grid:
    """The grid of a scan or mask, with the checks that `read_image` makes before it reads the voxels."""
    if _is_folder(path):
        series = _series(path)
        return _chest_grid(path, series.size, series.spacing, series.origin, series.direction)
    return _scan_grid(path, _open(path))


def read_field(path: Path) -> tuple[Float32[Tensor, "1 3 z y x"], Grid]:
    """A displacement field (mm, LPS) in the form that `write_field` writes; InputError when it is not a field, or not
    finite."""
    reader = _open(path)
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    vectors = size[3:] in ((), (1,)) and components == 3
    if not vectors and not (len(size) == 4 and size[3] == 3 and components == 1):
        raise InputError(
            f"{path}: has size {size} and {components} component(s), "
            "expected a displacement field: 3-D with 3 components, or 4-D with 3 as its last size"
        )
    grid = _grid(path, *_geometry(reader))
    voxels = _voxels(path, reader)
    if vectors:
        voxels = np.moveaxis(voxels.reshape(*grid.shape, 3), -1, 0)
    displacement = np.empty((3, *grid.shape), dtype=np.float32)
    with np.errstate(over="ignore"):
        displacement[:] = voxels
    if count := sum(_count_non_finite(plane) for component in displacement for plane in component):
        raise InputError(f"{path}: {count} value(s) are NaN or infinite, expected finite numbers")
    return torch.from_numpy(displacement)[None], grid


def _series(folder: Path) -> Any:
    """The `.dicom.Series` in a folder. pydicom takes time to load, so it is loaded only here."""
    from .dicom import find_series

    return find_series(folder)


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # a path without access is refused when it is opened
        return path.is_dir()
    return False


def _open(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header; every problem with the file is an InputError."""
    if ending(path) is None:
        raise InputError(
            f"{path}: is no known kind of image, expected a name that ends in {', '.join(ENDINGS)}; "
            "DICOM is given as the folder of a series"
        )
    try:
        str(path).encode()  # SimpleITK aborts the process on names that are not UTF-8
        return open_image(path)
    except UnicodeEncodeError as error:
        raise InputError(f"{str(path)!a}: has a name that is not UTF-8, expected one that is") from error
    except FileError as error:
        raise InputError(f"{path}: {error}") from error


def _geometry(reader: sitk.ImageFileReader) -> tuple[Size, Vector, Vector, np.ndarray]:
    """Size, spacing, origin and direction along the first three axes of the header."""
    n = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(n, n)[:3, :3]
    return reader.GetSize()[:3], reader.GetSpacing()[:3], reader.GetOrigin()[:3], direction


def _grid(path: Path, size: Size, spacing: Vector, origin: Vector, direction: np.ndarray) -> Grid:
    """InputError when the axes span no volume or are skewed."""
    if not all(math.isfinite(v) for v in (*spacing, *origin)) or min(spacing) <= 0 or min(size) < 1:
        raise InputError(
            f"{path}: has size {size}, spacing {spacing} mm and origin {origin} mm, "
            "expected positive sizes and spacings and a finite origin"
        )
    return Grid(size, spacing, origin, _orthonormal(path, direction))


def _orthonormal(path: Path, direction: np.ndarray) -> Matrix:
    """The nearest orthonormal matrix, when the given matrix is close to one; InputError otherwise."""
    skew = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if not skew <= MAX_SKEW:
        rows = "; ".join(" ".join(f"{v:g}" for v in row) for row in direction)
        raise InputError(f"{path}: has the direction matrix [{rows}], expected an orthonormal one")
    if skew > EXACT_SKEW:
        u, _, v = np.linalg.svd(direction)
        direction = u @ v
    a, b, c = ((float(r[0]), float(r[1]), float(r[2])) for r in direction + 0.0)  # + 0.0: no -0.0
    return a, b, c


def _scan_grid(path: Path, reader: sitk.ImageFileReader) -> Grid:
    """The grid of a scan or mask; InputError when it cannot show a chest."""
    size = reader.GetSize()
    if len(size) < 3 or any(n != 1 for n in size[3:]):
        raise InputError(f"{path}: has {len(size)} axes, of size {size}, expected a 3-D image")
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: has {reader.GetNumberOfComponents()} values per voxel, expected one")
    return _chest_grid(path, *_geometry(reader))


def _chest_grid(path: Path, size: Size, spacing: Vector, origin: Vector, direction: np.ndarray) -> Grid:
    """As `_scan_grid`, from the parts of a header."""
    if math.prod(size) > MAX_VOXELS:
        raise InputError(f"{path}: has {size} voxels, expected at most 2^31 in all")
    grid = _grid(path, size, spacing, origin, direction)
    low, high = SPACING_MM
    if min(grid.spacing) < low or max(grid.spacing) > high:
        raise InputError(f"{path}: has a spacing of {grid.spacing} mm, expected {low} to {high} mm")
    if min(grid.size) < MIN_VOXELS or min(grid.extent_mm) < MIN_EXTENT_MM:
        extent = " × ".join(f"{v:.1f}" for v in grid.extent_mm)
        raise InputError(
            f"{path}: has {grid.size} voxels over {extent} mm, "
            f"expected at least {MIN_VOXELS} voxels and {MIN_EXTENT_MM:g} mm along each axis"
        )
    return grid


def _voxels(path: Path, reader: sitk.ImageFileReader) -> Shaped[np.ndarray, "..."]:
    """The values, as `imagefiles.read_voxels` returns them."""
    try:
        return read_voxels(path, reader)
    except FileError as error:
        raise InputError(f"{path}: its voxels cannot be read: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: its voxels cannot be read ({error.strerror}), expected a whole file") from error
    except MemoryError as error:
        raise MemoryError(f"{path}: no room for its {math.prod(reader.GetSize())} voxels") from error


def _values(
    path: Path, stored: Shaped[np.ndarray, "z y x"]
) -> tuple[Int16[Tensor, "z y x"] | Float32[Tensor, "z y x"], tuple[str, ...]]:
    """The values (int16 when they are integers, else float32), and remarks on the changes.

    The result is a copy unless ``stored`` is an int16 array. It works plane by plane because scans can be large.
    """
    if stored.dtype == np.int16:
        return torch.from_numpy(np.ascontiguousarray(stored)), ()
    missing, beyond, whole = 0, 0, True
    for plane in stored:
        finite = _finite(plane)
        tamed = _within_int16(plane, finite)
        missing += plane.size - int(finite.sum())
        beyond += int((finite & (plane != tamed)).sum())
        whole = whole and (plane.dtype.kind in "iu" or bool((tamed == np.rint(tamed)).all()))
    if missing > MOST_MISSING * stored.size:
        raise InputError(f"{path}: {missing} of {stored.size} values are NaN or infinite, expected finite numbers")
    voxels = np.empty(stored.shape, np.int16 if whole else np.float32)
    for target, plane in zip(voxels, stored, strict=True):
        target[:] = _within_int16(plane, _finite(plane))
    missed = f"{path.name}: {missing} of {stored.size} values are NaN or infinite; they were taken for air."
    clipped = f"{path.name}: {beyond} value(s) outside -32768 to 32767 were clipped."
    return torch.from_numpy(voxels), tuple(text for count, text in ((missing, missed), (beyond, clipped)) if count)


def _finite(plane: np.ndarray) -> np.ndarray:
    """Where the values are finite in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isfinite(plane.astype(np.float32, copy=False))


def _within_int16(plane: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """The plane with air in place of values that are not finite, and the others clipped to the range of int16; the type
    is kept."""
    if plane.dtype.itemsize == 1:
        return plane
    if plane.dtype.kind == "f":
        plane = np.where(finite, plane, plane.dtype.type(AIR_HU))
    low, high = (0, 2**15 - 1) if plane.dtype.kind == "u" else (-(2**15), 2**15 - 1)
    return plane.clip(low, high)


def _count_non_finite(plane: np.ndarray) -> int:
    return plane.size - int(np.isfinite(plane).sum())


def canonical(image: Image) -> Image:
    """The same scan with its axes permuted and flipped so that the direction comes closest to the identity (LPS).

    No resampling: every voxel keeps its world position and its value.
    """
    axes, flips = canonical_axes(image.grid)
    # tensor dimension 4 - a holds axis a
    voxels = image.voxels.permute(0, 1, *(4 - axes[a] for a in (2, 1, 0)))
    voxels = voxels.flip([4 - a for a in range(3) if flips[a]]) if any(flips) else voxels
    return replace(image, voxels=voxels.contiguous(), grid=restored(image.grid, axes, flips))

"""A folder with the slices of one CT series in DICOM: which files, in which order, on which grid.

GDCM (in SimpleITK) decodes the files, compressed ones too, and applies rescale slope and intercept. Whether the slices
make up a volume is checked here: SimpleITK stacks whatever it is given, across gaps and tilted gantries.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Shaped

from algorithm.errors import InputError

GAP_MM, GAP_SHARE = 0.1, 0.1
"""By so much, the larger of mm and share of the usual distance, slices may stand apart unevenly: positions are text."""
SAME_PLACE_MM = 0.01
SIDEWAYS_MM = 0.5
"""So far in plane may the slices of an upright stack be shifted against each other."""
LEAST_SLICES = 2

SERIES, DESCRIPTION, MODALITY, IMAGE_TYPE = "0020|000e", "0008|103e", "0008|0060", "0008|0008"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
NAMES = {POSITION: "ImagePositionPatient", ORIENTATION: "ImageOrientationPatient", PIXEL_SPACING: "PixelSpacing"}


@dataclass(frozen=True)
class Series:
    """The slices of one volume, in the order in which they are stacked, and their geometry as `Grid` means it."""

    files: tuple[Path, ...]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    """mm."""
    origin: tuple[float, float, float]
    """mm, LPS."""
    direction: Float[np.ndarray, "3 3"]
    """Not checked for right angles within the slices."""
    pixel_types: frozenset[int]
    """SimpleITK's, rescaled values; slices of one series may differ."""

    def read(self) -> Shaped[np.ndarray, "z y x"]:
        """The values, rescaled; slice by slice, so they are held once. InputError when a slice cannot be decoded."""
        kinds = [sitk.GetArrayViewFromImage(sitk.Image(1, 1, kind)).dtype for kind in self.pixel_types]
        x, y, z = self.size
        voxels = np.empty((z, y, x), dtype=np.result_type(*kinds))
        for plane, path in zip(voxels, self.files, strict=True):
            try:
                stored = _reader(path).Execute()
            except RuntimeError as error:
                raise InputError(f"{path}: its values cannot be read, expected a whole DICOM file") from error
            plane[:] = sitk.GetArrayViewFromImage(stored).reshape(y, x)
        return voxels


@dataclass(frozen=True)
class _Header:
    path: Path
    size: tuple[int, ...]
    pixel_type: int
    components: int
    tags: dict[str, str]

    def numbers(self, tag: str, count: int) -> np.ndarray:
        """A tag's numbers; InputError unless there are so many finite ones."""
        text = self.tags.get(tag, "")
        try:
            numbers = np.array([float(part) for part in text.split("\\")])
        except ValueError:
            numbers = np.empty(0)
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise InputError(f"{self.path}: has {text!a} as {NAMES[tag]}, expected {count} numbers")
        return numbers


def holds_dicom(folder: Path) -> bool:
    """Whether a file there (not deeper) has DICOM's mark or ending. InputError when the folder cannot be listed."""
    return any(_looks_like_dicom(path) for path in _files(folder))


def find_series(folder: Path) -> Series:
    """The one CT volume whose slices are in the folder itself; sub-folders and other kinds of files are passed over.

    InputError when there is none, or several series (they are listed); for another modality, a localizer, a single
    slice, slices of several frames or unequal size; for gaps, slices at the same place, or a tilted gantry.
    """
    headers = [header for path in _files(folder) if (header := _header(path)) is not None]
    _check_one_ct_series(folder, headers)
    _check_equal(headers)
    positions = np.array([header.numbers(POSITION, 3) for header in headers])
    row, column = headers[0].numbers(ORIENTATION, 6).reshape(2, 3)
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal)
    positions, files = positions[order], tuple(headers[i].path for i in order)
    step = _step(folder, files, positions @ normal)
    _check_upright(folder, positions - np.outer(positions @ normal, normal))
    between_rows, between_columns = headers[0].numbers(PIXEL_SPACING, 2)
    (width, height), (x, y, z) = headers[0].size[:2], positions[0]
    return Series(
        files,
        (width, height, len(files)),
        (float(between_columns), float(between_rows), step),
        (float(x), float(y), float(z)),
        np.stack([row, column, normal], axis=1),
        frozenset(header.pixel_type for header in headers),
    )


# --- files -----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        str(folder).encode(), [p.name.encode() for p in files]  # SimpleITK aborts the process on other names
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}), expected a readable folder") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{str(folder)!a}: has a name that is not UTF-8 in it, expected none") from error
    return [p for p in files if p.name != "DICOMDIR"]


def _looks_like_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() == ".dcm"
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}), expected a readable file") from error


def _reader(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _header(path: Path) -> _Header | None:
    """None when the file is not DICOM at all (old files lack the mark); InputError for a damaged one."""
    marked = _looks_like_dicom(path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if marked:
            raise InputError(f"{path}: cannot be read as a DICOM image, expected a whole CT slice") from error
        return None
    tags = {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}
    return _Header(path, reader.GetSize(), reader.GetPixelIDValue(), reader.GetNumberOfComponents(), tags)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_one_ct_series(folder: Path, headers: list[_Header]) -> None:
    series: dict[str, list[_Header]] = {}
    for header in headers:
        series.setdefault(header.tags.get(SERIES, "without UID"), []).append(header)
    if not series:
        raise InputError(f"{folder}: holds no DICOM image, expected the slices of one CT series")
    if len(series) > 1:
        listed = "; ".join(
            f"{uid}: {len(slices)} slice(s) of {slices[0].tags.get(DESCRIPTION) or 'no description'}"
            for uid, slices in series.items()
        )
        raise InputError(f"{folder}: holds {len(series)} DICOM series ({listed}), expected one")
    first = headers[0]
    if (modality := first.tags.get(MODALITY)) != "CT":
        raise InputError(f"{folder}: holds slices of modality {modality or 'unknown'}, expected CT")
    if "LOCALIZER" in first.tags.get(IMAGE_TYPE, "").upper().split("\\"):
        raise InputError(f"{folder}: holds a localizer (scout view), expected the slices of a CT series")
    if len(headers) < LEAST_SLICES:
        raise InputError(f"{folder}: holds one DICOM slice, expected the slices of a whole CT series")


def _check_equal(headers: list[_Header]) -> None:
    first = headers[0]
    for header in headers:
        frames = int(np.prod(header.size[2:]))
        if frames != 1 or header.components != 1:
            raise InputError(
                f"{header.path}: has {frames} frame(s) of {header.components} value(s) per pixel, expected one of each"
            )
        for tag, count, tolerance in ((PIXEL_SPACING, 2, 1e-3), (ORIENTATION, 6, 1e-3)):
            equal = np.allclose(header.numbers(tag, count), first.numbers(tag, count), rtol=0, atol=tolerance)
            if not equal or header.size != first.size:
                raise InputError(
                    f"{header.path}: differs in size, {NAMES[PIXEL_SPACING]} or {NAMES[ORIENTATION]} from "
                    f"{first.path.name}, expected equal slices"
                )


def _step(folder: Path, files: tuple[Path, ...], along_mm: np.ndarray) -> float:
    """The distance of the slices (mm), ordered along their normal; InputError unless it is the same all through."""
    gaps = np.diff(along_mm)
    usual = float(np.median(gaps))
    if gaps.min() < SAME_PLACE_MM:
        i = int(gaps.argmin())
        raise InputError(
            f"{folder}: {files[i].name} and {files[i + 1].name} lie at the same place, expected every slice once"
        )
    i = int(np.abs(gaps - usual).argmax())
    if abs(gaps[i] - usual) > max(GAP_MM, GAP_SHARE * usual):
        raise InputError(
            f"{folder}: {files[i].name} and {files[i + 1].name} are {gaps[i]:.4g} mm apart where {usual:.4g} mm is "
            "usual, expected evenly spaced slices without a gap"
        )
    return float(along_mm[-1] - along_mm[0]) / len(gaps)


def _check_upright(folder: Path, in_plane_mm: np.ndarray) -> None:
    sideways = float(np.linalg.norm(in_plane_mm - in_plane_mm[0], axis=1).max())
    if sideways > SIDEWAYS_MM:
        raise InputError(
            f"{folder}: its slices are shifted sideways by up to {sideways:.4g} mm (a tilted gantry?), "
            "expected them right above each other"
        )

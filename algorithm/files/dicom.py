"""A folder with the slices of one CT series in DICOM: finds the files, their order and their grid.

GDCM (in SimpleITK) decodes the files, compressed ones too, and applies rescale slope and intercept. Whether the slices
make up a volume is checked here, because SimpleITK stacks any slices, even across gaps and with a tilted gantry.
pydicom reads the position of each frame of an enhanced CT, because SimpleITK returns that of the first frame only.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float, Shaped
from pydicom.dataset import Dataset

from ..errors import InputError

GAP_MM, GAP_SHARE = 0.1, 0.1
"""Largest accepted deviation of a slice distance from the usual one: 0.1 mm or a share of 0.1 of the usual distance,
whichever is larger. Positions are stored as text."""
SAME_PLACE_MM = 0.01
SIDEWAYS_MM = 0.5
"""Largest accepted in-plane shift between the slices of an upright stack."""
LEAST_SLICES = 2
MOST_ALTERNATING = 1.08
"""Threshold for `_alternation`. In 44 scans, with and without strong added noise, it was at most 1.005. With
alternating slices of two breathing phases it was 1.14 or more, of two breath-holds above 1.8."""
LISTED = 5
"""Maximum number of kinds of objects or acquisitions that a message lists."""
LISTED_SERIES = 4
"""Maximum number of series that a message lists."""
SERIES, DESCRIPTION, MODALITY, IMAGE_TYPE = "0020|000e", "0008|103e", "0008|0060", "0008|0008"
CLASS, ACQUISITION = "0008|0016", "0020|0012"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
NAMES = {POSITION: "ImagePositionPatient", ORIENTATION: "ImageOrientationPatient", PIXEL_SPACING: "PixelSpacing"}
GROUPS = {
    POSITION: ("PlanePositionSequence", "ImagePositionPatient"),
    ORIENTATION: ("PlaneOrientationSequence", "ImageOrientationPatient"),
    PIXEL_SPACING: ("PixelMeasuresSequence", "PixelSpacing"),
    ACQUISITION: ("FrameContentSequence", "FrameAcquisitionNumber"),
}
"""For each tag of classic slices, the functional group and the attribute that hold it in the frames of an enhanced
CT."""
SECONDARY_CAPTURE, ENHANCED = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.2."
"""Beginnings of the UIDs of these SOP classes."""


@dataclass(frozen=True)
class _Header:
    """The header of a file, or of one frame of it."""

    path: Path
    size: tuple[int, ...]
    pixel_type: int
    components: int
    tags: dict[str, str]
    frame: int = 0
    rescale: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept that are still to be applied to this frame after those of the first frame, which GDCM applies
    to all."""

    def numbers(self, tag: str, count: int) -> np.ndarray:
        """The numbers of a tag; InputError unless there are exactly ``count`` finite ones."""
        text = self.tags.get(tag, "")
        try:
            numbers = np.array([float(part) for part in text.split("\\")])
        except ValueError:
            numbers = np.empty(0)
        if len(numbers) != count or not np.isfinite(numbers).all():
            raise InputError(f"{self.path}: has {text!a} as {NAMES[tag]}, expected {count} numbers")
        return numbers


@dataclass(frozen=True)
class Series:
    """The slices of one volume, in the order in which they are stacked, and their geometry as `Grid` means it."""

    folder: Path
    slices: tuple[_Header, ...]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    """mm."""
    origin: tuple[float, float, float]
    """mm, LPS."""
    direction: Float[np.ndarray, "3 3"]
    """Right angles within the slices are not checked."""
    remarks: tuple[str, ...]
    """Sentences on the files of the folder that were left out."""

    def read(self) -> Shaped[np.ndarray, "z y x"]:
        """The rescaled values. Classic slices are read file by file, so that their values are in memory only once.

        InputError when a file cannot be decoded, or when slices of two volumes alternate.
        """
        types = {header.pixel_type for header in self.slices}  # slices of one series may differ
        kinds = [sitk.GetArrayViewFromImage(sitk.Image(1, 1, kind)).dtype for kind in types]
        if any(header.rescale != (1.0, 0.0) for header in self.slices):
            kinds.append(np.dtype(np.float32))
        x, y, z = self.size
        voxels = np.empty((z, y, x), dtype=np.result_type(*kinds))
        places = sorted(range(z), key=lambda place: self.slices[place].path)
        for path, of_file in itertools.groupby(places, key=lambda place: self.slices[place].path):
            try:
                stored = _reader(path).Execute()
            except RuntimeError as error:
                raise InputError(f"{path}: its values cannot be read, expected a whole DICOM file") from error
            frames = sitk.GetArrayViewFromImage(stored).reshape(-1, y, x)
            for place in of_file:
                slope, intercept = self.slices[place].rescale
                frame = frames[self.slices[place].frame]
                voxels[place] = frame if (slope, intercept) == (1.0, 0.0) else frame * slope + intercept
        if _alternation(voxels) > MOST_ALTERNATING:
            raise InputError(
                f"{self.folder}: neighbouring slices differ more than every second one, as if two acquisitions (or "
                "phases of breathing) lay among each other, expected one"
            )
        return voxels


def holds_dicom(folder: Path) -> bool:
    """Whether a file directly in the folder has the DICOM mark or ending. InputError when the folder cannot be
    listed."""
    return any(_looks_like_dicom(path) for path in _files(folder))


def find_series(folder: Path) -> Series:
    """The one CT volume whose slices lie directly in the folder; sub-folders and other kinds of files are ignored.

    The slices are classic ones, one per file, or the frames of an enhanced CT. DICOM objects that are not CT slices
    (structure sets, reports, other modalities, localizers, screenshots) are left out, with a remark. InputError when
    the folder holds nothing else, or several series (the message lists them); for a single slice, mixed acquisitions or
    phases, frames without positions, slices of unequal size; for gaps, slices at the same place, or a tilted gantry.
    """
    found = [_header(path) for path in _files(folder)]
    headers, remarks = _ct_slices(folder, [one for one in found if one is not None])
    _check_one_ct_series(folder, headers)
    headers = [frame for header in headers for frame in _frames(header)]
    _check_equal(headers)
    if len(headers) < LEAST_SLICES:
        raise InputError(f"{folder}: holds one DICOM slice, expected the slices of a whole CT series")
    positions = np.array([header.numbers(POSITION, 3) for header in headers])
    row, column = headers[0].numbers(ORIENTATION, 6).reshape(2, 3)
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable")
    positions, slices = positions[order], tuple(headers[i] for i in order)
    _check_one_volume(folder, slices, positions @ normal)
    step = _step(folder, tuple(_name(header) for header in slices), positions @ normal)
    _check_upright(folder, positions - np.outer(positions @ normal, normal))
    between_rows, between_columns = headers[0].numbers(PIXEL_SPACING, 2)
    (width, height), (x, y, z) = headers[0].size[:2], positions[0]
    return Series(
        folder,
        slices,
        (width, height, len(slices)),
        (float(between_columns), float(between_rows), step),
        (float(x), float(y), float(z)),
        np.stack([row, column, normal], axis=1),
        remarks,
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


def _header(path: Path) -> _Header | str | None:
    """The header; None when the file is not DICOM (old files lack the mark); the kind of object, as text, when it is
    not an image. InputError for a damaged file."""
    marked = _looks_like_dicom(path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if (kind := _kind(path)) is not None and "Image Storage" not in kind:
            return kind
        if marked:
            raise InputError(f"{path}: cannot be read as a DICOM image, expected a whole CT slice") from error
        return None
    tags = {key: reader.GetMetaData(key).strip(" \0") for key in reader.GetMetaDataKeys()}
    return _Header(path, reader.GetSize(), reader.GetPixelIDValue(), reader.GetNumberOfComponents(), tags)


def _kind(path: Path) -> str | None:
    """The name of the file's SOP class, or its UID for a private class of a manufacturer; None when the file has
    none."""
    try:
        uid = pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID")
    except Exception:  # pydicom documents none for damaged files; the caller says what is wrong
        return None
    return uid.name if uid else None


def _ct_slices(folder: Path, found: list[_Header | str]) -> tuple[list[_Header], tuple[str, ...]]:
    """The images that can be slices of a CT, and remarks on all other objects. InputError when there are no such
    images."""
    slices, others = [], []
    for one in found:
        if isinstance(one, str) or (other := _not_ct(one)):
            others.append(one if isinstance(one, str) else other)
        else:
            slices.append(one)
    listed = ", ".join(f"{count} × {kind}" for kind, count in Counter(others).most_common(LISTED))
    if len(set(others)) > LISTED:
        listed += " and others"
    if others and not slices:
        raise InputError(f"{folder}: holds no CT slice but {listed}, expected the slices of one CT series")
    return slices, (f"{folder.name}: what is no CT slice was left out: {listed}.",) if others else ()


def _not_ct(header: _Header) -> str:
    """The kind of an image that is not a CT slice; an empty string for a CT slice."""
    if (modality := header.tags.get(MODALITY)) != "CT":
        return f"modality {modality or 'unknown'}"
    if "LOCALIZER" in header.tags.get(IMAGE_TYPE, "").upper().split("\\"):
        return "localizer (scout view)"
    if header.tags.get(CLASS, "").startswith(SECONDARY_CAPTURE) and not header.tags.get(POSITION):
        return "screenshot"
    return ""


def _frames(header: _Header) -> list[_Header]:
    """One header per frame of an enhanced CT, with the tags of a classic slice; for other files the given header."""
    count = int(np.prod(header.size[2:]))
    if count == 1 and not header.tags.get(CLASS, "").startswith(ENHANCED):
        return [header]
    try:
        data = pydicom.dcmread(header.path, stop_before_pixels=True)
        shared = data.get("SharedFunctionalGroupsSequence", [Dataset()])[0]
        groups = data.get("PerFrameFunctionalGroupsSequence", [])
        frames = [
            replace(
                header,
                size=header.size[:2],
                tags=header.tags | {tag: _text(group, shared, *where) for tag, where in GROUPS.items()},
                frame=number,
                rescale=_rescale(group, groups[0], shared),
            )
            for number, group in enumerate(groups)
        ]
    except Exception as error:  # pydicom documents none for damaged files
        raise InputError(f"{header.path}: its frames cannot be read, expected a whole DICOM file") from error
    if len(frames) != count:
        raise InputError(
            f"{header.path}: has {count} frames, and positions for {len(frames)} of them, expected an enhanced CT with "
            "a position for each, or single slices"
        )
    return frames


def _text(group: Dataset, shared: Dataset, sequence: str, name: str) -> str:
    """A value of the frame's functional group, or else of the shared group, written as tags are."""
    item = (group.get(sequence) or shared.get(sequence) or [Dataset()])[0]
    value = item.get(name)
    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)


def _rescale(group: Dataset, first: Dataset, shared: Dataset) -> tuple[float, float]:
    """Slope and intercept to apply to this frame after GDCM has applied those of the first frame to its stored
    values."""

    def own(of: Dataset) -> tuple[float, float]:
        slope, intercept = (
            _text(of, shared, "PixelValueTransformationSequence", f"Rescale{part}") for part in ("Slope", "Intercept")
        )
        return float(slope or 1), float(intercept or 0)

    (slope, intercept), (first_slope, first_intercept) = own(group), own(first)
    return slope / first_slope, intercept - first_intercept * slope / first_slope


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
            for uid, slices in itertools.islice(series.items(), LISTED_SERIES)
        )
        listed += f"; and {len(series) - LISTED_SERIES} more" if len(series) > LISTED_SERIES else ""
        raise InputError(f"{folder}: holds {len(series)} DICOM series ({listed}), expected one")


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


def _name(header: _Header) -> str:
    return f"{header.path.name} (frame {header.frame + 1})" if header.frame else header.path.name


def _check_one_volume(folder: Path, slices: tuple[_Header, ...], along_mm: np.ndarray) -> None:
    """InputError when the ordered slices belong to several volumes: phases at the same places, or mixed
    acquisitions."""
    starts = np.flatnonzero(np.diff(along_mm, prepend=-np.inf) >= SAME_PLACE_MM)
    times = np.diff(starts, append=len(slices))
    if len(starts) >= LEAST_SLICES and (times > 1).all():
        raise InputError(
            f"{folder}: has {times.min()} slices or more at each of {len(starts)} places, as a series of several "
            "phases (of breathing or of contrast) or acquisitions has, expected one: give its slices in a folder of "
            "their own"
        )
    acquisitions = [header.tags.get(ACQUISITION, "") for header in slices]
    counts = Counter(acquisitions)
    if len(list(itertools.groupby(acquisitions))) > len(counts):  # one after the other they would make a volume
        listed = ", ".join(f"{number or 'none'}: {count} slices" for number, count in counts.most_common(LISTED))
        raise InputError(
            f"{folder}: has {len(counts)} acquisitions whose slices lie among each other (AcquisitionNumber {listed}), "
            "expected one: give its slices in a folder of their own"
        )


def _alternation(voxels: Shaped[np.ndarray, "z y x"]) -> float:
    """Mean difference (HU, blocks of pixels) of slices one and three apart, divided by that of slices two apart.

    In one volume it exceeds 1 only by noise, because the difference grows with the distance, ever more slowly. When two
    volumes alternate, slices an odd number apart are always of different volumes.
    """
    factor = max(1, min(voxels.shape[1:]) // 64)
    height, width = (n // factor * factor for n in voxels.shape[1:])
    blocks = np.stack(
        [
            plane[:height, :width].clip(-1024, 400).reshape(height // factor, factor, -1, factor).mean((1, 3))
            for plane in voxels
        ]
    )
    if len(blocks) < 4:
        return 1.0
    one, two, three = (float(np.abs(blocks[apart:] - blocks[:-apart]).mean()) for apart in (1, 2, 3))
    return (one + three) / (2 * two) if two else 1.0


def _step(folder: Path, files: tuple[str, ...], along_mm: np.ndarray) -> float:
    """The distance between slices (mm) that are ordered along their normal; InputError unless it is constant."""
    gaps = np.diff(along_mm)
    usual = float(np.median(gaps))
    if gaps.min() < SAME_PLACE_MM:
        i = int(gaps.argmin())
        raise InputError(f"{folder}: {files[i]} and {files[i + 1]} lie at the same place, expected every slice once")
    i = int(np.abs(gaps - usual).argmax())
    if abs(gaps[i] - usual) > max(GAP_MM, GAP_SHARE * usual):
        raise InputError(
            f"{folder}: {files[i]} and {files[i + 1]} are {gaps[i]:.4g} mm apart where {usual:.4g} mm is "
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

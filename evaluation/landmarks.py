"""Target registration error: how far the field misses corresponding anatomical points."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float

from .errors import CaseError, short
from .fields import axes_of
from .images import Grid, is_there
from .tables import numbers, read_columns

COLUMNS = ("x", "y", "z")
FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
"""Columns of 3D Slicer's .fcsv if its header does not name them."""
ENDINGS = (".csv", ".fcsv", ".mrk.json")
"""Endings of files that can hold landmarks."""
TO_LPS = {"LPS": (1.0, 1.0, 1.0), "1": (1.0, 1.0, 1.0), "RAS": (-1.0, -1.0, 1.0), "0": (-1.0, -1.0, 1.0)}
"""Signs by 3D Slicer's names of coordinate systems, and by its numbers in old .fcsv files."""


@dataclass(frozen=True)
class LandmarkErrors:
    """Distances in mm, one per landmark: before registration, and after it by two definitions."""

    initial_mm: Float[np.ndarray, " n"]
    """|x_fixed - x_moving|."""
    trilinear_mm: Float[np.ndarray, " n"]
    """|x_fixed + u(x_fixed) - x_moving|, with trilinear u."""
    snapped_mm: Float[np.ndarray, " n"]
    """The same with x_fixed + u(x_fixed) moved to the nearest voxel centre of the moving grid.

    Most DIR-Lab figures in the literature are of this kind, because DIR-Lab landmarks are voxel centres. It is mostly
    the smaller one if the error is below a voxel, so the two must not be compared.
    """


def find_landmarks(folder: Path, role: str) -> Path:
    """``folder/<role>_landmarks`` with the first ending for which a file exists; .csv if there is none."""
    paths = [folder / f"{role}_landmarks{ending}" for ending in ENDINGS]
    return next((path for path in paths if is_there(path)), paths[0])


def read_landmarks(path: Path) -> Float[np.ndarray, "n 3"]:
    """World positions (mm, LPS) in the order of the file. CaseError if it has another format, or holds no point.

    The columns x, y, z (mm, LPS) of a CSV file with a header line, or a point list of 3D Slicer, .fcsv or .mrk.json,
    which names LPS or RAS.
    """
    if path.name.endswith(".fcsv"):
        points = _read_fcsv(path)
    elif path.name.endswith(".mrk.json"):
        points = _read_mrk_json(path)
    else:
        points = np.stack([numbers(path, cells) for cells in read_columns(path, COLUMNS)], axis=1)
    if len(points) == 0:
        raise CaseError(f"{short(path)}: holds 0 landmarks, expected positions in mm")
    return points


def _read_fcsv(path: Path) -> Float[np.ndarray, "n 3"]:
    """Read lines of cells without a header line; comments above them name the coordinate system and the columns."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [row for row in csv.reader(line for line in lines if not line.startswith("#")) if any(row)]
    except (OSError, ValueError, csv.Error) as error:
        raise CaseError(f"{short(path)}: cannot be read, expected 3D Slicer's fiducials") from error
    comments = dict(_entry(line) for line in lines if line.startswith("#"))
    names = [name.strip() for name in comments.get("columns", FCSV_COLUMNS).split(",")]
    if any(names.count(name) != 1 for name in COLUMNS):
        raise CaseError(f"{short(path)}: has the columns {names}, expected {', '.join(COLUMNS)}")
    columns = [[row[i].strip() if i < len(row) else "" for row in rows] for i in map(names.index, COLUMNS)]
    points: np.ndarray = np.stack([numbers(path, cells) for cells in columns], axis=1)
    points *= _to_lps(path, comments.get("CoordinateSystem"))
    return points


def _entry(comment: str) -> tuple[str, str]:
    """Key and value of ``# key = value``."""
    key, _, value = comment.lstrip("#").partition("=")
    return key.strip(), value.strip()


def _read_mrk_json(path: Path) -> Float[np.ndarray, "n 3"]:
    """Read the only point list of the file; every point must have been placed."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CaseError(f"{short(path)}: cannot be read, expected 3D Slicer's markups in JSON") from error
    lists = content.get("markups") if isinstance(content, dict) else None
    if not isinstance(lists, list) or len(lists) != 1 or not isinstance(lists[0], dict):
        found = len(lists) if isinstance(lists, list) else "no"
        raise CaseError(f"{short(path)}: holds {found} lists of points under markups, expected one")
    unit = lists[0].get("coordinateUnits", "mm")
    if unit not in ("mm", ["mm", "UCUM", "millimeter"]):
        raise CaseError(f"{short(path)}: its coordinateUnits are {str(unit)[:50]!a}, expected mm")
    points = lists[0].get("controlPoints")
    if not isinstance(points, list):
        raise CaseError(f"{short(path)}: has no list of controlPoints, expected positions in mm")
    positions = [_position(path, number, point) for number, point in enumerate(points, start=1)]
    array: np.ndarray = np.array(positions, float).reshape(-1, 3)
    array *= _to_lps(path, lists[0].get("coordinateSystem"))
    return array


def _position(path: Path, number: int, point: object) -> Float[np.ndarray, " 3"]:
    position = point.get("position") if isinstance(point, dict) else None
    placed = isinstance(point, dict) and point.get("positionStatus", "defined") == "defined"
    if not placed or not isinstance(position, list) or len(position) != 3:
        raise CaseError(f"{short(path)}: its point {number} has no position, expected three numbers in mm")
    return numbers(path, [str(value) for value in position])


def _to_lps(path: Path, system: object) -> Float[np.ndarray, " 3"]:
    if not isinstance(system, str) or system not in TO_LPS:
        said = "no coordinate system" if system is None else f"the coordinate system {str(system)[:20]!a}"
        raise CaseError(f"{short(path)}: names {said}, expected LPS or RAS")
    return np.array(TO_LPS[system])


def landmark_errors(
    field: sitk.Image,
    fixed_mm: Float[np.ndarray, "n 3"],
    moving_mm: Float[np.ndarray, "m 3"],
    moving: Grid | None = None,
) -> LandmarkErrors:
    """The errors of corresponding landmarks, row by row.

    ``moving`` is the moving grid for the snapping, by default that of the field; it is continued without limit. Up to
    half a voxel outside, the field has its border value. Farther out it is zero, as for labels: such a landmark counts
    as not registered. CaseError if all landmarks lie there, or if the numbers of landmarks differ.
    """
    if len(fixed_mm) != len(moving_mm):
        raise CaseError(f"{len(fixed_mm)} fixed and {len(moving_mm)} moving landmarks, expected as many")
    if outside(field, fixed_mm).all():
        raise CaseError(f"all {len(fixed_mm)} fixed landmarks lie outside the displacement field, expected some inside")
    mapped = fixed_mm + displacement_at(field, fixed_mm)
    return _errors(fixed_mm, mapped, moving_mm, field if moving is None else moving)


def unregistered_errors(
    fixed_mm: Float[np.ndarray, "n 3"], moving_mm: Float[np.ndarray, "n 3"], moving: Grid | None
) -> LandmarkErrors:
    """The errors for a displacement of zero; without ``moving``, positions are not snapped."""
    return _errors(fixed_mm, fixed_mm, moving_mm, moving)


def _errors(
    fixed_mm: Float[np.ndarray, "n 3"],
    mapped: Float[np.ndarray, "n 3"],
    moving_mm: Float[np.ndarray, "n 3"],
    grid: Grid | None,
) -> LandmarkErrors:
    initial_mm, trilinear_mm = (np.linalg.norm(points - moving_mm, axis=1) for points in (fixed_mm, mapped))
    if grid is None:
        return LandmarkErrors(initial_mm, trilinear_mm, trilinear_mm)
    axes, origin = axes_of(grid), np.array(grid.GetOrigin())
    voxel = np.rint((mapped - origin) @ np.linalg.inv(axes).T)
    return LandmarkErrors(
        initial_mm,
        trilinear_mm,
        np.linalg.norm(voxel @ axes.T + origin - moving_mm, axis=1),
    )


def outside(grid: Grid, points_mm: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
    """Which world points (mm) lie more than half a voxel beyond the outer voxel centres."""
    index = _index(grid, points_mm)
    beyond = np.maximum(-index, index - (np.array(grid.GetSize()) - 1)).max(axis=1)
    return np.asarray(beyond > 0.5 + 1e-6)


def _index(grid: Grid, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    index: np.ndarray = (points_mm - np.array(grid.GetOrigin())) @ np.linalg.inv(axes_of(grid)).T
    return index


def displacement_at(field: sitk.Image, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """u (mm) at world points (mm), trilinear in float64; zero outside the field, as in `landmark_errors`."""
    size = np.array(field.GetSize())
    index = _index(field, points_mm)
    vectors = sitk.GetArrayViewFromImage(field)
    index = np.clip(index, 0, size - 1)
    low = np.minimum(index.astype(int), np.maximum(size - 2, 0))
    part = index - low
    values = np.zeros(index.shape)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=1)
        x, y, z = np.minimum(low + corner, size - 1).T
        values += weight[:, None] * vectors[z, y, x]
    values[outside(field, points_mm)] = 0
    return values

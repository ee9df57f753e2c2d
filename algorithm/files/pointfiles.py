"""Reads files that hold points and writes them with moved points; everything else in them stays unchanged.

.csv         columns x, y, z (mm) among any other columns; LPS, or RAS if the user says so
.fcsv        fiducials of 3D Slicer; the file says LPS or RAS
.mrk.json    markups of 3D Slicer; the file says LPS or RAS
.vtk         any legacy VTK file that has POINTS, ASCII or binary: surfaces, lines, point clouds
.stl         triangles, ASCII or binary

VTK and STL are LPS unless their header says SPACE=RAS, as in files of 3D Slicer, or the user says RAS.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ..errors import InputError

ENDINGS = (".csv", ".fcsv", ".mrk.json", ".vtk", ".stl")
TO_LPS = {"LPS": (1.0, 1.0, 1.0), "1": (1.0, 1.0, 1.0), "RAS": (-1.0, -1.0, 1.0), "0": (-1.0, -1.0, 1.0)}
"""Signs by 3D Slicer's names of coordinate systems, and by its numbers in old .fcsv files."""
_AXES = ("x", "y", "z")
_FCSV = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
"""The columns of a .fcsv file that does not name them."""
_VTK_TYPES = {"float": ">f4", "double": ">f8"}
_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
Notes = Mapping[str, list[str]]
"""Notes on each point, by the name of the note."""
Points = Float[np.ndarray, "p 3"]


@dataclass(frozen=True)
class PointFile:
    """The points of a file (mm, LPS), and a function that returns the file's content with other points in their
    places."""

    points_mm: Points
    rewritten: Callable[[Points, Notes], bytes]


def point_ending(path: Path) -> str | None:
    """The one of `ENDINGS` that a name has, in lower or upper case."""
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)


def read_points(path: Path, ras: bool = False) -> PointFile:
    """The points of a file. InputError when the file cannot be read, or holds no point or a value that is not a number.
    ``ras``: a file that does not name its coordinate system is in RAS."""
    readers = {".csv": _csv, ".fcsv": _fcsv, ".mrk.json": _mrk_json, ".vtk": _vtk, ".stl": _stl}
    ending = point_ending(path)
    if ending is None:
        raise InputError(f"{path}: is no known kind of file with points, expected one of {', '.join(ENDINGS)}")
    try:
        content = path.read_bytes()
        found = readers[ending](content, np.array(TO_LPS["RAS" if ras else "LPS"]))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a file with points") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as {ending} ({error}), expected points in mm") from error
    if not len(found.points_mm) or not np.isfinite(found.points_mm).all():
        what = "a point that is no number" if len(found.points_mm) else "no points"
        raise InputError(f"{path}: holds {what}, expected finite positions in mm")
    return found


def _system(name: object) -> Float[np.ndarray, " 3"]:
    if str(name) not in TO_LPS:
        raise ValueError(f"its coordinate system is {str(name)[:20]!a}, neither LPS nor RAS")
    return np.array(TO_LPS[str(name)])


def _cell(number: float) -> str:
    return f"{number + 0.0:.4f}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _csv(content: bytes, signs: Float[np.ndarray, " 3"]) -> PointFile:
    lines = [line for line in csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")) if any(line)]
    head, rows = lines[0], lines[1:]
    places = _places(head)

    def rewritten(points: Points, notes: Notes) -> bytes:
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*head, *notes])
        for number, (row, point) in enumerate(zip(rows, points * signs, strict=True)):
            writer.writerow([*_with(row, places, point, len(head)), *(cells[number] for cells in notes.values())])
        return out.getvalue().encode()

    return PointFile(_numbers(rows, places) * signs, rewritten)


def _fcsv(content: bytes, _: Float[np.ndarray, " 3"]) -> PointFile:
    """Notes are written into empty descriptions."""
    lines = content.decode("utf-8-sig").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    entries = {key.strip(): value.strip() for key, _, value in (line.lstrip("#").partition("=") for line in comments)}
    head, signs = entries.get("columns", _FCSV).split(","), _system(entries.get("CoordinateSystem"))
    rows = [row for row in csv.reader(line for line in lines if not line.startswith("#")) if any(row)]
    places = _places(head)

    def rewritten(points: Points, notes: Notes) -> bytes:
        out = io.StringIO(newline="")
        out.write("".join(f"{line}\n" for line in comments))
        writer = csv.writer(out, lineterminator="\n")
        for number, (row, point) in enumerate(zip(rows, points * signs, strict=True)):
            row = _with(row, places, point, len(head))
            if "desc" in head and not row[head.index("desc")]:
                row[head.index("desc")] = _sentence(notes, number)
            writer.writerow(row)
        return out.getvalue().encode()

    return PointFile(_numbers(rows, places) * signs, rewritten)


def _places(head: list[str]) -> list[int]:
    names = [name.strip().lower() for name in head]
    if any(names.count(axis) != 1 for axis in _AXES):
        raise ValueError(f"it has the columns {', '.join(head)[:80]}")
    return [names.index(axis) for axis in _AXES]


def _numbers(rows: list[list[str]], places: list[int]) -> Points:
    return np.array([[float(row[place]) for place in places] for row in rows], np.float64).reshape(-1, 3)


def _with(row: list[str], places: list[int], point: Float[np.ndarray, " 3"], length: int) -> list[str]:
    """The row with another position, padded to ``length`` cells."""
    row = [*row, *[""] * (length - len(row))]
    for place, value in zip(places, point, strict=True):
        row[place] = _cell(float(value))
    return row


def _sentence(notes: Notes, number: int) -> str:
    """The notes on one point as text, without empty notes."""
    return "; ".join(f"{name} {cells[number]}" for name, cells in notes.items() if cells[number])


# --- 3D Slicer's markups ---------------------------------------------------------------------------------------------


def _mrk_json(content: bytes, _: Float[np.ndarray, " 3"]) -> PointFile:
    """All lists of the file are used; points that were not placed stay unchanged. Notes are written into empty
    descriptions."""
    document = json.loads(content)
    placed = [
        (point, _system(markup.get("coordinateSystem")))
        for markup in document["markups"]
        for point in markup["controlPoints"]
        if point.get("positionStatus", "defined") == "defined"
    ]
    positions = np.array([point["position"] for point, _ in placed], np.float64).reshape(-1, 3)
    signs = np.array([sign for _, sign in placed]).reshape(-1, 3)

    def rewritten(points: Points, notes: Notes) -> bytes:
        for number, ((point, _), position) in enumerate(zip(placed, points * signs, strict=True)):
            point["position"] = [round(float(value), 4) + 0.0 for value in position]
            point["description"] = point.get("description") or _sentence(notes, number)
        return json.dumps(document, indent=4, ensure_ascii=False).encode() + b"\n"

    return PointFile(positions * signs, rewritten)


# --- surfaces --------------------------------------------------------------------------------------------------------


def _vtk(content: bytes, signs: Float[np.ndarray, " 3"]) -> PointFile:
    """Only the coordinates are changed. In binary files they are big-endian."""
    lines = content.split(b"\n", 3)
    if not lines[0].startswith(b"# vtk DataFile") or len(lines) < 4:
        raise ValueError("it does not begin as a legacy VTK file")
    signs = _said(lines[1], signs)
    match = re.search(rb"^POINTS[ \t]+(\d+)[ \t]+(\w+)[ \t]*\r?\n", content, re.MULTILINE)
    if match is None or (kind := match[2].decode()) not in _VTK_TYPES:
        raise ValueError("it has no POINTS of type float or double")
    count, start, binary = 3 * int(match[1]), match.end(), lines[2].strip().upper() == b"BINARY"
    if binary:
        end = start + count * np.dtype(_VTK_TYPES[kind]).itemsize
        values = np.frombuffer(content[start:end], _VTK_TYPES[kind])
    else:
        tokens = list(zip(range(count), re.finditer(rb"\S+", content[start:]), strict=False))
        end = start + (tokens[-1][1].end() if tokens else 0)
        values = np.array([float(token[0]) for _, token in tokens])
    if len(values) != count:
        raise ValueError(f"it holds {len(values)} of {count} coordinates")

    def rewritten(points: Points, notes: Notes) -> bytes:
        new = points * signs
        body = (
            new.astype(_VTK_TYPES[kind]).tobytes()
            if binary
            else "\n".join(" ".join(_cell(value) for value in point) for point in new.tolist()).encode()
        )
        return content[:start] + body + content[end:]

    return PointFile(values.reshape(-1, 3).astype(np.float64) * signs, rewritten)


def _said(header: bytes, signs: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """The signs given by SPACE=RAS or SPACE=LPS in a header, else ``signs``."""
    said = re.search(rb"SPACE=(RAS|LPS)", header)
    return signs if said is None else _system(said[1].decode())


def _stl(content: bytes, signs: Float[np.ndarray, " 3"]) -> PointFile:
    """The corners of the triangles, three for each. The normals are computed again."""
    head = content[:80]
    count = int.from_bytes(content[80:84], "little")
    if len(content) == 84 + count * _FACET.itemsize:
        facets = np.frombuffer(content[84:], _FACET).copy()
        corners = facets["corners"]
    else:
        if not content.lstrip().startswith(b"solid"):
            raise ValueError("it is neither a binary nor an ASCII STL file")
        head = content.split(b"\n", 1)[0]
        words = (line.split() for line in content.split(b"\n"))
        corners = np.array([line[1:4] for line in words if line[:1] == [b"vertex"]], np.float32).reshape(-1, 3, 3)
        facets = np.zeros(len(corners), _FACET)
        head = head.ljust(80)[:80].replace(b"solid", b"     ", 1)  # a binary file must not begin with "solid"
    signs = _said(head, signs)

    def rewritten(points: Points, notes: Notes) -> bytes:
        new = (points * signs).reshape(-1, 3, 3)
        normals = np.cross(new[:, 1] - new[:, 0], new[:, 2] - new[:, 0])
        facets["corners"] = new
        facets["normal"] = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
        return head + len(facets).to_bytes(4, "little") + facets.tobytes()

    return PointFile(corners.reshape(-1, 3).astype(np.float64) * signs, rewritten)

"""The header of a NRRD file (.nrrd, .nhdr): a magic line, lines ``field: value``, an empty line."""

import math
import os
import re
from pathlib import Path

from imagefiles.meta import numbered
from imagefiles.stored import Encoding, FileError, Stored, beside, head_of, no_header

ENCODINGS: dict[str, Encoding] = {
    "raw": "raw",
    "gz": "compressed",
    "gzip": "compressed",
    "ascii": "text",
    "text": "text",
    "txt": "text",
    "hex": "hex",
}
DOMAIN = ("domain", "space", "time", "???", "none")
"""Kinds of spatial axes, along which voxels lie; other axes hold the components of a vector."""


def stored(path: Path) -> Stored:
    """Where and how the voxels are stored. FileError for a header that is incomplete, has an entry twice, or names a
    file outside its folder."""
    fields, length, listed = _fields(path, head_of(path))
    domain = _domain(fields)
    _check_spacing(fields, domain[:3])
    encoding = ENCODINGS.get(fields.get("encoding", "").lower())
    if encoding is None:
        raise FileError(f"it has the encoding {fields.get('encoding', '')!a}, expected one of {', '.join(ENCODINGS)}")
    name = fields.get("datafile")
    files = (path,) if name is None else _data_files(path, name, listed)
    lines, skip = (_integer(path, fields, key) for key in ("lineskip", "byteskip"))
    skipped = length if name is None else 0
    if (lines or skip) and (name is None or encoding != "raw" or lines < 0 or skip < -1):
        raise FileError(f"it has a line skip of {lines} and a byte skip of {skip}, expected none for such a file")
    before = skipped + skip if not lines else _after_lines(path, files[0], lines) + skip
    others = [axis for axis in range(_dimension(fields)) if axis not in domain]
    return Stored(
        files,
        encoding,
        math.prod(_sizes(path, fields)),
        start=None if skip < 0 else before if encoding == "raw" else 0,
        skipped=0 if encoding == "raw" else skipped,
        big_endian=fields.get("endian", "").lower() == "big",
        component_axis=others[0] if others else 0,
    )


def _fields(path: Path, head: bytes) -> tuple[dict[str, str], int, list[str]]:
    """The values by field name (lower case, no blanks), the length of the header, and the files that it lists."""
    end = re.search(rb"\r?\n\r?\n", head)
    lines = [line.rstrip("\r") for line in os.fsdecode(head[: end.end()] if end else head).split("\n")]
    if not lines or not re.fullmatch(r"NRRD\d{4}", lines[0]):
        raise no_header(path)
    fields: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        match = re.fullmatch(r"([^:]+):(=?)\s*(.*?)\s*", line)
        if line.startswith("#") or not line.strip() or (match and match[2]):
            continue
        if match is None:
            raise no_header(path, f"the line {line[:40]!a}")
        key = match[1].strip().lower().replace(" ", "")
        if key in fields:
            raise FileError(f"it has {match[1]!a} twice, expected it once")
        fields[key] = match[3]
        if key == "datafile" and match[3].upper().startswith("LIST"):
            return fields, 0, lines[number:]
    if end is None and "datafile" not in fields:
        raise no_header(path)
    return fields, end.end() if end else 0, []


def _data_files(path: Path, name: str, listed: list[str]) -> tuple[Path, ...]:
    if name.upper() == "LOCAL":
        raise no_header(path, "data file LOCAL")
    if name.upper().startswith("LIST"):
        return tuple(beside(path, line.strip()) for line in listed if line.strip())
    return numbered(path, name) or (beside(path, name),)


def _sizes(path: Path, fields: dict[str, str]) -> list[int]:
    sizes = fields.get("sizes", "").split()
    if not sizes or not all(re.fullmatch(r"\d{1,18}", size) for size in sizes):
        raise no_header(path, f"sizes are {fields.get('sizes', 'missing')[:40]!a}")
    return [int(size) for size in sizes]


def _dimension(fields: dict[str, str]) -> int:
    return len(fields.get("sizes", "").split())


def _domain(fields: dict[str, str]) -> list[int]:
    """The spatial axes, along which voxels lie."""
    kinds = fields.get("kinds", "").lower().split()
    return [axis for axis in range(_dimension(fields)) if axis >= len(kinds) or kinds[axis] in DOMAIN]


def _check_spacing(fields: dict[str, str], domain: list[int]) -> None:
    """FileError without a spacing, because ITK would use 1 mm."""
    steps = re.findall(r"\([^)]*\)|[^\s()]+", fields.get("spacedirections", fields.get("spacings", "")))
    of_domain = [steps[axis] if axis < len(steps) else "nan" for axis in domain]
    numbers = [_numbers(step) for step in of_domain]
    if not steps or not all(len(n) > 0 and all(map(math.isfinite, n)) for n in numbers):
        given = f"the spacings {' '.join(steps)[:80]!a}" if steps else "no spacing (spacings or space directions)"
        raise FileError(f"it has {given}, expected positive numbers in mm")


def _numbers(step: str) -> list[float]:
    try:
        return [float(part) for part in step.strip("()").split(",")]
    except ValueError:
        return []


def _integer(path: Path, fields: dict[str, str], key: str) -> int:
    text = fields.get(key, "0")
    if not re.fullmatch(r"-?\d{1,15}", text):
        raise no_header(path, f"{key} is {text[:40]!a}")
    return int(text)


def _after_lines(path: Path, data: Path, lines: int) -> int:
    """The number of bytes of the first lines."""
    head = head_of(data)
    ends = [match.end() for match in re.finditer(rb"\n", head)]
    if len(ends) < lines:
        raise no_header(path, f"a line skip of {lines}")
    return ends[lines - 1]

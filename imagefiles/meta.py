"""The header of a MetaImage file (.mha, .mhd): lines ``Key = Value``, the last of them ElementDataFile."""

import math
import os
import re
from pathlib import Path

from imagefiles.stored import FileError, Stored, beside, head_of, no_header

SYNONYMS = (
    ("Offset", "Position", "Origin"),
    ("TransformMatrix", "Rotation", "Orientation"),
    ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"),
)
NUMBERS = {"DimSize": 1, "ElementSpacing": 1, "ElementSize": 1, **dict.fromkeys(SYNONYMS[0], 1)}
"""Keys with one number per axis; matrices have the square of this number."""


def stored(path: Path) -> Stored:
    """Where and how the voxels are stored. FileError for a header that is incomplete, has an entry twice, or names a
    file outside its folder."""
    head = head_of(path)
    entries, length, listed = _entries(path, head)
    _check_numbers(path, entries)
    files, start = _files(path, entries["ElementDataFile"], length, listed)
    if (header_size := _integer(path, entries, "HeaderSize", 0)) != 0:
        if start or header_size < -1:
            raise no_header(path, f"HeaderSize is {header_size}")
        start = header_size
    compressed = _true(entries, "CompressedData")
    if compressed and (len(files) > 1 or start < 0):
        raise no_header(path, "compressed voxels in parts")
    binary = _true(entries, "BinaryData", "True")
    return Stored(
        files,
        "compressed" if compressed else "raw" if binary else "text",
        _count(path, entries),
        start=0 if compressed else None if start < 0 else start,
        skipped=0 if binary and not compressed else max(start, 0),
        compressed_bytes=_integer(path, entries, "CompressedDataSize", 0) or None if compressed else None,
        big_endian=any(_true(entries, key) for key in SYNONYMS[2]),
    )


def _entries(path: Path, head: bytes) -> tuple[dict[str, str], int, list[str]]:
    """The values by key, the length of the header, and the lines after it."""
    last = re.search(rb"(?m)^[ \t]*ElementDataFile[ \t]*[=:][^\n]*(\n|\Z)", head)
    if last is None:
        raise no_header(path)
    entries: dict[str, str] = {}
    for line in os.fsdecode(head[: last.end()]).split("\n"):
        match = re.fullmatch(r"\s*(\w+)\s*[=:]\s*(.*?)\s*", line)
        if match is None and line.strip():
            raise no_header(path, f"the line {line[:40]!a}")
        if match and entries.setdefault(match[1], match[2]) != match[2]:
            raise FileError(f"it has {match[1]} twice, {entries[match[1]]!a} and {match[2]!a}, expected one of them")
    return entries, last.end(), os.fsdecode(head[last.end() :]).split("\n") if _is_list(entries) else []


def _is_list(entries: dict[str, str]) -> bool:
    return entries["ElementDataFile"].upper().split()[:1] == ["LIST"]


def _check_numbers(path: Path, entries: dict[str, str]) -> None:
    """FileError unless the numbers fit the number of axes, there is a spacing, and synonyms have equal values."""
    if not re.fullmatch("[1-9]", entries.get("NDims", "")):  # otherwise ITK would write beyond its arrays
        raise no_header(path, f"NDims is {entries.get('NDims', 'missing')[:20]!a}")
    axes = int(entries["NDims"])
    for key, value in entries.items():
        expected = axes * axes if key in SYNONYMS[1] else NUMBERS.get(key, 0) * axes
        if expected and (len(value.split()) != expected or not all(map(_is_number, value.split()))):
            raise no_header(path, f"{key} is {value[:60]!a}, not {expected} numbers")
    for keys in SYNONYMS:
        if len({entries[key] for key in keys if key in entries}) > 1:
            raise FileError(f"its {' and '.join(k for k in keys if k in entries)} contradict, expected one of them")
    if not {"ElementSpacing", "ElementSize"} & entries.keys():
        raise FileError("it has no spacing (ElementSpacing), expected one in mm")


def _count(path: Path, entries: dict[str, str]) -> int:
    """The number of values."""
    sizes = entries.get("DimSize", "").split()
    if not sizes or not all(re.fullmatch(r"\d{1,18}", size) for size in sizes):
        raise no_header(path, f"DimSize is {entries.get('DimSize', 'missing')[:40]!a}")
    return math.prod(map(int, sizes)) * _integer(path, entries, "ElementNumberOfChannels", 1)


def _files(path: Path, name: str, length: int, listed: list[str]) -> tuple[tuple[Path, ...], int]:
    """The files with the voxels, and the bytes before them."""
    if name.upper() == "LOCAL":
        return (path,), length
    if listed:
        return tuple(beside(path, line.strip()) for line in listed if line.strip()), 0
    return numbered(path, name) or (beside(path, name),), 0


def numbered(path: Path, name: str) -> tuple[Path, ...]:
    """The files of a pattern, as in ``slice%03d.raw 1 200 1``; none if it is not a pattern."""
    match = re.fullmatch(r"(\S*)%(0?\d?)d(\S*)\s+(\d{1,6})\s+(\d{1,6})(?:\s+(\d{1,6}))?", name)
    if match is None:
        return ()
    numbers = range(int(match[4]), int(match[5]) + 1, int(match[6] or 1) or 1)
    return tuple(beside(path, f"{match[1]}{n:{match[2]}d}{match[3]}") for n in numbers)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _integer(path: Path, entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise no_header(path, f"{key} is {text[:40]!a}")
    return int(text)


def _true(entries: dict[str, str], key: str, default: str = "False") -> bool:
    return entries.get(key, default)[:1] in ("T", "t", "1")

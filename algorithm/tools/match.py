"""``lungreg match``: matches the nodules of an earlier and a later scan.

The result maps nodules of the earlier scan into the later one. Each is matched with at most one nodule of the later
scan, within a radius. The matching has as many pairs as possible and, among these, the smallest sum of distances
(scipy's linear_sum_assignment). Unmatched nodules are new or gone.
"""

import csv
import datetime
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from ..errors import InputError
from ..files.pointfiles import point_ending, read_points
from ..files.writing import atomically
from ..results.points import check_new
from ..results.result import Result, Scan, read_result

KINDS = (".csv", ".fcsv", ".mrk.json")
SIZES = ("diameter_mm", "diameter")
VOLUMES = ("volume_mm3",)
NAMES = ("name", "label", "id")
DATES = ("date",)
COLUMNS = (
    "state", "prior", "now", "distance_mm", "expected_error_mm", "x", "y", "z", "prior_diameter_mm", "now_diameter_mm",
    "growth_mm", "days", "doubling_days", "in_lungs",
)  # fmt: skip

Points = Float[np.ndarray, "p 3"]


@dataclass(frozen=True)
class Matching:
    """Settings of the matching."""

    radius_mm: float = 10.0
    prior: Scan = "moving"
    """The scan of the registration that the earlier nodules belong to."""
    days: float | None = None
    """Days between the scans; None: taken from the dates in the files, if there are any."""
    ras: bool = False
    """Whether files that do not name their coordinate system are in RAS."""


@dataclass(frozen=True)
class Nodules:
    """The nodules of one scan. Where only diameters are given, volumes are those of spheres, and vice versa."""

    points_mm: Points
    names: list[str]
    diameters_mm: list[float | None]
    volumes_mm3: list[float | None]
    dates: list[datetime.date | None]


# --- the matching ----------------------------------------------------------------------------------------------------


def matched(
    prior_mm: Float[np.ndarray, "p 3"], now_mm: Float[np.ndarray, "n 3"], radius_mm: float
) -> list[tuple[int, int]]:
    """Pairs of rows of the two point lists, which are in one coordinate system: the largest number of pairs within the
    radius, with the smallest sum of distances."""
    if not len(prior_mm) or not len(now_mm):
        return []
    distances = np.linalg.norm(prior_mm[:, None] - now_mm[None], axis=2)
    # a pair beyond the radius costs more than all the others together can save
    far = (radius_mm + 1) * (min(distances.shape) + 1)
    rows, columns = linear_sum_assignment(np.where(distances <= radius_mm, distances, far))
    return [(i, j) for i, j in zip(rows.tolist(), columns.tolist(), strict=True) if distances[i, j] <= radius_mm]


def doubling_days(before: float | None, after: float | None, days: float | None) -> float | None:
    """Volume doubling time: days · ln 2 / ln(V_now / V_prior); negative for a shrinking nodule, None if the volume is
    equal or unknown (Schwartz 1961)."""
    if not before or not after or not days or before == after:
        return None
    return days * math.log(2) / math.log(after / before)


def sphere_mm3(diameter_mm: float) -> float:
    """The volume of a sphere."""
    return math.pi / 6 * diameter_mm**3


# --- files -----------------------------------------------------------------------------------------------------------


def match_files(folder: Path, prior: Path, now: Path, out: Path | None, how: Matching, overwrite: bool = False) -> str:
    """Write the table to ``out`` (.csv), or append it to the returned text without ``out``; returns a summary.

    InputError for mistakes that the user can correct.
    """
    if not how.radius_mm > 0:
        raise InputError(f"--radius is {how.radius_mm:g}, expected more than 0 mm")
    if how.days is not None and not how.days > 0:
        raise InputError(f"--days is {how.days:g}, expected more than 0: PRIOR is the earlier scan")
    if out is not None:
        check_new(out, overwrite, prior, now)
        if out.suffix.lower() != ".csv":
            raise InputError(f"{out}: is no name for the table, expected one that ends in .csv")
    before, after = (read_nodules(path, how.ras) for path in (prior, now))
    result = read_result(folder)
    rows = table(result, before, after, how)
    text = _as_csv(rows)
    if out is not None:
        with atomically(out) as stream:
            stream.write(text.encode())
    return _in_words(result, rows, how) + (f"\nTable: {out}" if out is not None else f"\n\n{text.rstrip()}")


def read_nodules(path: Path, ras: bool = False) -> Nodules:
    """The positions of nodules. Tables may have the columns diameter_mm or volume_mm3, name, label or id, and date
    (2025-01-31).

    InputError as in `read_points`, and for cells that cannot be read. An empty table with the right columns has no
    nodules.
    """
    if point_ending(path) not in KINDS:
        raise InputError(f"{path}: is no list of nodules, expected a name that ends in {', '.join(KINDS)}")
    if _is_empty_table(path):
        return Nodules(np.empty((0, 3)), [], [], [], [])
    points = read_points(path, ras).points_mm
    cells = _cells(path) if point_ending(path) == ".csv" else {}
    number = len(points)
    names = next((cells[key] for key in NAMES if key in cells), [""] * number)
    names = [name or str(row) for row, name in enumerate(names, start=1)]
    sizes = _numbers(path, next((cells[key] for key in SIZES if key in cells), [""] * number))
    volumes = _numbers(path, next((cells[key] for key in VOLUMES if key in cells), [""] * number))
    dates = _dates(path, next((cells[key] for key in DATES if key in cells), [""] * number))
    both = [
        (size or (volume and (6 * volume / math.pi) ** (1 / 3)), volume or (size and sphere_mm3(size)))
        for size, volume in zip(sizes, volumes, strict=True)
    ]
    return Nodules(points, names, [size for size, _ in both], [volume for _, volume in both], dates)


def _is_empty_table(path: Path) -> bool:
    """Whether the table has the right columns and no rows: a scan may have no nodules."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if point_ending(path) == ".csv" else []
    except (OSError, ValueError):  # `read_points` says what is wrong
        return False
    head = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    return {"x", "y", "z"} <= set(head) and not any(line.strip(", ") for line in lines[1:])


def _cells(path: Path) -> dict[str, list[str]]:
    """The cells of each column, by its name in lower case."""
    lines = [line for line in csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))) if any(line)]
    head = [name.strip().lower() for name in lines[0]]
    return {name: [(row + [""] * len(head))[n].strip() for row in lines[1:]] for n, name in enumerate(head)}


def _numbers(path: Path, cells: Sequence[str]) -> list[float | None]:
    try:
        values = [float(cell) if cell else None for cell in cells]
    except ValueError as error:
        raise InputError(f"{path}: has a size that is no number ({error}), expected mm or mm³") from error
    if any(value is not None and not 0 < value < math.inf for value in values):
        raise InputError(f"{path}: has a size that is not above 0, expected mm or mm³")
    return values


def _dates(path: Path, cells: Sequence[str]) -> list[datetime.date | None]:
    try:
        return [datetime.date.fromisoformat(cell) if cell else None for cell in cells]
    except ValueError as error:
        raise InputError(f"{path}: has a date that cannot be read ({error}), expected year-month-day") from error


# --- the table -------------------------------------------------------------------------------------------------------


def table(result: Result, before: Nodules, after: Nodules, how: Matching) -> list[dict[str, str]]:
    """One row per nodule: matched, new or gone. Positions are in the later scan, mm, LPS."""
    later: Scan = "fixed" if how.prior == "moving" else "moving"
    carried = result.mapped(before.points_mm, how.prior) if len(before.points_mm) else before.points_mm
    pairs = matched(carried, after.points_mm, how.radius_mm)
    ours, theirs = ({pair[n] for pair in pairs} for n in (0, 1))
    rows = [(i, j) for i, j in pairs]
    rows += [(i, -1) for i in range(len(before.names)) if i not in ours]
    rows += [(-1, j) for j in range(len(after.names)) if j not in theirs]
    places = np.array([after.points_mm[j] if j >= 0 else carried[i] for i, j in rows]).reshape(-1, 3)
    inside = result.in_lungs(places, later) if len(places) else None
    errors = _errors(result, places if later == "fixed" else _to_fixed(result, places))
    found = []
    for number, (i, j) in enumerate(rows):
        row = dict.fromkeys(COLUMNS, "")
        row["state"] = "new" if i < 0 else "gone" if j < 0 else "matched"
        row |= {axis: f"{value:.2f}" for axis, value in zip("xyz", places[number].tolist(), strict=True)}
        row["expected_error_mm"] = errors[number]
        row["in_lungs"] = "" if inside is None else "yes" if inside[number] else "no"
        found.append(row | _sizes(before, after, i, j, how.days))
        if i >= 0 and j >= 0:
            found[-1]["distance_mm"] = f"{np.linalg.norm(carried[i] - after.points_mm[j]):.2f}"
    return found


def _to_fixed(result: Result, places_mm: Points) -> Points:
    return result.to_fixed(places_mm) if len(places_mm) else places_mm


def _sizes(before: Nodules, after: Nodules, i: int, j: int, days: float | None) -> dict[str, str]:
    """Names, diameters and growth; the index -1 means that there is no nodule."""
    row = {"prior": before.names[i] if i >= 0 else "", "now": after.names[j] if j >= 0 else ""}
    old = before.diameters_mm[i] if i >= 0 else None
    new = after.diameters_mm[j] if j >= 0 else None
    row["prior_diameter_mm"], row["now_diameter_mm"] = ("" if of is None else f"{of:.2f}" for of in (old, new))
    if i < 0 or j < 0:
        return row
    first, last = before.dates[i], after.dates[j]
    if days is None and first is not None and last is not None:
        days = float((last - first).days)
        if days <= 0:
            raise InputError(f"nodule {before.names[i]} of PRIOR has the date {first}, expected one before {last}")
    row["days"] = "" if days is None else f"{days:g}"
    if old is not None and new is not None:
        row["growth_mm"] = f"{new - old:.2f}"
        doubling = doubling_days(before.volumes_mm3[i], after.volumes_mm3[j], days)
        row["doubling_days"] = "" if doubling is None else f"{doubling:.0f}"
    return row


def _errors(result: Result, fixed_mm: Points) -> list[str]:
    """The expected error at positions of the fixed scan, as text; empty where it is not known."""
    values = result.expected_error_at(fixed_mm) if len(fixed_mm) else None
    return [""] * len(fixed_mm) if values is None else [f"{value:.2f}" if value >= 0 else "" for value in values]


def _as_csv(rows: list[dict[str, str]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _in_words(result: Result, rows: list[dict[str, str]], how: Matching) -> str:
    later = "fixed" if how.prior == "moving" else "moving"
    count = {state: sum(row["state"] == state for row in rows) for state in ("matched", "new", "gone")}
    return (
        f"Earlier: the {how.prior} scan ({result.figures.get(how.prior, 'unnamed')}); later: the {later} scan "
        f"({result.figures.get(later, 'unnamed')}). Within {how.radius_mm:g} mm, {count['matched']} nodules are "
        f"matched, {count['new']} are new, {count['gone']} are gone."
    )

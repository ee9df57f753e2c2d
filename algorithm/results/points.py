"""``lungreg points``: maps points of one scan into the other."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from ..errors import InputError
from ..files.pointfiles import point_ending, read_points
from ..files.writing import atomically
from .result import Result, Scan, read_result


def map_points(folder: Path, source: Path, out: Path, of: Scan, ras: bool = False, overwrite: bool = False) -> str:
    """Map the points in the file ``source`` from the scan ``of`` into the other scan and write them; returns a sentence
    on what was done.

    InputError for mistakes that the user can correct; ``out`` has the same file type as ``source``.
    """
    check_new(out, overwrite, source)
    if point_ending(source) != point_ending(out):
        raise InputError(f"{out}: is of another kind than {source.name}, expected a name with the same ending")
    file = read_points(source, ras)
    result = read_result(folder)
    mapped = result.mapped(file.points_mm, of)
    notes = notes_of(result, file.points_mm, mapped, of)
    with atomically(out) as stream:
        stream.write(file.rewritten(mapped, notes))
    return in_words(result, file.points_mm, mapped, of)


def check_new(out: Path, overwrite: bool, *sources: Path) -> None:
    """InputError if a file would replace another one, or cannot be written."""
    if any(out.exists() and source.exists() and out.samefile(source) for source in sources):
        raise InputError(f"{out}: is what is read, expected another name for what is written")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out}: is there already, expected a new name, or --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: its folder is not there, expected one that is")


def notes_of(
    result: Result, points_mm: Float[np.ndarray, "p 3"], mapped_mm: Float[np.ndarray, "p 3"], of: Scan
) -> dict[str, list[str]]:
    """Notes on each point: whether it lies in the lungs of its own scan, the volume change along its way, and the
    expected error of its new position (mm; empty where it is not known)."""
    notes, fixed_mm = {}, points_mm if of == "fixed" else mapped_mm
    inside = result.in_lungs(points_mm, of)
    if inside is not None:
        notes["in_lungs"] = ["yes" if value else "no" for value in inside]
    jacobian = result.jacobian_at(fixed_mm)
    notes["jacobian"] = [f"{value:.4f}" for value in (jacobian if of == "fixed" else 1 / jacobian)]
    expected = result.expected_error_at(fixed_mm)
    if expected is not None:
        notes["expected_error_mm"] = [f"{value:.2f}" if value >= 0 else "" for value in expected]
    return notes


def in_words(result: Result, points_mm: Float[np.ndarray, "p 3"], mapped_mm: Float[np.ndarray, "p 3"], of: Scan) -> str:
    """A sentence on the direction in which the points were mapped, which users of such programs ask about most."""
    to = "moving" if of == "fixed" else "fixed"
    names = {scan: f"the {scan} scan ({result.figures.get(scan, 'unnamed')})" for scan in ("fixed", "moving")}
    distance = np.linalg.norm(mapped_mm - points_mm, axis=1)
    inside = result.in_lungs(points_mm, of)
    outside = "" if inside is None or inside.all() else f"; {int((~inside).sum())} of them lie outside the lungs"
    return (
        f"{len(points_mm)} points of {names[of]} were carried to their places in {names[to]}, on average by "
        f"{distance.mean():.1f} mm{outside}."
    )

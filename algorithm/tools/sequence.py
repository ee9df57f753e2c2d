"""``lungreg 4d``: registers the phases of a breathing cycle to one of them, the reference.

u_k is the displacement from the reference to phase k (0 for the reference itself); n is the number of phases.

    structures      drawn on the reference, mapped onto every phase; nearest voxel
    ITV             the union of a structure over all phases, in scanner coordinates
    motion          range (maximum - minimum) along each axis of the mean of x + u_k(x) over a structure
    mid-position    y(x) = x + Σ u_k(x) / n, the mean position of tissue; the image is the mean of all phases, each
                    sampled at x + u_k(x) (Wolthaus et al. 2008, Med Phys 35(9):3998)
"""

import csv
import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from imagefiles import ending

from ..api import Registrar, Registration
from ..errors import InputError
from ..files.dicom import holds_dicom
from ..files.folders import image_name
from ..files.images import Image, read_grid, read_image
from ..files.writing import atomically, write_image, write_image_slabs
from ..geometry import Grid, compose, invert, resample, slabs, warp, warp_image
from ..given import volume
from ..hounsfield import AIR_HU
from ..options import Device, Refine
from ..results.apply import read_any

COARSE_MM = 2.5
"""Minimum voxel size of the grid on which the mean position is computed."""
MOST_VOXELS = 1_000_000
"""Approximate maximum number of voxels of a structure that are followed."""
COLUMNS = ("label", "reference_ml", "itv_ml", "lr_mm", "ap_mm", "si_mm", "largest_mm")

Register = Callable[[Path, Path], Registration]
"""A function that returns the map from the first scan to the second."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Motion:
    """The motion of one structure, in mm along LPS."""

    label: int
    reference_ml: float
    itv_ml: float
    positions_mm: dict[int, Float[np.ndarray, " 3"]]
    """Mean position in each phase, minus the mean position in the reference."""

    @property
    def amplitude_mm(self) -> Float[np.ndarray, " 3"]:
        """Left–right, front–back, feet–head: largest minus smallest position."""
        amplitude: np.ndarray = np.ptp(np.stack([*self.positions_mm.values()]), axis=0)
        return amplitude

    @property
    def largest_mm(self) -> float:
        """The largest distance between two positions."""
        at = np.stack([*self.positions_mm.values()])
        return float(np.linalg.norm(at[:, None] - at[None], axis=2).max())


def find_phases(source: Path) -> dict[int, Path]:
    """Images, or folders of DICOM series, by the last number in their names; InputError if numbers are not unique."""
    if not source.is_dir():
        raise InputError(
            f"{source}: is no folder, expected one with an image, or a folder of DICOM files, for each phase"
        )
    found: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or not (ending(path) if path.is_file() else path.is_dir() and holds_dicom(path)):
            continue
        numbers = re.findall(r"\d+", image_name(path) if path.is_file() else path.name)
        if not numbers:
            raise InputError(f"{path}: has no number in its name, expected that of a phase, as in phase_50.mha")
        if (number := int(numbers[-1])) in found:
            raise InputError(f"{path}: has the number {number} as {found[number].name} has, expected each phase once")
        found[number] = path
    if len(found) < 2:
        raise InputError(f"{source}: has {len(found)} phases, expected two or more")
    return found


def follow(
    phases: dict[int, Path], reference: int, structures: Path | None, out: Path, register: Register
) -> tuple[list[Motion], str]:
    """Register the phases and write the results listed above into the new folder ``out``; returns the motion and a
    sentence.

    InputError for mistakes that the user can correct, before anything is registered.
    """
    if reference not in phases:
        raise InputError(f"--reference is {reference}, expected one of the phases {', '.join(map(str, phases))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already, expected a new folder, or an empty one")
    if structures is not None:
        _read_labels(structures)
    out.mkdir(parents=True, exist_ok=True)
    maps: dict[int, Registration | None] = {}
    for number, path in phases.items():
        log.info("phase %d ...", number)
        maps[number] = None if number == reference else register(phases[reference], path)
    motions = [] if structures is None else _followed(maps, structures, phases[reference], out)
    _write_mid_position(maps, phases, read_grid(phases[reference]), out / "mid_position.mha")
    with atomically(out / "motion.csv") as stream:
        stream.write(as_csv(motions).encode())
    return motions, f"{len(phases)} phases, phase {reference} is the reference: {out}"


def _read_labels(path: Path) -> tuple[Shaped[np.ndarray, "z y x"], Grid]:
    values, grid = read_any(path)
    if (values.dtype.kind == "f" and not (values == np.rint(values)).all()) or values.min() < 0 or values.max() > 255:
        raise InputError(f"{path}: is no label map, expected whole numbers from 0 to 255")
    if not values.any():
        raise InputError(f"{path}: has no voxel above 0, expected a structure")
    return values.astype(np.uint8), grid


# --- structures ------------------------------------------------------------------------------------------------------


def _followed(maps: dict[int, Registration | None], structures: Path, reference: Path, out: Path) -> list[Motion]:
    """Write the structures on every phase and the ITV, on the grid of the reference scan."""
    labels, grid = _read_labels(structures)
    scan = read_grid(reference)
    found = [int(label) for label in np.unique(labels) if label]
    union = {label: np.zeros(scan.shape, bool) for label in found}
    positions: dict[int, dict[int, np.ndarray]] = {label: {} for label in found}
    points = {label: _places(labels == label, grid) for label in found}
    for number, of in maps.items():
        on_phase = _resampled(labels, grid, scan)
        if of is not None:
            on_phase = volume(of.warp_labels(structures, "moving", reference), "structures")[0].astype(np.uint8)
        _write(out / f"structures_{number:02d}.mha", on_phase, scan)
        for label in found:
            union[label] |= on_phase == label
            moved = points[label] if of is None else of.to_moving(points[label])
            positions[label][number] = (moved - points[label]).mean(axis=0)
    itv = np.zeros(scan.shape, np.uint8)
    for label in reversed(found):  # where labels overlap, the smaller one wins
        itv[union[label]] = label
    _write(out / "itv.mha", itv, scan)
    voxel_ml, scan_ml = (float(np.prod(of.spacing)) / 1000 for of in (grid, scan))
    return [
        Motion(label, voxel_ml * int((labels == label).sum()), scan_ml * int(union[label].sum()), positions[label])
        for label in found
    ]


def _resampled(labels: Shaped[np.ndarray, "z y x"], source: Grid, target: Grid) -> UInt8[np.ndarray, "z y x"]:
    """The labels on another grid, by the nearest voxel."""
    values = torch.from_numpy(labels.astype(np.float32))[None, None]
    found: np.ndarray = warp(values, source, None, target, fill=0.0, nearest=True)[0, 0].byte().numpy()
    return found


def _places(mask: Shaped[np.ndarray, "z y x"], grid: Grid) -> Float[np.ndarray, "p 3"]:
    index = np.argwhere(mask)[:, ::-1]
    return grid.to_world(index[:: max(1, len(index) // MOST_VOXELS)])


def _write(path: Path, values: Shaped[np.ndarray, "z y x"], grid: Grid) -> None:
    write_image(path, torch.from_numpy(values)[None, None], grid)


def as_csv(motions: list[Motion]) -> str:
    """CSV text: one line per structure, then its position in each phase."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    numbers = [*motions[0].positions_mm] if motions else []
    writer.writerow([*COLUMNS, *(f"{axis}_{number:02d}_mm" for number in numbers for axis in "xyz")])
    for motion in motions:
        cells = [motion.reference_ml, motion.itv_ml, *motion.amplitude_mm, motion.largest_mm]
        cells += [value for number in numbers for value in motion.positions_mm[number]]
        writer.writerow([motion.label, *(f"{value:.3f}" for value in cells)])
    return out.getvalue()


# --- the mid-position image ------------------------------------------------------------------------------------------


@torch.no_grad()
def _write_mid_position(maps: dict[int, Registration | None], phases: dict[int, Path], scan: Grid, path: Path) -> None:
    """Write the mean of all phases, each warped to the mean position of tissue, on the grid of the reference."""
    x, y, z = (
        max(2, round(extent / max(COARSE_MM, s))) for extent, s in zip(scan.extent_mm, scan.spacing, strict=True)
    )
    coarse = scan.resized((min(x, scan.size[0]), min(y, scan.size[1]), min(z, scan.size[2])))
    still = torch.zeros(1, 3, *coarse.shape)
    fields = {number: still if of is None else of.displacement(coarse) for number, of in maps.items()}
    back = invert(mean_displacement([*fields.values()]), coarse, coarse)
    total = torch.zeros(1, 1, *scan.shape)
    for number, field in fields.items():
        whole = compose(back, coarse, field, coarse)
        z = 0
        for slab, values in _looked_up(read_image(phases[number]), whole, coarse, scan):
            total[:, :, z : z + slab.shape[0]] += values / len(fields)
            z += slab.shape[0]
    mean = total.round().clamp(-32768, 32767).short()
    write_image_slabs(path, scan, [mean], torch.int16)


def mean_displacement(fields: list[Float[Tensor, "1 3 z y x"]]) -> Float[Tensor, "1 3 z y x"]:
    """The displacement from the reference to the mean position of tissue; the reference counts as one phase."""
    total: Tensor = torch.cat(fields).mean(dim=0, keepdim=True)
    return total


def _looked_up(
    image: Image, field: Float[Tensor, "1 3 zc yc xc"], coarse: Grid, scan: Grid
) -> Iterator[tuple[Grid, Float[Tensor, "1 1 z y x"]]]:
    for slab in slabs(scan):
        yield slab, warp_image(image.voxels, image.grid, resample(field, coarse, slab), slab, fill=AIR_HU)


# --- the command -----------------------------------------------------------------------------------------------------


def follow_and_say(
    source: Path, reference: int, structures: Path | None, out: Path, refine: Refine, device: Device
) -> str:
    """`follow` with the bundled weights; returns the results as text."""
    phases = find_phases(source)
    registrar: list[Registrar] = []  # the model is loaded only when it is needed

    def register(fixed: Path, moving: Path) -> Registration:
        if not registrar:
            registrar.append(Registrar(device=device))
        found = registrar[0].register(fixed, moving, refine)
        for sentence in found.quality["warnings"]:
            log.warning("%s: %s", moving.name, sentence)
        return found

    motions, said = follow(phases, reference, structures, out, register)
    lines = [
        f"Structure {motion.label}: {motion.reference_ml:.1f} ml, ITV {motion.itv_ml:.1f} ml; motion (mm) left–right "
        "{:.1f}, front–back {:.1f}, feet–head {:.1f}.".format(*motion.amplitude_mm)
        for motion in motions
    ]
    return "\n".join([*lines, said])

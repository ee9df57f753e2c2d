"""The data of every voxel of the fixed lungs, and which of the two scans is the inspiration.

Voxels are those of the fixed scan. The moving scan is sampled at the mapped position, at the nearest voxel.
Interpolation would smooth only one of the scans and so shift densities at vessels and at the edge of the lungs. Before
that, the median filter is applied to each scan on its own grid. So the measures do not depend on which scan is fixed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int16
from torch import Tensor

from ..errors import InputError
from ..fields.expected_error import NOT_KNOWN_MM
from ..fields.transform import Transform
from ..files.images import Image
from ..geometry import Grid, Size, resample, slabs, validity, warp
from ..hounsfield import AIR_HU
from ..lungs import LungMask
from ..preparation.subject import Subject
from ..results.result import Scan
from .deformation import deformation
from .median import median
from .regions import Labels, Regions
from .settings import ALIKE, RATHER_ALIKE, TIDAL, FunctionSettings

MARGIN_VOX = 2

ErrorAt = Callable[[Grid], Float[np.ndarray, "z y x"]]
"""The expected error (mm) on a grid in fixed world coordinates; `NOT_KNOWN_MM` where it is not known."""


@dataclass(frozen=True)
class Case:
    """The input of the measurement: both scans in HU with their lungs, the map, and its expected error."""

    fixed: Subject
    moving: Subject
    transform: Transform
    fixed_regions: Regions
    moving_regions: Regions
    error: ErrorAt | None = None


@dataclass(frozen=True)
class Voxels:
    """The voxels of the fixed lungs, in the order of the true entries of ``where``."""

    grid: Grid
    """The box around the fixed lungs, in voxels of the fixed scan."""
    where: Bool[np.ndarray, "z y x"]
    labels: Labels
    inspiration: Scan
    expansion: Float32[np.ndarray, " n"]
    """Volume at inspiration over that at expiration."""
    stretches: Float32[np.ndarray, "n 3"]
    """Principal stretches from expiration to inspiration, smallest first."""
    expiration_ml: Float32[np.ndarray, " n"]
    """The volume at expiration. It is the weight in means and sums, whichever scan is fixed."""
    inspiration_hu: Float32[np.ndarray, " n"]
    """HU at inspiration, after the median filter."""
    expiration_hu: Float32[np.ndarray, " n"]
    seen: Bool[np.ndarray, " n"]
    """Whether the voxel's mapped position lies inside the moving scan."""
    error_mm: Float32[np.ndarray, " n"]
    """Expected error; `NOT_KNOWN_MM` where it is not known."""

    def certain(self, most_error_mm: float) -> Bool[np.ndarray, " n"]:
        """Whether both scans show the voxel and its expected error is not larger. At the pleura, where the error is not
        known, a voxel counts as certain."""
        fine: np.ndarray = self.seen & (self.error_mm <= most_error_mm)
        return fine


def which_is_inspiration(
    fixed_litres: float, moving_litres: float, settings: FunctionSettings
) -> tuple[Scan, list[str]]:
    """The scan with the larger lungs, unless the settings name one; and warnings. InputError if the volumes are too
    similar."""
    larger: Scan = "fixed" if fixed_litres > moving_litres else "moving"
    factor = max(fixed_litres, moving_litres) / min(fixed_litres, moving_litres)
    volumes = f"{fixed_litres:.2f} l in the fixed scan, {moving_litres:.2f} l in the moving one"
    if settings.inspiration is None and factor < ALIKE:
        raise InputError(
            f"the lungs are too alike to tell which scan is the inspiration ({volumes}), expected volumes that differ "
            f"by {ALIKE - 1:.0%} or more, or --inspiration fixed or moving"
        )
    said = []
    if settings.inspiration not in (None, larger):
        said.append(f"The {settings.inspiration} scan is taken for the inspiration, though its lungs are smaller.")
    if settings.inspiration is None and factor < RATHER_ALIKE:
        said.append(f"The volumes of the lungs differ little ({volumes}): is the {larger} scan the inspiration?")
    if factor < TIDAL:
        said.append(
            f"The larger lungs have {factor:.2f} times the volume of the smaller ones: hardly full inspiration and "
            "expiration, which the thresholds of the parametric response map and of air trapping are made for."
        )
    return settings.inspiration or larger, said


@torch.no_grad()
def voxels_of(case: Case, inspiration: Scan, settings: FunctionSettings) -> Voxels:
    """Sample everything, slab by slab; InputError if no voxel of the fixed scan lies in its lungs."""
    fixed, moving, transform = case.fixed.image, case.moving.image, case.transform
    box = _box(fixed.grid, _corners(case.fixed.lungs))
    shape, shape_grid = deformation(transform, case.fixed.lungs)
    near = _box(moving.grid, _mapped(case))
    fixed_hu, moving_hu = (_filtered(*of, settings.filter_voxels) for of in ((fixed, box), (moving, near)))
    where, labels, rows = np.zeros(box.shape, bool), [], []
    for z, slab in _numbered(box):
        inside, of = case.fixed_regions.at(slab)
        where[z : z + slab.shape[0]] = inside
        if not inside.any():
            continue
        field = transform.field(slab)
        seen = validity(field, slab, moving.grid)[0, 0].numpy()
        error = case.error(slab) if case.error else np.full(slab.shape, NOT_KNOWN_MM)
        parts = [
            *resample(shape, shape_grid, slab)[0].numpy(),
            fixed_hu[0, 0, z : z + slab.shape[0]].numpy(),
            warp(moving_hu, near, field, slab, fill=AIR_HU, nearest=True)[0, 0].numpy(),
            seen,
            error,
        ]
        rows.append(np.stack([part[inside].astype(np.float32) for part in parts]))
        labels.append(of)
    if not rows:
        raise InputError(f"{fixed.path}: no voxel of it lies in its lungs, expected a scan with its own lungs")
    return _in_roles(np.concatenate(rows, axis=1), box, where, _joined(labels), inspiration)


def _in_roles(
    rows: Float32[np.ndarray, "8 n"], box: Grid, where: Bool[np.ndarray, "z y x"], labels: Labels, inspiration: Scan
) -> Voxels:
    """Assign the values of fixed and moving scan to inspiration and expiration."""
    jacobian, stretches, fixed, moving, seen, error_mm = rows[0], rows[1:4].T, *rows[4:8]
    voxel_ml = np.float32(np.prod(box.spacing) / 1000)
    if inspiration == "fixed":
        expiration_ml, expansion, stretches = voxel_ml * jacobian, 1 / jacobian, 1 / stretches[:, ::-1]
        hu_in, hu_ex = fixed, moving
    else:
        expiration_ml, expansion = np.full_like(jacobian, voxel_ml), jacobian
        hu_in, hu_ex = moving, fixed
    return Voxels(
        box, where, labels, inspiration, expansion, np.ascontiguousarray(stretches), expiration_ml,
        hu_in, hu_ex, seen > 0.5, error_mm,
    )  # fmt: skip


def lung_values(
    subject: Subject, regions: Regions
) -> tuple[Int16[np.ndarray, " n"] | Float32[np.ndarray, " n"], Labels]:
    """The values of one scan as it was read, at the voxels in its own lungs, and the labels of these voxels."""
    image, values, labels = subject.image, [], []
    for z, slab in _numbered(image.grid):
        inside, of = regions.at(slab)
        if inside.any():
            values.append(image.voxels[0, 0, z : z + slab.shape[0]].numpy()[inside])
            labels.append(of)
    if not values:
        raise InputError(f"{image.path}: no voxel of it lies in its lungs, expected a scan with its own lungs")
    return np.concatenate(values), _joined(labels)


def _numbered(grid: Grid) -> list[tuple[int, Grid]]:
    """The slabs of a grid, each with the z index at which it starts."""
    found, z = [], 0
    for slab in slabs(grid):
        found.append((z, slab))
        z += slab.shape[0]
    return found


def _joined(labels: list[Labels]) -> Labels:
    sides = np.concatenate([one.sides for one in labels])
    lobes = [one.lobes for one in labels if one.lobes is not None]
    return Labels(sides, np.concatenate(lobes) if lobes else None)


def _filtered(image: Image, part: Grid, edge: int) -> Float32[Tensor, "1 1 z y x"]:
    """A part of an image in single precision, after the median over ``edge``³ voxels; border values are repeated
    outside."""
    x, y, z = np.rint(image.grid.to_index(np.array(part.origin))).astype(int).tolist()
    nx, ny, nz = part.size
    voxels = image.voxels[0, 0, z : z + nz, y : y + ny, x : x + nx].numpy()
    return torch.from_numpy(median(voxels, edge).astype(np.float32))[None, None]


def _corners(lungs: LungMask) -> Float[np.ndarray, "p 3"]:
    """The corners of the boxes around the voxels of a lung mask (lowest and highest), in world coordinates."""
    centres = lungs.grid.to_world(lungs.mask[0, 0].nonzero().numpy()[:, ::-1])
    half = np.abs(lungs.grid.axes).sum(axis=1) / 2
    return np.concatenate([centres - half, centres + half])


def _mapped(case: Case) -> Float[np.ndarray, "p 3"]:
    """Approximate positions of the fixed lungs in the moving scan, from the field at the voxels of their mask."""
    grid = case.fixed.lungs.grid
    places = _corners(case.fixed.lungs)
    low, high = grid.to_index(places).min(axis=0), grid.to_index(places).max(axis=0)
    (x, y, z), (x1, y1, z1) = (np.floor(low).astype(int).tolist(), np.ceil(high).astype(int).tolist())
    part = grid.cropped((x, y, z), (x1 - x + 1, y1 - y + 1, z1 - z + 1))
    field = case.transform.field(part)[0].flatten(1).T.double().numpy()
    index = np.stack(np.meshgrid(*(np.arange(n) for n in part.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    there: np.ndarray = part.to_world(index[:, ::-1]) + field
    return there


def _box(grid: Grid, places_mm: Float[np.ndarray, "p 3"]) -> Grid:
    """The voxels of a scan in the box around some positions with a margin, within the extent of the scan."""
    index, last = grid.to_index(places_mm), np.array(grid.size) - 1
    low = np.clip(np.floor(index.min(axis=0)).astype(int) - MARGIN_VOX, 0, last)
    high = np.clip(np.ceil(index.max(axis=0)).astype(int) + MARGIN_VOX, 0, last)
    (x, y, z), (nx, ny, nz) = low.tolist(), (high - low + 1).tolist()
    start: Size = (x, y, z)
    return grid.cropped(start, (nx, ny, nz))

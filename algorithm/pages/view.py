"""The data shown of a registration: slices and a small volume, sampled from the scans and the field.

Arrays are (z, y, x) on a `Grid` whose axes lie near LPS: x to the patient's left, y to the back, z to the head.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..fields.expected_error import MOST_MM, ExpectedError
from ..fields.transform import Transform
from ..files.images import Image
from ..geometry import (
    Affine,
    Grid,
    Size,
    jacobian_determinant,
    needed_part,
    resample,
    resample_image,
    warp_image,
    with_affine,
)
from ..hounsfield import AIR_HU
from ..lungs import LungMask
from ..preparation.subject import Subject

MARGIN_MM = 18.0
"""Margin around the fixed lungs; it shows the chest wall."""
MOVING_MARGIN_MM = 60.0
"""Margin around the moving lungs; the small volume samples nothing outside."""
MOST_PIXELS = 360
"""Maximum number of pixels along the longer side of a slice."""
LEAST_PIXEL_MM = 0.9
MOST_VOXELS = 750_000
"""Maximum number of voxels of the small volume."""
LEAST_VOXEL_MM = 2.0
FAR_MM = 60.0
"""If the centres of the lungs are farther apart, the scans are not compared at their given positions: the table or the
patient was at another position."""

Plane = Literal["coronal", "sagittal", "axial"]
AXIS: dict[Plane, int] = {"coronal": 1, "sagittal": 0, "axial": 2}
"""The axis (x, y, z) that a plane is perpendicular to."""


@dataclass(frozen=True)
class View:
    """A registration on one grid in fixed world coordinates."""

    grid: Grid
    fixed_hu: Float[np.ndarray, "z y x"]
    before_hu: Float[np.ndarray, "z y x"]
    """The moving scan before the registration."""
    warped_hu: Float[np.ndarray, "z y x"]
    """The moving scan after it."""
    lungs: Bool[np.ndarray, "z y x"]
    """The lungs of the fixed scan."""
    displacement_mm: Float[np.ndarray, "3 z y x"]
    """The displacement from a point of the fixed scan to its position in the moving one; components x, y, z along the
    axes of ``grid``."""
    determinant: Float[np.ndarray, "z y x"]
    """The ratio of the volume in the moving scan to that in the fixed one."""
    expected_mm: Float[np.ndarray, "z y x"] | None = None

    @property
    def motion_mm(self) -> Float[np.ndarray, "z y x"]:
        """The length of the displacement."""
        lengths: np.ndarray = np.linalg.norm(self.displacement_mm, axis=0)
        return lengths


@dataclass(frozen=True)
class Pair:
    """All data of a registration that the page shows."""

    fixed: Subject
    moving: Subject
    transform: Transform
    expected: ExpectedError | None = None

    @property
    def before(self) -> Affine:
        """The map that places the moving scan before the registration: the identity, or the pre-alignment if the scans
        lie far apart."""
        return self.transform.affine if self.far else Affine()

    @property
    def far(self) -> bool:
        """Whether the two scans lie far apart."""
        centres = [_centre(subject.lungs) for subject in (self.fixed, self.moving)]
        return bool(np.linalg.norm(centres[0] - centres[1]) > FAR_MM)


def _centre(lungs: LungMask) -> np.ndarray:
    z, y, x = np.nonzero(lungs.mask[0, 0].numpy())
    return lungs.grid.to_world(np.array([x.mean(), y.mean(), z.mean()]))


def around(lungs: LungMask, margin_mm: float) -> Grid:
    """The box around the lungs with a margin, as a part of their grid."""
    index = lungs.mask[0, 0].nonzero().numpy()[:, ::-1]
    margin = np.ceil(margin_mm / np.array(lungs.grid.spacing)).astype(int)
    low, high = index.min(axis=0) - margin, index.max(axis=0) + margin
    (x, y, z), (nx, ny, nz) = (tuple(int(v) for v in of) for of in (low, high - low + 1))
    return lungs.grid.cropped((x, y, z), (nx, ny, nz))


@torch.no_grad()
def slice_view(pair: Pair, plane: Plane) -> View:
    """Three layers around the slice with the largest area of the fixed lungs; `flat` takes the middle layer.

    The pixels are square, not smaller than `LEAST_PIXEL_MM` and no more than `MOST_PIXELS` of them along a side.
    """
    box, axis = around(pair.fixed.lungs, MARGIN_MM), AXIS[plane]
    lungs = resample(pair.fixed.lungs.mask.float(), pair.fixed.lungs.grid, box, fill=0.0)[0, 0] > 0.5
    others = tuple(d for d in range(3) if d != 2 - axis)
    number = int(lungs.sum(dim=others).argmax())
    extents = [box.extent_mm[a] for a in range(3) if a != axis]
    pixel = max(LEAST_PIXEL_MM, max(extents) / MOST_PIXELS)
    start, size = [0, 0, 0], list(box.size)
    start[axis], size[axis] = number - 1, 3
    thin = box.cropped((start[0], start[1], start[2]), (size[0], size[1], size[2]))
    x, y, z = (3 if a == axis else max(8, round(thin.extent_mm[a] / pixel)) for a in range(3))
    return seen(pair, thin.resized((x, y, z)), pair.fixed.image, pair.moving.image)


@torch.no_grad()
def volume_view(pair: Pair) -> View:
    """The box around the fixed lungs in voxels of at least `LEAST_VOXEL_MM`, at most `MOST_VOXELS` of them."""
    box = around(pair.fixed.lungs, MARGIN_MM)
    voxel = max(LEAST_VOXEL_MM, float(np.prod(box.extent_mm) / MOST_VOXELS) ** (1 / 3))
    grid = _with_voxels(box, voxel)
    moving_grid = _with_voxels(around(pair.moving.lungs, MOVING_MARGIN_MM), voxel)
    return seen(pair, grid, _reduced(pair.fixed.image, grid), _reduced(pair.moving.image, moving_grid))


def _with_voxels(box: Grid, voxel_mm: float) -> Grid:
    x, y, z = (max(8, round(extent / voxel_mm)) for extent in box.extent_mm)
    return box.resized((x, y, z))


def _reduced(image: Image, grid: Grid) -> Image:
    """An image on a coarser grid. If a grid step covers more than two voxels, only some of them are read."""
    strides = [max(1, int(step // 2)) for step in np.array(grid.spacing) / np.array(image.grid.spacing)]
    image = _every(image, (strides[0], strides[1], strides[2]))
    voxels = resample_image(image.voxels, image.grid, grid, least=AIR_HU, fill=AIR_HU)
    return replace(image, voxels=voxels, grid=grid)


def _every(image: Image, strides: Size) -> Image:
    """Every n-th voxel along x, y and z, starting with the first one."""
    x, y, z = strides
    voxels = image.voxels[..., ::z, ::y, ::x]
    sx, sy, sz = (step * spacing for step, spacing in zip(strides, image.grid.spacing, strict=True))
    nz, ny, nx = voxels.shape[2:]
    return replace(image, voxels=voxels, grid=replace(image.grid, size=(nx, ny, nz), spacing=(sx, sy, sz)))


def seen(pair: Pair, grid: Grid, fixed: Image, moving: Image) -> View:
    """The registration on ``grid``, sampled from the two scans, original or reduced; at least two voxels along each
    axis."""
    still = torch.zeros(1, 3, *grid.shape)
    field = _near(pair.transform, grid).field(grid)
    expected = None
    if pair.expected is not None:
        expected = pair.expected.at(grid, elsewhere=MOST_MM, least=0.05)[0, 0].numpy()  # outside: the worst colour
    along_axes = torch.einsum("ji,jzyx->izyx", torch.tensor(grid.direction, dtype=field.dtype), field[0])
    return View(
        grid,
        _sampled(fixed, still, grid),
        _sampled(moving, with_affine(still.clone(), grid, pair.before), grid),
        _sampled(moving, field, grid),
        (resample(pair.fixed.lungs.mask.float(), pair.fixed.lungs.grid, grid, fill=0.0)[0, 0] > 0.5).numpy(),
        along_axes.numpy(),
        jacobian_determinant(field, grid)[0].numpy(),
        expected,
    )


def _near(transform: Transform, grid: Grid) -> Transform:
    """The part of a transform around ``grid``: a slice needs much less of it to be interpolated."""
    (x, y, z), (nx, ny, nz) = start, size = needed_part(transform.grid, grid, Affine())
    part = transform.displacement[..., z : z + nz, y : y + ny, x : x + nx]
    return Transform(part, transform.grid.cropped(start, size), transform.affine)


def _sampled(image: Image, displacement: Float[Tensor, "1 3 z y x"], grid: Grid) -> Float[np.ndarray, "z y x"]:
    values: np.ndarray = warp_image(image.voxels, image.grid, displacement, grid, fill=AIR_HU)[0, 0].float().numpy()
    return values


def fullest(view: View) -> list[float]:
    """The position along x, y and z with most lung, as a share of the extent of the grid: 0.5 is the middle."""
    counts = [view.lungs.sum(axis=tuple(d for d in range(3) if d != 2 - axis)) for axis in range(3)]
    return [(int(of.argmax()) + 0.5) / len(of) for of in counts]


def flat(values: np.ndarray, plane: Plane) -> np.ndarray:
    """The middle layer of an array (z, y, x), or of an array with one more leading axis, as a picture.

    The head is at the top and the patient's right on the left. The front is on the left in sagittal pictures and at the
    top in axial ones.
    """
    axis = 2 - AXIS[plane] - 3
    layer = np.take(values, values.shape[axis] // 2, axis=axis)
    return layer if plane == "axial" else np.flip(layer, axis=-2)

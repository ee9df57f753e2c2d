"""A phantom pair from its settings: two images and the exact motion between them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from algorithm.errors import InputError
from algorithm.geometry import IDENTITY, Affine, Grid, Matrix, Size, Vector, jacobian_determinant, linear_index_map
from phantom import shapes, tissue
from phantom.motion import Breathing
from phantom.shapes import Lungs, Points

CHEST_MM: Vector = (302.4, 237.6, 280.8)
"""Box around the chest: 112 × 88 × 104 voxels of 2.7 mm."""
POINTS_AT_ONCE = 2**17


def chest_grid(size: Size = (112, 88, 104), direction: Matrix = IDENTITY, centre_mm: Vector = (0.0, 0.0, 0.0)) -> Grid:
    """``size`` voxels along the index axes over the chest box around ``centre_mm``.

    The box is rotated by ``direction``, so only flips and small rotations keep the whole chest in view. InputError for
    fewer than two voxels along an axis.
    """
    if min(size) < 2:
        raise InputError(f"a phantom of {size} voxels was asked for, at least 2 along each axis were expected")
    x, y, z = (length / n for length, n in zip(CHEST_MM, size, strict=True))
    grid = Grid(size, (x, y, z), direction=direction)
    ox, oy, oz = np.array(centre_mm) - grid.to_world((np.array(size) - 1) / 2)
    return replace(grid, origin=(float(ox), float(oy), float(oz)))


@dataclass(frozen=True)
class PhantomSettings:
    """Settings of chest, motion and images. Everything random depends on the seed only."""

    seed: int = 0
    fixed_grid: Grid = chest_grid()  # noqa: RUF009  (immutable)
    """Any grid. The chest lies in the middle of the world. A smaller grid (``Grid.cropped``) cuts the lungs."""
    moving_grid: Grid | None = None
    """None: the fixed grid, moved by ``moving_pose``."""
    moving_pose: Affine = Affine()  # noqa: RUF009  (immutable)
    """Rigid map from the fixed to the moving world, applied after breathing: another position of table or body."""
    fixed_phase: Literal["inhale", "exhale"] = "inhale"
    diaphragm_mm: float = 25.0
    """Rise of the lung base at the back from inhale to exhale; the apex does not move."""
    chest_ap_mm: float = 6.0
    """Backward motion of the front chest wall from inhale to exhale."""
    chest_lateral_mm: float = 3.0
    """Inward motion of each side from inhale to exhale."""
    ribs_mm: float = 3.0
    """Downward motion of the ribs at the front from inhale to exhale."""
    detail_mm: float = 2.0
    """Root mean square of the irregular smooth motion inside the chest."""
    inhale_hu: float = -870.0
    """Mean of the parenchyma at inhale. The mean at exhale follows from conservation of mass."""
    noise_hu: float = 20.0
    """Standard deviation of white noise, independent in the two images."""
    landmarks: int = 300
    """Maximum number of landmarks: vessel bifurcations inside both images."""
    lungs: Lungs = "both"
    """With one lung, soft tissue fills the other side."""
    opacity_mm: float = 0.0
    """Depth of an opacity in the lower back of the right lung (of the only lung). It has lobes and landmarks, too."""
    table: bool = True
    """A table top under the back that does not move."""
    outside_hu: float | None = None
    """Padding outside the scanner's circular field of view, for example -1000, -2048 or -3024; None: no padding."""


@dataclass(frozen=True)
class PhantomPair:
    """Two images (HU) and the truth about them; ``x_moving = x_fixed + u(x_fixed)`` in mm, LPS.

    The field is exact at every voxel centre. It jumps at the wall of the chest cavity (sliding). So interpolated values
    and central differences across the wall are not the motion of any point. Outside the chest of both images, the field
    continues that of the chest wall. Lobes: 1 left upper, 2 left lower, 3 right upper, 4 right middle, 5 right lower.
    Lung masks are lobes > 0, with airways and vessels.
    """

    fixed: Float[Tensor, "1 1 z y x"]
    moving: Float[Tensor, "1 1 zm ym xm"]
    fixed_grid: Grid
    moving_grid: Grid
    displacement_mm: Float[Tensor, "1 3 z y x"]
    fixed_lobes: UInt8[Tensor, "1 1 z y x"]
    moving_lobes: UInt8[Tensor, "1 1 zm ym xm"]
    fixed_landmarks_mm: Float[np.ndarray, "n 3"]
    moving_landmarks_mm: Float[np.ndarray, "n 3"]


@dataclass(frozen=True)
class _View:
    """One phase of breathing on one grid: the image, its lobes, and the position of each voxel in the other phase."""

    hu: Float[Tensor, "1 1 z y x"]
    lobes: UInt8[Tensor, "1 1 z y x"]
    other_mm: Float[Tensor, "n 3"]


def make_pair(settings: PhantomSettings = PhantomSettings()) -> PhantomPair:
    """The pair of these settings. InputError if the motion folds, the pose is not rigid or a number is negative."""
    _check(settings)
    pose = settings.moving_pose
    fixed_grid = settings.fixed_grid
    moving_grid = settings.moving_grid or _posed(fixed_grid, pose)
    moving_in_chest = _posed(moving_grid, pose.inverse())
    breathing = Breathing(
        settings.diaphragm_mm,
        settings.chest_ap_mm,
        settings.chest_lateral_mm,
        settings.ribs_mm,
        settings.detail_mm,
        settings.seed,
    )
    _check_folding(breathing)
    voxel_mm = max(_voxel_mm(fixed_grid), _voxel_mm(moving_grid))
    anatomy = tissue.grow_anatomy(settings.seed, settings.lungs, settings.inhale_hu, settings.opacity_mm, voxel_mm)
    inhale_fixed = settings.fixed_phase == "inhale"
    fixed = _view(anatomy, breathing, fixed_grid, inhale_fixed, settings, 2)
    moving = _view(anatomy, breathing, moving_in_chest, not inhale_fixed, settings, 3)
    fixed_landmarks, moving_landmarks = _landmarks(anatomy, breathing, fixed_grid, moving_in_chest, settings)
    return PhantomPair(
        fixed=fixed.hu,
        moving=moving.hu,
        fixed_grid=fixed_grid,
        moving_grid=moving_grid,
        displacement_mm=_displacement(fixed, fixed_grid, pose),
        fixed_lobes=fixed.lobes,
        moving_lobes=moving.lobes,
        fixed_landmarks_mm=fixed_landmarks,
        moving_landmarks_mm=pose(moving_landmarks),
    )


def _check(settings: PhantomSettings) -> None:
    matrix = np.array(settings.moving_pose.matrix)
    if not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-6):
        raise InputError(f"moving_pose has the matrix {settings.moving_pose.matrix}, a rotation was expected")
    for name in ("seed", "landmarks", "noise_hu", "opacity_mm"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name} is {getattr(settings, name)}, 0 or more was expected")


def _check_folding(breathing: Breathing) -> None:
    """InputError if the motion folds. A folded map may still have inverses at every voxel, so test the determinant."""
    grid = chest_grid((50, 40, 47))
    points = _voxel_centres(grid)
    for name, motion in (("core", breathing.core), ("cage", breathing.cage)):
        lowest = jacobian_determinant(motion(points).T.reshape(1, 3, *grid.shape), grid).min().item()
        if lowest <= 0:
            raise InputError(
                f"the breathing motion folds the chest's {name} (determinant {lowest:.2g}, more than 0 expected): "
                "its amplitudes are too large"
            )


def _view(
    anatomy: tissue.Anatomy, breathing: Breathing, grid: Grid, inhale: bool, settings: PhantomSettings, stream: int
) -> _View:
    points = _voxel_centres(grid)
    core, cage = points, points
    density = torch.ones(len(points))
    if not inhale:
        core, cage = _in_parts(breathing.core_to_inhale, points), _in_parts(breathing.cage_to_inhale, points)
        moved = (core - points).T.reshape(1, 3, *grid.shape)
        density = jacobian_determinant(moved, grid).flatten()  # inhale volume per exhale volume
    voxel_mm = _voxel_mm(grid)
    parts = zip(*(t.split(POINTS_AT_ONCE) for t in (core, cage, density)), strict=True)
    hu = torch.cat([_tissue_hu(anatomy, a, b, c, voxel_mm) for a, b, c in parts])
    hu = _scanned(hu, points, grid, settings, stream)
    in_core = _in_parts(shapes.cavity_depth, core)[:, None] > 0
    return _View(
        hu=hu.reshape(1, 1, *grid.shape),
        lobes=_in_parts(lambda part: shapes.lobes(part, anatomy.lungs), core).reshape(1, 1, *grid.shape),
        other_mm=_in_parts(breathing.to_exhale, points) if inhale else torch.where(in_core, core, cage),
    )


def _tissue_hu(anatomy: tissue.Anatomy, core: Points, cage: Points, density: Tensor, voxel_mm: float) -> Tensor:
    """HU with the core over the cage: a gap from sliding at the pleura shows chest wall, an overlap shows the lung."""
    hu = anatomy.cage_hu(cage, voxel_mm)
    depth = shapes.cavity_depth(core)
    inner = depth > -voxel_mm
    core_hu = anatomy.core_hu(core[inner], density[inner], voxel_mm)
    hu[inner] = torch.lerp(hu[inner], core_hu, tissue.filled(depth[inner], voxel_mm))
    return hu


def _scanned(hu: Tensor, points: Points, grid: Grid, settings: PhantomSettings, stream: int) -> Tensor:
    """HU with table, noise and padding, which belong to the scan and do not move with the chest."""
    if settings.table:
        hu = torch.maximum(hu, tissue.table_hu(points, _voxel_mm(grid)))
    noise = np.random.default_rng((settings.seed, stream)).standard_normal(len(hu), dtype=np.float32)
    hu = hu + settings.noise_hu * torch.from_numpy(noise)
    if settings.outside_hu is None:
        return hu
    nx, ny, _ = grid.size
    x, y = (torch.arange(n) - (n - 1) / 2 for n in (nx, ny))
    x_mm, y_mm = x * grid.spacing[0], y * grid.spacing[1]
    radius_mm = max(grid.extent_mm[0], grid.extent_mm[1]) / 2
    outside = (x_mm**2 + y_mm[:, None] ** 2 > radius_mm**2).expand(grid.shape).flatten()
    return torch.where(outside, settings.outside_hu, hu)


def _displacement(fixed: _View, grid: Grid, pose: Affine) -> Tensor:
    """pose(other phase) - x. Computed in float64, because the moving world may be metres away."""
    parts = [
        (torch.from_numpy(pose(other.double().numpy())) - here.double()).float()
        for other, here in zip(
            fixed.other_mm.split(POINTS_AT_ONCE), _voxel_centres(grid).split(POINTS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(parts).T.reshape(1, 3, *grid.shape).contiguous()


def _landmarks(
    anatomy: tissue.Anatomy, breathing: Breathing, fixed_grid: Grid, moving_grid: Grid, settings: PhantomSettings
) -> tuple[np.ndarray, np.ndarray]:
    """At most ``settings.landmarks`` bifurcations well inside the lung and both images (chest coordinates)."""
    inhale = torch.from_numpy(anatomy.bifurcations)
    clear_mm = 2 * max(*fixed_grid.spacing, *moving_grid.spacing)
    inhale = inhale[shapes.lung_depth(inhale, settings.lungs) > clear_mm]
    exhale = breathing.to_exhale(inhale)
    fixed, moving = (inhale, exhale) if settings.fixed_phase == "inhale" else (exhale, inhale)
    kept = _well_inside(fixed.numpy(), fixed_grid) & _well_inside(moving.numpy(), moving_grid)
    chosen = np.random.default_rng((settings.seed, 4)).permutation(np.flatnonzero(kept))[: settings.landmarks]
    return fixed.numpy()[chosen], moving.numpy()[chosen]


def _well_inside(points: np.ndarray, grid: Grid) -> np.ndarray:
    index = grid.to_index(points)
    inside: np.ndarray = np.all((index >= 1) & (index <= np.array(grid.size) - 2), axis=-1)
    return inside


def _posed(grid: Grid, pose: Affine) -> Grid:
    """The grid moved by the rigid map."""
    x, y, z = pose(np.array(grid.origin))
    columns = Affine.from_arrays(np.array(pose.matrix) @ np.array(grid.direction), np.zeros(3)).matrix
    return replace(grid, origin=(float(x), float(y), float(z)), direction=columns)


def _voxel_mm(grid: Grid) -> float:
    """Edge of a cube with the volume of one voxel."""
    return float(np.prod(grid.spacing) ** (1 / 3))


def _voxel_centres(grid: Grid) -> Points:
    axes, origin = (torch.tensor(v, dtype=torch.float32) for v in (grid.axes, grid.origin))
    return linear_index_map(axes, origin, grid.shape).reshape(-1, 3)


def _in_parts(function: Callable[[Tensor], Tensor], points: Points) -> Tensor:
    """The function of all points, computed in parts, so that intermediate values stay in the cache."""
    return torch.cat([function(part) for part in points.split(POINTS_AT_ONCE)])

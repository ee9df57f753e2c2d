"""Positions of the keypoints in the moving image: discrete search, regularised on the graph of the keypoints.

    C_i(d)  ← mean over patch and channels of (MIND_F(p_i + q) - MIND_M(p_i + d + q))²        no unit, [0, 1]
    repeat: h_j(d)  ← min_e C̃_j(e) + w ‖d - e‖²
            C̃_i(d)  ← (C_i(d) + s · mean_{j ∈ N(i)} h_j(d)) / (1 + s)

over all offsets d of whole voxels up to a radius; N(i) are the nearest keypoints. h is the message of min-sum belief
propagation with a quadratic prior, computed along one axis after the other (Felzenszwalb and Huttenlocher 2006). Here
each point sends the same message to all neighbours, so loops may count evidence twice; the weight s < k limits this.
Then a parabola along each axis gives the fraction of a voxel. The same search goes from the found positions back to the
fixed image. Points that do not return are dropped (forward-backward check, Rühaak et al. 2017).

MIND-SSC (Heinrich et al. 2013) compares patches *within* one image, so the brighter lung at exhale does not matter.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import InputError
from ...geometry import Grid, Size, Vector
from ...objective.mind import mind_ssc
from .detect import voxels

POINTS_AT_ONCE = 128
"""Number of points that are processed together. Their products need 20 MB for offsets up to 4 voxels, 100 MB for 8."""
OUTSIDE = 1.0
"""Cost of a position outside the image: the largest squared difference of two descriptors."""


@dataclass(frozen=True)
class MatchSettings:
    """Settings of the search; InputError for a value out of range."""

    radius_mm: float = 8.0
    """Maximum offset along each index axis. Time and memory grow with its cube."""
    patch_mm: float = 2.0
    """Half the edge of the compared patch."""
    neighbours: int = 8
    """k: number of nearest keypoints that each keypoint is connected to."""
    iterations: int = 6
    """Number of rounds of message passing."""
    weight_per_mm2: float = 0.003
    """w: weight of the squared difference (mm²) between the offsets of neighbours."""
    share: float = 1.0
    """s: weight of all neighbours together, relative to the point's own cost."""
    tolerance_mm: float = 2.0
    """Maximum distance between a point and its match back."""

    def __post_init__(self) -> None:
        for name in ("radius_mm", "patch_mm", "tolerance_mm"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"the matching setting {name} is {getattr(self, name)}, expected a number > 0")
        for name in ("neighbours", "iterations", "weight_per_mm2", "share"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"the matching setting {name} is {getattr(self, name)}, expected a number ≥ 0")


def match(
    fixed: Float[Tensor, "1 1 z y x"],
    warped: Float[Tensor, "1 1 zm ym xm"],
    grid: Grid,
    points: Int[Tensor, "p 3"],
    settings: MatchSettings = MatchSettings(),
    valid: Bool[Tensor, "1 1 zm ym xm"] | None = None,
) -> tuple[Float[Tensor, "p 3"], Bool[Tensor, " p"]]:
    """Offsets d in world mm with warped(x + d) similar to fixed(x), and which of them to keep.

    ``fixed`` (HU) is on ``grid``, and the ``points`` are voxels (x, y, z) of it. ``warped`` (HU) is on that grid with
    `search_margin` more voxels on each side, for points near the border. An offset is kept if the search back from
    x + d confirms it, and if its patch lies where ``warped`` is ``valid`` (default: everywhere) and has any contrast (a
    constant fill has none). The offset is the mean of the forward and the backward search.
    """
    margin = search_margin(grid, settings)
    expected = tuple(n + 2 * m for n, m in zip(grid.size, margin, strict=True))[::-1]
    if tuple(warped.shape[2:]) != expected or tuple(fixed.shape[2:]) != grid.shape:
        raise ValueError(f"warped has shape {tuple(warped.shape)}, expected {expected} for fixed of {grid.shape}")
    if not len(points):
        return torch.zeros(0, 3, device=fixed.device), torch.zeros(0, dtype=torch.bool, device=fixed.device)
    axes, spacing = (
        torch.tensor(v, dtype=fixed.dtype, device=fixed.device) for v in (grid.axes, np.array(grid.spacing))
    )
    reach = radius_voxels(grid.spacing, settings.radius_mm)
    here, there = features(fixed, None, (0, 0, 0)), features(warped, valid, margin)
    neighbours = nearest(points * spacing, settings.neighbours)
    steps, forward = search(here, there, points, neighbours, grid.spacing, settings)
    found = points + steps
    _, backward = search(there, here, found, neighbours, grid.spacing, settings)
    returns = ((forward + backward) * spacing).norm(dim=1) <= settings.tolerance_mm
    within = (steps.abs() < torch.tensor(reach, device=steps.device)).all(dim=1)
    keep = returns & within & here.at(points, here.valid) & there.at(found, there.valid)
    return (forward - backward) / 2 @ axes.T, keep


def search_margin(grid: Grid, settings: MatchSettings = MatchSettings()) -> Size:
    """Number of voxels (x, y, z) around the fixed grid that a search reaches, including the patch."""
    reach, patch = (radius_voxels(grid.spacing, length) for length in (settings.radius_mm, settings.patch_mm))
    x, y, z = (a + b for a, b in zip(reach, patch, strict=True))
    return x, y, z


def radius_voxels(spacing: Vector, length_mm: float) -> Size:
    """A length in voxels along each index axis, at least one."""
    x, y, z = (max(1, n) for n in voxels(spacing, length_mm))
    return x, y, z


# ---- features


@dataclass(frozen=True)
class Features:
    """MIND-SSC of one image on the fixed grid, or on that grid with a margin."""

    values: Float[Tensor, "z y x 12"]
    """0 to 1; channels last, so that the values of a voxel are contiguous."""
    valid: Bool[Tensor, "z y x"]
    """Whether a voxel lies in the image and has contrast."""
    margin: Size
    """Voxels (x, y, z) before the first voxel of the fixed grid."""

    def at(self, index: Int[Tensor, "*p 3"], volume: Tensor) -> Tensor:
        """Rows of ``volume`` (z y x or z y x c) at voxels (x, y, z) of the fixed grid; outside, border values."""
        nz, ny, nx = self.valid.shape
        x, y, z = (
            (index[..., a] + m).clamp(0, n - 1) for a, (m, n) in enumerate(zip(self.margin, (nx, ny, nz), strict=True))
        )
        return volume.flatten(0, 2)[(z * ny + y) * nx + x]

    def inside(self, index: Int[Tensor, "*p 3"]) -> Bool[Tensor, "*p"]:
        """Whether voxels (x, y, z) of the fixed grid lie in this volume and are valid."""
        margin = torch.tensor(self.margin, device=index.device)
        size = torch.tensor(self.valid.shape[::-1], device=index.device)
        within = ((index + margin >= 0) & (index + margin < size)).all(dim=-1)
        return within & self.at(index, self.valid)


def features(image: Float[Tensor, "1 1 z y x"], valid: Bool[Tensor, "1 1 z y x"] | None, margin: Size) -> Features:
    """MIND-SSC and validity: ``valid``, and not all voxels around have the same value."""
    flat = F.max_pool3d(image, 3, stride=1, padding=1) == -F.max_pool3d(-image, 3, stride=1, padding=1)
    seen = ~flat if valid is None else valid & ~flat
    return Features(mind_ssc(image)[0].permute(1, 2, 3, 0).contiguous(), seen[0, 0], margin)


# ---- the search


def search(
    source: Features,
    target: Features,
    points: Int[Tensor, "p 3"],
    neighbours: Int[Tensor, "p k"],
    spacing: Vector,
    settings: MatchSettings,
) -> tuple[Int[Tensor, "p 3"], Float[Tensor, "p 3"]]:
    """Offset of each point of ``source`` in ``target``: in whole voxels (x, y, z), and refined to fractions."""
    costs = patch_costs(source, target, points, spacing, settings)
    return best_offsets(regularised(costs, neighbours, spacing, settings))


def patch_costs(
    source: Features, target: Features, points: Int[Tensor, "p 3"], spacing: Vector, settings: MatchSettings
) -> Float[Tensor, "p dz dy dx"]:
    """C at all offsets.

    With ‖a - b‖² = ‖a‖² + ‖b‖² - 2 a·b, all products of patch and surroundings are computed together, for
    `POINTS_AT_ONCE` points at a time.
    """
    reach, patch = (radius_voxels(spacing, length) for length in (settings.radius_mm, settings.patch_mm))
    offsets, inner = box(reach, points.device), box(patch, points.device)
    x, y, z = (r + q for r, q in zip(reach, patch, strict=True))
    outer = box((x, y, z), points.device)
    nz, ny, nx = offsets.shape[:3]
    costs = torch.empty(len(points), nz, ny, nx, dtype=source.values.dtype, device=points.device)
    for start in range(0, len(points), POINTS_AT_ONCE):
        centre = points[start : start + POINTS_AT_ONCE, None]
        a = source.at(centre + inner.reshape(-1, 3), source.values)  # (c, patch, 12)
        b = target.at(centre + outer.reshape(-1, 3), target.values)  # (c, surroundings, 12)
        squares = (b * b).sum(dim=2, keepdim=True) + (a * a).sum(dim=2)[:, None]
        pairs = torch.baddbmm(squares, b, a.transpose(1, 2), alpha=-2).reshape(-1, *outer.shape[:3], inner.numel() // 3)
        total = torch.zeros_like(costs[start : start + POINTS_AT_ONCE])
        for q, (qz, qy, qx) in enumerate(np.ndindex(*inner.shape[:3])):
            total += pairs[:, qz : qz + nz, qy : qy + ny, qx : qx + nx, q]
        total /= inner.numel() // 3 * a.shape[2]
        visible = target.inside(centre + offsets.reshape(-1, 3)).reshape(total.shape)
        costs[start : start + POINTS_AT_ONCE] = torch.where(visible, total, OUTSIDE)
    return costs


def box(radius: Size, device: torch.device) -> Int[Tensor, "dz dy dx 3"]:
    """All offsets (x, y, z) up to a radius (x, y, z), in voxels."""
    x, y, z = (torch.arange(-r, r + 1, device=device) for r in radius)
    return torch.stack(torch.meshgrid(z, y, x, indexing="ij"), dim=-1).flip(-1)


def nearest(points_mm: Float[Tensor, "p 3"], neighbours: int) -> Int[Tensor, "p k"]:
    """The ``neighbours`` nearest other points of each point, or all of them if there are fewer."""
    count = min(neighbours, len(points_mm) - 1)
    index = []
    for start in range(0, len(points_mm), POINTS_AT_ONCE):
        distance = (points_mm[start : start + POINTS_AT_ONCE, None] - points_mm).norm(dim=2)
        distance[torch.arange(len(distance)), torch.arange(start, start + len(distance))] = torch.inf
        index.append(distance.argsort(dim=1, stable=True)[:, :count])
    return torch.cat(index)


def regularised(
    costs: Float[Tensor, "p dz dy dx"], neighbours: Int[Tensor, "p k"], spacing: Vector, settings: MatchSettings
) -> Float[Tensor, "p dz dy dx"]:
    """C̃ after all iterations, up to a constant."""
    belief = costs
    count = neighbours.shape[1]
    for _ in range(settings.iterations if count else 0):
        message = lower_envelope(belief, spacing, settings.weight_per_mm2)
        message -= message.flatten(1).amin(dim=1)[:, None, None, None]
        mean = torch.zeros_like(message)
        for j in range(count):
            mean += message[neighbours[:, j]]
        belief = (costs + settings.share / count * mean) / (1 + settings.share)
    return belief


def lower_envelope(costs: Float[Tensor, "p dz dy dx"], spacing: Vector, weight: float) -> Float[Tensor, "p dz dy dx"]:
    """h(d) = min_e (c(e) + w ‖d - e‖²), computed one axis after the other (it is separable). ``weight`` is in 1/mm²."""
    for dim in (1, 2, 3):
        lowest = costs.clone()
        size = costs.shape[dim]
        for step in range(1, size):
            penalty = weight * (step * spacing[3 - dim]) ** 2
            if penalty > OUTSIDE:  # no cost is higher, so this step cannot give the minimum
                break
            low, high = lowest.narrow(dim, 0, size - step), lowest.narrow(dim, step, size - step)
            low.copy_(torch.minimum(low, costs.narrow(dim, step, size - step) + penalty))
            high.copy_(torch.minimum(high, costs.narrow(dim, 0, size - step) + penalty))
        costs = lowest
    return costs


def best_offsets(costs: Float[Tensor, "p dz dy dx"]) -> tuple[Int[Tensor, "p 3"], Float[Tensor, "p 3"]]:
    """Offset of the least cost: in whole voxels (x, y, z), and with the vertex of a parabola along each axis.

    At the border of the range, and where the parabola is not convex, the offset stays in whole voxels.
    """
    shape = costs.shape[1:]
    place = costs.flatten(1).argmin(dim=1)
    index = torch.stack([place // (shape[1] * shape[2]), place // shape[2] % shape[1], place % shape[2]], dim=1)
    rows = torch.arange(len(costs), device=costs.device)
    fractions = torch.zeros(len(costs), 3, dtype=costs.dtype, device=costs.device)
    for axis, size in enumerate(shape):
        inner = (index[:, axis] > 0) & (index[:, axis] < size - 1)
        before, after = index.clone(), index.clone()
        before[:, axis] = (index[:, axis] - 1).clamp(min=0)
        after[:, axis] = (index[:, axis] + 1).clamp(max=size - 1)
        low, middle, high = (costs[(rows, *i.unbind(1))] for i in (before, index, after))
        bend = low - 2 * middle + high
        fraction = 0.5 * (low - high) / torch.where(bend > 1e-9, bend, 1)
        fractions[:, axis] = torch.where(inner & (bend > 1e-9), fraction, 0)
    centre = torch.tensor([size // 2 for size in shape], device=costs.device)
    steps = index - centre
    return steps.flip(1), (steps + fractions).flip(1)

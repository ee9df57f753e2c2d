"""Linear pre-alignment: an affine world map from the fixed to the moving lungs, found without training.

There are several cheap starts, because no single start works for every pair: the boxes around the lungs (scale and
shift per axis; wrong when one lung field is truncated), the centres of gravity of the masks, their upper ends (right
even if the lung bases are truncated) and, when the two worlds overlap, the identity. Many rotations and shifts are
tried, too, for a patient turned on the side or a lung cut elsewhere. If one of them fits better than all other starts,
the best few are added as starts. Each start is improved on a very coarse grid by minimising

    1 - local correlation (HU, on the fixed lung mask) + β · mean squared difference of the lung masks
    + ρ · squared distance of the linear part from the start's

over the 12 parameters of the affine map. The best result by the image terms is restarted from its end point until the
image terms no longer improve.

The affine map that matches the images best is not the map closest to the motion. If the motion is large, the map fits
one part and does not fit the rest, the bases of the lungs. So the last step is a rough deformable registration from
this map, with the same image terms and a diffusion term. The result is the least-squares affine map of its field over
the lungs. Samples outside the moving field of view have no weight.
"""

import itertools
import logging

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import Tensor

from ..errors import InputError
from ..geometry import Affine, linear_index_map, moving_index, resample
from .deformed import closest_affine, deformed_field
from .scan import PrealignSettings, Scan, image_terms

log = logging.getLogger(__name__)
LEAST_AFFINE_DETERMINANT = 0.1
"""Smallest valid determinant: no breath shrinks a lung to a tenth."""


def prealign(fixed: Scan, moving: Scan, settings: PrealignSettings = PrealignSettings()) -> Affine:
    """The affine map (mm, LPS) from fixed to moving world positions; InputError if the images share too little."""
    coarse_fixed, coarse_moving = fixed.coarsened(), moving.coarsened()
    candidates = []
    found = starts(fixed, moving)
    found |= searched_starts(coarse_fixed, coarse_moving, list(found.values()), settings)
    for name, start in found.items():
        affine, value = _minimise(coarse_fixed, coarse_moving, start, settings.iterations, settings)
        log.debug("pre-alignment from %s: %.4f", name, value)
        candidates.append((value, name, affine))
    value, name, best = min(candidates, key=lambda candidate: candidate[0])
    if not np.isfinite(value):
        raise InputError(
            f"the moving image shows less than {settings.least_overlap:.0%} of the fixed lungs wherever it is placed, "
            "expected two scans of the same lungs"
        )
    best = _settled(coarse_fixed, coarse_moving, best, value, settings)
    log.debug("pre-alignment: from %s, objective %.4f", name, value)
    affine = _improved(fixed, moving, best, settings)
    if affine.determinant < LEAST_AFFINE_DETERMINANT:
        raise InputError("the pre-alignment collapsed the lungs, expected two scans of the same lungs")
    return affine


def starts(fixed: Scan, moving: Scan) -> dict[str, Affine]:
    """The starts by name."""
    points, targets = fixed.lung_points_mm(), moving.lung_points_mm()
    low, high = np.percentile(points, [1, 99], axis=0)
    low_moving, high_moving = np.percentile(targets, [1, 99], axis=0)
    scale = np.clip((high_moving - low_moving) / (high - low), 0.6, 1.6)
    boxes = Affine.from_arrays(np.diag(scale), (low_moving + high_moving) / 2 - scale * (low + high) / 2)
    centres = Affine.from_arrays(np.eye(3), targets.mean(axis=0) - points.mean(axis=0))
    shift = (low_moving + high_moving) / 2 - (low + high) / 2
    shift[2] = high_moving[2] - high[2]  # world z points to the head
    result = {"boxes": boxes, "centres": centres, "apices": Affine.from_arrays(np.eye(3), shift)}
    return result | {"identity": Affine()} if _overlap(points, targets) > 0.5 else result


def searched_starts(fixed: Scan, moving: Scan, others: list[Affine], settings: PrealignSettings) -> dict[str, Affine]:
    """The best of many rough placements, if one of them fits better than all ``others``; else none.

    They help for lungs that are rotated, or cut by the field of view on any side. The placements are only evaluated,
    not improved, so this takes little time. The best ones are then tried with further, smaller rotations.
    """
    points, targets = fixed.lung_points_mm(), moving.lung_points_mm()

    def value(start: Affine) -> float:
        return _value(fixed, moving, start, settings)

    centre = points.mean(axis=0)
    placements = _turned(_shift(targets.mean(axis=0) - centre), centre, _all_rotations())
    ranked = sorted([*others, *_shifts(points, targets), *placements], key=value)
    if ranked[0] in others:
        return {}
    nearby = _small_rotations()
    return {
        f"searched {n}": min([start, *_turned(start, centre, nearby)], key=value)
        for n, start in enumerate(ranked[: settings.searched])
    }


def _shifts(points: np.ndarray, targets: np.ndarray) -> list[Affine]:
    """No shift, and all shifts that align the lungs (n, 3) and (m, 3) at one end or at the middle along each axis."""
    ends, target_ends = (np.percentile(p, [1, 99], axis=0) for p in (points, targets))
    shifts = np.array([*(target_ends - ends), (target_ends - ends).mean(axis=0)])
    return [Affine(), *(_shift(np.array(mixed)) for mixed in itertools.product(*shifts.T))]


def _shift(shift: np.ndarray) -> Affine:
    return Affine.from_arrays(np.eye(3), shift)


def _turned(start: Affine, centre: np.ndarray, rotations: Rotation) -> list[Affine]:
    """For each rotation: first rotate about ``centre``, then apply the start."""
    return [
        Affine.from_arrays(np.array(start.matrix) @ rotation, start(centre - rotation @ centre))
        for rotation in rotations.as_matrix()
    ]


def _all_rotations() -> Rotation:
    """120 rotations: those of the icosahedron, and the same after a quarter turn. Every rotation is within 40° of one.

    They include the identity and the rotations of a cube, which are the possible errors of a header.
    """
    icosahedron = Rotation.create_group("I")
    return Rotation.concatenate([icosahedron, Rotation.from_euler("z", 90, degrees=True) * icosahedron])


def _small_rotations() -> Rotation:
    """Rotations of up to 40° about each axis."""
    steps = np.deg2rad([-40, -20, 20, 40])
    return Rotation.from_rotvec([angle * axis for axis in np.eye(3) for angle in steps])


@torch.no_grad()
def _value(
    fixed: Scan,
    moving: Scan,
    start: Affine,
    settings: PrealignSettings,
    displacement: Float[Tensor, "1 3 z y x"] | None = None,
) -> float:
    """Image terms of ``start`` (after ``displacement`` if given); inf if too little of the fixed lungs is covered."""
    index = moving_index(fixed.grid, moving.grid, displacement, start, fixed.voxels)
    value, covered = image_terms(fixed, moving, index, settings, settings.window)
    return float(value) if covered >= settings.least_overlap else float("inf")


def _overlap(points: np.ndarray, targets: np.ndarray) -> float:
    """Share of the points within the box of the targets."""
    return float(((points >= targets.min(axis=0)) & (points <= targets.max(axis=0))).all(axis=1).mean())


def _minimise(
    fixed: Scan, moving: Scan, start: Affine, iterations: int, settings: PrealignSettings
) -> tuple[Affine, float]:
    """Minimise by BFGS over the 12 parameters. Returns the best map found and its image terms (inf if the overlap is
    too small).

    BFGS steps shrink with the gradient, so a small change of the images causes a small change of the map. Adam's steps
    do not shrink: rounding would decide parameters that have little effect.
    """
    centre = fixed.lung_points_mm().mean(axis=0)
    radius = float(max(fixed.grid.extent_mm)) / 2
    best, best_value = start, float("inf")

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_value
        unknown = torch.tensor(parameters, dtype=torch.float32, requires_grad=True)
        linear, shift = unknown[:9].reshape(3, 3) / radius, unknown[9:]
        index = _index_map(fixed, moving, start, linear, shift, centre)
        value, covered = image_terms(fixed, moving, index, settings, settings.window)
        if float(value.detach()) < best_value and covered >= settings.least_overlap:
            best_value = float(value.detach())
            best = _moved(start, parameters[:9].reshape(3, 3) / radius, parameters[9:], centre)
        total = value + settings.rigidity * linear.square().sum()
        total.backward()
        assert unknown.grad is not None
        return settings.steepness * float(total.detach()), settings.steepness * unknown.grad.double().numpy()

    options = {"maxiter": iterations, "maxcor": 12, "ftol": settings.converged, "gtol": 0.0}
    minimize(objective, np.zeros(12), jac=True, method="L-BFGS-B", options=options)
    return best, best_value


def _settled(fixed: Scan, moving: Scan, start: Affine, value: float, settings: PrealignSettings) -> Affine:
    """Restart the minimisation from its end point until the image terms no longer improve.

    The penalty on the linear part is relative to each new start, so a rotated patient can be aligned completely.
    """
    for _ in range(settings.most_rounds):
        before = value
        start, value = _minimise(fixed, moving, start, settings.iterations, settings)
        log.debug("pre-alignment again: %.4f", value)
        if value >= (1 - settings.settled) * before:
            break
    return start


def _improved(fixed: Scan, moving: Scan, start: Affine, settings: PrealignSettings) -> Affine:
    """Improve the best map at full resolution: the affine map closest to a deformable registration that starts from it.

    If the deformable registration improves the images little, it fits mostly noise, and the affine map that fits the
    images best is better. The result is a weighted mean of both maps, so a small change of the images causes a small
    change of the result.
    """
    displacement, grid = torch.zeros(1, 3, 4, 4, 4), fixed.grid.resized((4, 4, 4))
    levels = (fixed.coarsened(), moving.coarsened()), (fixed, moving)
    for (one, other), steps in zip(levels, settings.deformed, strict=True):
        displacement, grid = deformed_field(one, other, start, displacement, grid, steps, settings)
    displacement = resample(displacement, grid, fixed.grid)
    before, after = (_value(fixed, moving, start, settings, u) for u in (None, displacement))
    log.debug("pre-alignment: %.4f, deformed %.4f", before, after)
    share = (max(0.0, before - after) / max(settings.whole_gain * before, 1e-9)) ** 2
    if share >= 1:
        return closest_affine(fixed, moving, start, displacement)
    polished, _ = _minimise(fixed, moving, start, settings.polish, settings)
    if share == 0:  # also if the field leaves the moving image: then no lung points remain for the closest map
        return polished
    closest = closest_affine(fixed, moving, start, displacement)
    matrix, offset = (
        (1 - share) * np.array(getattr(polished, name)) + share * np.array(getattr(closest, name))
        for name in ("matrix", "offset")
    )
    return Affine.from_arrays(matrix, offset)


def _moved(start: Affine, linear: np.ndarray, shift: np.ndarray, centre: np.ndarray) -> Affine:
    """x ↦ (A + L)(x - centre) + A·centre + offset + shift."""
    matrix = np.array(start.matrix) + linear
    return Affine.from_arrays(matrix, np.array(start.offset) + shift - linear @ centre)


def _index_map(
    fixed: Scan, moving: Scan, start: Affine, linear: Tensor, shift: Tensor, centre: np.ndarray
) -> Float[Tensor, "1 z y x 3"]:
    """Moving indices of the fixed voxels under `_moved`, differentiable in ``linear`` and ``shift``."""
    to_index = np.linalg.inv(moving.grid.axes)
    origin = np.array(fixed.grid.origin)
    base_matrix = torch.tensor(to_index @ np.array(start.matrix) @ fixed.grid.axes, dtype=torch.float32)
    base_offset = torch.tensor(moving.grid.to_index(start(origin)), dtype=torch.float32)
    inverse = torch.tensor(to_index, dtype=torch.float32)
    axes = torch.tensor(fixed.grid.axes, dtype=torch.float32)
    from_centre = torch.tensor(origin - centre, dtype=torch.float32)
    matrix = base_matrix + inverse @ linear @ axes
    return linear_index_map(matrix, base_offset + inverse @ (linear @ from_centre + shift), fixed.grid.shape)

"""The objective that training, refinement and the conventional baseline minimise.

    J(u) = D + α R + β B + γ V + δ K    (Hering et al. 2021, equation 8)

    D  `ngf`            do edges lie along each other?      mean over the fixed lung mask   [0, 1]
       `local_correlation`, `mind`: other distances, for refinement and pre-alignment
    R  `curvature`      is the field smooth?                mean over the grid              1/mm²
       `diffusion`      does it change little?              mean over the grid              no unit
    B  `masks`          do lungs (or lobes) overlap?        mean over the grid              [0, 1]
    V  `volume_change`  is volume kept, nothing folded?     mean over the grid              no unit
    K  `keypoints`      do corresponding points meet?       mean over the points            mm²

Normalisation. The paper does not say in which unit its integrals are. Here every term is an integral over its domain
divided by the volume of the domain: a mean over voxels, weighted by the mask. So α (mm²), β, γ (no unit) and δ (1/mm²)
depend neither on the size of the image nor on the size of the voxel. A batch counts as the mean of its samples. If the
paper's integrals are in mm³, then D_paper = |Ω_D| D, likewise R, B, V over their domains, and K_paper = K. Equation
(8) divided by |Ω_D| gives

    α = α_paper |Ω_R|/|Ω_D|,  β = β_paper |Ω_B|/|Ω_D|,  γ = γ_paper |Ω_V|/|Ω_D|,  δ = δ_paper/|Ω_D|.

With an empty mask, or without keypoints, the term is exactly 0, and so is its gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid
from .curvature import curvature
from .diffusion import diffusion
from .domain import check_same_shape
from .keypoints import Keypoints, keypoint_distance
from .masks import mask_distance, one_hot
from .ngf import edge_parameter, ngf_distance
from .volume_change import psi, volume_change

__all__ = [
    "Keypoints",
    "Weights",
    "curvature",
    "diffusion",
    "edge_parameter",
    "keypoint_distance",
    "mask_distance",
    "ngf_distance",
    "objective",
    "one_hot",
    "psi",
    "volume_change",
]


@dataclass(frozen=True)
class Weights:
    """Weights α, β, γ, δ, the weight of the diffusion, and the threshold t; InputError for a value out of range.

    The paper has α = 10, β = 1, γ = 0.01, δ = 0 on the coarsest level and 10⁷ on the others, t = 0.2, 0.1, 0.05 from
    coarse to fine. It finds that the magnitudes matter little. If its integrals are in mm³ and all its domains are the
    lung (some 5·10⁶ mm³), these weights are α = 10 mm², β = 1, γ = 0.01 and δ = 2/mm² here. If R, B and V are over a
    crop and the lung is about a quarter of it, all weights but δ are four times as large. The defaults lie in this
    range and are for the fine level. They are chosen by magnitude, not tuned.
    """

    alpha: float = 10.0
    """Weight of the curvature (mm²).

    A wave of 10 mm over 150 mm has R = 1.5·10⁻⁴/mm²; a wave of 0.5 mm over 10 mm has R = 2·10⁻²/mm².
    """
    beta: float = 1.0
    """Weight of the mask distance (no unit)."""
    gamma: float = 0.04
    """Weight of the volume change control (no unit). Breathing (determinants 0.8 to 1.3) has V < 0.07; each percent of
    voxels with determinant 0 adds 0.38 for t = 0.05."""
    delta: float = 0.1
    """Weight of the keypoint distance (1/mm²). It is smaller than the paper's: the keypoints themselves are 1 to 2 mm
    wrong, and with 2/mm² this error alone outweighs D."""
    t: float = 0.05
    """Threshold: below this Jacobian determinant, the volume change control is linear."""
    diffusion: float = 0.0
    """Weight of the diffusion (no unit); not in the paper."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "t" and not 0 <= value < float("inf"):
                raise InputError(f"the weight {name} is {value}, expected a number ≥ 0")
        if not 0 < self.t < 1:
            raise InputError(f"the volume change threshold t is {self.t}, expected a value between 0 and 1")


def objective(
    displacement: Float[Tensor, "n 3 z y x"],
    grid: Grid,
    weights: Weights,
    distance: Float[Tensor, ""],
    *,
    fixed_labels: Float[Tensor, "n k z y x"] | None = None,
    warped_labels: Float[Tensor, "n k z y x"] | None = None,
    keypoints: Sequence[Keypoints] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """J, and by name the values of D and of the terms with a weight > 0: unweighted, detached, on the device.

    ``distance`` is D, from images on this grid or on a finer one. ``displacement`` is in mm on ``grid``. There is one
    `Keypoints` per sample. The other terms are over the whole grid, so that the field is defined everywhere. InputError
    when a term has a weight > 0 but its labels or keypoints are missing; without them, set its weight to 0.
    """
    terms = {"distance": (1.0, distance)} | _field_terms(displacement, grid, weights)
    if weights.beta > 0:
        if fixed_labels is None or warped_labels is None:
            raise InputError(f"beta is {weights.beta} but there are no labels, expected both or beta 0")
        terms["mask_distance"] = (weights.beta, mask_distance(fixed_labels, warped_labels))
    if weights.delta > 0:
        if keypoints is None:
            raise InputError(f"delta is {weights.delta} but there are no keypoints, expected some or delta 0")
        terms["keypoint_distance"] = (weights.delta, _mean_keypoint_distance(keypoints, displacement, grid))
    total = torch.stack([weight * value for weight, value in terms.values()]).sum()
    return total, {name: value.detach() for name, (_, value) in terms.items()}


def _field_terms(displacement: Tensor, grid: Grid, weights: Weights) -> dict[str, tuple[float, Tensor]]:
    """By name, weight and value of each term with a weight > 0 that depends on the displacement field alone."""
    terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "curvature": (weights.alpha, lambda: curvature(displacement, grid)),
        "diffusion": (weights.diffusion, lambda: diffusion(displacement, grid)),
        "volume_change": (weights.gamma, lambda: volume_change(displacement, grid, weights.t)),
    }
    return {name: (weight, value()) for name, (weight, value) in terms.items() if weight > 0}


def _mean_keypoint_distance(keypoints: Sequence[Keypoints], displacement: Tensor, grid: Grid) -> Tensor:
    check_same_shape((len(displacement),), (len(keypoints),))
    distances = [
        keypoint_distance(points.fixed_mm, points.moving_mm, field[None], grid, points.weights)
        for points, field in zip(keypoints, displacement, strict=True)
    ]
    return torch.stack(distances).mean()

"""Expected error of a field, in mm at every position in the lungs, estimated without the true field.

The pair is registered a second time, in another way, and the distance of the two fields shows how large the errors are.
With d this distance (mm), J the change of volume by the transform (its Jacobian determinant), and e the error,

    E[e] + c = exp(w₀) (d around + c)^w₁ (J around + 0.1)^w₂,    c = 0.1 mm,

where "around" is the mean over `AROUND`³ voxels, some 2 cm. The error is larger where the lungs collapse: there the
density changes as well. w₀, w₁ and w₂ come with the weights; `training.expected_error` fits them on simulated pairs,
whose field is known exactly. Measured, also with other features: docs/trust.md.

There is no estimate outside the lungs, nor where the moving image does not show them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..geometry import Grid, resample, sample
from ..objective.local_correlation import box_sum

OFFSET_MM = 0.1
"""c."""
LEAST_VOLUME = 0.1
"""Added to J."""
AROUND = 5
"""Window in voxels of the network grid at half its resolution."""
MOST_MM = 60.0
"""Maximum of the estimate."""
LARGE_MM = 3.0
MOST_MEAN_MM = 2.0
MOST_LARGE = 0.03
"""A larger mean, or a larger share of the lungs above `LARGE_MM`, gives a warning. Measured: docs/trust.md."""
LEAST_SHARE = 0.5
"""Minimum weighted share of the voxels around a position that must have an estimate."""
NOT_KNOWN_MM = -1.0
"""Value in images where there is no estimate."""


@dataclass(frozen=True)
class ErrorModel:
    """w₀, w₁ and w₂ (see above)."""

    constant: float
    around: float
    volume: float

    def __call__(self, features: Float[Tensor, "2 z y x"]) -> Float[Tensor, "z y x"]:
        """The expected error in mm."""
        weights = torch.tensor([self.around, self.volume], dtype=features.dtype)
        logarithm: Tensor = self.constant + torch.tensordot(weights, features, 1)
        return (logarithm.exp() - OFFSET_MM).clamp(0, MOST_MM)


@dataclass(frozen=True)
class ErrorModels:
    """One model for each kind of second registration."""

    cascade: ErrorModel
    """``--refine off``: d is the distance from the refined field."""
    refined: ErrorModel
    """``--refine fast`` and ``full``: d is the distance of the forward field from the inverse of the backward field."""

    def of(self, refinement: str) -> ErrorModel:
        """The model for a value of ``--refine``."""
        return self.cascade if refinement == "off" else self.refined

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ErrorModels":
        """From the manifest's entry; InputError if a value is missing or not a number."""
        try:
            one, other = ({k: float(v) for k, v in values[name].items()} for name in ("cascade", "refined"))
            return cls(ErrorModel(**one), ErrorModel(**other))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("the manifest's expected_error is incomplete, expected three numbers for each") from error


@dataclass(frozen=True)
class ExpectedError:
    """The estimate."""

    mm: Float[Tensor, "1 1 z y x"]
    known: Float[Tensor, "1 1 z y x"]
    """1 where there is an estimate, else 0."""
    grid: Grid
    """In the fixed world."""

    @classmethod
    def from_image(cls, values: Float[Tensor, "1 1 z y x"], grid: Grid) -> "ExpectedError":
        """From an image of `at`: mm, and `NOT_KNOWN_MM` where there is no estimate."""
        return cls(values.clamp(min=0), (values >= 0).to(values), grid)

    def at_points(self, points_mm: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, " p"]:
        """The same as `at`, at points of the fixed scan (mm, LPS)."""
        both = torch.cat([self.mm * self.known, self.known], dim=1)
        index = torch.from_numpy(self.grid.to_index(points_mm)).to(both)[None, None, None]
        total, share = sample(both, index, fill=0.0)[0, :, 0, 0].double().numpy()
        found: np.ndarray = np.where(share >= LEAST_SHARE, total / np.maximum(share, 1e-6), NOT_KNOWN_MM)
        return found

    def at(self, grid: Grid, elsewhere: float = NOT_KNOWN_MM, least: float = LEAST_SHARE) -> Float[Tensor, "1 1 z y x"]:
        """The estimate on another grid; ``elsewhere`` where the known voxels around weigh less than ``least``."""
        both = torch.cat([self.mm * self.known, self.known], dim=1)
        total, share = resample(both, self.grid, grid, fill=0.0).split(1, dim=1)
        return torch.where(share >= least, total / share.clamp(min=1e-6), elsewhere)

    def figures(self) -> dict[str, float | None]:
        """Mean, 95th percentile (mm) and share above 3 mm, in the lungs with an estimate; None without any."""
        values = self.mm[self.known > 0.5]
        if not len(values):
            return {"mean_mm": None, "p95_mm": None, "share_above_3mm": None}
        return {
            "mean_mm": float(values.mean()),
            "p95_mm": float(values.quantile(0.95)),
            "share_above_3mm": float((values > LARGE_MM).float().mean()),
        }


def expected_error(
    features: Float[Tensor, "2 z y x"], known: Float[Tensor, "1 1 z y x"], grid: Grid, model: ErrorModel
) -> ExpectedError:
    """The estimate from the `features`. ``known`` is 1 in the lungs that the moving image shows, else 0."""
    return ExpectedError(model(features)[None, None] * known, known, grid)


def features(
    distance_mm: Float[Tensor, "1 1 z y x"], volume: Float[Tensor, "1 1 z y x"], known: Float[Tensor, "1 1 z y x"]
) -> Float[Tensor, "2 z y x"]:
    """log(d around + c) and log(J around + 0.1); only known voxels count. A J below 0 (folded) counts as 0."""
    number = box_sum(known, AROUND).clamp(min=1)
    around = box_sum(torch.cat([distance_mm, volume.clamp(min=0)], dim=1) * known, AROUND)[0] / number[0]
    return (around + torch.tensor([OFFSET_MM, LEAST_VOLUME]).reshape(2, 1, 1, 1)).log()


def warnings(figures: dict[str, float | None]) -> list[str]:
    """A sentence for the user if the error is probably too large."""
    mean, share = figures["mean_mm"], figures["share_above_3mm"]
    if mean is None or share is None or (mean <= MOST_MEAN_MM and share <= MOST_LARGE):
        return []
    return [
        f"The registration is probably wrong in parts: the expected error is {mean:.1f} mm in the mean over the lungs, "
        f"and above {LARGE_MM:.0f} mm in {share:.0%} of them."
    ]

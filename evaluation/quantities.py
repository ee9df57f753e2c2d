"""The measured quantities: names, units, better direction and definitions, for the page and the comparison."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from .errors import InputError


@dataclass(frozen=True)
class Quantity:
    """An entry of a case in metrics.json; for landmarks and labels, the case is represented by their mean."""

    key: str
    name: str
    unit: str
    better: Literal["higher", "lower"] | None
    """None: the quantity describes the case and does not rank methods."""
    digits: int
    """Digits after the decimal point."""
    definition: str

    @property
    def title(self) -> str:
        """The name, with the unit where there is one."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def of(self, result: Mapping[str, Any]) -> float | None:
        """The value of a case, or None."""
        entry = result.get(self.key)
        value = entry.get("mean") if isinstance(entry, dict) else entry
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def counted(self, result: Mapping[str, Any]) -> float | None:
        """The value of a case in statistics over all cases; its own value if an older metrics.json does not hold
        this."""
        entry = result.get("counted")
        return self.of({self.key: entry.get(self.key)} if isinstance(entry, dict) else result)

    def text(self, value: float | None) -> str:
        """The value in the form that readers see; – for None."""
        return "–" if value is None else f"{value:.{self.digits}f}"


QUANTITIES = (
    Quantity(
        "tre_mm",
        "TRE",
        "mm",
        "lower",
        2,
        "Target registration error: the distance between a landmark of the fixed image, moved by the displacement "
        "field, and its partner in the moving image. The field is interpolated trilinearly at the landmark. The mean "
        "over the landmarks stands for a case.",
    ),
    Quantity(
        "tre_snapped_mm",
        "TRE, snapped",
        "mm",
        None,
        2,
        "The same with the moved landmark first rounded to the nearest voxel centre of the moving image, as much of "
        "the literature on DIR-Lab does. Where the ground truth has no moving labels or scan, the grid of the fixed "
        "ones stands for it, or else that of the field.",
    ),
    Quantity(
        "tre_initial_mm",
        "TRE before",
        "mm",
        None,
        2,
        "The distance between the landmarks without any registration.",
    ),
    Quantity(
        "dice",
        "Dice",
        "",
        "higher",
        3,
        "Overlap 2 |F ∩ W| / (|F| + |W|) of a label F of the fixed image and the moving label W, warped by nearest "
        "neighbour. 1 is perfect. The mean over the labels stands for a case.",
    ),
    Quantity(
        "asd_mm",
        "ASD",
        "mm",
        "lower",
        2,
        "Average surface distance: the mean of the distances from every border voxel of either label to the nearest "
        "border voxel of the other one, both directions pooled.",
    ),
    Quantity("hd_mm", "HD", "mm", "lower", 2, "Hausdorff distance: the largest of these distances."),
    Quantity(
        "hd95_mm",
        "HD95",
        "mm",
        "lower",
        2,
        "The 95th percentile of these distances in each direction; the larger of the two counts.",
    ),
    Quantity(
        "folding_percent",
        "Folding",
        "%",
        "lower",
        4,
        "The share of the voxels inside the fixed lung mask (without one: inside the fixed labels) where the Jacobian "
        "determinant det(I + ∇u) is 0 or less (but for rounding: 1e-5): there the field turns tissue inside out.",
    ),
    Quantity(
        "folding_percent_all",
        "Folding, all",
        "%",
        None,
        4,
        "The same over all voxels of the field, outside the lungs, too.",
    ),
    Quantity(
        "jacobian_min",
        "Jacobian min.",
        "",
        None,
        3,
        "The smallest Jacobian determinant inside the mask (without mask and labels: of the whole image). 1 keeps "
        "the volume, 0.5 halves it from the fixed to the moving image.",
    ),
    Quantity("jacobian_max", "Jacobian max.", "", None, 3, "The largest one."),
    Quantity(
        "std_log_jacobian",
        "SDlogJ",
        "",
        "lower",
        3,
        "Standard deviation of the logarithm of the Jacobian determinant inside the mask, folded voxels left out: how "
        "unevenly the field changes volumes.",
    ),
)
"""The quantities in the order in which they are shown."""


def worst30(values: Float[np.ndarray, " n"], low_is_bad: bool) -> Float[np.ndarray, " m"]:
    """The worst 30 % of the values, their number rounded up: Dice30 in section 4.5 of Hering et al. 2021."""
    worst_first = np.sort(values) if low_is_bad else np.sort(values)[::-1]
    return worst_first[: -(-3 * len(values) // 10)]


def counted_values(quantity: Quantity, *evaluations: Sequence[Mapping[str, Any]]) -> list[Float[np.ndarray, " n"]]:
    """For each evaluation, the values of its cases in statistics over all cases; NaN for missing values.

    A case that failed without a field gets the worst SDlogJ of any case of these evaluations. The value without
    registration is 0, which would be an advantage.
    """
    values = [np.array([quantity.counted(result) for result in results], float) for results in evaluations]
    if quantity.key != "std_log_jacobian" or not any(np.isfinite(of).any() for of in values):
        return values
    worst = np.nanmax(np.concatenate(values))
    lost = [np.array([_failed_and_counted(result) for result in results], bool) for results in evaluations]
    return [np.where(np.isnan(of) & where, worst, of) for of, where in zip(values, lost, strict=True)]


def _failed_and_counted(result: Mapping[str, Any]) -> bool:
    counted = result.get("counted")
    known = isinstance(counted, dict) and any(value is not None for value in counted.values())
    return bool(result.get("error")) and known


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of metrics.json. InputError if it is missing, or if it or one of its cases has other content."""
    try:
        metrics = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a metrics.json") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON, expected a metrics.json") from error
    names = _case_names(metrics)
    if names is None:
        raise InputError(f'{path}: has no list "results" of cases, expected what python -m evaluation writes')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: has the case {twice[0]} twice, expected every case once")
    for result, quantity in itertools.product(metrics["results"], QUANTITIES):
        entry, counted = result.get(quantity.key), result.get("counted")
        values = [*entry.values()] if isinstance(entry, dict) else [entry]
        for value in [*values, counted.get(quantity.key) if isinstance(counted, dict) else None]:
            if not _is_value(value):
                raise InputError(
                    f"{path}: {quantity.key} of the case {result['case']} holds {str(value)[:50]!a}, "
                    "expected finite numbers or null"
                )
    return {**metrics}


def _is_value(value: Any) -> bool:
    try:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    except OverflowError:  # integers larger than any float
        return False


def _case_names(metrics: Any) -> list[str] | None:
    """The names of the cases; None if the evaluation did not write this content."""
    results = metrics.get("results") if isinstance(metrics, dict) else None
    if not isinstance(results, list):
        return None
    names = [result.get("case") if isinstance(result, dict) else None for result in results]
    return [name for name in names if isinstance(name, str)] if all(isinstance(n, str) for n in names) else None

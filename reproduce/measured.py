"""What the evaluation says of fields, method by method."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from evaluation.cases import Case
from evaluation.evaluate import aggregate, evaluate
from evaluation.quantities import worst30
from evaluation.tables import prepare_folder

from .pairs import Pair
from .published import Value
from .runs import Fields, Runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One method, over the pairs that did not fail."""

    results: list[dict[str, Any]]
    """As in metrics.json, the failed ones, too."""
    landmarks: pd.DataFrame
    """As in landmarks.csv."""

    def over_pairs(self, key: str) -> Value | None:
        """Mean and standard deviation of a quantity over the pairs; None where no pair has it."""
        of = aggregate(self.results)[key]
        return None if of["mean"] is None else Value(of["mean"], of["std"])

    def worst30(self, key: str) -> Value | None:
        """The same over the 30 % of the pairs where the quantity is lowest."""
        values = np.array([value for result in self.results if (value := result[key]["mean"]) is not None], float)
        return spread(worst30(values, low_is_bad=True))

    def errors_mm(self, pairs: Sequence[str] | None = None, name: str = "tre_mm") -> Float[np.ndarray, " n"]:
        """Of all landmarks of some pairs, or of all."""
        rows = self.landmarks if pairs is None else self.landmarks[self.landmarks.case.isin(pairs)]
        errors: np.ndarray = rows[name].to_numpy(float)
        return errors

    def error(self, pairs: Sequence[str] | None = None, name: str = "tre_mm") -> Value | None:
        """Mean and standard deviation over these landmarks (mm); None where there are none."""
        return spread(self.errors_mm(pairs, name))

    @property
    def folding_percent(self) -> Value | None:
        """In the lungs where the ground truth has a mask or lobes, otherwise of the whole field."""
        return self.over_pairs("folding_percent") or self.over_pairs("folding_percent_all")


def spread(values: Float[np.ndarray, " n"]) -> Value | None:
    """Mean and standard deviation (divided by n); None where there are no values."""
    return Value(float(values.mean()), float(values.std())) if len(values) else None


def measure(fields: Fields, out: Path) -> dict[str, Measured]:
    """Every method's fields, by pair; in place of a field, the sentence why there is none.

    ``out`` gets metrics.json, cases.csv and landmarks.csv of them all, the cases called ``<method>/<pair>``.
    """
    cases = [_case(f"{method}/{pair.name}", pair, field) for method, of in fields.items() for pair, field in of.items()]
    prepare_folder(out)
    metrics, landmarks = evaluate(cases, out)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in fields}
    for result in metrics["results"]:
        method, _, name = result["case"].partition("/")
        results[method].append(result | {"case": name})
    methods, names = landmarks.case.str.partition("/")[[0, 2]].to_numpy().T if len(landmarks) else ([], [])
    landmarks = landmarks.assign(method=methods, case=names)
    return {method: Measured(of, landmarks[landmarks.method == method]) for method, of in results.items()}


def _case(name: str, pair: Pair, field: Path | str) -> Case:
    if isinstance(field, str):
        return Case(name, None, pair.folder, field)
    return Case(name, field, pair.folder)


def registered(runs: Runs, methods: Sequence[str], pairs: Sequence[Pair]) -> Fields:
    """The fields of the methods, made where they are not there; ``affine`` is the pre-alignment, made from ``full``."""
    failed = runs.register([method for method in methods if method != "affine"], pairs)

    def field(method: str, pair: Pair) -> Path | str:
        source = "full" if method == "affine" else method
        if (source, pair.name) in failed:
            return failed[source, pair.name]
        return runs.affine(pair) if method == "affine" else runs.field(method, pair)

    return {method: {pair: field(method, pair) for pair in pairs} for method in methods}


def failures(measured: Mapping[str, Measured]) -> list[str]:
    """Sentences on what failed, for the page."""
    return [
        f"{result['case']}, {method}: failed: {result['error']}"
        for method, of in measured.items()
        for result in of.results
        if result["error"]
    ]

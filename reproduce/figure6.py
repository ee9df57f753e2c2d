"""Figure 6: volume change."""

from evaluation.pictures import jacobian_overlay

from .given import Given, NoPairsError
from .measured import registered
from .page import Page, Part, Row
from .published import Value, published
from .runs import NAMES
from .slices import of_result, side_by_side, spread_over

METHODS = ("off", "full")


def make(given: Given) -> Page:
    """Of four of the pairs given, evenly from the least to the most uneven volume change."""
    entry, runs = published("figure6"), given.runs
    fields = registered(runs, METHODS, given.pairs)
    failed = [f"{pair.name}, {m}: failed: {said}" for m in METHODS for pair, said in fields[m].items()
              if isinstance(said, str)]  # fmt: skip
    pairs = [pair for pair in given.pairs if not any(isinstance(fields[m][pair], str) for m in METHODS)]
    if not pairs:
        raise NoPairsError(f"none of the {len(given.pairs)} pairs could be registered; {failed[0]}")
    said = {(m, pair): runs.said(m, pair)["jacobian"] for m in METHODS for pair in pairs}
    shown = spread_over(sorted(pairs, key=lambda pair: said["full", pair]["std_log_jacobian"]))
    rows = []
    for name, key, unit, digits in (
        ("foldings", "folding_fraction", "%", 4),
        ("smallest determinant", "jacobian_min", "", 2),
        ("largest determinant", "jacobian_max", "", 2),
        ("SDlogJ", "std_log_jacobian", "", 3),
    ):
        of_paper = Value(entry["folding_percent"]) if key == "folding_fraction" else None
        factor = 100 if unit == "%" else 1
        rows += [
            Row(
                f"{name}, {pair.name}", of_paper, {m: Value(factor * said[m, pair][key]) for m in METHODS}, unit, digits
            )
            for pair in shown
        ]
    low, high = (f(said["full", p][k] for p in pairs) for f, k in ((min, "jacobian_min"), (max, "jacobian_max")))
    folded = {m: sum(said[m, pair]["folded_voxels"] for pair in pairs) for m in METHODS}
    sentence = (
        "The paper: volume changes are smooth and mostly around 1, and in one of the four pairs some voxels fold "
        f"({entry['folding_percent']} % over its 200 pairs). Ours, {len(pairs)} pairs: {folded['off']} voxels fold "
        f"with the cascade, {folded['full']} with the refinement, whose determinant in the lungs is {low:.2f} to "
        f"{high:.2f}."
    )
    parts = [Part("figure6_values", sentence, rows)]
    for method in METHODS:
        words = f"Jacobian determinant in the lungs, {NAMES[method]}: white is no change of volume, magenta folded."
        overlays = {pair.name: jacobian_overlay(of_result(runs, method, pair)) for pair in shown}
        parts.append(Part(f"figure6_{method}", words, picture=side_by_side({"": overlays}, volume_bar=True)))
    return Page(entry, parts, given.made_with(METHODS, pairs), failed)

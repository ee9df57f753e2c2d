"""Figure 7: cumulative landmark errors."""

import numpy as np

from evaluation.pictures import cumulative_errors

from .ablation import ablation_fields, trained, trainings
from .given import Given
from .measured import failures, measure, registered
from .page import Page, Part, Row
from .published import Value, published
from .runs import NAMES
from .table2 import WITHOUT, WORDS

METHODS = ("affine", "off", "full")


def make(given: Given) -> Page:
    """Of the DIR-Lab 4DCT pairs among those given."""
    pairs, others = given.dirlab()
    fields = dict(registered(given.runs, METHODS, pairs))
    configs = [] if given.ablation is None else list(trainings(given.ablation))
    if given.ablation is not None:
        fields |= ablation_fields(given.runs, given.ablation, pairs)
    measured = measure(fields, given.runs.out / "figure7")
    errors = {NAMES[method]: measured[method].errors_mm() for method in METHODS[::-1]}
    for config in configs:  # all seeds together
        of_seeds = [one.errors_mm() for name, one in measured.items() if name.rpartition("_")[0] == config]
        errors[f"ablation, {WORDS[config]}"] = np.concatenate(of_seeds)
    before = measured["affine"].errors_mm(name="tre_initial_mm")
    parts = [*percentiles(errors, before, len(pairs)), drawn(errors, before)]
    if given.ablation is None:
        parts.append(Part("", WITHOUT))
    made_with = given.made_with(("off", "full"), pairs) + ([] if given.ablation is None else [trained(given.ablation)])
    return Page(published("figure7"), parts, made_with, [*others, *failures(measured)])


def percentiles(errors: dict[str, np.ndarray], before: np.ndarray, cases: int) -> list[Part]:
    """The 75th percentile of each curve beside that of the paper."""
    entry = published("figure7")["percentile75_mm"]
    at_75 = {name: Value(float(np.percentile(values, 75))) for name, values in errors.items() if len(values)}
    off, full, affine = (at_75.get(NAMES[name]) for name in ("off", "full", "affine"))
    rows = [
        Row("before registration", Value(entry["initial"]),
            {"initial": Value(float(np.percentile(before, 75))) if len(before) else None}),
        Row("affine", Value(entry["affine"]), {"affine": affine}),
        Row("proposed", Value(entry["proposed"]), {"off": off, "full": full,
            "ablation": at_75.get(f"ablation, {WORDS['proposed']}")}),
    ]  # fmt: skip
    rows += [
        Row(words, Value(entry[config]), {"ablation": at_75.get(f"ablation, {words}")})
        for config, words in WORDS.items()
        if config != "proposed"
    ]
    known = f"ours is {off.mean:.2f} mm, with the refinement {full.mean:.2f} mm" if off and full else "there is none"
    sentence = (
        f"75 % of the landmarks have at most this error. The paper's networks: {entry['proposed']:.2f} mm over ten "
        f"cases; over the {cases} cases at hand {known}."
    )
    worse = [name for name, value in at_75.items() if affine and value.mean > affine.mean]
    sentence += f" Worse than the pre-alignment alone: {', '.join(worse)}." if worse else ""
    return [Part("figure7_percentiles", sentence, rows)]


def drawn(errors: dict[str, np.ndarray], before: np.ndarray) -> Part:
    """The curves."""
    words = "Share of the landmarks below an error; the farther to the left, the better."
    figure = cumulative_errors(errors, before)
    figure.set_size_inches(8.5, 5.5)  # there may be ten curves
    return Part("figure7", words, picture=figure)

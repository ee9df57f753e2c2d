"""Table 4: methods on DIR-Lab 4DCT."""

import numpy as np
import pandas as pd

from .given import Given
from .measured import Measured, failures, measure, registered, spread
from .page import NONE, Page, Part, Row, text
from .pairs import Pair
from .published import Value, pooled, published
from .runs import NAMES, Runs
from .table5 import of_paper

METHODS = ("off", "full", "ruehaak")
STAGES = {"off": ("cascade",), "full": ("cascade", "refine"), "ruehaak": ("keypoints", "minimise")}
"""What a method's time is the sum of: the registration itself, as the paper takes it (section 4.7)."""


def make(given: Given) -> Page:
    """Of the DIR-Lab 4DCT pairs among those given."""
    pairs, others = given.dirlab()
    measured = measure(registered(given.runs, METHODS, pairs), given.runs.out / "table4")
    parts = [compared(pairs, measured, given.runs), everybody(pairs, measured, given.runs)]
    made_with = given.made_with(METHODS, pairs)
    return Page(published("table4"), parts, made_with, [*others, *failures(measured)])


def seconds(runs: Runs, method: str, pairs: list[Pair]) -> Value | None:
    """Time of the registration itself, over the pairs. Of ``off``, that of the cascade within ``full``: ``off`` runs it
    in both directions, to estimate its error."""
    source = "full" if method == "off" else method
    timings = [runs.said(source, pair)["timings_s"] for pair in pairs if runs.has(source, pair)]
    return spread(np.array([sum(of.get(stage, 0.0) for stage in STAGES[method]) for of in timings]))


def compared(pairs: list[Pair], measured: dict[str, Measured], runs: Runs) -> Part:
    """The paper's two methods and ours."""
    entry, networks = published("table4"), ("off", "full")
    own = {method: measured[method].error() for method in METHODS}
    of_networks = {method: own[method] for method in networks}
    some = f"; ours over {len(pairs)}" if len(pairs) < 10 else ""
    before = measured["off"].error(None, "tre_initial_mm")
    rows = [
        Row(f"before, ten cases{some}", Value(*entry["initial"]), {"initial": before}),
        Row(f"conventional, ten cases{some}", Value(*entry["ruehaak"]), {"ruehaak": own["ruehaak"]}),
        Row(f"networks, ten cases{some}", Value(*entry["ours"]), of_networks),
        Row("networks, the same cases (Table 5)", pooled(of_paper("ours", pairs)), of_networks),
        Row("foldings (paper: below)", Value(entry["folding_percent"]),
            {method: measured[method].folding_percent for method in METHODS}, "%", 4),
        Row("time (paper: GPU)", Value(entry["gpu_s"]), {method: seconds(runs, method, pairs) for method in METHODS},
            "s", 2),
    ]  # fmt: skip
    sentence = (
        f"The paper has {entry['ours'][0]:.2f} mm with its networks and {entry['ruehaak'][0]:.2f} mm with the "
        f"conventional method, over ten cases. Over the {len(pairs)} cases at hand our cascade has "
        f"{text(own['off'])} mm, with the refinement {text(own['full'])} mm, and the conventional method as rebuilt "
        f"here {text(own['ruehaak'])} mm; the paper's networks have {text(pooled(of_paper('ours', pairs)))} mm on the "
        "same cases."
    )
    return Part("table4", sentence, rows)


def everybody(pairs: list[Pair], measured: dict[str, Measured], runs: Runs) -> Part:
    """The whole table, and ours below it."""
    here = f"the {len(pairs)} cases at hand (mm)"
    lines = [
        (name, kind, text(Value(mean, sd)), text(pooled(of_paper(key, pairs))) if key else NONE, folding or NONE,
         time or NONE)
        for name, kind, mean, sd, folding, time, key in published("table4")["methods"]
    ]  # fmt: skip
    for method in METHODS:
        own, folding, time = measured[method].error(), measured[method].folding_percent, seconds(runs, method, pairs)
        all_ten = text(own) if len(pairs) == 10 else NONE
        lines.append((NAMES[method], "this project", all_ten, text(own), f"{text(folding, 4)} %", f"{text(time, 1)} s"))
    heads = ["method", "kind", "ten cases (mm)", here, "foldings", "time"]
    sentence = (
        "The whole table as published, with ours at its end. Where Table 5 has a method case by case, its mean over "
        "the cases at hand stands beside that over all ten. Times are of different machines."
    )
    return Part("methods", sentence, table=pd.DataFrame(lines, columns=heads))

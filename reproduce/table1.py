"""Table 1: lobes and foldings on COPDGene, against the conventional method."""

import pandas as pd

from evaluation.compare import Evaluation, compare, stars

from .given import Given
from .measured import Measured, failures, measure, registered
from .page import Page, Part, Row, text
from .pairs import Pair
from .published import Value, published
from .runs import NAMES, Runs
from .table4 import METHODS, seconds

QUANTITIES = {"dice": ("Dice", "", 3), "asd_mm": ("ASD", "mm", 2), "hd_mm": ("HD", "mm", 2)}


def make(given: Given) -> Page:
    """Of the pairs with lobes among those given."""
    pairs, others = given.lobes()
    measured = measure(registered(given.runs, (*METHODS, "affine"), pairs), given.runs.out / "table1")
    parts = [compared(measured, given.runs, pairs), tests(measured)]
    made_with = given.made_with(METHODS, pairs)
    return Page(published("table1"), parts, made_with, [*others, *failures(measured)])


def compared(measured: dict[str, Measured], runs: Runs, pairs: list[Pair]) -> Part:
    """A row for each figure of the conventional method, and of the networks."""
    affine = measured["affine"].over_pairs("dice")
    rows = [Row("Dice, pre-alignment alone", None, {**dict.fromkeys(METHODS), "affine": affine}, "", 3)]
    for key, (name, unit, digits) in QUANTITIES.items():
        rows += both(key, name, {method: measured[method].over_pairs(key) for method in METHODS}, unit, digits)
    rows += both("dice30", "Dice30", {method: measured[method].worst30("dice") for method in METHODS}, "", 3)
    rows += both(
        "folding_percent", "foldings", {method: measured[method].folding_percent for method in METHODS}, "%", 4
    )
    device = {str(runs.said("full", pair)["device"]).split(":")[0] for pair in pairs if runs.has("full", pair)}
    times = {method: seconds(runs, method, pairs) for method in METHODS}
    rows += both("cpu_s", "time, CPU", times if device == {"cpu"} else {}, "s", 1)
    rows += both("gpu_s", "time, GPU", times if device == {"cuda"} else {}, "s", 2)
    entry = published("table1")
    own = {method: text(measured[method].over_pairs("dice"), 3) for method in METHODS}
    sentence = (
        f"Dice of the lobes: the paper has {entry['dice']['ours'][0]} with its networks and "
        f"{entry['dice']['ruehaak'][0]} with the conventional method; on the {len(pairs)} pairs here our cascade has "
        f"{own['off']}, with the refinement {own['full']}, the conventional method as rebuilt here {own['ruehaak']}; "
        f"the pre-alignment alone has {text(affine, 3)}."
    )
    return Part("table1", sentence, rows)


def both(key: str, name: str, own: dict[str, Value | None], unit: str, digits: int) -> list[Row]:
    """The rows of one figure: the conventional method, and the networks."""
    entry = published("table1")[key]
    rows = []
    for who, words, methods in (("ruehaak", "conventional", ("ruehaak",)), ("ours", "networks", ("off", "full"))):
        if who in entry:
            mine = {method: own.get(method) if method in methods else None for method in METHODS}
            rows.append(Row(f"{name}, {words}", Value(*entry[who]), mine, unit, digits))
    return rows


def tests(measured: dict[str, Measured]) -> Part:
    """One-sided Wilcoxon signed-rank tests against the conventional method, not corrected, as in the paper."""
    conventional = _evaluation("ruehaak", measured)
    lines = []
    for method in ("off", "full"):
        for row in compare(_evaluation(method, measured), conventional).rows:
            if row.quantity.key in QUANTITIES:
                test = row.test
                lines.append(
                    (NAMES[method], row.quantity.title, test.cases, f"{test.median_difference:+.3f}",
                     f"{test.p_first:.3g}{stars(test.p_first)}", f"{test.smallest_p:.3g}")
                )  # fmt: skip
    heads = ["method", "quantity", "pairs", "median difference", "p", "smallest possible p"]
    sentence = (
        "Is it better than the conventional method? One-sided Wilcoxon signed-rank tests over the pairs (* p < 0.05, "
        "** p < 0.01, *** p < 0.001). The paper finds Dice and ASD better with ***, HD with *. With few pairs no test "
        "can say much: the last column is the smallest p that so many pairs allow."
    )
    return Part("tests", sentence, table=pd.DataFrame(lines, columns=heads))


def _evaluation(method: str, measured: dict[str, Measured]) -> Evaluation:
    return Evaluation(NAMES[method], {result["case"]: result for result in measured[method].results})

"""Table 5: DIR-Lab 4DCT, case by case."""

import pandas as pd

from .given import Given
from .measured import Measured, failures, measure, registered
from .page import Page, Part, Row, text
from .pairs import Pair
from .published import Value, pooled, published

METHODS = ("off", "full")


def make(given: Given) -> Page:
    """Of the DIR-Lab 4DCT pairs among those given."""
    entry = published("table5")
    pairs, others = given.dirlab()
    measured = measure(registered(given.runs, METHODS, pairs), given.runs.out / "table5")
    parts = [initial(pairs, measured["off"]), errors(pairs, measured), everybody(pairs)]
    return Page(entry, parts, given.made_with(METHODS, pairs), [*others, *failures(measured)])


def of_paper(method: str, pairs: list[Pair]) -> list[Value]:
    """The published figures of the cases at hand."""
    values = published("table5")[method]
    return [Value(*values[pair.dirlab - 1]) for pair in pairs if pair.dirlab]


def initial(pairs: list[Pair], measured: Measured) -> Part:
    """Before registration: that these are the published cases."""
    values = of_paper("initial", pairs)
    names = [case(pair) for pair in pairs]
    own = [measured.error([pair.name], "tre_initial_mm") for pair in pairs]
    rows = [Row(name, value, {"initial": mine}) for name, value, mine in zip(names, values, own, strict=True)]
    rows.append(Row(f"all {len(pairs)}", pooled(values), {"initial": measured.error(None, "tre_initial_mm")}))
    sentence = (
        "Before registration the landmarks are as far apart as published, so these are the published cases. The last "
        "row is over the landmarks of all of them; the published one follows from its cases."
    )
    return Part("initial", sentence, rows)


def errors(pairs: list[Pair], measured: dict[str, Measured]) -> Part:
    """After registration: the paper's method and ours."""
    values = of_paper("ours", pairs)
    rows = [
        Row(case(pair), value, {method: measured[method].error([pair.name]) for method in METHODS})
        for pair, value in zip(pairs, values, strict=True)
    ]
    all_of_them, own = pooled(values), {method: measured[method].error() for method in METHODS}
    rows.append(Row(f"all {len(pairs)}", all_of_them, own))
    sentence = (
        f"After registration, over these {len(pairs)} of the ten cases: the paper {all_of_them.mean:.2f} mm, our "
        f"cascade {text(own['off'])} mm, with the refinement {text(own['full'])} mm. The paper's mean over all ten is "
        f"{text(Value(*published('table5')['mean']['ours']))} mm."
    )
    return Part("table5", sentence, rows)


def everybody(pairs: list[Pair]) -> Part:
    """As published: all methods of the table."""
    names, means = published("table5")["names"], published("table5")["mean"]
    table = {"as published (mm)": [*map(case, pairs), f"all {len(pairs)}", "all ten"]}
    for method, name in names.items():
        values = of_paper(method, pairs)
        table[name] = [*map(text, values), text(pooled(values)), text(Value(*means[method]))]
    sentence = (
        "The same cases by the other methods of the table, all as published; the means over the cases at hand are "
        "worked out from them."
    )
    return Part("others", sentence, table=pd.DataFrame(table))


def case(pair: Pair) -> str:
    """As the paper calls it."""
    return f"4DCT {pair.dirlab:02d}"

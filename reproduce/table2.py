"""Table 2: ablation."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .ablation import ablation_fields, trained
from .given import Given
from .measured import Measured, failures, measure, registered
from .page import Page, Part, Row, difference, text
from .pairs import Pair
from .published import Value, published
from .runs import NAMES

WORDS = {
    "no_mask": "no mask alignment (β = 0)",
    "no_volume_change": "no volume change control (γ = 0)",
    "no_keypoints": "no keypoints (δ = 0)",
    "single_level": "one level",
    "two_levels": "two levels",
    "proposed": "proposed",
}
COLUMNS = {"dice": ("Dice", "", 3), "tre_kp_mm": ("TRE KP", "mm", 2), "folding_percent": ("foldings", "%", 3),
           "tre_4dct_mm": ("TRE 4DCT", "mm", 2)}  # fmt: skip
WITHOUT = (
    "No trainings of an ablation were given (--ablation FOLDER, made by python -m training.ablation): only the bundled "
    "cascade, trained otherwise, stands beside the paper's figures."
)


def make(given: Given) -> Page:
    """Of all pairs with landmarks or lobes among those given."""
    pairs, others = given.chosen(
        lambda pair: pair.distances_mm is not None or pair.has_lobes, "neither landmarks nor lobes"
    )
    fields = dict(registered(given.runs, ["off"], pairs))
    if given.ablation is not None:
        fields |= ablation_fields(given.runs, given.ablation, pairs)
    measured = measure(fields, given.runs.out / "table2")
    values = {name: of_seed(one, pairs) for name, one in measured.items()}
    rows = [
        Row(
            f"{WORDS[config]}: {name}", Value(*published("table2")[key][number]), own(config, key, values), unit, digits
        )
        for key, (name, unit, digits) in COLUMNS.items()
        for number, config in enumerate(published("table2")["configurations"])
    ]
    parts = [Part("table2", sentence(values, given), rows)]
    if given.ablation is not None:
        parts += [against_proposed(values), everything(values)]
    made_with = given.made_with(["off"], pairs) + ([] if given.ablation is None else [trained(given.ablation)])
    return Page(published("table2"), parts, made_with, [*others, *failures(measured)])


def of_seed(measured: Measured, pairs: list[Pair]) -> dict[str, Value | None]:
    """The columns of the table for one cascade."""
    dirlab, rest = ([pair.name for pair in pairs if bool(pair.dirlab) is which] for which in (True, False))
    return {
        "dice": measured.over_pairs("dice"),
        "tre_kp_mm": measured.error(rest),
        "folding_percent": measured.folding_percent,
        "tre_4dct_mm": measured.error(dirlab),
    }


def seeds(config: str, key: str, values: Mapping[str, dict[str, Value | None]]) -> list[Value]:
    """The values of every seed of a configuration."""
    found = [of[key] for name, of in values.items() if name.rpartition("_")[0] == config]
    return [value for value in found if value is not None]


def own(config: str, key: str, values: Mapping[str, dict[str, Value | None]]) -> dict[str, Value | None]:
    """Means over the seeds; of the proposed settings the bundled cascade, too."""
    found: dict[str, Value | None] = {"off": values["off"][key] if config == "proposed" else None}
    of_seeds = seeds(config, key, values)
    if of_seeds:
        mean, sd = (float(np.mean([getattr(value, name) for value in of_seeds])) for name in ("mean", "sd"))
        found["ablation"] = Value(mean, sd)
    return found


def sentence(values: Mapping[str, dict[str, Value | None]], given: Given) -> str:
    """What came out, in words."""
    levels = {config: own(config, "tre_kp_mm", values).get("ablation") for config in WORDS}
    if given.ablation is None or any(levels[name] is None for name in ("single_level", "two_levels", "proposed")):
        return WITHOUT if given.ablation is None else "Not all configurations were trained."
    one, two, three = (text(levels[name]) for name in ("single_level", "two_levels", "proposed"))
    return (
        "With one, two and three levels the paper's error at keypoints is 3.95, 2.22 and 2.00 mm; that of the ablation "
        f"here is {one}, {two} and {three} mm (means over the seeds), that of the bundled cascade "
        f"{text(values['off']['tre_kp_mm'])} mm."
    )


def against_proposed(values: Mapping[str, dict[str, Value | None]]) -> Part:
    """What leaving a part out costs: each configuration minus the proposed one."""
    configs = published("table2")["configurations"]
    rows = []
    for key, (name, unit, digits) in COLUMNS.items():
        of_paper = dict(zip(configs, published("table2")[key], strict=True))
        mine = {config: own(config, key, values).get("ablation") for config in configs}
        for config in configs[:-1]:
            gap = difference(mine[config], mine["proposed"])
            theirs, ours = Value(of_paper[config][0] - of_paper["proposed"][0]), None if gap is None else Value(gap)
            rows.append(Row(f"{WORDS[config]}: {name}", theirs, {"ablation": ours}, unit, digits))
    words = (
        "What leaving a part out costs: each configuration minus the proposed one, in the paper and in the ablation. "
        "Above 0 the part helps (Dice: below 0)."
    )
    return Part("against_proposed", words, [row for row in rows if row.own["ablation"] is not None])


def everything(values: Mapping[str, dict[str, Value | None]]) -> Part:
    """Every training for itself, so that differences can be held against those between seeds."""
    heads = ["training (configuration and seed)", *(f"{n} ({u})" if u else n for n, u, _ in COLUMNS.values())]
    lines = [
        [NAMES.get(name, name), *(text(of[key], digits) for key, (_, _, digits) in COLUMNS.items())]
        for name, of in values.items()
    ]
    words = "Every training for itself: two configurations that differ no more than two seeds do not differ."
    return Part("trainings", words, table=pd.DataFrame(lines, columns=heads))

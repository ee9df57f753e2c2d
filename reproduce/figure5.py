"""Figure 5: lobe by lobe."""

from evaluation.pictures import box_plots, values_by_label

from .given import Given, NoPairsError
from .measured import failures, measure, registered
from .page import Page, Part, Row, text
from .published import Value, published
from .runs import NAMES
from .table1 import QUANTITIES

METHODS = ("affine", "ruehaak", "off", "full")


def make(given: Given) -> Page:
    """Of the pairs with lobes among those given."""
    entry = published("figure5")
    pairs, others = given.lobes()
    measured = measure(registered(given.runs, METHODS, pairs), given.runs.out / "figure5")
    own = {method: measured[method].over_pairs("dice") for method in METHODS}
    if not any(own.values()):
        raise NoPairsError(f"none of the {len(pairs)} pairs could be registered; {failures(measured)[0]}")
    rows = [
        Row("Dice, conventional", Value(*entry["dice"]["ruehaak"]), {"ruehaak": own["ruehaak"]}, "", 3),
        Row("Dice, networks", Value(*entry["dice"]["ours"]), {"off": own["off"], "full": own["full"]}, "", 3),
        Row("Dice, affine", None, {"affine": own["affine"]}, "", 3),
    ]
    sentence = (
        f"Mean Dice of the paper: networks {entry['dice']['ours'][0]}, conventional {entry['dice']['ruehaak'][0]}. On "
        f"the {len(pairs)} pairs here: pre-alignment {text(own['affine'], 3)}, conventional as rebuilt here "
        f"{text(own['ruehaak'], 3)}, our cascade {text(own['off'], 3)}, with the refinement {text(own['full'], 3)}."
    )
    parts = [Part("figure5", sentence, rows)]
    for key, (name, unit, _) in QUANTITIES.items():
        values = {NAMES[method]: values_by_label(measured[method].results, key) for method in METHODS if own[method]}
        title = f"{name} ({unit})" if unit else name
        words = f"{title} of the {len(pairs)} pairs, mean of the lobes and lobe by lobe; a box is the middle half."
        parts.append(Part(f"figure5_{key}", words, picture=box_plots(values, title)))
    return Page(entry, parts, given.made_with(METHODS[1:], pairs), [*others, *failures(measured)])

"""Table 3: EMPIRE10."""

from .given import Given
from .measured import failures, measure, registered
from .page import Page, Part, Row, text
from .published import Value, published
from .table4 import METHODS

SCORES = {"landmarks_mm": ("landmarks", "mm", 2), "folding": ("singularities", "%", 4)}
NOT_HERE = {"boundaries": "lung boundaries", "fissures": "fissures"}


def make(given: Given) -> Page:
    """Of all pairs given."""
    entry, pairs = published("table3"), list(given.pairs)
    measured = measure(registered(given.runs, METHODS, pairs), given.runs.out / "table3")
    own = {
        "landmarks_mm": {method: measured[method].over_pairs("tre_mm") for method in METHODS},
        "folding": {method: measured[method].folding_percent for method in METHODS},
    }
    rows = []
    for who, words, methods in (("ruehaak", "conventional", ("ruehaak",)), ("ours", "networks", ("off", "full"))):
        for key, (name, unit, digits) in SCORES.items():
            mine = {method: own[key][method] if method in methods else None for method in METHODS}
            rows.append(Row(f"{name}, {words}", Value(*entry[key][who]), mine, unit, digits))
        rows += [Row(f"{name}, {words}", Value(*entry[key][who]), {}, "") for key, name in NOT_HERE.items()]
    rows.append(Row("landmarks without sheep, networks", Value(*entry["without_sheep_mm"]["ours"]), {}))
    sentence = (
        f"The paper's networks have a landmark error of {entry['landmarks_mm']['ours'][0]} mm, the conventional method "
        f"{entry['landmarks_mm']['ruehaak'][0]} mm. On the {len(pairs)} pairs here, by the landmarks that come with "
        f"them (means over pairs): our cascade {text(own['landmarks_mm']['off'])} mm, with the refinement "
        f"{text(own['landmarks_mm']['full'])} mm, the conventional method as rebuilt here "
        f"{text(own['landmarks_mm']['ruehaak'])} mm."
    )
    return Page(entry, [Part("table3", sentence, rows)], given.made_with(METHODS, pairs), failures(measured))

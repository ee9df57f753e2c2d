"""Figure 8: before and after."""

import numpy as np

from evaluation.pictures import panels

from .given import Given, NoPairsError
from .measured import failures, measure, registered
from .page import Page, Part, Row, text
from .pairs import Pair
from .published import Value, published
from .slices import of_result, side_by_side, spread_over

METHODS = ("affine", "off", "full")


def make(given: Given) -> Page:
    """Of four of the pairs with landmarks given, evenly from the best to the worst."""
    entry = published("figure8")
    pairs, others = given.chosen(lambda pair: pair.distances_mm is not None, "no landmarks")
    measured = measure(registered(given.runs, METHODS, pairs), given.runs.out / "figure8")
    done = [pair for pair in pairs if len(measured["off"].errors_mm([pair.name]))]
    if not done:
        raise NoPairsError(f"none of the {len(pairs)} pairs could be registered; {failures(measured)[0]}")
    shown = spread_over(sorted(done, key=lambda pair: measured["off"].errors_mm([pair.name]).mean()))

    def error(method: str, pair: Pair) -> Value | None:
        return measured[method].error([pair.name])

    def of_paper(row: str, key: str) -> Value | None:
        return Value(entry[row][key]) if row else None

    places = dict.fromkeys(range(len(shown)), "") | {0: "best", len(shown) - 1: "worst"}
    rows = []
    for pair, place in zip(shown, places.values(), strict=False):
        name = f"{pair.name} ({place})" if place else pair.name
        rows.append(Row(f"{name}: after affine", of_paper(place, "affine_mm"), {"affine": error("affine", pair)}))
        own = {method: error(method, pair) for method in ("off", "full")}
        rows.append(Row(f"{name}: after", of_paper(place, "mm"), own))
    ends = [f"{text(error('affine', pair))} → {text(error('off', pair))} mm" for pair in (shown[0], shown[-1])]
    sentence = (
        "Mean distance of keypoints (the paper: 8.51 → 0.99 mm in its first row, 13.57 → 1.9 mm in its last) and of "
        f"landmarks (our cascade: {ends[0]} and {ends[1]}), after the affine pre-alignment and after registration."
    )
    pictures = {pair.name: picture(given, pair) for pair in shown}
    words = "Fixed, moving and warped moving scan, the difference before and after (our cascade); one pair in each row."
    parts = [Part("figure8_values", sentence, rows), Part("figure8", words, picture=side_by_side(pictures))]
    return Page(entry, parts, given.made_with(("off", "full"), pairs), [*others, *failures(measured)])


def picture(given: Given, pair: Pair) -> dict[str, np.ndarray]:
    """The pictures of a pair without the Jacobian determinant, which is Figure 6."""
    shown = panels(of_result(given.runs, "off", pair))
    return {title: pixels for title, pixels in shown.items() if title != "Jacobian determinant"}

"""The README says what the code does, where it repeats it."""

from pathlib import Path

import pytest

from evaluation.quantities import QUANTITIES, Quantity

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.key)
def test_definitions_of_the_evaluation(quantity: Quantity) -> None:
    definition = quantity.definition.replace("|", "\\|")  # or it would end the cell
    assert f"| `{quantity.key}` | {quantity.title} | {definition} |" in README.splitlines()

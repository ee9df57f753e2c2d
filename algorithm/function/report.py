"""The section of report.html on lung function."""

from resultpages.page import fragment

from .quantities import QUANTITIES
from .table import Measured


def section(found: Measured) -> str:
    """HTML: which scan is the inspiration, warnings, and the quantities that are shown, one column per region."""
    names = list(found.regions)
    lines = [
        (quantity.title, *(quantity.text(found.regions[name][quantity.key]) for name in names))
        for quantity in QUANTITIES
        if quantity.shown and any(found.regions[name][quantity.key] is not None for name in names)
    ]
    return fragment(
        "function.html.j2", heads=("", *names), lines=lines, inspiration=found.inspiration, warnings=found.warnings
    )

"""The evaluation package, from wherever it is."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .errors import InputError


def evaluation_module(name: str) -> ModuleType:
    """A module of the evaluation, which is a part of the installed package; in the repository it lies beside it."""
    inside = f"{__package__}.evaluation"
    package = inside if find_spec(inside) else "evaluation"
    if find_spec(package) is None:
        raise InputError("the evaluation is not installed here, expected the package lungreg or the whole repository")
    return import_module(f"{package}.{name}")

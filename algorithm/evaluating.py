"""Imports the evaluation package, wherever it lies."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .errors import InputError


def evaluation_module(name: str) -> ModuleType:
    """A module of the evaluation. The installed package contains the evaluation; in the repository it lies beside this
    package."""
    inside = f"{__package__}.evaluation"
    package = inside if find_spec(inside) else "evaluation"
    if find_spec(package) is None:
        raise InputError("the evaluation is not installed here, expected the package lungreg or the whole repository")
    return import_module(f"{package}.{name}")

"""Lung CT registration: a multilevel cascade of U-Nets (Hering et al. 2021).

For Python programs: `register`, `Registrar`, `Registration`, `load` (see `api`), which are imported when they are asked
for.
"""

from typing import TYPE_CHECKING, Any

from .cpus import share_processors

if TYPE_CHECKING:
    from .api import Registrar, Registration, load, register

__version__ = "1.0.0"
__all__ = ["Registrar", "Registration", "__version__", "load", "register"]

share_processors()  # before anything imports torch


def __getattr__(name: str) -> Any:
    """Only now, as torch takes seconds to load."""
    if name in ("Registrar", "Registration", "load", "register"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A lung phantom with known motion."""

import algorithm  # noqa: F401 - before torch, see algorithm.cpus
from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair

__all__ = ["PhantomPair", "PhantomSettings", "chest_grid", "make_pair"]

"""A lung phantom with known motion."""

from phantom.pair import PhantomPair, PhantomSettings, chest_grid, make_pair

__all__ = ["PhantomPair", "PhantomSettings", "chest_grid", "make_pair"]

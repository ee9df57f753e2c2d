"""The pages that a person reads, for the algorithm and the evaluation: one template engine, one look, no torch.

`render` makes a page of a template in ``templates/``; `pictures` and `charts` make what is shown on it; `viewer` has
the volumes that can be scrolled through. A page is one file: it holds all that it shows, and its policy lets it load
nothing.
"""

from .page import render

__all__ = ["render"]

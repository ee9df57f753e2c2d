"""Pages for readers, for the algorithm and the evaluation: one template engine, one design, no torch.

`render` makes a page from a template in ``templates/``; `pictures` and `charts` make its content; `viewer` has the
volumes for scrolling. A page is one file: it contains everything that it shows, and its security policy forbids it to
load anything.
"""

from .page import render

__all__ = ["render"]

"""The tables and figures of Hering et al. 2021 beside our own: ``python -m reproduce``.

Not in the container, and not in the wheel: it needs the whole repository.
"""

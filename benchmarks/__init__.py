"""Measurements on the machine at hand. Tests do not check their results."""

import algorithm  # noqa: F401 - before torch, see algorithm.cpus

"""Measurements on the machine at hand. Nothing here is asserted by a test."""

import algorithm  # noqa: F401 - before torch, see algorithm.cpus

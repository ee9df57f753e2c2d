"""Lung CT registration: a multilevel cascade of U-Nets (Hering et al. 2021)."""

from .cpus import share_processors

__version__ = "0.1.0"

share_processors()  # before anything imports torch

"""Lung CT registration: a multilevel cascade of U-Nets (Hering et al. 2021)."""

__version__ = "0.1.0"

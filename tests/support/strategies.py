"""Hypothesis strategies that all tests share: grids of every kind that a scanner, or a converter, can produce."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, Matrix


def examples(number: int, suppress: Sequence[HealthCheck] = ()) -> settings:
    """The settings of a property: so many examples, or as many as the mode with new draws has (`tests.conftest`)."""
    profile = settings()
    if settings.get_current_profile_name() == "explore":
        number = profile.max_examples
    return settings(max_examples=number, suppress_health_check=[*profile.suppress_health_check, *suppress])


SIGNED_PERMUTATIONS = [
    np.eye(3)[:, list(axes)] * np.array(signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1.0, -1.0), repeat=3)
]
"""The 48 directions with axes along the world's, the identity first."""


def as_matrix(matrix: np.ndarray) -> Matrix:
    """A (3, 3) array as the tuples that `Grid` holds."""
    a, b, c = ((float(r[0]), float(r[1]), float(r[2])) for r in matrix)
    return a, b, c


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """Plain floats; file formats flush subnormal ones to zero."""
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def rotations(draw: st.DrawFn, max_angle: float = np.pi) -> np.ndarray:
    """(3, 3) rotations by at most ``max_angle`` (rad) about any axis, by Rodrigues' formula."""
    azimuth, height, angle = (
        round(draw(st.floats(low, high)), 9)  # no products that are subnormal
        for low, high in ((0, 2 * np.pi), (-1, 1), (0, max_angle))
    )
    ring = np.sqrt(1 - height**2)
    x, y, z = ring * np.cos(azimuth), ring * np.sin(azimuth), height
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@st.composite
def directions(draw: st.DrawFn, oblique: bool = True) -> Matrix:
    """Axis permutations and flips, left-handed ones too; rotated to any angle when ``oblique``."""
    matrix = draw(st.sampled_from(SIGNED_PERMUTATIONS))
    if oblique and draw(st.booleans()):
        matrix = draw(rotations()) @ matrix
    return as_matrix(matrix)


@st.composite
def grids(
    draw: st.DrawFn,
    min_size: int = 2,
    max_size: int = 9,
    min_spacing: float = 0.5,
    max_spacing: float = 3.0,
    oblique: bool = True,
) -> Grid:
    """Small grids: even and odd, unequal sizes, anisotropic spacing (mm), any direction, origins within 500 mm."""
    size = st.integers(min_size, max_size)
    spacing = numbers(min_spacing, max_spacing)
    origin = numbers(-500, 500)
    return Grid(
        size=(draw(size), draw(size), draw(size)),
        spacing=(draw(spacing), draw(spacing), draw(spacing)),
        origin=(draw(origin), draw(origin), draw(origin)),
        direction=draw(directions(oblique)),
    )


@st.composite
def generators(draw: st.DrawFn) -> torch.Generator:
    """Seeded random numbers: for tensors, which need not shrink."""
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def smooth_field(grid: Grid, amplitude_mm: float, generator: torch.Generator) -> Float[Tensor, "1 3 z y x"]:
    """A displacement (mm) made of one random cosine over the grid per component; at most ``amplitude_mm`` each."""
    nz, ny, nx = grid.shape
    t = [torch.linspace(0, 1, n) for n in (nx, ny, nz)]
    components = []
    for _ in range(3):
        a, b, c = (2 * torch.pi * torch.rand(3, generator=generator)).tolist()
        phase = 2 * torch.pi * torch.rand(1, generator=generator)
        angle = a * t[0][None, None, :] + b * t[1][None, :, None] + c * t[2][:, None, None] + phase
        components.append(amplitude_mm * torch.cos(angle))
    return torch.stack(components)[None]

"""Two ellipsoids for lungs: scans for the simulated breathing and for what is trained on it."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from algorithm.geometry import Grid, linear_index_map
from training.data import TrainingScan

GRID = Grid((36, 32, 40), spacing=(7.0, 7.5, 6.0), origin=(-120.0, -110.0, 50.0))
SEEDS = st.integers(0, 2**31)


def positions(grid: Grid) -> Tensor:
    """World positions (1, 3, z, y, x) of the voxels."""
    axes, origin = torch.from_numpy(grid.axes).float(), torch.tensor(grid.origin)
    return linear_index_map(axes, origin, grid.shape).permute(0, 4, 1, 2, 3)


def two_lungs(grid: Grid = GRID) -> Tensor:
    """Two ellipsoids of 45 × 70 × 90 mm, side by side."""
    x = positions(grid) - torch.from_numpy(grid.to_world((np.array(grid.size) - 1) / 2)).float().reshape(1, 3, 1, 1, 1)
    shifted = torch.stack([x[:, 0].abs() - 60, x[:, 1], x[:, 2]], 1)
    radii = torch.tensor([45.0, 70.0, 90.0]).reshape(1, 3, 1, 1, 1)
    return ((shifted / radii).square().sum(dim=1, keepdim=True) < 1).float()


LUNGS = two_lungs()


def made_scan(path: Path) -> TrainingScan:
    """Lungs and spacing that depend on the name."""
    spacing = {"one": (8.0, 9.0, 8.0), "two": (9.0, 8.5, 7.5)}[path.stem]
    grid = Grid((32, 24, 32), spacing, origin=(-120.0, -110.0, 50.0))
    lungs = two_lungs(grid)
    waves = 60 * torch.sin(torch.arange(32) / 2).expand(1, 1, *grid.shape)
    return TrainingScan(path.stem, waves + torch.where(lungs > 0.5, -850.0, 30.0), lungs, grid)


def scan_files(folder: Path) -> Path:
    """What `made_scan` stands for."""
    for name in ("two", "one"):
        (folder / f"{name}.npz").touch()
    return folder

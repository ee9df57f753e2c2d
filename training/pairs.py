"""A training pair and its file, which is written once and used in many steps."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Grid, Size, downsample_by
from training.data import codes, grid_arrays, hu, packed_grid, save_arrays


@dataclass(frozen=True)
class TrainingPair:
    """A pre-aligned pair and its displacement field."""

    fixed: Float[Tensor, "1 1 z y x"]
    """HU."""
    moving: Float[Tensor, "1 1 zm ym xm"]
    fixed_lungs: Float[Tensor, "1 1 z y x"]
    """0 to 1."""
    moving_lungs: Float[Tensor, "1 1 zm ym xm"]
    displacement: Float[Tensor, "1 3 zd yd xd"]
    """mm; correct inside the fixed lungs."""
    backward: Float[Tensor, "1 3 zd yd xd"]
    """mm, on the same grid: the displacement from the moving to the fixed image, correct inside the moving lungs."""
    grid: Grid
    moving_grid: Grid
    displacement_grid: Grid
    """It may be coarser than ``grid``: between its voxels, the field is trilinear."""

    def reduced(self, factor: int) -> "TrainingPair":
        """Images and lungs at 1/factor of their resolution."""
        return replace(
            self,
            fixed=downsample_by(self.fixed, factor),
            moving=downsample_by(self.moving, factor),
            fixed_lungs=downsample_by(self.fixed_lungs, factor),
            moving_lungs=downsample_by(self.moving_lungs, factor),
            grid=self.grid.coarsened(factor),
            moving_grid=self.moving_grid.coarsened(factor),
        )

    def swapped(self) -> "TrainingPair":
        """The pair with fixed and moving exchanged."""
        return TrainingPair(
            self.moving,
            self.fixed,
            self.moving_lungs,
            self.fixed_lungs,
            self.backward,
            self.displacement,
            self.moving_grid,
            self.grid,
            self.displacement_grid,
        )

    def cropped(self, start: Size, size: Size) -> "TrainingPair":
        """The pair with a part of the fixed image (x, y, z voxels). The moving image stays complete."""
        x, y, z = (slice(first, first + n) for first, n in zip(start, size, strict=True))
        return replace(
            self,
            fixed=self.fixed[:, :, z, y, x],
            fixed_lungs=self.fixed_lungs[:, :, z, y, x],
            grid=self.grid.cropped(start, size),
        )

    def to(self, device: str) -> "TrainingPair":
        """The pair on the training device."""
        names = ("fixed", "moving", "fixed_lungs", "moving_lungs", "displacement", "backward")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def save_pair(path: Path, pair: TrainingPair) -> None:
    """Write a pair: HU of the lung window and lungs in 8 bits, displacements in half precision (0.004 mm at 8 mm)."""
    arrays = {
        "fixed": codes(pair.fixed),
        "moving": codes(pair.moving),
        "fixed_lungs": (pair.fixed_lungs[0, 0] * 255).round().to(torch.uint8).numpy(),
        "moving_lungs": (pair.moving_lungs[0, 0] * 255).round().to(torch.uint8).numpy(),
        "displacement": pair.displacement[0].half().numpy(),
        "backward": pair.backward[0].half().numpy(),
    }
    for name in ("grid", "moving_grid", "displacement_grid"):
        arrays |= grid_arrays(getattr(pair, name), f"{name}_")
    save_arrays(path, arrays)


def load_pair(path: Path) -> TrainingPair:
    """A pair written by `save_pair`."""
    with np.load(path) as data:
        return TrainingPair(
            hu(data["fixed"]),
            hu(data["moving"]),
            torch.from_numpy(data["fixed_lungs"])[None, None].float() / 255,
            torch.from_numpy(data["moving_lungs"])[None, None].float() / 255,
            torch.from_numpy(data["displacement"])[None].float(),
            torch.from_numpy(data["backward"])[None].float(),
            packed_grid(data, "grid_"),
            packed_grid(data, "moving_grid_"),
            packed_grid(data, "displacement_grid_"),
        )

"""The folder of a registration that was never done, with a smooth map between two scans."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from algorithm.fields.expected_error import ErrorModel, ExpectedError
from algorithm.fields.frame import framed
from algorithm.fields.inverse import inverse
from algorithm.fields.transform import Transform
from algorithm.geometry import Affine, Grid
from algorithm.lungs import LungMask
from algorithm.results.ownership import TRANSFORMS
from algorithm.results.transformfiles import write_inverse, write_transform
from tests.support.grids import sitk_image
from tests.support.remembered import remembered

TURN = ((0.8, -0.6, 0.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0))
FLIP = ((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0))
BOX = Grid((40, 36, 32), (4.0, 4.5, 5.0), (-70.0, -80.0, 100.0), TURN)
"""Of the field."""
AFFINE = Affine.from_arrays(
    np.array([[1.1, 0.1, 0.0], [-0.1, 0.9, 0.05], [0.0, 0.02, 1.05]]), np.array([9.0, -4.0, 60.0])
)
FIXED = Grid((30, 28, 26), (5.0, 5.5, 6.0), (20.0, 105.0, 100.0), FLIP)
MOVING = Grid((26, 30, 28), (6.0, 5.0, 7.0), (-66.0, -70.0, 150.0), TURN)


def wavy(grid: Grid = BOX, amplitude_mm: float = 8.0) -> torch.Tensor:
    """Waves of 100 mm and longer, up to the border of the grid."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1)[..., ::-1]
    x, y, z = np.moveaxis(grid.to_world(index), -1, 0)
    waves = [np.sin(0.06 * y + 0.3), np.cos(0.05 * z), np.sin(0.05 * x - 0.03 * z + 1)]
    return amplitude_mm * torch.from_numpy(np.stack(waves)).float()[None]


WAVY = Transform(wavy(), BOX, AFFINE)


def lungs_at(corner_mm: np.ndarray, number: int = 30) -> LungMask:
    """A block of ``number``³ voxels of 2.5 mm."""
    x, y, z = corner_mm.tolist()
    grid = Grid((number, number, number), (2.5, 2.5, 2.5), (x, y, z))
    return LungMask(torch.ones(1, 1, *grid.shape, dtype=torch.bool), grid)


FIXED_LUNGS = lungs_at(BOX.to_world(np.array([12, 8, 8])))
MOVING_LUNGS = lungs_at(AFFINE(BOX.to_world(np.array([12, 8, 8]))), 26)
"""Smaller: the moving scan is the expiration."""


def rising(grid: Grid) -> ExpectedError:
    """0.5 mm at the first voxel along x, 0.1 mm more at each further one; nothing is said of the last two along z."""
    known = torch.ones(1, 1, *grid.shape)
    known[:, :, -2:] = 0
    return ExpectedError((0.5 + 0.1 * torch.arange(grid.size[0])).expand(1, 1, *grid.shape).contiguous(), known, grid)


EXPECTED = rising(FIXED_LUNGS.grid.coarsened(2))
MODEL = ErrorModel(constant=-0.2, around=0.9, volume=-0.4)


def write_result(folder: Path, transform: Transform = WAVY, expected: ExpectedError | None = EXPECTED) -> Path:
    """Transforms and results.json, as a run leaves them; no images."""
    folder.mkdir(exist_ok=True)
    whole = framed(transform)
    write_transform(folder / TRANSFORMS[0], whole, FIXED_LUNGS, expected)
    write_inverse(folder / TRANSFORMS[1], remembered(inverse)(whole, MOVING_LUNGS), MOVING_LUNGS)
    figures = {
        "version": "0.1.0",
        "timings_s": {"total": 1.0},
        "warnings": [],
        "fixed": "now.mha",
        "moving": "before.mha",
        "inverse_residual_mm": {"mean": 0.0, "p99": 0.0, "max": 0.0},
        "grids": {"fixed": asdict(FIXED), "moving": asdict(MOVING)},
    }
    (folder / "results.json").write_text(json.dumps(figures))
    return folder


def points_in(grid: Grid, number: int = 500, margin: float = 0.0) -> np.ndarray:
    """World positions within the outermost voxel centres, ``margin`` voxels farther in."""
    rng = np.random.default_rng(0)
    last = np.array(grid.size) - 1
    return grid.to_world(margin + rng.random((number, 3)) * (last - 2 * margin))


def blobs(grid: Grid, dtype: str) -> np.ndarray:
    """Smooth noise, -1000 to some hundreds; or labels 0 to 3."""
    rng = np.random.default_rng(1)
    smooth = sitk.GetArrayFromImage(
        sitk.DiscreteGaussian(sitk_image(rng.normal(size=grid.shape), Grid(grid.size)), variance=4.0)
    )
    smooth = smooth / np.abs(smooth).max()
    return (
        np.digitize(smooth, [-0.2, 0.0, 0.2]).astype(dtype) if dtype == "uint8" else (smooth * 900 - 500).astype(dtype)
    )

"""A pair as files in any format, and its folder in our format."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from algorithm.errors import InputError
from algorithm.files.images import Image, read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Grid
from algorithm.preparation.subject import given_lungs

log = logging.getLogger("training.datasets")

AIR_BELOW_HU, TISSUE_ABOVE_HU, LEAST_SHARE = -700, -200, 0.005
"""Every chest CT in HU has at least this share of its voxels below the first and above the second value."""
LEAST_RAW_HU = -1024
"""Lower limit of the values of raw files, which may have lower values where nothing was reconstructed."""


@dataclass(frozen=True)
class ScanFiles:
    """One scan of a pair: its file, with grid, lung mask and landmarks."""

    image: Path
    raw: Grid | None = None
    """The grid of a file that has only little-endian int16 voxels; None: the file has a header."""
    mask: Path | None = None
    """Lung mask."""
    landmarks_vox: Float[np.ndarray, "n 3"] | None = None
    """Voxel indices (x, y, z) from 0, along the stored axes."""


@dataclass(frozen=True)
class PairFiles:
    """The files of a pair, and the name of its folder."""

    name: str
    fixed: ScanFiles
    moving: ScanFiles

    def swapped(self) -> "PairFiles":
        """The same pair, for registration in the other direction."""
        return PairFiles(f"{self.name}_swapped", self.moving, self.fixed)


def present(path: Path) -> Path:
    """The path itself; InputError if it is not a file."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file (a DICOM series must be converted first)")
    if not path.is_file():
        raise InputError(f"{path}: is missing, expected a file")
    return path


def write_pair(out: Path, pair: PairFiles, hu_offset: int) -> None:
    """Write the folder OUT/<pair>, completely or not at all; InputError if one of its files is not as expected."""
    fixed, moving = (0 if s.landmarks_vox is None else len(s.landmarks_vox) for s in (pair.fixed, pair.moving))
    if fixed != moving:
        raise InputError(f"{pair.name}: has {fixed} fixed and {moving} moving landmarks, expected as many of each")
    partial = out / f".partial-{pair.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        fixed_mm = _write_scan(partial, "fixed", pair.fixed, hu_offset)
        moving_mm = _write_scan(partial, "moving", pair.moving, hu_offset)
        partial.rename(out / pair.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if fixed_mm is None or moving_mm is None:
        log.info("%s: no landmarks", pair.name)
    else:
        apart = float(np.linalg.norm(fixed_mm - moving_mm, axis=1).mean())
        log.info("%s: %d landmarks, %.2f mm apart", pair.name, len(fixed_mm), apart)


def _write_scan(folder: Path, name: str, files: ScanFiles, hu_offset: int) -> np.ndarray | None:
    """Write the files of one scan; return its landmarks (n, 3) in mm."""
    image = _read(files, hu_offset)
    write_image(folder / f"{name}.mha", image.voxels, image.grid)
    lungs = given_lungs(files.mask, image)
    if lungs is not None:
        write_image(folder / f"{name}_lung_mask.mha", lungs.mask.to(torch.uint8), lungs.grid)
    if files.landmarks_vox is None:
        return None
    points_mm = _landmarks_mm(files.landmarks_vox, image)
    table = pd.DataFrame(points_mm, columns=["x", "y", "z"])
    table.to_csv(folder / f"{name}_landmarks.csv", index=False, float_format="%.4f")
    return points_mm


def _landmarks_mm(index: np.ndarray, image: Image) -> np.ndarray:
    outside = ((index < -0.5) | (index >= np.array(image.grid.size) - 0.5)).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise InputError(
            f"{image.path}: has landmark {row + 1} at voxel {tuple(index[row].tolist())} (from 0), "
            f"expected it inside the {image.grid.size} voxels of the image"
        )
    return image.grid.to_world(index)


def _read(files: ScanFiles, hu_offset: int) -> Image:
    """The scan in HU, int16; InputError if the values do not look like HU of a chest."""
    image = read_image(files.image) if files.raw is None else _read_raw(files.image, files.raw)
    least = -(2**15) if files.raw is None else LEAST_RAW_HU
    hu = image.voxels.float().add_(hu_offset).round_().clamp_(least, 2**15 - 1).to(torch.int16)
    shares = [int(half.count_nonzero()) / hu.numel() for half in (hu < AIR_BELOW_HU, hu > TISSUE_ABOVE_HU)]
    if min(shares) < LEAST_SHARE:
        raise InputError(
            f"{files.image}: has {shares[0]:.1%} of its voxels below {AIR_BELOW_HU} HU and {shares[1]:.1%} above "
            f"{TISSUE_ABOVE_HU} HU, expected at least {LEAST_SHARE:.1%} of each; does --hu-offset fit?"
        )
    return replace(image, voxels=hu)


def _read_raw(path: Path, grid: Grid) -> Image:
    expected, length = 2 * int(np.prod(grid.size)), path.stat().st_size
    if length != expected:
        raise InputError(f"{path}: has {length} bytes, expected {expected}: {grid.size} voxels of int16")
    voxels = np.fromfile(path, dtype="<i2").astype(np.int16).reshape(grid.shape)
    return Image(torch.from_numpy(voxels)[None, None], grid, path)

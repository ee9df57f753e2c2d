"""Packed volumes for training: one .npz per scan or pair, small enough to travel, read with numpy alone.

    python -m training.data SCANS OUT            single scans (files) to train on
    python -m training.data --pairs PAIRS OUT    pairs (folders with fixed, moving, *_landmarks.csv) to validate on

A scan lies on its network grid (the box around its lungs). HU of the lung window take 7 bits (9 HU per step, less than
the noise), the lung mask takes 1 bit: about 3 MB. A pair is prepared as in the algorithm. Its moving landmarks stay in
the moving world.
"""

import argparse
import bz2
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.cascade.network import WINDOW_HU, CascadeSettings
from algorithm.errors import InputError, exit_code
from algorithm.geometry import Affine, Grid, displacement_at, downsample_by

log = logging.getLogger(__name__)

LOW_HU, HIGH_HU = WINDOW_HU
SEVEN_BITS = 127


@dataclass(frozen=True)
class TrainingScan:
    """One scan on its network grid."""

    name: str
    voxels: Float[Tensor, "1 1 z y x"]
    """HU."""
    lungs: Float[Tensor, "1 1 z y x"]
    grid: Grid

    def reduced(self, factor: int) -> "TrainingScan":
        """The scan at 1/factor of its resolution."""
        voxels, lungs = downsample_by(self.voxels, factor), downsample_by(self.lungs, factor)
        return replace(self, voxels=voxels, lungs=lungs, grid=self.grid.coarsened(factor))


@dataclass(frozen=True)
class ValidationPair:
    """A prepared pair with landmarks."""

    name: str
    fixed: Float[Tensor, "1 1 z y x"]
    grid: Grid
    moving: Float[Tensor, "1 1 zm ym xm"]
    """Pre-aligned, HU."""
    moving_grid: Grid
    affine: Affine
    fixed_landmarks_mm: np.ndarray
    moving_landmarks_mm: np.ndarray

    def tre_mm(self, displacement: Float[Tensor, "1 3 z y x"] | None = None, grid: Grid | None = None) -> np.ndarray:
        """Landmark errors (n,) of affine(x + u(x)), in mm; None means u = 0."""
        points = self.fixed_landmarks_mm
        if displacement is not None:
            points = points + displacement_at(torch.tensor(points), displacement, grid or self.grid).numpy()
        error: np.ndarray = np.linalg.norm(self.affine(points) - self.moving_landmarks_mm, axis=1)
        return error


def load_scan(path: Path) -> TrainingScan:
    """Load a packed scan."""
    with np.load(path) as data:
        grid = packed_grid(data)
        bits = np.frombuffer(bz2.decompress(data["lungs"].tobytes()), np.uint8)
        lungs = np.unpackbits(bits, count=math.prod(grid.shape)).reshape(grid.shape)
        return TrainingScan(
            path.stem, _unpacked(data["voxels"], grid), torch.from_numpy(lungs)[None, None].float(), grid
        )


def load_validation_pair(path: Path) -> ValidationPair:
    """Load a packed pair."""
    with np.load(path) as data:
        grid, moving_grid = packed_grid(data, "fixed_"), packed_grid(data, "moving_")
        return ValidationPair(
            path.stem,
            _unpacked(data["fixed"], grid),
            grid,
            _unpacked(data["moving"], moving_grid),
            moving_grid,
            Affine.from_arrays(data["matrix"], data["offset"]),
            data["fixed_landmarks"],
            data["moving_landmarks"],
        )


def hu(codes: np.ndarray, highest: int = 255) -> Float[Tensor, "1 1 z y x"]:
    """Codes from 0 to ``highest`` → HU of the lung window."""
    return torch.from_numpy(codes)[None, None].float() * ((HIGH_HU - LOW_HU) / highest) + LOW_HU


def codes(voxels: Float[Tensor, "1 1 z y x"], highest: int = 255) -> np.ndarray:
    """HU → codes from 0 to ``highest`` over the lung window, 8 bits each."""
    scaled = (voxels[0, 0].clamp(LOW_HU, HIGH_HU) - LOW_HU) * (highest / (HIGH_HU - LOW_HU))
    rounded: np.ndarray = scaled.round().to(torch.uint8).numpy()
    return rounded


def _packed(voxels: Float[Tensor, "1 1 z y x"]) -> np.ndarray:
    """7-bit codes, compressed by bzip2: a fifth smaller than in a compressed .npz."""
    return np.frombuffer(bz2.compress(codes(voxels, SEVEN_BITS).tobytes()), np.uint8)


def _unpacked(packed: np.ndarray, grid: Grid) -> Float[Tensor, "1 1 z y x"]:
    values = np.frombuffer(bz2.decompress(packed.tobytes()), np.uint8)
    return hu(values.reshape(grid.shape).copy(), SEVEN_BITS)


def grid_arrays(grid: Grid, prefix: str = "") -> dict[str, np.ndarray]:
    """A grid as arrays. Their names begin with ``prefix``."""
    return {prefix + name: np.array(value) for name, value in asdict(grid).items()}


def packed_grid(data: Mapping[str, np.ndarray], prefix: str = "") -> Grid:
    """Inverse of `grid_arrays`."""
    size, spacing, origin = (data[prefix + name].tolist() for name in ("size", "spacing", "origin"))
    direction = tuple(tuple(row) for row in data[prefix + "direction"].tolist())
    return Grid(tuple(size), tuple(spacing), tuple(origin), direction)  # type: ignore[arg-type]


def pack_scan(source: Path, target: Path) -> None:
    """One scan → one .npz."""
    from algorithm.files.images import canonical, read_image
    from algorithm.geometry import resample_image
    from algorithm.lungs import crop_grid, lung_mask
    from algorithm.preparation.prepare import PrepareSettings

    image = canonical(read_image(source))
    lungs = lung_mask(image.voxels, image.grid, str(source))
    grid = crop_grid(lungs, PrepareSettings().margin_mm, CascadeSettings().network_size)
    voxels = resample_image(image.voxels, image.grid, grid, least=LOW_HU, fill=LOW_HU)
    mask = resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0) > 0.5
    bits = bz2.compress(np.packbits(mask.numpy()).tobytes())
    save_arrays(target, {"voxels": _packed(voxels), "lungs": np.frombuffer(bits, np.uint8)} | grid_arrays(grid))


def pack_pair(source: Path, target: Path) -> None:
    """One folder with a pair and its landmarks → one .npz."""
    from algorithm.files.images import read_image
    from algorithm.preparation.prepare import prepare
    from algorithm.preparation.subject import find_lungs
    from evaluation.landmarks import find_landmarks, read_landmarks

    fixed, moving = (find_lungs(read_image(source / f"{name}.mha"), None) for name in ("fixed", "moving"))
    pair = prepare(fixed, moving, CascadeSettings().network_size)
    landmarks = {f"{name}_landmarks": read_landmarks(find_landmarks(source, name)) for name in ("fixed", "moving")}
    arrays = {
        "fixed": _packed(pair.fixed),
        "moving": _packed(pair.moving),
        "matrix": np.array(pair.affine.matrix),
        "offset": np.array(pair.affine.offset),
    }
    save_arrays(
        target, arrays | landmarks | grid_arrays(pair.grid, "fixed_") | grid_arrays(pair.moving_grid, "moving_")
    )


def save_arrays(target: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write one .npz with exactly this name, completely or not at all."""
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    partial.replace(target)


def main() -> None:
    """Pack every scan (or pair) that is not packed yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="SOURCE holds folders with pairs")
    parser.add_argument("source", type=Path, nargs="+", help="files, or folders with --pairs")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    targets = [arguments.out / f"{source.name.split('.')[0]}.npz" for source in arguments.source]
    same = sorted({target.name for target in targets if targets.count(target) > 1})
    if same:
        raise InputError(f"several sources would become {', '.join(same)}: give them names of their own")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source, target in zip(arguments.source, targets, strict=True):
        if not target.exists():
            (pack_pair if arguments.pairs else pack_scan)(source, target)
            log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))

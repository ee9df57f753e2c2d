"""Packed volumes for training: one .npz per scan or pair, small enough to travel, read with numpy alone.

    python -m training.data SCANS OUT            single scans (files) to train on
    python -m training.data --pairs PAIRS OUT    pairs (folders with fixed, moving, *_landmarks.csv) to validate on

A scan lies on its network grid (the box around its lungs); HU of the lung window in 8 bits, -1000 + 1200 v / 255, lung
mask in 1 bit. A pair is prepared as the algorithm does it; its moving landmarks are kept in the moving world.
"""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from algorithm.geometry import Affine, Grid, displacement_at
from algorithm.network import WINDOW_HU, CascadeSettings

log = logging.getLogger(__name__)

LOW_HU, HIGH_HU = WINDOW_HU


@dataclass(frozen=True)
class TrainingScan:
    """One scan on its network grid."""

    name: str
    voxels: Float[Tensor, "1 1 z y x"]
    """HU."""
    lungs: Float[Tensor, "1 1 z y x"]
    grid: Grid


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
        """Landmark errors (n,) of affine(x + u(x)), mm; None: u = 0."""
        points = self.fixed_landmarks_mm
        if displacement is not None:
            points = points + displacement_at(torch.tensor(points), displacement, grid or self.grid).numpy()
        error: np.ndarray = np.linalg.norm(self.affine(points) - self.moving_landmarks_mm, axis=1)
        return error


def load_scan(path: Path) -> TrainingScan:
    """A packed scan."""
    with np.load(path) as data:
        lungs = np.unpackbits(data["lungs"], count=data["voxels"].size).reshape(data["voxels"].shape)
        return TrainingScan(path.stem, _hu(data["voxels"]), torch.from_numpy(lungs)[None, None].float(), _grid(data))


def load_pair(path: Path) -> ValidationPair:
    """A packed pair."""
    with np.load(path) as data:
        return ValidationPair(
            path.stem,
            _hu(data["fixed"]),
            _grid(data, "fixed_"),
            _hu(data["moving"]),
            _grid(data, "moving_"),
            Affine.from_arrays(data["matrix"], data["offset"]),
            data["fixed_landmarks"],
            data["moving_landmarks"],
        )


def _hu(codes: np.ndarray) -> Float[Tensor, "1 1 z y x"]:
    return torch.from_numpy(codes)[None, None].float() * ((HIGH_HU - LOW_HU) / 255) + LOW_HU


def _codes(voxels: Tensor) -> np.ndarray:
    scaled = (voxels[0, 0].clamp(LOW_HU, HIGH_HU) - LOW_HU) * (255 / (HIGH_HU - LOW_HU))
    codes: np.ndarray = scaled.round().to(torch.uint8).numpy()
    return codes


def _grid_arrays(grid: Grid, prefix: str = "") -> dict[str, np.ndarray]:
    return {prefix + name: np.array(value) for name, value in asdict(grid).items()}


def _grid(data: Mapping[str, np.ndarray], prefix: str = "") -> Grid:
    size, spacing, origin = (data[prefix + name].tolist() for name in ("size", "spacing", "origin"))
    direction = tuple(tuple(row) for row in data[prefix + "direction"].tolist())
    return Grid(tuple(size), tuple(spacing), tuple(origin), direction)  # type: ignore[arg-type]


def pack_scan(source: Path, target: Path) -> None:
    """One scan → one .npz."""
    from algorithm.geometry import resample_image
    from algorithm.images import canonical, read_image
    from algorithm.lungs import crop_grid, lung_mask
    from algorithm.prepare import PrepareSettings

    image = canonical(read_image(source))
    lungs = lung_mask(image.voxels, image.grid, str(source))
    grid = crop_grid(lungs, PrepareSettings().margin_mm, CascadeSettings().network_size)
    voxels = resample_image(image.voxels, image.grid, grid, least=LOW_HU, fill=LOW_HU)
    mask = resample_image(lungs.mask, lungs.grid, grid, least=0.0, fill=0.0) > 0.5
    _save(target, {"voxels": _codes(voxels), "lungs": np.packbits(mask.numpy())} | _grid_arrays(grid))


def pack_pair(source: Path, target: Path) -> None:
    """One folder with a pair and its landmarks → one .npz."""
    import pandas as pd

    from algorithm.images import read_image
    from algorithm.prepare import prepare, subject

    fixed, moving = (subject(read_image(source / f"{name}.mha"), None) for name in ("fixed", "moving"))
    pair = prepare(fixed, moving, CascadeSettings().network_size)
    landmarks = {
        f"{name}_landmarks": pd.read_csv(source / f"{name}_landmarks.csv")[["x", "y", "z"]].to_numpy()
        for name in ("fixed", "moving")
    }
    arrays = {
        "fixed": _codes(pair.fixed),
        "moving": _codes(pair.moving),
        "matrix": np.array(pair.affine.matrix),
        "offset": np.array(pair.affine.offset),
    }
    _save(target, arrays | landmarks | _grid_arrays(pair.grid, "fixed_") | _grid_arrays(pair.moving_grid, "moving_"))


def _save(target: Path, arrays: dict[str, np.ndarray]) -> None:
    with target.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def main() -> None:
    """Packs every scan (or pair) that is not packed yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="SOURCE holds folders with pairs")
    parser.add_argument("source", type=Path, nargs="+", help="files, or folders with --pairs")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for source in arguments.source:
        target = arguments.out / f"{source.name.split('.')[0]}.npz"
        if not target.exists():
            (pack_pair if arguments.pairs else pack_scan)(source, target)
            log.info("%s: %.1f MB", target, target.stat().st_size / 1e6)


if __name__ == "__main__":
    main()

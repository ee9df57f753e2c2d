"""Time, memory and error on a full-size scan against a deformed copy of itself.

    python -m benchmarks.full_size SCAN OUT [-- OPTIONS OF python -m algorithm]

The copy is moving(y) = scan(y + w(y)), w a smooth known motion of up to 15 mm, largest at the lower end; so the fixed
point y + w(y) belongs to the moving point y, exactly. The error is taken at 1000 random points of the lungs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from algorithm.geometry import Grid
from algorithm.images import Image, canonical, read_image, write_image_slabs
from algorithm.lungs import lung_mask
from algorithm.transform import Transform
from benchmarks.landmarks import through_written_field


def motion_mm(points: np.ndarray, grid: Grid) -> np.ndarray:
    """w at world points (n, 3): waves over half the extent of the scan, more of it towards the feet."""
    index = grid.to_index(points) / np.array(grid.size)
    x, y, z = 2 * np.pi * index.T
    fall = 1 - np.clip(index[:, 2], 0, 1)
    return np.stack([3 * np.sin(y + z), 4 * fall * np.cos(x + z), 12 * fall**2 + 3 * np.sin(x) * np.cos(y)], axis=1)


def deformed(scan: Image) -> Transform:
    """The motion on a grid of a fifth of the resolution."""
    grid = scan.grid.resized((scan.grid.size[0] // 5, scan.grid.size[1] // 5, scan.grid.size[2] // 5))
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.size), indexing="ij"), axis=-1).reshape(-1, 3)
    values = motion_mm(grid.to_world(index), scan.grid).reshape(*grid.size, 3)
    field = torch.from_numpy(values.transpose(3, 2, 1, 0).astype(np.float32))[None]
    return Transform(field.contiguous(), grid)


def correspondences(scan: Image, number: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving points (n, 3), the fixed ones in the lungs."""
    lungs = lung_mask(scan.voxels, scan.grid)
    index = lungs.mask[0, 0].nonzero().numpy()[:, ::-1]
    chosen = np.random.default_rng(0).choice(len(index), number, replace=False)
    fixed = lungs.grid.to_world(index[chosen])
    moving = fixed.copy()
    for _ in range(50):  # y = x - w(y)
        moving = fixed - motion_mm(moving, scan.grid)
    return fixed, moving


def main() -> None:
    """Prints time, memory and error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("out", type=Path)
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    scan = canonical(read_image(arguments.scan))
    arguments.out.mkdir(parents=True, exist_ok=True)
    moving = arguments.out / "deformed.mha"
    write_image_slabs(moving, scan.grid, deformed(scan).warped_slabs(scan, scan.grid), scan.voxels.dtype)
    fixed_mm, moving_mm = correspondences(scan)
    start = time.monotonic()
    command = [sys.executable, "-m", "algorithm", f"--fixed={arguments.scan}", f"--moving={moving}"]
    command += [f"--output={arguments.out}", "--field-layout=itk", *sys.argv[separator + 1 :]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    results = json.loads((arguments.out / "results.json").read_text())
    error = np.linalg.norm(through_written_field(arguments.out, fixed_mm) - moving_mm, axis=1)
    before = np.linalg.norm(fixed_mm - moving_mm, axis=1)
    print(f"{sitk.ReadImage(str(moving)).GetSize()} voxels: {seconds:.1f} s, {results['peak_memory_mb']} MB")
    print(f"timings {results['timings_s']}")
    print(f"error {before.mean():.2f} mm before, {error.mean():.2f} mm after")


if __name__ == "__main__":
    main()

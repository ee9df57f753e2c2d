"""Time, memory and error on a full-size scan against a deformed copy of itself.

python -m benchmarks.full_size SCAN OUT [--size X Y Z] [-- OPTIONS OF python -m algorithm]

With ``--size``, the scan is first resampled to X × Y × Z voxels in the same box and written to OUT. The copy is
moving(y) = scan(y + w(y)), where w is a smooth known motion of up to 15 mm, largest at the lower end. So the fixed
point y + w(y) corresponds exactly to the moving point y. The error is measured at 1000 random points of the lungs.

Prints time (s) and peak memory (MB) of the process for each stage, the imports first. For comparison, it also prints
the time to copy the same bytes: both images read, field and warped image written.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch

from algorithm.fields.transform import Transform
from algorithm.files.images import Image, canonical, read_image
from algorithm.files.writing import write_image_slabs
from algorithm.geometry import Grid
from algorithm.lungs import lung_mask

BLOCK = 2**24
"""Number of bytes that `copy_seconds` copies at a time."""


def motion_mm(points: np.ndarray, grid: Grid) -> np.ndarray:
    """w (mm) at world points (n, 3): waves with the period of the scan's extent, and a motion that grows towards the
    feet."""
    index = grid.to_index(points) / np.array(grid.size)
    x, y, z = 2 * np.pi * index.T
    fall = 1 - np.clip(index[:, 2], 0, 1)
    return np.stack([3 * np.sin(y + z), 4 * fall * np.cos(x + z), 12 * fall**2 + 3 * np.sin(x) * np.cos(y)], axis=1)


def deformed(scan: Image) -> Transform:
    """The motion on a grid with a fifth of the resolution."""
    grid = scan.grid.resized((scan.grid.size[0] // 5, scan.grid.size[1] // 5, scan.grid.size[2] // 5))
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.size), indexing="ij"), axis=-1).reshape(-1, 3)
    values = motion_mm(grid.to_world(index), scan.grid).reshape(*grid.size, 3)
    field = torch.from_numpy(values.transpose(3, 2, 1, 0).astype(np.float32))[None]
    return Transform(field.contiguous(), grid)


def resampled(scan: Path, target: Path, size: tuple[int, int, int]) -> None:
    """Write the scan with another number of voxels in the same box, slab by slab."""
    image = canonical(read_image(scan))
    still = Transform(torch.zeros(1, 3, 2, 2, 2), image.grid.resized((2, 2, 2)))
    grid = image.grid.resized(size)
    write_image_slabs(target, grid, still.warped_slabs(image, grid), image.voxels.dtype)


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


def prepare_pair(arguments: argparse.Namespace) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """Files of the fixed and the moving image, and corresponding points."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    fixed, moving = arguments.scan, out / "deformed.mha"
    if arguments.size:
        fixed = out / "scan.mha"
        resampled(arguments.scan, fixed, tuple(arguments.size))
    scan = canonical(read_image(fixed))
    write_image_slabs(moving, scan.grid, deformed(scan).warped_slabs(scan, scan.grid), scan.voxels.dtype)
    return fixed, moving, *correspondences(scan)


@dataclass
class Stage:
    """A stage of a process, with the name that it logs."""

    name: str
    started: float
    seconds: float = 0.0
    peak_mb: float = 0.0


def run_watched(command: list[str]) -> list[Stage]:
    """Run the algorithm; a stage begins when it logs "NAME ...". Linux only, because the kernel records the peak."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stages = [Stage("start", time.monotonic())]
        for line in process.stdout:
            name = re.fullmatch(r"([a-z ]+) \.\.\.\n|(done): .*\n", line)
            if name:
                ended(stages[-1], process.pid)
                stages.append(Stage(name[1] or name[2], time.monotonic()))
        stages[-1].seconds = time.monotonic() - stages[-1].started
    if process.returncode:
        raise SystemExit(process.returncode)
    return stages[:-1]


def ended(stage: Stage, pid: int) -> None:
    """Record time and peak memory, and reset the peak in the kernel."""
    stage.seconds = time.monotonic() - stage.started
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    stage.peak_mb = int(peak[1]) / 1024 if peak else float("nan")
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def copy_seconds(inputs: list[Path], outputs: list[Path]) -> float:
    """Time to read the inputs, and to write and flush files of the size of the outputs, block by block."""
    start = time.monotonic()
    for path in inputs:
        with path.open("rb") as file:
            while file.read(BLOCK):
                pass
    for path in outputs:
        copy = path.with_suffix(".copy")
        with path.open("rb") as source, copy.open("wb") as target:
            while block := source.read(BLOCK):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        copy.unlink()
    return time.monotonic() - start


def displaced(path: Path, points_mm: np.ndarray) -> np.ndarray:
    """Points (n, 3) mapped by the 3-D vector field in a file, trilinear; only the voxels around each are read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetOutputPixelType(sitk.sitkVectorFloat64)
    reader.ReadImageInformation()
    size = np.array(reader.GetSize())
    header = sitk.Image(1, 1, 1, sitk.sitkUInt8)
    header.SetOrigin(reader.GetOrigin())
    header.SetSpacing(reader.GetSpacing())
    header.SetDirection(reader.GetDirection())
    mapped = []
    for point in points_mm.tolist():
        index = np.floor(header.TransformPhysicalPointToContinuousIndex(point)).astype(int)
        reader.SetExtractIndex(np.clip(index, 0, size - 2).tolist())
        reader.SetExtractSize([2, 2, 2])
        mapped.append(sitk.DisplacementFieldTransform(reader.Execute()).TransformPoint(point))
    return np.array(mapped)


def main() -> None:
    """Print time, memory and error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, nargs=3, metavar=("X", "Y", "Z"))
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    fixed, moving, fixed_mm, moving_mm = prepare_pair(arguments)
    command = [sys.executable, "-m", "algorithm", f"--fixed={fixed}", f"--moving={moving}"]
    command += [f"--output={arguments.out}", "--field-layout=itk", *sys.argv[separator + 1 :]]
    stages = run_watched(command)
    written = [
        arguments.out / "images" / name / f"{fixed.stem}.mha" for name in ("displacement-field", "warped-moving")
    ]
    copying = copy_seconds([fixed, moving], written)
    error = np.linalg.norm(displaced(written[0], fixed_mm) - moving_mm, axis=1)
    before = np.linalg.norm(fixed_mm - moving_mm, axis=1)
    table = pd.DataFrame([(stage.name, stage.seconds, stage.peak_mb) for stage in stages])
    table.columns = pd.Index(["stage", "s", "peak MB"])
    print(table.to_string(index=False, float_format=lambda value: f"{value:.1f}"))
    seconds, peak = sum(stage.seconds for stage in stages), max(stage.peak_mb for stage in stages)
    print(f"{sitk.ReadImage(str(moving)).GetSize()} voxels: {seconds:.1f} s, {peak:.0f} MB; a copy {copying:.1f} s")
    print(f"error {before.mean():.2f} mm before, {error.mean():.2f} mm after")


if __name__ == "__main__":
    main()

"""Tests whether the result depends on how a scan is stored and where it lies: registers one pair stored in many ways.

python -m benchmarks.invariance PAIR OUT [--variants NAME...] [-- OPTIONS OF python -m algorithm]

PAIR is a folder with fixed.mha and moving.mha; with fixed_landmarks.csv and moving_landmarks.csv (x, y, z in LPS mm)
landmark errors are printed too. A separate process registers each variant into OUT/<variant>. T is the transform of the
original pair; F and M are the rigid maps that moved the scans of the variant. The transform of the variant should be M
∘ T ∘ F⁻¹. The table has the mean, the 95th percentile and the maximum of the distance (mm) from it, over 2000 points of
the fixed lungs that the variant shows. Variants that change the data (other fields of view, other spacings) have no
such truth. For these, the landmark error counts, over the landmarks that both scans of the variant show.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch.nn.functional as F
from jaxtyping import Float

from algorithm.files.images import Image, canonical, read_image
from algorithm.files.writing import write_image
from algorithm.geometry import Affine, Grid, Size, moved, resample_image, restored
from algorithm.hounsfield import AIR_HU
from algorithm.lungs import lung_mask
from benchmarks.landmarks import command, landmarks_mm, through_written_field
from evaluation.landmarks import find_landmarks

POINTS = 2000
FAR_MM = (5000.0, -12000.0, 3000.0)


class Placed(NamedTuple):
    """A scan, and the map from the old positions of its voxels to the new ones."""

    image: Image
    world: Affine


Change = Callable[[Image], Placed]


def same(image: Image) -> Placed:
    """The unchanged scan."""
    return Placed(image, Affine())


def stored(axes: Size, flips: tuple[bool, bool, bool]) -> Change:
    """A change of storage: index axis a is the old axis ``axes[a]``, reversed if ``flips[a]``; world positions are
    unchanged."""

    def change(image: Image) -> Placed:
        voxels = image.voxels.permute(0, 1, *(4 - axes[a] for a in (2, 1, 0)))
        voxels = voxels.flip([4 - a for a in range(3) if flips[a]])
        return Placed(Image(voxels.contiguous(), restored(image.grid, axes, flips), image.path), Affine())

    return change


def carried(
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    degrees: float = 0.0,
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0),
) -> Change:
    """A rotation about the centre of the image, then a shift."""
    rotation = np.array(sitk.VersorTransform(axis, np.deg2rad(degrees)).GetMatrix()).reshape(3, 3)

    def change(image: Image) -> Placed:
        middle = image.grid.to_world((np.array(image.grid.size) - 1) / 2)
        world = Affine.from_arrays(rotation, middle - rotation @ middle + np.array(shift_mm))
        return Placed(Image(image.voxels, moved(image.grid, world), image.path), world)

    return change


def padded(value: float, margin: int = 10) -> Change:
    """Padding with ``margin`` voxels of ``value`` on every side."""

    def change(image: Image) -> Placed:
        voxels = F.pad(image.voxels, [margin] * 6, value=value)
        return Placed(Image(voxels, image.grid.padded(margin), image.path), Affine())

    return change


def cut(low: tuple[float, float, float], high: tuple[float, float, float]) -> Change:
    """A crop from ``low`` to ``high`` (shares of the extent) along x, y, z of the canonical storage order."""

    def change(image: Image) -> Placed:
        image = canonical(image)
        start, end = ([round(s * n) for s, n in zip(share, image.grid.size, strict=True)] for share in (low, high))
        x, y, z = start
        nx, ny, nz = (e - s for s, e in zip(start, end, strict=True))
        part = image.voxels[:, :, z : z + nz, y : y + ny, x : x + nx].contiguous()
        return Placed(Image(part, image.grid.cropped((x, y, z), (nx, ny, nz)), image.path), Affine())

    return change


def spaced(x_mm: float, y_mm: float, z_mm: float) -> Change:
    """Resampling to approximately this spacing along the canonical axes, with smoothing first if it becomes coarser."""

    def change(image: Image) -> Placed:
        image = canonical(image)
        nx, ny, nz = (round(e / s) for e, s in zip(image.grid.extent_mm, (x_mm, y_mm, z_mm), strict=True))
        grid = image.grid.resized((nx, ny, nz))
        hu = resample_image(image.voxels, image.grid, grid, least=AIR_HU, fill=AIR_HU)
        return Placed(Image(hu.round().short(), grid, image.path), Affine())

    return change


OBLIQUE = (1.0, 2.0, 3.0)
VARIANTS: dict[str, tuple[Change, Change]] = {
    "fixed flipped": (stored((0, 1, 2), (True, False, True)), same),
    "moving permuted": (same, stored((2, 0, 1), (False, False, False))),
    "both re-stored": (stored((1, 2, 0), (False, True, True)), stored((1, 0, 2), (True, False, False))),
    "moving metres away": (same, carried(FAR_MM)),
    "both metres away": (carried(FAR_MM), carried(FAR_MM)),
    "both turned 15°": (carried(degrees=15, axis=OBLIQUE), carried(degrees=15, axis=OBLIQUE)),
    "both turned 90°": (carried(degrees=90), carried(degrees=90)),
    "moving turned 10°": (same, carried(degrees=10, axis=OBLIQUE)),
    "moving turned 25°": (same, carried(degrees=25, axis=OBLIQUE)),
    "moving turned 40°": (same, carried(degrees=40, axis=OBLIQUE)),
    "moving turned 80°": (same, carried(degrees=80, axis=OBLIQUE)),
    "moving turned 150°": (same, carried(degrees=150, axis=OBLIQUE)),
    "moving turned 90°": (same, carried(FAR_MM, degrees=90)),
    "moving prone": (same, carried(degrees=180)),
    "padded with -1000": (padded(-1000), padded(-1000)),
    "padded with -2048": (padded(-2048), padded(-2048)),
    "moving padded with -3024": (same, padded(-3024)),
    "moving without lower half": (same, cut((0, 0, 0.5), (1, 1, 1))),
    "fixed without lower half": (cut((0, 0, 0.5), (1, 1, 1)), same),
    "moving without left half": (same, cut((0, 0, 0), (0.5, 1, 1))),
    "fixed without left half": (cut((0, 0, 0), (0.5, 1, 1)), same),
    "fixed 0.8 mm": (spaced(0.8, 0.8, 0.8), same),
    "both 3 mm": (spaced(3, 3, 3), spaced(3, 3, 3)),
    "moving 1×1×5 mm": (same, spaced(1, 1, 5)),
    "both 1×1×5 mm": (spaced(1, 1, 5), spaced(1, 1, 5)),
}
"""The changes of the fixed and the moving scan for each variant."""


def registered(fixed: Placed, moving: Placed, out: Path, options: list[str]) -> str:
    """Write the scans and register them; returns an empty text, or the message with which they were rejected."""
    out.mkdir(parents=True, exist_ok=True)
    for name, scan in (("fixed", fixed), ("moving", moving)):
        write_image(out / f"{name}.mha", scan.image.voxels, scan.image.grid)
    run = subprocess.run(command("algorithm", out, out, options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = run.stderr.decode().strip()
    if run.returncode not in (0, 2):
        raise RuntimeError(f"{out.name}: exit code {run.returncode}\n{said}")
    return said.splitlines()[-1] if run.returncode else ""


def shown(points_mm: Float[np.ndarray, "n 3"], grid: Grid) -> np.ndarray:
    """Whether points lie between the voxel centres of a grid, (n,)."""
    index = grid.to_index(points_mm)
    within: np.ndarray = np.all((index >= 0) & (index <= np.array(grid.size) - 1), axis=1)
    return within


def lung_points_mm(image: Image) -> Float[np.ndarray, "n 3"]:
    """Some random world positions in the lungs."""
    image = canonical(image)
    lungs = lung_mask(image.voxels, image.grid, str(image.path))
    index = lungs.mask[0, 0].nonzero().numpy()[:, ::-1]
    chosen = np.random.default_rng(0).choice(len(index), min(POINTS, len(index)), replace=False)
    points = lungs.grid.to_world(index[chosen])
    kept: np.ndarray = points[shown(points, image.grid)]
    return kept


def row(out: Path, fixed: Placed, moving: Placed, points: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Distances (mm) from ``expected`` of a variant's transform, mapped back to the original world coordinates."""
    seen = shown(fixed.world(points), fixed.image.grid)
    mapped = moving.world.inverse()(through_written_field(out, fixed.world(points[seen])))
    distance = np.linalg.norm(mapped - expected[seen], axis=1)
    results = json.loads((out / "results.json").read_text())
    return {
        "mean": float(distance.mean()),
        "p95": float(np.percentile(distance, 95)),
        "max": float(distance.max()),
        "folded": results["jacobian"]["folded_voxels"],
    }


def landmark_error(pair: Path, out: Path, fixed: Placed, moving: Placed) -> dict[str, float]:
    """Mean error (mm) over the landmarks that both scans show, and their number; empty without landmarks."""
    if not find_landmarks(pair, "fixed").exists():
        return {}
    here, there = (scan.world(points) for scan, points in zip((fixed, moving), landmarks_mm(pair), strict=True))
    seen = shown(here, fixed.image.grid) & shown(there, moving.image.grid)
    results = json.loads((out / "results.json").read_text())["prealignment"]
    affine = Affine.from_arrays(np.array(results["matrix"]), np.array(results["offset"]))
    errors = [np.linalg.norm(m[seen] - there[seen], axis=1) for m in (affine(here), through_written_field(out, here))]
    return {"landmarks": int(seen.sum()), "pre-aligned": float(errors[0].mean()), "after": float(errors[1].mean())}


def main() -> None:
    """Print the table row by row, with the warnings below each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    options = sys.argv[separator + 1 :]
    images = [read_image(arguments.pair / f"{name}.mha") for name in ("fixed", "moving")]
    points = lung_points_mm(images[0])
    expected = points
    for name in ("as it is", *arguments.variants):
        changes = VARIANTS.get(name, (same, same))
        fixed, moving = (change(image) for change, image in zip(changes, images, strict=True))
        out = arguments.out / name
        if refusal := registered(fixed, moving, out, options):
            print(f"{name}: refused. {refusal}", flush=True)
            if name not in VARIANTS:
                sys.exit(2)
            continue
        if name not in VARIANTS:
            expected = through_written_field(out, points)
        values = row(out, fixed, moving, points, expected) | landmark_error(arguments.pair, out, fixed, moving)
        print(pd.DataFrame([values], index=[name]).to_string(float_format=lambda value: f"{value:.4g}"), flush=True)
        for warning in json.loads((out / "results.json").read_text())["warnings"]:
            print(f"    {warning}", flush=True)


if __name__ == "__main__":
    main()

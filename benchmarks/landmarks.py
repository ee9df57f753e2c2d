"""Landmark errors of whole runs of the algorithm, from the written fields.

    python -m benchmarks.landmarks OUT PAIR... [--method algorithm|ruehaak] [-- OPTIONS OF python -m algorithm]

PAIR is a folder with fixed.mha, moving.mha, fixed_landmarks.csv, moving_landmarks.csv (x, y, z in LPS mm). Each is
registered in a process of its own into OUT/<name of the folder>; the table gives the mean error (mm) before, after the
pre-alignment, after all, with standard deviation and 95th percentile; folded voxels and the smallest Jacobian
determinant on the whole output grid; time (s) and memory (MB) of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from algorithm.geometry import Affine


def landmarks_mm(pair: Path) -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving landmarks, each (n, 3)."""
    fixed, moving = (pd.read_csv(pair / f"{n}_landmarks.csv")[["x", "y", "z"]].to_numpy() for n in ("fixed", "moving"))
    return fixed, moving


def through_written_field(output: Path, points_mm: np.ndarray) -> np.ndarray:
    """Points (n, 3) mapped by the 3-D vector field in OUTPUT, as SimpleITK applies it."""
    (path,) = (output / "images" / "displacement-field").glob("*.mha")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint(p) for p in points_mm.tolist()])


def command(method: str, pair: Path, output: Path, options: list[str]) -> list[str]:
    """What runs one pair."""
    fixed, moving = pair / "fixed.mha", pair / "moving.mha"
    if method == "ruehaak":
        return [sys.executable, "-m", "baselines.ruehaak", str(fixed), str(moving), str(output), *options]
    files = [f"--fixed={fixed}", f"--moving={moving}", f"--output={output}", "--field-layout=itk"]
    return [sys.executable, "-m", "algorithm", *files, *options]


def measure(method: str, pair: Path, output: Path, options: list[str]) -> dict[str, float | str]:
    """One row of the table."""
    start = time.monotonic()
    subprocess.run(command(method, pair, output, options), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    results = json.loads((output / "results.json").read_text())
    fixed, moving = landmarks_mm(pair)
    affine = Affine.from_arrays(*(np.array(results["prealignment"][name]) for name in ("matrix", "offset")))
    error = np.linalg.norm(through_written_field(output, fixed) - moving, axis=1)
    return {
        "pair": pair.name,
        "before": float(np.linalg.norm(fixed - moving, axis=1).mean()),
        "pre-aligned": float(np.linalg.norm(affine(fixed) - moving, axis=1).mean()),
        "after": float(error.mean()),
        "sd": float(error.std()),
        "p95": float(np.percentile(error, 95)),
        "folded": results["jacobian"]["folded_voxels"],
        "jacobian_min": results["jacobian"]["jacobian_min_everywhere"],
        "warnings": len(results["warnings"]),
        "refine_s": results["timings_s"].get("refine", results["timings_s"].get("minimise", 0.0)),
        "process_s": seconds,
        "peak_mb": results["peak_memory_mb"],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--method", choices=("algorithm", "ruehaak"), default="algorithm")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    options = sys.argv[separator + 1 :]
    rows = [measure(arguments.method, pair, arguments.out / pair.name, options) for pair in arguments.pairs]
    print(pd.DataFrame(rows).set_index("pair").to_string(float_format=lambda value: f"{value:.4g}"))
    print(f"largest memory of any process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()

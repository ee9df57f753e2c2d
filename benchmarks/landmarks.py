"""Landmark errors of whole runs of the algorithm, from the written fields.

    python -m benchmarks.landmarks OUT PAIR... [-- OPTIONS OF python -m algorithm]

PAIR is a folder with fixed.mha, moving.mha, fixed_landmarks.csv, moving_landmarks.csv (x, y, z in LPS mm). Each is
registered in a process of its own into OUT/<name of the folder>; the table gives the mean error (mm) before, after the
pre-alignment, after all, with standard deviation and 95th percentile, and time (s) and memory (MB) of the process.
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


def measure(pair: Path, output: Path, options: list[str]) -> dict[str, float | str]:
    """One row of the table."""
    start = time.monotonic()
    files = [f"--{name}={pair / name}.mha" for name in ("fixed", "moving")]
    command = [sys.executable, "-m", "algorithm", *files, f"--output={output}", "--field-layout=itk", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
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
        "folding_fraction": results["quality"]["folding_fraction"],
        "cascade_s": results["timings_s"]["cascade"],
        "process_s": seconds,
        "peak_mb": results["peak_memory_mb"],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    rows = [measure(pair, arguments.out / pair.name, sys.argv[separator + 1 :]) for pair in arguments.pairs]
    print(pd.DataFrame(rows).set_index("pair").to_string(float_format=lambda value: f"{value:.4g}"))
    print(f"largest memory of any process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()

"""Landmark errors of whole runs of the algorithm, from the written fields.

    python -m benchmarks.landmarks OUT PAIR... [--method algorithm|ruehaak|refinement] [-- OPTIONS OF THE METHOD]
    python -m benchmarks.landmarks OUT PAIR... --method greedy|convexadam --python PEERS/bin/python

PAIR is a folder with fixed.mha, moving.mha, fixed_landmarks.csv and moving_landmarks.csv (x, y, z in LPS mm, or 3D
Slicer's .fcsv or .mrk.json). A separate process registers each pair into OUT/<name of the folder>. The table has
the mean error (mm) before, after the pre-alignment, and at the end with standard deviation and 95th percentile; folded
voxels and the smallest Jacobian determinant on the whole output grid; time (s) and memory (MB) of the process. For
other programs (`benchmarks.peers`, which describes their environment PEERS), it has error, time and memory.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from algorithm.geometry import Affine
from evaluation.landmarks import find_landmarks, read_landmarks

BASELINES = ("ruehaak", "refinement")
PEERS = ("greedy", "convexadam")
FIELD = Path("images") / "displacement-field"


def landmarks_mm(pair: Path) -> tuple[np.ndarray, np.ndarray]:
    """Fixed and moving landmarks, each (n, 3)."""
    fixed, moving = (read_landmarks(find_landmarks(pair, role)) for role in ("fixed", "moving"))
    return fixed, moving


def through_written_field(output: Path, points_mm: np.ndarray) -> np.ndarray:
    """Points (n, 3) mapped by the 3-D vector field in OUTPUT, as SimpleITK applies it."""
    (path,) = (output / FIELD).glob("*.mha")
    transform = sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return np.array([transform.TransformPoint(p) for p in points_mm.tolist()])


def command(method: str, pair: Path, output: Path, options: list[str], python: str = sys.executable) -> list[str]:
    """The command that registers one pair."""
    fixed, moving = str(pair / "fixed.mha"), str(pair / "moving.mha")
    if method in BASELINES:
        return [python, "-m", "baselines.ruehaak", fixed, moving, str(output), f"--method={method}", *options]
    if method in PEERS:
        return [python, "-m", "benchmarks.peers", method, fixed, moving, str(output / FIELD / "fixed.mha")]
    files = [f"--fixed={fixed}", f"--moving={moving}", f"--output={output}", "--field-layout=itk"]
    return [python, "-m", "algorithm", *files, *options]


def timed(command: list[str]) -> tuple[float, float]:
    """Time (s) and largest memory (MB) of a process; CalledProcessError if it fails."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - start, usage.ru_maxrss / 1024


def measure(method: str, pair: Path, output: Path, options: list[str], python: str) -> dict[str, float | str]:
    """One row of the table."""
    seconds, megabytes = timed(command(method, pair, output, options, python))
    fixed, moving = landmarks_mm(pair)
    error = np.linalg.norm(through_written_field(output, fixed) - moving, axis=1)
    row: dict[str, float | str] = {
        "pair": pair.name,
        "before": float(np.linalg.norm(fixed - moving, axis=1).mean()),
        "after": float(error.mean()),
        "sd": float(error.std()),
        "p95": float(np.percentile(error, 95)),
        "max": float(error.max()),
        "beyond_5_mm": float((error > 5).mean()),
        "process_s": seconds,
        "peak_mb": megabytes,
    }
    return row if method in PEERS else row | reported(output, fixed, moving)


def reported(output: Path, fixed_mm: np.ndarray, moving_mm: np.ndarray) -> dict[str, float | str]:
    """The figures from results.json."""
    results = json.loads((output / "results.json").read_text())
    affine = Affine.from_arrays(*(np.array(results["prealignment"][name]) for name in ("matrix", "offset")))
    return {
        "pre-aligned": float(np.linalg.norm(affine(fixed_mm) - moving_mm, axis=1).mean()),
        "folded": results["jacobian"]["folded_voxels"],
        "jacobian_min": results["jacobian"]["jacobian_min_everywhere"],
        "warnings": len(results["warnings"]),
        "refine_s": results["timings_s"].get("refine", results["timings_s"].get("minimise", 0.0)),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--method", choices=("algorithm", *BASELINES, *PEERS), default="algorithm")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the environment of greedy or convexadam"
    )
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    options = sys.argv[separator + 1 :]
    rows = [
        measure(arguments.method, pair, arguments.out / pair.name, options, arguments.python)
        for pair in arguments.pairs
    ]
    print(pd.DataFrame(rows).set_index("pair").to_string(float_format=lambda value: f"{value:.4g}"))


if __name__ == "__main__":
    main()

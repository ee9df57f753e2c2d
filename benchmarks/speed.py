"""Time of each stage beside the machine's minimum, and whole processes beside other programs, with their errors.

    python -m benchmarks.speed OUT PAIR... [--python PEERS/bin/python] [--stages-only]

PAIR is a folder as for `benchmarks.landmarks`. For the first pair, every stage is compared with a minimum time. For the
U-Nets, this is the time of their floating-point operations at the rate of a large matrix product in the same number
format; for all else, the minimum number of moved bytes (below, `floors`) at the rate of a copy. Every pair runs with
``--refine`` off, fast and full, and with ``--python`` also by greedy and convexAdam. Prints mean landmark error (mm),
time as a multiple of that of ``fast``, and peak memory. Times are ratios, because seconds depend on the machine.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from algorithm.cascade.network import fastest_precision
from algorithm.cascade.weights import find_weights, load_cascade
from algorithm.deliver import deliver
from algorithm.files.images import read_image
from algorithm.preparation.prepare import prepare
from algorithm.preparation.subject import Subject, find_both_lungs
from algorithm.refinement.refine import FULL, for_lungs, for_voxels, refine
from algorithm.registration import checked_transform, predict
from algorithm.report import Report
from algorithm.results.outputs import prepare_outputs
from benchmarks.forward import GFLOP, peak_gflops, seconds
from benchmarks.landmarks import PEERS, measure

CPU = torch.device("cpu")
REFINEMENTS = ("off", "fast", "full")
COPIED = 2**28
"""Number of bytes that are copied to measure the rate of copying."""
ADAM_ARRAYS = 7
"""Number of arrays, of the size of the unknown, that a step reads or writes: the gradient is read; the unknown and two
moments are read and written."""


def copy_rate(repeats: int = 5) -> float:
    """Rate of a large copy (bytes per second); bytes read and bytes written both count."""
    source = torch.empty(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / seconds(lambda: target.copy_(source), repeats, CPU)


def stages(pair: Path) -> tuple[dict[str, float], Subject, Subject, int]:
    """Time (s) of each stage in this process, by name; both scans; bytes of field and warped image."""
    cascade = load_cascade(find_weights(None)).cascade
    report, taken = Report(), {}

    def clocked(name: str, start: float) -> float:
        taken[name] = time.perf_counter() - start
        return time.perf_counter()

    start = time.perf_counter()
    images = [read_image(pair / f"{name}.mha") for name in ("fixed", "moving")]
    start = clocked("read", start)
    fixed, moving = find_both_lungs(images[0], None, images[1], None)
    start = clocked("lungs", start)
    prepared = prepare(fixed, moving, cascade.settings.network_size)
    start = clocked("prepare", start)
    found = predict(prepared, cascade, CPU, report)
    start = clocked("cascade", start)
    refined = refine(fixed, moving, prepared.affine, found.displacement, found.grid, FULL)
    start = clocked("refine", start)
    transform = checked_transform(prepared, fixed, moving, refined, report)
    start = clocked("unfold, quality", start)
    with tempfile.TemporaryDirectory() as folder:
        outputs = prepare_outputs(Path(folder), "fixed")
        deliver(outputs, images[0].grid, transform, fixed, moving, "itk", report)
        clocked("write", start)
        written = sum(path.stat().st_size for path in (outputs.displacement_field, outputs.warped_moving))
    return taken, fixed, moving, written


def floors(fixed: Subject, moving: Subject, written: int) -> dict[str, tuple[float, str]]:
    """Minimum time (s) of each stage on this machine, and a text on what was counted."""
    rate = copy_rate()
    images = [scan.image.voxels.nbytes for scan in (fixed, moving)]
    both = sum(images) / rate
    precision = fastest_precision(CPU)
    return {
        "read": (2 * both, "both scans read and stored once"),
        "lungs": (both, "both scans read once"),
        "prepare": (both, "both scans read once"),
        "cascade": (GFLOP / peak_gflops(precision, CPU, 3), f"{GFLOP:.0f} GFLOP, {precision}"),
        "refine": (refinement_bytes(fixed, moving) / rate, "images in the lungs, unknown and moments, each step"),
        "unfold, quality": (0.0, ""),
        "write": ((sum(images[1:]) + 2 * written) / rate, "field and warped image made and stored once"),
    }


def refinement_bytes(fixed: Subject, moving: Subject) -> float:
    """Bytes moved by all steps in both directions: float32 of both images in the lungs, read; Adam's arrays on the
    control grid."""
    settings = for_voxels(for_lungs(FULL, fixed.lungs), fixed.image.grid, moving.image.grid)
    total = 0.0
    for spacing, steps in zip(settings.spacing_mm, settings.steps, strict=True):
        for scan in (fixed, moving):
            lung_voxels = scan.lungs.litres * 1e6 / spacing**3
            x, y, z = (extent + 2 * settings.margin_mm for extent in scan.lungs.grid.extent_mm)
            unknown = 3 * x * y * z / (2 * spacing) ** 3
            total += 4 * steps * (2 * lung_voxels + ADAM_ARRAYS * unknown)
    return total


def print_stages(pair: Path) -> None:
    """Print the table of stages for the second of two passes, which does not include loading and compiling."""
    stages(pair)
    taken, fixed, moving, written = stages(pair)
    rows = [
        (name, taken[name], floor, taken[name] / floor if floor else float("nan"), what)
        for name, (floor, what) in floors(fixed, moving, written).items()
    ]
    table = pd.DataFrame(rows, columns=["stage", "s", "floor s", "ratio", "floor counted from"])
    print(f"{pair.name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"), flush=True)


def print_processes(out: Path, pairs: list[Path], python: str | None) -> None:
    """Print the table of processes: one row per pair, with error (mm) and relative time of every method."""
    rows = []
    for pair in pairs:
        runs = {
            name: measure(
                "algorithm", pair, out / name / pair.name, [f"--refine={name}", "--device=cpu"], sys.executable
            )
            for name in REFINEMENTS
        }
        if python:
            runs |= {name: measure(name, pair, out / name / pair.name, [], python) for name in PEERS}
        unit = float(runs["fast"]["process_s"])
        row: dict[str, float | str] = {"pair": pair.name, "fast s": unit}
        for name, run in runs.items():
            row |= {
                f"{name} mm": run["after"],
                f"{name} ×": float(run["process_s"]) / unit,
                f"{name} MB": run["peak_mb"],
            }
        rows.append(row)
    table = pd.DataFrame(rows).set_index("pair")
    table.loc["mean"] = table.mean()
    print(table.to_string(float_format=lambda value: f"{value:.2f}"))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+")
    parser.add_argument("--python", help="interpreter of the environment of greedy and convexAdam")
    parser.add_argument("--stages-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.stages_only:  # first: a child process starts with the memory of its parent
        print_processes(arguments.out, arguments.pairs, arguments.python)
    print_stages(arguments.pairs[0])


if __name__ == "__main__":
    main()

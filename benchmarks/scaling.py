"""Time and memory of a run for different numbers of voxels and processors.

python -m benchmarks.scaling PAIR [--refine full] [--repeats 1]

PAIR is a folder with fixed.mha and moving.mha. Both are resampled to 0.5, 1, 2 and 4 times their number of voxels in
the same box, and registered by whole processes with all processors; the original pair also with one. Prints times as
multiples of the time of the original pair with all processors, and peak memory (MB). The shortest time of the repeats
counts.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from algorithm.files.images import read_image
from benchmarks.full_size import resampled
from benchmarks.landmarks import command, timed

VOXELS = (0.5, 1.0, 2.0, 4.0)


def with_voxels(pair: Path, factor: float, folder: Path) -> Path:
    """The pair with ``factor`` times the voxels of each scan."""
    folder.mkdir()
    for name in ("fixed.mha", "moving.mha"):
        x, y, z = (max(2, round(n * factor ** (1 / 3))) for n in read_image(pair / name).grid.size)
        resampled(pair / name, folder / name, (x, y, z))
    return folder


def shortest(pair: Path, out: Path, refine: str, processors: Sequence[int], repeats: int) -> tuple[float, float]:
    """Time (s) and peak memory (MB) of a run on some of this process's processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        run = command("algorithm", pair, out, ["--device=cpu", f"--refine={refine}"])
        return min(timed(run) for _ in range(repeats))
    finally:
        os.sched_setaffinity(0, before)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--refine", choices=("off", "fast", "full"), default="full")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    every = sorted(os.sched_getaffinity(0))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for factor in VOXELS:
            pair = with_voxels(arguments.pair, factor, folder / f"{factor}")
            for processors in {1, len(every)} if factor == 1 else {len(every)}:
                used = every[:processors]
                taken, peak_mb = shortest(pair, folder / "out", arguments.refine, used, arguments.repeats)
                rows.append((factor, processors, taken, peak_mb))
    table = pd.DataFrame(rows, columns=["voxels ×", "processors", "s", "peak MB"])
    unit = table["s"][(table["voxels ×"] == 1) & (table["processors"] == len(every))].iloc[0]
    table.insert(3, "time ×", table["s"] / unit)
    print(f"{arguments.pair.name}, --refine {arguments.refine}")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.2f}"))


if __name__ == "__main__":
    main()

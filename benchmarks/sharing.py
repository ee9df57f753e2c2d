"""Slowdown of a run that shares the processors with other processes, by the way in which its threads wait.

    python -m benchmarks.sharing [--pair FOLDER] [--refine off] [--repeats 2] [--size 96 80 96]

The pair is in FOLDER (fixed.mha, moving.mha), or a phantom of this size. Whole processes are timed: one alone,
one beside a process that keeps one processor busy, two at once (until both have ended). Settings alternate, so that
other load on the machine affects them all; the shortest time of the repeats counts. The processor time of a run is
also measured: it includes the spinning of threads and, unlike the other times, hardly depends on other load.

sleeping    the setting of `algorithm`: OMP_WAIT_POLICY=passive
spinning    the default of the OpenMP (GNU) in PyTorch's wheels: GOMP_SPINCOUNT=300000
one thread  OMP_NUM_THREADS=1
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

SETTINGS = {
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = [sys.executable, "-c", "while True: pass"]


def start(pair: Path, out: Path, refine: str, setting: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run of the algorithm, without the caller's environment variables for OpenMP."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "algorithm", f"--fixed={pair / 'fixed.mha'}", f"--moving={pair / 'moving.mha'}"]
    command += [f"--output={out}", "--device=cpu", f"--refine={refine}"]
    return subprocess.Popen(command, env=environment | setting, stdout=subprocess.DEVNULL)


def seconds(
    pair: Path, folder: Path, refine: str, setting: dict[str, str], runs: int, busy: bool
) -> tuple[float, float]:
    """Time (s) until all runs have ended, and processor time of each run; RuntimeError if one failed."""
    other = subprocess.Popen(BUSY) if busy else None
    try:
        began = time.monotonic()
        processes = [start(pair, folder / f"out{number}", refine, setting) for number in range(runs)]
        ended = [os.wait4(process.pid, 0) for process in processes]
        taken = time.monotonic() - began
    finally:
        if other:
            other.kill()
            other.wait()
    if any(status for _, status, _ in ended):
        raise RuntimeError("a run failed")
    return taken, sum(usage.ru_utime + usage.ru_stime for _, _, usage in ended) / runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--refine", choices=("off", "fast", "full"), default="off")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=3, default=(96, 80, 96), metavar=("X", "Y", "Z"))
    arguments = parser.parse_args()
    ways = {"alone": (1, False), "beside a busy process": (1, True), "two at once": (2, False)}
    times: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = arguments.pair or folder / "pair"
        if not arguments.pair:
            command = [sys.executable, "-m", "phantom", str(pair), "--size", *map(str, arguments.size)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for _ in range(arguments.repeats):
            for name, setting in SETTINGS.items():
                for way, (runs, busy) in ways.items():
                    times[name, way].append(seconds(pair, folder, arguments.refine, setting, runs, busy))
    load = os.getloadavg()[0]
    print(f"--refine {arguments.refine}, {len(os.sched_getaffinity(0))} processors, load of the machine {load:.1f}")
    print("| threads | alone s | beside a busy process s | two at once s | busy / alone | two / alone | processor s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in SETTINGS:
        (alone, _), (beside, _), (two, _) = (min(times[name, way]) for way in ways)
        processor = ", ".join(f"{min(times[name, way])[1]:.1f}" for way in ways)
        row = f"{alone:.1f} | {beside:.1f} | {two:.1f} | {beside / alone:.1f} | {two / alone:.1f} | {processor}"
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()

"""Pairs per hour: the gain from a model that stays loaded, and how workers should share the processors.

    python -m benchmarks.throughput [--pair FOLDER] [--refine fast] [--pairs 4] [--repeats 1] [--size 96 80 96]

The pair is in FOLDER (fixed.mha, moving.mha), or a phantom of this size. Workers are those of a cohort, started as the
workflow does, but without Snakemake. The ways alternate; the shortest time of the repeats counts.

cold    every pair has its own process, which starts, loads the model and compiles
warm    ``--pairs`` pairs in one process; the time includes the start, as in a job of a cohort
start   cold minus warm: the extra time of a pair that has its own worker
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from algorithm.cohort.plan import chunk_of
from algorithm.cohort.run import Wishes, planned
from algorithm.cohort.settings import CONFIG
from algorithm.cohort.table import read_table

WAYS = ((1, 1), (1, 2), (2, 1))
"""Numbers of workers, and of threads of each worker."""


def names(pairs: int, chunks: int) -> list[str]:
    """Names of subjects: ``pairs`` of them for each chunk."""
    found: dict[str, list[str]] = defaultdict(list)
    for number in count():
        of = found[chunk_of(f"s{number}", chunks)]
        if len(of) < pairs:
            of.append(f"s{number}")
        if len(found) == chunks and all(len(of) == pairs for of in found.values()):
            return [name for of in found.values() for name in of]
    raise AssertionError


def prepared(folder: Path, pair: Path, pairs: int, workers: int, wishes: Wishes) -> Path:
    """The folder of a cohort with one chunk per worker and ``pairs`` pairs per chunk."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    table = folder / "table.csv"
    rows = [f"{name},{pair / 'fixed.mha'},{pair / 'moving.mha'}\n" for name in names(pairs, workers)]
    table.write_text("subject,fixed,moving\n" + "".join(rows))
    settings = replace(planned(table, read_table(table), wishes), chunks=workers)
    (out / CONFIG).write_text(settings.to_json())
    return out


def seconds(out: Path, workers: int, threads: int) -> float:
    """Time (s) until all workers have ended; RuntimeError if one failed."""
    began = time.monotonic()
    processes = []
    for number in range(workers):
        chunk = f"{number}of{workers}"
        job = ["cohort-step", "register", str(out), chunk, str(out / f"{chunk}.json"), f"--threads={threads}"]
        command = [sys.executable, "-m", "algorithm.command", *job]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    if any([process.wait() for process in processes]):
        raise RuntimeError("a worker failed")
    return time.monotonic() - began


def row(workers: int, threads: int, pairs: int, cold: Sequence[float], warm: Sequence[float]) -> str:
    """A row of the table: time (s) of a cohort's step for one pair and for ``pairs`` pairs per worker."""
    one, many = min(cold), min(warm) / pairs
    rates = " | ".join(f"{3600 * workers / value:.0f}" for value in (one, many))
    return f"| {workers} × {threads} | {one:.1f} | {many:.1f} | {(one - many) * pairs / (pairs - 1):.1f} | {rates} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--refine", choices=("off", "fast", "full"), default="fast")
    parser.add_argument("--weights", type=Path, help="others than the bundled ones")
    parser.add_argument("--report", choices=("on", "off"), default="on")
    parser.add_argument("--transforms", choices=("on", "off"), default="on")
    parser.add_argument("--pairs", type=int, default=4, help="of a warm worker")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=3, default=(96, 80, 96), metavar=("X", "Y", "Z"))
    arguments = parser.parse_args()
    wishes = Wishes(
        arguments.refine, "cpu", arguments.weights, transforms=arguments.transforms, report=arguments.report
    )
    times: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = (arguments.pair or folder / "pair").absolute()
        if not arguments.pair:
            command = [sys.executable, "-m", "phantom", str(pair), "--size", *map(str, arguments.size)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for _ in range(arguments.repeats):
            for workers, threads in WAYS:
                for pairs in (1, arguments.pairs):
                    out = prepared(folder, pair, pairs, workers, wishes)
                    times[workers, threads, pairs].append(seconds(out, workers, threads))
    print(f"--refine {arguments.refine}, {len(os.sched_getaffinity(0))} processors, load {os.getloadavg()[0]:.1f}")
    print("| workers × threads | cold, s a pair | warm, s a pair | start, s | pairs an hour, cold | warm |")
    print("| --- | --- | --- | --- | --- | --- |")
    for workers, threads in WAYS:
        print(row(workers, threads, arguments.pairs, *(times[workers, threads, n] for n in (1, arguments.pairs))))


if __name__ == "__main__":
    main()

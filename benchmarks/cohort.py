"""Time for planning a large cohort, and a check that a killed cohort loses nothing and does nothing twice.

    python -m benchmarks.cohort plan [--rows 10000]
    python -m benchmarks.cohort run [--pairs 40] [--size 36 30 34] [--workers 2] [--weights FOLDER] [-- OPTIONS]

plan    an artificial table of empty files, planned by `lungreg cohort --dry-run`
run     phantoms that are registered; one in eight is broken (a missing file, values that are not HU, a mask of the
        whole image, a text in place of an image). All processes are killed by SIGKILL when half of the pairs have
        ended. Then the command is called again; once more when all is done; and after one row was edited and one added

OPTIONS are those of `lungreg cohort`.
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk

from algorithm.cohort.plan import subjects_with

BROKEN = ("missing.mha,moving.mha,", "flat.mha,moving.mha,", "fixed.mha,moving.mha,all.mha", "text.mha,moving.mha,")
"""Cells of fixed, moving and fixed_mask of broken pairs."""
ONE_IN = 8


def command(folder: Path, more: Sequence[str]) -> list[str]:
    """`lungreg cohort` on the table in the folder."""
    return [sys.executable, "-m", "algorithm.command", "cohort", str(folder / "table.csv"), str(folder / "out"), *more]


def plan(rows: int) -> None:
    """Print the time for planning."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = ["subject,fixed,moving,fixed_landmarks,moving_landmarks\n"]
        for number in range(rows):
            names = [f"{number}_{name}" for name in ("f.nii.gz", "m.nii.gz", "f.csv", "m.csv")]
            for name in names:
                (folder / name).touch()
            lines.append(f"p{number},{','.join(names)}\n")
        (folder / "table.csv").write_text("".join(lines))
        began = time.monotonic()
        subprocess.run(command(folder, ["--dry-run"]), check=True)
        taken, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{rows} rows planned in {taken:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of a processor, "
            f"{used.ru_maxrss / 1024:.0f} MB; load {os.getloadavg()[0]:.1f}"
        )


def scans(folder: Path, size: Sequence[int]) -> None:
    """Write a phantom pair and the broken files of other rows."""
    done = [sys.executable, "-m", "phantom", str(folder), "--size", *map(str, size)]
    subprocess.run(done, check=True, stdout=subprocess.DEVNULL)
    scan = sitk.ReadImage(str(folder / "fixed.mha"))
    sitk.WriteImage(sitk.Cast(scan * 0 + 7, sitk.sitkInt16), str(folder / "flat.mha"))
    sitk.WriteImage(sitk.Cast(scan * 0 + 1, sitk.sitkUInt8), str(folder / "all.mha"))
    (folder / "text.mha").write_text("this is no image")


def table(pairs: int) -> list[str]:
    """The rows of a table; one in `ONE_IN` is broken."""
    cells = [BROKEN[n // ONE_IN % len(BROKEN)] if n % ONE_IN == 3 else "fixed.mha,moving.mha," for n in range(pairs)]
    return [f"p{number:02d},{of}\n" for number, of in enumerate(cells)]


def written(out: Path) -> dict[str, int]:
    """Modification time of the results of each pair."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (out / "pairs").glob("*/results.json")}


def ended(out: Path) -> set[str]:
    """The pairs whose registration has ended."""
    return subjects_with(out, "register", "done") | subjects_with(out, "register", "failed")


def called(folder: Path, more: Sequence[str], rows: Sequence[str]) -> tuple[float, int]:
    """Time (s) and exit code of the command for these rows."""
    (folder / "table.csv").write_text("subject,fixed,moving,fixed_mask\n" + "".join(rows))
    began = time.monotonic()
    done = subprocess.run(command(folder, more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began, done.returncode


def run(pairs: int, size: Sequence[int], more: Sequence[str], folder: Path) -> None:
    """Print a line for each call."""
    out, rows = folder / "out", table(pairs)
    scans(folder, size)
    (folder / "table.csv").write_text("subject,fixed,moving,fixed_mask\n" + "".join(rows))
    began = time.monotonic()
    process = subprocess.Popen(
        command(folder, more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while len(ended(out)) < pairs // 2:
        if process.poll() is not None:
            raise RuntimeError("it ended before it could be killed")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before, known = written(out), ended(out)
    print(f"killed after {time.monotonic() - began:.0f} s: {len(known)} of {pairs} pairs had ended", flush=True)

    def told(name: str, taken: tuple[float, int]) -> None:
        after = written(out)
        again = [subject for subject in known if subject in before and after[subject] != before[subject]]
        new = after.keys() - before.keys()
        print(
            f"{name}: {taken[0]:.0f} s, exit code {taken[1]}; {len(new)} pairs computed, "
            f"{len(again)} of the {len(known)} known ones again; {len(ended(out))} ended, {len(after)} with results",
            flush=True,
        )
        before.update(after)
        known.update(ended(out))

    told("called again", called(folder, more, rows))
    told("again, all done", called(folder, more, rows))
    rows[3] = "p03,fixed.mha,moving.mha,\n"  # was broken
    told("a row mended, one added", called(folder, more, [*rows, "new,moving.mha,fixed.mha,\n"]))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "run"))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--size", type=int, nargs=3, default=(36, 30, 34), metavar=("X", "Y", "Z"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="others than the bundled ones; small ones are quick")
    parser.add_argument("--keep", type=Path, help="a new folder that everything is left in")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:separator])
    if arguments.what == "plan":
        plan(arguments.rows)
        return
    more = ["--refine=off", "--device=cpu", "--transforms=off", "--report=off", f"--workers={arguments.workers}"]
    more += [f"--weights={arguments.weights}"] if arguments.weights else []
    more += sys.argv[separator + 1 :]
    folder = Path(tempfile.mkdtemp()) if arguments.keep is None else arguments.keep
    try:
        run(arguments.pairs, arguments.size, more, folder)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""``lungreg cohort TABLE OUT``: checks the table, calls Snakemake, writes the report and lists the failed pairs."""

import fcntl
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, Stopped, stopped_by_signals
from ..evaluating import evaluation_module
from ..options import Device, FieldGrid, Options, Page, Refine, Switch
from .done import settled
from .figures import figures_of
from .gpu import visible
from .plan import chunks_for
from .progress import Progress
from .settings import CONFIG, CONTAINER, IN_CONTAINER, Settings
from .table import Row, TableError, missing_files, read_table

PACKAGE = Path(__file__).parent.parent
WORKFLOW = next(
    (folder for folder in (PACKAGE / "workflow", PACKAGE.parent / "workflow") if (folder / "Snakefile").exists()),
    PACKAGE / "workflow",
)
"""The workflow's folder: in the wheel, or in the repository beside this package."""
SOME_FAILED = 3
"""The exit code when some pairs failed."""
MOST_TOLD = 100
"""Maximum number of messages that are printed one by one."""
POLL_S = 2.0
GRACE_S = 3.0
EVERY_S = 60.0
"""Time between two lines of progress in a file; on a terminal, one line is updated."""


@dataclass(frozen=True)
class Wishes:
    """The options of the command line."""

    refine: Refine = Options.refine
    device: Device = Options.device
    weights: Path | None = None
    field_grid: FieldGrid = Options.field_grid
    transforms: Switch = "on"
    report: Page = "on"
    function: bool = False
    workers: int | None = None
    threads: int | None = None
    pairs_per_job: int | None = None
    mem_mb: int = 4000
    profile: str | None = None
    container: str | None = None
    worker_command: str | None = None
    dry_run: bool = False
    more: Sequence[str] = field(default_factory=tuple)
    """Options that are passed to Snakemake unchanged."""


def run_cohort(table: Path, out: Path, wishes: Wishes) -> int:
    """Run the cohort; returns the exit code: 0 all done, 3 some pairs failed, 1 some pairs were not reached.

    InputError for a faulty table, after all its faults were written to stderr.
    """
    if importlib.util.find_spec("snakemake") is None:
        raise InputError("lungreg cohort: Snakemake is not installed, expected pip install 'lung-registration[cohort]'")
    rows = _checked_rows(table)
    _check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    with _sole_run(out) as lock, stopped_by_signals():
        settings = planned(table, rows, wishes)
        (out / CONFIG).write_text(settings.to_json(), encoding="utf-8")
        left = [row.subject for row in rows if settled(out, "register", row, settings) is None]
        print(f"{len(rows)} pairs in {table}, {len(rows) - len(left)} of them registered before.", flush=True)
        if wishes.dry_run:
            return _call(snakemake(out, wishes, ["--dry-run", "--quiet", "rules"]))
        if any((out / ".snakemake" / "locks").glob("*")):  # left by a killed run: this run is the only one now
            _call([*snakemake(out, wishes), "--unlock"], log=out / "snakemake.log")
        code = _watched(snakemake(out, wishes), out, Progress(out, left), lock)
    return _concluded(rows, out, settings, code)


def _checked_rows(table: Path) -> list[Row]:
    """The rows; all faults and missing files are reported before anything runs."""
    try:
        rows = read_table(table)
    except TableError as error:
        _tell([f"{table}: {sentence}" for sentence in error.faults])
        raise
    missing = missing_files(rows)
    _tell([f"{table}: {sentence}" for sentence in missing])
    scans = [path for row in rows for path in (row.path("fixed"), row.path("moving")) if path is not None]
    if not any(path.exists() for path in scans):
        raise InputError(f"{table}: none of its {len(scans)} scans is there, expected paths relative to the table")
    if missing:
        print(f"{len(missing)} files are not there; their pairs will fail, the others are run.", file=sys.stderr)
    return rows


def _tell(sentences: Sequence[str]) -> None:
    for sentence in sentences[:MOST_TOLD]:
        print(sentence, file=sys.stderr)
    if len(sentences) > MOST_TOLD:
        print(f"... and {len(sentences) - MOST_TOLD} more", file=sys.stderr)


def _check_out(out: Path) -> None:
    """InputError if the folder holds something else: its files could have the names of ours."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder for the cohort's results")
    if out.is_dir() and not (out / CONFIG).exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds other files, expected a new folder, or that of an earlier cohort")


@contextmanager
def _sole_run(out: Path) -> Iterator[int]:
    """The descriptor of a lock that is held until this process or Snakemake ends; InputError when another process holds
    it."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    except BlockingIOError as error:
        raise InputError(f"{out}: another lungreg cohort is at work there, expected its end first") from error
    finally:
        os.close(descriptor)


def planned(table: Path, rows: Sequence[Row], wishes: Wishes) -> Settings:
    """The configuration from the user's options and the machine."""
    from ..cascade.weights import find_weights, manifest_of

    weights = None if wishes.weights is None else str(wishes.weights.absolute())
    threads = wishes.threads or 1
    package = __package__.rpartition(".")[0]
    lungreg = shlex.join([sys.executable, "-m", f"{package}.command"])
    return Settings(
        table=str(table.absolute()),
        package=package,
        lungreg=lungreg,
        worker=wishes.worker_command or (IN_CONTAINER if wishes.container else lungreg),
        weights_sha256=str(manifest_of(find_weights(wishes.weights))["sha256"]),
        chunks=chunks_for(len(rows), wishes.workers or max(1, _cores() // threads), wishes.pairs_per_job),
        weights=weights,
        refine=wishes.refine,
        device=wishes.device,
        field_grid=wishes.field_grid,
        transforms=wishes.transforms,
        report=wishes.report,
        function=wishes.function,
        threads=threads,
        mem_mb=wishes.mem_mb,
        gpus=min(1, _gpus(wishes)),
        container=wishes.container or CONTAINER,
    )


def _gpus(wishes: Wishes) -> int:
    """Number of GPUs of this machine, one per worker; with a profile, the profile gives it."""
    return 0 if wishes.device == "cpu" or wishes.profile is not None else len(visible())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def snakemake(out: Path, wishes: Wishes, more: Sequence[str] = ()) -> list[str]:
    """The Snakemake command. Without a profile it starts as many workers as the cores and memory of this machine
    allow."""
    command = [sys.executable, "-m", "snakemake", "pairs", "--snakefile", str(WORKFLOW / "Snakefile")]
    command += ["--directory", str(out), *(["--software-deployment-method", "apptainer"] if wishes.container else [])]
    command += ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", "--nocolor"]
    if wishes.profile is not None:
        own = WORKFLOW / "profiles" / wishes.profile
        command += ["--profile", str(own if own.is_dir() else wishes.profile)]
    else:
        threads = wishes.threads or 1
        cores = _cores() if wishes.workers is None else wishes.workers * threads
        memory = int(evaluation_module("workers").memory_bytes()) // 2**20
        limits = [f"mem_mb={max(memory, wishes.mem_mb)}", *([f"gpu={gpus}"] if (gpus := _gpus(wishes)) else [])]
        command += ["--cores", str(cores), "--resources", *limits]
    return [*command, *more, *wishes.more]


def _environment() -> dict[str, str]:
    """The environment, in which the package is found from another folder."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _call(command: Sequence[str], log: Path | None = None) -> int:
    if log is None:
        return subprocess.run(command, env=_environment()).returncode
    with log.open("ab") as file:
        return subprocess.run(command, env=_environment(), stdout=file, stderr=file).returncode


def _watched(command: Sequence[str], out: Path, progress: Progress, lock: int) -> int:
    """Run Snakemake with its output in OUT/snakemake.log and report the progress; returns its exit code.

    When this process is stopped, it stops Snakemake, which stops its jobs.
    """
    with (out / "snakemake.log").open("ab") as log:
        process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log, pass_fds=(lock,))
    said = _Said()
    try:
        while process.poll() is None:
            said.now(progress.line())
            _wait(process, POLL_S)
    except Stopped:
        _stop(process)
        raise
    finally:
        said.end(progress.line())
    return process.returncode


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End Snakemake and its jobs, which clean up. After Ctrl-C on a terminal they have received the signal already."""
    import psutil  # comes with Snakemake

    _wait(process, GRACE_S)
    with suppress(psutil.NoSuchProcess):
        snakemake = psutil.Process(process.pid)
        for one in (snakemake, *snakemake.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGINT)
    process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


class _Said:
    """Lines of progress: one line that is updated on a terminal; elsewhere one line per minute if something changed."""

    def __init__(self) -> None:
        self.terminal, self.last, self.at = sys.stdout.isatty(), "", 0.0

    def now(self, line: str) -> None:
        """Print the line if enough time has passed."""
        if self.terminal:
            print(f"\r\x1b[2K{line}", end="", flush=True)
        elif line not in ("", self.last) and time.monotonic() - self.at > EVERY_S:
            print(line, flush=True)
            self.last, self.at = line, time.monotonic()

    def end(self, line: str) -> None:
        """Print the last line."""
        if line:
            print(f"\r\x1b[2K{line}" if self.terminal else line, flush=True)


def _concluded(rows: Sequence[Row], out: Path, settings: Settings, code: int) -> int:
    """Write the report and list the failed pairs on stderr; returns the exit code."""
    from .page import write_report

    figures = figures_of(rows, out, settings)
    write_report(figures, out)
    print(f"The report: {out / 'cohort.html'}; its figures: cohort.csv and cohort.parquet beside it.", flush=True)
    failed = [f for f in figures if f["status"] == "failed"]
    left = [f for f in figures if f["status"] == "not done"]
    for entry in failed:
        print(f"{entry['subject']}: {entry['error']}", file=sys.stderr)
    if left:
        print(
            f"{len(left)} of {len(rows)} pairs were not come to (first: {left[0]['subject']}); {out / 'snakemake.log'} "
            "says why, and the same command goes on from here",
            file=sys.stderr,
        )
        return 1
    if failed:
        print(f"{len(failed)} of {len(rows)} pairs failed, see above", file=sys.stderr)
        return SOME_FAILED
    return 1 if code else 0

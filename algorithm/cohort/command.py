"""The commands for cohorts. Only the workflow calls `lungreg cohort-step`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..options import HELP, Device, FieldGrid, Options, Page, Refine, Switch

Step = Literal["check", "register", "apply", "function", "evaluate"]


def _told(name: str) -> Parameter:
    """The parameter for an option of the registration."""
    return Parameter(name=f"--{name.replace('_', '-')}", help=HELP[name], negative=())


def _flag(text: str) -> Parameter:
    return Parameter(help=text, negative=())


def cohort(
    table: Annotated[Path, Parameter(help="CSV: subject, fixed, moving and more, see docs/use/cohort.md")],
    out: Annotated[Path, Parameter(help="a new folder, or the folder of an earlier run of this cohort")],
    /,
    *more: Annotated[str, Parameter(name="SNAKEMAKE", help="options for Snakemake, after --")],
    refine: Annotated[Refine, _told("refine")] = Options.refine,
    device: Annotated[Device, _told("device")] = Options.device,
    weights: Annotated[Path | None, _told("weights")] = None,
    field_grid: Annotated[FieldGrid, _told("field_grid")] = Options.field_grid,
    transforms: Annotated[Switch, _told("transforms")] = "on",
    report: Annotated[Page, _told("report")] = "on",
    function: Annotated[bool, _flag("also run lungreg function on every result")] = False,
    workers: Annotated[
        int | None, Parameter(help="pairs that run at the same time (default: by processors and memory)")
    ] = None,
    threads: Annotated[int | None, Parameter(help="threads of each worker (default: 1)")] = None,
    pairs_per_job: Annotated[
        int | None, Parameter(help="approximate number of pairs in a job (default: 1 to 20, by the table)")
    ] = None,
    memory: Annotated[int, Parameter(help="memory (MB) that a worker may need")] = 4000,
    profile: Annotated[
        str | None, Parameter(help="profile of Snakemake: workstation, node, slurm, or a folder")
    ] = None,
    container: Annotated[str | None, Parameter(help="image in which Apptainer runs the workers")] = None,
    worker_command: Annotated[
        str | None, Parameter(help="command for lungreg where the workers run, for example docker run ...")
    ] = None,
    dry_run: Annotated[bool, _flag("only print what would be run")] = False,
) -> int:
    """Register all pairs of a table. The same command continues an earlier run and computes only what is new or
    changed.

    Exit code 3: some pairs failed, each is listed on stderr; 1: some pairs were not reached.
    """
    from .run import Wishes, run_cohort

    wishes = Wishes(
        refine=refine,
        device=device,
        weights=weights,
        field_grid=field_grid,
        transforms=transforms,
        report=report,
        function=function,
        workers=workers,
        threads=threads,
        pairs_per_job=pairs_per_job,
        mem_mb=memory,
        profile=profile,
        container=container,
        worker_command=worker_command,
        dry_run=dry_run,
        more=more,
    )
    return run_cohort(table, out, wishes)


def cohort_table(
    folder: Annotated[
        Path, Parameter(help="folder with files named as in BIDS: sub-01/ses-1/ct/sub-01_ses-1_ct.nii.gz")
    ],
    table: Annotated[Path, Parameter(help="a new CSV file")],
    /,
    *,
    fixed: Annotated[str, Parameter(help="part of the names of the fixed scans, for example ses-2")],
    moving: Annotated[str, Parameter(help="part of the names of the moving scans, for example ses-1")],
) -> None:
    """Make the table of a cohort from a BIDS-like folder."""
    from .bids import write_bids_table

    print(write_bids_table(folder, table, fixed, moving))


def cohort_step(step: Step, out: Path, chunk: str, done: Path, /, *, attempt: int = 1, threads: int = 1) -> int:
    """One job of the workflow: a step for the pairs of a chunk."""
    from ..cpus import take_threads

    take_threads(threads)  # before torch is imported
    from .worker import run_step

    return run_step(step, out, chunk, done, attempt)

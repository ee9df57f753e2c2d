"""Cohorts that really run: tiny phantoms through Snakemake, some broken on purpose; killed, resumed, edited."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from algorithm.cohort import run, steps, worker
from algorithm.cohort.done import Outcome, read_outcome, write_outcome
from algorithm.cohort.gpu import take_gpu, visible
from algorithm.cohort.overlap import in_turn
from algorithm.cohort.run import PACKAGE, WORKFLOW
from algorithm.cohort.settings import Settings
from algorithm.cohort.table import checked_table
from algorithm.errors import InputError
from tests.support.running import lungreg

ROOT = Path(__file__).parent.parent
SECONDS = 600

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("snakemake") is None,
    reason="Snakemake is not installed: pip install -r requirements-cohort.txt",
)


@pytest.fixture
def study(tmp_path: Path, example: Path) -> Path:
    """The scans of a phantom, and what is wrong with others."""
    folder = tmp_path / "study"
    shutil.copytree(example, folder)
    scan = sitk.ReadImage(str(folder / "fixed.mha"))
    sitk.WriteImage(sitk.Cast(scan * 0 + 7, sitk.sitkInt16), str(folder / "flat.mha"))
    sitk.WriteImage(sitk.Cast(scan * 0 + 1, sitk.sitkUInt8), str(folder / "all.mha"))
    return folder


HEAD = "subject,fixed,moving,fixed_mask,fixed_landmarks,moving_landmarks,fixed_labels,moving_labels\n"
GOOD = "fixed.mha,moving.mha,,fixed_landmarks.csv,moving_landmarks.csv,fixed_lobes.mha,moving_lobes.mha"
ROWS = [
    f"good1,{GOOD}\n",
    "missing,fixed.mha,nowhere.mha,,,,,\n",
    "flat,flat.mha,moving.mha,,,,,\n",
    "everything,fixed.mha,moving.mha,all.mha,,,,\n",
    "good2,fixed.mha,moving.mha,,,,,\n",
]
FAILED = {"missing": "there is no such file", "flat": "Hounsfield", "everything": "mask"}


def command(study: Path, weights: Path, *more: str) -> list[str]:
    options = ["--refine=off", "--device=cpu", "--workers=1", f"--weights={weights}"]
    return [
        sys.executable,
        "-m",
        "algorithm.command",
        "cohort",
        str(study / "table.csv"),
        str(study / "out"),
        *options,
        *more,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def cohort(study: Path, weights: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(study, weights, *more), cwd=study, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )


def made(study: Path) -> dict[str, int]:
    """When the results of each pair were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (study / "out" / "pairs").glob("*/results.json")}


def log_of(study: Path) -> str:
    return (study / "out" / "snakemake.log").read_text()


def test_a_cohort_with_broken_pairs_then_edited(study: Path, small_weights: Path) -> None:
    (study / "table.csv").write_text(HEAD + "".join(ROWS))
    done = cohort(study, small_weights, "--pairs-per-job=10")
    assert done.returncode == 3, done.stderr + log_of(study)
    out, said = study / "out", done.stderr.splitlines()
    assert "row 3, missing: moving is not there" in done.stderr and said[-1] == "3 of 5 pairs failed, see above"
    for subject, words in FAILED.items():
        assert any(line.startswith(f"{subject}: ") and words in line for line in said), (subject, done.stderr)
    first = made(study)
    assert first.keys() == {"good1", "good2"}

    applied = {path.name for path in (out / "pairs" / "good1" / "applied").iterdir()}
    assert applied == {
        "fixed_landmarks_in_moving.csv", "moving_landmarks_in_fixed.csv",
        "fixed_labels_on_moving.nii.gz", "moving_labels_on_fixed.nii.gz",
    }  # fmt: skip
    table = pd.read_csv(out / "cohort.csv").set_index("subject")
    assert table["status"].to_dict() == {"good1": "done", "good2": "done", **dict.fromkeys(FAILED, "failed")}
    assert table.loc["good1", "tre_mm.mean"] > 0 and 0 < table.loc["good1", "dice.mean"] <= 1
    assert np.isnan(table.loc["good2", "tre_mm.mean"]) and table.loc["good2", "timings_s.total"] > 0
    other = pd.read_parquet(out / "cohort.parquet").set_index("subject")
    assert other.loc["good1", "tre_mm.mean"] == table.loc["good1", "tre_mm.mean"]
    assert 'href="pairs/good1/report.html"' in (out / "cohort.html").read_text()

    again = cohort(study, small_weights, "--pairs-per-job=10")
    assert again.returncode == 3 and made(study) == first
    assert "5 pairs in" in again.stdout and "5 of them registered before" in again.stdout
    assert "Nothing to be done" in log_of(study)

    rows = [*ROWS[:4], "good2,fixed.mha,moving.mha,fixed_lobes.mha,,,,\n", "new,moving.mha,fixed.mha,,,,,\n"]
    (study / "table.csv").write_text(HEAD + "".join(reversed(rows)))
    edited = cohort(study, small_weights, "--pairs-per-job=3")
    assert edited.returncode == 3, edited.stderr
    later = made(study)
    assert later.keys() == {"good1", "good2", "new"}
    assert later["good1"] == first["good1"] and later["good2"] != first["good2"]


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_a_cohort_that_was_stopped_goes_on(study: Path, small_weights: Path) -> None:
    """Killed, then interrupted, then left alone: no pair that was finished is done again."""
    subjects = [f"s{n}" for n in range(4)]
    (study / "table.csv").write_text(
        "subject,fixed,moving\n" + "".join(f"{subject},fixed.mha,moving.mha\n" for subject in subjects)
    )

    def finished() -> dict[str, int]:
        done = [path.stem for path in (study / "out" / "steps" / "register" / "done").glob("[!.]*")]
        times = made(study)
        return {subject: times[subject] for subject in done}

    before: dict[str, int] = {}
    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command(study, small_weights, "--report=off"), cwd=study, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: len(finished()) > len(before), process)  # noqa: B023
        os.killpg(process.pid, how)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said.decode()
        after = finished()
        assert before.items() <= after.items() and len(before) < len(after) < len(subjects)
        before = after
    done = cohort(study, small_weights, "--report=off")
    assert done.returncode == 0, done.stderr + log_of(study)
    assert finished().keys() == set(subjects) and before.items() <= finished().items()


def test_the_workflow_is_clean_and_planned_for_a_cluster(study: Path, small_weights: Path) -> None:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    (study / "table.csv").write_text(HEAD + "".join(ROWS))
    there = {path.name for path in (WORKFLOW / "profiles").iterdir()}
    assert there == {"workstation", "node", "slurm", "apptainer"}
    for profile in sorted(there if shutil.which("apptainer") else there - {"apptainer"}):
        planned = cohort(study, small_weights, "--dry-run", f"--profile={profile}")
        assert planned.returncode == 0 and "register" in planned.stdout + planned.stderr, planned.stderr
    lint = [sys.executable, "-m", "snakemake", "--lint", "--snakefile", str(WORKFLOW / "Snakefile")]
    done = subprocess.run([*lint, "--directory", str(study / "out")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Congratulations" in done.stdout + done.stderr, done.stdout + done.stderr


def test_what_is_refused_before_anything_runs(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad, out = study / "bad.csv", study / "out"
    bad.write_text("subject,fixed,moving\n../a,fixed.mha,moving.mha\nb,fixed.mha\n")
    assert lungreg("cohort", bad, out) == 2
    said = capfd.readouterr().err.splitlines()
    assert "row 2" in said[0] and "row 3" in said[1] and said[-1].startswith(f"{bad}: row 2")
    bad.write_text("subject,fixed,moving\na,nowhere.mha,neither.mha\n")
    assert lungreg("cohort", bad, out) == 2
    assert "none of its 2 scans is there" in capfd.readouterr().err
    assert not out.exists()
    bad.write_text("subject,fixed,moving\na,fixed.mha,moving.mha\n")
    assert lungreg("cohort", bad, study) == 2
    assert "holds other files" in capfd.readouterr().err
    out.mkdir()
    with run._sole_run(out):
        assert lungreg("cohort", bad, out) == 2
    assert "another lungreg cohort is at work" in capfd.readouterr().err


# --- one job ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cohort of four pairs in one chunk, whose registration does what the name of the moving scan says."""
    moving = {"a": "good", "b": "no memory", "c": "good", "d": "bad"}
    lines = [f"{subject},f,{name}\n" for subject, name in moving.items()]
    (tmp_path / "table.csv").write_text("subject,fixed,moving\n" + "".join(lines))
    settings = Settings(str(tmp_path / "table.csv"), "algorithm", "lungreg", "lungreg", "0", chunks=1)
    (tmp_path / "cohort.json").write_text(settings.to_json())
    tried: list[str] = []
    monkeypatch.setattr(worker, "registered", lambda rows, out, _, begin: pretended(rows, out, begin, tried))
    monkeypatch.setattr(worker, "tried", tried, raising=False)
    return tmp_path


def pretended(rows, out, begin, tried):  # type: ignore[no-untyped-def]
    for row in rows:
        begin(row)
        tried.append(row.subject)
        if row.cells["moving"] == "bad":
            yield row, InputError("is no CT")
        elif row.cells["moving"] == "no memory":
            yield row, MemoryError("too large")
        elif row.cells["moving"] == "killed":
            raise SystemExit(9)  # as if: nothing is written any more
        else:
            result = out / "pairs" / row.subject / "results.json"
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text("{}")
            yield row, None


def states(folder: Path) -> dict[str, str]:
    found = {subject: read_outcome(folder, "register", subject) for subject in "abcd"}
    return {subject: outcome.state for subject, outcome in found.items() if outcome is not None}


def test_a_job_tries_again_only_what_the_machine_is_to_blame_for(job: Path) -> None:
    done, tried = job / "done.json", worker.tried  # type: ignore[attr-defined]
    assert worker.run_step("register", job, "0of1", done, attempt=1) == 1 and not done.exists()
    assert states(job) == {"a": "done", "b": "again", "c": "done", "d": "failed"}
    assert worker.run_step("register", job, "0of1", done, attempt=3) == 0
    assert tried == ["a", "b", "c", "d", "b"]
    assert json.loads(done.read_text()) == states(job)
    table = job / "table.csv"
    table.write_text(table.read_text().replace("d,f,bad", "d,f,good"))
    assert worker.run_step("register", job, "0of1", done, attempt=3) == 0
    assert tried == ["a", "b", "c", "d", "b", "b", "d"] and states(job)["d"] == "done"


def test_a_pair_that_takes_its_process_with_it_comes_last_and_is_left_out_at_the_end(job: Path) -> None:
    table, tried = job / "table.csv", worker.tried  # type: ignore[attr-defined]
    table.write_text(table.read_text().replace("b,f,no memory", "b,f,killed"))
    for attempt in (1, 2):
        with pytest.raises(SystemExit):
            worker.run_step("register", job, "0of1", job / "done.json", attempt)
    assert tried == ["a", "b", "c", "d", "b"]
    assert worker.run_step("register", job, "0of1", job / "done.json", 3) == 0
    assert tried == ["a", "b", "c", "d", "b"] and states(job)["b"] == "again"


def test_a_step_after_one_that_failed_is_not_tried(job: Path) -> None:
    write_outcome(job, "check", "a", Outcome("x", "failed", "is empty"))
    write_outcome(job, "check", "b", Outcome("x", "again", "no disk"))
    assert worker.run_step("register", job, "0of1", job / "done.json", 1) == 0  # there is nothing to try again
    assert states(job) == {"a": "failed", "b": "again", "c": "done", "d": "failed"}
    assert worker.tried == ["c", "d"]  # type: ignore[attr-defined]


def test_a_full_disk_ends_the_job(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        worker,
        "registered",
        lambda rows, _, __, begin: ((begin(row), (row, OSError(28, "No space left")))[1] for row in rows),
    )
    with pytest.raises(OSError, match="No space left"):
        worker.run_step("register", job, "0of1", job / "done.json")
    assert states(job) == {"a": "again"} and not (job / "done.json").exists()


def test_the_checks_find_what_headers_tell(study: Path) -> None:
    def of(cells: str) -> None:
        (study / "t.csv").write_text(f"subject,fixed,moving,moving_mask\na,{cells}\n")
        steps.check(run.read_table(study / "t.csv")[0])

    of("fixed.mha,moving.mha,moving_lobes.mha")
    (study / "text.mha").write_text("no image")
    for cells, says in (
        ("fixed.mha,gone.mha,", "gone.mha: there is no such file"),
        ("text.mha,moving.mha,", "text.mha"),
        ("fixed.mha,moving.mha,displacement_field.mha", "displacement_field.mha: has 3 values"),
        ("fixed.mha,moving_landmarks.csv,", "no known kind of image"),
    ):
        with pytest.raises(InputError, match=says):
            of(cells)


# --- the page on use -------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "use" / "cohort.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line.partition(" #")[0] for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("lungreg ")])
def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """They are understood; what is then run is tested above."""
    taken: list[tuple[Path, Path, run.Wishes]] = []
    monkeypatch.setattr(run, "run_cohort", lambda *arguments: taken.append(arguments) or 0)
    monkeypatch.chdir(tmp_path)
    for session in (1, 2):
        path = tmp_path / "study" / "sub-01" / f"sub-01_ses-{session}_ct.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert lungreg(*shlex.split(line)[1:]) == 0
    if line.startswith("lungreg cohort-table"):
        assert (tmp_path / "table.csv").read_text().splitlines()[0] == "subject,fixed,moving"
        return
    ((table, out, wishes),) = taken
    assert (table, out) == (Path("table.csv"), Path("out"))
    assert ("--profile" in line, "--dry-run" in line, "--printshellcmds" in line) == (
        wishes.profile is not None, wishes.dry_run, wishes.more == ("--printshellcmds",),
    )  # fmt: skip
    assert wishes.profile is None or (WORKFLOW / "profiles" / wishes.profile).is_dir()
    assert ("docker" in line) == (wishes.worker_command is not None)


def test_the_table_of_the_page(tmp_path: Path) -> None:
    (table,) = (block for block in BLOCKS if block.startswith("subject,"))
    (tmp_path / "table.csv").write_text(table)
    rows, faults = checked_table(tmp_path / "table.csv")
    assert len(rows) == 2 and faults == [] and rows[1].has_truth()


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_pairs_in_turn(overlap: bool) -> None:
    """Each comes out once, the bad ones with what went wrong, whichever part it was."""
    written: list[int] = []

    def fails(item: int, part: int) -> int:
        if item % 10 == part:
            raise ValueError(f"{item} in {part}")
        return item

    items = [1, 2, 3, 4, 14, 13, 12, 11, 5]
    found = dict(
        in_turn(items, lambda i: fails(i, 1), lambda i: fails(i, 2), lambda i: written.append(fails(i, 3)), overlap)
    )
    assert found.keys() == set(items) and written == [4, 14, 5]
    assert {item: str(error) for item, error in found.items() if error} == {
        item: f"{item} in {item % 10}" for item in (1, 2, 3, 11, 12, 13)
    }


def test_reading_and_writing_take_no_time_of_their_own_when_they_overlap() -> None:
    """Four pairs, three parts of 0.1 s each: 1.2 s in turn, 0.6 s where only the computing is waited for."""

    def wait(item: int) -> int:
        time.sleep(0.1)
        return item

    taken = []
    for overlap in (False, True):
        began = time.monotonic()
        ended = [item for item, _ in in_turn(range(4), wait, wait, lambda item: print(wait(item)), overlap)]
        assert ended == [0, 1, 2, 3]
        taken.append(time.monotonic() - began)
    assert taken[0] >= 1.2 and taken[1] < 1.0


def test_workers_take_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for given, taken in ((" 0, 1", "0"), ("0,1", "1"), ("0,1", "0,1"), ("3", "3"), ("", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        take_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "driver" / "0000:01").mkdir(parents=True)
    monkeypatch.setattr("algorithm.cohort.gpu.DRIVER", tmp_path / "driver")
    assert visible() == ["0"]


def test_what_snakemake_is_told_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "visible", lambda: ["0", "1"])
    monkeypatch.setattr("evaluation.workers.memory_bytes", lambda: 8 * 2**30)
    told = run.snakemake(Path("out"), run.Wishes(device="cuda", workers=3, threads=2, more=["--printshellcmds"]))
    assert told[told.index("--cores") + 1] == "6" and {"mem_mb=8192", "gpu=2"} <= set(told)
    assert told[-1] == "--printshellcmds" and told[3] == "pairs"
    assert not any(word.startswith("gpu=") for word in run.snakemake(Path("out"), run.Wishes(device="cpu")))
    told = run.snakemake(Path("out"), run.Wishes(profile="slurm", container="x.sif"))
    assert "--cores" not in told and told[told.index("--profile") + 1] == str(WORKFLOW / "profiles" / "slurm")
    assert told[told.index("--software-deployment-method") + 1] == "apptainer"
    assert run.snakemake(Path("out"), run.Wishes(profile="mine"))[-1] == "mine"


def test_planning_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; import algorithm.cohort.plan, algorithm.cohort.worker, algorithm.command\n"
    code += "print(sorted({'torch', 'SimpleITK', 'scipy', 'numba', 'pandas', 'openvino'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert PACKAGE.name == "algorithm" and (WORKFLOW / "Snakefile").exists()

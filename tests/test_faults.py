"""When files are damaged, disks full, memory short, and when the process is stopped or does not run alone."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch._dynamo  # by Adam, at its first use: memory that ends during an import is Python's to report

from algorithm.errors import InputError, Stopped, exit_code, stopped_by_signals
from algorithm.fields.transform import Transform
from algorithm.files.folders import find_inputs
from algorithm.files.images import Image, read_image, read_mask
from algorithm.files.inputs import Inputs
from algorithm.files.writing import PARTIAL
from algorithm.report import Report
from algorithm.threads import Pool
from tests.support.dicom_series import write_series
from tests.support.running import call_main, files_below, pair_options, results

ROOT = Path(__file__).parent.parent
SECONDS = 120.0
"""More than any run takes."""

# --- the main program in a process that may be hurt ------------------------------------------------------------------

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload([__name__])
"""Each process is forked from one that has imported all of this: it starts at once."""


@dataclass(frozen=True)
class Fault:
    """What happens to the process."""

    pause_at: str = ""
    """A step of the run, as it begins; or `field_slabs`, `warped_slabs`: with half of the volume written."""
    until: Path = Path("never")
    """It goes on when this file is there."""
    limit: tuple[int, int] | None = None
    """One of resource.RLIMIT_..., and its value."""


def hurt_main(fault: Fault, log: Path, arguments: list[str]) -> None:
    """The main program with that fault; its stdout and stderr are files in ``log``."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (log / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    torch.set_num_threads(1)
    if fault.limit:
        kind, value = fault.limit
        resource.setrlimit(kind, (value, value))

    def pause() -> None:
        print("paused", flush=True)
        wait_for(fault.until.exists)

    if fault.pause_at in ("field_slabs", "warped_slabs"):
        whole = getattr(Transform, fault.pause_at)
        setattr(Transform, fault.pause_at, lambda *a: in_halves(whole(*a), pause))
    timed = Report.timed

    def step(report: Report, name: str) -> AbstractContextManager[None]:
        if name == fault.pause_at:
            pause()
        return timed(report, name)

    Report.timed = step  # type: ignore[method-assign, assignment]
    sys.exit(call_main(*arguments))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def in_halves(slabs: Iterator[torch.Tensor], pause: Callable[[], None]) -> Iterator[torch.Tensor]:
    for slab in slabs:
        half = slab.shape[2] // 2
        yield slab[:, :, :half].contiguous()
        pause()
        yield slab[:, :, half:].contiguous()


class Running:
    """A hurt main program."""

    def __init__(self, log: Path, arguments: list[str], fault: Fault = Fault()) -> None:
        log.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.process = FORKED.Process(target=hurt_main, args=(fault, log, arguments))
        self.process.start()

    def said(self) -> str:
        return (self.log / "stderr").read_text()

    def until(self, line: str) -> "Running":
        """Waits for that line in the log."""
        log = self.log / "stdout"
        wait_for(lambda: not self.process.is_alive() or (log.exists() and f"{line}\n" in log.read_text()))
        assert self.process.is_alive(), self.said()
        return self

    def signal(self, number: int) -> "Running":
        assert self.process.pid
        os.kill(self.process.pid, number)
        return self

    def ended(self) -> int:
        """The exit code."""
        self.process.join(SECONDS)
        code = self.process.exitcode
        self.process.kill()
        assert code is not None
        return code


@pytest.fixture(scope="module")
def options(example: Path, small_weights: Path) -> Callable[[Path, str], list[str]]:
    """Options for the example, with its masks (faster). The other pair has another result and another name."""

    def of(output: Path, pair: str = "this") -> list[str]:
        masks = [f"--{role}-mask={example / f'{role}_lobes.mha'}" for role in ("fixed", "moving")]
        fixed = shutil.copy(example / "fixed.mha", output.parent / "other.mha")
        other = [f"--fixed={fixed}", f"--moving={fixed}", masks[0], masks[0].replace("fixed", "moving", 1)]
        return [*pair_options(example, output, small_weights), *(masks if pair == "this" else other)]

    return of


Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Callable[[str], Path]:
    """The output of a run that nothing happened to."""

    @functools.cache
    def output(pair: str = "this") -> Path:
        folder = tmp_path_factory.mktemp("alone")
        assert Running(folder / "log", options(folder / "out", pair)).ended() == 0
        return folder / "out"

    return output


def images(output: Path) -> dict[str, bytes]:
    """What lies in /output, without results.json (times differ) and hidden files."""
    names = {name for name in files_below(output) if not Path(name).name.startswith(".")}
    return {name: (output / name).read_bytes() for name in names - {"results.json"}}


def hidden(output: Path) -> set[str]:
    return {name for name in files_below(output) if Path(name).name.startswith(".")}


def one_sentence(said: str) -> str:
    assert "Traceback" not in said and said.count("\n") == 1 and said.endswith("\n"), said
    return said


# --- stopped ---------------------------------------------------------------------------------------------------------

MOMENTS = ("lungs", "cascade", "field_slabs", "warped_slabs")
STOPS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_run_leaves_nothing_that_looks_complete(
    tmp_path: Path, options: Options, alone: Callable[[str], Path], moment: str, number: signal.Signals
) -> None:
    """The images of an earlier run stay, as long as nothing of the new one is there; results.json goes at once."""
    before, after = images(alone("other")), images(alone("this"))
    output = shutil.copytree(alone("other"), tmp_path / "out")
    running = Running(tmp_path / "log", options(output), Fault(moment)).until("paused").signal(number)
    assert running.ended() == STOPS[number]
    assert running.said() == "" if number == signal.SIGKILL else number.name in one_sentence(running.said())

    left = images(output)
    assert left.items() <= before.items() | after.items()  # each whole, old or new
    if moment in ("lungs", "cascade"):
        assert left == before
    assert not (output / "results.json").exists()
    assert len(hidden(output)) == (1 if number == signal.SIGKILL and moment.endswith("slabs") else 0)
    if moment == "field_slabs":  # the next run finds its way, and cleans up
        (output / PARTIAL.format("0a" * 16)).touch()
        assert Running(tmp_path / "log", options(output)).ended() == 0
        assert images(output) == after and hidden(output) == set()
        assert results(output)["fixed"] == "fixed.mha"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_leaves_no_new_folders(tmp_path: Path, options: Options, number: signal.Signals) -> None:
    (tmp_path / "in").mkdir()
    arguments = [*options(tmp_path / "in" / "out"), f"--output={tmp_path / 'not' / 'there'}"]
    running = Running(tmp_path / "log", arguments, Fault("field_slabs")).until("paused").signal(number)
    assert running.ended() == STOPS[number]
    assert not (tmp_path / "not").exists()


def test_ctrl_c_on_the_command_line(tmp_path: Path, options: Options) -> None:
    """The whole process as users start it, stopped early; without a home or a place for temporary files."""
    environment = os.environ | {"TMPDIR": "/nonexistent", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "algorithm", *options(tmp_path / "out")]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any("Finding the lungs" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "SIGINT" in one_sentence(said)
    assert files_below(tmp_path / "out") == set()


def test_a_signal_that_a_library_hides_still_stops() -> None:
    """Compiled modules that are being loaded replace every exception by an ImportError."""

    def loading() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)  # a signal waits for the next instruction of Python
        except BaseException:
            raise ImportError("numpy._core.multiarray failed to import") from None

    def job() -> None:
        with stopped_by_signals():
            loading()

    assert exit_code(job) == 130


def test_a_signal_waits_until_a_thread_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the pool does not know of the thread, and does not wait for it. Another thread may receive the signal."""
    threading.Thread(target=time.sleep, args=(5.0,), daemon=True).start()
    start, done = threading._start_new_thread, []  # type: ignore[attr-defined]

    def late(function: Callable[..., None], arguments: tuple[object, ...]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return start(lambda: (time.sleep(0.3), function(*arguments)), ())

    monkeypatch.setattr(threading, "_start_new_thread", late)
    with pytest.raises(Stopped), stopped_by_signals(), Pool(1) as pool:
        pool.submit(done.append, 1)
    assert done == [1]


def test_an_error_without_a_signal_stays_an_error() -> None:
    with pytest.raises(ImportError), stopped_by_signals():
        raise ImportError


# --- two at once -----------------------------------------------------------------------------------------------------


def test_two_runs_at_once_give_what_each_gives_alone(
    tmp_path: Path, options: Options, alone: Callable[[str], Path]
) -> None:
    pairs = ("this", "other")
    outputs = [tmp_path / pair / "out" for pair in pairs]
    for output in outputs:
        output.parent.mkdir()
    runs = [Running(o.parent / "log", options(o, pair)) for o, pair in zip(outputs, pairs, strict=True)]
    assert [run.ended() for run in runs] == [0, 0]
    assert [images(output) for output in outputs] == [images(alone(pair)) for pair in pairs]


def test_two_runs_at_once_into_one_folder_leave_the_whole_of_the_last(
    tmp_path: Path, options: Options, alone: Callable[[str], Path]
) -> None:
    output = tmp_path / "out"
    first = Running(tmp_path / "first", options(output), Fault("warped_slabs", tmp_path / "go")).until("paused")
    second = Running(tmp_path / "second", options(output, "other")).until("[7/11] Measuring the quality ...")
    time.sleep(1.0)  # it wants to write now
    (tmp_path / "go").touch()
    assert (first.ended(), second.ended()) == (0, 0), first.said() + second.said()
    assert images(output) == images(alone("other")) and hidden(output) == set()
    assert results(output)["fixed"] == "other.mha"


# --- no room ---------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only some users may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path, options: Options) -> None:
    """Large enough for nothing, and for the field only."""
    for size, left in (("200k", set()), ("500k", {"images/displacement-field/fixed.mha"})):
        with small_disk(tmp_path / size, size) as disk:
            run = Running(tmp_path / "log", [*options(tmp_path / "out"), f"--output={disk / 'out'}"])
            assert run.ended() == 1
            assert "No space left on device" in one_sentence(run.said())
            assert files_below(disk) == {f"out/{name}" for name in left}
            assert left or not (disk / "out").exists()


def test_a_limit_on_the_size_of_files(tmp_path: Path, options: Options) -> None:
    run = Running(tmp_path / "log", options(tmp_path / "out"), Fault(limit=(resource.RLIMIT_FSIZE, 100_000)))
    assert run.ended() == 1
    assert str(tmp_path / "out") in one_sentence(run.said())
    assert not (tmp_path / "out").exists()


def test_no_memory(tmp_path: Path, options: Options, alone: Callable[[str], Path]) -> None:
    """From a limit within which nothing can be read to one that suffices, or nearly."""
    codes = []
    for megabytes in (100, 300, 340, 360, 370, 380, 390):
        output = tmp_path / "out"
        run = Running(tmp_path / "log", options(output), Fault(limit=(resource.RLIMIT_DATA, megabytes * 10**6)))
        codes.append(run.ended())
        if codes[-1] == 0:
            assert images(output) == images(alone("this"))
            shutil.rmtree(output)
            continue
        assert codes[-1] == 1, run.said()
        assert one_sentence(run.said()).startswith("out of memory: ")
        assert not output.exists()
    assert codes[0] == 1


def test_a_scan_that_does_not_fit_into_memory_is_no_bad_input(tmp_path: Path, options: Options) -> None:
    fixed = tmp_path / "fixed.mha"
    sitk.WriteImage(sitk.Image([700, 700, 700], sitk.sitkInt16), fixed, useCompression=True)
    limit = (resource.RLIMIT_DATA, 600 * 10**6)
    run = Running(tmp_path / "log", [*options(tmp_path / "out"), f"--fixed={fixed}"], Fault(limit=limit))
    assert run.ended() == 1
    assert one_sentence(run.said()).startswith(f"out of memory: {fixed}: no room for its 343000000 voxels; ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stdout", ["closed pipe", "full disk"])
def test_a_log_that_cannot_be_written_does_not_matter(
    tmp_path: Path, options: Options, alone: Callable[[str], Path], stdout: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = "import sys; from tests.support.running import call_main; sys.exit(call_main(*sys.argv[1:]))"
    command = [sys.executable, "-c", program, *options(tmp_path / "out")]
    with os.fdopen(writer, "wb") as pipe, Path("/dev/full").open("wb") as full:
        out = pipe if stdout == "closed pipe" else full
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert images(tmp_path / "out") == images(alone("this"))


# --- damaged files ---------------------------------------------------------------------------------------------------

KINDS = (".mha", ".z.mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".z.nrrd", "dicom", "inputs.json")
DAMAGED_FILES = 200
"""Of each kind."""
MOST_S = 5.0
MOST_BYTES = 2**30
"""Of memory, besides what is taken at the start."""
HEADER = 800
"""Bytes of a file that may be its header."""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One thing is wrong; every second time in what may be the header."""
    spoilt = bytearray(content)
    at = int(rng.integers(min(HEADER, len(content)) if rng.random() < 0.5 else len(content)))
    count = int(rng.integers(1, 9))
    how = rng.integers(6)
    if how == 0:
        spoilt[at] ^= 1 << int(rng.integers(8))
    elif how == 1:
        del spoilt[at : at + count]
    elif how == 2:
        spoilt[at:at] = rng.bytes(count)
    elif how == 3:
        del spoilt[at:]
    elif how == 4:
        spoilt[at : at + count] = bytes([int(rng.choice([0, 0x7F, 0xFF]))]) * count
    else:  # an absurd number
        digits = [match.span() for match in re.finditer(rb"\d+", content[:HEADER])]
        start, end = digits[int(rng.integers(len(digits)))] if digits else (at, at + 1)
        spoilt[start:end] = str(rng.choice([-1, 0, 99999, 10**10, 10**19])).encode()
    return bytes(spoilt)


def write_plain(folder: Path, kind: str) -> Path:
    """A small scan; the path is that of the file to be damaged."""
    voxels = np.random.default_rng(0).integers(-1000, 400, (16, 17, 18)).astype(np.int16)
    scan = sitk.GetImageFromArray(voxels)
    scan.SetSpacing((3.0, 3.0, 3.0))
    folder.mkdir()
    if kind == "dicom":
        return sorted(write_series(folder, scan).iterdir())[5]
    if kind == "inputs.json":
        sockets = [{"socket": {"slug": f"{r}-image", "relative_path": f"images/{r}"}} for r in ("fixed", "moving")]
        for role in ("fixed", "moving"):
            (folder / "images" / role).mkdir(parents=True)
            (folder / "images" / role / "a.mha").touch()
        (folder / kind).write_text(json.dumps(sockets))
    else:
        sitk.WriteImage(scan, str(folder / f"a{kind}"), ".z" in kind or kind.endswith("gz"))
    return folder / (kind if kind == "inputs.json" else f"a{kind}")


def read(path: Path, kind: str) -> Image | Inputs:
    if kind == "inputs.json":
        return find_inputs(path.parent)
    return read_image(path.parent if kind == "dicom" else path)


def outcome(path: Path, kind: str) -> Image | None:
    """The scan, if one can be read; AssertionError unless what came is an image, inputs or one sentence."""
    try:
        found = read(path, kind)
        if isinstance(found, Image) and kind != "dicom":
            read_mask(path)
    except InputError as error:
        sentence = str(error)
        assert str(path.parent) in sentence and "expected" in sentence and "\n" not in sentence, sentence
        return None
    if isinstance(found, Inputs):
        assert found.fixed.is_file() and found.moving.is_file()
        return None
    assert found.voxels.isfinite().all() and found.voxels.shape[2:] == found.grid.shape
    return found


def damage_and_read(folder: Path) -> None:
    """All in this process, with a limit of memory; folder/journal says how far it came."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[5])
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_BYTES,) * 2)
    with (folder / "journal").open("w", buffering=1) as journal:
        for kind in KINDS:
            path = write_plain(folder / f"files {kind}", kind)
            content, plain = path.read_bytes(), read(path, kind)
            for seed in range(DAMAGED_FILES):
                spoilt = damaged(content, np.random.default_rng(seed))
                path.write_bytes(spoilt)
                print(kind, seed, file=journal)
                start = time.process_time()
                found = outcome(path, kind)
                assert time.process_time() - start < MOST_S
                if found and isinstance(plain, Image) and checked(kind, content, spoilt):
                    assert torch.equal(found.voxels, plain.voxels)
            print(kind, "done", file=journal)


def checked(kind: str, content: bytes, spoilt: bytes) -> bool:
    """Whether the voxels have a checksum, and only they are damaged."""
    end = {".nii.gz": b"", ".z.mha": b"LOCAL\n", ".z.nrrd": b"\n\n"}.get(kind)
    if end is None:
        return False
    start = content.index(end) + len(end)
    return content[:start] == spoilt[:start]


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """No crash of SimpleITK, no terabytes for an absurd header, and nothing else than an image or an InputError."""
    process = FORKED.Process(target=damage_and_read, args=(tmp_path,))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    came_to = (tmp_path / "journal").read_text().splitlines()
    assert process.exitcode == 0, f"{came_to[-1]}: {(tmp_path / 'stderr').read_text()[-2000:]}"
    assert came_to.count("dicom done") == 1 and len(came_to) == len(KINDS) * (DAMAGED_FILES + 1)
    assert (tmp_path / "stdout").read_text() == ""


@pytest.mark.parametrize("axes", ["99999", "10", "0", "-1", "3.5", "x", "", "3\nNDims = 99999"])
def test_a_number_of_axes_that_crashes_simpleitk_is_refused(tmp_path: Path, axes: str) -> None:
    path = write_plain(tmp_path / "in", ".mha")
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", f"NDims = {axes}".encode()))
    assert outcome(path, ".mha") is None


@pytest.mark.parametrize("start", [np.nan, np.inf, -np.inf])
def test_nifti_voxels_at_no_place_are_refused(tmp_path: Path, start: float) -> None:
    path = write_plain(tmp_path / "in", ".nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 108, start)
    path.write_bytes(content)
    assert outcome(path, ".nii") is None

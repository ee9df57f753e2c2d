"""``python -m algorithm serve``: as the platform's invoke method wants it, and with the results of a single run."""

import functools
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest

import algorithm.serve
from algorithm.errors import InputError
from algorithm.report import Report
from algorithm.serve import attempt, serve
from phantom.__main__ import input_files
from phantom.forms import FORMS, write_input
from tests.support.running import HANGS_HALF_WAY, call_main, field_array, files_below, results

ROOT = Path(__file__).parent.parent
OPENER = build_opener(ProxyHandler({}))  # no proxy of this machine's

REAL = "import sys; from tests.support.running import call_main; sys.exit(call_main('serve', *sys.argv[1:]))"
"""The server as it is, but for a faster and coarser pre-alignment."""

STUB = """
import hashlib, logging, sys, time
from algorithm.serve import serve
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
def case():
    logging.info("begins")
    {body}
    logging.info("ends")
serve(case, 0)
"""
"""A server whose cases are made up."""


class Running:
    """A server in a process of its own, on a free port; what it logs goes to files."""

    def __init__(self, folder: Path, program: str, *arguments: object) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-c", program, *map(str, arguments)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        self.port = int(self.wait_for(r"ready on port (\d+)")[1])

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        """The first match in what was logged, once it is there."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.out.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.out.read_text() + self.err.read_text()
            time.sleep(0.02)
        return match

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        """Status and body of the answer."""
        request = Request(f"http://127.0.0.1:{self.port}{path}", method=method, data=body)
        try:
            with OPENER.open(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def invoke(self) -> tuple[int, str]:
        return self.request("POST", "/invoke")

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def terminate(self) -> tuple[int, float]:
        """Exit code after SIGTERM, and how many seconds it took."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60), time.monotonic() - start

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the server below: its input and its output."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(folder: Path, small_weights: Path) -> Iterator[Running]:
    with Running(folder, REAL, *options(folder, small_weights)) as running:
        yield running


def options(folder: Path, weights: Path) -> list[str]:
    places = [f"--input={folder / 'input'}", f"--output={folder / 'output'}", f"--weights={weights}"]
    return [*places, "--device=cpu", "--port=0"]


def refill(folder: Path, example: Path, form: str = "names", masks: bool = True) -> None:
    """What the platform does between two cases."""
    write_input(folder / "input", form, input_files(example, masks))
    shutil.rmtree(folder / "output", ignore_errors=True)
    (folder / "output").mkdir()


def images(output: Path) -> list[bytes]:
    """Displacement field and warped image, byte by byte."""
    return [
        next((output / "images" / name).glob("*.mha")).read_bytes() for name in ("displacement-field", "warped-moving")
    ]


# --- the algorithm, served -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, example: Path, small_weights: Path) -> Callable[[bool], Path]:
    """The output of a single run, with masks or without, in the platform's layout."""

    @functools.cache
    def output(masks: bool) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        refill(folder, example, "socket", masks)
        assert call_main(*options(folder, small_weights)[:-1]) == 0
        return folder / "output"

    return output


def test_cases_in_a_row_give_what_single_runs_give(
    server: Running, folder: Path, example: Path, alone: Callable[[bool], Path]
) -> None:
    """In each form of input, in bounded memory; once without masks, so that not all fields are the same."""
    resident_mb = []
    for form, masks in [("interface", False), *((form, True) for form in FORMS)]:
        refill(folder, example, form, masks)
        start = time.monotonic()
        assert server.invoke() == (201, "done\n")
        seconds = time.monotonic() - start
        resident_mb.append(server.resident_mb())
        ours, theirs = results(folder / "output"), results(alone(masks))
        for key in theirs.keys() - {"fixed", "moving", "timings_s", "peak_memory_mb", "paths"}:
            assert ours[key] == theirs[key], key
        assert ours["timings_s"]["total"] <= seconds  # of this case alone
        if form in ("socket", "interface"):
            assert images(folder / "output") == images(alone(masks))
        np.testing.assert_array_equal(field_array(folder / "output"), field_array(alone(masks)))
    assert np.abs(field_array(alone(True)) - field_array(alone(False))).max() > 0.1
    assert resident_mb[4] - resident_mb[1] < 50


def test_a_bad_case_leaves_the_server_alive(server: Running, folder: Path, example: Path) -> None:
    for spoil, says in (
        (lambda: (folder / "input" / "moving.mha").unlink(), "no image for moving"),
        (lambda: (folder / "input" / "fixed.mha").write_text("this is no image"), "fixed.mha"),
        (lambda: shutil.rmtree(folder / "input"), "there is no such folder"),
    ):
        refill(folder, example)
        spoil()
        status, sentence = server.invoke()
        assert status == 422
        assert says in sentence and sentence.count("\n") == 1
        assert server.err.read_text().endswith(sentence)
        assert files_below(folder / "output") == set()
    assert "Traceback" not in server.err.read_text()
    refill(folder, example)
    assert server.invoke() == (201, "done\n")


def test_a_bad_case_leaves_nothing_of_the_one_before(server: Running, folder: Path, example: Path) -> None:
    """The server is not refilled: only the input changes."""
    refill(folder, example)
    assert server.invoke() == (201, "done\n")
    assert len(files_below(folder / "output")) == 3
    (folder / "output" / "images" / "notes.txt").touch()
    (folder / "input" / "fixed.mha").write_text("this is no image")
    assert server.invoke()[0] == 422
    assert files_below(folder / "output") == {"images/notes.txt"}
    refill(folder, example)
    (folder / "output" / "images" / "warped-moving").mkdir(parents=True)
    (folder / "output" / "images" / "warped-moving" / "own.nrrd").touch()
    status, sentence = server.invoke()
    assert status == 422 and "own.nrrd: was not written by this program" in sentence
    assert files_below(folder / "output") == {"images/warped-moving/own.nrrd"}


def test_input_may_be_a_link_that_moves(server: Running, folder: Path, example: Path) -> None:
    """So the platform swaps the cases."""
    refill(folder, example, "interface")
    (folder / "input").rename(folder / "elsewhere")
    (folder / "input").symlink_to(folder / "elsewhere")
    assert server.invoke() == (201, "done\n")
    (folder / "input").unlink()
    shutil.rmtree(folder / "elsewhere")


@pytest.mark.parametrize("method", ["field_slabs", "warped_slabs"])
def test_sigterm_while_writing_leaves_no_part_of_a_file(
    tmp_path: Path, example: Path, small_weights: Path, method: str
) -> None:
    refill(tmp_path, example)
    program = HANGS_HALF_WAY.format(method=method)
    with (
        Running(tmp_path, program, "serve", *options(tmp_path, small_weights)) as running,
        ThreadPoolExecutor() as pool,
    ):
        client = pool.submit(running.invoke)
        running.wait_for("half-way")
        code, seconds = running.terminate()
        assert isinstance(client.exception(), OSError)  # no answer
    assert (code, running.err.read_text()) == (0, "")
    assert seconds < 5
    done = {"images/displacement-field/fixed.mha"} if method == "warped_slabs" else set()
    assert files_below(tmp_path / "output") == done  # results.json, the last, is missing
    assert not done or np.isfinite(field_array(tmp_path / "output")).all()


# --- the server, with made-up cases ----------------------------------------------------------------------------------


def test_routes(tmp_path: Path) -> None:
    with Running(tmp_path, STUB.format(body="pass")) as running:
        assert running.request("GET", "/health") == (200, "ready\n")
        assert running.request("POST", "/invoke", b"x" * 100_000) == (201, "done\n")  # the body is passed over
        for method, path in (("GET", "/"), ("GET", "/invoke"), ("POST", "/health"), ("POST", "/invoke/")):
            status, sentence = running.request(method, path)
            assert status == 404 and f"{method} {path}" in sentence
        assert running.request("DELETE", "/invoke")[0] == 501
        assert running.out.read_text().count("begins") == 1
        assert running.err.read_text() == ""  # the platform takes it for warnings
        assert running.terminate()[0] == 0


def test_cases_come_one_after_the_other_while_health_is_answered(tmp_path: Path) -> None:
    with Running(tmp_path, STUB.format(body="time.sleep(0.5)")) as running, ThreadPoolExecutor() as pool:
        with socket.create_connection(("127.0.0.1", running.port)):  # a client that says nothing is in nobody's way
            answers = [pool.submit(running.invoke) for _ in range(4)]
            running.wait_for("begins")
            assert running.request("GET", "/health") == (200, "ready\n")
            assert "ends" not in running.out.read_text()
            assert [answer.result() for answer in answers] == [(201, "done\n")] * 4
        assert re.findall("begins|ends", running.out.read_text()) == ["begins", "ends"] * 4


@pytest.mark.parametrize(
    ("body", "least_s"),
    [("time.sleep(600)", 0), ("hashlib.pbkdf2_hmac('sha512', b'', b'', 2**31 - 1)", 2)],
    ids=["one that can be interrupted", "deep in foreign code"],
)
@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_in_time(tmp_path: Path, busy: bool, body: str, least_s: float) -> None:
    with Running(tmp_path, STUB.format(body=body)) as running, ThreadPoolExecutor() as pool:
        client = pool.submit(running.invoke) if busy else None
        if busy:
            running.wait_for("begins")
        code, seconds = running.terminate()
        assert code == 0
        assert (least_s if busy else 0) <= seconds < 4.5
        assert client is None or isinstance(client.exception(), OSError)
        assert running.err.read_text() == ""


@pytest.mark.parametrize(
    ("error", "answer", "traceback"),
    [
        (InputError("a.mha: is none"), (422, "a.mha: is none"), False),
        (OSError(28, "No space left on device", "/output/x"), (500, "OSError: [Errno 28] No space left"), False),
        (MemoryError("17 GB"), (500, "out of memory: 17 GB"), False),
        (RuntimeError("several\nlines"), (500, "RuntimeError: several lines"), True),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    capfd: pytest.CaptureFixture[str], error: Exception, answer: tuple[int, str], traceback: bool
) -> None:
    def case() -> None:
        raise error

    status, sentence = attempt(case)
    assert status == answer[0] and sentence.startswith(answer[1]) and "\n" not in sentence
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1] == sentence
    assert ("Traceback" in printed) == traceback


def test_each_case_has_its_own_peak_of_memory() -> None:
    peaks_mb = []

    def case_of(megabytes: int) -> Callable[[], None]:
        def case() -> None:
            memory = mmap.mmap(-1, megabytes * 10**6)  # the heap may have as much to spare
            np.frombuffer(memory, np.uint8)[:] = 1
            memory.close()
            peaks_mb.append(peak_mb())

        return case

    for megabytes in (250, 1):
        assert attempt(case_of(megabytes)).status == HTTPStatus.CREATED
    assert peaks_mb[0] - peaks_mb[1] > 100


def peak_mb() -> int:
    peak: int = Report().to_dict()["peak_memory_mb"]
    return peak


def test_a_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithm.serve, "leave_on_signals", lambda: None)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        for port in (taken.getsockname()[1], 65536):
            with pytest.raises(InputError, match=f"--port {port}: .* expected a free port"):
                serve(lambda: None, port)
    for host in ("192.0.2.1", "no such host", "a" * 70):
        with pytest.raises(InputError, match=f"--host {host} --port 0: .* an address of this machine"):
            serve(lambda: None, 0, host)


@pytest.mark.parametrize(("arguments", "address"), [([], "127.0.0.1"), (["--host=0.0.0.0"], "0.0.0.0")])
def test_it_listens_on_this_machine_only_unless_told(
    monkeypatch: pytest.MonkeyPatch, small_weights: Path, arguments: list[str], address: str
) -> None:
    def listening(self: algorithm.serve.Server) -> None:
        addresses.append(self.server_address[0])
        raise OSError("enough")

    addresses: list[str] = []
    monkeypatch.setattr(algorithm.serve, "leave_on_signals", lambda: None)
    monkeypatch.setattr(algorithm.serve.Server, "server_activate", listening)
    assert call_main("serve", f"--weights={small_weights}", "--device=cpu", "--port=0", *arguments) == 2
    assert addresses == [address]


# --- command line ----------------------------------------------------------------------------------------------------


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert call_main("--help") == 0
    assert "python -m algorithm serve" in capfd.readouterr().out
    assert call_main("serve", "--help") == 0
    text = capfd.readouterr().out
    assert all(option in text for option in ("--port", "(default: 4743)", "--device", "--field-layout", "POST /invoke"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--nonsense"], "--nonsense"),
        (["serve", "--port=x"], "--port"),
        (["--port=4743"], "--port"),
        (["--device=cpu", "serve"], "serve"),
        (["serve", "--weights=/nonexistent"], "/nonexistent"),
    ],
)
def test_wrong_arguments(capfd: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert call_main(*arguments) == 2
    message = capfd.readouterr().err
    assert says in message.splitlines()[-1] and "Traceback" not in message

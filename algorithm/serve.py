"""The invoke method of grand-challenge.org: a server that keeps the model loaded from case to case.

GET /health     200; the socket opens only when the model is loaded
POST /invoke    201: /input was registered into /output; 422: bad input; 500: a fault. The body says what, in a sentence

Requests are answered by threads, cases run in the main thread, one after the other: there SIGTERM can end them with
an exception, so that they clean up. Source: sagemaker_shim, with which the platform calls the image.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import SimpleQueue
from socketserver import ThreadingTCPServer
from types import FrameType
from typing import Any, NamedTuple

from .errors import InputError, memory_sentence, out_of_memory

PORT = 4743
"""Where the platform expects the server."""
HOST = "127.0.0.1"
"""This machine only: whoever reaches the server can make it work. A container says 0.0.0.0; its network guards it."""
GRACE_S = 3.0
"""So long after SIGTERM a case may clean up; the platform kills after 5 s."""
LONGEST_BODY = 1 << 20
"""Bytes of a request that are skipped; the platform sends none."""

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Status and body of a response."""

    status: HTTPStatus
    sentence: str


def serve(case: Callable[[], None], port: int, host: str = HOST) -> None:
    """Runs ``case`` at each POST /invoke, until SIGTERM or SIGINT: then the process ends, with exit code 0.

    Port 0 is any that is free; the log says which. InputError when the port cannot be had.
    """
    leave_on_signals()
    try:
        server = Server(host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error}), expected a free port and an address of "
            "this machine"
        ) from error
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        log.info("ready on port %d", server.server_address[1])
        try:
            while True:
                waiting = server.cases.get()
                waiting.set_result(attempt(case))
        except SystemExit:  # the case has cleaned up; to take down all of Python and torch may need seconds
            os._exit(0)


def attempt(case: Callable[[], None]) -> Answer:
    """Runs a case; whatever is wrong with it, the next one can follow. Sentences on stderr as `exit_code` has them."""
    forget_peak_memory()
    try:
        case()
        return Answer(HTTPStatus.CREATED, "done")
    except InputError as error:
        answer = Answer(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
    except Exception as error:
        answer = Answer(HTTPStatus.INTERNAL_SERVER_ERROR, " ".join(fault_sentence(error).split()))
    finally:
        gc.collect()  # images in reference cycles would add to the memory of the next case
    print(answer.sentence, file=sys.stderr, flush=True)
    return answer


def fault_sentence(error: BaseException) -> str:
    """What was no user's mistake; with a traceback on stderr when it is none of the system's either."""
    if out_of_memory(error):
        return memory_sentence(error)
    if not isinstance(error, OSError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def forget_peak_memory() -> None:
    """Starts the process's peak of resident memory anew, where Linux allows it: each case reports its own."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def leave_on_signals() -> None:
    """SIGTERM and SIGINT raise SystemExit(0) in the main thread; should that take too long, the process ends so."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # a second one would disturb the cleaning up
        log.info("%s: leaving", signal.Signals(number).name)
        raise SystemExit(0)

    def end_late() -> None:
        os.read(reader, 1)
        time.sleep(GRACE_S)
        os._exit(0)

    # Python calls `leave` only between two of its own instructions, and a convolution may take seconds. The pipe is
    # written to at once.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    threading.Thread(target=end_late, daemon=True).start()


class Server(ThreadingTCPServer):
    """Listens; ``cases`` are those whose turn has not come yet.

    No HTTPServer: that one asks the network for its own name when it starts.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.cases: SimpleQueue[Future[Answer]] = SimpleQueue()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is no fault of the algorithm."""
        log.info("%s: %s", client_address[0], sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    """Answers one request, in a thread of its own."""

    server: Server
    timeout = 10.0  # s that the client may take to send its request

    def do_GET(self) -> None:
        """Is the model loaded? It is."""
        self._answer(Answer(HTTPStatus.OK, "ready") if self.path == "/health" else self._unknown())

    def do_POST(self) -> None:
        """Waits for its turn, and for the case."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():
            self.rfile.read(min(int(length), LONGEST_BODY))  # unread, it would break the answer's way
        self._answer(self._case() if self.path == "/invoke" else self._unknown())

    def _case(self) -> Answer:
        waiting: Future[Answer] = Future()
        self.server.cases.put(waiting)
        return waiting.result()

    def _unknown(self) -> Answer:
        return Answer(HTTPStatus.NOT_FOUND, f"{self.command} {self.path}: expected GET /health or POST /invoke")

    def _answer(self, answer: Answer) -> None:
        body = answer.sentence.encode(errors="backslashreplace") + b"\n"
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """On stdout like all the rest: the platform takes stderr for warnings."""
        log.info("%s: " + format, self.address_string(), *args)

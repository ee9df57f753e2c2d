"""The invoke method of grand-challenge.org: a server that keeps the model loaded between cases.

GET /health     200; the socket opens only when the model is loaded
POST /invoke    201: /input was registered into /output; 422: bad input; 500: a fault. The body is a sentence

Threads answer the requests. Cases run in the main thread, one after the other, because there SIGTERM can end them with
an exception, so that they clean up. Source: sagemaker_shim, through which the platform calls the image.
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
"""The port on which the platform expects the server."""
HOST = "127.0.0.1"
"""Listen on this machine only, because everyone who reaches the server can start work. A container uses 0.0.0.0; its
network protects it."""
GRACE_S = 3.0
"""Time after SIGTERM in which a case may clean up; the platform kills the process after 5 s."""
LONGEST_BODY = 1 << 20
"""Maximum number of bytes of a request body that are read and ignored; the platform sends none."""

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Status and body of a response."""

    status: HTTPStatus
    sentence: str


def serve(case: Callable[[], None], port: int, host: str = HOST) -> None:
    """Run ``case`` at each POST /invoke until SIGTERM or SIGINT; then the process ends with exit code 0.

    Port 0 means any free port; the log names it. InputError if the port is not available.
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
        except SystemExit:  # the case has cleaned up; a full exit of Python and torch may take seconds
            os._exit(0)


def attempt(case: Callable[[], None]) -> Answer:
    """Run a case; after any error, the next case can follow. Messages on stderr are those of `exit_code`."""
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
    """The message for an error that is not the user's mistake; with a traceback on stderr unless the system caused
    it."""
    if out_of_memory(error):
        return memory_sentence(error)
    if not isinstance(error, OSError):
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def forget_peak_memory() -> None:
    """Reset the process's peak of resident memory, where Linux allows it, so that each case reports its own peak."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def leave_on_signals() -> None:
    """Make SIGTERM and SIGINT raise SystemExit(0) in the main thread; if that takes too long, the process ends
    anyway."""

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # a second signal would disturb the clean-up
        log.info("%s: leaving", signal.Signals(number).name)
        raise SystemExit(0)

    def end_late() -> None:
        os.read(reader, 1)
        time.sleep(GRACE_S)
        os._exit(0)

    # Python calls `leave` only between two Python instructions, and a convolution may take seconds. The pipe is
    # written immediately.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    threading.Thread(target=end_late, daemon=True).start()


class Server(ThreadingTCPServer):
    """The listening server; ``cases`` is the queue of waiting cases.

    It is not an HTTPServer, because that class asks the network for its own name when it starts.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.cases: SimpleQueue[Future[Answer]] = SimpleQueue()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Only log a broken connection: it is not an error of the algorithm."""
        log.info("%s: %s", client_address[0], sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    """Answers one request in its own thread."""

    server: Server
    timeout = 10.0  # time (s) that the client has to send its request

    def do_GET(self) -> None:
        """Answer /health: the server listens only when the model is loaded."""
        self._answer(Answer(HTTPStatus.OK, "ready") if self.path == "/health" else self._unknown())

    def do_POST(self) -> None:
        """Answer /invoke: wait for the turn of the case and for its end."""
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():
            self.rfile.read(min(int(length), LONGEST_BODY))  # an unread body would break the answer
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
        """Log to stdout like everything else, because the platform treats stderr as warnings."""
        log.info("%s: " + format, self.address_string(), *args)

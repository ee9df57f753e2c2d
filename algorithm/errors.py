"""The exception for errors that the user can correct, and the exit codes."""

import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


class InputError(ValueError):
    """Bad input or arguments: one sentence that names the file, what came and what was expected. Exit code 2."""


class Progress(logging.StreamHandler):
    """Messages for stdout. If they cannot be written (full disk, closed pipe), the job continues.

    On a terminal, the next message with ``instead`` overwrites a ``passing`` message. In a file or a pipe, every
    message is a line.
    """

    waiting = False

    def format(self, record: logging.LogRecord) -> str:
        """The message, after the characters that end or clear a waiting line."""
        before = "" if not self.waiting else "\r\x1b[2K" if getattr(record, "instead", False) else "\n"
        self.waiting = bool(getattr(record, "passing", False)) and self.stream.isatty()
        self.terminator = "" if self.waiting else "\n"
        return before + super().format(record)

    def end_line(self) -> None:
        """End a waiting line before something else is printed."""
        if self.waiting:
            self.waiting = False
            with suppress(OSError):
                print(file=self.stream, flush=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """Redirect all further output to /dev/null: the rest of the buffer would fail again at the end."""
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


STOPPING = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """SIGTERM or SIGINT came. Not an Exception, so that no ``except Exception`` catches it."""


def exit_code(job: Callable[[], None]) -> int:
    """Run the job of a command line, with progress on stdout. Returns the exit code.

    0: done. Otherwise, the last line of stderr is a sentence, and the code is 2 for bad input, 1 for a fault, or 128
    plus the signal's number (130, 143) if SIGINT or SIGTERM came in `stopped_by_signals`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[Progress(sys.stdout)])
    try:
        job()
    except InputError as error:
        return _failed(str(error), 2)
    except OSError as error:
        return _failed(f"{type(error).__name__}: {error}", 1)
    except Stopped as stopped:
        number: signal.Signals = stopped.args[0]
        return _failed(f"stopped by {number.name} before the end", 128 + number)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) and not gpu_unusable(error):
            raise
        return _failed(
            memory_sentence(error) if out_of_memory(error) else f"the GPU cannot be used: {first_line(error)}", 1
        )
    return 0


def _failed(sentence: str, code: int) -> int:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Progress):
            handler.end_line()
    print(sentence.replace("\n", "\\n"), file=sys.stderr)  # file names may have line breaks
    return code


class _Held:
    """The state of `signals_held`."""

    held = False
    waiting: Callable[[], None] | None = None


@contextmanager
def signals_held() -> Iterator[None]:
    """A signal of `stopped_by_signals` waits for the end of the body. Only the main thread is ever stopped.

    Blocking the signals does not suffice: another thread would receive them, and the main thread would still stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _Held.held = _Held.held, True
    try:
        yield
    finally:
        _Held.held = before
        waiting, _Held.waiting = _Held.waiting, None
        if waiting is not None:
            waiting()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped` in the body, so that it can clean up. Use it in the main thread only.

    Without a handler, SIGTERM would not even end Python as process 1 of a container.
    """
    came: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _Held.held:
            _Held.waiting = lambda: stop(number, frame)
            return
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second signal would disturb the clean-up
        came.append(Stopped(signal.Signals(number)))
        raise came[0]

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if came:  # compiled modules that are being loaded replace it, by an ImportError
            raise came[0] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the machine or the GPU did not suffice. The libraries have no common exception for it."""
    text = str(error)
    onednn = ("could not create a primitive", "could not execute a primitive")
    pytorch = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", *onednn)
    phrases = (*pytorch, "Failed to allocate memory", "can't start new thread")  # of SimpleITK, of Python
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(p in text for p in phrases))


UNUSABLE_GPU = (
    "no kernel image",  # for this architecture
    "invalid device function",
    "unsupported toolchain",
    "ARCH_MISMATCH",
    "CUDA driver",
    "NVIDIA driver",
    "no CUDA-capable device",
    "devices are busy or unavailable",
    "system not yet initialized",
    "STATUS_NOT_INITIALIZED",  # cuDNN and cuBLAS
    "not compiled with CUDA",
)


def gpu_unusable(error: BaseException) -> bool:
    """Whether driver and libraries cannot use the GPU. Faults of a program that runs on the GPU do not count."""
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in UNUSABLE_GPU)


def first_line(error: object) -> str:
    """The part of a library's message that a sentence can quote."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__


def peak_memory_bytes() -> int:
    """Peak memory of this process. On Linux, without the memory of the program that started it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_sentence(error: BaseException) -> str:
    """Message with the requested memory, the peak of the process, and the memory of the machine."""
    page, gb = os.sysconf("SC_PAGE_SIZE"), 1e9
    total, free = (os.sysconf(name) * page / gb for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    lines = str(error).splitlines() or ["no more could be had"]
    return (
        f"out of memory: {lines[0].rpartition('DefaultCPUAllocator: ')[2].rstrip('.')}; this process had held at most "
        f"{peak_memory_bytes() / gb:.1f} GB, the machine has {total:.1f} GB, {free:.1f} GB of them free"
    )

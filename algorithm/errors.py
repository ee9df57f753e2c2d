"""The one exception for what the user can put right, and the exit codes."""

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


class InputError(ValueError):
    """Bad input or arguments: one sentence that names the file, what came and what was expected. Exit code 2."""


class Progress(logging.StreamHandler):
    """Messages for stdout. Where they cannot be written (a full disk, a pipe that was closed) the job goes on.

    On a terminal a ``passing`` message waits on its line for the one that comes ``instead`` of it; in a file or a pipe
    every message is a line.
    """

    waiting = False

    def format(self, record: logging.LogRecord) -> str:
        """The message, after what ends or clears the line that waits."""
        before = "" if not self.waiting else "\r\x1b[2K" if getattr(record, "instead", False) else "\n"
        self.waiting = bool(getattr(record, "passing", False)) and self.stream.isatty()
        self.terminator = "" if self.waiting else "\n"
        return before + super().format(record)

    def end_line(self) -> None:
        """Before something else is printed."""
        if self.waiting:
            self.waiting = False
            with suppress(OSError):
                print(file=self.stream, flush=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """From here on, all goes to /dev/null: what is left in the buffer would fail again at the end."""
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


class Stopped(BaseException):
    """SIGTERM or SIGINT came. No Exception, so that nobody takes it for a fault."""


def exit_code(job: Callable[[], None]) -> int:
    """Runs a command line's job, progress on stdout: 0 done; otherwise with a sentence on stderr, its last line.

    2 bad input; 1 a fault; 128 and the signal's number (130, 143) when SIGINT or SIGTERM came in `stopped_by_signals`.
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


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Stopped` in the body, so that it cleans up. Only in the main thread.

    As process 1 of a container Python would not even end by SIGTERM without a handler.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one would disturb the cleaning up
        raise Stopped(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, the machine's or the GPU's, did not suffice: the libraries have no one exception for it."""
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
    """Whether driver and libraries cannot work with the GPU; faults of a program that runs on it are others."""
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in UNUSABLE_GPU)


def first_line(error: object) -> str:
    """Of what a library says, the part that a sentence can quote."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__


def peak_memory_bytes() -> int:
    """Most memory that this process has held. On Linux without that of the program which started it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_sentence(error: BaseException) -> str:
    """What was asked for, what the process had held at most, and what the machine has."""
    page, gb = os.sysconf("SC_PAGE_SIZE"), 1e9
    total, free = (os.sysconf(name) * page / gb for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    lines = str(error).splitlines() or ["no more could be had"]
    return (
        f"out of memory: {lines[0].rpartition('DefaultCPUAllocator: ')[2].rstrip('.')}; this process had held at most "
        f"{peak_memory_bytes() / gb:.1f} GB, the machine has {total:.1f} GB, {free:.1f} GB of them free"
    )

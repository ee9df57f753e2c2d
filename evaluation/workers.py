"""Runs cases in parallel processes, as many as cores and memory allow. A crash of one case does not stop the others."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import SimpleITK as sitk

T = TypeVar("T")
R = TypeVar("R")

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
RESERVED_BYTES = 2**30
"""Memory reserved for this process, which draws the page, and for the system."""


def each(function: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[int, R | Exception]]:
    """Yield ``(i, function(items[i]))`` for each item when it is done, or ``(i, the exception)``.

    When the system kills a process (mostly for lack of memory), the pool and all running items are lost. The remaining
    items are then run one by one, each in a new process. BrokenProcessPool is yielded only for items whose own process
    is killed again.
    """
    left = dict(enumerate(items))
    for number, outcome in _together(function, left, workers):
        del left[number]
        yield number, outcome
    for number, item in left.items():
        died: R | Exception = BrokenProcessPool("its process was killed, probably for want of memory")
        yield number, next((outcome for _, outcome in _together(function, {number: item}, 1)), died)


def _together(function: Callable[[T], R], items: dict[int, T], workers: int) -> Iterator[tuple[int, R | Exception]]:
    """As `each`, but after a process was killed, missing outcomes are left out."""
    threads = max(1, cores() // workers)
    # spawn, not fork: after a fork, a process may wait forever for threads that ITK had started
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (threads,)) as pool:
        numbers: dict[Future[R], int] = {}
        try:
            for number, item in items.items():
                numbers[pool.submit(function, item)] = number
        except BrokenProcessPool:
            pass
        for future in as_completed(numbers):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                continue
            yield numbers[future], error if isinstance(error, Exception) else future.result()


def _start(threads: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def workers_for(case_bytes: int, cases: int) -> int:
    """The number of cases of this size that fit into memory at the same time; at least one."""
    fitting = (memory_bytes() - RESERVED_BYTES) // max(case_bytes, 1)
    return max(1, min(cores(), cases, fitting))


def memory_bytes() -> int:
    """The memory of the machine, or the limit of the container if that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in CGROUP_LIMITS:
        text = Path(name).read_text().strip() if Path(name).is_file() else ""
        if text.isdigit():  # "max" means no limit
            limits.append(int(text))
    return min(limits)

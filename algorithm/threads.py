"""Parallel work of threads."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import ParamSpec, TypeVar

from .errors import signals_held

P = ParamSpec("P")
T = TypeVar("T")


class Pool(ThreadPoolExecutor):
    """Threads that no signal can make the pool forget.

    `Stopped`, raised in the main thread while a thread starts, would leave a thread that nobody waits for. It would
    abort the process when Python ends. So a signal waits until the thread has started.
    """

    def submit(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `ThreadPoolExecutor.submit`."""
        with signals_held():
            return super().submit(job, *args, **kwargs)


def in_parts(loop: Callable[[int, int, int], None], bounds: list[int]) -> None:
    """Call ``loop(part, first, end)`` in parallel for each two neighbours in ``bounds``."""
    with Pool(max(1, len(bounds) - 1)) as pool:
        jobs = [pool.submit(loop, part, *pair) for part, pair in enumerate(pairwise(bounds))]
        for job in jobs:
            job.result()


def even_parts(number: int) -> list[int]:
    """Bounds of equal parts of a list of length ``number``, one part for each of torch's threads."""
    import torch  # here: whoever only needs a pool need not load it

    threads = torch.get_num_threads()
    return [number * part // threads for part in range(threads + 1)]

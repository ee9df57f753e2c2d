"""Parallel work of threads on parts of a list."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


def in_parts(loop: Callable[[int, int, int], None], bounds: list[int]) -> None:
    """Call ``loop(part, first, end)`` in parallel for each two neighbours in ``bounds``."""
    with ThreadPoolExecutor(max(1, len(bounds) - 1)) as pool:
        jobs = [pool.submit(loop, part, *pair) for part, pair in enumerate(pairwise(bounds))]
        for job in jobs:
            job.result()


def even_parts(number: int) -> list[int]:
    """Bounds of equal parts of a list of length ``number``, one part for each of torch's threads."""
    threads = torch.get_num_threads()
    return [number * part // threads for part in range(threads + 1)]

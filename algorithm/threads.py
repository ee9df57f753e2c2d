"""Work on parts of a list, done at once by threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


def in_parts(loop: Callable[[int, int, int], None], bounds: list[int]) -> None:
    """``loop(part, first, end)`` for neighbours in ``bounds``, all at once."""
    with ThreadPoolExecutor(max(1, len(bounds) - 1)) as pool:
        jobs = [pool.submit(loop, part, *pair) for part, pair in enumerate(pairwise(bounds))]
        for job in jobs:
            job.result()


def even_parts(number: int) -> list[int]:
    """Bounds of parts of a list of this length, one for each of torch's threads."""
    threads = torch.get_num_threads()
    return [number * part // threads for part in range(threads + 1)]

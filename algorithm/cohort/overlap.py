"""Processes pairs one after the other; if wanted, the next pair is read and the last one written while one is
computed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from ..threads import Pool

Item = TypeVar("Item")
Given = TypeVar("Given")
Found = TypeVar("Found")


def in_turn(
    items: Sequence[Item],
    read: Callable[[Item], Given],
    compute: Callable[[Given], Found],
    write: Callable[[Found], None],
    overlap: bool,
) -> Iterator[tuple[Item, BaseException | None]]:
    """Yield each item when it is written, or with its error; the other items continue.

    With ``overlap`` reading and writing have a thread each, and up to three items are in memory. This is faster when a
    GPU computes. On a CPU the threads would only take cores from the computation.
    """
    if not overlap:
        for item in items:
            yield item, _trouble(lambda: write(compute(read(item))))  # noqa: B023  (called at once)
        return
    with Pool(1) as reader, Pool(1) as writer:
        ahead = [reader.submit(read, item) for item in items[:1]]
        behind: list[tuple[Item, Future[None]]] = []
        for number, item in enumerate(items):
            given = ahead.pop()
            given.exception()  # wait: at most one item is read ahead
            ahead = [reader.submit(read, following) for following in items[number + 1 : number + 2]]
            error = _trouble(lambda: behind.append((item, writer.submit(write, compute(given.result())))))  # noqa: B023
            del given
            if error:
                yield item, error
                continue
            if len(behind) > 1:
                yield _written(behind.pop(0))
        for last in behind:
            yield _written(last)


def _trouble(job: Callable[[], object]) -> Exception | None:
    try:
        job()
    except Exception as error:
        return error
    return None


def _written(entry: tuple[Item, Future[None]]) -> tuple[Item, BaseException | None]:
    return entry[0], entry[1].exception()

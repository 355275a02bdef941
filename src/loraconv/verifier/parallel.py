"""Several processor cores for work that numpy and reading do, which both let other threads run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

X = TypeVar("X")
Y = TypeVar("Y")


def in_parallel(work: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """``work`` of each item, in order, with numpy silent about infinities and NaN.

    Where one fails, or the user interrupts, those that have not begun are left out.
    """
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        yield from pool.map(lambda item: _silent(work, item), items)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def beside_it(work: Callable[[], Y]) -> Iterator[Future[Y]]:
    """``work`` in a thread of its own, with numpy as silent; it has ended when the block is left."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(_silent, lambda _: work(), None)


def _silent(work: Callable[[X], Y], item: X) -> Y:
    import numpy as np

    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):  # each thread has its own
        return work(item)

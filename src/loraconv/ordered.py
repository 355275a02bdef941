"""Jobs on several cores whose results come in the order of the jobs; a few are done ahead, so memory stays bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 8


def workers() -> ThreadPoolExecutor:
    """A thread for each core, four at most: more would wait for the disk."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], ahead: int = _AHEAD) -> Iterator[T]:
    """The results of the jobs, which are made in the caller's thread and run in the pool's, ``ahead`` of the caller."""
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

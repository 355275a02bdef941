"""Writing past the page cache (``O_DIRECT``): aligned pieces of a file, several on their way to the disk at once."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

#: The bytes of one write; its buffer and its place in the file are multiples of any disk's block.
DIRECT_BYTES = 1 << 20
#: Writes that are under way at once, while one more is filled. A single one would leave the disk idle between two.
_LANES = 4


class DirectWriter:
    """Appends to an empty file, which :meth:`finish` makes complete.

    ``direct`` is a descriptor of it with ``O_DIRECT``, closed here; ``cached`` an ordinary one, which takes the end of
    the file, and what the file system after all does not take without the page cache.
    """

    def __init__(self, direct: int, cached: int) -> None:
        self._direct, self._cached = direct, cached
        self._sent = self._filled = 0
        self._lanes = [ThreadPoolExecutor(1) for _ in range(_LANES)]
        self._buffer, *self._free = (mmap.mmap(-1, DIRECT_BYTES) for _ in range(_LANES + 1))
        self._under_way: deque[tuple[Future[None], mmap.mmap]] = deque()

    def append(self, data: memoryview) -> None:
        """Take bytes over; raises OSError where earlier ones could not be written."""
        while data:
            room = self.room(len(data))
            room[:] = data[: len(room)]
            data = data[len(room) :]
            self.take(len(room))

    def room(self, count: int) -> memoryview:
        """Where the next bytes go: as many of ``count`` as there is place for. :meth:`take` takes them over."""
        return memoryview(self._buffer)[self._filled : min(self._filled + count, DIRECT_BYTES)]

    def take(self, count: int) -> None:
        """Take over what stands in the room now; raises OSError where earlier bytes could not be written."""
        self._filled += count
        if self._filled == DIRECT_BYTES:
            self._send()

    def _send(self) -> None:
        """Hand over the full buffer; the lanes take turns, so that the calls of each come in a fixed order."""
        lane = self._lanes[self._sent // DIRECT_BYTES % _LANES]
        self._under_way.append((lane.submit(self._write, self._buffer, self._sent), self._buffer))
        self._sent, self._filled = self._sent + DIRECT_BYTES, 0
        if not self._free:
            self._wait_for_one()
        self._buffer = self._free.pop()

    def _wait_for_one(self) -> None:
        future, buffer = self._under_way.popleft()
        future.result()
        self._free.append(buffer)

    def _write(self, buffer: mmap.mmap, offset: int) -> None:
        try:
            done = os.pwrite(self._direct, buffer, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            done = 0
        self._write_cached(memoryview(buffer)[done:], offset + done)

    def _write_cached(self, rest: memoryview, offset: int) -> None:
        while rest:
            done = os.pwrite(self._cached, rest, offset)
            rest, offset = rest[done:], offset + done

    def finish(self) -> None:
        """Write the end, and wait for everything; raises OSError."""
        while self._under_way:
            self._wait_for_one()
        self._write_cached(memoryview(self._buffer)[: self._filled], self._sent)
        self.close()

    def close(self) -> None:
        """Write nothing more, when what is under way has ended. A second call does nothing."""
        for lane in self._lanes:
            lane.shutdown(cancel_futures=True)
        descriptor, self._direct = self._direct, -1
        if descriptor >= 0:
            os.close(descriptor)

"""SHA-256 beside the writing: a thread computes it while the caller goes on."""

from __future__ import annotations

import hashlib
import queue
import threading
from contextlib import suppress

from loraconv.io.input_file import InputFile
from loraconv.lazy import PIECE_BYTES

#: How many pieces may wait for the thread.
_QUEUED = 8

Range = tuple[InputFile, int, int]


class Digest:
    """SHA-256 of what it is fed; from ``PIECE_BYTES`` on a thread computes it while the caller goes on.

    A copied range is read a second time by the thread, so that its bytes never pass through the caller.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._fed = 0
        self._queue: queue.Queue[bytes | memoryview | Range | None] = queue.Queue(_QUEUED)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._error: Exception | None = None

    def update(self, piece: bytes | memoryview) -> None:
        self._take(piece, len(piece))

    def update_from(self, source: InputFile, offset: int, count: int) -> None:
        self._take((source, offset, count), count)

    def _take(self, item: bytes | memoryview | Range, count: int) -> None:
        self._fed += count
        if self._thread is None and self._fed < PIECE_BYTES:
            self._digest(item)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._queue.put(item)

    def finish(self) -> str:
        """Wait for the thread, which then ends; the digest so far. A second call does nothing more."""
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()

    def stop(self) -> None:
        """End the thread as soon as it has finished the piece in its hands; for a file that is given up or done."""
        self._stopped = True
        with suppress(Exception):
            self.finish()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None and not self._stopped:
                try:
                    self._digest(item)
                except Exception as error:  # carried to the caller's thread by finish()
                    self._error = error

    def _digest(self, item: bytes | memoryview | Range) -> None:
        if not isinstance(item, tuple):
            self._hash.update(item)
            return
        source, offset, count = item
        for start in range(offset, offset + count, PIECE_BYTES):
            if self._stopped:
                return
            self._hash.update(source.pread(start, min(PIECE_BYTES, offset + count - start)))

"""One input file, read with ``pread`` only, which refuses to be anything but the same regular file from start to end.

Memory maps are never used: a mapped file that another process truncates kills the reader with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from loraconv.errors import CorruptCheckpoint, UsageError
from loraconv.names import printable, quoted


class InputFile:
    """A regular file opened for reading; ``size`` is in bytes.

    Raises :class:`UsageError` (missing, unreadable, not a regular file). Every read raises
    :class:`CorruptCheckpoint` when the file has become shorter; :meth:`check_unchanged` raises it when size, inode
    or modification time differ from those at opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UsageError(
                f"no such file: {self.shown}", slug="not-found", hint=f"ls {quoted(self.path.parent)}"
            ) from None
        except (OSError, ValueError) as error:
            raise UsageError(
                f"cannot open {self.shown}", why=str(error), slug="unreadable", hint=f"ls -l {quoted(self.path)}"
            ) from None
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(self._fd)
            raise UsageError(f"not a regular file: {self.shown}", slug="not-regular", hint=f"file {quoted(self.path)}")
        self.size = info.st_size
        self._identity = self._snapshot(info)

    @staticmethod
    def _snapshot(info: os.stat_result) -> tuple[int, int, int, int]:
        return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns

    @property
    def shown(self) -> str:
        """The path, safe to print."""
        return printable(str(self.path), limit=1000)

    @property
    def inode(self) -> tuple[int, int]:
        """``(device, inode)``: two spellings of one file share it."""
        return self._identity[:2]

    def fileno(self) -> int:
        """The open descriptor (for ``copy_file_range``)."""
        return self._fd

    def pread(self, offset: int, count: int) -> bytes:
        """Exactly ``count`` bytes from ``offset``; raises :class:`CorruptCheckpoint` if they are not there."""
        self._check_range(offset, count)
        parts = []
        while count:
            with self._read_errors():
                part = os.pread(self._fd, count, offset)
            if not part:
                self._changed("it became shorter while it was read")
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pread_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset``; raises as :meth:`pread` does."""
        self._check_range(offset, len(view))
        while view:
            with self._read_errors():
                count = os.preadv(self._fd, [view], offset)
            if not count:
                self._changed("it became shorter while it was read")
            view, offset = view[count:], offset + count

    def _check_range(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CorruptCheckpoint(
                f"{self.shown} ends before the data it declares",
                why=f"bytes {offset} to {offset + count} are needed, the file has {self.size}",
                slug="truncated",
                hint="fetch or copy the file again and compare its size with the original",
            )

    @contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CorruptCheckpoint(f"cannot read {self.shown}", why=str(error), slug="read-error") from None

    def check_unchanged(self) -> None:
        """Raise :class:`CorruptCheckpoint` if the file was truncated, rewritten or replaced since it was opened."""
        if self._snapshot(os.fstat(self._fd)) != self._identity:
            self._changed("its size or modification time changed while it was read")
        try:
            now = os.stat(self.path)
        except OSError:
            self._changed("it vanished while it was read")
        if self._snapshot(now) != self._identity:
            self._changed("it was replaced while it was read")

    def _changed(self, why: str) -> None:
        raise CorruptCheckpoint(
            f"{self.shown} changed while it was read",
            why=why,
            slug="input-changed",
            hint="wait until nothing writes to it, then run the same command again",
        )

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        descriptor, self._fd = self._fd, -1  # first: an interrupt may strike right after the call
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

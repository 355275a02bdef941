"""One file of an output under construction. Only :mod:`loraconv.io.atomic` makes them; it gives them their names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Condition

from loraconv.io.digest import Digest
from loraconv.io.direct import DirectWriter
from loraconv.io.input_file import InputFile
from loraconv.io.syscalls import allocate, start_writeback
from loraconv.io.target import mode_of, reported, write_failed
from loraconv.lazy import PIECE_BYTES

#: Writeback to the disk is begun after this many bytes.
WRITEBACK_BYTES = 64 << 20
#: The bytes of one write. Larger ones get larger pages, which a virtual machine may have given back to its host.
WRITE_BYTES = 1 << 16
#: This much is copied at a time, so that a signal, or a reader that follows, does not wait for a whole shard.
COPY_BYTES = 16 << 20

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECT = os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
# copy_file_range between these files, or at all, is not to be had.
_NO_COPY = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ETXTBSY, errno.EXDEV}


class OutputFile:
    """A file under construction at ``path``; ``size`` counts its bytes, ``sha256`` is their digest."""

    def __init__(self, path: Path, final: Path, needed: int, hashed: bool) -> None:
        self.path, self.size = path, 0
        self._final, self._needed = final, needed
        self._flushed = 0
        self._flusher: ThreadPoolExecutor | None = None
        self._grown, self._ended = Condition(), False
        self._hash = Digest() if hashed else None
        self._direct: DirectWriter | None = None
        with reported(final, needed):
            self._fd = os.open(path, _NEW_FILE, 0o666)

    @property
    def sha256(self) -> str | None:
        """The digest in hexadecimal, once the file is complete; None if it was not asked for.

        Waits for the thread that computes it; raises what reading a copied input again raises.
        """
        return self._hash.finish() if self._hash else None

    def reserve(self, size: int) -> None:
        """Give the file its final length before its bytes, so that a reader can follow the writer. See :meth:`wait`."""
        with reported(self._final, self._needed):
            os.ftruncate(self._fd, size)

    def write_directly(self, size: int) -> None:
        """Before the first byte: write all ``size`` of them past the page cache, where the folder says that it can.

        For what is large and not read again soon: it costs the processor a tenth, and pushes nothing else out.
        Nobody can follow the writer then. Raises :class:`WriteFailed`.
        """
        with reported(self._final, self._needed):
            direct = os.open(self.path, _DIRECT)
            self._direct = DirectWriter(direct, self._fd)
            allocate(self._fd, size)

    def wait(self, end: int) -> None:
        """Return when the first ``end`` bytes are written; raises OSError if the file ended or failed before that."""
        with self._grown:
            self._grown.wait_for(lambda: self.size >= end or self._ended)
        if self.size < end:
            raise OSError(errno.EIO, "the file was not completed")

    def abandon(self) -> None:
        """Write no more: whoever waits for a byte is told that it will not come. A second call does nothing."""
        self._close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``. Raises :class:`WriteFailed`; the file cannot be completed after that."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        size = PIECE_BYTES if self._hash else len(view)
        try:
            for start in range(0, len(view), size):
                piece = view[start : start + size]
                # The hash may look at the piece later than the caller reuses a buffer.
                if self._hash:
                    self._hash.update(piece if isinstance(data, bytes) else bytes(piece))
                self._append(piece)
        except BaseException:
            self._close()
            raise

    def copy(self, source: InputFile, offset: int, count: int) -> None:
        """Append ``count`` bytes of an input file, inside the kernel where it can; the hash reads them by itself.

        Raises :class:`WriteFailed`, and :class:`CorruptCheckpoint` where the input is too short.
        """
        try:
            while count:
                size = min(count, COPY_BYTES)
                if self._hash:
                    self._hash.update_from(source, offset, size)
                self._copy_range(source, offset, size)
                offset, count = offset + size, count - size
        except BaseException:
            self._close()
            raise

    def copy_directly(self, source: InputFile, offset: int, count: int) -> Iterator[memoryview]:
        """Append ``count`` bytes of an input file past the page cache: each piece as it is read, before the next one.

        Only after :meth:`write_directly`. Raises as :meth:`copy` does.
        """
        direct = self._direct
        assert direct is not None
        try:
            while count:
                room = direct.room(count)
                source.pread_into(room, offset)
                yield room
                with reported(self._final, self._needed):
                    direct.take(len(room))
                self.size += len(room)
                offset, count = offset + len(room), count - len(room)
        except BaseException:
            self._close()
            raise

    def _copy_range(self, source: InputFile, offset: int, count: int) -> None:
        while count:
            done = _copied_in_kernel(source, self._fd, offset, count, self._final, self._needed)
            if done:
                self._advance(done)
            else:
                piece = source.pread(offset, min(count, PIECE_BYTES))
                done = len(piece)
                self._append(memoryview(piece))
            offset, count = offset + done, count - done

    def _append(self, piece: memoryview) -> None:
        with reported(self._final, self._needed):
            if self._direct is not None:
                self._direct.append(piece)
                self.size += len(piece)
                return
            while piece:
                count = os.write(self._fd, piece[:WRITE_BYTES])
                self._advance(count)
                piece = piece[count:]

    def _advance(self, count: int) -> None:
        """``count`` more bytes are written: tell who waits for them, and let the disk begin from time to time."""
        with self._grown:
            self.size += count
            self._grown.notify_all()
        if self.size - self._flushed >= WRITEBACK_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Let the disk begin with what is new; in a thread, since handing it over takes a third of the writing."""
        if self._flusher is None:
            self._flusher = ThreadPoolExecutor(1)
        self._flusher.submit(start_writeback, self._fd, self._flushed, self.size - self._flushed)
        self._flushed = self.size

    def _end(self) -> None:
        """Nothing more will be written: whoever waits for more waits in vain."""
        with self._grown:
            self._ended = True
            self._grown.notify_all()

    def _finish(self) -> None:
        """Everything is written: check the length, set the mode, let the disk begin."""
        self._end()
        with reported(self._final, self._needed):
            if self._direct is not None:
                self._direct.finish()
            if os.fstat(self._fd).st_size != self.size:
                raise OSError(errno.EIO, "the file is not as long as what was written to it")
            mode = mode_of(self._final, stat.S_IFREG)
            if mode is not None:
                os.fchmod(self._fd, mode & 0o777)
        if self._direct is None and self.size >= WRITEBACK_BYTES:
            self._flush()

    def _sync(self) -> None:
        if self._hash:
            self._hash.finish()  # the digest is asked for after the folder is in place, too
        with reported(self._final, self._needed):
            os.fsync(self._fd)
            self._close()

    def _close(self) -> None:
        if self._hash:
            self._hash.stop()
        self._end()
        if self._direct is not None:
            self._direct.close()
        if self._flusher is not None:
            self._flusher.shutdown(cancel_futures=True)  # it uses the descriptor
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)


def _copied_in_kernel(source: InputFile, descriptor: int, offset: int, count: int, final: Path, needed: int) -> int:
    """How many bytes ``copy_file_range`` appended; 0 where this file system or kernel cannot."""
    try:
        return os.copy_file_range(source.fileno(), descriptor, count, offset)
    except OSError as error:
        if error.errno in _NO_COPY:
            return 0
        raise write_failed(final, error, needed) from None

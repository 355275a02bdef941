"""Outputs that appear whole or not at all: the only place in loraconv that opens anything for writing.

Everything is written into a temporary sibling ``.NAME.PID-RANDOM.part`` of the target NAME, which is locked with
``flock``, so that a later run can tell the remains of a dead process from the work of a living one. Each file is
checked for length when it is complete; at the end each file and then each folder is fsynced, then one rename publishes
the whole, then the parent folder is fsynced. An old output is swapped with the new one
(``renameat2(RENAME_EXCHANGE)``) and deleted afterwards. Where the file system cannot swap (NFS, some FUSE), the old
folder is moved aside to ``.NAME.PID-RANDOM.old`` first: for the time between two renames there is no target, and a
process killed right there leaves it to the next run to move the old folder back.

A single output file is made in such a folder of its own, and one rename moves it out of there to its name.

A target that is a symbolic link stays one: what it points to is created or replaced, under the same rules as any other
target. Permission bits of a replaced folder and of its files are kept; owner, ACLs and extended attributes are not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Condition

from loraconv.errors import WriteFailed
from loraconv.io.digest import Digest
from loraconv.io.input_file import InputFile
from loraconv.io.target import (
    Inode,
    already_there,
    check_space,
    file_there,
    input_inodes,
    mode_of,
    old_file,
    old_input,
    old_output,
    reported,
    resolve_target,
    shown,
    write_failed,
)
from loraconv.lazy import PIECE_BYTES
from loraconv.names import quoted

#: The name of a single file while it is made.
_LONE = "output"

#: Writeback to the disk is begun after this many bytes.
WRITEBACK_BYTES = 64 << 20
#: The bytes of one write. Larger ones get larger pages, which a virtual machine may have given back to its host.
WRITE_BYTES = 1 << 16
#: This much is copied at a time, so that a signal, or a reader that follows, does not wait for a whole shard.
COPY_BYTES = 16 << 20

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 1, 2, 2
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
# EPERM: what old container sandboxes answer to a call they do not know.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}
# copy_file_range between these files, or at all, is not to be had.
_NO_COPY = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.ETXTBSY, errno.EXDEV}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


@contextmanager
def output_folder(
    target: str | Path,
    *,
    inputs: Iterable[str | Path],
    needed: int,
    overwrite: bool = False,
    replaces: Callable[[], None] | None = None,
) -> Iterator[OutputFolder]:
    """A folder to write into, which takes its place at ``target`` when the block ends and vanishes if it raises.

    ``inputs`` are all input files and folders of the command, ``needed`` is the number of bytes about to be written.
    With ``replaces`` the target is an input folder that is to be replaced: it is called right before that, and raises
    if the folder is not what was opened any more.

    Raises :class:`UsageError` (``output-is-input``: the target is, holds or lies inside an input) and
    :class:`WriteFailed` (``output-exists``, ``output-foreign``, ``no-space``, ``not-writable``, ``write-failed``: the
    target is as it was; ``durability-unknown``, ``old-remains``: the new output is in place).
    """
    place = resolve_target(target)
    known = input_inodes(place, inputs)
    _sweep(place)
    folder = OutputFolder(place, known, needed, overwrite, replaces)
    folder._has_old()
    check_space(place, needed)
    try:
        folder._open()
        yield folder
        folder._commit()
    except BaseException:
        folder._discard()
        raise


def clear_remains(target: str | Path) -> None:
    """Remove what a process that was killed left of this output, or put its old output back where there is none."""
    _sweep(resolve_target(target))


@contextmanager
def output_file(
    target: str | Path, *, inputs: Iterable[str | Path], needed: int, mark: bytes, option: str, overwrite: bool = False
) -> Iterator[OutputFile]:
    """A single file to write, which takes its place at ``target`` when the block ends and vanishes if it raises.

    ``mark`` is what every earlier output of this kind begins with: such a one is replaced, another file only with
    ``overwrite``, and what is not a file never. ``option`` is what the target was given with on the command line. The
    rest is as with :func:`output_folder`.
    """
    place = resolve_target(target, option)
    known = input_inodes(place, inputs, option)
    _sweep(place)
    old_file(place, overwrite, mark)
    check_space(place, needed)
    folder = _FolderOfOne(place, known, needed, overwrite, mark)
    try:
        folder._open()
        with folder.file(_LONE) as file:
            yield file
        folder._commit()
    except BaseException:
        folder._discard()
        raise


class OutputFolder:
    """An output under construction; ``path`` is its temporary place."""

    def __init__(
        self,
        target: Path,
        inputs: frozenset[Inode],
        needed: int,
        overwrite: bool,
        replaces: Callable[[], None] | None = None,
    ) -> None:
        self._target, self._inputs, self._needed, self._overwrite = target, inputs, needed, overwrite
        self._replaces = replaces
        self._lock: int | None = None
        self._parents: list[Path] = []
        self._folders: list[Path] = []
        self._files: list[OutputFile] = []
        self._unfinished: set[str] = set()
        self._keep_old = False
        self._choose_names()

    @contextmanager
    def file(self, relative: str, *, hashed: bool = True) -> Iterator[OutputFile]:
        """A new file of the folder, complete when the block ends and on disk when the folder takes its place.

        ``hashed`` can be switched off where the caller takes a checksum of its own: it costs more than the copy.

        Raises :class:`WriteFailed`, and ValueError for a name that is not a plain relative one.
        """
        self._unfinished.add(relative)
        output = OutputFile(self._make_room(relative), self._final(relative), self._needed, hashed)
        self._files.append(output)
        yield output
        output._finish()
        self._unfinished.discard(relative)

    def link(self, relative: str, to: Path) -> None:
        """A symbolic link to an existing file. Raises :class:`WriteFailed`, and ValueError as :meth:`file` does."""
        path = self._make_room(relative)
        with reported(self._final(relative), self._needed):
            os.symlink(os.path.realpath(to), path)

    def _has_old(self) -> bool:
        """Whether something that may be replaced is in the target's place; raises where it may not."""
        if self._replaces is not None:
            return old_input(self._target, self._replaces)
        return old_output(self._target, self._overwrite, self._inputs)

    def _final(self, relative: str) -> Path:
        """Where a file of the folder will be in the end."""
        return self._target / relative

    def _choose_names(self) -> None:
        stem = f".{self._target.name}.{os.getpid()}-{secrets.token_hex(4)}"
        self.path = self._target.with_name(f"{stem}.part")
        self._aside = self._target.with_name(f"{stem}.old")

    def _open(self) -> None:
        with reported(self._target, self._needed):
            self._make_parents()
            # What replaces an existing output stays private until it gets that one's mode.
            mode = 0o700 if self._target.exists() else 0o777
            while self._lock is None:  # until no sweeper has taken the new folder for a dead one before it was locked
                self._choose_names()
                os.mkdir(self.path, mode)
                self._lock = _lock(self.path)
        self._folders.append(self.path)

    def _make_parents(self) -> None:
        missing = [parent for parent in self._target.parents if not parent.exists()]
        for parent in reversed(missing):
            self._parents.append(parent)  # before it exists: an interrupt may strike right after mkdir
            try:
                os.mkdir(parent)
            except FileExistsError:
                self._parents.remove(parent)
            _sync_folder(parent.parent)

    def _make_room(self, relative: str) -> Path:
        if {"", ".", ".."} & set(relative.split("/")) or "\\" in relative or "\0" in relative:
            raise ValueError(f"not a relative file name: {relative!r}")
        for parent in reversed(PurePosixPath(relative).parents):
            folder = self.path / parent
            if folder not in self._folders:
                with reported(self._target / parent, self._needed):
                    os.mkdir(folder)
                self._folders.append(folder)
        return self.path / relative

    def _commit(self) -> None:
        if self._unfinished:
            raise RuntimeError(f"files that were not completed: {sorted(self._unfinished)}")
        for file in self._files:
            file._sync()
        with reported(self._target, self._needed):
            for folder in reversed(self._folders):
                mode = mode_of(self._target / folder.relative_to(self.path), stat.S_IFDIR)
                if mode is not None:
                    os.chmod(folder, mode)
                _sync_folder(folder)
            self._publish()
        self._settle()

    def _publish(self) -> None:
        """Give the finished folder its name; an old output keeps the name until that very moment."""
        # Checked again: hours may have passed since the first time.
        replaces = self._has_old()
        if replaces and _exchange(self.path, self._target):
            return
        if replaces:
            os.rename(self._target, self._aside)
        try:
            os.rename(self.path, self._target)
        except OSError as error:
            if error.errno in _TAKEN:
                raise already_there(self._target) from None
            raise

    def _settle(self) -> None:
        """Make the new name durable; only then delete what it replaced."""
        try:
            _sync_folder(self._target.parent)
        except OSError as error:
            self._keep_old = True
            raise WriteFailed(
                f"{shown(self._target)} is written, durability unknown",
                where=shown(self._target.parent),
                why=f"the folder could not be flushed to the disk: {error.strerror}",
                hint="check the disk, then write the output again",
                slug="durability-unknown",
            ) from None
        for old in (self.path, self._aside):
            shutil.rmtree(old, ignore_errors=True)
            if os.path.lexists(old):
                raise WriteFailed(
                    f"{shown(self._target)} is written, but the output it replaced could not be deleted",
                    where=shown(old),
                    hint=f"rm -r {quoted(old)}",
                    slug="old-remains",
                )
        self._unlock()

    def _discard(self) -> None:
        """Remove what is not in place; after the swap that is the old output, before it the new one."""
        for file in self._files:
            file._close()
        if not self._keep_old:
            shutil.rmtree(self.path, ignore_errors=True)
            _put_back(self._aside, self._target)
            for parent in reversed(self._parents):
                with suppress(OSError):
                    os.rmdir(parent)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)
        self._lock = None


class _FolderOfOne(OutputFolder):
    """The temporary home of a single file, which takes the target's name; the folder itself is thrown away."""

    def __init__(self, target: Path, inputs: frozenset[Inode], needed: int, overwrite: bool, mark: bytes) -> None:
        super().__init__(target, inputs, needed, overwrite)
        self._mark = mark

    def _final(self, relative: str) -> Path:
        return self._target

    def _publish(self) -> None:
        made = self.path / _LONE
        if old_file(self._target, self._overwrite, self._mark):
            os.rename(made, self._target)
            return
        try:
            if not _renamed(made, self._target, _RENAME_NOREPLACE):
                os.rename(made, self._target)
        except FileExistsError:
            raise file_there(self._target) from None


class OutputFile:
    """A file under construction at ``path``; ``size`` counts its bytes, ``sha256`` is their digest."""

    def __init__(self, path: Path, final: Path, needed: int, hashed: bool) -> None:
        self.path, self.size = path, 0
        self._final, self._needed = final, needed
        self._flushed = 0
        self._grown, self._ended = Condition(), False
        self._hash = Digest() if hashed else None
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
        """Append ``count`` bytes of an input file; inside the kernel where it can and no hash has to see them.

        Raises :class:`WriteFailed`, and :class:`CorruptCheckpoint` where the input is too short.
        """
        try:
            while count:
                size = min(count, PIECE_BYTES if self._hash else COPY_BYTES)
                if self._hash:
                    self.write(source.pread(offset, size))
                else:
                    self._copy_range(source, offset, size)
                offset, count = offset + size, count - size
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
            _start_writeback(self._fd, self._flushed, self.size - self._flushed)
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
            if os.fstat(self._fd).st_size != self.size:
                raise OSError(errno.EIO, "the file is not as long as what was written to it")
            mode = mode_of(self._final, stat.S_IFREG)
            if mode is not None:
                os.fchmod(self._fd, mode & 0o777)
        _start_writeback(self._fd, self._flushed, self.size - self._flushed)

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


def _lock(path: Path) -> int | None:
    """The descriptor of the folder, locked; None if it is gone or another's, -1 if this file system has no locks."""
    try:
        descriptor = os.open(path, _FOLDER)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
        result = None
    except (BlockingIOError, FileNotFoundError):
        result = None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        result = -1
    os.close(descriptor)
    return result


def _sweep(target: Path) -> None:
    """Remove what dead processes left of this very target. The lock tells, not the process id, which may be reused."""
    ours = re.compile(re.escape(f".{target.name}.") + r"\d+-[0-9a-f]{8}\.(part|old)")
    names = []
    with suppress(OSError):
        names = os.listdir(target.parent)
    for match in filter(None, map(ours.fullmatch, names)):
        path = target.with_name(match.string)
        with suppress(OSError):
            lock = _lock(path)
            if lock is None or lock < 0:
                continue
            if match.group(1) == "old":
                _put_back(path, target)
            else:
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _put_back(aside: Path, target: Path) -> None:
    """Return an old output that was moved aside to its place, or delete it if a new one is there."""
    try:
        os.rename(aside, target)
    except OSError as error:
        # Any other failure leaves it where it is: it may be the only copy.
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot. Raises OSError."""
    return _renamed(one, other, _RENAME_EXCHANGE)


def _renamed(one: Path, other: Path, how: int) -> bool:
    """Rename in a way that only ``renameat2`` knows; False where the system cannot. Raises OSError."""
    renameat2 = _libc("renameat2")
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))


def _start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Let the disk begin with what is written so far, so that the fsync at the end is short. Failing does no harm."""
    sync_file_range = _libc("sync_file_range")
    if sync_file_range is not None:
        sync_file_range(descriptor, ctypes.c_longlong(offset), ctypes.c_longlong(count), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no fsync of folders
            raise
    finally:
        os.close(descriptor)


def append_line(path: Path, text: str) -> None:
    """Add a line to a log, the one kind of file that grows: one write, so that no line is mixed with another.

    Raises :class:`WriteFailed`.
    """
    with reported(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            data = f"{text}\n".encode()
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)

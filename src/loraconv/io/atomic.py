"""Outputs that appear whole or not at all: nothing else in loraconv writes (the files themselves: ``output_file``).

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

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from loraconv.errors import WriteFailed
from loraconv.io.output_file import OutputFile
from loraconv.io.syscalls import exchange, rename_new
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
)
from loraconv.names import quoted

#: The name of a single file while it is made.
_LONE = "output"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
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

    def can_write_directly(self) -> bool:
        """Whether this file system takes writes past the page cache, see :meth:`OutputFile.write_directly`."""
        try:
            os.close(os.open(self.path, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600))
        except OSError:
            return False
        return True

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
        if replaces and exchange(self.path, self._target):
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
            if not rename_new(made, self._target):
                os.rename(made, self._target)
        except FileExistsError:
            raise file_there(self._target) from None


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

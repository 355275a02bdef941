"""What an output may replace, and how a failure to write it is told.

An output never touches an input, under whatever spelling. A folder replaces only what loraconv wrote itself, a single
file that too, or, if it is told to, any other file.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from loraconv.errors import UsageError, WriteFailed
from loraconv.names import human_bytes, printable, quoted

#: The manifest of every output; a folder without a valid one was not written by loraconv and is never replaced.
MANIFEST = "loraconv.json"
#: What `unfuse` needs, beside a fused model.
JOURNAL = "loraconv.journal"
MANIFEST_LIMIT = 64 << 20

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}

Inode = tuple[int, int]


def resolve_target(target: str | Path, option: str = "-o") -> Path:
    """The real path of the target, links followed; raises :class:`UsageError` for what cannot name an output.

    ``option`` is the one that the target was given with, for the hint.
    """
    try:
        place = Path(os.path.realpath(target)) if os.fspath(target) else Path("/")
    except ValueError as error:
        raise UsageError("the output is not a path", where=printable(str(target)), why=str(error)) from None
    if not place.name:
        raise UsageError("the output needs a name", where=printable(str(target)), hint=f"name it: {option} OUT")
    return place


def input_inodes(target: Path, inputs: Iterable[str | Path], option: str = "-o") -> frozenset[Inode]:
    """The inputs by inode, which no spelling, link or letter case can disguise; raises :class:`UsageError`."""
    above = list(_chain(target))
    own = next(_chain(target), None) if os.path.lexists(target) else None
    inodes = set()
    for given in inputs:
        try:
            inode = _inode(os.stat(given))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot open {shown(given)}", why=str(error), slug="not-found") from None
        around = {*_chain(Path(os.path.abspath(given))), *_chain(Path(os.path.realpath(given)))}
        if inode in above or own in around:
            raise _is_input(target, given, option)
        inodes.add(inode)
    return frozenset(inodes)


def _is_input(target: Path, given: str | Path, option: str = "-o") -> UsageError:
    return UsageError(
        f"the output {shown(target)} is, holds or lies inside an input",
        where=shown(given),
        hint=f"choose a place outside of every input with {option}",
        slug="output-is-input",
    )


def _chain(path: Path) -> Iterator[Inode]:
    """The inodes of ``path`` and of every folder above it, as far as they exist."""
    for step in (path, *path.parents):
        with suppress(OSError):
            yield _inode(os.stat(step))


def _inode(info: os.stat_result) -> Inode:
    return info.st_dev, info.st_ino


def old_output(target: Path, overwrite: bool, inputs: frozenset[Inode]) -> bool:
    """Whether an earlier output, which may be replaced, is at ``target``; False if the place is free or empty.

    Raises :class:`WriteFailed` if something else is there, or an output without ``overwrite``.
    """
    with reported(target):
        if not os.path.lexists(target):
            return False
        if not stat.S_ISDIR(os.lstat(target).st_mode):
            raise WriteFailed(
                f"{shown(target)} exists and is not a folder", slug="output-exists", hint="choose another name with -o"
            )
        _check_writable(target)
        if not os.listdir(target):
            return False
        if not overwrite:
            raise already_there(target)
        foreign = list(islice(_foreign(target, inputs), 3))
    if foreign:
        raise WriteFailed(
            f"{shown(target)} holds files that loraconv did not write, and is not replaced",
            where=", ".join(printable(name) for name in foreign),
            why=f"a valid {MANIFEST} in that folder must list every file of it",
            hint="choose another folder with -o",
            slug="output-foreign",
        )
    return True


def old_input(target: Path, unchanged: Callable[[], None]) -> bool:
    """True, as an input folder that is to be replaced is at ``target``.

    Raises :class:`WriteFailed` where it cannot be replaced, and what ``unchanged`` raises.
    """
    with reported(target):
        _check_writable(target)
        for name, entry in _entries(target):
            if entry.is_dir(follow_symlinks=False):
                _check_writable(target / name)
    unchanged()
    return True


def already_there(target: Path) -> WriteFailed:
    return WriteFailed(
        f"{shown(target)} exists and is not empty",
        hint="pass --overwrite to replace it, or choose another folder with -o",
        slug="output-exists",
    )


def old_file(target: Path, overwrite: bool, mark: bytes) -> bool:
    """Whether a file that may be replaced is at ``target``: one that begins with ``mark``, or any with ``overwrite``.

    Raises :class:`WriteFailed` if something else is there.
    """
    with reported(target):
        if not os.path.lexists(target):
            return False
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise WriteFailed(
                f"{shown(target)} exists and is not a file", slug="output-exists", hint="choose another name"
            )
        _check_writable(target.parent)
        if not overwrite and not _begins(target, mark):
            raise file_there(target)
    return True


def file_there(target: Path) -> WriteFailed:
    return WriteFailed(
        f"{shown(target)} exists",
        why="only what loraconv wrote there before is replaced",
        hint="pass --overwrite to replace it, or choose another name",
        slug="output-exists",
    )


def _begins(path: Path, mark: bytes) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, len(mark)) == mark
    finally:
        os.close(descriptor)


def _foreign(target: Path, inputs: frozenset[Inode]) -> Iterator[str]:
    """What is in ``target`` and not in its manifest; raises :class:`UsageError` for a hard link of an input."""
    files = _listed(target)
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for name, entry in _entries(target):
        if _inode(entry.stat(follow_symlinks=False)) in inputs:
            raise _is_input(target, target / name)
        if entry.is_dir(follow_symlinks=False):
            _check_writable(target / name)
            ours = name in folders
        else:
            ours = name in files and (entry.is_symlink() if files[name] else entry.is_file(follow_symlinks=False))
        if not ours:
            yield name


def _listed(target: Path) -> dict[str, bool]:
    """The files in the manifest of ``target`` and itself, with whether each is a link; nothing if it is not valid."""
    path = target / MANIFEST
    try:
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MANIFEST_LIMIT:
            return {}
        entries = json.loads(path.read_bytes())["files"]
        files = {entry["name"]: entry.get("linked") is True for entry in entries}
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}
    return {MANIFEST: False, **files} if all(isinstance(name, str) for name in files) else {}


def _entries(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            yield prefix + entry.name, entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(folder / entry.name, f"{prefix}{entry.name}/")


def _check_writable(folder: Path) -> None:
    # A protected folder could be swapped out, but not deleted afterwards.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{shown(folder)} is write-protected")


def check_space(target: Path, needed: int) -> None:
    with reported(target, needed):
        free = _free(target)
        if free is not None and free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _free(path: Path) -> int | None:
    """Free bytes where ``path`` is or will be; None if the file system does not tell."""
    info = os.statvfs(_existing(path))
    return info.f_bavail * info.f_frsize if info.f_blocks else None


def _existing(path: Path) -> Path:
    return next((step for step in (path, *path.parents) if os.path.isdir(step)), Path("/"))


def mode_of(path: Path, kind: int) -> int | None:
    """The permission bits of ``path``; None if it is missing or of another kind."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.S_IMODE(mode) if stat.S_IFMT(mode) == kind else None


@contextmanager
def reported(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError of the block into :class:`WriteFailed` with the path the user knows."""
    try:
        yield
    except OSError as error:
        raise write_failed(path, error, needed) from None


def write_failed(path: Path, error: OSError, needed: int) -> WriteFailed:
    why, slug = error.strerror or str(error), "write-failed"
    folder = quoted(_existing(path.parent))
    hint = f"choose another folder, or look at this one: ls -ld {folder}"
    if error.errno in _NO_SPACE:
        slug, hint = "no-space", f"free some space: df -h {folder}"
        with suppress(OSError):
            free = _free(path)
            known = "unknown" if free is None else f"{human_bytes(free)} ({free} bytes)"
            why = f"{why}: {human_bytes(needed)} ({needed} bytes) needed, {known} free"
    elif error.errno in _NO_ACCESS:
        slug = "not-writable"
    return WriteFailed(f"cannot write {shown(path)}", why=why, hint=hint, slug=slug)


def shown(path: str | Path) -> str:
    return printable(str(path), limit=1000)

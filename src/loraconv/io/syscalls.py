"""System calls of Linux that Python's ``os`` lacks, each of which a file system or a sandbox may not know."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 1, 2, 2
# EPERM: what old container sandboxes answer to a call they do not know.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot. Raises OSError."""
    return _renamed(one, other, _RENAME_EXCHANGE)


def rename_new(one: Path, other: Path) -> bool:
    """Rename to a name that nothing has; False where the system cannot see to that. Raises OSError."""
    return _renamed(one, other, _RENAME_NOREPLACE)


def _renamed(one: Path, other: Path, how: int) -> bool:
    renameat2 = _libc("renameat2")
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code))


def start_writeback(descriptor: int, offset: int, count: int) -> None:
    """Let the disk begin with what is written so far, so that the fsync at the end is short. Failing does no harm."""
    sync_file_range = _libc("sync_file_range")
    if sync_file_range is not None:
        sync_file_range(descriptor, ctypes.c_longlong(offset), ctypes.c_longlong(count), _SYNC_FILE_RANGE_WRITE)


def allocate(descriptor: int, size: int) -> None:
    """Reserve the room of a file, which gets that length, so that the disk takes several writes to it at once. A file
    system that knows no such thing makes room write by write. Raises OSError where there is no room."""
    fallocate = _libc("fallocate")
    if fallocate is not None and fallocate(descriptor, 0, ctypes.c_longlong(0), ctypes.c_longlong(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


@cache
def _libc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)

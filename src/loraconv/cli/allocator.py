"""Keep freed memory instead of handing it back to the kernel after every tensor piece.

glibc gives the top of the heap back as soon as a few hundred KiB of it are free, and takes it again a moment later; on
a conversion that costs as much time as the work. Peak memory is the same. Only the command line does this, as it owns
the process; other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP = 512 << 20


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep up to 512 MiB of free heap; does nothing where there is no ``mallopt``."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEEP)
        mallopt(_M_MMAP_THRESHOLD, _KEEP)

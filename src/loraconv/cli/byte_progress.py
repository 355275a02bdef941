"""Progress of a command that writes gigabytes: one line on a terminal that is written over, nothing anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loraconv.names import human_bytes

#: Seconds before the line appears, and between two of its states.
_FIRST, _NEXT = 1.0, 0.2


@contextmanager
def byte_progress(name: str, wanted: bool) -> Iterator[None]:
    """Within the block, show the ``done`` and ``total`` bytes that the logger ``name`` tells."""
    if not wanted or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    logger, handler = logging.getLogger(name), _Line()
    level, spread = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = spread
        handler.clear()


class _Line(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._shown = self._began - _NEXT + _FIRST
        self._visible = False

    def emit(self, record: logging.LogRecord) -> None:
        now, figures = time.monotonic(), record.args
        if not isinstance(figures, dict) or now - self._shown < _NEXT:
            return
        done, total = figures["done"], max(figures["total"], 1)
        left = (now - self._began) * (total - done) / max(done, 1)
        text = f"{human_bytes(done)} of {human_bytes(total)}, {done * 100 // total} %, {left:.0f} s left"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
        self._shown, self._visible = now, True

    def clear(self) -> None:
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

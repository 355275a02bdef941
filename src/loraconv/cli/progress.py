"""Progress of a long command: one line on a terminal that is written over, nothing anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loraconv.names import human_bytes

#: Seconds before the line of a writing command appears, and between two of its states.
_FIRST, _NEXT = 1.0, 0.2


@contextmanager
def byte_progress(name: str, wanted: bool) -> Iterator[None]:
    """Within the block, show the ``done`` and ``total`` bytes that the logger ``name`` tells."""
    with _following(name, _Bytes(), wanted):
        yield


@contextmanager
def training_progress(wanted: bool) -> Iterator[None]:
    """Within the block, show the rows that training logs."""
    with _following("loraconv.training", _Rows(), wanted):
        yield


@contextmanager
def _following(name: str, line: _Line, wanted: bool) -> Iterator[None]:
    if not wanted or sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    logger = logging.getLogger(name)
    level, spread = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(line)
    try:
        yield
    finally:
        logger.removeHandler(line)
        logger.setLevel(level)
        logger.propagate = spread
        line.clear()


class _Line(logging.Handler):
    """A handler of records whose only argument is a dict."""

    def __init__(self) -> None:
        super().__init__()
        self._visible = False

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, dict):
            self.show(record.args)

    def show(self, row: dict[str, Any]) -> None:
        raise NotImplementedError

    def put(self, text: str, end: str = "") -> None:
        """Write over what the line says."""
        sys.stderr.write(f"\r\x1b[K{text}{end}")
        sys.stderr.flush()
        self._visible = True

    def clear(self) -> None:
        if self._visible:
            self.put("")


class _Bytes(_Line):
    """Bytes done and the time left."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._shown = self._began - _NEXT + _FIRST

    def show(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._shown < _NEXT:
            return
        done, total = row["done"], max(row["total"], 1)
        left = (now - self._began) * (total - done) / max(done, 1)
        self.put(f"{human_bytes(done)} of {human_bytes(total)}, {done * 100 // total} %, {left:.0f} s left")
        self._shown = now


class _Rows(_Line):
    """Each row of a training; a fault stays on a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._first: tuple[float, int] | None = None

    def show(self, row: dict[str, Any]) -> None:
        self.put(self._text(row), "\n" if "fault" in row else "")

    def _text(self, row: dict[str, Any]) -> str:
        if "fault" in row:
            return f"step {row['step']}: NaN or Inf in the {row['fault']}, {row['where']}: {row['action']}"
        words = {"loss": "loss", "held_out_loss": "held out", "rate": "rate", "gradient_norm": "gradient"}
        figures = ", ".join(f"{word} {row[key]:.3g}" for key, word in words.items() if key in row)
        return f"step {row['step']} of {row['steps']}{self._left(row['step'], row['steps'])}: {figures}"

    def _left(self, step: int, steps: int) -> str:
        """The time that the rest will take, from the second row on."""
        now = time.monotonic()
        if self._first is None or step <= self._first[1]:
            self._first = (now, step)
            return ""
        began, first = self._first
        seconds = (now - began) / (step - first) * (steps - step)
        return f", {seconds // 60:.0f} min {seconds % 60:.0f} s left"

"""Progress of a training run: one line on the terminal that is written over, nothing anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOGGER = "loraconv.training"


@contextmanager
def training_progress(wanted: bool) -> Iterator[None]:
    """Within the block, show the rows that training logs, if standard error is a terminal."""
    if not wanted or sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    logger, handler = logging.getLogger(_LOGGER), _Line()
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
        sys.stderr.write("\r\x1b[K")


class _Line(logging.Handler):
    """Writes each row over the one before; a fault stays on a line of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._first: tuple[float, int] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        row = record.args
        if isinstance(row, dict):
            end = "\n" if "fault" in row else ""
            sys.stderr.write(f"\r\x1b[K{self._text(row)}{end}")
            sys.stderr.flush()

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

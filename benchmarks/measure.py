"""What the benchmarks share: one process measured, commands run in turn, and a table of their ratios."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LORACONV = [str(Path(sys.executable).with_name("loraconv"))]


@dataclass(frozen=True)
class Sample:
    """Wall-clock seconds, processor seconds and peak resident bytes of one process."""

    seconds: float
    busy: float
    peak: int


def measure(argv: Sequence[str], before: Callable[[], None]) -> Sample:
    """Run one command; raises if it fails."""
    before()
    start = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(argv)} failed:\n{errors.decode(errors='replace')}")
    return Sample(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def median(samples: Sequence[Sample]) -> Sample:
    seconds, busy = statistics.median(s.seconds for s in samples), statistics.median(s.busy for s in samples)
    return Sample(seconds, busy, max(s.peak for s in samples))


def clean(targets: Sequence[Path], cold: bool) -> Callable[[], None]:
    """A function that removes the targets, flushes the disk and, if ``cold``, drops the page cache (needs root)."""

    def before() -> None:
        for target in targets:
            shutil.rmtree(target, ignore_errors=True)
            target.unlink(missing_ok=True)
        os.sync()
        if cold:
            Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")

    return before


def in_turn(commands: Mapping[str, Sequence[str]], out: Path, runs: int, cold: bool) -> dict[str, list[Sample]]:
    """Run commands that all write ``out`` in turn, so that they meet the same noise; ``out`` is gone afterwards.

    Every round begins with another command: the memory that one leaves behind makes the next faster or slower.
    """
    found: dict[str, list[Sample]] = {name: [] for name in commands}
    for first in range(runs):
        names = [*commands]
        for name in names[first % len(names) :] + names[: first % len(names)]:
            found[name].append(measure(commands[name], clean([out], cold)))
    clean([out], cold=False)()
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

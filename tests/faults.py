"""Deterministic faults: run a command once for every system call it makes, with that one call failing or fatal.

``strace`` injects the faults, so neither root nor a special build is needed. A sweep first records the calls of an
undisturbed run, from the first one that touches the work folder on, then repeats the run once per recorded call.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

import loraconv

#: Every call that changes a file system, and ``openat``, which creates files. The order of calls is kept by strace.
CHANGING_CALLS = (
    "openat", "write", "pwrite64", "copy_file_range", "ftruncate", "fsync", "chmod", "fchmod", "fchmodat", "mkdir",
    "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir",
)  # fmt: skip

_CALL = re.compile(r"^\d+ +(\w+)\(")
_FIRED = ("(INJECTED)", "--- SIG", "+++ killed by")


def _strace_works() -> bool:
    """Present and allowed: a container may forbid ptrace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, check=False).returncode == 0


@cache
def _fast() -> list[str]:
    """Stop at the traced calls only, three times as fast; old versions cannot, and with it no version sends signals."""
    command = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    return ["--seccomp-bpf"] if subprocess.run(command, capture_output=True, check=False).returncode == 0 else []


Test = TypeVar("Test", bound=Callable[..., Any])


def needs_strace(test: Test) -> Test:
    """Mark a test that injects faults, and skip it with a reason where that is impossible."""
    reason = "FAULT INJECTION NOT TESTED: strace is missing or forbidden here (apt-get install strace)"
    pytest.mark.skipif(not _strace_works(), reason=reason)(test)
    pytest.mark.needs_strace(test)
    return test


@dataclass(frozen=True)
class Outcome:
    """One run: ``work`` is its folder, ``call`` the trace line of the call that was hit (empty in a plain run)."""

    work: Path
    returncode: int
    stdout: str
    stderr: str
    trace: tuple[str, ...]
    call: str = ""


def python(script: Path, *arguments: str) -> list[str]:
    """The command that runs ``script`` with as few system calls of the interpreter's own as possible."""
    return [sys.executable, "-S", "-B", str(script), *arguments]


def environment() -> dict[str, str]:
    """The same for every run: what Python does must not depend on the random seed of its hashes."""
    source = Path(loraconv.__file__).parent.parent
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(source), "PYTHONHASHSEED": "0"}


def traced(argv: Sequence[str], work: Path, calls: Sequence[str], *options: str) -> Outcome:
    """Run ``argv`` in ``work`` under strace, which records ``calls`` (with the paths of descriptors)."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "trace")
        names = ",".join(f"?{call}" for call in calls)
        speed = [] if any("signal=" in option for option in options) else _fast()
        command = ["strace", "-f", *speed, "-y", "-s", "8", "-o", str(log), "-e", f"trace={names}", *options, *argv]
        done = subprocess.run(
            command, cwd=work, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        trace = tuple(log.read_text(errors="replace").splitlines())
    return Outcome(work, done.returncode, done.stdout, done.stderr, trace)


def points(trace: Sequence[str], work: Path) -> list[tuple[str, int, str]]:
    """The calls from the first one that names ``work`` on: name, how many of that name went before, trace line.

    Those of the main thread, which alone writes: strace counts each thread's calls for itself.
    """
    main = next((line.split(maxsplit=1)[0] for line in trace if _CALL.match(line)), "")
    counts: dict[str, int] = {}
    found: list[tuple[str, int, str]] = []
    for line in trace:
        match = _CALL.match(line)
        if match is None or line.split(maxsplit=1)[0] != main:
            continue
        name = match.group(1)
        counts[name] = counts.get(name, 0) + 1
        if found or f"{work.name}/" in line:
            found.append((name, counts[name], line))
    return found


def sweep(
    argv: Sequence[str],
    action: str,
    *,
    setup: Callable[[], Path],
    check: Callable[[Outcome], None],
    calls: Sequence[str] = CHANGING_CALLS,
    always: Sequence[str] = (),
    every: int = 1,
) -> int:
    """Inject ``action`` (``error=ENOSPC``, ``signal=KILL``) into each of ``calls`` in turn; the number of faults.

    ``setup`` makes a fresh work folder, in which ``argv`` runs; ``check`` gets each outcome. ``always`` are strace
    options of all runs, the recorded one too; ``every`` takes only each n-th point.
    """
    work = setup()
    plain = traced(argv, work, calls, *always)
    assert plain.returncode == 0, plain.stderr
    chosen = points(plain.trace, work)[::every]
    for name, number, line in chosen:
        options = ("-e", f"inject={name}:{action}:when={number}")
        run = traced(argv, setup(), calls, *always, *options)
        assert any(word in entry for entry in run.trace for word in _FIRED), f"no fault at {name} {number}: {line}"
        check(Outcome(run.work, run.returncode, run.stdout, run.stderr, run.trace, line))
    return len(chosen)

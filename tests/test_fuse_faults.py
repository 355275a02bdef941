"""Faults under ``fuse``: killed, out of space, interrupted; into a new folder, over an old one, in place of the base.

The tests are those of the other commands; only the command line and what may be there afterwards are its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loraconv
from tests import faults
from tests.cli_support import digests, snapshot
from tests.faults import CHANGING_CALLS, Outcome, needs_strace, points, sweep, traced
from tests.test_cli_faults import (  # noqa: F401 (tests and fixtures that run here with this file's job)
    START,
    Job,
    debris,
    program,
    test_a_failing_call_is_exit_6_with_the_old_output_intact_and_no_debris,
    test_a_failing_last_fsync_or_result_line_is_exit_6_and_says_that_the_output_is_there,
    test_a_file_size_limit_at_any_size_is_exit_6_and_clean,
    test_a_signal_at_any_call_leaves_no_debris,
    test_a_signal_at_any_time_leaves_no_debris,
    test_wrote_is_said_only_after_the_last_fsync,
)
from tests.test_fuse import base_state, factors, write_adapter, write_base

WIDTH, LAYERS = 16, 3


class FuseJob(Job):
    """``fuse`` with a base of three shards; in place the base is ``out`` itself. ``direct`` writes past the page cache,
    in small pieces."""

    def __init__(self, folder: Path, kind: str, *, direct: bool = False) -> None:
        self.folder, self.replace, self.in_place, self.count = folder, kind != "new", kind == "in-place", 0
        self.source = folder / "source"
        base = write_base(self.source / "base", base_state(torch.bfloat16, WIDTH, LAYERS), 3)
        adapter = write_adapter(self.source / "lora", factors(width=WIDTH, layers=LAYERS))
        how = ["--base", "out", "--in-place"] if self.in_place else ["--base", str(base), "-o", "out"]
        how += ["--overwrite"] if kind == "overwrite" else []
        how += ["--no-proof"] if direct else []
        start = f"from loraconv.io import direct; direct.DIRECT_BYTES = 4096; {START}" if direct else START
        self.argv = [sys.executable, "-B", "-c", start, "fuse", str(adapter), *how]
        self.old: Any = None
        if kind == "in-place":
            self.old = self._copy(base, folder / "old")
        elif kind == "overwrite":
            loraconv.fuse(f"{adapter}@0.5", base=base, out=folder / "old")
            self.old = digests(folder / "old")
        self.before = snapshot(self.source)
        done = self.run(self())
        assert done.returncode == 0, done.stderr
        self.new = digests(folder / f"work-{self.count}-" / "out")
        assert self.old != self.new

    def _copy(self, base: Path, place: Path) -> dict[str, str]:
        place.mkdir()
        for file in base.iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        return digests(place)


KINDS = ["new", "overwrite", "in-place"]


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> FuseJob:
    return FuseJob(tmp_path, request.param)


@needs_strace
@pytest.mark.parametrize(
    ("kind", "every"),
    [("in-place", 80), ("direct", 40), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in [*KINDS, "direct"])],
)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_model_and_a_rerun_cleans_up(
    tmp_path: Path, kind: str, every: int
) -> None:
    job = FuseJob(tmp_path, "new" if kind == "direct" else kind, direct=kind == "direct")
    seen: dict[str, int] = {}

    def check(outcome: Outcome) -> None:
        state = job.state(outcome.work)
        seen[state] = seen.get(state, 0) + 1
        assert state in (job.unchanged, "new"), outcome.call
        rerun = job.run(outcome.work)
        if state == "new" and job.in_place:
            assert rerun.returncode == 2  # fused twice
        else:
            assert rerun.returncode == (6 if state == "new" and not job.replace else 0), rerun.stderr
        assert job.state(outcome.work) == "new"
        assert debris(outcome.work) == [], outcome.call

    count = sweep(job.argv, "signal=KILL", setup=job, check=check, every=every)
    print(count, "kill points", seen)
    assert count >= (30 if kind == "direct" else 60) // every  # what its threads call: test_direct


@needs_strace
@pytest.mark.parametrize("around", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_without_an_atomic_swap_the_base_is_still_recoverable_at_every_instant(tmp_path: Path, around: int) -> None:
    """A file system without RENAME_EXCHANGE: between two renames the base has another name; a rerun finds it."""
    job = FuseJob(tmp_path, "in-place")
    no_swap = ("-e", "inject=renameat2:error=EINVAL")
    seen: dict[str, int] = {}

    def check(outcome: Outcome) -> None:
        state = job.state(outcome.work)
        seen[state] = seen.get(state, 0) + 1
        if state == "none":
            (aside,) = (name for name in debris(outcome.work) if name.endswith(".old"))
            assert digests(outcome.work / aside) == job.old
        rerun = job.run(outcome.work)
        assert rerun.returncode == (2 if state == "new" else 0), rerun.stderr
        assert job.state(outcome.work) == "new"
        assert debris(outcome.work) == [], outcome.call

    calls = [call for call in CHANGING_CALLS if call != "renameat2"]
    plain = traced(job.argv, job(), [*calls, "renameat2"], *no_swap)
    found = points(plain.trace, plain.work)
    renames = [n for n, (_, _, line) in enumerate(found) if "rename" in line and ".part" in line]
    for name, number, line in found[min(renames) - around : max(renames) + around + 1]:
        if name == "renameat2":
            continue
        run = traced(job.argv, job(), [*calls, "renameat2"], *no_swap, "-e", f"inject={name}:signal=KILL:when={number}")
        check(Outcome(run.work, run.returncode, run.stdout, run.stderr, run.trace, line))
    assert seen["none"] >= 1, seen
    assert seen["old"] >= 1


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_of_several_processes_with_one_target_one_wins(tmp_path: Path, count: int) -> None:
    job = FuseJob(tmp_path, "new")
    work = job()
    started = [
        subprocess.Popen(job.argv, cwd=work, env=faults.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(count)
    ]
    codes = []
    for process in started:
        process.communicate(timeout=120)
        codes.append(process.returncode)
    assert sorted(codes) == [0] + [6] * (count - 1)
    assert job.state(work) == "new"
    assert os.listdir(work) == ["out"]

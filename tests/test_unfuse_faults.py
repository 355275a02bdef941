"""Faults under ``unfuse``: killed, out of space, interrupted; into a new folder, and over an old output.

The tests are those of the other commands; only the command line and what may be there afterwards are its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import loraconv
from tests.cli_support import digests, snapshot
from tests.faults import Outcome, needs_strace, sweep
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
from tests.test_unfuse import add_deltas, base_tensors, fused_model, model


class UnfuseJob(Job):
    """``unfuse`` of a model of four shards; with ``replace``, over the base of another one."""

    def __init__(self, folder: Path, replace: bool) -> None:
        self.folder, self.replace, self.count = folder, replace, 0
        self.source = folder / "source"
        fused = self._fused("fused", "BF16")
        self.argv = [sys.executable, "-B", "-c", START, "unfuse", str(fused), "-o", "out"]
        self.argv += ["--overwrite"] if replace else []
        loraconv.unfuse(fused, out=folder / "new")
        loraconv.unfuse(self._fused("other", "F16"), out=folder / "old")
        self.new = digests(folder / "new")
        self.old = digests(folder / "old") if replace else None
        self.before = snapshot(self.source)

    def _fused(self, name: str, dtype: str) -> Path:
        tensors = base_tensors(dtype)
        base = model(self.source / f"{name}-base", tensors, 4)
        return fused_model(base, self.source / name, add_deltas(tensors))


@pytest.fixture(params=[pytest.param(replace, marks=pytest.mark.slow) for replace in (False, True)])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> UnfuseJob:
    return UnfuseJob(tmp_path, request.param)


@needs_strace
@pytest.mark.parametrize(
    ("replace", "every"), [(True, 40), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in (False, True))]
)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_base_and_a_rerun_cleans_up(
    tmp_path: Path, replace: bool, every: int
) -> None:
    job = UnfuseJob(tmp_path, replace)
    seen: dict[str, int] = {}

    def check(outcome: Outcome) -> None:
        state = job.state(outcome.work)
        seen[state] = seen.get(state, 0) + 1
        assert state in (job.unchanged, "new"), outcome.call
        rerun = job.run(outcome.work)
        assert rerun.returncode == (6 if state == "new" and not replace else 0), rerun.stderr
        assert job.state(outcome.work) == "new"
        assert debris(outcome.work) == [], outcome.call

    count = sweep(job.argv, "signal=KILL", setup=job, check=check, every=every)
    print(count, "kill points", seen)
    assert count >= 60 // every

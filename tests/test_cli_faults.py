"""Faults under the real command line: killed, out of space, interrupted. An output appears whole or not at all."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loraconv
from tests import faults
from tests.cli_support import digests, snapshot, tiny_run
from tests.faults import CHANGING_CALLS, Outcome, needs_strace, points, sweep, traced

SHARD = "8KB"
FAILING_CALLS = tuple(call for call in CHANGING_CALLS if call not in ("openat", "unlink", "unlinkat", "rmdir"))
START = "from loraconv.cli import main; main()"


@pytest.fixture(scope="module", autouse=True)
def program() -> Iterator[None]:
    """The installed package is run, not the source folder: only the installation knows where the converters are."""
    plain = faults.environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "environment", lambda: {**plain(), "PYTHONPATH": ""})
        yield


class Job:
    """A command line that writes ``out`` in a fresh work folder; with ``replace``, over an output of other numbers."""

    def __init__(self, folder: Path, command: str, replace: bool) -> None:
        self.folder, self.replace, self.count = folder, replace, 0
        self.source = tiny_run(folder / "source")
        older = tiny_run(folder / "older", seed=7)
        self.argv = [sys.executable, "-B", "-c", START, *self._words(command, self.source)]
        self.new = self._made("new", command, self.source)
        self.old = self._made("old", command, older) if replace else None
        assert self.old != self.new
        self.before = snapshot(folder / "source")

    def _words(self, command: str, source: Path) -> list[str]:
        how = ["--what", "all", "--max-shard-size", SHARD] if command == "sat2diffusers" else ["--to", "sat"]
        return [command, str(source), "-o", "out", *how, *(["--overwrite"] if self.replace else [])]

    def _made(self, name: str, command: str, source: Path) -> dict[str, str]:
        out = self.folder / name
        if command == "sat2diffusers":
            loraconv.sat2diffusers(source, out=out, what="all", max_shard_size=SHARD)
            assert len(list(out.glob("transformer/*.safetensors"))) >= 3
        else:
            loraconv.convert(source, out=out, to="sat")
        return digests(out)

    def __call__(self) -> Path:
        """A fresh work folder; the one before is deleted."""
        shutil.rmtree(self.folder / f"work-{self.count}-", ignore_errors=True)
        self.count += 1
        work = self.folder / f"work-{self.count}-"
        work.mkdir()
        if self.replace:
            shutil.copytree(self.folder / "old", work / "out")
        return work

    def state(self, work: Path) -> str:
        """``old``, ``new`` or ``none``; anything else is a torn output and fails the test."""
        assert snapshot(self.folder / "source") == self.before, "the input was changed"
        if not os.path.lexists(work / "out"):
            return "none"
        found = digests(work / "out")
        assert found in (self.old, self.new), "torn"
        return "new" if found == self.new else "old"

    @property
    def unchanged(self) -> str:
        return "old" if self.replace else "none"

    def run(self, work: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv,
            cwd=work,
            env=faults.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )


def debris(work: Path) -> list[str]:
    return sorted(set(os.listdir(work)) - {"out"})


CASES = [("sat2diffusers", False), ("sat2diffusers", True), ("convert", False), ("convert", True)]


@pytest.fixture(params=CASES, ids=[f"{name}-{'overwrite' if replace else 'new'}" for name, replace in CASES])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    return Job(tmp_path, *request.param)


#: Sampled by default; every call when asked for.
SAMPLED = [30, pytest.param(1, marks=pytest.mark.slow)]


# --- P9: killed -------------------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("every", SAMPLED)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_output_and_a_rerun_cleans_up(job: Job, every: int) -> None:
    seen: dict[str, int] = {}

    def check(outcome: Outcome) -> None:
        state = job.state(outcome.work)
        seen[state] = seen.get(state, 0) + 1
        assert state in (job.unchanged, "new"), outcome.call
        rerun = job.run(outcome.work)
        if state == "new" and not job.replace:
            assert rerun.returncode == 6
        else:
            assert rerun.returncode == 0, rerun.stderr
        assert job.state(outcome.work) == "new"
        assert debris(outcome.work) == [], outcome.call

    count = sweep(job.argv, "signal=KILL", setup=job, check=check, every=every)
    print(count, "kill points", seen)
    assert count >= 40 // every


# --- P10: a full or broken disk ---------------------------------------------------------------------------------------


def checked_error(job: Job, outcome: Outcome, seen: dict[str, int]) -> None:
    """Exit 6, one clear error; in place only what had its name already."""
    state = job.state(outcome.work)
    assert "Traceback" not in outcome.stderr, outcome.call
    assert "defect" not in outcome.stderr, (outcome.call, outcome.stderr)
    if "write(2<" in outcome.call:
        return
    assert outcome.returncode == 6, (outcome.call, outcome.returncode, outcome.stderr)
    assert outcome.stderr.startswith("error: "), outcome.stderr
    named = "write(1<" in outcome.call or "durability unknown" in outcome.stderr
    assert state == ("new" if named else job.unchanged), outcome.call
    slug = "stdout" if "write(1<" in outcome.call else "durability" if named else "clean"
    seen[slug] = seen.get(slug, 0) + 1
    if "durability unknown" not in outcome.stderr:
        assert debris(outcome.work) == [], outcome.call
    assert outcome.stdout == "" or not named or "write(1<" in outcome.call


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", pytest.param("EDQUOT", marks=pytest.mark.slow)])
@pytest.mark.parametrize("every", SAMPLED)
def test_a_failing_call_is_exit_6_with_the_old_output_intact_and_no_debris(job: Job, error: str, every: int) -> None:
    seen: dict[str, int] = {}
    count = sweep(
        job.argv,
        f"error={error}",
        setup=job,
        check=lambda outcome: checked_error(job, outcome, seen),
        calls=FAILING_CALLS,
        every=every,
    )
    print(count, "error points", seen)
    assert count >= 30 // every


@needs_strace
def test_a_failing_last_fsync_or_result_line_is_exit_6_and_says_that_the_output_is_there(job: Job) -> None:
    plain = traced(job.argv, job(), FAILING_CALLS)
    found = points(plain.trace, plain.work)
    last = {"fsync": max(n for name, n, _ in found if name == "fsync"),
            "write": min(n for name, n, line in found if name == "write" and "(1<" in line)}  # fmt: skip
    for call, number in last.items():
        outcome = traced(job.argv, job(), FAILING_CALLS, "-e", f"inject={call}:error=EIO:when={number}")
        assert outcome.returncode == 6, (call, outcome.stderr)
        assert job.state(outcome.work) == "new"
        assert "written" in outcome.stderr or "standard output" in outcome.stderr


@pytest.mark.parametrize("limits", [5, pytest.param(33, marks=pytest.mark.slow)])
def test_a_file_size_limit_at_any_size_is_exit_6_and_clean(job: Job, limits: int) -> None:
    assert job.run(job()).returncode == 0
    out = job.folder / f"work-{job.count}-" / "out"
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for number in range(limits):
        size = largest * number // (limits - 1)
        work = job()
        done = job.run(work, preexec_fn=lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        if size == largest:
            assert (done.returncode, job.state(work)) == (0, "new")
        else:
            assert done.returncode == 6, (size, done.stderr)
            assert job.state(work) == job.unchanged
            assert "Traceback" not in done.stderr
            assert done.stdout == ""
        assert debris(work) == []


# --- P11: durable when we say done ------------------------------------------------------------------------------------


@needs_strace
def test_wrote_is_said_only_after_the_last_fsync(job: Job) -> None:
    outcome = traced(job.argv, job(), CHANGING_CALLS)
    assert outcome.returncode == 0, outcome.stderr
    lines = [line for _, _, line in points(outcome.trace, outcome.work)]

    def where(*words: str) -> list[int]:
        found = [number for number, line in enumerate(lines) if all(word in line for word in words)]
        assert found, words
        return found

    (renamed,) = where("renameat2(" if job.replace else "rename(", ".part", "/out")
    for name in job.new:
        (synced,) = where("fsync(", f".part/{name}>")
        filled = [n for n in where(f".part/{name}>") if " write(" in lines[n] or " copy_file_range(" in lines[n]]
        assert max(filled) < synced < renamed
    folders = where("fsync(", ".part>")
    assert max(folders) < renamed
    (parent,) = where("fsync(", f"/{outcome.work.name}>")
    wrote = where(" write(1<")
    assert renamed < parent < min(wrote)
    if job.replace:
        assert parent < min(where("unlinkat(")) < max(where("unlinkat(")) < min(wrote)


# --- P14: permissions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_outputs_follow_the_umask_and_replaced_ones_keep_their_modes(job: Job, umask: int) -> None:
    work = job()
    out = work / "out"
    if job.replace:
        for path in (out, *out.rglob("*")):
            path.chmod(0o2750 if path.is_dir() else 0o640)
    done = job.run(work, umask=umask)
    assert done.returncode == 0, done.stderr
    for path in (out, *out.rglob("*")):
        kept = 0o2750 if path.is_dir() else 0o640
        fresh = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == (kept if job.replace else fresh), path


# --- P15: the same bytes ----------------------------------------------------------------------------------------------


def surroundings(number: int, source: Path, folder: Path) -> tuple[dict[str, str], Path, str]:
    """Environment, current folder, and spelling of the source, for the run of this number."""
    draw = random.Random(number)
    env = {
        "PYTHONHASHSEED": str(draw.randrange(1 << 31)),
        "OMP_NUM_THREADS": draw.choice("12"),
        "OPENBLAS_NUM_THREADS": draw.choice("12"),
        "LC_ALL": ("C", "C.UTF-8", "POSIX", "en_US.UTF-8")[number % 4],
        "TZ": ("UTC", "Asia/Tokyo", "America/New_York")[number % 3],
        "COLUMNS": draw.choice(("40", "200")),
        "HOME": draw.choice((str(folder), "/nonexistent")),
    }
    cwd = (folder, source, Path("/"), source.parent)[number % 4]
    spelling = str(source) if number % 3 else os.path.relpath(source, cwd)
    return env, cwd, spelling


@pytest.mark.parametrize("runs", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["all", "peft", "sat", "diffusers"])
def test_the_same_command_writes_the_same_bytes_everywhere(tmp_path: Path, target: str, runs: int) -> None:
    source = tiny_run(tmp_path / "source")
    seen = set()
    for number in (0, 1, 2, 9) if runs == 4 else range(runs):  # 9: the current folder is the source
        env, cwd, spelling = surroundings(number, source, tmp_path)
        out = tmp_path / f"deep/{number}/out"
        words = ["sat2diffusers", spelling, "--what", "all", "--max-shard-size", SHARD]
        if target != "all":
            words = ["convert", spelling, "--to", target]
        words = [sys.executable, "-B", "-c", START, *words, "-o", str(out)]
        done = subprocess.run(
            words, cwd=cwd, env={**faults.environment(), **env}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        made = digests(out)
        assert "loraconv.json" in made
        seen.add(json.dumps(made, sort_keys=True))
        time.sleep(0.01)
    assert len(seen) == 1


# --- P18: interrupted -------------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
@pytest.mark.parametrize("every", SAMPLED)
def test_a_signal_at_any_call_leaves_no_debris(job: Job, name: str, code: int, every: int) -> None:
    number = getattr(signal, f"SIG{name}")
    seen: dict[int, int] = {}

    def check(outcome: Outcome) -> None:
        seen[outcome.returncode] = seen.get(outcome.returncode, 0) + 1
        # 0 and the plain signal: it came when the program was on its way out.
        assert outcome.returncode in (code, 0, -number), (outcome.call, outcome.returncode, outcome.stderr)
        state = job.state(outcome.work)
        assert state in (job.unchanged, "new"), outcome.call
        assert state == "new" or outcome.returncode == code
        assert debris(outcome.work) == [], outcome.call
        assert "Traceback" not in outcome.stderr, (outcome.call, outcome.stderr)

    count = sweep(job.argv, f"signal={name}", setup=job, check=check, every=every)
    print(count, "signal points", seen)
    assert seen.get(code, 0) > 0
    assert count >= 30 // every


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_signal_at_any_time_leaves_no_debris(job: Job, number: signal.Signals, times: int) -> None:
    begun = time.monotonic()
    assert job.run(job()).returncode == 0
    duration = time.monotonic() - begun
    draw = random.Random(number)
    seen: dict[int, int] = {}
    for _ in range(times):
        work = job()
        process = subprocess.Popen(
            job.argv, cwd=work, env=faults.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(draw.uniform(0.3 * duration, duration))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        seen[process.returncode] = seen.get(process.returncode, 0) + 1
        assert process.returncode in (0, 128 + number, -number), err
        assert job.state(work) in (job.unchanged, "new")
        assert debris(work) == []
    print(seen)


# --- a disk that is really full ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many kilobytes, where this is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("A REALLY FULL DISK IS NOT TESTED: mounting is forbidden here")
        mounted.append(place)
        return place

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_exit_6_and_says_how_much_is_needed_and_free(
    tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(64)
    source = tiny_run(tmp_path)
    words = [sys.executable, "-m", "loraconv", "sat2diffusers", str(source), "-o", str(disk / "out"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    error = json.loads(done.stderr)
    assert (done.returncode, error["slug"], os.listdir(disk)) == (6, "no-space", [])
    assert "needed" in error["why"]
    assert "free" in error["why"]

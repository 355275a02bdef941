"""Outputs appear whole or not at all, whatever fails; inputs are never touched."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loraconv.errors import LoraconvError, UsageError, WriteFailed
from loraconv.io import atomic, output_file, syscalls
from loraconv.io.atomic import output_folder
from loraconv.io.growing import GrowingFile
from loraconv.io.output_file import WRITE_BYTES
from tests import atomic_driver
from tests.faults import CHANGING_CALLS, Outcome, environment, needs_strace, points, python, sweep, traced

DRIVER = Path(atomic_driver.__file__)
NO_EXCHANGE = ("-e", "inject=?renameat2:error=EINVAL")


def driver(**options: Any) -> list[str]:
    return python(DRIVER, json.dumps(options))


def run(work: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        driver(**options), cwd=work, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def start(work: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        driver(**options), cwd=work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def version(target: Path) -> int | None:
    """Which version stands at ``target``, None for nothing; a torn output fails the test."""
    if not os.path.lexists(target):
        return None
    manifest = json.loads((target / "loraconv.json").read_bytes())
    files = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    assert files == {"loraconv.json", *atomic_driver.NAMES}
    for name in atomic_driver.NAMES:
        assert (target / name).read_bytes() == atomic_driver.content(manifest["version"], name, manifest["size"])
    found: int = manifest["version"]
    return found


def debris(folder: Path) -> list[str]:
    """What an output leaves behind if it does not clean up."""
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Bytes, mode and modification time of everything below ``folder``."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.lstat().st_mode, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


class Works:
    """Fresh work folders, with version 1 in ``out`` where a test replaces it; keeps the latest only."""

    def __init__(self, base: Path, replace: bool) -> None:
        self.base, self.replace, self.numbers = base, replace, itertools.count()
        self.old = 1 if replace else None
        self.options = {"target": "out", "version": 2, "overwrite": replace}

    def __call__(self) -> Path:
        work = self.base / f"work-{next(self.numbers)}-"
        work.mkdir()
        if self.replace:
            atomic_driver.write(str(work / "out"), version=1)
        return work


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def works(request: pytest.FixtureRequest, tmp_path: Path) -> Works:
    return Works(tmp_path, request.param)


def put(target: Path, **options: Any) -> None:
    """One small output, written in this process."""
    options.setdefault("inputs", ())
    options.setdefault("needed", 0)
    with output_folder(target, **options) as folder, folder.file("loraconv.json") as file:
        file.write(b'{"files": []}')


def break_off(target: Path, error: type[BaseException], before: Callable[[], object] = int) -> None:
    """Raise ``error`` in the middle of a file that is large enough to be hashed in a thread."""
    with output_folder(target, inputs=[], needed=0) as folder, folder.file("x") as file:
        file.write(bytes(5 << 20))
        before()
        raise error("broken off")


def refused(kind: type[LoraconvError], slug: str, action: Callable[[], object]) -> LoraconvError:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.slug == slug, str(caught.value)
    return caught.value


# --- the plain case ---------------------------------------------------------------------------------------------------


def test_an_output_appears_whole_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with output_folder(target, inputs=[], needed=10) as folder:
        with folder.file("transformer/config.json") as file:
            file.write(b"{}")
        assert file.path.read_bytes() == b"{}"
        assert file.size == 2
        assert not target.exists()
    assert (target / "transformer/config.json").read_bytes() == b"{}"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (9 << 20) + 5])
def test_size_and_sha256_are_those_of_the_file(tmp_path: Path, size: int, wrap: Callable[[bytes], Any]) -> None:
    data = random.Random(size).randbytes(size)
    with output_folder(tmp_path / "out", inputs=[], needed=size) as folder, folder.file("x") as file:
        for start in range(0, size, 3 << 20):
            file.write(wrap(data[start : start + (3 << 20)]))
    assert (tmp_path / "out/x").read_bytes() == data
    assert (file.size, file.sha256) == (size, hashlib.sha256(data).hexdigest())


def test_a_buffer_may_be_reused_while_the_hash_is_still_at_work(tmp_path: Path) -> None:
    buffer, expected = bytearray(4 << 20), hashlib.sha256()
    with output_folder(tmp_path / "out", inputs=[], needed=0) as folder, folder.file("x") as file:
        for value in range(12):
            buffer[:] = bytes([value]) * len(buffer)
            expected.update(buffer)
            file.write(buffer)
    assert file.sha256 == expected.hexdigest()


def test_one_write_never_passes_more_than_4_mib_and_survives_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    real = os.write

    def short(descriptor: int, data: memoryview) -> int:
        counts.append(len(data))
        return real(descriptor, data[: max(1, len(data) // 2)])

    data = random.Random(0).randbytes(9 << 20)
    monkeypatch.setattr(os, "write", short)
    with output_folder(tmp_path / "out", inputs=[], needed=0) as folder, folder.file("x") as file:
        file.write(data)
    monkeypatch.undo()
    assert max(counts) == WRITE_BYTES <= 4 << 20
    assert (tmp_path / "out/x").read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()


def test_writeback_starts_early_in_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(output_file, "WRITEBACK_BYTES", 8 << 20)
    monkeypatch.setattr(output_file, "start_writeback", lambda fd, offset, count: begun.append((offset, count)))
    with output_folder(tmp_path / "out", inputs=[], needed=0) as folder, folder.file("x") as file:
        file.write(bytes(20 << 20))
    assert begun == [(0, 8 << 20), (8 << 20, 8 << 20), (16 << 20, 4 << 20)]


def test_starting_writeback_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", inputs=[], needed=0) as folder, folder.file("x") as file:
        file.write(bytes(70 << 20))
    assert (tmp_path / "out/x").stat().st_size == 70 << 20


# --- exceptions leave nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_nothing_behind_not_even_created_parents_or_threads(
    tmp_path: Path, error: type[BaseException]
) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        break_off(tmp_path / "new/deep/out", error)
    assert os.listdir(tmp_path) == []
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)


def test_a_parent_that_somebody_else_uses_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken off"):
        break_off(tmp_path / "new/out", ValueError, (tmp_path / "new/theirs").touch)
    assert os.listdir(tmp_path / "new") == ["theirs"]


def test_an_output_with_a_file_that_was_given_up_is_never_published(tmp_path: Path) -> None:
    def swallow() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0) as folder:
            with suppress(ValueError), folder.file("a") as file:
                file.write(b"half")
                raise ValueError
            put(tmp_path / "other")

    with pytest.raises(RuntimeError, match="not completed"):
        swallow()
    assert os.listdir(tmp_path) == ["other"]


def test_a_file_whose_write_failed_cannot_be_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whys = []

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def swallow() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=5) as folder, folder.file("a") as file:
            monkeypatch.setattr(os, "write", full)
            try:
                file.write(b"data")
            except WriteFailed as error:
                whys.append(error.why)
            monkeypatch.undo()

    refused(WriteFailed, "write-failed", swallow)
    assert "5 B (5 bytes) needed" in whys[0]
    assert os.listdir(tmp_path) == []


def test_a_file_that_became_shorter_is_found_before_the_commit(tmp_path: Path) -> None:
    def shorten() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=5) as folder, folder.file("a") as file:
            file.write(b"data")
            os.truncate(file.path, 2)

    assert "not as long" in refused(WriteFailed, "write-failed", shorten).why
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "/x", "../x", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0b", ".", ".."])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(ValueError, match="not a relative file name"),
        output_folder(tmp_path / "out", inputs=[], needed=0) as folder,
        folder.file(name),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_a_symlink_planted_in_the_temporary_folder_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")

    def plant() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0) as folder:
            (folder.path / "x").symlink_to(victim)
            with folder.file("x"):
                pass

    refused(WriteFailed, "write-failed", plant)
    assert victim.read_bytes() == b"precious"
    assert debris(tmp_path) == []


# --- what is at the target --------------------------------------------------------------------------------------------


def test_an_empty_folder_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    put(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["loraconv.json"]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link to file", "fifo", "looping link"])
def test_what_is_not_a_folder_is_never_replaced(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_bytes(b"x")
    elif kind == "link to file":
        (tmp_path / "file").write_bytes(b"x")
        target.symlink_to("file")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.symlink_to(target)
    before = sorted(os.listdir(tmp_path))
    refused(WriteFailed, "output-exists", lambda: put(target, overwrite=overwrite))
    assert sorted(os.listdir(tmp_path)) == before


def test_an_output_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    atomic_driver.write(str(tmp_path / "out"), version=1)
    error = refused(WriteFailed, "output-exists", lambda: put(tmp_path / "out"))
    assert "--overwrite" in error.hint
    assert version(tmp_path / "out") == 1
    atomic_driver.write(str(tmp_path / "out"), version=2, overwrite=True)
    assert version(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


FOREIGN: dict[str, Callable[[Path], object]] = {
    "one file more": lambda out: (out / "notes.txt").touch(),
    "a file in a sub-folder": lambda out: (out / "transformer/notes.txt").touch(),
    "an empty folder": lambda out: (out / "photos").mkdir(),
    "a symlink": lambda out: (out / "link").symlink_to("a.bin"),
    "a symlink in place of a file": lambda out: [(out / "a.bin").unlink(), (out / "a.bin").symlink_to("loraconv.json")],
    "a folder in place of a file": lambda out: [(out / "a.bin").unlink(), (out / "a.bin").mkdir()],
    "no manifest": lambda out: (out / "loraconv.json").unlink(),
    "a broken manifest": lambda out: (out / "loraconv.json").write_bytes(b'{"files": ['),
    "a manifest that is a list": lambda out: (out / "loraconv.json").write_bytes(b"[]"),
    "a manifest without files": lambda out: (out / "loraconv.json").write_bytes(b"{}"),
    "a manifest with odd files": lambda out: (out / "loraconv.json").write_bytes(b'{"files": [{"name": [1]}, 7]}'),
    "a manifest with odd names": lambda out: (out / "loraconv.json").write_bytes(b'{"files": [{"name": null}]}'),
    "a manifest of brackets": lambda out: (out / "loraconv.json").write_bytes(b"[" * 100_000),
    "a manifest that is a link": lambda out: [
        (out / "loraconv.json").rename(out.parent / "manifest"),
        (out / "loraconv.json").symlink_to("../manifest"),
    ],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_holds_anything_foreign_is_never_replaced(tmp_path: Path, kind: str) -> None:
    atomic_driver.write(str(tmp_path / "out"), version=1)
    FOREIGN[kind](tmp_path / "out")
    before = snapshot(tmp_path)
    refused(WriteFailed, "output-foreign", lambda: put(tmp_path / "out", overwrite=True))
    assert snapshot(tmp_path) == before


def test_the_refusal_names_three_foreign_files_at_most(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in "abcdef":
        (home / name).touch()
    error = refused(WriteFailed, "output-foreign", lambda: put(home, overwrite=True))
    assert error.where == "a, b, c"


def test_files_that_appear_during_the_run_are_not_deleted(tmp_path: Path) -> None:
    put(tmp_path / "out")

    def interfere() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0, overwrite=True):
            (tmp_path / "out/notes.txt").write_bytes(b"precious")

    refused(WriteFailed, "output-foreign", interfere)
    assert (tmp_path / "out/notes.txt").read_bytes() == b"precious"
    assert debris(tmp_path) == []


def test_an_output_that_appears_during_the_run_wins(tmp_path: Path) -> None:
    def late() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0):
            atomic_driver.write(str(tmp_path / "out"), version=1)

    refused(WriteFailed, "output-exists", late)
    assert version(tmp_path / "out") == 1
    assert debris(tmp_path) == []


@pytest.mark.parametrize("target", ["", "/", "a\0b"])
def test_a_target_without_a_name_is_refused(target: str) -> None:
    refused(UsageError, "usage", lambda: put(target, overwrite=True))  # type: ignore[arg-type]


def test_a_write_protected_parent_or_too_long_a_name_is_reported(tmp_path: Path) -> None:
    assert "too long" in refused(WriteFailed, "write-failed", lambda: put(tmp_path / ("x" * 250))).why
    (tmp_path / "file").touch()
    refused(WriteFailed, "write-failed", lambda: put(tmp_path / "file/out"))
    if os.path.isdir("/sys/kernel"):
        refused(WriteFailed, "not-writable", lambda: put(Path("/sys/kernel/out")))


def test_space_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    error = refused(WriteFailed, "no-space", lambda: put(tmp_path / "deep/out", needed=1 << 60))
    assert f"({1 << 60} bytes) needed" in error.why
    assert "free" in error.why
    assert os.listdir(tmp_path) == []


# --- P9: killed at every call -----------------------------------------------------------------------------------------


def check_after_kill(works: Works) -> Callable[[Outcome], None]:
    """The target is the old or the new version or nothing; a rerun succeeds and leaves no debris."""

    def check(outcome: Outcome) -> None:
        assert version(outcome.work / "out") in (works.old, 2), outcome.call
        atomic_driver.write(str(outcome.work / "out"), version=3, overwrite=True)
        assert version(outcome.work / "out") == 3
        assert os.listdir(outcome.work) == ["out"], outcome.call

    return check


@needs_strace
def test_a_kill_at_any_call_leaves_the_old_or_the_new_output_and_a_rerun_cleans_up(works: Works) -> None:
    count = sweep(driver(**works.options), "signal=KILL", setup=works, check=check_after_kill(works))
    print(count, "kill points")
    assert count >= (40 if works.replace else 20)


@needs_strace
@pytest.mark.parametrize(
    "calls",
    [("rename", "renameat2", "unlinkat", "rmdir"), pytest.param(CHANGING_CALLS, marks=pytest.mark.slow)],
    ids=["essential calls", "all calls"],
)
def test_a_kill_at_any_call_where_names_cannot_be_swapped_leaves_the_old_or_the_new_or_nothing(
    tmp_path: Path, calls: tuple[str, ...]
) -> None:
    works = Works(tmp_path, replace=True)
    missing = []

    def check(outcome: Outcome) -> None:
        if not (outcome.work / "out").exists():
            # Between the two renames; a run without --overwrite must then find the old output again.
            missing.append(outcome.call)
            assert run(outcome.work, target="out").returncode == 6
            assert version(outcome.work / "out") == 1
            assert debris(outcome.work) == []
        check_after_kill(works)(outcome)

    argv = driver(**works.options)
    count = sweep(argv, "signal=KILL", setup=works, check=check, calls=calls, always=NO_EXCHANGE)
    print(count, "kill points")
    assert len(missing) == 1
    assert "rename(" in missing[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_200_kills_at_random_times_never_tear_an_output(works: Works, seed: int) -> None:
    times = random.Random(seed)
    options = {**works.options, "size": 3_000_000}
    seen = set()
    begun = time.monotonic()
    assert run(works(), **options).returncode == 0
    duration = time.monotonic() - begun
    for _ in range(50):
        work = works()
        process = start(work, **options)
        time.sleep(times.uniform(0.3, 1.1) * duration)
        process.kill()
        process.communicate()
        seen.add(version(work / "out"))
        check_after_kill(works)(Outcome(work, process.returncode, "", "", ()))
    assert seen <= {works.old, 2}


# --- P10: the disk is full, broken, or the file size limited ----------------------------------------------------------


def check_after_error(works: Works) -> Callable[[Outcome], None]:
    """Exit code 6 and the old state without debris, or exit code 0 and the new output."""

    def check(outcome: Outcome) -> None:
        if "write(1<" in outcome.call:  # "done" could not be printed
            assert version(outcome.work / "out") == 2
            return
        assert outcome.returncode in (0, 6), outcome.call + outcome.stderr
        slug = json.loads(outcome.stderr)["slug"] if outcome.returncode else ""
        in_place = slug in ("", "durability-unknown", "old-remains")
        assert version(outcome.work / "out") == (2 if in_place else works.old), outcome.call
        kept = 1 if works.replace and slug == "durability-unknown" else 0
        assert len(debris(outcome.work)) == kept, outcome.call
        if not in_place and "ENOSPC" in str(outcome.trace):
            assert "needed" in json.loads(outcome.stderr)["why"]

    return check


ESSENTIAL = ("write", "fsync", "fchmod", "chmod", "mkdir", "mkdirat", "rename", "renameat", "renameat2")


@needs_strace
@pytest.mark.parametrize(
    "error",
    ["ENOSPC", *(pytest.param(name, marks=pytest.mark.slow) for name in ("EIO", "EDQUOT", "EACCES", "EROFS", "EFBIG"))],
)
def test_a_failing_call_is_exit_6_with_the_old_output_intact_and_no_debris(works: Works, error: str) -> None:
    failures = []
    check = check_after_error(works)

    def count(outcome: Outcome) -> None:
        check(outcome)
        failures.append(outcome.returncode)

    calls = sweep(driver(**works.options), f"error={error}", setup=works, check=count, calls=ESSENTIAL)
    print(calls, "failing calls")
    assert failures.count(6) >= calls - 1  # all but the print of "done"
    assert calls >= 15


@needs_strace
@pytest.mark.parametrize("error", ["EIO", pytest.param("ENOSPC", marks=pytest.mark.slow)])
def test_a_failing_open_or_unlink_never_costs_the_old_output(works: Works, error: str) -> None:
    calls = [call for call in CHANGING_CALLS if call not in ESSENTIAL]
    argv = driver(**works.options)
    count = sweep(argv, f"error={error}", setup=works, check=check_after_error(works), calls=calls)
    print(count, "failing calls")


@needs_strace
def test_a_failing_call_where_names_cannot_be_swapped_keeps_the_old_output(tmp_path: Path) -> None:
    works = Works(tmp_path, replace=True)
    calls = ("rename", "renameat2", "fsync")

    def check(outcome: Outcome) -> None:
        if "renameat2" not in outcome.call:
            check_after_error(works)(outcome)

    sweep(driver(**works.options), "error=EIO", setup=works, check=check, calls=calls, always=NO_EXCHANGE)


def test_a_file_size_limit_at_any_of_33_sizes_leaves_the_old_output(works: Works) -> None:
    for limit in [0, 1, *range(2, 1000, 33), 999]:
        work = works()
        done = run(work, fsize=limit, **works.options)
        assert done.returncode == 6, done.stderr
        assert "too large" in json.loads(done.stderr)["why"]
        assert version(work / "out") == works.old
        assert debris(work) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("FULL DISK NOT TESTED: only root may mount a 1 MB tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk_is_exit_6_and_clean(small_disk: Path) -> None:
    assert run(small_disk, target="out", version=1, size=100_000).returncode == 0
    late = run(small_disk, target="out", version=2, size=600_000, overwrite=True)
    early = run(small_disk, target="out", version=2, size=600_000, needed=1_200_000, overwrite=True)
    for done in (late, early):
        assert done.returncode == 6
        assert json.loads(done.stderr)["slug"] == "no-space"
        assert version(small_disk / "out") == 1
        assert debris(small_disk) == []
    assert "1.2 MB (1200000 bytes) needed" in json.loads(early.stderr)["why"]


# --- P11: durable when we say done ------------------------------------------------------------------------------------


@needs_strace
def test_writes_come_before_their_fsync_before_the_rename_before_the_parents_fsync_before_done(works: Works) -> None:
    work = works()
    outcome = traced(driver(**works.options), work, CHANGING_CALLS)
    lines = [line for _, _, line in points(outcome.trace, work)]

    def where(*words: str) -> list[int]:
        found = [number for number, line in enumerate(lines) if all(word in line for word in words)]
        assert found, words
        return found

    (renamed,) = where("renameat2(" if works.replace else "rename(", ".part", "/out")
    for name in (*atomic_driver.NAMES, "loraconv.json"):
        (synced,) = where("fsync(", f".part/{name}>")
        assert max(where(" write(", f".part/{name}>")) < synced < renamed
        assert max(where("openat(", f".part/{name}")) < max(where("fsync(", ".part>")) < renamed
    assert max(where("fsync(", ".part/transformer>")) < renamed
    (parent,) = where("fsync(", f"/{work.name}>")
    (done,) = where(" write(1<", "done")
    assert renamed < parent < done
    assert all(parent < number < done for number in (where("unlinkat(") if works.replace else []))


@needs_strace
def test_a_failing_last_fsync_is_exit_6_with_the_output_in_place(works: Works) -> None:
    work = works()
    plain = traced(driver(**works.options), work, CHANGING_CALLS)
    last = max(number for name, number, _ in points(plain.trace, work) if name == "fsync")
    work = works()
    inject = ("-e", f"inject=fsync:error=EIO:when={last}")
    outcome = traced(driver(**works.options), work, CHANGING_CALLS, *inject)
    assert outcome.returncode == 6
    assert json.loads(outcome.stderr)["slug"] == "durability-unknown"
    assert "written, durability unknown" in json.loads(outcome.stderr)["message"]
    assert version(work / "out") == 2
    assert "done" not in outcome.stdout


# --- P14: permissions and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("existing", [False, True])
def test_new_outputs_follow_the_umask_and_replaced_ones_keep_their_modes(
    tmp_path: Path, umask: int, existing: bool
) -> None:
    out = tmp_path / "out"
    paths = (out / "a.bin", out / "transformer/b.bin", out / "loraconv.json")
    if existing:
        atomic_driver.write(str(out))
        for path in paths:
            path.chmod(0o640)
        for folder in (out, out / "transformer"):
            folder.chmod(0o2750)
    before = os.umask(umask)
    try:
        atomic_driver.write(str(out), version=2, overwrite=True)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640 if existing else 0o666 & ~umask}
    modes = {stat.S_IMODE(folder.stat().st_mode) for folder in (out, out / "transformer")}
    assert modes == {0o2750 if existing else 0o777 & ~umask}


def test_a_replaced_private_folder_is_private_while_it_is_written(tmp_path: Path) -> None:
    put(tmp_path / "out")
    with output_folder(tmp_path / "out", inputs=[], needed=0, overwrite=True) as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_linked_target_is_replaced_behind_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/real")
    atomic_driver.write(str(tmp_path / "out"), version=1)  # the link dangles: what it names is created
    refused(WriteFailed, "output-exists", lambda: put(tmp_path / "out"))
    atomic_driver.write(str(tmp_path / "out"), version=2, overwrite=True)
    assert os.readlink(tmp_path / "out") == "disk/real"
    assert version(tmp_path / "disk/real") == 2
    assert os.listdir(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("protected", ["out", "out/transformer"])
def test_a_write_protected_output_is_not_replaced(tmp_path: Path, protected: str) -> None:
    atomic_driver.write(str(tmp_path / "out"))
    (tmp_path / protected).chmod(0o555)
    if os.access(tmp_path / protected, os.W_OK):
        pytest.skip("root may write everywhere")
    refused(WriteFailed, "not-writable", lambda: put(tmp_path / "out", overwrite=True))


# --- P13: inputs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A training run: ``run/1/x.pt``, with a symlink and a hard link to it and a symlink to the folder."""
    source = tmp_path / "run/1/x.pt"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"weights")
    source.chmod(0o440)
    (tmp_path / "soft").symlink_to("run/1/x.pt")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "folder").symlink_to("run")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/x.pt").symlink_to(source)
    return tmp_path


#: (target, input), relative to the folder above.
OVERLAPS = {
    "the file itself": ("run/1/x.pt", "run/1/x.pt"),
    "the file, absolute": ("{}/run/1/x.pt", "run/1/x.pt"),
    "the file with dots": ("run/../run/1/./x.pt", "{}/run/1/x.pt"),
    "a symlink of the file": ("soft", "run/1/x.pt"),
    "the file by its symlink": ("run/1/x.pt", "soft"),
    "a hard link of the file": ("hard", "run/1/x.pt"),
    "below the file": ("run/1/x.pt/out", "run/1/x.pt"),
    "the folder": ("run", "run"),
    "the folder with a slash": ("run/", "{}/run"),
    "a symlink of the folder": ("folder", "run"),
    "inside the folder": ("run/1/out", "run"),
    "deep inside the folder": ("run/new/deep/out", "run"),
    "inside by a symlink": ("folder/new/out", "run/"),
    "inside by dots": ("links/../run/out", "run"),
    "around the file": ("run/1", "run/1/x.pt"),
    "far around the file": ("run", "run/1/x.pt"),
    "around the folder": ("run", "run/1"),
    "around by a symlink": ("folder", "run/1/x.pt"),
    "around a symlink of the file": ("links", "links/x.pt"),
    "around what a symlink names": ("run/1", "soft"),
    "around everything": (".", "run/1/x.pt"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", OVERLAPS)
def test_an_output_that_is_in_or_around_an_input_is_refused(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str, overwrite: bool
) -> None:
    monkeypatch.chdir(run_folder)
    before = snapshot(run_folder)
    target, given = (spelling.format(run_folder) for spelling in OVERLAPS[case])
    refused(UsageError, "output-is-input", lambda: put(Path(target), inputs=[given], overwrite=overwrite))
    assert snapshot(run_folder) == before


def test_an_old_output_that_holds_a_hard_link_of_an_input_is_not_replaced(tmp_path: Path) -> None:
    atomic_driver.write(str(tmp_path / "out"))
    (tmp_path / "mine").hardlink_to(tmp_path / "out/transformer/b.bin")
    before = snapshot(tmp_path)
    refused(UsageError, "output-is-input", lambda: put(tmp_path / "out", inputs=[tmp_path / "mine"], overwrite=True))
    assert snapshot(tmp_path) == before


def test_a_new_folder_beside_an_input_file_is_fine(run_folder: Path) -> None:
    before = snapshot(run_folder / "run/1")
    put(run_folder / "run/1/out", inputs=[run_folder / "run/1/x.pt"])
    after = snapshot(run_folder / "run/1")
    assert before.items() <= after.items()


def test_an_input_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(UsageError, "not-found", lambda: put(tmp_path / "out", inputs=[tmp_path / "none"]))


# --- P18: other writers, remains of dead ones, signals ----------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_8_writers_at_once_one_wins_and_nothing_is_torn(tmp_path: Path, overwrite: bool) -> None:
    processes = [
        start(tmp_path, target="out", version=number, ready=f"ready-{number}", go="go", overwrite=overwrite)
        for number in range(8)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 8:
        time.sleep(0.01)
    assert len(debris(tmp_path)) == 8  # nobody took a living writer's folder for remains
    (tmp_path / "go").touch()
    results = {}
    for number, process in enumerate(processes):
        stderr = process.communicate(timeout=60)[1]
        results[number] = process.returncode
        assert process.returncode == 0 or json.loads(stderr)["slug"] in ("output-exists", "write-failed")
    winners = [number for number, code in results.items() if code == 0]
    assert version(tmp_path / "out") in winners
    assert set(results.values()) <= {0, 6}
    assert overwrite or len(winners) == 1
    assert debris(tmp_path) == []


def test_only_remains_of_this_target_that_nobody_locks_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / f".out.{os.getpid()}-0123abcd.part"  # a living process id, but no lock: the id was reused
    dead.mkdir()
    (dead / "x").touch()
    keep = [".out.12-0123abcd.part.bak", ".other.12-0123abcd.part", ".out.x-0123abcd.part", ".out.b.12-0123abcd.part"]
    for name in keep:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.13-0123abcd.part").write_bytes(b"a file")
    (tmp_path / "victim").mkdir()
    (tmp_path / ".out.14-0123abcd.part").symlink_to("victim")
    with output_folder(tmp_path / "out", inputs=[], needed=0) as living:
        put(tmp_path / "out", overwrite=True)
        assert living.path.exists()
        (tmp_path / "out/loraconv.json").unlink()
    left = [*keep, ".out.13-0123abcd.part", ".out.14-0123abcd.part"]
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "victim", "out"])


def test_a_folder_that_was_taken_for_remains_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, hit = atomic._lock, []

    def robbed(path: Path) -> int | None:
        if not hit:
            hit.append(path)
            path.rmdir()
        return real(path)

    monkeypatch.setattr(atomic, "_lock", robbed)
    put(tmp_path / "out")
    assert len(hit) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_without_locks_an_output_is_written_but_nothing_is_taken_for_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    (tmp_path / ".out.12-0123abcd.part").mkdir()
    put(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.12-0123abcd.part", "out"]


@pytest.mark.parametrize("libc", ["without renameat2", "without swap"])
def test_where_names_cannot_be_swapped_the_old_output_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: str
) -> None:
    atomic_driver.write(str(tmp_path / "out"))
    monkeypatch.setattr(syscalls, "_libc", lambda name: None)
    if libc == "without swap":
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    atomic_driver.write(str(tmp_path / "out"), version=2, overwrite=True)
    assert version(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


@needs_strace
@pytest.mark.parametrize(
    ("name", "code", "every"),
    [
        ("INT", 130, 2),
        pytest.param("INT", 130, 1, marks=pytest.mark.slow),
        pytest.param("TERM", 143, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_any_call_leaves_no_debris(works: Works, name: str, code: int, every: int) -> None:
    number = getattr(signal, f"SIG{name}")

    def check(outcome: Outcome) -> None:
        # 0 and the plain signal: it came when the program was on its way out.
        assert outcome.returncode in (code, 0, -number), outcome.call + outcome.stderr
        assert version(outcome.work / "out") in (works.old, 2), outcome.call
        assert debris(outcome.work) == [], outcome.call

    count = sweep(driver(**works.options), f"signal={name}", setup=works, check=check, every=every)
    print(count, "signal points")
    assert count >= 20 // every


@needs_strace
def test_a_signal_while_parents_are_created_removes_them_again(tmp_path: Path) -> None:
    works = Works(tmp_path, replace=False)

    def check(outcome: Outcome) -> None:
        assert (outcome.returncode, os.listdir(outcome.work)) == (130, []), outcome.call

    assert sweep(driver(target="new/deep/out"), "signal=INT", setup=works, check=check, calls=["mkdir", "mkdirat"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_50_signals_at_random_times_leave_no_debris(works: Works, number: signal.Signals) -> None:
    times = random.Random(number)
    options = {**works.options, "size": 3_000_000}
    for _ in range(50):
        work = works()
        process = start(work, ready="ready", go="go", **options)
        while not (work / "ready").exists():
            time.sleep(0.002)
        (work / "go").touch()
        time.sleep(times.uniform(0, 0.03))
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode in (0, 128 + number, -number)
        assert version(work / "out") in (works.old, 2)
        assert debris(work) == []


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_a_hundred_failed_outputs_leak_neither_descriptors_nor_threads(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        with pytest.raises(ValueError, match="broken off"):
            break_off(tmp_path / "out", ValueError)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


# --- a reader that follows the writer ---------------------------------------------------------------------------------


def test_a_reader_gets_every_byte_of_a_file_that_is_still_being_written(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 << 20)
    with (
        ThreadPoolExecutor(1) as beside,
        output_folder(tmp_path / "out", inputs=[], needed=0) as folder,
        folder.file("a") as file,
    ):
        file.write(content[:100])
        file.reserve(len(content))
        with GrowingFile(file) as growing:
            assert growing.size == len(content)
            assert growing.pread(0, 100) == content[:100]
            later = beside.submit(growing.pread, 100, len(content) - 100)
            for start in range(100, len(content), 1 << 16):
                assert not later.done()
                file.write(content[start : start + (1 << 16)])
            assert later.result(10) == content[100:]


@pytest.mark.parametrize("how", ["abandoned", "too short"])
def test_a_reader_does_not_wait_for_bytes_that_will_never_come(tmp_path: Path, how: str) -> None:
    def write_too_little() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0) as folder, folder.file("a") as file:
            file.reserve(100)
            file.write(b"x" * 50)
            waiting.append(beside.submit(GrowingFile(file).pread, 0, 100))
            if how == "abandoned":
                file.abandon()

    waiting: list[Future[bytes]] = []
    with ThreadPoolExecutor(1) as beside, pytest.raises(WriteFailed):
        write_too_little()
    with pytest.raises(OSError, match="not completed"):
        waiting[0].result(10)
    assert list(tmp_path.iterdir()) == []

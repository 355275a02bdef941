"""A single output file appears whole or not at all, and replaces nothing but its own kind unless it is told to."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraconv.errors import LoraconvError, UsageError, WriteFailed
from loraconv.io import atomic, syscalls
from loraconv.io.atomic import output_file
from tests import output_file_driver as driver
from tests.faults import CHANGING_CALLS, Outcome, needs_strace, points, python, sweep, traced

NO_RENAMEAT2 = ("-e", "inject=?renameat2:error=EINVAL")


def argv(**options: Any) -> list[str]:
    return python(Path(driver.__file__), json.dumps({"target": "out.html", "version": 2, **options}))


def refused(kind: type[LoraconvError], slug: str, action: Callable[[], object]) -> LoraconvError:
    with pytest.raises(kind) as caught:
        action()
    assert caught.value.slug == slug, str(caught.value)
    return caught.value


class Works:
    """Fresh work folders, with version 1 of the file where a test replaces it."""

    def __init__(self, base: Path, replace: bool) -> None:
        self.base, self.replace, self.numbers = base, replace, itertools.count()
        self.old = driver.content(1) if replace else None

    def __call__(self) -> Path:
        work = self.base / f"work-{next(self.numbers)}-"
        work.mkdir()
        if self.replace:
            driver.write(str(work / "out.html"))
        return work


@pytest.fixture(params=[False, True], ids=["new", "replaced"])
def works(request: pytest.FixtureRequest, tmp_path: Path) -> Works:
    return Works(tmp_path, request.param)


def found(work: Path) -> bytes | None:
    target = work / "out.html"
    return target.read_bytes() if target.exists() else None


# --- the plain case ---------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out.html"
    with output_file(target, inputs=[], needed=10, mark=b"x", option="--report") as file:
        file.write(b"abc")
        assert not target.exists()
        file.write(b"def")
    assert target.read_bytes() == b"abcdef"
    assert (file.size, file.sha256) == (6, hashlib.sha256(b"abcdef").hexdigest())
    assert os.listdir(target.parent) == ["out.html"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_nothing_behind_and_the_old_file_as_it_was(
    works: Works, error: type[BaseException]
) -> None:
    work, descriptors = works(), len(os.listdir("/proc/self/fd"))
    before = sorted(os.listdir(work))

    def break_off() -> None:
        with output_file(work / "out.html", inputs=[], needed=0, mark=driver.MARK, option="--report") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        break_off()
    assert sorted(os.listdir(work)) == before
    assert found(work) == works.old
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("name", ["a\\b.html", "two\nlines", "--help", "\u202eלא", "a'\"b", "x" * 200])
def test_any_name_is_written_as_it_is(tmp_path: Path, name: str) -> None:
    driver.write(str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("target", ["", "/", "a\0b"])
def test_a_target_without_a_name_is_refused(target: str) -> None:
    error = refused(UsageError, "usage", lambda: driver.write(target))
    assert "--report" in error.hint or "NUL" in error.why or "null" in error.why


# --- what is at the target --------------------------------------------------------------------------------------------


def test_an_earlier_file_of_its_own_kind_is_replaced_without_a_word(tmp_path: Path) -> None:
    driver.write(str(tmp_path / "out.html"))
    driver.write(str(tmp_path / "out.html"), version=2)
    assert found(tmp_path) == driver.content(2)


FOREIGN = {
    "another file": b"precious",
    "an empty file": b"",
    "nearly the mark": driver.MARK[:-1],
    "the mark later": b" " + driver.MARK,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_file_is_replaced_only_with_overwrite(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out.html"
    target.write_bytes(FOREIGN[kind])
    error = refused(WriteFailed, "output-exists", lambda: driver.write(str(target)))
    assert "--overwrite" in error.hint
    assert target.read_bytes() == FOREIGN[kind]
    driver.write(str(target), overwrite=True)
    assert target.read_bytes() == driver.content(1)
    assert os.listdir(tmp_path) == ["out.html"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "link to folder", "fifo", "looping link"])
def test_what_is_not_a_file_is_never_replaced(tmp_path: Path, kind: str, overwrite: bool) -> None:
    target = tmp_path / "out.html"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "link to folder":
        (tmp_path / "folder").mkdir()
        target.symlink_to("folder")
    else:
        target.symlink_to(target)
    before = sorted(os.listdir(tmp_path))
    refused(WriteFailed, "output-exists", lambda: driver.write(str(target), overwrite=overwrite))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("swaps", [True, False], ids=["renameat2", "rename"])
def test_a_file_that_appears_during_the_run_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(syscalls, "_libc", lambda name: None)

    def late() -> None:
        with output_file(tmp_path / "out.html", inputs=[], needed=0, mark=driver.MARK, option="--report"):
            (tmp_path / "out.html").write_bytes(b"precious")

    refused(WriteFailed, "output-exists", late)
    assert found(tmp_path) == b"precious"
    assert os.listdir(tmp_path) == ["out.html"]


def test_not_even_one_that_appears_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []

    def check(target: Path, *_: object) -> bool:
        checks.append(target)
        if len(checks) == 2:  # after the look, before the rename
            target.write_bytes(b"precious")
        return False

    monkeypatch.setattr(atomic, "old_file", check)
    refused(WriteFailed, "output-exists", lambda: driver.write(str(tmp_path / "out.html")))
    assert found(tmp_path) == b"precious"
    assert os.listdir(tmp_path) == ["out.html"]


def test_a_linked_target_is_replaced_behind_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.html").symlink_to("disk/real.html")
    driver.write(str(tmp_path / "out.html"))  # the link dangles: what it names is created
    driver.write(str(tmp_path / "out.html"), version=2)
    assert os.readlink(tmp_path / "out.html") == "disk/real.html"
    assert (tmp_path / "disk/real.html").read_bytes() == driver.content(2)
    assert os.listdir(tmp_path / "disk") == ["real.html"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(works: Works, umask: int) -> None:
    target = works() / "out.html"
    if works.replace:
        target.chmod(0o640)
    before = os.umask(umask)
    try:
        driver.write(str(target), version=2)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == (0o640 if works.replace else 0o666 & ~umask)


def test_what_replaces_a_private_file_is_never_open_to_others(tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    driver.write(str(target))
    target.chmod(0o600)
    with output_file(target, inputs=[], needed=0, mark=driver.MARK, option="--report") as file:
        assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


# --- inputs -----------------------------------------------------------------------------------------------------------

#: (target, input), relative to a folder with ``run/x.pt``, a hard link, a symlink, and a link to the folder.
OVERLAPS = {
    "the file itself": ("run/x.pt", "run/x.pt"),
    "the file with dots": ("run/../run/./x.pt", "run/x.pt"),
    "a symlink of the file": ("soft", "run/x.pt"),
    "the file by its symlink": ("run/x.pt", "soft"),
    "a hard link of the file": ("hard", "run/x.pt"),
    "below the file": ("run/x.pt/out.html", "run/x.pt"),
    "inside the folder": ("run/out.html", "run"),
    "deep inside the folder": ("run/new/out.html", "run"),
    "inside by a symlink": ("folder/out.html", "run"),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_an_input_is_never_touched(tmp_path: Path, case: str) -> None:
    source = tmp_path / "run/x.pt"
    source.parent.mkdir()
    source.write_bytes(driver.MARK)  # even if it looks like an earlier output
    (tmp_path / "soft").symlink_to("run/x.pt")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "folder").symlink_to("run")
    target, given = (str(tmp_path / name) for name in OVERLAPS[case])
    before = sorted(tmp_path.rglob("*"))
    refused(UsageError, "output-is-input", lambda: driver.write(target, inputs=(given,), overwrite=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert source.read_bytes() == driver.MARK


# --- faults -----------------------------------------------------------------------------------------------------------


def test_space_is_checked_before_the_first_byte(tmp_path: Path) -> None:
    def put() -> None:
        with output_file(tmp_path / "out.html", inputs=[], needed=1 << 60, mark=b"x", option="--report"):
            pass

    assert f"({1 << 60} bytes) needed" in refused(WriteFailed, "no-space", put).why
    assert os.listdir(tmp_path) == []


@needs_strace
@pytest.mark.parametrize(
    "always", [(), pytest.param(NO_RENAMEAT2, marks=pytest.mark.slow)], ids=["renameat2", "rename"]
)
def test_a_kill_at_any_call_leaves_the_old_or_the_new_file_and_a_rerun_cleans_up(
    works: Works, always: tuple[str, ...]
) -> None:
    seen = set()

    def check(outcome: Outcome) -> None:
        left = found(outcome.work)
        assert left in (works.old, driver.content(2)), outcome.call
        seen.add(left)
        driver.write(str(outcome.work / "out.html"), version=3)
        assert found(outcome.work) == driver.content(3)
        assert os.listdir(outcome.work) == ["out.html"], outcome.call

    count = sweep(argv(), "signal=KILL", setup=works, check=check, always=always)
    assert count >= 8
    assert seen == {works.old, driver.content(2)}


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.slow)])
def test_a_failing_call_is_exit_6_with_the_old_file_intact_and_nothing_left(works: Works, error: str) -> None:
    def check(outcome: Outcome) -> None:
        if "write(1<" in outcome.call:  # "done" could not be printed
            return
        assert outcome.returncode in (0, 6), outcome.call + outcome.stderr
        slug = json.loads(outcome.stderr)["slug"] if outcome.returncode else ""
        in_place = slug in ("", "durability-unknown")
        assert found(outcome.work) == (driver.content(2) if in_place else works.old), outcome.call
        if slug != "durability-unknown":
            assert [name for name in os.listdir(outcome.work) if name.startswith(".")] == [], outcome.call
        failures.append(outcome.returncode)

    failures: list[int] = []
    calls = ("write", "fsync", "fchmod", "mkdir", "rename", "renameat2")
    sweep(argv(), f"error={error}", setup=works, check=check, calls=calls)
    assert failures.count(6) >= 5


@needs_strace
def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_done(works: Works) -> None:
    work = works()
    outcome = traced(argv(), work, CHANGING_CALLS)
    lines = [line for _, _, line in points(outcome.trace, work)]

    def where(*words: str) -> int:
        hits = [number for number, line in enumerate(lines) if all(word in line for word in words)]
        assert hits, words
        return hits[-1]

    written, synced = where(" write(", ".part/"), where("fsync(", ".part/")
    renamed = where("rename", ".part/", 'out.html"')
    parent, done = where("fsync(", f"/{work.name}>"), where(" write(1<", "done")
    assert written < synced < renamed < parent < done


def test_a_write_that_fails_for_good_names_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    error = refused(WriteFailed, "no-space", lambda: driver.write(str(tmp_path / "out.html")))
    assert "out.html" in error.what
    assert ".part" not in error.what
    assert os.listdir(tmp_path) == []

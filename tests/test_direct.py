"""Writing past the page cache: the same bytes as with it, on any file system, or a clean failure."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import loraconv
from loraconv.errors import CorruptCheckpoint, WriteFailed
from loraconv.io import direct, output_file
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.input_file import InputFile
from tests.cli_support import digests
from tests.faults import needs_strace, traced
from tests.test_fuse import base_state, factors, write_adapter, write_base
from tests.test_fuse_faults import FuseJob

PIECE = 1 << 14


@pytest.fixture(params=["direct", "ordinary"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that a test has many of; once with what the file system at hand says to ``O_DIRECT``, once without."""
    monkeypatch.setattr(direct, "DIRECT_BYTES", PIECE)
    if request.param == "ordinary":
        monkeypatch.setattr(output_file, "_DIRECT", output_file._DIRECT & ~os.O_DIRECT)


def written(folder: Path, pieces: list[bytes | tuple[int, int]], source: Path) -> bytes:
    """A file of pieces of bytes, and of ranges (offset, count) of ``source``."""
    size = sum(len(piece) if isinstance(piece, bytes) else piece[1] for piece in pieces)
    with InputFile(source) as file, output_folder(folder, inputs=[], needed=size) as out:
        with out.file("x", hashed=False) as made:
            made.write_directly(size)
            for piece in pieces:
                if isinstance(piece, bytes):
                    made.write(piece)
                else:
                    seen = b"".join(bytes(part) for part in made.copy_directly(file, *piece))
                    assert seen == file.pread(*piece)
        assert made.size == size
    return (folder / "x").read_bytes()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [0, 1, 4095, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 23 * PIECE + 4097])
def test_every_length_is_written_whole(tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(size + 100))
    data = random.Random(2).randbytes(size)
    assert written(tmp_path / "out", [data], source) == data
    assert written(tmp_path / "copy", [(100, size)], source) == source.read_bytes()[100:]


@pytest.mark.usefixtures("small")
def test_pieces_of_any_length_come_in_their_order(tmp_path: Path) -> None:
    source, dice = tmp_path / "source", random.Random(3)
    source.write_bytes(dice.randbytes(9 * PIECE))
    pieces: list[bytes | tuple[int, int]] = []
    for _ in range(60):
        count = dice.choice([0, 1, 7, 4096, PIECE, dice.randrange(3 * PIECE)])
        pieces.append(dice.randbytes(count) if dice.random() < 0.5 else (dice.randrange(9 * PIECE - count), count))
    whole = source.read_bytes()
    right = b"".join(p if isinstance(p, bytes) else whole[p[0] : p[0] + p[1]] for p in pieces)
    assert written(tmp_path / "out", pieces, source) == right


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["refused", "short"])
def test_what_the_disk_does_not_take_directly_goes_the_ordinary_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A disk of larger blocks answers EINVAL; a write may always be a short one."""
    real, first = os.pwrite, threading.Lock()

    def hindered(descriptor: int, data: Any, offset: int) -> int:
        if len(data) == PIECE and first.acquire(blocking=False):
            if kind == "refused":
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, memoryview(data)[:4096], offset)
        return real(descriptor, data, offset)

    (tmp_path / "source").write_bytes(b"")
    data = random.Random(4).randbytes(7 * PIECE + 5)
    monkeypatch.setattr(os, "pwrite", hindered)
    assert written(tmp_path / "out", [data], tmp_path / "source") == data
    assert first.locked()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("failing", [0, 5, 20, 30])
def test_a_full_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, before = os.pwrite, threading.active_count()

    def full(descriptor: int, data: Any, offset: int) -> int:
        if offset >= failing * PIECE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    (tmp_path / "source").write_bytes(b"")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteFailed) as caught:
        written(tmp_path / "out", [bytes(30 * PIECE + 1)], tmp_path / "source")
    assert caught.value.slug == "no-space"
    assert os.listdir(tmp_path) == ["source"]
    assert threading.active_count() == before


@pytest.mark.usefixtures("small")
def test_an_input_that_becomes_shorter_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(9 * PIECE))

    def shortened() -> None:
        with (
            InputFile(source) as file,
            output_folder(tmp_path / "out", inputs=[], needed=0) as out,
            out.file("x", hashed=False) as made,
        ):
            made.write_directly(9 * PIECE)
            for _ in made.copy_directly(file, 0, 9 * PIECE):
                os.truncate(source, 2 * PIECE)

    with pytest.raises(CorruptCheckpoint) as caught:
        shortened()
    assert caught.value.slug == "input-changed"
    assert os.listdir(tmp_path) == ["source"]


def test_a_file_that_has_no_room_is_refused_before_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2**60 bytes are more than a disk has, or than a file may be long."""
    monkeypatch.setattr(output_file, "_DIRECT", output_file._DIRECT & ~os.O_DIRECT)

    def huge() -> None:
        with output_folder(tmp_path / "out", inputs=[], needed=0) as out, out.file("x", hashed=False) as made:
            made.write_directly(1 << 60)

    with pytest.raises(WriteFailed):
        huge()
    assert os.listdir(tmp_path) == []


def test_the_output_is_the_same_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are fused, copied and cast, in three shards; ``loraconv verify`` sees the base plus the adapter."""
    monkeypatch.setattr(direct, "DIRECT_BYTES", PIECE)
    base = write_base(tmp_path / "base", base_state(torch.bfloat16, 64, 3), 3)
    adapter = write_adapter(tmp_path / "lora", factors(width=64, layers=3))
    found = {}
    for name, can in (("past", True), ("through", False)):
        monkeypatch.setattr(OutputFolder, "can_write_directly", lambda folder, can=can: can)
        for dtype in (None, "fp32"):
            made = loraconv.fuse(adapter, base=base, out=tmp_path / f"{name}-{dtype}", dtype=dtype, prove=False)
            found[name, dtype] = digests(tmp_path / f"{name}-{dtype}"), made.crc32
            assert loraconv.verify(adapter, tmp_path / f"{name}-{dtype}", base=base, dtype=dtype).same
    assert found["past", None] == found["through", None]
    assert found["past", "fp32"] == found["through", "fp32"]


@pytest.mark.parametrize("kind", ["input", "direct"])
def test_an_interrupt_right_after_a_descriptor_is_closed_does_not_close_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its number may belong to another file by then."""
    path, real = tmp_path / "x", os.close
    path.write_bytes(b"")
    descriptor = os.open(path, os.O_WRONLY)
    file = InputFile(path) if kind == "input" else direct.DirectWriter(descriptor, -1)
    closed: list[int] = []

    def interrupted(number: int) -> None:
        real(number)
        closed.append(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.close()
    file.close()
    assert len(closed) == 1


@needs_strace
@pytest.mark.parametrize("action", ["error=ENOSPC", "error=EIO", "signal=KILL"])
@pytest.mark.parametrize("when", [1, pytest.param(2, marks=pytest.mark.slow)])  # no thread has more pieces of a file
def test_a_fault_in_a_thread_that_writes_leaves_no_output(tmp_path: Path, action: str, when: int) -> None:
    job = FuseJob(tmp_path, "new", direct=True)
    run = traced(job.argv, job(), ["pwrite64"], "-e", f"inject=pwrite64:{action}:when={when}")
    assert any(word in line for word in ("(INJECTED)", "killed by") for line in run.trace)
    assert job.state(run.work) == "none"
    assert run.returncode == (6 if "error" in action else -9)
    again = job.run(run.work)
    assert again.returncode == 0, again.stderr
    assert job.state(run.work) == "new"
    assert os.listdir(run.work) == ["out"]

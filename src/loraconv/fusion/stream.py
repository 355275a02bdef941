"""The writing of a fused model: threads compute blocks of rows ahead, the caller's copies and writes in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from loraconv.fusion.changes import Changes, Plain, block_of, gather
from loraconv.fusion.merging import BLOCK, Term, as_matrix, blocks, cast_rows
from loraconv.fusion.shards import Entry, Shard
from loraconv.health import compare_crc
from loraconv.io.atomic import OutputFolder
from loraconv.io.crc import combine, crc32
from loraconv.io.output_file import OutputFile
from loraconv.io.safetensors_write import header_of
from loraconv.lazy import TensorRef, nbytes, whole
from loraconv.names import DTYPE_BYTES, numel
from loraconv.ordered import in_order, workers

#: Logs ``done`` and ``total`` bytes as its only argument, for whoever wants to show them.
PROGRESS = logging.getLogger("loraconv.fusion")
#: Blocks that may wait to be written: enough that no thread waits for work while a long range is copied.
_AHEAD = 32
_COPY_BYTES = 32 << 20


@dataclass(slots=True)
class Written:
    """The files of a fused model by name, and checksums (eight hexadecimal digits): ``crc32`` of every tensor as it is
    written, ``base_crc32`` of those that were fused as they were."""

    files: dict[str, OutputFile] = field(default_factory=dict)
    crc32: dict[str, str] = field(default_factory=dict)
    base_crc32: dict[str, str] = field(default_factory=dict)

    def add(self, entries: Iterable[Entry], crc32: Mapping[str, str]) -> None:
        """Add the checksums (by the base's names) of those entries that are copied.

        Raises :class:`CorruptCheckpoint` where the base's file declares another one."""
        for entry in (entry for entry in entries if entry.copied):
            _check(entry.base, int(crc32[entry.key], 16))
            self.crc32[entry.called] = crc32[entry.key]


@dataclass(slots=True)
class Progress:
    """Bytes that are done, of all."""

    total: int
    done: int = 0

    def add(self, count: int) -> None:
        self.done += count
        PROGRESS.info("%s", {"done": self.done, "total": self.total})


def write_shards(
    folder: OutputFolder,
    place: str,
    shards: Sequence[Shard],
    terms: Mapping[str, Sequence[Term]],
    progress: Progress,
    *,
    proved: bool,
    cached: bool,
) -> Written:
    """Write every shard below ``place`` (empty, or a folder's name with a slash) of the output. What is ``proved``
    next gets the checksums of its copied tensors from there, see :meth:`Written.add`; ``cached`` leaves the shards in
    the page cache for whoever reads them next."""
    written = Written()
    cached = cached or proved or not folder.can_write_directly()
    copied = [entry for shard in shards for entry in shard.entries if entry.copied and cached and not proved]
    with _ending(workers()) as pool, _ending(ThreadPoolExecutor(1)) as beside:
        sums = {entry.key: beside.submit(_checksum, entry.base) for entry in copied}
        made = in_order(pool, _blocks(pool, shards, terms), _AHEAD)
        for shard in shards:
            with folder.file(place + shard.name, hashed=False) as file:
                header = header_of([(entry.called, entry.stored) for entry in shard.entries], shard.metadata)
                if not cached:
                    file.write_directly(len(header) + shard.bytes)
                file.write(header)
                for run in shard.runs():
                    if run[0].copied and cached:
                        _copy(file, run, progress)
                    elif run[0].copied:
                        _copy_directly(file, run, written, progress)
                    else:
                        _write(file, run[0], made, written, progress)
            written.files[place + shard.name] = file
        written.add(copied, {key: future.result() for key, future in sums.items()})
    return written


def _check(ref: TensorRef, crc: int) -> None:
    """Raise :class:`CorruptCheckpoint` where a torch file declares another CRC-32 for what a tensor has to itself."""
    if ref.storage == (ref.offset, nbytes(ref)):
        compare_crc(ref, crc)


@contextmanager
def _ending(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Threads that are given nothing more to do when the block is left, be it by an exception."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


#: The bytes of a block, their CRC-32, and that of the base's bytes.
Block = tuple[bytes | memoryview, int, int]


def _blocks(
    pool: ThreadPoolExecutor, shards: Sequence[Shard], terms: Mapping[str, Sequence[Term]]
) -> Iterator[Callable[[], Block]]:
    """What makes each block of each tensor that is not copied, in the order of the bytes."""
    for entry in (entry for shard in shards for entry in shard.entries if not entry.copied):
        ref = as_matrix(entry.base)
        if entry.fused:
            # Handed out before the blocks that wait for it, so that some thread is at work on it already.
            added = pool.submit(gather, terms[entry.key])
            size = block_of(terms[entry.key])
            yield from (partial(_merged, ref, added, rows, entry.dtype) for rows in blocks(ref.shape, size))
        else:
            flat = replace(ref, shape=(numel(ref.shape),))
            steps = range(0, flat.shape[0], BLOCK)
            yield from (partial(_cast, flat.rows(at, min(at + BLOCK, flat.shape[0])), entry.dtype) for at in steps)


def _merged(ref: TensorRef, added: Future[Plain | Changes], rows: tuple[int, int], dtype: str) -> Block:
    part = ref.rows(*rows)
    raw = whole(part)
    made = added.result().merged(raw, part, slice(*rows), dtype)
    return made, crc32(made), crc32(raw)


def _cast(part: TensorRef, dtype: str) -> Block:
    raw = whole(part)
    made = cast_rows(raw, part, dtype)
    return made, crc32(made), crc32(raw)


def _checksum(ref: TensorRef) -> str:
    crc = 0
    for piece in ref.pieces():
        crc = crc32(piece, crc)
    return f"{crc:08x}"


def _copy(file: OutputFile, run: Sequence[Entry], progress: Progress) -> None:
    """Copy a range of the base, inside the kernel where it can."""
    first, count = run[0].base, sum(nbytes(entry.base) for entry in run)
    for start in range(0, count, _COPY_BYTES):
        size = min(_COPY_BYTES, count - start)
        file.copy(first.file, first.offset + start, size)
        progress.add(size)


def _copy_directly(file: OutputFile, run: Sequence[Entry], written: Written, progress: Progress) -> None:
    """Copy tensors of the base past the page cache; each byte is read once."""
    for entry in run:
        crc = 0
        for piece in file.copy_directly(entry.base.file, entry.base.offset, nbytes(entry.base)):
            crc = crc32(piece, crc)
            progress.add(len(piece))
        _check(entry.base, crc)
        written.crc32[entry.called] = f"{crc:08x}"


def _write(file: OutputFile, entry: Entry, made: Iterator[Block], written: Written, progress: Progress) -> None:
    """Write one computed tensor."""
    end = file.size + numel(entry.base.shape) * DTYPE_BYTES[entry.dtype]
    crc = base_crc = 0
    while file.size < end:
        data, more, base_more = next(made)
        file.write(data)
        crc = combine(crc, more, len(data))
        base_crc = combine(base_crc, base_more, len(data) // DTYPE_BYTES[entry.dtype] * DTYPE_BYTES[entry.base.dtype])
        progress.add(len(data))
    _check(entry.base, base_crc)
    if entry.more:
        zeros = bytes(nbytes(entry.stored) - numel(entry.base.shape) * DTYPE_BYTES[entry.dtype])
        file.write(zeros)
        crc = crc32(zeros, crc)
        progress.add(len(zeros))
    written.crc32[entry.called] = f"{crc:08x}"
    if entry.fused:
        written.base_crc32[entry.key] = f"{base_crc:08x}"

"""A journal read as any foreign file is: no length is believed before it is checked, and nothing that comes out of it
is called a base before its checksum says so.

Its parts stand in the order in which they are made, so that it is written as a stream in little memory:

    magic, codes of the changed tensors, headers, texts, contents (JSON), SHA-256 and size of the contents, magic
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from loraconv.errors import CorruptCheckpoint
from loraconv.io.crc import crc32
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import parse_json
from loraconv.io.target import MANIFEST, MANIFEST_LIMIT
from loraconv.journal.ulps import DTYPES, BadCode, Factors, chunks, decode, grid, unpack_factors
from loraconv.lazy import TensorRef
from loraconv.names import DTYPE_BYTES, printable
from loraconv.ordered import in_order

MAGIC = b"loraconv journal 1\n"

_TAIL = 32 + 8 + len(MAGIC)


@dataclass(frozen=True, slots=True)
class Blob:
    """A run of bytes of the journal."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file of the base with weights: its header, and its tensors in the order of their bytes."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...]
    header: Blob


@dataclass(frozen=True, slots=True)
class Text:
    """A small file of the base: config.json or the index."""

    name: str
    sha256: str
    content: Blob


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that was fused; ``fused`` is the CRC-32 that it then had. With rank 0 nothing is predicted."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    fused: str
    rank: int
    exponent: int
    factors: Blob
    codes: tuple[Blob, ...]


@dataclass(frozen=True, slots=True)
class Journal:
    """An opened journal; ``crc32`` is that of every tensor of the base."""

    file: InputFile
    files: tuple[BaseFile, ...]
    texts: tuple[Text, ...]
    changes: dict[str, Change]
    crc32: dict[str, str]

    def read(self, blob: Blob, limit: int) -> bytes:
        """The bytes of a blob; raises :class:`CorruptCheckpoint` where there are more than ``limit``."""
        if blob.size > limit:
            raise damaged(self.file, f"{blob.size} bytes where at most {limit} can be")
        return self.file.pread(blob.offset, blob.size)


def read_rows(ref: TensorRef, rows: tuple[int, int]) -> bytes:
    """The bytes of some rows of a tensor, as :func:`loraconv.journal.ulps.grid` sees it."""
    size = grid(ref.shape)[1] * DTYPE_BYTES[ref.dtype]
    return ref.file.pread(ref.offset + rows[0] * size, (rows[1] - rows[0]) * size)


def restored(
    journal: Journal, fused: Mapping[str, TensorRef], names: Sequence[str], pool: ThreadPoolExecutor
) -> Iterator[bytes]:
    """The base's bytes of the changed tensors ``names``, one after the other, in as many pieces as there are ``codes``.

    ``fused`` are the tensors on disk by name. Raises :class:`CorruptCheckpoint`.
    """

    def jobs() -> Iterator[Callable[[], bytes]]:
        for name in names:
            change, ref = journal.changes[name], fused[name]
            parts = chunks(ref.shape)
            if (ref.dtype, ref.shape, len(parts)) != (change.dtype, change.shape, len(change.codes)):
                raise BadCode(f"{printable(name)} has another shape")
            factors = _factors(journal, change)
            for rows, blob in zip(parts, change.codes, strict=True):
                yield partial(_decoded, journal, ref, factors, rows, blob)

    try:
        made = in_order(pool, jobs())
        for name in names:
            crc, count = 0, len(journal.changes[name].codes)
            for number in range(1, count + 1):
                piece = next(made)
                crc = crc32(piece, crc)
                if number == count and f"{crc:08x}" != journal.crc32[name]:
                    raise BadCode(f"other numbers than the base's come out for {printable(name)}")
                yield piece
    except BadCode as error:
        raise damaged(journal.file, str(error)) from None


def _factors(journal: Journal, change: Change) -> Factors | None:
    if change.dtype not in DTYPES:
        raise BadCode(f"{printable(change.name)} is {printable(change.dtype)}")
    if not change.rank:
        return None
    limit = 5 * change.rank * sum(grid(change.shape)) + 1024
    return unpack_factors(journal.read(change.factors, limit), change.shape, change.rank, change.exponent)


def _decoded(journal: Journal, ref: TensorRef, factors: Factors | None, rows: tuple[int, int], blob: Blob) -> bytes:
    fused = read_rows(ref, rows)
    return decode(journal.read(blob, 2 * len(fused) + 1024), fused, ref.dtype, factors, rows)


def read_journal(file: InputFile) -> Journal:
    """Read and check the list of contents; raises :class:`CorruptCheckpoint` (``journal-damaged``)."""
    contents, end = _contents(file)
    try:
        journal, at = _parsed(file, contents)
        if at != end:
            raise ValueError(f"the parts end at byte {at}, the list of contents begins at {end}")
        _check_names(journal)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(file, f"its list of contents is malformed: {error}") from None
    return journal


def _contents(file: InputFile) -> tuple[Any, int]:
    """The list of contents, and where it begins."""
    begin = file.size - _TAIL
    if begin < len(MAGIC) or file.pread(0, len(MAGIC)) != MAGIC:
        raise damaged(file, "it does not begin as a journal does")
    tail = file.pread(begin, _TAIL)
    if not tail.endswith(MAGIC):
        raise damaged(file, "it does not end as a journal does")
    size = int.from_bytes(tail[32:40], "little")
    if size > min(begin - len(MAGIC), MANIFEST_LIMIT):
        raise damaged(file, f"a list of contents of {size} bytes")
    raw = file.pread(begin - size, size)
    if hashlib.sha256(raw).digest() != tail[:32]:
        raise damaged(file, "its list of contents is not what was written (SHA-256)")
    return parse_json(raw.decode("utf-8", "replace"), file.shown), begin - size


def _parsed(file: InputFile, contents: Any) -> tuple[Journal, int]:
    """The list of contents in our terms, and where its last part ends."""
    at = len(MAGIC)

    def blob(size: Any) -> Blob:
        nonlocal at
        at += _natural(size)
        return Blob(at - size, size)

    def blobs(sizes: Any) -> tuple[Blob, ...]:
        return tuple(blob(size) for size in sizes)

    # The parts are counted through, so the order is that of the file.
    changes = {
        _word(c["name"]): Change(
            c["name"], _word(c["dtype"]), tuple(map(_natural, c["shape"])), _word(c["fused"]),
            _natural(c["rank"]), _whole(c["exponent"]), blob(c["factors"]), blobs(c["codes"]),
        )
        for c in contents["changes"]
    }  # fmt: skip
    files = tuple(
        BaseFile(_word(f["name"]), _natural(f["bytes"]), _word(f["sha256"]), _words(f["tensors"]), blob(f["header"]))
        for f in contents["files"]
    )
    texts = tuple(Text(_word(t["name"]), _word(t["sha256"]), blob(t["content"])) for t in contents["texts"])
    crc32 = {name: _word(crc) for name, crc in contents["crc32"].items()}
    return Journal(file, files, texts, changes, crc32), at


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{type(value).__name__} instead of a number")
    return value


def _natural(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError("a negative number")
    return int(value)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} instead of a text")
    return value


def _words(values: Any) -> tuple[str, ...]:
    return tuple(map(_word, values))


def _check_names(journal: Journal) -> None:
    """Names of files must be plain and differ; the tensors must be those of the files, each once."""
    names = [*(file.name for file in journal.files), *(text.name for text in journal.texts)]
    plain = all(name not in ("", ".", "..") and not set("/\\\0") & set(name) for name in names)
    if not plain or len({name.casefold() for name in (*names, MANIFEST)}) != len(names) + 1:
        raise ValueError("names that are not those of the files of one folder")
    tensors = [name for file in journal.files for name in file.tensors]
    if sorted(tensors) != sorted(journal.crc32) or not set(journal.changes) <= set(tensors):
        raise ValueError("tensors that belong to no file")


def damaged(file: InputFile, why: str) -> CorruptCheckpoint:
    """The error of a journal that cannot be used any more."""
    return CorruptCheckpoint(
        f"the journal is damaged: {file.shown}",
        why=why,
        hint="copy it again from where it was written; without it the base cannot be restored",
        slug="journal-damaged",
    )

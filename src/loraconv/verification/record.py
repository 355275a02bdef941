"""A converted folder or file against the ``loraconv.json`` beside it: has a byte changed since it was written?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.crc import crc32
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.sidecar import parse_json
from loraconv.io.target import MANIFEST, MANIFEST_LIMIT
from loraconv.lazy import PIECE_BYTES
from loraconv.names import printable, quoted
from loraconv.verification.result import VerifyResult


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file of a converted folder against its record: what differs, empty if nothing does."""

    name: str
    difference: str


@dataclass(frozen=True, slots=True)
class RecordResult(VerifyResult):
    """The files of ``subject`` that ``record`` lists."""

    mode: ClassVar[str] = "record"

    subject: str = ""
    record: str = ""
    files: tuple[FileResult, ...] = ()

    def details(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "record": self.record,
            "files": [{"name": f.name, "difference": f.difference} for f in self.files],
        }


def verify_record(path: Path) -> RecordResult:
    """Compare every file that the record lists (``path`` is a folder), or the one that ``path`` is.

    Raises :class:`FormatError` (``not-comparable``) where there is no record, and :class:`CorruptCheckpoint`.
    """
    folder = path if path.is_dir() else path.parent
    manifest = _manifest(folder)
    crc32 = {str(k): str(v) for k, v in manifest.get("crc32", {}).items()}
    results = []
    for entry in manifest["files"]:
        if path.is_dir() or folder / str(entry["name"]) == path:
            results.append(FileResult(str(entry["name"]), _difference(folder, entry, crc32)))
    if not results:
        raise FormatError(
            f"{printable(str(path))} is not in the record beside it",
            where=printable(str(folder / MANIFEST)),
            hint=f"loraconv verify {quoted(folder)}",
            slug="not-comparable",
        )
    same = not any(r.difference for r in results)
    return RecordResult(same, subject=str(path), record=str(folder / MANIFEST), files=tuple(results))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(
            f"there is no {MANIFEST} in {printable(str(folder))}, so there is nothing to compare with",
            why="only what loraconv converted has one",
            hint=f"loraconv verify {quoted(folder)} OTHER",
            slug="not-comparable",
        )
    with InputFile(path) as file:
        if file.size > MANIFEST_LIMIT:
            raise CorruptCheckpoint(f"{file.shown} is far too large", slug="record")
        value = parse_json(file.pread(0, file.size).decode("utf-8", "replace"), file.shown)
    names = value.get("files") if isinstance(value, dict) else None
    plain = isinstance(names, list) and all(isinstance(e, dict) and _is_plain(e.get("name")) for e in names)
    if not plain or not isinstance(value.get("crc32", {}), dict):
        raise CorruptCheckpoint(
            f"{printable(str(path))} is not the record of a conversion",
            hint="convert the checkpoint again",
            slug="record",
        )
    return dict(value)


def _is_plain(name: Any) -> bool:
    """True for a relative name that stays in its folder."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    return not {"", ".", ".."} & set(name.split("/"))


def _difference(folder: Path, entry: dict[str, Any], crc32: dict[str, str]) -> str:
    """How a file differs from its record; empty if it does not."""
    try:
        file = InputFile(folder / entry["name"])
    except UsageError as error:
        return error.what
    with file:
        if file.size != entry.get("bytes"):
            return f"{file.size} bytes, the record says {entry.get('bytes')}"
        if entry.get("linked") is True:  # a link to a file of somebody else, of which no checksum was taken
            return ""
        if entry.get("sha256") is not None:
            digest = hashlib.sha256()
            for piece in _pieces(file):
                digest.update(piece)
            return "" if digest.hexdigest() == entry["sha256"] else "other bytes than were written (SHA-256)"
        try:
            tensors = read_safetensors(file).tensors
        except (CorruptCheckpoint, FormatError) as error:
            return f"{error.what}: {error.why}"
        wrong = [name for name, ref in tensors.items() if f"{_crc(ref):08x}" != crc32.get(name)]
        return f"other bytes than were written in {len(wrong)} tensors, first {printable(wrong[0])}" if wrong else ""


def _pieces(file: InputFile) -> Iterator[bytes]:
    for offset in range(0, file.size, PIECE_BYTES):
        yield file.pread(offset, min(PIECE_BYTES, file.size - offset))


def _crc(ref: Any) -> int:
    crc = 0
    for piece in ref.pieces():
        crc = crc32(piece, crc)
    return crc

"""Prove that two checkpoints are the same adapter, or that a converted one is still what its own proof says.

Two adapters, in whatever formats, are compared module by module by the formats' own definitions (``verifier/``); where
they differ, the result says in which way. One checkpoint alone is compared with the ``loraconv.json`` beside it.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraconv.adapter import natural
from loraconv.detect import Detected, detect
from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.sidecar import parse_json
from loraconv.io.target import MANIFEST, MANIFEST_LIMIT
from loraconv.lazy import PIECE_BYTES
from loraconv.names import printable, quoted
from loraconv.scale import given_alpha
from loraconv.source import Source, open_source
from loraconv.verifier.delta import ModuleResult, compare_adapters
from loraconv.verifier.diagnosis import Finding, diagnose
from loraconv.verifier.numbers import Pair
from loraconv.verifier.oracles import pairs_of


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file of a converted folder against its record: what differs, empty if nothing does."""

    name: str
    difference: str


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verdict, and everything it rests on. ``modules`` is empty where files were compared with their record."""

    one: str
    other: str
    same: bool
    modules: tuple[ModuleResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    files: tuple[FileResult, ...] = ()
    bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1); an error or norm that is infinite or no number is null."""
        return {
            "schema": 1,
            "one": self.one,
            "other": self.other,
            "same": self.same,
            "bound": self.bound,
            "modules": [
                {
                    "module": m.module,
                    "equal": m.equal,
                    "error": _number(m.error),
                    "bound": _number(m.bound),
                    "norm": _number(m.norm),
                    "same": m.same,
                }
                for m in self.modules
            ],
            "findings": [
                {"slug": f.slug, "sentence": f.sentence, "mend": f.mend, "modules": list(f.modules)}
                for f in self.findings
            ],
            "files": [{"name": f.name, "difference": f.difference} for f in self.files],
        }


def _number(value: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def verify(
    one: str | Path, other: str | Path | None = None, *, alpha: float | None = None, bound: float | None = None
) -> VerifyResult:
    """Compare two adapters, or, with one path alone, a converted folder or file with the record beside it.

    ``alpha`` is that of ``one`` where its files do not say it; ``bound`` replaces the relative error that the dtypes
    allow. Raises :class:`FormatError` where the two cannot be compared, and what opening them raises.
    """
    if bound is not None and not bound >= 0:
        raise UsageError(f"--bound must not be negative, and is {bound}", hint="--bound 1e-6")
    if other is None:
        if alpha is not None or bound is not None:
            raise UsageError("--alpha and --bound need two checkpoints", hint="loraconv verify A B")
        return _against_record(Path(one))
    with open_source(one) as first, open_source(other) as second:
        left, right = _pairs(first, alpha), _pairs(second, None)
        results = compare_adapters(left, right, bound)
        same = set(left) == set(right) and all(r.same for r in results)
        findings = [] if same else diagnose(left, right, results)
        for source in (first, second):
            source.check_unchanged()
        return VerifyResult(str(one), str(other), same, tuple(results), tuple(findings), bound=bound)


def _pairs(source: Source, alpha: float | None) -> dict[str, Pair]:
    """The adapter in a source by its format's own definition."""
    detected = detect(source)
    _refuse(source, detected)
    pairs = pairs_of(detected.dialect.name, list(source.ranks), source.metadata, source.config, given_alpha(alpha))
    return dict(sorted(pairs.items(), key=lambda item: natural(item[0])))


def _refuse(source: Source, detected: Detected) -> None:
    if not detected.has_factors or source.incomplete:
        raise FormatError(
            f"{printable(str(source.path))} holds no whole adapter, so it cannot be compared as one",
            why=detected.reason,
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="not-comparable",
        )


# ---------------------------------------------------------------------------------------------------------------------
# one checkpoint against the record of its own conversion


def _against_record(path: Path) -> VerifyResult:
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
    return VerifyResult(str(path), str(folder / MANIFEST), not any(r.difference for r in results), files=tuple(results))


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
        crc = zlib.crc32(piece, crc)
    return crc

"""Turn a fused model back into its base, bit for bit, from the journal that was written when it was fused.

Before a byte is written, the fused tensors must still be those of the journal (CRC-32). Before anything is in place,
every restored file must have the SHA-256 of the base's. The folder then holds the base's own files, no byte different,
and beside them ``loraconv.json``, the record that every output of loraconv has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraconv import __version__
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.crc import crc32
from loraconv.io.digest import Digest
from loraconv.io.growing import GrowingFile
from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile
from loraconv.io.safetensors_read import MAX_HEADER
from loraconv.io.sidecar import parse_json, read_text
from loraconv.io.target import JOURNAL, MANIFEST, MANIFEST_LIMIT
from loraconv.journal.read import BaseFile, Journal, damaged, read_journal, restored
from loraconv.lazy import PIECE_BYTES, TensorRef, nbytes
from loraconv.model_folder import Model, open_model
from loraconv.names import fold_names, printable, quoted
from loraconv.ordered import in_order, workers

#: Logs ``done`` and ``total`` bytes as its only argument, for whoever wants to show them.
PROGRESS = logging.getLogger("loraconv.unfusing")


@dataclass(frozen=True, slots=True)
class UnfusedFile:
    """A file of the output: its name in the folder, size in bytes, SHA-256 (None: a link, or not written yet)."""

    name: str
    bytes: int
    sha256: str | None = None
    linked: bool = False


@dataclass(frozen=True, slots=True)
class UnfuseResult:
    """What was restored, or, with ``dry_run``, would be: the base's files, and how many of its tensors had been fused.

    ``files`` are those that come out of the journal, ``kept`` those that fusing had left as they were.
    """

    fused: Path
    out: Path
    files: tuple[UnfusedFile, ...]
    kept: tuple[UnfusedFile, ...]
    tensors: int
    restored: int
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "kind": "unfused",
            "fused": str(self.fused),
            "out": str(self.out),
            "dry_run": self.dry_run,
            "tensors": self.tensors,
            "restored": self.restored,
            "files": [asdict(file) for file in (*self.files, *self.kept)],
        }


def unfuse(fused: str | Path, *, out: str | Path, overwrite: bool = False, dry_run: bool = False) -> UnfuseResult:
    """Restore the base of ``fused``, a folder that ``fuse`` wrote with a journal, into the new folder ``out``.

    The weight files, the index and config.json are those of the base, byte for byte and with the base's own shards.
    Everything else in the folder, or in the pipeline around it, is copied, and linked where it is a link.
    ``loraconv.json`` beside it is the record of this command. ``overwrite`` replaces an earlier output of loraconv;
    ``dry_run`` checks and writes nothing.

    Raises what :func:`loraconv.model_folder.open_model` raises, :class:`FormatError` (``no-journal``,
    ``journal-foreign``: another model's), :class:`CorruptCheckpoint` (``fused-changed``: since it was fused;
    ``journal-damaged``), and :class:`WriteFailed`. On all of them ``out`` is as it was, except a WriteFailed of the
    slugs ``durability-unknown`` and ``old-remains``.
    """
    with open_model(fused) as model, _open_journal(model) as journal, workers() as pool:
        _match(model, journal)
        _refuse_changed(model, journal, pool)
        _refuse_changed_files(journal.file.path.parent)
        files = _files(model, journal)
        kept = tuple(_kept(model, {file.name for file in files}))
        counts = len(journal.crc32), len(journal.changes)
        result = UnfuseResult(Path(fused), Path(out), files, kept, *counts, dry_run=dry_run)
        if dry_run:
            return result
        needed = sum(file.bytes for file in (*files, *result.kept)) + (1 << 20)
        inputs = [_root(model), *(file.path for file in model.files.values())]
        with output_folder(out, inputs=inputs, needed=needed, overwrite=overwrite) as folder:
            _restore(folder, model, journal, pool)
            result = replace(result, kept=tuple(_keep(folder, _root(model) / file.name, file) for file in kept))
            model.check_unchanged()
            journal.file.check_unchanged()
            _write(folder, MANIFEST, _manifest(result))
        return result


@contextmanager
def _open_journal(model: Model) -> Iterator[Journal]:
    # A pipeline's stands beside its record, or, where its transformer was fused in place, there: that one is the later.
    places = [place for place in (model.folder, model.pipeline) if place and os.path.lexists(place / JOURNAL)]
    if not places:
        raise _no_journal(_root(model))
    with InputFile(places[0] / JOURNAL) as file:
        yield read_journal(file)


def _root(model: Model) -> Path:
    return model.pipeline or model.folder


def _no_journal(folder: Path) -> FormatError:
    what, why, hint = "loraconv did not fuse this model", f"it has no {JOURNAL}", f"loraconv inspect {quoted(folder)}"
    kind = _kind(folder)
    if kind == "fused":
        what, why = "this model was fused without a journal", "fuse writes one with --journal, and with --in-place"
        hint = "take the base that it was made from; it is as it was"
    elif kind == "unfused":
        what, why = "this model is unfused already", f"its {MANIFEST} says so"
    where = printable(str(folder), 1000)
    return FormatError(f"nothing to unfuse: {what}", where=where, why=why, hint=hint, slug="no-journal")


def _kind(folder: Path) -> Any:
    """What the record beside a model says it is, as far as there is one."""
    with suppress(LoraconvError, AttributeError):
        return parse_json(read_text(folder / MANIFEST, MANIFEST_LIMIT), MANIFEST).get("kind")
    return None


def _kept(model: Model, made: Collection[str]) -> Iterator[UnfusedFile]:
    """Everything in the model's folder, or in the pipeline around it, that is neither fused nor in the journal."""
    root, place = _root(model), model.place
    ours = {*model.files, MANIFEST, JOURNAL, *([model.index] if model.index else [])}
    for path in [] if model.single else sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        linked = path.is_symlink()
        if name in made or name.removeprefix(place) in ours or (path.is_dir() and not linked):
            continue
        if "\\" in name:
            raise FormatError(
                f"a file whose name no other system knows: {printable(str(path), 1000)}",
                hint=f"it is not the model's; move it away: mv {quoted(path)} ELSEWHERE",
                slug="name",
            )
        yield UnfusedFile(name, 0 if linked else path.stat().st_size, linked=linked)


def _keep(folder: OutputFolder, path: Path, file: UnfusedFile) -> UnfusedFile:
    """Copy a file, or link what a link leads to."""
    if file.linked:
        folder.link(file.name, path)
        return file
    with InputFile(path) as source:
        with folder.file(file.name) as out:
            out.copy(source, 0, source.size)
        sha256 = out.sha256
        source.check_unchanged()
    return UnfusedFile(file.name, out.size, sha256)


def _match(model: Model, journal: Journal) -> None:
    """Raise :class:`FormatError` unless the model has the tensors of the journal."""
    other = sorted(set(model.tensors) ^ set(journal.crc32))
    other += [
        name
        for name, change in journal.changes.items()
        if name in model.tensors and (change.dtype, change.shape) != _form(model.tensors[name])
    ]
    if other:
        raise FormatError(
            f"the journal belongs to another model: {journal.file.shown}",
            where="; ".join(fold_names(other)[:4]),
            why="names, shapes or dtypes of the tensors are not those of the model beside it",
            hint="put the journal back that was written with this model",
            slug="journal-foreign",
        )


def _form(ref: TensorRef) -> tuple[str, tuple[int, ...]]:
    return ref.dtype, ref.shape


def _refuse_changed(model: Model, journal: Journal, pool: ThreadPoolExecutor) -> None:
    """Raise :class:`CorruptCheckpoint` unless the fused tensors are as they were when the journal was written."""
    changes = journal.changes.values()
    now = in_order(pool, [partial(_crc, model.tensors[change.name]) for change in changes])
    changed = [change.name for change, crc in zip(changes, now, strict=True) if change.fused != crc]
    if changed:
        raise _changed(model, changed, len(journal.changes))


def _refuse_changed_files(root: Path) -> None:
    """Raise :class:`CorruptCheckpoint` unless the files beside the weights are those that the record of the fusion, as
    far as there is one beside the journal, tells with their SHA-256. A file that is new since is not in it."""
    told: Any = None
    with suppress(LoraconvError, KeyError, TypeError):
        told = parse_json(read_text(root / MANIFEST, MANIFEST_LIMIT), MANIFEST)["files"]
    known = (
        [(one.get("name"), one.get("sha256")) for one in told if isinstance(one, dict)]
        if isinstance(told, list)
        else []
    )
    texts = [(str(name), sha256) for name, sha256 in known if sha256 and name != JOURNAL]
    changed = [name for name, sha256 in texts if _sha256(root, name) != sha256]
    if changed:
        raise CorruptCheckpoint(
            f"the folder was changed since the model was fused: {printable(str(root), 1000)}",
            where="; ".join(printable(name) for name in changed[:4]),
            why="these files are gone, or have other bytes than the record says (SHA-256): they are not the base's",
            hint=f"put them back; to see all that changed: loraconv verify {quoted(root)}",
            slug="fused-changed",
        )


def _sha256(root: Path, name: str) -> str:
    """The digest of a file of the folder, empty where it is not there."""
    if name.startswith("/") or {"..", ""} & set(name.split("/")) or not (root / name).is_file():
        return ""
    with InputFile(root / name) as file:
        digest = Digest()
        digest.update_from(file, 0, file.size)
        return digest.finish()


def _crc(ref: TensorRef) -> str:
    crc = 0
    for piece in ref.pieces():
        crc = crc32(piece, crc)
    return f"{crc:08x}"


def _changed(model: Model, names: Sequence[str], count: int) -> CorruptCheckpoint:
    why = f"{len(names)} of {count} tensors have other bytes than the journal's checksums (CRC-32) say"
    if len(names) == count:
        why += ": this may be another model's journal, or something was fused into it again"
    return CorruptCheckpoint(
        f"the model was changed since its journal was written: {printable(str(model.path), 1000)}",
        where="; ".join(fold_names(names)[:4]),
        why=why,
        hint=f"see which files are not as they were written: loraconv verify {quoted(_root(model))}",
        slug="fused-changed",
    )


def _files(model: Model, journal: Journal) -> tuple[UnfusedFile, ...]:
    """The files that come out of the journal."""
    weights = [(file.name, file.bytes, file.sha256) for file in journal.files]
    texts = [(text.name, text.content.size, text.sha256) for text in journal.texts]
    return tuple(UnfusedFile(model.place + name, size, sha256) for name, size, sha256 in (*weights, *texts))


def _restore(folder: OutputFolder, model: Model, journal: Journal, pool: ThreadPoolExecutor) -> None:
    """Write every file of the base; raises :class:`CorruptCheckpoint` where one comes out different."""
    order = [name for file in journal.files for name in file.tensors if name in journal.changes]
    pieces = restored(journal, model.tensors, order, pool)
    for file in journal.files:
        size = file.header.size + sum(nbytes(model.tensors[name]) for name in file.tensors)
        if size != file.bytes:
            raise damaged(journal.file, f"{printable(file.name)} would have {size} bytes, not {file.bytes}")
        with ThreadPoolExecutor(1) as beside, folder.file(model.place + file.name, hashed=False) as out:
            out.reserve(file.bytes)
            try:
                digest = beside.submit(_digest, out)
                _write_weights(out, model, journal, file, pieces)
            except BaseException:
                out.abandon()  # or the digest would wait for its bytes for ever
                raise
        if digest.result() != file.sha256:
            raise _different(model, journal, file)
    for text in journal.texts:
        raw = journal.read(text.content, MANIFEST_LIMIT)
        if hashlib.sha256(raw).hexdigest() != text.sha256:
            raise damaged(journal.file, f"{printable(text.name)} does not come out as it was (SHA-256)")
        _write(folder, model.place + text.name, raw)


def _write_weights(out: OutputFile, model: Model, journal: Journal, file: BaseFile, pieces: Iterator[bytes]) -> None:
    out.write(journal.read(file.header, MAX_HEADER + 8))
    total = sum(file.bytes for file in journal.files)
    before = sum(other.bytes for other in journal.files[: journal.files.index(file)])
    for name in file.tensors:
        ref, change = model.tensors[name], journal.changes.get(name)
        if change is None:
            out.copy(ref.file, ref.offset, nbytes(ref))
        else:
            for _ in change.codes:
                out.write(next(pieces))
        PROGRESS.info("%s", {"done": before + out.size, "total": total})


def _digest(out: OutputFile) -> str:
    """The SHA-256 of what is on disk, while it is being written."""
    digest = hashlib.sha256()
    with GrowingFile(out) as file:
        for offset in range(0, file.size, PIECE_BYTES):
            digest.update(file.pread(offset, min(PIECE_BYTES, file.size - offset)))
    return digest.hexdigest()


def _different(model: Model, journal: Journal, file: BaseFile) -> CorruptCheckpoint:
    """Why a restored file is not the base's: a tensor that was only copied was changed, or the journal is damaged."""
    copied = [name for name in file.tensors if name not in journal.changes]
    changed = [name for name in copied if _crc(model.tensors[name]) != journal.crc32[name]]
    if changed:
        return _changed(model, changed, len(copied))
    return damaged(journal.file, f"{printable(file.name)} does not come out as it was (SHA-256)")


def _write(folder: OutputFolder, name: str, raw: bytes) -> None:
    with folder.file(name) as file:
        file.write(raw)


def _manifest(result: UnfuseResult) -> bytes:
    """``loraconv.json``: the same bytes wherever the command ran."""
    value = result.to_dict()
    del value["out"], value["dry_run"]
    value["fused"] = printable(Path(os.path.abspath(result.fused)).name)
    value["versions"] = {"loraconv": __version__}
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("utf-8")

"""What is wrong with the numbers of an adapter or a base: NaN, Inf, an ``up`` that is all zero, damaged storage.

What is converted is looked at while its proof reads it, since a second pass would cost as much as the copy; an adapter
that is fused or merged, before anything is computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from loraconv.adapter import Adapter
from loraconv.errors import CorruptCheckpoint
from loraconv.io.crc import combine, crc32
from loraconv.io.input_file import InputFile
from loraconv.lazy import PIECE_BYTES, Lazy, Scaled, TensorRef, nbytes, same_bytes, spans
from loraconv.names import fold_names, printable, quoted
from loraconv.ordered import in_order, workers
from loraconv.watch import INFINITY, Watch, all_finite


@dataclass(slots=True)
class Health:
    """Names of tensors with NaN or Inf, and modules whose ``up`` is zero everywhere."""

    nonfinite: list[str] = field(default_factory=list)
    zero_up: list[str] = field(default_factory=list)


def check_adapter(adapter: Adapter) -> Health:
    """Read every factor once; raises :class:`CorruptCheckpoint` where the container's own checksum does not fit."""
    return Health(nonfinite=_nonfinite(adapter_tensors(adapter)), zero_up=zero_up(adapter))


def adapter_tensors(adapter: Adapter) -> dict[str, Lazy]:
    """The factors by the names that they have in their files."""
    return {next(iter(t.leaves())).name: t for f in adapter.factors for t in (f.down, f.up)}


def zero_up(adapter: Adapter) -> list[str]:
    """The modules whose ``up`` is zero everywhere."""
    return [f.module for f in adapter.factors if is_zero(f.up)]


def check_tensors(tensors: Iterable[TensorRef]) -> Health:
    """The same for the tensors of modules that are more than pairs of factors."""
    return Health(nonfinite=_nonfinite({ref.name: ref for ref in tensors}))


def check_copies(whole: Mapping[str, TensorRef], copies: Mapping[str, TensorRef]) -> None:
    """Raise :class:`CorruptCheckpoint` unless every copy (fp32), rounded, is the tensor that the model ran with: a
    trainer rounds them so at every step, so those that differ are of another step or run."""
    off = [name for name, ref in whole.items() if name in copies and not _rounds_to(copies[name], ref)]
    if off:
        raise CorruptCheckpoint(
            f"{len(off)} of {len(whole)} fp32 copies are not those of the weights beside them",
            where="; ".join(fold_names(off)[:4]),
            why="rounded to the dtype of the training they are other numbers, so the files are of two steps or runs",
            hint=f"copy all files of one step again, or take the weights alone: {quoted(whole[off[0]].file.path)}",
            slug="rank-mixed",
        )


def _rounds_to(copy: TensorRef, ref: TensorRef) -> bool:
    return same_bytes(Scaled(copy, 1.0, ref.dtype), ref) or not is_finite(ref)


def _nonfinite(tensors: Mapping[str, Lazy]) -> list[str]:
    """The names of the tensors that hold NaN or Inf.

    Reads each storage once, whole, and compares it with the CRC-32 that the container declares for it; raises
    :class:`CorruptCheckpoint` where they differ.
    """
    storages = {(id(leaf.file), leaf.storage): leaf for tensor in tensors.values() for leaf in tensor.leaves()}
    with workers() as pool:  # every one is read: each has a checksum
        finite = list(in_order(pool, (partial(_storage_is_finite, leaf) for leaf in storages.values())))
    if all(finite):
        return []
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


def check_watched(tensors: Mapping[str, Lazy], watch: Watch) -> tuple[list[str], dict[str, str]]:
    """``(names with NaN or Inf, name -> CRC-32 in hexadecimal)`` of tensors as they are written.

    What ``watch`` has seen is not read again. The CRC-32 of a storage that is cut up (q, k and v in one) follows from
    those of its parts; it is compared with the container's own. Raises :class:`CorruptCheckpoint` where they differ.
    """
    bad, checksums = [], {}
    parts: dict[Storage, dict[int, tuple[int, int]]] = {}
    for name, tensor in tensors.items():
        crc, finite = 0, True
        pieces: Sequence[Lazy] = spans(tensor) or [tensor]
        for span in pieces:
            own, fine = watch.look_at(span)
            crc = combine(crc, own, nbytes(span))
            finite = finite and fine
            if isinstance(span, TensorRef) and span.strides is None:
                parts.setdefault((span.file, span.storage), {})[span.offset] = nbytes(span), own
        checksums[name] = f"{crc:08x}"
        if not finite:
            bad.append(name)
    leaves = {(leaf.file, leaf.storage): leaf for tensor in tensors.values() for leaf in tensor.leaves()}
    for storage, leaf in leaves.items():
        whole = _joined(parts.get(storage, {}), *leaf.storage)
        compare_crc(leaf, _storage_crc(leaf) if whole is None else whole)
    return bad, checksums


Storage = tuple[InputFile, tuple[int, int]]


def _joined(parts: Mapping[int, tuple[int, int]], start: int, length: int) -> int | None:
    """The CRC-32 of a storage out of its parts, offset -> (bytes, CRC-32); None where they do not cover it."""
    crc, at = 0, start
    for offset, (size, own) in sorted(parts.items()):
        if offset != at:
            return None
        crc, at = combine(crc, own, size), at + size
    return crc if at == start + length else None


def _storage_crc(leaf: TensorRef) -> int:
    start, length = leaf.storage
    crc = 0
    for offset in range(start, start + length, PIECE_BYTES):
        crc = crc32(leaf.file.pread(offset, min(PIECE_BYTES, start + length - offset)), crc)
    return crc


def check_storage(leaf: TensorRef) -> None:
    """Raise :class:`CorruptCheckpoint` where the bytes of a storage do not have the CRC-32 that its container tells."""
    if leaf.storage_crc is not None:
        compare_crc(leaf, _storage_crc(leaf))


def compare_crc(leaf: TensorRef, crc: int) -> None:
    """Raise :class:`CorruptCheckpoint` where ``crc``, of a whole storage, is not the one that its container tells."""
    if leaf.storage_crc is not None and crc != leaf.storage_crc:
        raise CorruptCheckpoint(
            f"the bytes of {printable(leaf.name)} do not match their checksum",
            where=leaf.file.shown,
            why="the file was damaged after it was written",
            hint="copy the checkpoint again from where it was trained",
            slug="checksum",
        )


def _storage_is_finite(leaf: TensorRef) -> bool:
    start, length = leaf.storage
    crc, finite = 0, True
    for offset in range(start, start + length, PIECE_BYTES):
        piece = leaf.file.pread(offset, min(PIECE_BYTES, start + length - offset))
        crc = crc32(piece, crc)
        finite = finite and all_finite(piece, leaf.dtype)
    compare_crc(leaf, crc)
    return finite


def is_finite(tensor: Lazy) -> bool:
    """False if any element is NaN or Inf."""
    return all(all_finite(piece, tensor.dtype) for piece in tensor.pieces())


def is_zero(tensor: Lazy) -> bool:
    """True if every element is zero, of either sign."""
    import numpy as np

    integer = INFINITY[tensor.dtype][0]
    sign = np.array(1 << (np.dtype(integer).itemsize * 8 - 1), dtype=integer)
    return all(not bool(np.any(np.frombuffer(piece, dtype=integer) & ~sign)) for piece in tensor.pieces())


def nonfinite_error(names: list[str], where: str) -> CorruptCheckpoint:
    """The refusal of an adapter or base with NaN or Inf, naming the tensors."""
    return CorruptCheckpoint(
        f"{len(names)} tensors hold NaN or Inf",
        where=f"{printable(where)}: " + "; ".join(fold_names(names)[:6]),
        why="the training diverged; what is loaded with this becomes noise",
        hint="use an earlier iteration, or add --allow-nonfinite to convert it all the same",
        slug="nonfinite",
    )

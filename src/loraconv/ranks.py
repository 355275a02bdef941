"""What model-parallel ranks hold of one tensor: parts to be concatenated, or copies that must be the same."""

from __future__ import annotations

from collections.abc import Mapping

from loraconv.errors import CorruptCheckpoint
from loraconv.lazy import Joined, Lazy, TensorRef
from loraconv.names import printable
from loraconv.rules import Parallel

_HINT = "copy the rank files of one iteration of one run into a folder of their own"


def of_rank(tensors: Mapping[str, TensorRef], name: str) -> TensorRef:
    """The tensor of this name in one rank; raises :class:`CorruptCheckpoint` if the rank lacks it."""
    if name not in tensors:
        raise CorruptCheckpoint(
            f"the ranks do not hold the same tensors: {printable(name)} is missing in one",
            hint=_HINT,
            slug="rank-mixed",
        )
    return tensors[name]


def split_dim(parallel: Parallel, ref: TensorRef) -> int | None:
    """Along which dimension a base weight or bias was split; None where every rank has it whole."""
    if parallel == "rows":
        return 0
    return 1 if parallel == "columns" and len(ref.shape) == 2 else None


def join(parts: list[TensorRef], dim: int) -> Lazy:
    """The parts concatenated; a single one stays what it is."""
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), dim)


def merge(refs: list[TensorRef], dim: int | None) -> Lazy:
    """One tensor out of what the ranks hold: concatenated along ``dim``, or the one they all hold."""
    if dim is None:
        return same_in_all(refs)
    refuse_copies(refs)
    return join(refs, dim)


def refuse_copies(refs: list[TensorRef]) -> None:
    """Raise :class:`CorruptCheckpoint` if two ranks hold the same bytes of a tensor that was split between them."""
    for number, ref in enumerate(refs):
        for other in refs[:number]:
            if _same(ref, other) and any(piece.strip(b"\0") for piece in ref.pieces()):
                raise CorruptCheckpoint(
                    f"two rank files hold the same part of {printable(ref.name)}",
                    where=f"{other.file.shown}, {ref.file.shown}",
                    why="one rank's file was copied over another's",
                    hint="copy the rank files again from where they were trained",
                    slug="rank-duplicate",
                )


def same_in_all(refs: list[TensorRef]) -> TensorRef:
    """The tensor that every rank holds; raises :class:`CorruptCheckpoint` if they differ."""
    for other in refs[1:]:
        if not _same(refs[0], other):
            raise mixed(refs[0], other)
    return refs[0]


def mixed(one: TensorRef, other: TensorRef) -> CorruptCheckpoint:
    """The refusal of rank files that cannot belong to one run."""
    return CorruptCheckpoint(
        f"the ranks disagree about {printable(one.name)}, which each of them holds whole",
        where=f"{one.file.shown}, {other.file.shown}",
        why="the files belong to different runs or iterations, or the ranks drifted apart in training",
        hint=_HINT,
        slug="rank-mixed",
    )


def _same(a: TensorRef, b: TensorRef) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(x == y for x, y in zip(a.pieces(), b.pieces(), strict=True))

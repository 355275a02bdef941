"""A tensor whose numbers lie in several places, one after another: every rank of a training has a part of it.

It is a reference like any other. Rows, columns and bytes are taken from the ranges that have them, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loraconv.lazy import TensorRef
from loraconv.names import numel


@dataclass(frozen=True, slots=True)
class GatheredRef(TensorRef):
    """The ranges ``parts`` (flat, of one dtype) in row-major order; file, offset and storage are those of the first."""

    parts: tuple[TensorRef, ...] = ()

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows ``start:stop`` of the first dimension."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {self.shape}")
        row = numel(self.shape[1:])
        return gathered(self.name, (stop - start, *self.shape[1:]), cut(self.parts, start * row, stop * row))

    def columns(self, start: int, stop: int) -> TensorRef:
        """Columns ``start:stop`` of a matrix."""
        rows, width = self.shape
        if not 0 <= start <= stop <= width:
            raise ValueError(f"columns {start}:{stop} of {self.shape}")
        if (start, stop) == (0, width):
            return self
        found = [part for n in range(rows) for part in cut(self.parts, n * width + start, n * width + stop)]
        return gathered(self.name, (rows, stop - start), found or cut(self.parts, 0, 0))

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes in row-major order, range by range."""
        for part in self.parts:
            yield from part.pieces()

    def leaves(self) -> Iterator[TensorRef]:
        """The ranges."""
        yield from self.parts


def cut(parts: Sequence[TensorRef], start: int, stop: int) -> list[TensorRef]:
    """The ranges that hold numbers ``start:stop`` of flat ``parts`` one after another; an empty one for no numbers.

    Raises :class:`ValueError` where the parts do not reach that far.
    """
    found, at = [], 0
    for part in parts:
        first, last = max(start - at, 0), min(stop - at, part.shape[0])
        if first < last:
            found.append(part.rows(first, last))
        at += part.shape[0]
    if not 0 <= start <= stop <= at:
        raise ValueError(f"numbers {start}:{stop} of {at}")
    return found or [parts[0].rows(0, 0)]


def gathered(name: str, shape: tuple[int, ...], parts: Sequence[TensorRef]) -> TensorRef:
    """The tensor that flat ``parts`` make up together; raises :class:`ValueError` for another number of numbers."""
    own = tuple(replace(part, name=name) for part in parts)
    first, count = own[0], sum(part.shape[0] for part in own)
    if count != numel(shape) or len({part.dtype for part in own}) > 1:
        raise ValueError(f"{count} numbers for shape {shape}")
    if len(own) == 1:
        return replace(first, shape=shape)
    return GatheredRef(
        name, first.dtype, shape, first.file, first.offset, None, first.storage, first.storage_crc, parts=own
    )

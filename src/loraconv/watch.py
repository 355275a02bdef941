"""What is found out about bytes while they are read anyway: the CRC-32 of a range, and whether it holds NaN or Inf.

The proof of a base reads all of it. With references from here it reads as ever, and no second pass is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

from loraconv.io.crc import crc32
from loraconv.io.input_file import InputFile
from loraconv.lazy import Lazy, TensorRef, nbytes

#: dtype -> (unsigned integer of its size, bits of positive infinity). NaN and infinity are the integers from there on,
#: and from there on with the sign bit set.
INFINITY = {
    "F16":  ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32":  ("<u4", 0x7F800000),
    "F64":  ("<u8", 0x7FF0000000000000),
}  # fmt: skip

#: CRC-32 of the bytes, and whether every number among them is finite.
Seen = tuple[int, bool]


@dataclass(frozen=True, slots=True)
class Watch:
    """What was found out, by file, first byte and number of bytes."""

    seen: dict[tuple[InputFile, int, int] | None, Seen] = field(default_factory=dict)

    def over(self, ranks: Iterable[Mapping[str, TensorRef]]) -> list[dict[str, TensorRef]]:
        """The same tensors, which note here what they hold when they are read."""
        return [{name: self._watched(ref) for name, ref in tensors.items()} for tensors in ranks]

    def _watched(self, ref: TensorRef) -> TensorRef:
        if ref.dtype not in INFINITY or type(ref) is not TensorRef:
            return ref  # numbers from several files are read again where they are asked for
        return WatchedRef(**{f.name: getattr(ref, f.name) for f in fields(TensorRef)}, watch=self)

    def look_at(self, tensor: Lazy) -> Seen:
        """What is known of a tensor's bytes; reads those that nobody has read to the end yet."""
        found = self.seen.get(_place(tensor)) if isinstance(tensor, TensorRef) else None
        if found is None:
            crc, finite = 0, True
            for piece in tensor.pieces():
                crc, finite = crc32(piece, crc), finite and all_finite(piece, tensor.dtype)
            found = crc, finite
        return found


@dataclass(frozen=True, slots=True)
class WatchedRef(TensorRef):
    """A reference that tells its watch what the bytes were like, once they have all been read in their order."""

    watch: Watch = field(default_factory=Watch)

    def pieces(self) -> Iterator[bytes]:
        """The bytes, as those of :class:`TensorRef`."""
        crc, finite = 0, True
        for piece in TensorRef.pieces(self):
            crc, finite = crc32(piece, crc), finite and all_finite(piece, self.dtype)
            yield piece
        if self.strides is None:
            self.watch.seen[_place(self)] = crc, finite


def _place(ref: TensorRef) -> tuple[InputFile, int, int] | None:
    return (ref.file, ref.offset, nbytes(ref)) if ref.strides is None else None


def all_finite(piece: bytes, dtype: str) -> bool:
    """Two maxima and no temporary array: as unsigned numbers the negative ones are greatest, as signed the positive."""
    import numpy as np

    if not piece:
        return True
    integer, infinity = INFINITY[dtype]
    bits = np.frombuffer(piece, dtype=integer)
    sign = 1 << (bits.itemsize * 8 - 1)
    return int(bits.max()) < sign + infinity and int(bits.view(integer.replace("u", "i")).max()) < infinity

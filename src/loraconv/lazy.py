"""Tensors that are not in memory: where their bytes lie, and a few operations on them.

A :class:`TensorRef` is a byte range of an input file. The other classes build a tensor out of references: each has
``dtype``, ``shape`` and ``pieces()``, which streams the row-major bytes, so memory stays bounded by one tensor.
numpy is imported only when numbers have to be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from loraconv.names import DTYPE_BYTES, numel

if TYPE_CHECKING:
    import numpy as np

    from loraconv.io.input_file import InputFile

#: What is read in one go: large enough that calls cost little, small enough for a core's cache.
PIECE_BYTES = 1 << 19


class Lazy(Protocol):
    """Anything that can stream a tensor: ``dtype`` (safetensors name), ``shape``, and its row-major bytes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def pieces(self) -> Iterator[bytes]: ...
    def leaves(self) -> Iterator[TensorRef]: ...


def nbytes(tensor: Lazy) -> int:
    """The size of the tensor's bytes once written."""
    return numel(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def spans(tensor: Lazy) -> list[TensorRef] | None:
    """The byte ranges that make up the tensor one after another; None where it has to be computed."""
    if isinstance(tensor, TensorRef):
        return list(tensor.leaves()) if tensor.strides is None else None
    if isinstance(tensor, Viewed):
        return spans(tensor.source)
    if not isinstance(tensor, Joined) or tensor.dim:
        return None
    parts = [spans(part) for part in tensor.parts]
    return None if None in parts else [ref for part in parts if part is not None for ref in part]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside an input file: its first element lies at byte ``offset``.

    ``strides`` (in elements) is None for a contiguous row-major tensor. ``storage`` is ``(first byte, length)`` of the
    storage that holds the view; two references with the same storage share memory in the checkpoint. The reader has
    checked that the view lies inside its storage and the storage inside the file. ``storage_crc`` is the CRC-32 that
    the container declares for the storage, or None where it declares none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: InputFile
    offset: int
    strides: tuple[int, ...] | None = None
    storage: tuple[int, int] = (0, 0)
    storage_crc: int | None = None

    def rows(self, start: int, stop: int) -> TensorRef:
        """Rows ``start:stop`` of the first dimension."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {self.shape}")
        row = numel(self.shape[1:]) if self.strides is None else self.strides[0]
        offset = self.offset + start * row * DTYPE_BYTES[self.dtype]
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=offset)

    def columns(self, start: int, stop: int) -> TensorRef:
        """Columns ``start:stop`` of a matrix."""
        rows, width = self.shape
        if not 0 <= start <= stop <= width:
            raise ValueError(f"columns {start}:{stop} of {self.shape}")
        if (start, stop) == (0, width):
            return self
        strides = (width, 1) if self.strides is None else self.strides
        offset = self.offset + start * strides[1] * DTYPE_BYTES[self.dtype]
        return replace(self, shape=(rows, stop - start), offset=offset, strides=strides)

    def pieces(self) -> Iterator[bytes]:
        """The tensor's bytes in row-major order, ``PIECE_BYTES`` at a time (a strided view: all at once)."""
        if self.strides is not None:
            yield self._gather()
            return
        left, offset = nbytes(self), self.offset
        while left:
            part = self.file.pread(offset, min(left, PIECE_BYTES))
            yield part
            offset += len(part)
            left -= len(part)

    def leaves(self) -> Iterator[TensorRef]:
        """Itself: the only byte range this tensor is made of."""
        yield self

    def _gather(self) -> bytes:
        import numpy as np

        assert self.strides is not None
        size = DTYPE_BYTES[self.dtype]
        if numel(self.shape) == 0:
            return b""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        raw = np.frombuffer(self.file.pread(self.offset, extent * size), dtype=f"V{size}")
        steps = [s * size for s in self.strides]
        return np.lib.stride_tricks.as_strided(raw, self.shape, steps, writeable=False).tobytes()


@dataclass(frozen=True, slots=True)
class Joined:
    """Tensors concatenated along ``dim``; all other sizes and the dtype are equal."""

    parts: tuple[Lazy, ...]
    dim: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], sum(p.shape[self.dim] for p in self.parts), *first[self.dim + 1 :])

    def pieces(self) -> Iterator[bytes]:
        if self.dim == 0:
            for part in self.parts:
                yield from part.pieces()
            return
        import numpy as np

        raw = f"V{DTYPE_BYTES[self.dtype]}"
        arrays = [np.frombuffer(b"".join(p.pieces()), dtype=raw).reshape(p.shape) for p in self.parts]
        yield np.concatenate(arrays, axis=self.dim).tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``start:stop`` of another lazy tensor."""

    source: Lazy
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.source.shape[0]:
            raise ValueError(f"rows {self.start}:{self.stop} of {self.source.shape}")

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.source.shape[1:])

    def pieces(self) -> Iterator[bytes]:
        row = numel(self.source.shape[1:]) * DTYPE_BYTES[self.dtype]
        skip, left = self.start * row, (self.stop - self.start) * row
        for piece in self.source.pieces():
            part = piece[skip : skip + left]
            skip, left = max(skip - len(piece), 0), left - len(part)
            yield part

    def leaves(self) -> Iterator[TensorRef]:
        yield from self.source.leaves()


@dataclass(frozen=True, slots=True)
class Padded:
    """A matrix with columns of zeros before and behind it: its first column is column ``at`` of ``width``."""

    source: Lazy
    at: int
    width: int

    def __post_init__(self) -> None:
        if self.at < 0 or self.at + self.source.shape[1] > self.width:
            raise ValueError(f"{self.source.shape} does not fit at {self.at} of {self.width}")

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[0], self.width

    def pieces(self) -> Iterator[bytes]:
        size = DTYPE_BYTES[self.dtype]
        row = self.source.shape[1] * size
        before, behind = bytes(self.at * size), bytes((self.width - self.at) * size - row)
        whole = b"".join(self.source.pieces())
        yield b"".join(before + whole[n * row : (n + 1) * row] + behind for n in range(self.shape[0]))

    def leaves(self) -> Iterator[TensorRef]:
        yield from self.source.leaves()


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of zeros."""

    dtype: str
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[bytes]:
        yield bytes(nbytes(self))

    def leaves(self) -> Iterator[TensorRef]:
        yield from ()


@dataclass(frozen=True, slots=True)
class Number:
    """A tensor without dimensions that holds one number, rounded to ``dtype``."""

    value: float
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def pieces(self) -> Iterator[bytes]:
        import numpy as np

        yield encode(np.array([self.value]), self.dtype)

    def leaves(self) -> Iterator[TensorRef]:
        yield from ()


@dataclass(frozen=True, slots=True)
class Viewed:
    """The same row-major bytes under another shape of the same size."""

    source: Lazy
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if numel(self.shape) != numel(self.source.shape):
            raise ValueError(f"{self.source.shape} cannot be viewed as {self.shape}")

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def pieces(self) -> Iterator[bytes]:
        yield from self.source.pieces()

    def leaves(self) -> Iterator[TensorRef]:
        yield from self.source.leaves()


@dataclass(frozen=True, slots=True)
class Scaled:
    """``source * factor`` (a float64 product), rounded once to ``dtype``. With factor 1 it is a plain cast.

    ``exact`` is true where the maker has seen that nothing is rounded.
    """

    source: Lazy
    factor: float
    dtype: str
    exact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def pieces(self) -> Iterator[bytes]:
        for piece in self.source.pieces():
            yield encode(times(piece, self.source.dtype, self.factor), self.dtype)

    def leaves(self) -> Iterator[TensorRef]:
        yield from self.source.leaves()


@dataclass(frozen=True, slots=True)
class InMemory:
    """A tensor that was computed; its row-major bytes are in memory, and come from no file."""

    raw: bytes
    dtype: str
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[bytes]:
        yield self.raw

    def leaves(self) -> Iterator[TensorRef]:
        return iter(())


@dataclass(frozen=True, slots=True)
class Averaged:
    """The sum of tensors of one shape and dtype divided by ``divisor`` (in float64), rounded once to their dtype."""

    parts: tuple[Lazy, ...]
    divisor: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def pieces(self) -> Iterator[bytes]:
        total = read(self.parts[0])
        for part in self.parts[1:]:
            total = total + read(part)
        yield encode(total / self.divisor, self.dtype)

    def leaves(self) -> Iterator[TensorRef]:
        for part in self.parts:
            yield from part.leaves()


def whole(tensor: Lazy) -> bytes:
    """All the tensor's bytes at once."""
    if type(tensor) is TensorRef and tensor.strides is None:  # one range of a file; what is gathered has several
        return tensor.file.pread(tensor.offset, nbytes(tensor))
    return b"".join(tensor.pieces())


def read(tensor: Lazy) -> np.ndarray[Any, Any]:
    """The whole tensor as float64 values, shape kept."""
    return decode(whole(tensor), tensor.dtype).reshape(tensor.shape)


def same_bytes(one: Lazy, other: Lazy) -> bool:
    """True if two tensors of one dtype and shape hold the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one == other or whole(one) == whole(other)


def number(tensor: TensorRef) -> int | float:
    """The one number in a tensor of one element, exact; raises :class:`ValueError` for other tensors and dtypes."""
    if numel(tensor.shape) != 1 or len(tensor.shape) > 1:
        raise ValueError(f"shape {list(tensor.shape)} is not one number")
    raw = whole(tensor)
    if tensor.dtype in ("F16", "BF16", "F32", "F64"):
        return float(decode(raw, tensor.dtype)[0])
    if tensor.dtype[:1] in ("I", "U"):
        return int.from_bytes(raw, "little", signed=tensor.dtype[0] == "I")
    raise ValueError(f"{tensor.dtype} is no dtype for a number")


def decode(raw: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Bytes of a floating dtype as a flat float64 array; exact for every input value."""
    import numpy as np

    if dtype in ("F16", "BF16"):
        return single(raw, dtype).astype(np.float64)
    return np.frombuffer(raw, dtype={"F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def single(raw: bytes, dtype: str) -> np.ndarray[Any, Any]:
    """Bytes of F16, BF16 or F32 as a flat float32 array of its own; exact for every input value."""
    import numpy as np

    if dtype == "F32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32)
    # The sign comes along: a signed number is lengthened with copies of its first bit.
    bits = np.frombuffer(raw, dtype="<i2").astype(np.int32)
    if dtype == "BF16":
        bits <<= 16
        return bits.view(np.float32)
    if not keeps_subnormals() or np.any((bits & 0x7C00) == 0x7C00):  # Inf or NaN: numpy's own cast, ten times as slow
        return np.frombuffer(raw, dtype="<f2").astype(np.float32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, exponent and fraction, without the copies of the sign between them
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def keeps_subnormals() -> bool:
    """False where something set the processor to take the smallest numbers for zero (fast-math libraries do)."""
    import numpy as np

    return bool(np.float32(2.0**-149) * np.float32(1) != 0)


def times(raw: bytes, dtype: str, factor: float) -> np.ndarray[Any, Any]:
    """Bytes of a floating dtype times ``factor``: the float64 product, or the same numbers in float32 where those are
    exact (16-bit numbers times a power of two), which takes half the time."""
    import numpy as np

    if dtype not in ("F16", "BF16") or math.frexp(factor)[0] not in (0.5, -0.5) or not 2.0**-64 < abs(factor) < 2.0**64:
        return decode(raw, dtype) * factor
    values = single(raw, dtype)
    if dtype == "BF16" and factor != 1.0:
        size = values.view(np.uint32) & 0x7FFFFFFF  # the bits, because a processor may take the smallest for zero
        if bool(np.any((size < 65 << 23) & (size > 0) | (size >= 190 << 23))):
            return decode(raw, dtype) * factor  # near the ends of bfloat16's range, float32 would round or overflow
    values *= np.float32(factor)
    return values


def encode(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    """Float64 (or float32) values as bytes of ``dtype``, rounded once, to nearest, ties to even; NaN stays NaN."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return values.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()
        return _bf16_bits(values.ravel()).tobytes()


def _bf16_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float64 to bfloat16 bits. The step through float32 rounds to odd, so that the two roundings equal one."""
    import numpy as np

    single = values.astype(np.float32)
    bits = single.view(np.uint32).copy()
    back = single.astype(np.float64)
    inexact = np.isfinite(values) & (back != values)
    # Where float32 rounding moved away from zero, step back towards zero; then mark the lost part in the last bit.
    away = inexact & (np.abs(back) > np.abs(values))
    bits[away] -= 1
    bits[inexact] |= 1
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(values)
    rounded[nan] = (bits[nan] >> 16) | 0x40
    return rounded.astype("<u2")

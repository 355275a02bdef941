"""The difference between a base tensor and the fused one in as few bytes as possible, exact for every bit pattern.

Bits become whole numbers in the order of the numbers they stand for, so that neighbours differ by one: by a unit in the
last place (ulp). What the adapter added is predicted from its own factors; only the distance of the base from that
prediction is stored, mostly zero. Nothing here depends on the machine: the factors are whole numbers so small that
their product is exact in whatever order it is summed, and the rest is integers and single roundings of IEEE 754.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log2, sqrt
from typing import TYPE_CHECKING, Any

from loraconv.names import DTYPE_BYTES, ROUNDING, numel

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: The dtypes whose differences can be stored.
DTYPES = ("BF16", "F16", "F32")

#: Elements that are coded together: what stays in a processor's cache.
CHUNK = 1 << 18

#: How far rounding the factors may move the prediction, in rounding errors of a typical weight. Less would cost more
#: bytes for the factors than it saves for the distances.
SHARE = 0.1

#: Powers of two that keep a predicted delta far from the ends of float32's range.
EXPONENTS = range(-100, 101)

#: Whole numbers up to here are exact.
_EXACT = {"float32": 1 << 24, "float64": 1 << 53}

#: Factors are stored as 32-bit numbers.
_GREATEST = (1 << 31) - 1


class BadCode(ValueError):
    """Bytes that no encoder wrote."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What was added to a tensor, nearly: ``up @ down * 2**exponent``.

    ``up`` is ``(rows, rank)`` and ``down`` ``(rank, columns)``: whole numbers, in a floating dtype that holds every sum
    of their products exactly.
    """

    up: Array
    down: Array
    exponent: int

    def product(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of ``up @ down``, flat; the same numbers on every machine."""
        return (self.up[start:stop] @ self.down).reshape(-1)


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns of a tensor as factors see it: the first dimension against all others."""
    return (shape[0], numel(shape[1:])) if len(shape) > 1 else (numel(shape), 1)


def chunks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The rows, from and to, that are coded together."""
    rows, columns = grid(shape)
    step = max(1, CHUNK // max(1, columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


# --- factors ----------------------------------------------------------------------------------------------------------


def whole_factors(up: Array, down: Array, typical: float, dtype: str) -> Factors | None:
    """The factors of a delta in whole numbers; None where a prediction by them is of no use.

    ``up`` is ``(rows, rank)``, ``down`` is ``(rank, columns)``, ``typical`` the size of a base weight of ``dtype``.
    """
    import numpy as np

    # A step of up is multiplied with a column of down, a step of down with a row of up.
    sizes = [sqrt(float(np.square(f, dtype=np.float64).sum()) / n) for f, n in ((down, down.shape[1]), (up, len(up)))]
    error = SHARE * typical * ROUNDING[dtype]
    if up.shape[1] > min(len(up), down.shape[1]) or not all(isfinite(x) and x > 0 for x in (*sizes, error)):
        return None
    steps = [floor(log2(error * sqrt(6) / size)) for size in sizes]
    while sum(steps) in EXPONENTS:
        ups, downs = (np.rint(np.ldexp(f.astype(np.float64), -step)) for f, step in zip((up, down), steps, strict=True))
        used = ups.any(axis=0) & downs.any(axis=1)
        if not used.any():
            return None
        try:
            return _exact(ups[:, used], downs[used], sum(steps))
        except BadCode:
            steps = [step + 1 for step in steps]
    return None


def _exact(up: Array, down: Array, exponent: int) -> Factors:
    """The factors in the narrowest dtype in which no partial sum is rounded; raises :class:`BadCode` without one."""
    import numpy as np

    greatest = int(np.abs(up).sum(axis=1).max()) * int(np.abs(down).max())
    if max(np.abs(up).max(), np.abs(down).max()) <= _GREATEST:
        for dtype, limit in _EXACT.items():
            if greatest <= limit:
                return Factors(np.ascontiguousarray(up, dtype), np.ascontiguousarray(down, dtype), exponent)
    raise BadCode("factors whose product is not exact")


def pack_factors(factors: Factors) -> bytes:
    """The factors as bytes."""
    import numpy as np

    return b"".join(_pack(_zigzag(f.astype(np.int32).reshape(-1))) for f in (factors.up, factors.down))


def unpack_factors(code: bytes, shape: tuple[int, ...], rank: int, exponent: int) -> Factors:
    """The factors of a tensor of ``shape``; raises :class:`BadCode`."""
    import numpy as np

    rows, columns = grid(shape)
    if not 0 < rank <= min(rows, columns) or exponent not in EXPONENTS:
        raise BadCode(f"rank {rank}, exponent {exponent}")
    up, code = _unpack(code, rows * rank, np.uint32)
    down, code = _unpack(code, columns * rank, np.uint32)
    _refuse_rest(code)
    numbers = [_unzigzag(f).astype(np.float64) for f in (up, down)]
    return _exact(numbers[0].reshape(rows, rank), numbers[1].reshape(rank, columns), exponent)


# --- distances --------------------------------------------------------------------------------------------------------


def encode(base: bytes, fused: bytes, dtype: str, factors: Factors | None, rows: tuple[int, int]) -> bytes:
    """The code of a chunk: what :func:`decode` makes ``base`` out of. Both are row-major bytes of ``dtype``."""
    import numpy as np

    guess = _guess(_bits(fused, dtype), dtype, factors, rows)
    distance = _zigzag(_line(_bits(base, dtype)) - _line(guess))
    apart = distance != 0
    return _deflate(np.packbits(apart)) + _pack(distance[apart] - 1)


def decode(code: bytes, fused: bytes, dtype: str, factors: Factors | None, rows: tuple[int, int]) -> bytes:
    """The bytes of the base's chunk; raises :class:`BadCode`."""
    import numpy as np

    guess = _guess(_bits(fused, dtype), dtype, factors, rows)
    packed, code = _inflate(code, (guess.size + 7) // 8)
    apart = np.unpackbits(np.frombuffer(packed, np.uint8), count=guess.size).view(np.bool_)
    values, code = _unpack(code, int(np.count_nonzero(apart)), guess.dtype)
    _refuse_rest(code)
    distance = np.zeros_like(guess)
    distance[apart] = values + 1
    base = _line((_line(guess) + _unzigzag(distance)).view(guess.dtype)).view(guess.dtype)
    return base.astype(guess.dtype.newbyteorder("<"), copy=False).tobytes()


def _bits(raw: bytes, dtype: str) -> Array:
    import numpy as np

    size = DTYPE_BYTES[dtype]
    return np.frombuffer(raw, f"<u{size}").astype(f"u{size}", copy=False)


def _guess(fused: Array, dtype: str, factors: Factors | None, rows: tuple[int, int]) -> Array:
    """The bits that the base has if the factors are right: ``fused - delta``, rounded to ``dtype``.

    Zero, numbers near the end of float32's range, infinities and NaN are guessed to be as they were: whether such
    numbers become zero, and which NaN comes out, differs from processor to processor.
    """
    import numpy as np

    if factors is None:
        return fused
    values = _values(fused, dtype)
    wide: Any = np.float64 if dtype == "F32" else np.float32
    with np.errstate(all="ignore"):
        delta = factors.product(*rows).astype(wide) * wide(2.0**factors.exponent)
        less = (values.astype(wide, copy=False) - delta).astype(np.float32, copy=False)
        guess = _rounded(less, dtype)
    odd = _odd(values) | _odd(less)
    if odd.any():
        guess[odd] = fused[odd]
    return guess


def _values(bits: Array, dtype: str) -> Array:
    """The numbers in float32, exact."""
    import numpy as np

    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def _rounded(values: Array, dtype: str) -> Array:
    """Float32 numbers as bits of ``dtype``."""
    import numpy as np

    if dtype == "BF16":
        return ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else values.view(np.uint32)


def _odd(values: Array) -> Array:
    """Where a float32 is zero, less than twice the smallest normal number, infinite or NaN."""
    import numpy as np

    exponents = values.view(np.uint32) & np.uint32(0x7F800000)
    odd: Array = exponents - np.uint32(2 << 23) >= np.uint32(253 << 23)
    return odd


def _line(bits: Array) -> Array:
    """Sign and magnitude to whole numbers in the order of the floating ones, and back: it is its own inverse."""
    import numpy as np

    signed = bits.view(f"i{bits.itemsize}")
    line: Array = signed ^ ((signed >> (8 * bits.itemsize - 1)) & np.iinfo(signed.dtype).max)
    return line


def _zigzag(numbers: Array) -> Array:
    """0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return ((numbers << 1) ^ (numbers >> (8 * numbers.itemsize - 1))).view(f"u{numbers.itemsize}")


def _unzigzag(numbers: Array) -> Array:
    return ((numbers >> 1) ^ (0 - (numbers & 1))).view(f"i{numbers.itemsize}")


# --- bytes ------------------------------------------------------------------------------------------------------------


def _pack(numbers: Array) -> bytes:
    """Unsigned numbers byte plane by byte plane, the lowest first."""
    import numpy as np

    return b"".join(_deflate((numbers >> (8 * k)).astype(np.uint8)) for k in range(numbers.itemsize))


def _unpack(code: bytes, count: int, dtype: Any) -> tuple[Array, bytes]:
    """``count`` numbers, and the code that follows them."""
    import numpy as np

    numbers = np.zeros(count, dtype)
    for k in range(numbers.itemsize):
        plane, code = _inflate(code, count)
        numbers |= np.frombuffer(plane, np.uint8).astype(dtype) << (8 * k)
    return numbers, code


def _deflate(data: Array) -> bytes:
    # Huffman codes and runs of one byte are all there is to find here, and a search for more takes three times as long.
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(data.data) + packer.flush()


def _inflate(code: bytes, size: int) -> tuple[bytes, bytes]:
    """Exactly ``size`` bytes, and the code that follows theirs; never makes more than that."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(code, size + 1)
    except zlib.error as error:
        raise BadCode(str(error)) from None
    if len(data) != size or not unpacker.eof:
        raise BadCode(f"{len(data)} bytes instead of {size}")
    return data, unpacker.unused_data


def _refuse_rest(code: Sequence[int]) -> None:
    if code:
        raise BadCode(f"{len(code)} bytes too many")

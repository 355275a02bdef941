"""The sum of a base weight and its adapters, correctly rounded: ``round(base + sum(factor * up @ down))``.

The result is the number of the output's dtype that is nearest to the exact sum (ties to even). Its bytes are the same
whatever BLAS, machine or number of threads made the products. There are three steps, each for what the one before could
not decide: a sum in float32 with a bound on its error (16-bit outputs only); float64 for the elements that this error
could round to another number; exact fractions for those that even the error of float64 could.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loraconv.errors import CorruptCheckpoint
from loraconv.lazy import Averaged, Lazy, TensorRef, decode, encode, keeps_subnormals, read, single, times
from loraconv.names import DTYPE_BYTES, DTYPE_WORDS, printable
from loraconv.watch import all_finite

try:
    from loraconv.fusion import _rounding
except ImportError:  # installed without a compiler: numpy does the same, more slowly
    _rounding = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: The dtypes that a base weight and the result may have.
DTYPES = ("F16", "BF16", "F32")
#: The elements of one block of rows: what is computed in one go, so that it stays in a core's cache.
BLOCK = 1 << 19
#: From this share of undecided elements on, a product in float64 is faster than picking them out, and from this one on
#: float64 for the whole sum.
_SOME, _MANY = 1 / 128 if _rounding is None else 1 / 24, 1 / 16
#: Products that are added up in float32 in one go.
_SUM = 128

#: dtype -> (bits by which float32 is longer, power of two that takes the dtype's exponents to those of float32).
_NARROW = {"F16": (13, -112), "BF16": (16, 0)}
#: dtype -> (significant bits, exponent of its smallest number, unsigned integer of its size, bits of infinity).
_GRID = {"F16": (11, -24, "<u2", 0x7C00), "BF16": (8, -133, "<u2", 0x7F80), "F32": (24, -149, "<u4", 0x7F800000)}


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's part of a weight: ``factor * up @ down``, ``up`` of shape (out, rank), ``down`` (rank, in)."""

    up: Lazy
    down: Lazy
    factor: Fraction


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of all terms side by side, in float64 and once more in float32: ``up`` (out, ranks) with ``factor``
    multiplied in, ``down`` (in, ranks): transposed, so that single elements are made of two runs of numbers.

    ``rows`` and ``columns`` are the norms of the rows of ``up`` and of the columns of ``down``. By Cauchy and Schwarz
    their products are at least ``|up| @ |down|``, to which the error of the product is proportional. ``exact`` has the
    factors one by one, as they are in the file.
    """

    up: Array
    down: Array
    single_up: Array
    single_down: Array
    rows: Array
    columns: Array
    exact: tuple[tuple[Array, Array, Fraction], ...]

    def at(self, row: int, column: int) -> Fraction:
        """One number of the product, exact."""
        total = Fraction(0)
        for up, down, factor in self.exact:
            pairs = zip(up[row].tolist(), down[:, column].tolist(), strict=True)
            total += factor * sum(Fraction(u) * Fraction(d) for u, d in pairs)
        return total

    def part(self, rows: slice) -> Factors:
        """The factors of some rows of the product."""
        return replace(
            self,
            up=self.up[rows],
            single_up=self.single_up[rows],
            rows=self.rows[rows],
            exact=tuple((up[rows], down, factor) for up, down, factor in self.exact),
        )


def stack(terms: Sequence[Term]) -> Factors:
    """Read the factors of one weight."""
    import numpy as np

    exact = tuple((_values(t.up), _values(t.down), t.factor) for t in terms)
    up = np.concatenate([u * float(factor) for u, _, factor in exact], axis=1)
    down = np.concatenate([d for _, d, _ in exact], axis=0)
    with np.errstate(over="ignore"):  # what is infinite in float32 is decided in float64
        single_up, single_down = up.astype(np.float32), down.astype(np.float32)
    down = np.ascontiguousarray(down.T)
    return Factors(up, down, single_up, single_down, np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=1), exact)


def _values(tensor: Lazy) -> Array:
    """The numbers of a factor in float64; a mean over ranks is not rounded to the dtype of its parts."""
    if isinstance(tensor, Averaged):
        return sum((read(part) for part in tensor.parts[1:]), read(tensor.parts[0])) / tensor.divisor
    return read(tensor)


def as_matrix(ref: TensorRef) -> TensorRef:
    """A vector as a column, a kernel as (out, in * height * width)."""
    return replace(ref, shape=(ref.shape[0], math.prod(ref.shape[1:])))


def blocks(shape: tuple[int, ...], size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The ranges of rows in which a weight of shape (out, in) is computed, about ``size`` elements each."""
    step = max(1, size // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def merge_rows(raw: bytes, ref: TensorRef, factors: Factors, dtype: str) -> memoryview:
    """Rows of a base weight with the terms added, as bytes of ``dtype`` (F16, BF16 or F32).

    ``ref`` is the rows' reference, ``raw`` their bytes (F16, BF16 or F32), ``factors`` those of the same rows. Raises
    :class:`CorruptCheckpoint` for NaN or Inf in the base (``nonfinite``), and for sums that the dtype cannot hold
    (``overflow``).
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if dtype in _NARROW and keeps_subnormals():
            bits, doubtful = _sum_single(raw, ref, factors, dtype)
            if len(doubtful) <= _MANY * bits.size:
                doubtful = _settled(raw, ref, factors, dtype, bits, doubtful)
                if len(doubtful):
                    picked = np.frombuffer(raw, dtype=_GRID[ref.dtype][2])[doubtful].tobytes()
                    at = np.divmod(doubtful, ref.shape[1])
                    bits.reshape(-1)[doubtful] = _sum_double(decode(picked, ref.dtype), ref, factors, dtype, at)
                return _as_bytes(bits)
        return _as_bytes(_sum_double(decode(raw, ref.dtype).reshape(ref.shape), ref, factors, dtype, None))


def _as_bytes(bits: Array) -> memoryview:
    return bits.reshape(-1).view("u1").data


def cast_rows(raw: bytes, ref: TensorRef, dtype: str) -> bytes:
    """Numbers of the base, whose bytes are ``raw``, rounded once to ``dtype``. Raises as :func:`merge_rows` does."""
    made = encode(times(raw, ref.dtype, 1.0), dtype)
    if not all_finite(made, dtype):
        raise overflow(ref, dtype)
    return made


def _sum_single(raw: bytes, ref: TensorRef, factors: Factors, dtype: str) -> tuple[Array, Array]:
    """``(bits, doubtful)``: the rounded sums by way of float32, and the flat indices of those that may be wrong.

    The sum is off by the product's error (see :func:`_product`) and by half a unit in the last place of float32. An
    element is doubtful if the two ends of that interval round differently.
    """
    product, roundings = _product(factors, raw, ref.dtype, dtype)
    error = _error(factors, roundings, _NARROW[dtype][1])
    if _rounding is None:
        return _round_sums(raw, ref, product, error, dtype)
    import numpy as np

    bits = np.empty(ref.shape, dtype=np.uint16)
    doubtful = np.empty(int(bits.size * _MANY) + 1, dtype=np.int64)
    count = _rounding.round_sums(raw, ref.dtype, product, error, dtype, bits, doubtful)
    if count < 0:
        raise nonfinite(ref)
    return bits, doubtful[:count]


def _round_sums(raw: bytes, ref: TensorRef, product: Array, error: Array, dtype: str) -> tuple[Array, Array]:
    """What ``_rounding.round_sums`` does, where that is not compiled: the sums' bits, and which are doubtful.

    As integers, numbers of one sign are ordered like their values, so that adding half a unit of the short dtype and
    cutting off the bits by which float32 is longer rounds them (ties away from zero, hence a unit more to either side).
    """
    import numpy as np

    cut, shift = _NARROW[dtype]
    half, unit = np.int32(1 << (cut - 1)), np.int32(2)
    if not all_finite(raw, ref.dtype):
        raise nonfinite(ref)
    sums = single(raw, ref.dtype).reshape(ref.shape)
    sums += product
    signs = sums.view(np.int32)
    high = np.abs(sums)
    if shift:
        high *= np.float32(2.0**shift)
    low = high - error
    high += error
    upper, lower = high.view(np.int32), low.view(np.int32)
    upper += half + unit
    upper >>= cut
    lower += half - unit
    lower >>= cut
    doubtful = upper != lower
    if int(upper.max(initial=0)) >= _GRID[dtype][3]:  # too large for the dtype, or for float32 on the way
        doubtful |= upper >= _GRID[dtype][3]
    signs >>= 16
    signs &= 0x8000
    signs |= upper
    return signs.astype(np.uint16), np.flatnonzero(doubtful)


def _product(factors: Factors, raw: bytes, stored: str, dtype: str) -> tuple[Array, int]:
    """The product in float32, and by how many of its roundings it may be off.

    In any order of summation, n products are within n roundings of ``|up| @ |down|``, plus three in the factors; long
    sums are made in parts, of which each costs one more. Where that would leave many elements doubtful, because the
    delta is not small against the base, the product is made in float64 and rounded to float32 once. ``raw`` are the
    base's numbers, of the dtype ``stored``.
    """
    import numpy as np

    bits, smallest = _GRID[dtype][:2]
    ranks = factors.up.shape[1]
    parts = [slice(first, first + _SUM) for first in range(0, max(1, ranks), _SUM)]
    count = min(ranks, _SUM) + len(parts) + 2
    every = np.frombuffer(raw, dtype=f"V{DTYPE_BYTES[stored]}")
    sample = np.abs(decode(every[:: max(1, every.size >> 10)].tobytes(), stored))
    units = np.maximum(sample * 2.0 ** (1 - bits), 2.0**smallest)
    error = count * 2.0**-24 * float(factors.rows.max()) * float(factors.columns.mean()) if every.size else 0.0
    if float(np.minimum(2 * error / units, 1).sum()) > _SOME * len(sample):
        return (factors.up @ factors.down.T).astype(np.float32), 1
    product: Array = factors.single_up[:, parts[0]] @ factors.single_down[parts[0]]
    for part in parts[1:]:
        product += factors.single_up[:, part] @ factors.single_down[part]
    return product, count


def _error(factors: Factors, roundings: int, shift: int) -> Array:
    """For each column a bound on the error that so many roundings to float32 leave in the product, times ``2**shift``.

    One for all rows, by the longest, takes less time than one for each element and is hardly wider. The margin of
    2**-10 is for the error of the bound itself, and for the sum's own half unit where the lower end lies in a much
    lower binade. The absolute part is for what may be lost below the smallest float32, and for zero: its sign is
    decided like that of any other number.
    """
    import numpy as np

    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24) if roundings < 1 << 23 else np.inf
    longest = float(factors.rows.max(initial=0))
    lost = 2.0**-100 * max(1.0, longest, float(factors.columns.max(initial=0)))
    error: Array = (factors.columns * (gamma * longest * (1 + 2.0**-10)) + lost) * 2.0**shift + 2.0**-147
    return error.astype(np.float32)


def _settled(raw: bytes, ref: TensorRef, factors: Factors, dtype: str, bits: Array, doubtful: Array) -> Array:
    """The doubtful elements that the compiled part cannot settle in float64; the others are put into ``bits``."""
    if _rounding is None:
        return doubtful
    f, error = factors, _double_error(factors)
    return doubtful[: _rounding.settle(raw, ref.dtype, f.up, f.down, f.rows, f.columns, error, dtype, bits, doubtful)]


def _double_error(factors: Factors) -> float:
    """What the norms of a row and a column times is a bound on the error of their product in float64: its roundings,
    three in the factors, and one in the sum."""
    return int(factors.up.shape[1] + 4) * 2.0**-53 * (1 + 2.0**-10)


def _sum_double(base: Array, ref: TensorRef, factors: Factors, dtype: str, at: tuple[Array, Array] | None) -> Array:
    """The rounded sums as bits, by way of float64: of a block of rows, or of single elements ``at`` (rows, columns)."""
    import numpy as np

    if not np.isfinite(base).all():
        raise nonfinite(ref)
    if at is None:
        sums = factors.up @ factors.down.T
        error = factors.rows[:, None] * factors.columns
    else:
        sums = np.einsum("nk,nk->n", factors.up[at[0]], factors.down[at[1]])
        error = factors.rows[at[0]] * factors.columns[at[1]]
    sums += base
    error *= _double_error(factors)
    error += np.abs(sums) * 2.0**-52
    infinity = _GRID[dtype][3]
    low, high = rounded_ends(sums, error, dtype)
    bits = high.copy()
    for index in zip(*np.nonzero((low != high) & np.isfinite(sums)), strict=True):
        row, column = index if at is None else (at[0][index], at[1][index])
        bits[index] = nearest(Fraction(float(base[index])) + factors.at(row, column), dtype)
    if ((bits & infinity) == infinity).any():
        raise overflow(ref, dtype)
    return bits


def rounded_ends(sums: Array, error: Array, dtype: str) -> tuple[Array, Array]:
    """The bits of ``sums - error`` and of ``sums + error`` in ``dtype``: where they are equal, they are the sum's."""
    import numpy as np

    kind = _GRID[dtype][2]
    low, high = (np.frombuffer(encode(end, dtype), dtype=kind) for end in (sums - error, sums + error))
    return low.reshape(sums.shape), high.reshape(sums.shape)


def nearest(total: Fraction, dtype: str) -> int:
    """The bits of the number of ``dtype`` that is nearest to an exact one (ties to even)."""
    import numpy as np

    bits, smallest, kind, _ = _GRID[dtype]
    exponent = max(math.frexp(float(total))[1] - bits, smallest)
    rounded = float(round(total / Fraction(2) ** exponent) * Fraction(2) ** exponent)
    signed = math.copysign(rounded, -1.0 if total < 0 else 1.0)
    return int(np.frombuffer(encode(np.array([signed]), dtype), dtype=kind)[0])


def nonfinite(ref: TensorRef) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the base holds NaN or Inf: {printable(ref.name)}",
        where=ref.file.shown,
        why="what is added to it stays NaN or Inf, and the model makes noise",
        hint="fetch or copy the base again",
        slug="nonfinite",
    )


def overflow(ref: TensorRef, dtype: str) -> CorruptCheckpoint:
    word = next(word for word, name in DTYPE_WORDS.items() if name == dtype)
    return CorruptCheckpoint(
        f"the fused numbers of {printable(ref.name)} are too large for {word}",
        where=ref.file.shown,
        why="the adapter is far too strong for this base: a wrong scale or strength, or another model's adapter",
        hint="check the scale that was printed, or store the model in a wider dtype: --dtype bf16",
        slug="overflow",
    )

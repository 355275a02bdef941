"""Is each stored number the exact ``base + up @ down``, rounded once? In blocks of rows, by interval arithmetic.

The product is made in float32 for 16-bit tensors and in float64 for wider ones. An element is settled where the whole
interval that the product's a-priori error leaves lies in the cell of the numbers that round to the stored one; the few
others are computed again in float64. So every statement is one about the exact sum, up to float64's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraconv.lazy import TensorRef, decode, whole
from loraconv.names import DTYPE_BYTES, numel
from loraconv.verifier.fused.figures import LAYOUT, Figures, judge
from loraconv.verifier.fused.whole import Whole
from loraconv.verifier.numbers import same_bytes

try:
    from loraconv.verifier.fused import _cells
except ImportError:  # installed without a compiler: numpy does the same, more slowly
    _cells = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

#: Bytes of a block of rows: large enough that calls cost little, small enough for a processor's cache.
BLOCK_BYTES = 1 << 19
#: Above this share of unsettled elements, float64 for all of a block takes less time than picking them out.
MANY = 1 / 50 if _cells is None else 1 / 10
#: Products that are added up in float32 in one go.
_SUM = 128
#: What float64 leaves of a delta that is no product, relative: norms of up to 4096 numbers, each off by a unit or two.
_OF_WHOLE = 2.0**-40
#: Factors count as at least this large in the bound, which so covers what float32 loses of the smallest products.
_LEAST = 2.0**-55


@dataclass(frozen=True, slots=True)
class Delta:
    """The sum of low-rank products: ``up @ down`` with ``up`` (out, all ranks), scaled, ``down`` (all ranks, in).

    ``wholes`` are added to it, each times its factor, and have no small factors; then all is done in float64.
    ``columns`` is ``down`` transposed in memory; ``up32`` and ``down32`` are rounded to float32; ``lengths`` (out, 1)
    and ``widths`` (1, in) are the norms of the rows of ``up`` and of the columns of ``down``.
    """

    up: Array
    down: Array
    columns: Array
    up32: Array
    down32: Array
    lengths: Array
    widths: Array
    wholes: tuple[tuple[float, Whole], ...] = ()

    @classmethod
    def of(cls, up: Array, down: Array, wholes: tuple[tuple[float, Whole], ...] = ()) -> Delta:
        """From float64 factors."""
        import numpy as np

        with np.errstate(over="ignore", invalid="ignore"):
            lengths, widths = np.linalg.norm(up, axis=1, keepdims=True), np.linalg.norm(down, axis=0, keepdims=True)
            columns = np.ascontiguousarray(down.T)
            singles = up.astype(np.float32), down.astype(np.float32)
            return cls(up, down, columns, *singles, lengths, widths, wholes)

    @property
    def rank(self) -> int:
        """The number of products in an element. Times the unit roundoff and ``|up_i| |down_j|``, this and a few more
        for the factors' own roundings bound the element's error (Higham, Accuracy and Stability, section 3.5)."""
        return int(self.down.shape[0])

    @property
    def moves(self) -> bool:
        """False for a product of zeros."""
        return bool(self.wholes) or bool(self.up.any())

    def rows(self, start: int, stop: int) -> Array:
        """Rows in float64."""
        made: Array = self.up[start:stop] @ self.down
        for factor, other in self.wholes:
            made += factor * other.rows(start, stop)
        return made

    def at(self, rows: Array, columns: Array) -> Array:
        """Single elements in float64."""
        import numpy as np

        found: Array = np.einsum("ij,ij->i", self.up[rows], self.columns[columns])
        return found


def measure(base: TensorRef, stored: TensorRef, delta: Delta) -> Figures:
    """Compare a matrix (both references are of its shape) with base + delta, a block of rows at a time."""
    total = Figures()
    for start, stop in row_blocks(stored):
        block = numbers(base.rows(start, stop), stored.dtype), numbers(stored.rows(start, stop), stored.dtype)
        total = total + compare_block(*block, delta, start, stored.dtype)
    return total


def is_rounded(base: TensorRef, stored: TensorRef, seen: Callable[[bytes], None] | None = None) -> bool:
    """True if ``stored`` has the bytes of ``base``, or, in another dtype, its numbers, each rounded once. ``seen`` is
    given the same bytes, in pieces."""
    if base.dtype == stored.dtype:
        return same_bytes(base, stored, seen)
    matrix = _matrix(base)
    return not measure(matrix, _matrix(stored), _nothing(matrix.shape)).misrounded


def _matrix(ref: TensorRef) -> TensorRef:
    """The same bytes as a matrix."""
    columns = ref.shape[-1] if ref.shape else 1
    return replace(ref, shape=(numel(ref.shape[:-1]), columns))


def _nothing(shape: tuple[int, ...]) -> Delta:
    """A delta of rank 0."""
    import numpy as np

    return Delta.of(np.zeros((shape[0], 0)), np.zeros((0, shape[1])))


def row_blocks(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """``(first, last + 1)`` of blocks of rows of about :data:`BLOCK_BYTES`."""
    rows, columns = ref.shape
    step = max(1, BLOCK_BYTES // DTYPE_BYTES[ref.dtype] // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def numbers(ref: TensorRef, stored: str) -> Array:
    """A tensor's values, exactly: in float32 where it and the dtype ``stored`` allow it, else in float64."""
    import numpy as np

    raw = whole(ref)
    if ref.dtype == "F64" or stored in ("F32", "F64"):
        return decode(raw, ref.dtype).reshape(ref.shape)
    if ref.dtype == "F32":
        return np.frombuffer(raw, dtype="<f4").reshape(ref.shape)
    if ref.dtype == "F16":
        single: Array = np.empty(ref.shape, dtype=np.float32)
        if _cells is not None and not _flushes() and _cells.widen(raw, single):
            return single
        return _from_half(np.frombuffer(raw, dtype="<i2")).reshape(ref.shape)
    wide: Array = np.left_shift(np.frombuffer(raw, dtype="<u2"), 16, dtype=np.uint32)
    return wide.view(np.float32).reshape(ref.shape)


def _from_half(bits: Array) -> Array:
    """float16 bits (as int16) to float32: the fields moved into place and the exponent's bias made up for by a product,
    which is exact, and many times as fast as numpy's own cast."""
    import numpy as np

    if _flushes() or np.any(np.bitwise_and(bits, 0x7C00) == 0x7C00):  # Inf or NaN
        return bits.view(np.float16).astype(np.float32)
    wide = np.left_shift(bits, 13, dtype=np.int32)
    wide &= np.int32(-0x70000001)  # without the copies of the sign between the sign and the exponent
    single: Array = np.multiply(wide.view(np.float32), np.float32(2.0**112))
    return single


def _flushes() -> bool:
    """True where the processor takes the smallest numbers for zero, as fast-math code may have told it to."""
    import numpy as np

    return bool(np.float32(2.0**-149) * np.float32(2) == 0)


def compare_block(base: Array, stored: Array, delta: Delta, start: int, dtype: str) -> Figures:
    """The figures of rows ``start`` and on, given as :func:`numbers` of the base and of what is stored in ``dtype``."""
    import numpy as np

    stop = start + len(stored)
    if delta.wholes and stored.dtype == np.float32:
        base, stored = base.astype(np.float64), stored.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product, error = _product(delta, start, stop, stored.dtype)
        lengths, widths = (np.maximum(x, _LEAST) for x in (delta.lengths[start:stop], delta.widths))
        lengths *= error
        if _cells is not None and stored.dtype == np.float32:
            figures, doubtful = _compare_compiled(base, stored, product, lengths, widths, dtype)
        else:
            room = np.multiply(lengths, widths, dtype=stored.dtype, casting="unsafe")
            if delta.wholes:
                room += (np.abs(product) + np.abs(base)) * _OF_WHOLE
            figures, doubtful = _compare(base, stored, product, room, dtype)
        if doubtful.size <= stored.size * MANY:
            doubtful = _unconfirmed(base, stored, delta, start, dtype, doubtful)
        if not np.isfinite(figures.rest):  # what is not finite has to be counted, right or not
            doubtful = np.union1d(doubtful, np.flatnonzero(~np.isfinite(stored)))
        figures = replace(figures, worst_row=start)
        if not doubtful.size:
            return figures
        if stored.dtype == np.float32 and doubtful.size > stored.size * MANY:
            return compare_block(base.astype(np.float64), stored.astype(np.float64), delta, start, dtype)
        return figures + _judged(base, stored, delta, start, dtype, doubtful, product)


def _compare(base: Array, stored: Array, product: Array, room: Array, dtype: str) -> tuple[Figures, Array]:
    """The figures of a block as far as its sums go, and the flat numbers of the elements that are not settled yet."""
    import numpy as np

    exact = base + product
    residual = stored - exact
    size = float(np.vdot(product, product))
    figures = Figures(
        elements=stored.size,
        changed=int(np.count_nonzero(stored != base)),
        along=size + float(np.vdot(residual, product)),
        size=size,
        rest=float(np.vdot(residual, residual)),
    )
    return figures, np.flatnonzero(_unsettled(exact, stored, room, dtype))


def _compare_compiled(
    base: Array, stored: Array, product: Array, lengths: Array, widths: Array, dtype: str
) -> tuple[Figures, Array]:
    """The same of float32 arrays, in one pass."""
    import numpy as np

    unsettled = np.empty(stored.shape, dtype=np.int64)
    room, reach = (lengths.astype(np.float32), widths.astype(np.float32)), _reach(stored, dtype)
    least, near = _spacing(stored, dtype)
    count, changed, along, size, rest = _cells.compare(base, stored, product, *room, least, near, reach, unsettled)
    figures = Figures(elements=stored.size, changed=int(changed), along=size + along, size=size, rest=rest)
    return figures, unsettled.ravel()[:count]


def _unconfirmed(base: Array, stored: Array, delta: Delta, start: int, dtype: str, doubtful: Array) -> Array:
    """The elements of float32 arrays that float64 does not settle either; without a compiler all of them."""
    if _cells is None or stored.itemsize != 4:
        return doubtful
    rows = slice(start, start + len(stored))
    factors = delta.up[rows], delta.columns, delta.lengths[rows], delta.widths
    unit, reach = (delta.rank + 8) * 2.0**-53, _reach(delta.up, dtype)
    return doubtful[: _cells.confirm(base, stored, *factors, unit, *_spacing(delta.up, dtype), reach, doubtful)]


def _product(delta: Delta, start: int, stop: int, work: Any) -> tuple[Array, float]:
    """Rows of the delta in the dtype that is worked in, and what ``|up_i| |down_j|`` times is a bound on their error:
    the unit roundoff times the length of the sums, which is why long ones are made in parts."""
    import numpy as np

    if work == np.float64:
        return delta.rows(start, stop), (delta.rank + 8) * 2.0**-53
    parts = [slice(first, first + _SUM) for first in range(0, max(1, delta.rank), _SUM)]
    product: Array = delta.up32[start:stop, parts[0]] @ delta.down32[parts[0]]
    for part in parts[1:]:
        product += delta.up32[start:stop, part] @ delta.down32[part]
    return product, (min(_SUM, delta.rank) + len(parts) + 8) * 2.0**-24


def _unsettled(exact: Array, stored: Array, room: Array, dtype: str) -> Array:
    """False where every number within ``room`` of the exact one rounds to the stored one. Overwrites ``exact``.

    Seen as integers, the floating-point numbers that round to one stored number are a run around it, half as long to
    either side as the mantissa bits that rounding drops; two of them are left for the roundings of the sums themselves.
    """
    import numpy as np

    integer = np.uint32 if stored.dtype == np.float32 else np.uint64
    reach = _reach(stored, dtype)
    if not reach:  # float64 itself: nothing is settled before the float64 noise is counted in
        return np.ones(stored.shape, dtype=bool)
    first = np.subtract(stored.view(integer), integer(reach))
    low = (exact - room).view(integer)
    np.subtract(low, first, out=low)
    high = np.add(exact, room, out=exact).view(integer)
    np.subtract(high, first, out=high)
    unsettled: Array = np.greater(np.maximum(low, high, out=low), integer(2 * reach))
    return unsettled


def _reach(work: Array, dtype: str) -> int:
    """How many numbers of the dtype worked in, to either side of a stored one, surely round to it; 0 where it has no
    more bits than ``dtype``."""
    import numpy as np

    dropped = int(np.finfo(work.dtype).nmant) - LAYOUT[dtype][0]
    return (1 << (dropped - 1)) - 2 if dropped else 0


def _spacing(work: Array, dtype: str) -> tuple[float, float]:
    """The smallest normal number, and what is surely less than half of the distance of the numbers below it."""
    import numpy as np

    digits, least, _ = LAYOUT[dtype]
    return 2.0**least, 2.0 ** (least - digits - 1) * (1 - 2.0 ** -(int(np.finfo(work.dtype).nmant) // 2))


def _judged(base: Array, stored: Array, delta: Delta, start: int, dtype: str, chosen: Array, product: Array) -> Figures:
    """The counts of the elements ``chosen`` (flat numbers in the block), from float64."""
    import numpy as np

    rows, columns = np.divmod(chosen, stored.shape[1])
    added = delta.at(rows + start, columns) if stored.dtype == np.float32 else product.ravel()[chosen]
    before = base.ravel()[chosen].astype(np.float64)
    lengths = delta.lengths[rows + start, 0] * delta.widths[0, columns]
    if delta.wholes:
        lengths = lengths + np.linalg.norm(product, axis=1)[rows]
    return replace(
        judge(stored.ravel()[chosen].astype(np.float64), before, added, lengths * (delta.rank + 8), dtype),
        worst_row=start,
    )

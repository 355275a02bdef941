"""Are two adapters the same delta, module by module? And where they are not, how far and in which way apart.

Two adapters may factor one delta differently, so the factors decide only where they are equal number for number;
elsewhere the deltas are compared: ``|| s1 B1 A1 - s2 B2 A2 ||_F``, from products of rank size alone, against what half
a unit in the last place of the stored numbers of either side can make of it. A Kronecker product and a delta of another
grid are compared a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraconv.verifier.numbers import (
    Held,
    Pair,
    compare,
    difference_norm,
    in_memory,
    norm_by_grams,
    room_of,
    same_numbers,
    values,
)
from loraconv.verifier.parallel import in_parallel

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Pairs = Mapping[str, Pair]
#: Numbers of a block of rows.
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module of both adapters: ``equal`` number for number, or the relative Frobenius error and its bound.

    ``norm`` is that of the first adapter's delta; ``error`` and ``bound`` are relative to it (absolute if it is 0).
    ``near`` says that every number of one side is the other's rounded once, which is more than a small error.
    """

    module: str
    equal: bool
    error: float
    bound: float
    norm: float
    near: bool = False

    @property
    def same(self) -> bool:
        return self.equal or self.error <= self.bound < float("inf")


def compare_adapters(one: Pairs, other: Pairs, bound: float | None = None) -> list[ModuleResult]:
    """The modules that both have, in the order of the first. ``bound`` replaces the one from the dtypes."""
    return list(in_parallel(lambda m: compare_module(m, one[m], other[m], bound), [m for m in one if m in other]))


def compare_module(module: str, one: Pair, other: Pair, bound: float | None = None) -> ModuleResult:
    """Compare one module; adapters of another shape are infinitely far apart, ranks may differ."""
    one, other = held(one), held(other)  # each factor is looked at many times
    first = Grams.of(one)
    norm = first.norm
    if not one.fits(other):
        return ModuleResult(module, False, float("inf"), 0.0, norm)
    outcome = compare(one, other)
    if outcome.equal:
        return ModuleResult(module, True, 0.0, bound or 0.0, norm, near=True)
    near = outcome.within or compare(other, one).within
    error = distance(one, other)
    room = max(first.room(), Grams.of(other).room()) if bound is None else bound * norm
    scale = norm or 1.0
    return ModuleResult(module, False, error / scale, room / scale, norm, near)


def held(pair: Pair) -> Pair:
    """The same pair in memory."""
    return replace(pair, down=in_memory(pair.down), up=in_memory(pair.up))


def sides(pair: Pair) -> tuple[Array, Array]:
    """``(scale * up, down)`` in float64."""
    return values(pair.up) * float(pair.scale), values(pair.down)


def rows_of(pair: Pair, start: int, stop: int) -> Array:
    """Rows of the delta, not scaled, in float64."""
    import numpy as np

    if pair.grid is None:
        return np.asarray(values(pair.up)[start:stop] @ values(pair.down))
    n1, m1, n2, m2 = pair.grid
    first, last = start // n2, -(-stop // n2)
    left = values(pair.up).reshape(n1, m1)[first:last]
    return np.kron(left, values(pair.down).reshape(n2, m2))[start - first * n2 : stop - first * n2]


def distance(one: Pair, other: Pair) -> float:
    """The Frobenius norm of the difference of two deltas of one shape; infinite for NaN or Inf.

    Of two grids it is summed over the numbers of the difference, in which nothing cancels but what is equal: float64
    leaves each off by ``(rank + 3) * 2**-53 * |up_i| |down_j|``.
    """
    import numpy as np

    if one.grid == other.grid:
        return difference_norm(*sides(one), *sides(other))
    if not (is_finite(one) and is_finite(other)):
        return float("inf")
    total = sum(float(np.vdot(gap, gap)) for gap in (x - y for x, y in _both(one, other)))
    return float(np.sqrt(total))


def inner(one: Pair, other: Pair) -> float:
    """The sum of the products of the numbers of two deltas of one shape."""
    import numpy as np

    if one.grid != other.grid:
        return float(sum(np.vdot(x, y) for x, y in _both(one, other)))
    (up, down), (up_other, down_other) = sides(one), sides(other)
    return float(np.sum((up.T @ up_other) * (down @ down_other.T)))


def _both(one: Pair, other: Pair) -> Iterator[tuple[Array, Array]]:
    """The numbers of two deltas, a block of rows at a time."""
    first, second = held(one), held(other)
    rows, _, columns = one.shape
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield rows_of(first, start, stop) * float(one.scale), rows_of(second, start, stop) * float(other.scale)


@dataclass(frozen=True, slots=True)
class Grams:
    """A pair's factors in float64, not scaled, and their Gram matrices, from which norms follow at rank size."""

    pair: Pair
    up: Array
    down: Array
    gram_up: Array
    gram_down: Array

    @classmethod
    def of(cls, pair: Pair) -> Grams:
        up, down = values(pair.up), values(pair.down)
        return cls(pair, up, down, up.T @ up, down @ down.T)

    @property
    def norm(self) -> float:
        """``|| scale * up @ down ||_F``."""
        return norm_by_grams(self.up, self.down, self.gram_up, self.gram_down) * abs(float(self.pair.scale))

    def room(self, dtype: str = "") -> float:
        """What half a unit in the last place of every stored number can change the delta by, in the Frobenius norm.

        ``dtype`` stands for the one that the numbers are stored in, if another is meant. ``|| X Y ||_F`` is at most
        ``|| X ||_F`` times the greatest singular value of ``Y``, and the other way round.
        """
        import numpy as np

        d_up, d_down = (float(np.linalg.norm(room_of(tensor, dtype))) for tensor in (self.pair.up, self.pair.down))
        s_up, s_down = _spectral(self.gram_up), _spectral(self.gram_down)
        # The last term: float64 itself, in the products.
        own = float(np.linalg.norm(self.up)) * float(np.linalg.norm(self.down)) * 2.0**-45
        return abs(float(self.pair.scale)) * (d_up * s_down + s_up * d_down + d_up * d_down + own)

    def relative_room(self, dtype: str = "") -> float:
        """:meth:`room` relative to the norm of the delta; infinite for a delta of zero."""
        return self.room(dtype) / self.norm if self.norm else float("inf")


def delta_norm(pair: Pair) -> float:
    """``|| scale * up @ down ||_F``."""
    return Grams.of(pair).norm


def relative_room(pair: Pair, dtype: str = "") -> float:
    """:meth:`Grams.relative_room`."""
    return Grams.of(pair).relative_room(dtype)


def _spectral(gram: Array) -> float:
    """The greatest singular value of the factor with this Gram matrix (rank by rank); infinite for NaN or Inf."""
    import numpy as np

    if not np.isfinite(gram).all():
        return float("inf")
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))) if gram.size else 0.0


def projection(one: Pair, other: Pair) -> tuple[float, float]:
    """``(c, rest)``: the constant that brings the first delta nearest to the second, and the relative error left then.

    ``c = <D1, D2> / <D1, D1>`` by traces of rank-sized products; both 0 where a delta is zero or shapes differ.
    """
    return likeness(one, other)[:2]


def likeness(one: Pair, other: Pair) -> tuple[float, float, float]:
    """``(c, rest, tolerance)``: those of :func:`projection` and :func:`tolerance`."""
    import numpy as np

    first, second = Grams.of(one), Grams.of(other)
    room, own, size = _tolerance(first, second), first.norm**2, second.norm
    if not one.fits(other) or not 0 < own < np.inf or not 0 < size < np.inf:
        return 0.0, float("inf"), room
    constant = inner(one, other) / own
    return constant, distance(replace(one, scale=float(one.scale) * constant), other) / size, room


def tolerance(one: Pair, other: Pair) -> float:
    """The relative error that is no difference: what the roundings of either side's stored numbers can make; 0 where a
    delta is zero, which is like no other."""
    return _tolerance(Grams.of(one), Grams.of(other))


def _tolerance(one: Grams, other: Grams) -> float:
    room = max(one.relative_room(), other.relative_room())
    return room if room < float("inf") else 0.0


def is_zero(pair: Pair) -> bool:
    """True if a factor or the scale is zero, so that the delta is."""
    return not (values(pair.up).any() and values(pair.down).any() and pair.scale)


def is_finite(pair: Pair) -> bool:
    """False if a factor holds NaN or Inf."""
    import numpy as np

    return bool(np.isfinite(values(pair.up)).all() and np.isfinite(values(pair.down)).all())


def transposed(pair: Pair) -> Pair:
    """The pair whose delta is the transpose."""
    if pair.grid is not None:
        n1, m1, n2, m2 = pair.grid
        up, down = values(pair.up).reshape(n1, m1).T, values(pair.down).reshape(n2, m2).T
        turned = Held(down.ravel()[None], pair.down.dtype), Held(up.ravel()[:, None], pair.up.dtype)
        return Pair(*turned, pair.scale, (m1, n1, m2, n2))
    return Pair(Held(values(pair.up).T, pair.up.dtype), Held(values(pair.down).T, pair.down.dtype), pair.scale)


def rounded_through(pair: Pair, dtype: str) -> bool:
    """True if every number of both factors is one of the narrower ``dtype``."""
    from loraconv.lazy import decode, encode

    for tensor in (pair.up, pair.down):
        array = values(tensor).ravel()
        if not same_numbers(decode(encode(array, dtype), dtype), array):
            return False
    return True

"""Are two adapters the same delta, module by module? And where they are not, how far and in which way apart.

Two adapters may factor one delta differently, so the factors decide only where they are equal number for number;
elsewhere the deltas are compared: ``|| s1 B1 A1 - s2 B2 A2 ||_F`` from the QR of the stacked factors, at rank size,
against what half a unit in the last place of the stored numbers of either side can make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraconv.verifier.numbers import Held, Pair, compare, difference_norm, product_norm, same_numbers, slack, values

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Pairs = Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module of both adapters: ``equal`` number for number, or the relative Frobenius error and its bound.

    ``norm`` is that of the first adapter's delta; ``error`` and ``bound`` are relative to it (absolute if it is 0).
    """

    module: str
    equal: bool
    error: float
    bound: float
    norm: float

    @property
    def same(self) -> bool:
        return self.equal or self.error <= self.bound


def compare_adapters(one: Pairs, other: Pairs, bound: float | None = None) -> list[ModuleResult]:
    """The modules that both have, in the order of the first. ``bound`` replaces the one from the dtypes."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):  # a factor may hold NaN or Inf: then the module is not the same
        return [compare_module(m, one[m], other[m], bound) for m in one if m in other]


def compare_module(module: str, one: Pair, other: Pair, bound: float | None = None) -> ModuleResult:
    """Compare one module; adapters of another shape are infinitely far apart, ranks may differ."""
    norm = delta_norm(one)
    if (one.shape[0], one.shape[2]) != (other.shape[0], other.shape[2]):
        return ModuleResult(module, False, float("inf"), 0.0, norm)
    if one.shape == other.shape and compare(one, other).equal:
        return ModuleResult(module, True, 0.0, bound or 0.0, norm)
    error = difference_norm(*sides(one), *sides(other))
    room = max(_room(one), _room(other)) if bound is None else bound * norm
    scale = norm or 1.0
    return ModuleResult(module, False, error / scale, room / scale, norm)


def sides(pair: Pair) -> tuple[Array, Array]:
    """``(scale * up, down)`` in float64."""
    return values(pair.up) * float(pair.scale), values(pair.down)


def delta_norm(pair: Pair) -> float:
    """``|| scale * up @ down ||_F``."""
    return product_norm(*sides(pair))


def relative_room(pair: Pair, dtype: str | None = None) -> float:
    """:func:`_room` relative to the norm of the delta; infinite for a delta of zero."""
    norm = delta_norm(pair)
    return _room(pair, dtype) / norm if norm else float("inf")


def _room(pair: Pair, dtype: str | None = None) -> float:
    """What half a unit in the last place of every stored number can change the delta by, in the Frobenius norm.

    ``dtype`` stands for the one that the numbers are stored in, if another is meant.
    """
    import numpy as np

    up, down = values(pair.up), values(pair.down)
    d_up, d_down = (float(np.linalg.norm(slack(x, dtype or t.dtype))) for x, t in ((up, pair.up), (down, pair.down)))
    n_up, n_down = float(np.linalg.norm(up)), float(np.linalg.norm(down))
    # The last term: float64 itself, in the QR and the products.
    return abs(float(pair.scale)) * (d_up * n_down + n_up * d_down + d_up * d_down + n_up * n_down * 2.0**-45)


def projection(one: Pair, other: Pair) -> tuple[float, float]:
    """``(c, rest)``: the constant that brings the first delta nearest to the second, and the relative error left then.

    ``c = <D1, D2> / <D1, D1>`` by traces of rank-sized products; both 0 where a delta is zero or shapes differ.
    """
    import numpy as np

    if (one.shape[0], one.shape[2]) != (other.shape[0], other.shape[2]):
        return 0.0, float("inf")
    (up, down), (up_other, down_other) = sides(one), sides(other)
    own = float(np.sum((up.T @ up) * (down @ down.T)))
    size = product_norm(up_other, down_other)
    if not own > 0 or not size > 0 or not np.isfinite(size):
        return 0.0, float("inf")
    constant = float(np.sum((up.T @ up_other) * (down @ down_other.T))) / own
    return constant, difference_norm(up * constant, down, up_other, down_other) / size


def is_zero(pair: Pair) -> bool:
    """True if a factor or the scale is zero, so that the delta is."""
    return not (values(pair.up).any() and values(pair.down).any() and pair.scale)


def is_finite(pair: Pair) -> bool:
    """False if a factor holds NaN or Inf."""
    import numpy as np

    return bool(np.isfinite(values(pair.up)).all() and np.isfinite(values(pair.down)).all())


def transposed(pair: Pair) -> Pair:
    """The pair whose delta is the transpose."""
    return Pair(Held(values(pair.up).T, pair.up.dtype), Held(values(pair.down).T, pair.down.dtype), pair.scale)


def rounded_through(pair: Pair, dtype: str) -> bool:
    """True if every number of both factors is one of the narrower ``dtype``."""
    from loraconv.lazy import decode, encode

    for tensor in (pair.up, pair.down):
        array = values(tensor).reshape(-1)
        if not same_numbers(decode(encode(array, dtype), dtype), array):
            return False
    return True

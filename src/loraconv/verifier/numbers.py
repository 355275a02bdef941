"""When two stored numbers are the same, and how far apart two low-rank products are.

The bounds come from the dtypes alone: a number stored once in a dtype may be half a unit in the last place away from
the exact one, and no more. Error of a product: ``|| s1 B1 A1 - s2 B2 A2 ||_F`` at rank size, with no full-size product
and without the cancellation that the Gram matrix of the difference would bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loraconv.lazy import Lazy, read

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: dtype -> (half a unit in the last place, relative; half of the smallest number above zero).
HALF_ULP = {
    "F64":  (2.0**-53, 2.0**-1074),
    "F32":  (2.0**-24, 2.0**-150),
    "F16":  (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 2.0**-134),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, as values: what a control makes out of a stored one. ``room`` is that of :class:`Computed`,
    None where the values are as they are stored."""

    values: Array
    dtype: str
    room: Callable[[str], Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that is computed from stored ones whenever its values are asked for, so that none is kept.

    ``room`` says how far each value may be from the exact one if those were rounded once to a dtype (empty: each to
    its own).
    """

    make: Callable[[], Array]
    room: Callable[[str], Array]
    dtype: str
    shape: tuple[int, ...]


Tensor = Lazy | Held | Computed


def values(tensor: Tensor) -> Array:
    """The tensor's values in float64."""
    if isinstance(tensor, Computed):
        return tensor.make()
    return tensor.values if isinstance(tensor, Held) else read(tensor)


def in_memory(tensor: Tensor) -> Held:
    """The same tensor, its values read or computed."""
    if isinstance(tensor, Held):
        return tensor
    return Held(values(tensor), tensor.dtype, tensor.room if isinstance(tensor, Computed) else None)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module by a format's own definition: ``delta = scale * up @ down``.

    With ``grid`` = (n1, m1, n2, m2) the delta is ``scale * kron(w1, w2)``, and ``up`` is w1 (n1, m1) as a column,
    ``down`` is w2 (n2, m2) as a row. Their product has the numbers of the delta in another order (Van Loan and
    Pitsianis, Approximation with Kronecker products, 1993), so that norms and distances of deltas of one grid are
    those of the products, of rank 1. ``kernel`` has the sizes of a convolution's kernel, as far as the tensors have it.
    """

    down: Tensor
    up: Tensor
    scale: Fraction | float
    grid: tuple[int, int, int, int] | None = None
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(out, rank, in)`` of the delta; of a Kronecker product the greatest rank that it may have."""
        if self.grid is None:
            return self.up.shape[0], self.down.shape[0], self.down.shape[1]
        n1, m1, n2, m2 = self.grid
        return n1 * n2, min(n1, m1) * min(n2, m2), m1 * m2

    def fits(self, other: Pair) -> bool:
        """True if both deltas are added to a weight of one shape."""
        one, two = self.shape, other.shape
        kernels = {pair.kernel for pair in (self, other) if pair.kernel}
        return (one[0], one[2]) == (two[0], two[2]) and len(kernels) < 2

    def keeps_kernel_of(self, other: Pair) -> bool:
        """True if the tensors have the kernel that those of ``other`` have, if any."""
        return not other.kernel or self.kernel == other.kernel

    @property
    def kind(self) -> tuple[object, ...]:
        """What two pairs have in common whose factors can be compared number for number."""
        return (*self.shape, self.grid)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an output must be: the source's pairs by module, and the dtype of both factors (down, up) of each."""

    pairs: Mapping[str, Pair]
    dtypes: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """``equal``: the same numbers. Else ``within`` half a unit in the last place of them, or not."""

    equal: bool
    within: bool


def compare(expected: Pair, stored: Pair) -> Outcome:
    """Whether ``stored`` is ``expected``, element by element of both factors, the scale counted into ``up``."""
    if expected.kind != stored.kind:
        return Outcome(False, False)
    ratio, exact = _ratio(expected.scale, stored.scale)
    if (
        same_numbers(_rescaled(expected.up, ratio), values(stored.up))
        and exact
        and same_numbers(values(expected.down), values(stored.down))
    ):
        return Outcome(True, True)
    down, up = values(expected.down), _rescaled(expected.up, ratio)
    near_down = _near(down, values(stored.down), _room(down, stored.down))
    return Outcome(False, near_down and _near(up, values(stored.up), _up_room(up, stored.up, exact)))


def relative_error(expected: Pair, stored: Pair) -> tuple[float, float]:
    """``(error, bound)`` of the stored delta in the Frobenius norm, relative to the expected one, both in float64.

    The bound is what half a unit in the last place of every stored number can make of it. An expected delta of zero
    gives both as absolute values. Infinity and NaN, which :func:`compare` looks at one by one, count as zero.
    """
    if expected.kind != stored.kind:
        return float("inf"), 0.0
    ratio, exact = _ratio(expected.scale, stored.scale)
    down, up = _finite(values(expected.down)), _finite(_rescaled(expected.up, ratio))
    size = product_norm(up, down)
    error = difference_norm(up, down, _finite(values(stored.up)), _finite(values(stored.down)))
    d_up, d_down = _norm(_up_room(up, stored.up, exact)), _norm(_room(down, stored.down))
    room = d_up * _norm(down) + _norm(up) * d_down + d_up * d_down
    return (error / size, room / size) if size else (error, room)


def _finite(array: Array) -> Array:
    import numpy as np

    return np.where(np.isfinite(array), array, 0.0)


def _rescaled(up: Tensor, ratio: float) -> Array:
    import numpy as np

    array = values(up)
    with np.errstate(over="ignore", invalid="ignore"):
        return array if ratio == 1.0 else array * ratio


def same_numbers(one: Array, other: Array) -> bool:
    """Equal numbers, NaN where the other is NaN."""
    import numpy as np

    return bool(np.array_equal(one, other) or np.array_equal(one, other, equal_nan=True))


def _room(exact: Array, stored: Tensor) -> Array:
    """How far the stored numbers may be from the exact ones."""
    computed = isinstance(stored, Held | Computed) and stored.room is not None
    return room_of(stored) if computed else slack(exact, stored.dtype)


def _up_room(up: Array, stored: Tensor, exact: bool) -> Array:
    import numpy as np

    # A ratio that float64 cannot hold exactly adds its own rounding and that of the product.
    return _room(up, stored) if exact else _room(up, stored) + np.abs(up) * 2.0**-52


def _ratio(expected: Fraction | float, stored: Fraction | float) -> tuple[float, bool]:
    """What the expected ``up`` is multiplied by to be the stored one, and whether that product is exact."""
    if isinstance(expected, Fraction) and isinstance(stored, Fraction) and stored:
        ratio = expected / stored
        binary = ratio.denominator & (ratio.denominator - 1) == 0 and abs(ratio.numerator).bit_length() <= 28
        return float(ratio), binary
    if expected == stored:
        return 1.0, True
    return float(expected) / float(stored) if stored else float("nan"), False


def slack(exact: Array, dtype: str) -> Array:
    """How far a number stored in ``dtype`` may be from the exact one, element by element."""
    import numpy as np

    relative, least = HALF_ULP[dtype]
    size = np.abs(exact)
    # The room is that of the stored value's binade, which rounding up may have just entered.
    return np.maximum(size * relative * (1 + 2.0**-20), least)


def rounded_once(exact: Array, stored: Array, dtype: str) -> bool:
    """True if every number that is stored in ``dtype`` is within half a unit in the last place of the exact one."""
    return _near(exact, stored, slack(exact, dtype))


def room_of(tensor: Tensor, dtype: str = "") -> Array:
    """How far a tensor's values may be from the exact ones. ``dtype`` stands for its own, if another is meant."""
    if isinstance(tensor, Held | Computed) and tensor.room is not None:
        return tensor.room(dtype)
    return slack(values(tensor), dtype or tensor.dtype)


def _near(one: Array, other: Array, room: Array) -> bool:
    import numpy as np

    with np.errstate(invalid="ignore"):
        # The room around an infinity is infinite, and only that infinity is meant.
        near = np.isfinite(one) & (np.abs(one - other) <= room)
        return bool(np.all(near | (np.isnan(one) & np.isnan(other)) | (one == other)))


def _norm(array: Array) -> float:
    import numpy as np

    return float(np.sqrt(np.sum(np.square(array))))


def product_norm(up: Array, down: Array) -> float:
    """``|| up @ down ||_F`` through the triangular factors of both."""
    import numpy as np

    if not (np.isfinite(up).all() and np.isfinite(down).all()):
        return float("inf")
    left = np.asarray(np.linalg.qr(up, mode="r"))
    right = np.asarray(np.linalg.qr(down.T, mode="r"))
    return _norm(left @ right.T)


def gram_norm(up: Array, down: Array) -> float:
    """``|| up @ down ||_F`` through the Gram matrices."""
    return norm_by_grams(up, down, up.T @ up, down @ down.T)


def norm_by_grams(up: Array, down: Array, gram_up: Array, gram_down: Array) -> float:
    """The same from Gram matrices that are there: several times as fast as a QR, and as exact unless the factors nearly
    cancel each other, where that is taken."""
    import numpy as np

    square = float(np.sum(gram_up * gram_down))
    exact = square > 2.0**-12 * float(np.trace(gram_up)) * float(np.trace(gram_down))
    return float(np.sqrt(square)) if exact and np.isfinite(square) else product_norm(up, down)


def difference_norm(up: Array, down: Array, other_up: Array, other_down: Array) -> float:
    """``|| up @ down - other_up @ other_down ||_F``, at rank size; infinite for NaN or Inf.

    For any ``X`` the difference is ``up @ (down - X @ other_down) + (up @ X - other_up) @ other_down``. With the ``X``
    of least squares both parts are as small as their sum, so that Gram matrices cancel nothing: this takes half the
    time of a QR of the stacked factors, which is left for what it cannot measure to one part in a million.
    """
    import numpy as np

    if not all(np.isfinite(factor).all() for factor in (up, down, other_up, other_down)):
        return float("inf")
    for gap, same in (((up, other_up), (down, other_down)), ((down.T, other_down.T), (up.T, other_up.T))):
        if np.array_equal(*same):  # as where only alpha differs: then one factor of the difference is known
            return gram_norm(gap[0] - gap[1], same[0])
    gram, across, other_gram = up.T @ up, up.T @ other_up, other_down @ other_down.T
    turn = _least_squares(gram, across)
    first, second = down - turn @ other_down, up @ turn - other_up
    square = np.sum(gram * (first @ first.T)) + np.sum((second.T @ second) * other_gram)
    # The two parts are at right angles but for what the solution leaves. Where that counts, as with columns that are
    # nearly alike, the sums of squares are too coarse as well.
    left = _norm(gram @ turn - across) * _norm(first) * _norm(other_down)
    if left <= 2.0**-20 * square < np.inf:
        return float(np.sqrt(square))
    stacked = product_norm(np.concatenate([up, -other_up], axis=1), np.concatenate([down, other_down]))
    return stacked if np.isfinite(stacked) else float("inf")


def _least_squares(gram: Array, across: Array) -> Array:
    """The solution of ``gram @ X = across``, refined once, with columns of very different length or that depend on each
    other allowed for: the equations are balanced, and a little added to the diagonal keeps X bounded."""
    import numpy as np

    size = np.sqrt(np.diagonal(gram))
    size = np.where(size > 0, size, 1.0)[:, None]
    even = gram / (size * size.T) + 2.0**-40 * np.eye(len(gram))
    turn = np.linalg.solve(even, across / size) / size
    return np.asarray(turn + np.linalg.solve(even, (across - gram @ turn) / size) / size)


def coarse(array: Array) -> Array:
    """The values with four bits of mantissa, as an 8-bit float would leave them: a mistake for a control to make."""
    import numpy as np

    mantissa, exponent = np.frexp(array)
    rounded: Array = np.ldexp(np.round(mantissa * 16) / 16, exponent)
    return rounded


def same_bytes(one: Lazy, other: Lazy, seen: Callable[[bytes], None] | None = None) -> bool:
    """True if two tensors of one dtype and shape hold the same bytes, read a few MiB at a time.

    ``seen`` is given the bytes of ``other`` in pieces, as far as they are the same."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    streams = one.pieces(), other.pieces()
    left, right = b"", b""
    while True:
        left = left or next(streams[0], b"")
        right = right or next(streams[1], b"")
        count = min(len(left), len(right))
        if not count:
            return len(left) == len(right)
        if left[:count] != right[:count]:
            return False
        if seen is not None:
            seen(right[:count])
        left, right = left[count:], right[count:]

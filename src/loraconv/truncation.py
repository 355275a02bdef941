"""The best adapter of a smaller rank, from the factors alone: QR of both, then the SVD of a matrix of rank size.

``up @ down = (Qu Ru) (Qd Rd)' = Qu (Ru Rd') Qd'``, so the singular values of the delta are those of ``Ru Rd'``, and the
full-size product is never made. What is left out is known exactly: the root of the sum of its squared singular values
(Eckart and Young, 1936).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraconv.errors import UsageError
from loraconv.lazy import InMemory, encode
from loraconv.names import ROUNDING

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How far the rank may be cut: to ``rank``, or as long as the relative Frobenius error of each module's delta,
    the rounding of what is stored included, is at most ``error``."""

    rank: int | None = None
    error: float | None = None

    def rank_of(self, values: Array, dtype: str) -> int | None:
        """The rank for a delta with these singular values (greatest first), stored in ``dtype``; None for all of it."""
        import numpy as np

        if self.rank is not None:
            return self.rank if self.rank < len(values) else None
        assert self.error is not None
        room = self.error * norm(values) - rounding(values, dtype)
        left = tails(values)
        fitting = np.flatnonzero(left <= room)
        return max(int(fitting[0]), 1) if len(fitting) and fitting[0] < len(values) else None


def wanted(rank: int | None, energy: float | None, max_error: float | None, hint: str) -> Wanted:
    """What the user asked for; raises :class:`UsageError` unless that is one thing, and one that can be."""
    if sum(given is not None for given in (rank, energy, max_error)) != 1:
        raise UsageError("one of --rank, --energy and --max-error has to say how far to go", hint=hint)
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}", hint=hint)
    if energy is not None and not 0 < energy < 1:
        raise UsageError(f"--energy is a share above 0 and below 1, not {energy}", hint=hint)
    if max_error is not None and not 0 < max_error < 1:
        raise UsageError(f"--max-error is a relative error above 0 and below 1, not {max_error}", hint=hint)
    # The share of the squared singular values that is kept, and the relative error, say the same.
    return Wanted(rank, max_error if energy is None else math.sqrt(1 - energy))


@dataclass(frozen=True, slots=True)
class Cut:
    """The factors of the nearest delta of a smaller rank, the norm of the whole one, and the relative error.

    The root of each singular value is in either factor, so that both have numbers of like size.
    """

    down: InMemory
    up: InMemory
    norm: float
    error: float


def cut(up: Array, down: Array, how: Wanted, dtype: str) -> Cut | float:
    """The delta ``up @ down`` (both in float64) at a smaller rank, stored in ``dtype``; its norm where the rank stays.

    ``up`` is (out, rank), ``down`` is (rank, in).
    """
    import numpy as np

    left = np.linalg.qr(up, mode="r")
    basis, right = np.linalg.qr(down.T)
    _, values, turn = np.linalg.svd(left @ right.T, full_matrices=False)
    rank = how.rank_of(values, dtype)
    if rank is None or rank >= up.shape[1]:
        return norm(values)
    vectors, size = basis @ turn[:rank].T, norm(values)
    return stored(up @ (down @ vectors), vectors, values[:rank], size, float(tails(values)[rank]), dtype)


def stored(images: Array, vectors: Array, values: Array, size: float, left: float, dtype: str) -> Cut:
    """The factors of ``images @ vectors.T``, where ``images`` are a delta times some of its right singular ``vectors``
    with these ``values``. ``size`` is the norm of the delta, ``left`` that of what is left out."""
    import numpy as np

    roots = np.sqrt(values)
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    down, up = np.ascontiguousarray((vectors * roots).T), images * inverse
    return Cut(
        InMemory(encode(down, dtype), dtype, down.shape),
        InMemory(encode(up, dtype), dtype, up.shape),
        size,
        left / size if size else 0.0,
    )


def norm(values: Array) -> float:
    """The Frobenius norm of a matrix with these singular values."""
    return math.sqrt(float((values * values).sum()))


def tails(values: Array) -> Array:
    """``sqrt(values[r]**2 + values[r + 1]**2 + ...)`` for every rank r, none and all of them included."""
    import numpy as np

    squares = np.append(values * values, 0.0)
    root: Array = np.sqrt(np.cumsum(squares[::-1])[::-1])
    return root


def rounding(values: Array, dtype: str) -> float:
    """What rounding both factors once can change the delta by: each changes by a relative ``u`` of its Frobenius norm,
    ``sqrt(sum of the values)``, times the greatest singular value of the other, ``sqrt(values[0])``."""
    unit = ROUNDING[dtype]
    return (2 * unit + unit * unit) * math.sqrt(float(values[0]) * float(values.sum()))

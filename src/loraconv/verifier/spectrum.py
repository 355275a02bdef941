"""The singular values of a module's delta, from its factors alone.

``scale * up @ down = Qu (Ru Rd') Qd'`` by the QR of both factors, so that the singular values are those of a matrix of
rank size, in float64; the full-size product is never made. Those of a Kronecker product are those of its two parts,
each times each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraconv.verifier.delta import sides
from loraconv.verifier.numbers import Pair

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array


def singular_values(pair: Pair) -> tuple[float, ...]:
    """The ``min(out, rank, in)`` singular values of ``scale * up @ down``, greatest first.

    What float64 cannot tell from zero at the size of the factors is 0. Empty where a factor holds NaN or Inf.
    """
    import numpy as np

    up, down = sides(pair)
    if not (np.isfinite(up).all() and np.isfinite(down).all()):
        return ()
    if pair.grid is not None:
        found = _of_kron(up, down, pair.grid)
        return tuple(float(value) for value in np.where(found > _resolution(pair, up, down), found, 0.0))
    left, right = (np.asarray(np.linalg.qr(side, mode="r")) for side in (up, down.T))
    found = np.linalg.svd(left @ right.T, compute_uv=False)
    return tuple(float(value) for value in np.where(found > _resolution(pair, up, down), found, 0.0))


def _of_kron(up: Array, down: Array, grid: tuple[int, int, int, int]) -> Array:
    import numpy as np

    one, other = (
        np.linalg.svd(part.reshape(shape), compute_uv=False) for part, shape in ((up, grid[:2]), (down, grid[2:]))
    )
    return np.sort(np.outer(one, other).ravel())[::-1]


def _resolution(pair: Pair, up: Array, down: Array) -> float:
    """What rounding alone can add to a singular value: the QR of both factors and their product, each backward stable.

    Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., theorems 19.4 (QR) and 3.5 (products).
    """
    import numpy as np

    return sum(pair.shape) * 2.0**-52 * float(np.linalg.norm(up)) * float(np.linalg.norm(down))


def effective_rank(values: Sequence[float]) -> float:
    """``exp`` of the entropy of the singular values divided by their sum: n for n equal ones, 0 for none above zero.

    Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    total = math.fsum(values)
    shares = [value / total for value in values if value] if total else []
    return math.exp(-math.fsum(share * math.log(share) for share in shares)) if shares else 0.0

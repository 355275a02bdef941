"""The adapter nearest to a whole matrix: LAPACK's SVD for a small one, and for a large one an SVD of a random sketch.

The sketch is that of Halko, Martinsson and Tropp, Finding structure with randomness, SIAM Review 53 (2011), algorithm
4.4 with two steps of the power iteration. Its factors are the matrix projected on the directions that were found, and
the error is measured on the matrix itself: it is exact, whether or not a better direction was missed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loraconv.truncation import Cut, Wanted, stored

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: The smaller side up to which LAPACK takes less than a second.
_SMALL = 512
#: Directions beyond those that are wanted, so that the last ones are right, too.
_MORE = 16
#: Where the rank has to be found, the first guess; it is doubled until it is enough.
_FIRST = 48


def approximate(delta: Array, how: Wanted, dtype: str) -> Cut:
    """The factors of a delta (out, in; float64) at the rank that is wanted, stored in ``dtype``.

    All of its rank is kept where less does not do.
    """
    smaller = min(delta.shape)
    count = _FIRST if how.rank is None else how.rank + _MORE
    while smaller > _SMALL and count < smaller // 2:
        found = _from_sketch(delta, how, dtype, count)
        if found is not None:
            return found
        count *= 2
    return _from_svd(delta, how, dtype)


def _from_svd(delta: Array, how: Wanted, dtype: str) -> Cut:
    import numpy as np

    _, values, turn = np.linalg.svd(delta, full_matrices=False)
    rank = how.rank_of(values, dtype) or len(values)
    return _projected(delta, turn[:rank].T, values[:rank], dtype)


def _from_sketch(delta: Array, how: Wanted, dtype: str, count: int) -> Cut | None:
    """The same from ``count`` directions; None where these are not enough."""
    import numpy as np

    noise = np.random.default_rng(0).standard_normal((delta.shape[1], count))
    basis = np.linalg.qr(delta @ noise)[0]
    for _ in range(2):
        basis = np.linalg.qr(delta @ np.linalg.qr(delta.T @ basis)[0])[0]
    _, values, turn = np.linalg.svd(basis.T @ delta, full_matrices=False)
    left = math.sqrt(max(float(np.vdot(delta, delta)) - float(np.vdot(values, values)), 0.0))
    rank = how.rank_of(np.append(values, left), dtype)  # all that was not found counts as one more direction
    return None if rank is None else _projected(delta, turn[:rank].T, values[:rank], dtype)


def _projected(delta: Array, vectors: Array, values: Array, dtype: str) -> Cut:
    """The delta on the span of the right singular vectors, and what is left of it."""
    import numpy as np

    images = delta @ vectors
    left = 0.0
    for start in range(0, len(delta), 256):
        rows = slice(start, start + 256)
        left += float(np.linalg.norm(delta[rows] - images[rows] @ vectors.T)) ** 2
    return stored(images, vectors, values, float(np.linalg.norm(delta)), math.sqrt(left), dtype)

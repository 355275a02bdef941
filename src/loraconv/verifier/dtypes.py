"""Which dtype every stored factor must have: what the user asked for, or the source's, or a wider one with a reason.

The reason to widen: some module's scale stands in ``up``, and the product has numbers that the source's dtype cannot
hold. Then every factor of the adapter is widened: a consumer keeps it in one dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from loraconv.lazy import decode, encode
from loraconv.verifier.numbers import Pair, Tensor, same_numbers, values

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Pairs = Mapping[str, Pair]
Dtypes = dict[str, tuple[str, str]]


def expected_dtypes(source: Pairs, stored: Pairs, dtype: str | None, recorded: Mapping[str, str]) -> Dtypes:
    """Module -> dtypes of (down, up). ``dtype`` is the user's; ``recorded`` is, by module, the dtype that the source
    says its factors had before an earlier conversion widened them."""
    if dtype is not None:
        return dict.fromkeys(source, (dtype, dtype))
    both = {module: (pair, stored[module]) for module, pair in source.items() if module in stored}
    widened = any(not _fits(pair, other) for pair, other in both.values())
    made = {}
    for module, pair in source.items():
        wide = "F64" if pair.up.dtype == "F64" else "F32"
        made[module] = (wide, wide) if widened else (pair.down.dtype, pair.up.dtype)
        before = recorded.get(module, recorded.get(""))
        if before is None or module not in both or made[module] == (before, before):
            continue
        if _narrowed_back(*both[module], before):
            made[module] = (before, before)
    return made


def _fits(source: Pair, stored: Pair) -> bool:
    """True if the source's ``up``, at the stored scale, is representable in its own dtype."""
    import numpy as np

    if source.scale == stored.scale:
        return True
    # An alpha that float32 cannot hold is rounded where a tensor keeps it; the factors need no more room for that.
    if abs(float(stored.scale) - float(source.scale)) < float(source.scale) * 2.0**-23:
        return True
    own = source.up.dtype
    up = _rounded(values(source.up), own)
    if not up.any():
        return True
    if not (isinstance(source.scale, Fraction) and isinstance(stored.scale, Fraction) and stored.scale):
        return False
    ratio = source.scale / stored.scale
    bits = 1 if own == "F64" else 28
    if ratio.denominator & (ratio.denominator - 1) or abs(ratio.numerator).bit_length() > bits:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        product = up * float(ratio)
    return same_numbers(_rounded(product, own), product)


def _narrowed_back(source: Pair, stored: Pair, dtype: str) -> bool:
    """True if ``stored`` has the dtype of the trainer again, and gives the source's numbers when it is widened."""
    import numpy as np

    if (stored.down.dtype, stored.up.dtype) != (dtype, dtype) or not source.scale:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        again = values(stored.up) * float(stored.scale / source.scale)
    return _same(source.down, values(stored.down)) and _same(source.up, _rounded(again, source.up.dtype))


def _same(source: Tensor, array: Array) -> bool:
    return same_numbers(values(source), array)


def _rounded(array: Array, dtype: str) -> Array:
    return decode(encode(array, dtype), dtype).reshape(array.shape)

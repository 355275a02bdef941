"""Casting a tensor and folding a scale into it, and whether either can be done without rounding."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from loraconv.errors import FormatError
from loraconv.lazy import Lazy, Scaled, decode, encode, times
from loraconv.names import ROUNDING, fold_names

_WIDER = {("F16", "F32"), ("F16", "F64"), ("BF16", "F32"), ("BF16", "F64"), ("F32", "F64")}


def cast(tensor: Lazy, dtype: str) -> Lazy:
    """``tensor`` in another dtype; the tensor itself where it has it already."""
    return folded(tensor, Fraction(1), dtype)


def folded(tensor: Lazy, factor: Fraction | float, dtype: str) -> Lazy:
    """``tensor * factor`` in ``dtype``, rounded once however often it was scaled or cast before."""
    exact = (tensor.dtype == dtype or (tensor.dtype, dtype) in _WIDER) and factor == 1
    if isinstance(tensor, Scaled):
        exact = False
        factor *= Fraction(tensor.factor) if isinstance(factor, Fraction) else tensor.factor
        tensor = tensor.source
    if factor == 1 and tensor.dtype == dtype:
        return tensor
    exact = exact or (isinstance(factor, Fraction) and fits(tensor, factor, dtype))
    return Scaled(tensor, float(factor), dtype, exact)


def fits(tensor: Lazy, factor: Fraction, dtype: str, back: Fraction | None = None) -> bool:
    """True if every element of ``tensor * factor`` is representable in ``dtype``.

    With ``back`` it is enough that ``tensor`` comes out bit for bit when the rounded result is multiplied by ``back``
    and rounded to the tensor's own dtype again. Reads the whole tensor, one piece at a time.
    """
    if back is None and factor == 1 and (tensor.dtype == dtype or (tensor.dtype, dtype) in _WIDER):
        return True
    return all(_piece_fits(piece, tensor.dtype, factor, dtype, back) for piece in tensor.pieces())


def refuse_ruin(tensors: Mapping[str, Lazy]) -> None:
    """Raise :class:`FormatError` naming the tensors that their new dtype cannot hold.

    A dtype may round: each number once, by at most half a unit in its last place. Numbers that it takes for zero or
    infinity, because they are below or above its range, are another matter: then the error of the whole tensor (in the
    Frobenius norm, relative) is above that of one rounding.
    """
    ruined = [n for n, t in tensors.items() if isinstance(t, Scaled) and not t.exact and not _holds(t)]
    if ruined:
        dtype = tensors[ruined[0]].dtype
        raise FormatError(
            f"{dtype} cannot hold the numbers of {len(ruined)} tensors: they are too small or too large for it",
            where="; ".join(fold_names(ruined)[:4]),
            why="they would become zero, infinity or coarse multiples of the smallest number",
            hint="use --dtype bf16 or fp32, or leave --dtype out",
            slug="dtype-range",
        )


def _holds(tensor: Scaled) -> bool:
    import numpy as np

    lost = size = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in tensor.source.pieces():
            exact = decode(piece, tensor.source.dtype) * tensor.factor
            exact = exact[np.isfinite(exact)]
            gap = decode(encode(exact, tensor.dtype), tensor.dtype) - exact
            lost += float(np.sum(gap * gap))
            size += float(np.sum(exact * exact))
    return lost <= size * ROUNDING[tensor.dtype] ** 2


def _piece_fits(piece: bytes, own: str, factor: Fraction, dtype: str, back: Fraction | None) -> bool:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        product: Any = times(piece, own, float(factor))
        stored = encode(product, dtype)
        if back is not None:
            return encode(decode(stored, dtype) * float(back), own) == piece
        if not _product_is_exact(factor, own):
            return not product.any()
        return bool(np.all((decode(stored, dtype) == product) | np.isnan(product)))


def _product_is_exact(factor: Fraction, dtype: str) -> bool:
    """True if a float64 product with every value of ``dtype`` is exact: few enough bits, a binary denominator."""
    binary = factor.denominator & (factor.denominator - 1) == 0
    return binary and abs(factor.numerator).bit_length() <= (1 if dtype == "F64" else 28)

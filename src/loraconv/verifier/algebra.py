"""What modules beyond a pair of factors add to a weight, by LyCORIS' and peft's definitions, as pairs of factors.

That of LoHa is a product of rank r * r, LoKr is a Kronecker product, and any matrix is the Kronecker product of the
number 1 and itself. So one comparison does for all kinds, and none needs a larger matrix than it has. Kernels of
convolutions are matrices (out, in * height * width). Written from KohakuBlueleaf/LyCORIS ``lycoris/functional``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING

from loraconv.lazy import TensorRef, Viewed
from loraconv.verifier.numbers import Computed, Held, Pair, Tensor, room_of, values

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Sides = Mapping[str, TensorRef]

_SIDE = re.compile(
    r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|lora_mid|diff|diff_b|w_norm|b_norm)(?:\.weight)?"
)


def side_of(name: str) -> tuple[str, str] | None:
    """``(module, side)`` of a tensor that is neither factor nor alpha; None for other names."""
    found = _SIDE.fullmatch(name)
    return (found[1], found[2]) if found else None


def is_special(sides: Sides) -> bool:
    """True if a module of these tensors is more than a pair of factors."""
    return bool(sides.keys() - {"up", "down", "alpha"}) or any(len(ref.shape) > 2 for ref in sides.values())


def special_pairs(sides: Sides, alpha: Fraction | None) -> dict[str, Pair]:
    """What a module adds: ``""`` -> the delta of its weight, ``".bias"`` -> that of its bias, as far as it has them.

    ``alpha`` is the caller's own, if any. Raises KeyError where a tensor is missing.
    """
    made = {}
    weight = _weight(sides, alpha)
    if weight is not None:
        made[""] = replace(weight, kernel=_kernel(sides))
    bias = sides.get("diff_b", sides.get("b_norm"))
    if bias is not None:
        made[".bias"] = column(bias, Fraction(1))
    return made


def column(vector: TensorRef, scale: Fraction | float) -> Pair:
    """A vector times ``scale`` as the product of a column and the number 1."""
    return Pair(_one(vector.dtype), _shaped(vector, (vector.shape[0], 1)), scale)


def dense(delta: Tensor, scale: Fraction | float = Fraction(1)) -> Pair:
    """A matrix times ``scale``, as the Kronecker product of the number 1 and itself."""
    rows, columns = delta.shape
    return Pair(_shaped(delta, (1, rows * columns)), _one(delta.dtype), scale, (1, 1, rows, columns))


def cut_rows(pair: Pair, chunks: tuple[int, ...], of: int) -> Pair:
    """The pair of some of the ``of`` equal chunks of rows of a delta."""
    import numpy as np

    def chosen(rows: Array) -> Array:
        parts = np.split(rows, of)
        return np.concatenate([parts[n] for n in chunks])

    rows, _, columns = pair.shape
    height = rows // of * len(chunks)
    if pair.grid is None:
        return replace(pair, up=_applied(chosen, pair.up, (height, pair.up.shape[1])))
    n1, m1, n2, m2 = pair.grid

    def kron(one: Array, other: Array) -> Array:
        return chosen(np.kron(one.reshape(n1, m1), other.reshape(n2, m2)))

    return dense(_product(kron, pair.up, pair.down, (height, columns)), pair.scale)


def as_matrix(tensor: Tensor) -> Tensor:
    """A kernel as the matrix (out, in * height * width)."""
    return _shaped(tensor, (tensor.shape[0], prod(tensor.shape[1:])))


# ---------------------------------------------------------------------------------------------------------------------
# computed tensors, and how far the roundings of stored ones reach in them


def _one(dtype: str) -> Held:
    """The number 1, which nothing rounds."""
    import numpy as np

    return Held(np.ones((1, 1)), dtype, lambda _: np.zeros((1, 1)))


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if isinstance(tensor, Held | Computed):
        return _applied(lambda array: array.reshape(shape), tensor, shape)
    return tensor if tensor.shape == shape else Viewed(tensor, shape)


def _applied(change: Callable[[Array], Array], tensor: Tensor, shape: tuple[int, ...]) -> Computed:
    """A tensor whose numbers are put into other places."""
    return Computed(lambda: change(values(tensor)), lambda dtype: change(room_of(tensor, dtype)), tensor.dtype, shape)


def _product(combine: Callable[[Array, Array], Array], one: Tensor, other: Tensor, shape: tuple[int, ...]) -> Computed:
    """Sums of products of the numbers of two tensors, each with the coefficient 0 or 1.

    With x and y as what the numbers may be off by, ``(|a| + x)(|b| + y) - |a||b| = x |b| + (|a| + x) y``.
    """
    import numpy as np

    def room(dtype: str) -> Array:
        x, y = room_of(one, dtype), room_of(other, dtype)
        return combine(x, np.abs(values(other))) + combine(np.abs(values(one)) + x, y)

    return Computed(lambda: combine(values(one), values(other)), room, one.dtype, shape)


def _summed(formula: str, one: Tensor, other: Tensor, shape: tuple[int, ...]) -> Computed:
    """:func:`_product` by Einstein's notation, in ``shape``."""
    import numpy as np

    return _product(lambda a, b: np.einsum(formula, a, b, optimize=True).reshape(shape), one, other, shape)


def _each(one: Tensor, other: Tensor) -> Computed:
    """Two tensors multiplied element by element."""
    return _product(lambda a, b: a * b, one, other, one.shape)


# ---------------------------------------------------------------------------------------------------------------------
# the kinds


def _weight(sides: Sides, alpha: Fraction | None) -> Pair | None:
    if "diff" in sides:
        return dense(as_matrix(sides["diff"]))
    if "w_norm" in sides:
        return column(sides["w_norm"], Fraction(1))
    if "hada_w1_a" in sides:
        return _loha(sides, alpha)
    if "lokr_w1" in sides or "lokr_w1_a" in sides:
        return _lokr(sides, alpha)
    return _locon(sides, alpha) if "up" in sides or "down" in sides else None


def _kernel(sides: Sides) -> tuple[int, ...]:
    """The sizes of a convolution's kernel, as far as the tensors have them; of a pair of factors ``down`` has one."""
    if sides.keys() <= {"up", "down", "alpha"}:
        return sides["down"].shape[2:]
    shapes = (ref.shape[2:] for side, ref in sides.items() if side not in ("up", "alpha"))
    return next((shape for shape in shapes if prod(shape) > 1), ())


def _scale(sides: Sides, rank: int, alpha: Fraction | None) -> Fraction:
    """``alpha / rank``; 1 without an alpha. rs-LoRA is in the alpha that is stored."""
    if alpha is not None:
        return alpha / rank
    return Fraction(float(values(sides["alpha"]))) / rank if "alpha" in sides else Fraction(1)


def _locon(sides: Sides, alpha: Fraction | None) -> Pair:
    """``up @ down``, with a core ``sum(up[o, i] * mid[i, j, k] * down[j, n])`` over i and j."""
    up, down = as_matrix(sides["up"]), as_matrix(sides["down"])
    scale = _scale(sides, down.shape[0], alpha)
    if "lora_mid" not in sides:
        return Pair(down, up, scale)
    core = sides["lora_mid"]
    shape = core.shape[0], down.shape[1] * prod(core.shape[2:])
    return Pair(_summed("ij...,jn->in...", core, down, shape), up, scale)


def _loha(sides: Sides, alpha: Fraction | None) -> Pair:
    """``(w1a @ w1b) * (w2a @ w2b)``, element by element: the rows of w1a and w2a multiplied each with each, times the
    same of the columns of w1b and w2b."""
    w1a, w1b, w2a, w2b = (sides[f"hada_{side}"] for side in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = _scale(sides, w1b.shape[0], alpha)
    if "hada_t1" in sides:
        one, other = _rebuilt(sides["hada_t1"], w1a, w1b), _rebuilt(sides["hada_t2"], w2a, w2b)
        return dense(_each(one, other), scale)
    rows, columns, rank = w1a.shape[0], w1b.shape[1], w1b.shape[0] * w2b.shape[0]
    if rank >= min(rows, columns):
        one, other = (_summed("oi,in->on", a, b, (rows, columns)) for a, b in ((w1a, w1b), (w2a, w2b)))
        return dense(_each(one, other), scale)
    up = _summed("oi,oj->oij", w1a, w2a, (rows, rank))
    return Pair(_summed("in,jn->ijn", w1b, w2b, (rank, columns)), up, scale)


def _rebuilt(core: Tensor, left: Tensor, right: Tensor) -> Computed:
    """A matrix from its Tucker core: ``sum(core[i, j, k] * left[i, o] * right[j, n])`` over i and j."""
    inner = _summed("ij...,jn->in...", core, right, (core.shape[0], right.shape[1], *core.shape[2:]))
    shape = left.shape[1], prod(inner.shape[1:])
    return _summed("io,in->on", left, as_matrix(inner), shape)


def _lokr(sides: Sides, alpha: Fraction | None) -> Pair:
    """``kron(w1, w2)``, either part a product of two or as it is."""
    left, right = _kron_part(sides, "lokr_w1"), _kron_part(sides, "lokr_w2")
    second = next((sides[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in sides), None)
    scale = Fraction(1) if second is None else _scale(sides, second.shape[0], alpha)
    (n1, m1), (n2, m2) = left.shape, right.shape
    return Pair(_shaped(right, (1, n2 * m2)), _shaped(left, (n1 * m1, 1)), scale, (n1, m1, n2, m2))


def _kron_part(sides: Sides, name: str) -> Tensor:
    """One part of a LoKr as a matrix."""
    if name in sides:
        return as_matrix(sides[name])
    left, right = sides[f"{name}_a"], as_matrix(sides[f"{name}_b"])
    if name == "lokr_w2" and "lokr_t2" in sides:
        return _rebuilt(sides["lokr_t2"], left, right)
    return _summed("ij,jn->in", left, right, (left.shape[0], right.shape[1]))

"""What modules beyond a pair of factors add to a weight, by LyCORIS' and peft's definitions, as pairs of factors.

Every delta is a product of two matrices if they may be large: that of LoHa has rank r * r, that of LoKr the product of
the ranks of its two parts, and any matrix is itself times the identity. So one comparison does for all kinds. Kernels
of convolutions are matrices (out, in * height * width). Written from KohakuBlueleaf/LyCORIS ``lycoris/functional``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING

from loraconv.lazy import TensorRef
from loraconv.verifier.numbers import Held, Pair, Tensor, values

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
        made[""] = weight
    bias = sides.get("diff_b", sides.get("b_norm"))
    if bias is not None:
        made[".bias"] = column(bias, Fraction(1))
    return made


def dora_delta(base: Array, pair: Pair, magnitude: Tensor) -> Array:
    """``m * (W + delta) / ||W + delta|| - W`` in float64; ``m`` has one number for each row, or, as (1, in), for each
    column, and the norms go along the other axis."""
    import numpy as np

    whole, size = base + float(pair.scale) * (values(pair.up) @ values(pair.down)), values(magnitude)
    if size.ndim > 1 and size.shape[0] == 1 < size.size:
        return np.asarray(whole / np.sqrt((whole**2).sum(axis=0)) * size.reshape(-1) - base)
    return np.asarray(whole / np.sqrt((whole**2).sum(axis=1))[:, None] * size.reshape(-1, 1) - base)


def column(vector: TensorRef, scale: Fraction | float) -> Pair:
    """A vector times ``scale`` as the product of a column and the number 1."""
    import numpy as np

    return Pair(Held(np.ones((1, 1)), vector.dtype), replace(vector, shape=(vector.shape[0], 1)), scale)


def flat(tensor: TensorRef) -> TensorRef:
    """A kernel as a matrix."""
    return replace(tensor, shape=(tensor.shape[0], prod(tensor.shape[1:])))


def _weight(sides: Sides, alpha: Fraction | None) -> Pair | None:
    if "diff" in sides:
        return _dense(flat(sides["diff"]))
    if "w_norm" in sides:
        return column(sides["w_norm"], Fraction(1))
    if "hada_w1_a" in sides:
        return _loha(sides, alpha)
    if "lokr_w1" in sides or "lokr_w1_a" in sides:
        return _lokr(sides, alpha)
    return _locon(sides, alpha) if "up" in sides or "down" in sides else None


def _scale(sides: Sides, rank: int, alpha: Fraction | None) -> Fraction:
    """``alpha / rank``; 1 without an alpha. rs-LoRA is in the alpha that is stored."""
    if alpha is not None:
        return alpha / rank
    return Fraction(float(values(sides["alpha"]))) / rank if "alpha" in sides else Fraction(1)


def _dense(delta: Tensor) -> Pair:
    """A matrix as itself times an identity, the smaller of two."""
    import numpy as np

    rows, columns = delta.shape
    one = Held(np.eye(min(rows, columns)), delta.dtype)
    return Pair(delta, one, Fraction(1)) if rows < columns else Pair(one, delta, Fraction(1))


def _locon(sides: Sides, alpha: Fraction | None) -> Pair:
    """``up @ down``, with a core ``sum(up[o, i] * mid[i, j, k] * down[j, n])`` over i and j."""
    import numpy as np

    up, down = sides["up"], sides["down"]
    scale = _scale(sides, down.shape[0], alpha)
    if "lora_mid" not in sides:
        return Pair(flat(down), flat(up), scale)
    inner = np.einsum("ij...,jn->in...", values(sides["lora_mid"]), values(flat(down)))
    return Pair(Held(inner.reshape(len(inner), -1), down.dtype), flat(up), scale)


def _loha(sides: Sides, alpha: Fraction | None) -> Pair:
    """``(w1a @ w1b) * (w2a @ w2b)``, element by element: the rows of w1a and w2a multiplied each with each, times the
    same of the columns of w1b and w2b."""
    import numpy as np

    w1a, w1b, w2a, w2b = (values(sides[f"hada_{side}"]) for side in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale, dtype = _scale(sides, len(w1b), alpha), sides["hada_w1_a"].dtype
    if "hada_t1" in sides:
        one, two = (values(sides[f"hada_t{n}"]) for n in (1, 2))
        product = _rebuilt(one, w1a, w1b) * _rebuilt(two, w2a, w2b)
        return replace(_dense(Held(product.reshape(len(product), -1), dtype)), scale=scale)
    if len(w1b) * len(w2b) >= min(len(w1a), w1b.shape[1]):
        return replace(_dense(Held((w1a @ w1b) * (w2a @ w2b), dtype)), scale=scale)
    up = np.einsum("oi,oj->oij", w1a, w2a).reshape(len(w1a), -1)
    down = np.einsum("in,jn->ijn", w1b, w2b).reshape(-1, w1b.shape[1])
    return Pair(Held(down, dtype), Held(up, dtype), scale)


def _rebuilt(core: Array, left: Array, right: Array) -> Array:
    """A tensor from its Tucker core: ``sum(core[i, j, k] * left[i, o] * right[j, n])`` over i and j."""
    import numpy as np

    return np.asarray(np.einsum("ij...,io,jn->on...", core, left, right))


def _lokr(sides: Sides, alpha: Fraction | None) -> Pair:
    """``kron(w1, w2)``: of two products it is the product of the two Kronecker products of their factors."""
    import numpy as np

    left, right = _kron_part(sides, "lokr_w1"), _kron_part(sides, "lokr_w2")
    second = next((sides[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in sides), None)
    scale = Fraction(1) if second is None else _scale(sides, second.shape[0], alpha)
    dtype = next(ref.dtype for side, ref in sides.items() if side.startswith("lokr_"))
    return Pair(Held(np.kron(left[1], right[1]), dtype), Held(np.kron(left[0], right[0]), dtype), scale)


def _kron_part(sides: Sides, name: str) -> tuple[Array, Array]:
    """One part of a LoKr as a product of two matrices."""
    import numpy as np

    if name in sides:
        pair = _dense(flat(sides[name]))
        return values(pair.up), values(pair.down)
    left, right = values(sides[f"{name}_a"]), values(sides[f"{name}_b"])
    if name == "lokr_w2" and "lokr_t2" in sides:
        core = np.einsum("ij...,jn->in...", values(sides["lokr_t2"]), right)
        return left.T, core.reshape(len(core), -1)
    return left, right.reshape(len(right), -1)

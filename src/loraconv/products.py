"""What LoHa, LoKr and full differences add, as products of two matrices without a rounding.

A product of two float32 numbers fits into a float64, so the factors of a LoHa or LoKr, multiplied each with each, are
exact, and a fusion can round the sum of weight and delta once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loraconv.adapter import Adapter, Factor, natural, refuse_rest
from loraconv.algebra import Special, in_words
from loraconv.detect import Detected
from loraconv.errors import FormatError
from loraconv.lazy import InMemory, encode, number, read
from loraconv.names import fold_names
from loraconv.scale import ALPHA_TENSORS, Scale
from loraconv.source import Source

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def product(one: Special) -> tuple[Array, Array]:
    """``(up, down)`` in float64 whose product is the delta of a linear layer, not scaled."""
    import numpy as np

    if one.kind == "LoHa":
        w1a, w1b, w2a, w2b = (read(one.tensors[f"hada_{side}"]) for side in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up = np.einsum("oi,oj->oij", w1a, w2a).reshape(len(w1a), -1)
        return up, np.einsum("in,jn->ijn", w1b, w2b).reshape(-1, w1b.shape[1])
    if one.kind == "LoKr":
        (left, right), (other_left, other_right) = (_two(one, side) for side in ("lokr_w1", "lokr_w2"))
        return np.kron(left, other_left), np.kron(right, other_right)
    if one.kind == "full":
        return _with_identity(read(one.tensors["diff"]))
    return read(one.tensors["up"]), read(one.tensors["down"])


def _two(one: Special, side: str) -> tuple[Array, Array]:
    """A part of a LoKr as two factors."""
    if side in one.tensors:
        return _with_identity(read(one.tensors[side]))
    return read(one.tensors[f"{side}_a"]), read(one.tensors[f"{side}_b"])


def _with_identity(matrix: Array) -> tuple[Array, Array]:
    import numpy as np

    rows, columns = matrix.shape
    return (np.eye(rows), matrix) if rows < columns else (matrix, np.eye(columns))


def parts(one: Special, detected: Detected) -> Iterator[tuple[str, Array, Array]]:
    """The diffusers modules whose rows a module has, and the two matrices of each."""
    import numpy as np

    found = detected.naming.find(one.module)
    assert found is not None
    up, down = product(one)
    pieces = found[0].pieces(up.shape[0], down.shape[1])
    chunks = np.split(up, sum(map(len, pieces)))
    for module, own in zip(one.targets, pieces, strict=True):
        if own:
            yield module, np.concatenate([chunks[n] for n in own]), down


def scale_of(one: Special, alpha: Fraction | None) -> Scale:
    """``alpha / rank``, as LyCORIS stores alpha; 1 for a full difference and for a LoKr of two whole matrices."""
    named = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    factor = next((one.tensors[side] for side in named if side in one.tensors), None)
    if factor is None:
        return Scale(Fraction(1), 1, "it has none")
    rank = factor.shape[0]
    if alpha is not None:
        return Scale(alpha, rank, "--alpha")
    if "alpha" in one.tensors:
        return Scale(Fraction(number(one.tensors["alpha"])), rank, ALPHA_TENSORS)
    return Scale(Fraction(rank), rank, "no alpha")


def read_products(source: Source, detected: Detected, specials: Sequence[Special], alpha: Fraction | None) -> Adapter:
    """The adapter as exact products in F64; what it adds to a bias is a module of the bias' own name.

    Raises :class:`FormatError` for DoRA, which adds to no weight, and for convolutions.
    """
    refuse_rest(source, detected)
    wrong = [one for one in specials if one.has_magnitude or one.is_convolution or one.kind == "norm"]
    if wrong:
        raise FormatError(
            f"this cannot be fused: {in_words(wrong)}",
            where="; ".join(fold_names(one.module for one in wrong)[:4]),
            why="DoRA normalises the whole weight" if wrong[0].has_magnitude else "only linear layers are fused",
            hint="convert it to peft, and call merge_and_unload: loraconv convert ADAPTER -o OUT --to peft"
            if wrong[0].has_magnitude
            else "loraconv convert ADAPTER -o OUT --to comfyui",
            slug="not-plain-lora",
        )
    factors = [factor for one in specials for factor in _factors(one, detected, alpha)]
    return Adapter(tuple(sorted(factors, key=lambda factor: natural(factor.module))))


def _factors(one: Special, detected: Detected, alpha: Fraction | None) -> Iterator[Factor]:
    import numpy as np

    if one.kind != "bias":
        for module, up, down in parts(one, detected):
            yield Factor(module, _held(down), _held(up), scale_of(one, alpha))
    bias = one.tensors.get("diff_b", one.tensors.get("bias"))
    if bias is not None:
        # peft's LoRA bias is scaled as its product is; a difference is not.
        scale = scale_of(one, alpha) if "bias" in one.tensors else Scale(Fraction(1), 1, "it has none")
        if len(one.targets) > 1:
            raise FormatError(
                f"the bias of a module that is several in diffusers is not fused: {fold_names([one.module])[0]}",
                hint="loraconv convert ADAPTER -o OUT --to comfyui",
                slug="not-plain-lora",
            )
        yield Factor(f"{one.targets[0]}.bias", _held(np.ones((1, 1))), _held(read(bias)[:, None]), scale)


def _held(array: Array) -> InMemory:
    return InMemory(encode(array, "F64"), "F64", tuple(array.shape))

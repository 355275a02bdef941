"""The nearest plain LoRA of a delta that is no product of two small matrices, its singular values at factor size.

LoHa, ``(w1a @ w1b) * (w2a @ w2b)``, is a product of rank r1 * r2: the rows of w1a and w2a multiplied each with each,
times the same of the columns of w1b and w2b. The singular values of LoKr, ``kron(w1, w2)``, are those of w1 times those
of w2, and its singular vectors their Kronecker products. Only a full difference has to be decomposed as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from loraconv.adapter import Adapter, Factor, natural
from loraconv.algebra import Special, in_words
from loraconv.detect import Detected
from loraconv.errors import FormatError
from loraconv.lazy import read
from loraconv.names import fold_names, printable
from loraconv.products import parts, scale_of
from loraconv.scale import Scale
from loraconv.truncation import Cut, Wanted, norm, rounding, stored, tails

if TYPE_CHECKING:
    from loraconv.truncation import Array


@dataclass(frozen=True, slots=True)
class Approximated:
    """The factors in F32 at scale 1, and what each module's delta is off by, relative to its norm."""

    adapter: Adapter
    errors: Mapping[str, float]


def approximate(
    specials: Sequence[Special], detected: Detected, how: Wanted, alpha: Fraction | None, dtype: str
) -> Approximated:
    """Every module as factors of the rank that ``how`` asks for, stored in ``dtype``.

    Raises :class:`FormatError` for what no LoRA is near to, and for an error that the dtype alone exceeds.
    """
    _refuse(specials)
    factors, errors = [], dict[str, float]()
    for one in specials:
        for module, (left, values, right) in _modules(one, detected, alpha):
            made = _cut(left, values, right, how, dtype, module)
            rank = made.down.shape[0]
            factors.append(Factor(module, made.down, made.up, Scale(Fraction(rank), rank, "computed at scale 1")))
            errors[module] = made.error
    factors.sort(key=lambda factor: natural(factor.module))
    worst = max(errors, key=lambda module: errors[module])
    ranks = [factor.rank for factor in factors]
    said = (
        f"{in_words(specials)} became LoRA of rank {min(ranks)} to {max(ranks)} in {dtype}: the greatest relative error"
        f" is {errors[worst]:.2e}, in {printable(worst)}"
    )
    return Approximated(Adapter(tuple(factors), (said,)), errors)


def _refuse(specials: Sequence[Special]) -> None:
    """Raise for what a LoRA on a linear layer is not near to."""
    dora = [one.module for one in specials if one.has_magnitude]
    vectors = [one.module for one in specials if one.has_vectors]
    convolutions = [one.module for one in specials if one.is_convolution]
    for wrong, what, hint in (
        (dora, "DoRA normalises the sum of weight and delta, which no LoRA does", "--to peft or --to kohya"),
        (vectors, "a bias or a norm has no rank", "--to comfyui or --to kohya"),
        (convolutions, "it is on a convolution; only linear layers are converted", "--to comfyui or --to kohya"),
    ):
        if wrong:
            raise FormatError(
                f"{len(wrong)} modules cannot be approximated by a plain LoRA",
                where="; ".join(fold_names(wrong)[:4]),
                why=what,
                hint=f"keep what it is: loraconv convert ADAPTER -o OUT {hint}",
                slug="cannot-carry",
            )


#: The left singular vectors as columns, the singular values (greatest first), the right singular vectors as columns.
Decomposed = tuple["Array", "Array", "Array"]


def _modules(one: Special, detected: Detected, alpha: Fraction | None) -> list[tuple[str, Decomposed]]:
    """The diffusers modules whose rows a module has, and what each gets."""
    scale = float(scale_of(one, alpha).value)
    if one.kind == "LoKr" and len(one.targets) == 1:
        return [(one.targets[0], _scaled(_kron(*_kron_parts(one)), scale))]
    decompose = (lambda up, down: _svd(up @ down)) if one.kind == "full" else _decomposed
    return [(module, _scaled(decompose(up, down), scale)) for module, up, down in parts(one, detected)]


def _values(one: Special, side: str) -> Array:
    array: Array = read(one.tensors[side])
    return array


def _kron_parts(one: Special) -> tuple[Decomposed, Decomposed]:
    """The two matrices of a LoKr, decomposed."""
    made = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in one.tensors:
            made.append(_svd(_values(one, side)))
        else:
            made.append(_decomposed(_values(one, f"{side}_a"), _values(one, f"{side}_b")))
    return made[0], made[1]


def _svd(matrix: Array) -> Decomposed:
    import numpy as np

    left, values, turned = np.linalg.svd(matrix, full_matrices=False)
    return left, values, turned.T


def _kron(one: Decomposed, other: Decomposed) -> Decomposed:
    """The decomposition of a Kronecker product from those of its parts."""
    import numpy as np

    values = np.outer(one[1], other[1]).reshape(-1)
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > 0]
    first, second = np.divmod(order, len(other[1]))

    def vectors(left: Array, right: Array) -> Array:
        both = np.einsum("an,bn->abn", left[:, first], right[:, second])
        return np.asarray(both.reshape(-1, len(order)))

    return vectors(one[0], other[0]), values[order], vectors(one[2], other[2])


def _decomposed(up: Array, down: Array) -> Decomposed:
    """The singular values and vectors of ``up @ down``: QR of both, then the SVD of a matrix of rank size."""
    import numpy as np

    left, first = np.linalg.qr(up)
    right, second = np.linalg.qr(down.T)
    inner, values, turned = np.linalg.svd(first @ second.T, full_matrices=False)
    return left @ inner, values, right @ turned.T


def _scaled(one: Decomposed, scale: float) -> Decomposed:
    return one[0] * (-1 if scale < 0 else 1), one[1] * abs(scale), one[2]


def _cut(left: Array, values: Array, right: Array, how: Wanted, dtype: str, module: str) -> Cut:
    size = norm(values)
    if not size:
        return stored(left[:, :1] * 0, right[:, :1] * 0, values[:1], 0.0, 0.0, dtype)
    rank = how.rank_of(values, dtype)
    if rank is None:  # all of it: what float64 cannot tell from zero is none of it
        rank = int((values > values[0] * 2.0**-48).sum())
    left_out = float(tails(values)[rank])
    if how.error is not None and left_out + rounding(values[:rank], dtype) > how.error * size:
        raise FormatError(
            f"no LoRA in {dtype} can be as near as {how.error:g}",
            where=printable(module),
            why="rounding the factors alone is more than that",
            hint="allow more: --max-error 1e-5" if dtype == "F32" else "leave --dtype out",
            slug="max-error",
        )
    return stored(left[:, :rank] * values[:rank], right[:, :rank], values[:rank], size, left_out, dtype)

"""The nearest plain LoRA of a delta that is no product of two small matrices, its singular values at factor size.

LoHa, ``(w1a @ w1b) * (w2a @ w2b)``, is a product of rank r1 * r2: the rows of w1a and w2a multiplied each with each,
times the same of the columns of w1b and w2b. The singular values of LoKr, ``kron(w1, w2)``, are those of w1 times those
of w2, and its singular vectors their Kronecker products. Only a full difference has to be decomposed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from loraconv.adapter import Adapter, Factor, natural
from loraconv.algebra import Special, in_words
from loraconv.deltas import Known, Matrix, matrices, order_of
from loraconv.detect import Detected
from loraconv.errors import FormatError
from loraconv.names import fold_names, printable
from loraconv.products import ranges, scale_of, with_kernel
from loraconv.scale import Scale
from loraconv.truncation import Cut, Wanted, norm, rounding, stored, tails

if TYPE_CHECKING:
    from loraconv.truncation import Array


@dataclass(frozen=True, slots=True)
class Approximated:
    """The factors at scale 1, and what each module's delta is off by, relative to its norm."""

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
        for module, whole in _modules(one, detected, alpha):
            made = _cut(whole, how, dtype, module)
            rank = made.down.shape[0]
            scale = Scale(Fraction(rank), rank, "computed at scale 1")
            factors.append(with_kernel(Factor(module, made.down, made.up, scale), one.kernel))
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
    """Raise for what no LoRA is near to."""
    dora = [one.module for one in specials if one.has_magnitude]
    vectors = [one.module for one in specials if one.has_vectors]
    beside = all(one.is_plain for one in specials)  # biases of lora_B and whole norms
    for wrong, what, hint in (
        (dora, "DoRA normalises the sum of weight and delta, which no LoRA does", "--to peft or --to kohya"),
        (vectors, "a bias or a norm has no rank", "--to diffusers" if beside else "--to comfyui or --to kohya"),
    ):
        if wrong:
            raise FormatError(
                f"{len(wrong)} modules cannot be approximated by a plain LoRA",
                where="; ".join(fold_names(wrong)[:4]),
                why=what,
                hint=f"keep what it is: loraconv convert ADAPTER -o OUT {hint}",
                slug="cannot-carry",
            )


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A matrix by its singular values (greatest first). ``vectors(n)`` makes the first n singular vectors of the left
    and of the right, as columns."""

    values: Array
    vectors: Callable[[int], tuple[Array, Array]]


def _modules(one: Special, detected: Detected, alpha: Fraction | None) -> Iterator[tuple[str, Decomposed]]:
    """The diffusers modules whose rows a module has, and the delta of each."""
    scale = scale_of(one, alpha).value
    left, right, kron = matrices(one)
    for module, rows in ranges(one, detected):
        if kron and right is not None and len(one.targets) == 1:
            found = _kron(_matrix(left), _matrix(right))
        else:
            known = Known(left, right, kron, order_of(rows))
            product = known.factors()
            found = _svd(known.block(slice(None))[0]) if product is None else _factored(*product)
        yield module, _scaled(found, scale)


def _matrix(matrix: Matrix) -> Decomposed:
    return _svd(matrix.up) if matrix.down is None else _factored(matrix.up, matrix.down)


def _svd(matrix: Array) -> Decomposed:
    import numpy as np

    left, values, turned = np.linalg.svd(matrix, full_matrices=False)
    return Decomposed(values, lambda rank: (left[:, :rank], turned[:rank].T))


def _factored(up: Array, down: Array) -> Decomposed:
    """That of ``up @ down``: QR of both, then the SVD of a matrix of rank size."""
    import numpy as np

    left, first = np.linalg.qr(up)
    right, second = np.linalg.qr(down.T)
    inner, values, turned = np.linalg.svd(first @ second.T, full_matrices=False)
    return Decomposed(values, lambda rank: (left @ inner[:, :rank], right @ turned[:rank].T))


def _kron(one: Decomposed, other: Decomposed) -> Decomposed:
    """That of a Kronecker product: the values of its parts multiplied each with each, and so the vectors."""
    import numpy as np

    values = np.outer(one.values, other.values).reshape(-1)
    order = np.argsort(-values, kind="stable")

    def vectors(rank: int) -> tuple[Array, Array]:
        first, second = np.divmod(order[:rank], len(other.values))
        (left, right), (other_left, other_right) = (d.vectors(len(d.values)) for d in (one, other))
        return _each(left[:, first], other_left[:, second]), _each(right[:, first], other_right[:, second])

    return Decomposed(values[order], vectors)


def _each(left: Array, right: Array) -> Array:
    """The Kronecker product of each column of the one with the same column of the other."""
    import numpy as np

    return np.asarray(np.einsum("an,bn->abn", left, right).reshape(-1, left.shape[1]))


def _scaled(one: Decomposed, scale: float) -> Decomposed:
    return Decomposed(one.values * scale, one.vectors)


def _cut(whole: Decomposed, how: Wanted, dtype: str, module: str) -> Cut:
    values, size = whole.values, norm(whole.values)
    rank = how.rank_of(values, dtype) if size else 1
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
    left, right = whole.vectors(rank)
    return stored(left * values[:rank], right, values[:rank], size, left_out, dtype)

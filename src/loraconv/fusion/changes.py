"""Sums of a weight and changes that are no product of two small matrices, a block of rows at a time, correctly rounded.

float64 with a bound on its error decides nearly every element; fractions decide those that are left. So the bytes
depend on no BLAS, as those of ``merging``, and no matrix of the weight's size is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from loraconv.deltas import UNIT, Delta, Known
from loraconv.fusion.dora import Dora, Whole
from loraconv.fusion.merging import BLOCK, Factors, Term, merge_rows, nearest, nonfinite, overflow, rounded_ends, stack
from loraconv.lazy import TensorRef, decode
from loraconv.watch import all_finite

if TYPE_CHECKING:
    from loraconv.fusion.merging import Array


class Change(Protocol):
    """What is added to a weight."""

    def block(self, base: Array, rows: slice) -> tuple[Array, Array]:
        """Its numbers in these rows, whose base numbers are ``base``, in float64, and a bound on their error."""

    def exact(self, row: int, column: int) -> Fraction:
        """One number, without any error that could decide a rounding."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The terms that are products of two small matrices."""

    factors: Factors

    def block(self, base: Array, rows: slice) -> tuple[Array, Array]:
        own = self.factors.part(rows)
        error = own.rows[:, None] * own.columns * ((own.up.shape[1] + 3) * UNIT * (1 + 2.0**-10))
        return own.up @ own.down.T, error

    def exact(self, row: int, column: int) -> Fraction:
        return self.factors.at(row, column)


@dataclass(frozen=True, slots=True)
class Multiple:
    """A LoHa, LoKr or full difference times ``factor``."""

    known: Known
    factor: Fraction

    def block(self, base: Array, rows: slice) -> tuple[Array, Array]:
        import numpy as np

        values, error = self.known.block(rows)
        made = values * float(self.factor)
        return made, error * abs(float(self.factor)) * (1 + 2.0**-10) + np.abs(made) * (3 * UNIT)

    def exact(self, row: int, column: int) -> Fraction:
        return self.factor * self.known.exact(row, column)


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that is added to one weight."""

    parts: tuple[Change, ...]

    def merged(self, raw: bytes, ref: TensorRef, rows: slice, dtype: str) -> bytes | memoryview:
        """As :meth:`Plain.merged`."""
        import numpy as np

        base = decode(raw, ref.dtype).reshape(ref.shape)
        if not np.isfinite(base).all():
            raise nonfinite(ref)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            sums, error = base.copy(), np.zeros(base.shape)
            for part in self.parts:
                values, more = part.block(base, rows)
                sums += values
                error += more + np.abs(sums) * (2 * UNIT)
            low, high = rounded_ends(sums, error, dtype)
            bits = high.copy()
            for row, column in zip(*np.nonzero((low != high) & np.isfinite(sums)), strict=True):
                exact = [part.exact(rows.start + row, column) for part in self.parts]
                bits[row, column] = nearest(Fraction(float(base[row, column])) + sum(exact), dtype)
        if not all_finite(bits.tobytes(), dtype):
            raise overflow(ref, dtype)
        return bits.tobytes()


@dataclass(frozen=True, slots=True)
class Plain:
    """Factors only, for which ``merging`` has quicker ways."""

    factors: Factors

    def merged(self, raw: bytes, ref: TensorRef, rows: slice, dtype: str) -> bytes | memoryview:
        """Rows of a weight with everything added, as bytes of ``dtype``; ``raw`` are those of the base's own, which
        ``ref`` refers to. Raises as :func:`merge_rows` does."""
        return merge_rows(raw, ref, self.factors.part(rows), dtype)


def block_of(terms: Sequence[Term]) -> int:
    """The elements of a block: fewer where several matrices in float64 are made of each."""
    return BLOCK // 4 if any(isinstance(term.up, Delta | Whole) for term in terms) else BLOCK


def gather(terms: Sequence[Term]) -> Plain | Changes:
    """Read what is added to one weight."""
    plain = [term for term in terms if not isinstance(term.up, Delta | Whole)]
    if len(plain) == len(terms):
        return Plain(stack(plain))
    parts: list[Change] = [LowRank(stack(plain))] if plain else []
    for term in terms:
        if isinstance(term.up, Delta):
            parts.append(Multiple(term.up.load(), term.factor))
        elif isinstance(term.up, Whole):
            parts.append(term.up.load())
    return Changes(tuple(parts))


def predicted(terms: Sequence[Term]) -> tuple[Array, Array] | None:
    """``(up, down)`` of rank size, whose product is near to what is added; None where there are none."""
    import numpy as np

    added = gather(terms)
    if isinstance(added, Plain):
        return added.factors.up, added.factors.down.T
    found = [pair for part in added.parts if (pair := _low_rank(part)) is not None]
    return (np.concatenate([up for up, _ in found], axis=1), np.concatenate([d for _, d in found])) if found else None


def _low_rank(part: Change) -> tuple[Array, Array] | None:
    if isinstance(part, LowRank):
        return part.factors.up, part.factors.down.T
    assert isinstance(part, Multiple | Dora)
    pair, factor = part.known.factors(), part.factor if isinstance(part, Multiple) else part.scale
    return None if pair is None else (pair[0] * float(factor), pair[1])

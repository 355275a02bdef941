"""DoRA as something that is added to a weight: ``m * (W + s * B A) / ||W + s * B A|| - W``, a block of rows at a time.

The magnitudes are those of the rows, (out,) or (out, 1), or of the columns, (1, in); the norms are taken over the other
axis. Definitions: huggingface/peft ``tuners/lora/dora.py``, KohakuBlueleaf/LyCORIS ``functional/general.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from loraconv.adapter import Factor
from loraconv.deltas import UNIT, Delta, Known, Matrix
from loraconv.errors import FormatError, UsageError
from loraconv.fusion.merging import BLOCK, Term, as_matrix, blocks
from loraconv.lazy import Lazy, TensorRef, Zeros, read
from loraconv.names import printable

if TYPE_CHECKING:
    from loraconv.deltas import Array


@dataclass(frozen=True, slots=True)
class Whole:
    """What a DoRA changes the weight ``base`` (a matrix) by; read when it is asked for."""

    base: TensorRef
    factor: Factor
    magnitude: Lazy

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def load(self) -> Dora:
        """Read the factors, and for magnitudes of columns the weight, whose columns have to be measured."""
        import numpy as np

        up, down, rows = self.factor.up, self.factor.down, np.arange(self.base.shape[0])
        known = up.load() if isinstance(up, Delta) else Known(Matrix(read(up), read(down)), None, False, rows)
        exact = self.factor.scale.exact
        scale = exact if exact is not None else Fraction(self.factor.scale.value)
        by_column = len(self.magnitude.shape) > 1 and self.magnitude.shape[0] == 1
        made = Dora(self.base, known, scale, read(self.magnitude).reshape((1, -1) if by_column else (-1, 1)))
        return made.measured() if by_column else made

    def pieces(self) -> Iterator[bytes]:
        loaded = self.load()
        for start, stop in blocks(self.base.shape, BLOCK // 4):
            yield loaded.block(read(self.base.rows(start, stop)), slice(start, stop))[0].tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        yield self.base
        yield from self.factor.leaves()
        yield from self.magnitude.leaves()


@dataclass(frozen=True, slots=True)
class Dora:
    """A DoRA in memory. ``norms`` and ``doubts``, bounds on their errors, are those of the columns, if these have the
    magnitudes. ``squares`` keeps the exact squared norms that were needed."""

    base: TensorRef
    known: Known
    scale: Fraction
    magnitude: Array
    norms: tuple[Array, Array] | None = None
    squares: dict[int, Fraction] = field(default_factory=dict)

    def measured(self) -> Dora:
        """The same with the norms of the columns."""
        import numpy as np

        squares = np.zeros((2, self.base.shape[1]))
        for start, stop in blocks(self.base.shape, BLOCK // 4):
            total, error = self._total(read(self.base.rows(start, stop)), slice(start, stop))
            squares += np.stack([(total * total).sum(axis=0), (error * error).sum(axis=0)])
        norms, errors = np.sqrt(squares)
        return Dora(self.base, self.known, self.scale, self.magnitude, (norms, self._doubt(norms, errors, 0)))

    def block(self, base: Array, rows: slice) -> tuple[Array, Array]:
        """The change of some rows in float64, and a bound on its error."""
        import numpy as np

        total, error = self._total(base, rows)
        if self.norms is not None:
            norms, doubts = self.norms
            magnitude = self.magnitude
        else:
            norms = np.linalg.norm(total, axis=1, keepdims=True)
            doubts = self._doubt(norms, np.linalg.norm(error, axis=1, keepdims=True), 1)
            magnitude = self.magnitude[rows]
        made = total * (magnitude / norms)
        bound = error * np.abs(magnitude / norms) + np.abs(made) * (doubts / norms + 3 * UNIT)
        change = made - base
        return change, bound * (1 + 2.0**-10) + np.abs(change) * UNIT

    def _total(self, base: Array, rows: slice) -> tuple[Array, Array]:
        """Weight and delta, and a bound on the error."""
        import numpy as np

        values, error = self.known.block(rows)
        scale = abs(float(self.scale))
        total = base + values * float(self.scale)
        return total, error * scale * (1 + 2.0**-10) + np.abs(values) * (3 * scale * UNIT) + np.abs(total) * UNIT

    def _doubt(self, norms: Array, errors: Array, axis: int) -> Array:
        """A norm is off by no more than the norm of the errors, and by the roundings of a sum of squares."""
        made: Array = errors + norms * ((self.base.shape[axis] + 3) * UNIT)
        return made

    def exact(self, row: int, column: int) -> Fraction:
        """One number, its square root to 2**-400 of itself or exact where it is rational."""
        line = row if self.norms is None else column
        if line not in self.squares:
            self.squares[line] = sum((number**2 for number in self._line(line)), Fraction(0))
        weight = Fraction(float(read(self.base.rows(row, row + 1).columns(column, column + 1))[0, 0]))
        total = weight + self.scale * self.known.exact(row, column)
        magnitude = Fraction(float(self.magnitude.reshape(-1)[line]))
        return magnitude * total / _root(self.squares[line]) - weight

    def _line(self, line: int) -> Iterator[Fraction]:
        """The exact numbers of weight and delta over which a norm is taken."""
        rows, columns = self.base.shape
        if self.norms is None:
            weights = read(self.base.rows(line, line + 1)).reshape(-1)
            places = [(line, column) for column in range(columns)]
        else:
            weights = read(self.base.columns(line, line + 1)).reshape(-1)
            places = [(row, line) for row in range(rows)]
        for weight, place in zip(weights.tolist(), places, strict=True):
            yield Fraction(weight) + self.scale * self.known.exact(*place)


def _root(square: Fraction) -> Fraction:
    """The square root, rounded down at 2**-400 of itself."""
    number = square.numerator * square.denominator
    shift = max(0, 402 - number.bit_length() // 2)
    return Fraction(math.isqrt(number << (2 * shift)), square.denominator << shift)


def term_of(factor: Factor, strength: Fraction, home: TensorRef) -> Term:
    """What a DoRA adds to the weight ``home``. Raises :class:`UsageError` for a strength other than 1."""
    assert factor.magnitude is not None
    if strength != 1:
        raise UsageError(
            f"a DoRA is fused at strength 1 only, not {float(strength):g}",
            why="peft, LyCORIS and ComfyUI each compute something else at another",
            hint="leave the @ and the number behind it out",
            slug="strength",
        )
    base = as_matrix(home)
    return Term(Whole(base, factor, factor.magnitude), Zeros("F64", (0, base.shape[1])), Fraction(1))


def refuse_beside_dora(terms: Mapping[str, Sequence[Term]]) -> None:
    """Raise :class:`FormatError` where a DoRA and another adapter change one weight."""
    shared = [name for name, ones in terms.items() if len(ones) > 1 and any(isinstance(t.up, Whole) for t in ones)]
    if shared:
        raise FormatError(
            f"a DoRA and another adapter change one weight: {printable(shared[0])}",
            why="DoRA normalises the whole weight, so that the result depends on the order",
            hint="fuse one of them, and then the other into the result",
            slug="merge-mismatch",
        )

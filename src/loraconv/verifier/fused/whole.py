"""Deltas that are no product of two small matrices, a block of rows at a time in float64: no whole one is ever made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from loraconv.lazy import TensorRef
from loraconv.verifier.delta import held, rows_of
from loraconv.verifier.numbers import Pair, Tensor, values

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

#: Numbers of a block of rows.
_BLOCK = 1 << 18


class Whole(Protocol):
    """A matrix by its rows."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def rows(self, start: int, stop: int) -> Array: ...


@dataclass(frozen=True, slots=True)
class Kron:
    """The delta of a pair that has a grid, not scaled."""

    pair: Pair

    @classmethod
    def of(cls, pair: Pair) -> Kron:
        return cls(held(pair))

    @property
    def shape(self) -> tuple[int, int]:
        return self.pair.shape[0], self.pair.shape[2]

    def rows(self, start: int, stop: int) -> Array:
        return rows_of(self.pair, start, stop)


@dataclass(frozen=True, slots=True)
class Dora:
    """``m * (W + delta) / ||W + delta|| - W``. ``size`` is m, one number for each row, (out, 1), or for each column,
    (1, in); the norms go along the other axis, and ``norms`` are those of the columns."""

    base: TensorRef
    pair: Pair
    size: Array
    norms: Array | None = None

    @classmethod
    def of(cls, base: TensorRef, pair: Pair, magnitude: Tensor) -> Dora:
        import numpy as np

        size = values(magnitude)
        by_column = size.ndim > 1 and size.shape[0] == 1 < size.size
        made = cls(base, held(pair), size.ravel()[None] if by_column else size.ravel()[:, None])
        if not by_column:
            return made
        squares = sum((made.sum(*ends) ** 2).sum(axis=0) for ends in _blocks(made.shape))
        return replace(made, norms=np.sqrt(squares))

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape[0], self.base.shape[1]

    def sum(self, start: int, stop: int) -> Array:
        """Rows of the weight and the delta."""
        total: Array = values(self.base.rows(start, stop)) + float(self.pair.scale) * rows_of(self.pair, start, stop)
        return total

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        total = self.sum(start, stop)
        if self.norms is not None:
            turned = total / self.norms * self.size
        else:
            turned = total / np.sqrt((total**2).sum(axis=1))[:, None] * self.size[start:stop]
        return np.asarray(turned - values(self.base.rows(start, stop)))


@dataclass(frozen=True, slots=True)
class Turned:
    """The transpose."""

    whole: Whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape[1], self.whole.shape[0]

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        # Copies, for a view would keep the whole block that it is of.
        return np.concatenate([self.whole.rows(*ends)[:, start:stop].copy() for ends in _blocks(self.whole.shape)]).T


def _blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])

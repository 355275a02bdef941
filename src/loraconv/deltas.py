"""What LoHa, LoKr, Tucker cores and full differences add to a weight, a block of rows at a time.

Each is one matrix, two multiplied element by element (LoHa), or the Kronecker product of two (LoKr), and each of those
is stored or a product of rank size. The whole is never made. Kernels of convolutions are matrices (out, in * height *
width). A Tucker core is multiplied into the second factor first, in float64. Definitions: KohakuBlueleaf/LyCORIS
``lycoris/functional``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any

from loraconv.algebra import Special
from loraconv.lazy import TensorRef, read

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Half a unit of float64 in the last place, relative.
UNIT = 2.0**-53


@dataclass(frozen=True, slots=True)
class Matrix:
    """``up @ down``, or ``up`` alone, in float64."""

    up: Array
    down: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], (self.up if self.down is None else self.down).shape[1]

    def rows(self, at: Array) -> tuple[Array, Array]:
        """The numbers of some rows, and a bound on their error: by Cauchy and Schwarz, from the factors' norms."""
        import numpy as np

        up = self.up[at]
        if self.down is None:
            return up, np.zeros(up.shape)
        sizes = np.linalg.norm(up, axis=1)[:, None] * np.linalg.norm(self.down, axis=0)
        return up @ self.down, sizes * ((len(self.down) + 1) * UNIT * (1 + 2.0**-10))

    def exact(self, row: int, column: int) -> Fraction:
        """One number."""
        if self.down is None:
            return Fraction(float(self.up[row, column]))
        pairs = zip(self.up[row].tolist(), self.down[:, column].tolist(), strict=True)
        return sum((Fraction(u) * Fraction(d) for u, d in pairs), Fraction(0))


@dataclass(frozen=True, slots=True)
class Known:
    """A delta, not scaled, whose matrices are in memory. ``order`` are the rows that it has of the module's."""

    one: Matrix
    other: Matrix | None
    kron: bool
    order: Array

    def block(self, rows: slice) -> tuple[Array, Array]:
        """The numbers of some rows in float64, and a bound on their error."""
        import numpy as np

        at = self.order[rows]
        if self.other is None:
            return self.one.rows(at)
        first, second = np.divmod(at, self.other.shape[0]) if self.kron else (at, at)
        (a, x), (b, y) = self.one.rows(first), self.other.rows(second)
        values = self._combined(a, b)
        # (a + x)(b + y) - ab = ay + x(b + y), and the rounding of the product itself
        error = self._combined(np.abs(a), y) + self._combined(x, np.abs(b) + y)
        return values, error * (1 + 2.0**-10) + np.abs(values) * UNIT

    def exact(self, row: int, column: int) -> Fraction:
        """One number."""
        at = int(self.order[row])
        if self.other is None:
            return self.one.exact(at, column)
        height, width = self.other.shape if self.kron else (0, 0)
        if self.kron:
            return self.one.exact(at // height, column // width) * self.other.exact(at % height, column % width)
        return self.one.exact(at, column) * self.other.exact(at, column)

    def factors(self) -> tuple[Array, Array] | None:
        """``(up, down)`` in float64, whose product the delta is, if their rank is below half of what it can be."""
        import numpy as np

        if self.other is None:
            up, down = self.one.up, self.one.down
        elif self.one.down is None or self.other.down is None:
            return None
        elif self.kron:
            up, down = np.kron(self.one.up, self.other.up), np.kron(self.one.down, self.other.down)
        else:
            up = np.einsum("oi,oj->oij", self.one.up, self.other.up).reshape(len(self.one.up), -1)
            down = np.einsum("in,jn->ijn", self.one.down, self.other.down).reshape(up.shape[1], -1)
        if down is None or 2 * len(down) > min(len(self.order), down.shape[1]):
            return None
        return up[self.order], down

    def _combined(self, a: Array, b: Array) -> Array:
        return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1) if self.kron else a * b


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta that is read when it is asked for. ``rows`` are the ranges of the module's rows that it has."""

    one: Special
    rows: tuple[tuple[int, int], ...]
    columns: int

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(stop - start for start, stop in self.rows), self.columns

    def load(self) -> Known:
        """Read its matrices."""
        return Known(*matrices(self.one), order_of(self.rows))

    def pieces(self) -> Iterator[bytes]:
        known, step = self.load(), max(1, (1 << 18) // max(self.columns, 1))
        for start in range(0, self.shape[0], step):
            yield known.block(slice(start, start + step))[0].tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        yield from self.one.floats


def order_of(ranges: Sequence[tuple[int, int]]) -> Array:
    """The numbers in some ranges."""
    import numpy as np

    return np.concatenate([np.arange(*ends) for ends in ranges])


def size_of(one: Special) -> tuple[int, int]:
    """``(out, in)`` of the weight, from the shapes alone."""
    shapes = {side: ref.shape for side, ref in one.tensors.items()}
    if one.kind.startswith("LoHa"):
        core = shapes.get("hada_t1", ())[2:]
        return shapes["hada_w1_a"][1 if core else 0], prod(shapes["hada_w1_b"][1:]) * prod(core)
    if one.kind.startswith("LoKr"):
        (n1, m1), (n2, m2) = _part_size(shapes, "lokr_w1"), _part_size(shapes, "lokr_w2")
        return n1 * n2, m1 * m2
    if one.kind == "full":
        return shapes["diff"][0], prod(shapes["diff"][1:])
    return shapes["up"][0], prod(shapes["down"][1:]) * prod(shapes.get("mid", ())[2:])


def _part_size(shapes: dict[str, tuple[int, ...]], side: str) -> tuple[int, int]:
    if side in shapes:
        return shapes[side][0], prod(shapes[side][1:])
    core = shapes.get("lokr_t2", ())[2:] if side == "lokr_w2" else ()
    return shapes[f"{side}_a"][1 if core else 0], prod(shapes[f"{side}_b"][1:]) * prod(core)


def matrices(one: Special) -> tuple[Matrix, Matrix | None, bool]:
    """The one or two matrices that a delta is made of, and whether of two it is the Kronecker product."""
    if one.kind.startswith("LoHa"):
        return _part(one, "hada_w1", "hada_t1"), _part(one, "hada_w2", "hada_t2"), False
    if one.kind.startswith("LoKr"):
        return _part(one, "lokr_w1", ""), _part(one, "lokr_w2", "lokr_t2"), True
    if one.kind == "full":
        return Matrix(_flat(one.tensors["diff"])), None, False
    down = _flat(one.tensors["down"])
    if "mid" in one.tensors:
        down = _with_core(read(one.tensors["mid"]), down)
    return Matrix(_flat(one.tensors["up"]), down), None, False


def _part(one: Special, side: str, core: str) -> Matrix:
    if side in one.tensors:
        return Matrix(_flat(one.tensors[side]))
    left, right = read(one.tensors[f"{side}_a"]), _flat(one.tensors[f"{side}_b"])
    if core in one.tensors:
        return Matrix(left.T, _with_core(read(one.tensors[core]), right))
    return Matrix(left, right)


def _with_core(core: Array, right: Array) -> Array:
    """``sum(core[i, j, k] * right[j, n])`` over j, as a matrix (i, n * k)."""
    import numpy as np

    made: Array = np.einsum("ij...,jn->in...", core, right).reshape(len(core), -1)
    return made


def _flat(tensor: TensorRef) -> Array:
    """A kernel as a matrix."""
    array = read(tensor)
    return array.reshape(len(array), -1)

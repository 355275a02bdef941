"""DoRA as something that is added to a weight: ``m * (W + s * B A) / ||W + s * B A|| - W``, in float64.

The magnitudes are those of the rows, (out,) or (out, 1), or of the columns, (1, in); the norms are taken over the other
axis. Definitions: huggingface/peft ``tuners/lora/dora.py``, KohakuBlueleaf/LyCORIS ``functional/general.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from loraconv.adapter import Factor
from loraconv.errors import FormatError, UsageError
from loraconv.fusion.merging import Term
from loraconv.lazy import Lazy, TensorRef, read
from loraconv.names import printable


@dataclass(frozen=True, slots=True)
class Change:
    """What a DoRA adds to the weight ``base``, in F64; made when it is read."""

    base: TensorRef
    factor: Factor
    magnitude: Lazy

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def pieces(self) -> Iterator[bytes]:
        import numpy as np

        base, scale = read(self.base), self.factor.scale
        total = base + float(scale.value) * (read(self.factor.up) @ read(self.factor.down))
        by_column = len(self.magnitude.shape) > 1 and self.magnitude.shape[0] == 1
        norms = np.linalg.norm(total, axis=0 if by_column else 1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros becomes NaN, which is refused
            changed = total * (read(self.magnitude).reshape(norms.shape) / norms)
        yield (changed - base).tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        yield self.base
        yield from self.factor.leaves()
        yield from self.magnitude.leaves()


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity matrix of this size, in F64."""

    size: int

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    def pieces(self) -> Iterator[bytes]:
        import numpy as np

        yield np.eye(self.size).tobytes()

    def leaves(self) -> Iterator[TensorRef]:
        yield from ()


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
    return Term(Change(home, factor, factor.magnitude), Identity(home.shape[1]), Fraction(1))


def refuse_beside_dora(terms: Mapping[str, Sequence[Term]]) -> None:
    """Raise :class:`FormatError` where a DoRA and another adapter change one weight."""
    shared = [name for name, ones in terms.items() if len(ones) > 1 and any(isinstance(t.up, Change) for t in ones)]
    if shared:
        raise FormatError(
            f"a DoRA and another adapter change one weight: {printable(shared[0])}",
            why="DoRA normalises the whole weight, so that the result depends on the order",
            hint="fuse one of them, and then the other into the result",
            slug="merge-mismatch",
        )

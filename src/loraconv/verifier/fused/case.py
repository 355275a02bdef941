"""A base, the adapters fused into it and what came out, as the proof, its controls and the diagnosis look at them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING

from loraconv.lazy import TensorRef
from loraconv.names import FLOAT_DTYPES, fold_names
from loraconv.verifier.fused.figures import Figures
from loraconv.verifier.fused.rounding import Delta
from loraconv.verifier.fused.whole import Dora, Kron, Turned, Whole
from loraconv.verifier.numbers import Pair, Tensor, values
from loraconv.verifier.proof import Check

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Tensors = Mapping[str, TensorRef]
NOTHING: Tensors = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter: module (diffusers name) -> factors and scale by its format's own definition, its strength, and the
    magnitudes of the modules that are a DoRA."""

    pairs: Mapping[str, Pair]
    strength: Fraction
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's factors for one module, in float64: ``up`` (out, rank), ``down`` (rank, in), not yet scaled.

    ``number`` is the adapter's place in the order given. Where the delta is no product of two small matrices it is
    ``whole``, and the factors are empty.
    """

    up: Array
    down: Array
    scale: Fraction | float
    strength: Fraction
    number: int
    rank: int
    whole: Whole | None = None

    @property
    def factor(self) -> float:
        return float(self.strength * self.scale)

    @property
    def zeroed(self) -> Part:
        """The part with zeros for ``up``."""
        return replace(self, up=self.up * 0, whole=None)

    @property
    def turned(self) -> Part:
        """The part whose delta is the transpose."""
        return replace(self, up=self.down.T, down=self.up.T, whole=None if self.whole is None else Turned(self.whole))

    def rows(self, start: int, stop: int) -> tuple[Array, Array]:
        """Rows of the delta, not scaled, and what the unit roundoff is multiplied by to bound their error."""
        import numpy as np

        up = self.up[start:stop]
        if self.whole is None:
            lengths = np.linalg.norm(up, axis=1)[:, None] * np.linalg.norm(self.down, axis=0)
            return up @ self.down, lengths * (self.rank + 8)
        made = self.whole.rows(start, stop)
        return made, np.linalg.norm(made, axis=1)[:, None] * np.full((1, made.shape[1]), self.rank + 8.0)


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor that the adapters touch. ``same`` is the verdict; ``figures`` counts elements."""

    name: str
    module: str
    same: bool
    figures: Figures


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared. ``modules`` are those of the adapters that were to be fused, in order; ``dtype`` is the one
    that was asked for, if any; ``bound`` the user's own on the relative error of the delta."""

    base: Tensors
    terms: Sequence[Term]
    fused: Tensors
    modules: Sequence[str]
    dtype: str | None
    bound: float | None

    def parts(self, module: str) -> list[Part]:
        """The adapters' factors for a module."""
        return [
            self._part(module, number, term, pair)
            for number, term in enumerate(self.terms)
            if (pair := term.pairs.get(module)) is not None
        ]

    def _part(self, module: str, number: int, term: Term, pair: Pair) -> Part:
        """The part of one adapter; that of a DoRA is the change of the whole weight."""
        import numpy as np

        rows, rank, columns = pair.shape
        none, magnitude = (np.zeros((rows, 0)), np.zeros((0, columns))), term.magnitudes.get(module)
        if magnitude is not None:
            whole = Dora.of(self.base[home_of(module)], pair, magnitude)
            return Part(*none, Fraction(1), term.strength, number, rank, whole)
        if pair.grid is not None:
            return Part(*none, pair.scale, term.strength, number, rank, Kron.of(pair))
        return Part(values(pair.up), values(pair.down), pair.scale, term.strength, number, rank)

    def delta(self, module: str) -> Delta:
        """``sum(strength * scale * up @ down)`` of a module."""
        return delta_of(self.parts(module))

    def shapes(self, module: str) -> set[tuple[int, ...]]:
        """The shapes ``(out, in)`` of the adapters' deltas for a module: one, unless they contradict each other."""
        pairs = [term.pairs[module] for term in self.terms if module in term.pairs]
        return {(pair.shape[0], pair.shape[2]) for pair in pairs}

    def fits(self, module: str) -> bool:
        """True if the base has a floating-point weight of this module, of the delta's shape."""
        home = self.base.get(home_of(module))
        return home is not None and home.dtype in FLOAT_DTYPES and self.shapes(module) == {home.shape}

    def touched(self) -> dict[str, str]:
        """Tensor -> module, of the modules that have a home in the base and are comparable."""
        return {home_of(m): m for m in self.modules if self.fits(m) and self.kept(home_of(m))}

    def untouched(self) -> list[str]:
        """The comparable tensors that no adapter touches."""
        homes = {home_of(module) for module in self.modules}
        return [name for name in self.base if name not in homes and self.kept(name)]

    def kept(self, name: str) -> bool:
        """True if the fused model has a tensor of the base, in its shape and right dtype."""
        return name in self.fused and _alike(self.base[name], self.fused[name], self.dtype)

    def accepts(self, figures: Figures) -> bool:
        """The verdict on a touched tensor, or on a block of one."""
        return figures.rounded_once if self.bound is None else figures.error <= self.bound


def home_of(module: str) -> str:
    """The tensor that a module's delta is added to; a name that ends in ``.bias`` is that of a bias."""
    return module if module.endswith(".bias") else f"{module}.weight"


def delta_of(parts: Sequence[Part]) -> Delta:
    """The sum of what some adapters add to one module."""
    import numpy as np

    up = np.concatenate([part.up * part.factor for part in parts], axis=1)
    wholes = tuple((part.factor, part.whole) for part in parts if part.whole is not None)
    return Delta.of(up, np.concatenate([part.down for part in parts], axis=0), wholes)


def check_names(base: Tensors, fused: Tensors, dtype: str | None) -> Check:
    """The fused model has exactly the tensors of the base, in their shapes and dtypes (floating ones in ``dtype``)."""
    wrong = [n for n in base if n not in fused or not _alike(base[n], fused[n], dtype)]
    wrong += [n for n in fused if n not in base]
    detail = f"missing, unexpected, or of another shape or dtype: {'; '.join(fold_names(wrong)[:6])}" if wrong else ""
    return Check("L0", "every tensor of the base, its shape and dtype", not wrong, len(base), detail=detail)


def _alike(base: TensorRef, fused: TensorRef, dtype: str | None) -> bool:
    return base.shape == fused.shape and fused.dtype == stored_dtype(base, dtype)


def stored_dtype(base: TensorRef, dtype: str | None) -> str:
    """The dtype that a tensor of the base must have in the fused model."""
    return dtype if dtype is not None and base.dtype in FLOAT_DTYPES else base.dtype


def chosen(terms: Sequence[Term], only: Collection[str] | None) -> list[str]:
    """The modules of all adapters in order, or those of them that the user chose."""
    every = dict.fromkeys(module for term in terms for module in term.pairs)
    return [module for module in every if only is None or module in only]

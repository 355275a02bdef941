"""What a fuse may have stored in place of ``round(base + delta)``: which sum, and how it was rounded on the way.

Every guess is tried on a sample of rows: the numbers that it would have stored are compared with those that are stored,
by the same count as the proof's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from loraconv.lazy import TensorRef
from loraconv.verifier.fused.case import Case, Part, TensorResult, home_of
from loraconv.verifier.fused.figures import MISMOVED, MISROUNDED, judge, rounded, truncated
from loraconv.verifier.fused.rounding import numbers
from loraconv.verifier.partners import in_layer, other_projections

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

TWICE = "fused twice"
#: Elements that are looked at in a tensor.
_SAMPLE = 1 << 17
#: Other dtypes that numbers may have gone through, by the one they are stored in.
_THROUGH = {"F16": ("BF16",), "BF16": ("F16",), "F32": ("BF16", "F16"), "F64": ("F32", "BF16", "F16")}


@dataclass(frozen=True, slots=True)
class Product:
    """Rows of one part's ``up @ down``, what it is multiplied by, and the sizes to which float errors are proportional
    (see :class:`loraconv.verifier.fused.rounding.Delta`)."""

    raw: Array
    sizes: Array
    factor: float


@dataclass(frozen=True, slots=True)
class Cause:
    """What explains the stored numbers: what was added (``slug`` empty if the right delta), and how it was rounded
    (``how`` empty if once). ``constant`` is how often the delta counts, where it was multiplied."""

    slug: str = ""
    text: str = ""
    how: str = ""
    how_text: str = ""
    constant: float | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """A base and what may have been added to it."""

    slug: str
    text: str
    base: Array
    products: Sequence[Product]
    constant: float | None = None


#: ``(base, products, dtype) -> the sum``, not yet rounded to dtype for the last time.
Arithmetic = Callable[["Array", Sequence[Product], str], "Array"]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to add up and round."""

    slug: str
    text: str
    sum: Arithmetic


class Sample:
    """The rows of a touched tensor that have most wrong elements, in float64."""

    def __init__(self, case: Case, result: TensorResult) -> None:
        self.case, self.name, self.module = case, result.name, result.module
        self.dtype = case.fused[result.name].dtype
        self.range = _rows(case.fused[result.name], result.figures.worst_row)
        self.stored = numbers(case.fused[self.name].rows(*self.range), "F64")
        self.base = self.base_of(self.name)
        self.own = self.products(case.parts(self.module))

    def base_of(self, name: str) -> Array:
        """The same rows of a tensor of the base."""
        return numbers(self.case.base[name].rows(*self.range), "F64")

    def products(self, parts: Sequence[Part]) -> list[Product]:
        """The same rows of some parts' products."""
        made = []
        for part in parts:
            made.append(Product(*part.rows(*self.range), part.factor))
        return made

    def fits(self, guess: Sum, arithmetic: Arithmetic, more: float = 0.0) -> bool:
        """True if the guess would have stored these numbers, but for few and ``more`` of them."""
        import numpy as np

        exact = arithmetic(guess.base, guess.products, self.dtype)
        sizes = sum((abs(p.factor) * p.sizes for p in guess.products), np.zeros_like(exact))
        stored, flat = self.stored.ravel(), exact.ravel()
        wrong = judge(stored, flat, np.zeros_like(flat), sizes.ravel(), self.dtype).wrong
        moved = int(np.count_nonzero(self.stored != guess.base))
        return wrong <= MISROUNDED * exact.size + more and wrong <= MISMOVED * max(moved, wrong) + more


def _rows(ref: TensorRef, start: int) -> tuple[int, int]:
    return start, min(ref.shape[0], start + max(1, _SAMPLE // max(1, ref.shape[1])))


def explain(sample: Sample, before: Cause | None) -> Cause | None:
    """The first guess that fits, in the order of what is most usual; ``before`` explained another tensor."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ways = list(_arithmetics(sample))
        found = _again(sample, ways, before) if before is not None else None
        if found is not None:
            return found
        sums = list(_sums(sample))
        return _first(sample, ((s, w) for w in ways for s in sums)) or _some_constant(sample, ways)


def _again(sample: Sample, ways: Sequence[Way], before: Cause) -> Cause | None:
    """The same cause as in another tensor, if it fits here."""
    if before.constant and before.slug and not before.text:
        return _some_constant(sample, ways)
    wanted = replace(before, constant=None)
    every = ((s, w) for s in _sums(sample) for w in ways)
    return _first(sample, (pair for pair in every if replace(_cause(*pair), constant=None) == wanted))


def _first(sample: Sample, guesses: Iterable[tuple[Sum, Way]]) -> Cause | None:
    return next((_cause(guess, way) for guess, way in guesses if sample.fits(guess, way.sum)), None)


def _cause(guess: Sum, way: Way) -> Cause:
    return Cause(guess.slug, guess.text, way.slug, way.text, guess.constant)


def _sums(sample: Sample) -> Iterator[Sum]:
    base, own = sample.base, sample.own
    yield Sum("", "", base, own, 1.0)
    yield Sum("unfused", "", base, [])
    yield from _multiples(sample)
    if len(own) > 1:
        for n in range(len(own)):
            yield Sum("left-out", f"adapter {n + 1} was left out", base, [p for k, p in enumerate(own) if k != n])
            if len(own) > 2:
                yield Sum("left-out", f"adapter {n + 1} alone was fused", base, [own[n]])
    for other in other_projections(sample.module):
        ends = " and ".join(sorted(name.rpartition(".")[2] for name in (sample.module, other)))
        yield from _mistaken(sample, other, "swapped", f"{ends} are swapped")
    for step in (1, -1):
        text = f"layers are shifted: what belongs one layer {'on' if step > 0 else 'before'} was fused"
        yield from _mistaken(sample, in_layer(sample.module, step), "shifted", text)
    if len(set(sample.case.fused[sample.name].shape)) == 1:
        turned = [p.turned for p in sample.case.parts(sample.module)]
        yield Sum("transposed", "the delta is transposed", base, sample.products(turned))


def _multiples(sample: Sample) -> Iterator[Sum]:
    """The right products times wrong factors."""
    parts, own = sample.case.parts(sample.module), sample.own
    wrong: list[tuple[str, Callable[[Part], float]]] = [
        ("alpha was ignored", lambda p: float(p.strength)),
        ("the strength was ignored", lambda p: float(p.scale)),
        ("the scale was applied twice", lambda p: float(p.strength * p.scale * p.scale)),
        ("multiplied by the rank", lambda p: p.factor * p.rank),
        ("divided by the rank", lambda p: p.factor / p.rank),
        (TWICE, lambda p: p.factor * 2),
        ("halved", lambda p: p.factor / 2),
        ("subtracted instead of added", lambda p: -p.factor),
    ]
    named: dict[tuple[float, ...], list[str]] = {}
    for text, factor in wrong:
        named.setdefault(tuple(factor(part) for part in parts), []).append(text)
    for factors, texts in named.items():
        if any(f != p.factor for f, p in zip(factors, own, strict=True)):
            products = [replace(p, factor=f) for p, f in zip(own, factors, strict=True)]
            constant = factors[0] / own[0].factor if own[0].factor else None
            yield Sum("scale", " or ".join(texts), sample.base, products, constant)
    yield Sum("scale", TWICE, sample.base, [*own, *own], 2.0)  # with a rounding between the two


def _mistaken(sample: Sample, other: str | None, slug: str, text: str) -> Iterator[Sum]:
    """Another module's delta, on this module's own weight or on that module's."""
    case = sample.case
    if other is not None and case.shapes(other) == case.shapes(sample.module):
        products = sample.products(case.parts(other))
        yield Sum(slug, text, sample.base, products)
        if case.fits(other):
            yield Sum(slug, f"{text} (whole weights)", sample.base_of(home_of(other)), products)


def _arithmetics(sample: Sample) -> Iterator[Way]:
    yield Way("", "", _once)
    yield Way("rounding", "the sum was rounded after each adapter", _each)
    for low in (sample.dtype, *_THROUGH[sample.dtype]):
        if low in ("F16", "BF16"):
            text = f"the products were rounded to {low} before they were added"
            yield Way("rounding", text, partial(_products_rounded, low, False))
            yield Way("rounding", f"{text}, and before they were scaled", partial(_products_rounded, low, True))
    yield Way("truncated", "the numbers were cut off instead of rounded", _cut)
    for low in _THROUGH[sample.dtype]:
        yield Way("precision", f"the numbers were cast through {low}", partial(_cast, low))
    for low in (*_THROUGH[sample.dtype], sample.dtype):
        if low != sample.case.base[sample.name].dtype:
            text = f"the base was cast to {low} before the adapter was added"
            yield Way("precision", text, partial(_base_cast, low))


def _once(base: Array, products: Sequence[Product], dtype: str) -> Array:
    total = base
    for product in products:
        total = total + product.factor * product.raw
    return total


def _each(base: Array, products: Sequence[Product], dtype: str) -> Array:
    return _added(base, [p.factor * p.raw for p in products], dtype)


def _products_rounded(low: str, twice: bool, base: Array, products: Sequence[Product], dtype: str) -> Array:
    deltas = [rounded(p.factor * (rounded(p.raw, low) if twice else p.raw), low) for p in products]
    return _added(base, deltas, dtype)


def _added(base: Array, deltas: Sequence[Array], dtype: str) -> Array:
    """One after the other, the sum stored between them."""
    total = base
    for number, delta in enumerate(deltas):
        total = (rounded(total, dtype) if number else total) + delta
    return total


def _cut(base: Array, products: Sequence[Product], dtype: str) -> Array:
    return truncated(_once(base, products, dtype), dtype)


def _cast(low: str, base: Array, products: Sequence[Product], dtype: str) -> Array:
    return rounded(_once(base, products, dtype), low)


def _base_cast(low: str, base: Array, products: Sequence[Product], dtype: str) -> Array:
    return _once(rounded(base, low), products, dtype)


def _some_constant(sample: Sample, arithmetics: Sequence[Way]) -> Cause | None:
    """The right delta times a constant, found so that the stored change lies along the delta as much as that of the
    guess: in the mean, rounding takes more of a weak delta than of a strong one."""
    import numpy as np

    delta = _once(sample.base * 0, sample.own, sample.dtype)
    change = sample.stored - sample.base
    along = float(np.vdot(change, delta))
    constant = along / (float(np.vdot(delta, delta)) or 1.0)
    for _ in range(8):
        would = rounded(sample.base + constant * delta, sample.dtype) - sample.base
        share = float(np.vdot(would, delta))
        if not (np.isfinite(constant) and share and along):
            return None
        constant *= along / share
    guess = Sum("scale", "", sample.base, [replace(p, factor=p.factor * constant) for p in sample.own], constant)
    more = 2 * delta.size**0.5  # the constant is known to one part in the root of the count
    return next((_cause(guess, way) for way in arithmetics if sample.fits(guess, way.sum, more)), None)

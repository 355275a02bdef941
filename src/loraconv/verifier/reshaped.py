"""The proof of a merged or resized adapter: its delta against the sum of what its sources add.

Where no rank was cut off, every stored number is that of the sum, rounded at most once. Where it was, the error in the
Frobenius norm is measured at rank size, from both deltas, and has to be what was stated, no more than was asked for,
and no more than the best approximation of that rank leaves (Eckart and Young, from the singular values of the sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from loraconv.lazy import TensorRef
from loraconv.names import fold_names
from loraconv.verifier.adapter import unread_scale
from loraconv.verifier.aside import SetAside, check_aside
from loraconv.verifier.check import as_failure, read_adapter_files
from loraconv.verifier.controls import adapter_controls
from loraconv.verifier.delta import Grams, distance, held, sides
from loraconv.verifier.numbers import Expectation, Held, Pair, compare, difference_norm, product_norm, values
from loraconv.verifier.parallel import in_parallel
from loraconv.verifier.proof import Check, Control, Proof
from loraconv.verifier.spectrum import singular_values

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Pairs = Mapping[str, Pair]

NAMES = "every module, its size and dtype"
NUMBERS = "numbers of modules that keep their rank"
STATED = "error of modules whose rank was cut, as stated"
LEAST = "no adapter of that rank is nearer"
ASKED = "error that was asked for"


@dataclass(frozen=True, slots=True)
class Term:
    """A source of the sum: its factors by the format's own definition, and the user's strength."""

    pairs: Pairs
    strength: Fraction

    def weight(self, module: str) -> Fraction | float:
        """What the product of the factors is multiplied by."""
        scale = self.pairs[module].scale
        return self.strength * scale if isinstance(scale, Fraction) else float(self.strength) * scale


@dataclass(frozen=True, slots=True)
class Claims:
    """What was said about the output: the relative error of each module whose factors were computed anew, the greatest
    that the user allows (None: any), and the dtype of all factors (None: that of the sources, or float32 where that
    would round)."""

    errors: Mapping[str, float]
    asked: float | None = None
    dtype: str | None = None


def prove_reshaped(
    folder: Path,
    *,
    kind: str,
    files: Sequence[str],
    settings_file: str,
    terms: Sequence[Term],
    claims: Claims,
    scale_ignored: bool,
    aside: tuple[SetAside, Mapping[str, TensorRef]] = (SetAside(), MappingProxyType({})),
) -> Proof:
    """Compare the adapter of format ``kind`` that was written into ``folder`` with the sum of its sources.

    ``scale_ignored`` says that some consumer reads the file at scale 1, so that the stored scales must be 1. ``aside``
    are the keys that are no part of the adapter by the user's wish, and the tensors of the source that has them. Raises
    :class:`ProofFailed` where the output cannot be read or compared at all.
    """
    with as_failure(folder), ExitStack() as stack:
        written = read_adapter_files(folder, kind, files, settings_file, stack, aside[0].kept)
        proof = _prove(terms, written.pairs, claims, scale_ignored)
        return replace(proof, checks=(*proof.checks, *check_aside(*aside, written.kept)))


def _prove(terms: Sequence[Term], stored: Pairs, claims: Claims, scale_ignored: bool) -> Proof:
    apart = sorted({m for term in terms for m in term.pairs} ^ set(stored))
    odd = [m for m in stored if m not in apart and not _of_one_size([t.pairs[m] for t in terms if m in t.pairs])]
    if apart or odd:
        kind = "missing or unexpected" if apart else "of another size in another source"
        detail = f"{kind}: {'; '.join(fold_names(apart or odd)[:4])}"
        return Proof("adapter", (Check("L0", NAMES, False, len(stored), detail=detail),), ())
    sums = _Sums(terms, {module: pair.scale for module, pair in stored.items()})
    least = _Least()
    seen = list(in_parallel(lambda m: _look(m, sums[m], stored[m], claims, least), list(stored)))
    checks = list(_checks(seen, claims))
    if scale_ignored:
        checks.append(unread_scale(stored))
    if not checks[0].passed:
        return Proof("adapter", tuple(checks), ())
    expected = Expectation(sums, {m: (pair.down.dtype, pair.up.dtype) for m, pair in stored.items()})
    controls = adapter_controls(expected, stored, lambda part, spoilt: _first_fault(part, spoilt, claims, least))
    return Proof("adapter", tuple(checks), (*controls, *_merge_controls(terms, stored, claims)))


def _of_one_size(pairs: Sequence[Pair]) -> bool:
    """True if all are added to one weight, of a convolution with one kernel."""
    return all(one.fits(other) for one in pairs for other in pairs)


class _Sums(Mapping[str, Pair]):
    """Module -> what the sources add, their factors side by side in float64; made each time that it is asked for.

    ``scales`` are those that the output applies: they are taken out of ``up``.
    """

    def __init__(self, terms: Sequence[Term], scales: Mapping[str, Fraction | float]) -> None:
        self.terms, self.scales = terms, scales

    def __getitem__(self, module: str) -> Pair:
        import numpy as np

        parts = [(term.weight(module), term.pairs[module]) for term in self.terms if module in term.pairs]
        scale = self.scales[module]
        if len(parts) == 1:
            weight, pair = parts[0][0], held(parts[0][1])
            return replace(pair, up=Held(values(pair.up) * _ratio(weight, scale), "F64"), scale=scale)
        up = np.concatenate([values(pair.up) * _ratio(weight, scale) for weight, pair in parts], axis=1)
        down = np.concatenate([values(pair.down) for _, pair in parts], axis=0)
        dtypes = [side.dtype for _, pair in parts for side in (pair.down, pair.up)]
        kernel = next((pair.kernel for _, pair in parts if pair.kernel), ())
        return Pair(Held(down, _wide(dtypes)), Held(up, "F64"), scale, kernel=kernel)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)


def _ratio(weight: Fraction | float, scale: Fraction | float) -> float:
    """``weight / scale``. A file says alpha as a float64: what its rounding makes of a short number is that number."""
    import numpy as np

    ratio = float(weight / scale)
    short = float(np.float32(ratio))
    return short if abs(ratio - short) <= 2.0**-50 * abs(ratio) else ratio


def _wide(dtypes: Sequence[str]) -> str:
    """The one dtype of several tensors, or the one that holds them all."""
    return dtypes[0] if len(set(dtypes)) == 1 else "F64" if "F64" in dtypes else "F32"


# ---------------------------------------------------------------------------------------------------------------------
# one module


class _Looked(Protocol):
    @property
    def module(self) -> str: ...
    @property
    def faults(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found out about a module: the names of the checks that it fails, and its relative error and bound."""

    module: str
    cut: bool
    faults: tuple[str, ...] = ()
    equal: bool = False
    error: float = 0.0
    bound: float = 0.0


def _look(module: str, expected: Pair, stored: Pair, claims: Claims, least: _Least) -> _Seen:
    cut = module in claims.errors
    rank, rank_stored = expected.shape[1], stored.shape[1]
    fitting = expected.fits(stored) and stored.keeps_kernel_of(expected)
    fitting = fitting and (rank_stored <= rank if cut else rank_stored == rank)
    if not fitting or not _right_dtypes(expected, stored, claims):
        return _Seen(module, cut, (NAMES,))
    if cut:
        return _look_at_cut(module, expected, held(stored), claims, least)
    return _look_at_whole(module, expected, held(stored), claims)


def _right_dtypes(expected: Pair, stored: Pair, claims: Claims) -> bool:
    told = {stored.down.dtype, stored.up.dtype}
    if claims.dtype is not None:
        return told == {claims.dtype}
    source = expected.down.dtype
    return told in ({source}, {"F64"}) or (told == {"F32"} and source != "F64")


def _look_at_whole(module: str, expected: Pair, stored: Pair, claims: Claims) -> _Seen:
    """Every number, in the order of the sources; nothing may be rounded to 16 bits that nobody asked for."""
    outcome = compare(expected, stored)
    if outcome.equal:
        return _Seen(module, False, equal=True)
    narrow = claims.dtype is None and stored.up.dtype in ("F16", "BF16")
    faults = () if outcome.within and not narrow else (NUMBERS,)
    grams = Grams.of(expected)
    error, scale = distance(expected, stored), grams.norm or 1.0
    return _Seen(module, False, faults, False, error / scale, _room(grams, stored) / scale)


def _look_at_cut(module: str, expected: Pair, stored: Pair, claims: Claims, least: _Least) -> _Seen:
    grams = Grams.of(expected)
    error, norm = distance(expected, stored), grams.norm
    room, stated = _room(grams, stored), claims.errors[module] * norm
    faults = [] if abs(error - stated) <= room else [STATED]
    if not error <= least.of(module, grams, stored.shape[1]) + room:
        faults.append(LEAST)
    if claims.asked is not None and not error <= claims.asked * norm:
        faults.append(ASKED)
    scale = norm or 1.0
    return _Seen(module, True, tuple(faults), False, error / scale, (stated + room) / scale)


def _room(expected: Grams, stored: Pair) -> float:
    """What the rounding of the stored numbers, and float64 in the products, can add to an error."""
    import numpy as np

    size = float(np.linalg.norm(expected.up)) * float(np.linalg.norm(expected.down)) * abs(float(expected.pair.scale))
    return Grams.of(stored).room() + 2.0**-40 * size


class _Least:
    """What the best approximation of a rank leaves of a sum: ``sqrt(s[rank]**2 + s[rank + 1]**2 + ...)`` of its
    singular values, which are computed once for a module."""

    def __init__(self) -> None:
        self._squares: dict[str, Array] = {}

    def of(self, module: str, grams: Grams, rank: int) -> float:
        import numpy as np

        if module not in self._squares:
            self._squares[module] = _squares(grams)
        squares = self._squares[module]
        # An eigenvalue of zero comes out as a rounding error of the greatest one.
        doubt = 2.0**-44 * float(np.trace(grams.gram_up)) * float(np.trace(grams.gram_down))
        left = float(np.sum(np.maximum(squares[: max(len(squares) - rank, 0)], 0.0)))
        return float(np.sqrt(left + doubt)) * abs(float(grams.pair.scale))


def _squares(grams: Grams) -> Array:
    """The squares of the singular values, smallest first, not scaled: from the Gram matrices, or from the two parts of
    a Kronecker product."""
    import numpy as np

    if grams.pair.grid is not None:
        return np.square(singular_values(replace(grams.pair, scale=Fraction(1))))[::-1]
    lengths, turn = np.linalg.eigh(grams.gram_up)
    root = turn * np.sqrt(np.maximum(lengths, 0.0))
    return np.asarray(np.linalg.eigvalsh(root.T @ grams.gram_down @ root))


# ---------------------------------------------------------------------------------------------------------------------
# all modules


def _checks(seen: Sequence[_Seen], claims: Claims) -> Iterator[Check]:
    yield named_check("L0", NAMES, seen)
    whole, cut = [one for one in seen if not one.cut], [one for one in seen if one.cut]
    if whole:
        check = _measured(NUMBERS, whole)
        same = f"{sum(one.equal for one in whole)} of {len(whole)} equal number for number"
        yield replace(check, detail=check.detail or same)
    if cut:
        check = _measured(STATED, cut)
        yield check
        yield named_check("L2", LEAST, cut)
        if claims.asked is not None:
            yield replace(named_check("L2", ASKED, cut), figure=check.figure, bound=claims.asked)


def _measured(name: str, seen: Sequence[_Seen]) -> Check:
    """A check with the greatest error and the greatest bound of its modules."""
    figure, bound = max(one.error for one in seen), max(one.bound for one in seen)
    return replace(named_check("L2", name, seen), figure=figure, bound=bound)


def named_check(level: str, name: str, seen: Sequence[_Looked]) -> Check:
    """The check of this name over all modules; it names those that fail it."""
    wrong = [one.module for one in seen if name in one.faults]
    return Check(level, name, not wrong, len(seen), detail="; ".join(fold_names(wrong)[:4]))


def _first_fault(expected: Expectation, stored: Pairs, claims: Claims, least: _Least) -> str:
    """The first check that a set of pairs fails, or an empty string: what a control has to provoke."""
    if set(expected.pairs) != set(stored):
        return NAMES
    found = (_look(module, pair, stored[module], claims, least).faults for module, pair in expected.pairs.items())
    return next((faults[0] for faults in found if faults), "")


# ---------------------------------------------------------------------------------------------------------------------
# the mistakes that only a sum of adapters can have


def _merge_controls(terms: Sequence[Term], stored: Pairs, claims: Claims) -> tuple[Control, ...]:
    """What others get wrong, added to the stored delta of the first module that several sources have."""
    module = next((m for m in stored if sum(m in term.pairs for term in terms) > 1), None)
    if module is None:
        return ()
    parts = [(float(term.weight(module)), term.pairs[module], term.strength) for term in terms if module in term.pairs]
    return tuple(
        _merge_control(name, extra(parts), module, _Sums(terms, {module: stored[module].scale})[module], stored, claims)
        for name, extra in _MISTAKES.items()
    )


_Part = tuple[float, Pair, Fraction]
_Extra = list[tuple["Array", "Array"]]


def _left_out(parts: Sequence[_Part]) -> _Extra:
    weight, pair, _ = parts[-1]
    return [(values(pair.up) * -weight, values(pair.down))]


def _strengths_forgotten(parts: Sequence[_Part]) -> _Extra:
    scales = [(weight / float(strength) - weight, pair) for weight, pair, strength in parts]
    return [(values(pair.up) * more, values(pair.down)) for more, pair in scales if more]


def _cross_terms(parts: Sequence[_Part]) -> _Extra:
    """The sum of the ups times the sum of the downs, as peft's ``combination_type="linear"`` makes it."""
    if len({pair.shape for _, pair, _ in parts}) > 1:
        return []
    pairs = [(one, other) for one in parts for other in parts if one is not other]
    return [(values(one[1].up) * one[0], values(other[1].down)) for one, other in pairs]


_MISTAKES: dict[str, Callable[[Sequence[_Part]], _Extra]] = {
    "an adapter left out": _left_out,
    "strengths forgotten": _strengths_forgotten,
    "factors added up, with cross terms": _cross_terms,
}


def _merge_control(name: str, extra: _Extra, module: str, expected: Pair, stored: Pairs, claims: Claims) -> Control:
    import numpy as np

    if not _moves(extra):
        return Control(name, None, "it changes no number here")
    ups, downs = zip(sides(stored[module]), *extra, strict=True)
    spoilt_up, spoilt_down = np.concatenate(ups, axis=1), np.concatenate(downs, axis=0)
    error = difference_norm(*sides(expected), spoilt_up, spoilt_down)
    grams = Grams.of(expected)
    apart = abs(error - claims.errors.get(module, 0.0) * grams.norm) > _room(grams, held(stored[module]))
    return Control(name, apart, "L2 delta" if apart else "")


def _moves(extra: _Extra) -> bool:
    """False where what a mistake adds is zero, or cancels itself to what float64 leaves."""
    import numpy as np

    if not extra:
        return False
    ups, downs = zip(*extra, strict=True)
    size = product_norm(np.concatenate(ups, axis=1), np.concatenate(downs, axis=0))
    sizes = sum(float(np.linalg.norm(up)) * float(np.linalg.norm(down)) for up, down in extra)
    return size == float("inf") or size > 2.0**-40 * sizes

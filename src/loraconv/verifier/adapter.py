"""The proof of a converted adapter: every module there, every factor the same number, every control caught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraconv.names import fold_names
from loraconv.verifier.controls import adapter_controls
from loraconv.verifier.delta import held
from loraconv.verifier.numbers import (
    Computed,
    Expectation,
    Held,
    Outcome,
    Pair,
    compare,
    relative_error,
    same_bytes,
)
from loraconv.verifier.parallel import beside_it, in_parallel
from loraconv.verifier.proof import Check, Proof

Pairs = Mapping[str, Pair]


def prove_adapter(expected: Expectation, stored: Pairs, *, scale_ignored: bool) -> Proof:
    """Compare every module of ``stored`` (what is on disk) with the source.

    ``scale_ignored`` says that some consumer reads the file at scale 1, so that the stored scales must be 1.
    """
    if not (names := _names(expected, stored)).passed:
        return Proof("adapter", (names,), ())
    with beside_it(lambda: adapter_controls(expected, stored, _first_failure)) as mistakes:
        checks = check_adapter(expected, stored)
    if scale_ignored:
        checks.append(unread_scale(stored))
    return Proof("adapter", tuple(checks), mistakes.result())


def check_adapter(expected: Expectation, stored: Pairs) -> list[Check]:
    """L0 names and shapes, L1 bytes of what is only renamed, L2 the delta of every module."""
    names = _names(expected, stored)
    if not names.passed:
        return [names]
    pairs = expected.pairs
    seen = list(in_parallel(lambda module: _look(module, pairs[module], stored[module]), pairs))
    inexact = [one.module for one in seen if not one.outcome.equal]
    figures = dict(zip(inexact, in_parallel(lambda m: relative_error(pairs[m], stored[m]), inexact), strict=True))
    return [names, _copied_bytes(seen), _delta(seen, figures)]


def _first_failure(expected: Expectation, stored: Pairs) -> str:
    """The first check that a set of pairs fails, or an empty string: what a control has to provoke."""
    names = _names(expected, stored)
    if not names.passed:
        return "L0 names, shapes and dtypes"
    seen = [_look(module, pair, stored[module]) for module, pair in expected.pairs.items()]
    if not _copied_bytes(seen).passed:
        return "L1 bytes"
    return "" if all(one.outcome.within for one in seen) else "L2 delta"


@dataclass(frozen=True, slots=True)
class _Seen:
    """One module: how many of its factors are ``renamed`` only, those of them with ``other`` bytes, and whether the
    numbers are the same."""

    module: str
    renamed: int
    other: tuple[str, ...]
    outcome: Outcome


def _look(module: str, pair: Pair, stored: Pair) -> _Seen:
    """Factors that keep dtype and scale must be the same bytes; then the same numbers need no second look."""
    sides = [("down", pair.down, stored.down)]
    if pair.scale == stored.scale:
        sides.append(("up", pair.up, stored.up))
    made = Held, Computed
    kept = [(side, one, two) for side, one, two in sides if not isinstance(one, made) and not isinstance(two, made)]
    renamed = [(side, one, two) for side, one, two in kept if one.dtype == two.dtype]
    other = tuple(f"{module}.{side}" for side, one, two in renamed if not same_bytes(one, two))
    if len(renamed) == 2 and not other:
        return _Seen(module, 2, (), Outcome(True, True))
    return _Seen(module, len(renamed), other, compare(held(pair), held(stored)))


def _names(expected: Expectation, stored: Pairs) -> Check:
    wrong = sorted(set(expected.pairs) ^ set(stored))
    for module in set(expected.pairs) & set(stored):
        pair = stored[module]
        dtypes = (pair.down.dtype, pair.up.dtype)
        own = expected.pairs[module]
        same = pair.shape == own.shape and pair.fits(own) and pair.keeps_kernel_of(own)
        if not same or dtypes != expected.dtypes[module]:
            wrong.append(module)
    detail = f"missing, unexpected or of another shape: {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    return Check("L0", "every module, shape and dtype", not wrong, len(expected.pairs), detail=detail)


def _copied_bytes(seen: Sequence[_Seen]) -> Check:
    wrong = [name for one in seen for name in one.other]
    detail = f"other bytes in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    count = sum(one.renamed for one in seen)
    return Check("L1", "bytes of factors that are only renamed", not wrong, count, detail=detail)


def _delta(seen: Sequence[_Seen], figures: Mapping[str, tuple[float, float]]) -> Check:
    """``figures``: the relative error and its bound of the modules that are not equal number for number."""
    wrong = [one.module for one in seen if not one.outcome.within]
    detail = f"{sum(one.outcome.equal for one in seen)} of {len(seen)} equal number for number"
    if wrong:
        detail = f"another delta in {'; '.join(fold_names(wrong)[:4])}"
    error = max((error for error, _ in figures.values()), default=0.0)
    bound = max((bound for _, bound in figures.values()), default=0.0)
    return Check("L2", "delta of every module in float64", not wrong, len(seen), error, bound, detail)


def unread_scale(stored: Pairs) -> Check:
    wrong = [module for module, pair in stored.items() if pair.scale != 1]
    detail = f"consumers that ignore the header would apply another strength to {len(wrong)} modules" if wrong else ""
    return Check("L2", "same strength where the header is not read", not wrong, len(stored), detail=detail)

"""The proof of a converted adapter: every module there, every factor the same number, every control caught."""

from __future__ import annotations

from collections.abc import Mapping

from loraconv.names import fold_names
from loraconv.verifier.controls import adapter_controls
from loraconv.verifier.numbers import Expectation, Held, Pair, compare, relative_error, same_bytes
from loraconv.verifier.proof import Check, Proof

Pairs = Mapping[str, Pair]


def prove_adapter(expected: Expectation, stored: Pairs, *, scale_ignored: bool) -> Proof:
    """Compare every module of ``stored`` (what is on disk) with the source.

    ``scale_ignored`` says that some consumer reads the file at scale 1, so that the stored scales must be 1.
    """
    checks = check_adapter(expected, stored)
    if not checks[0].passed:
        return Proof("adapter", tuple(checks), ())
    if scale_ignored:
        checks.append(unread_scale(stored))
    return Proof("adapter", tuple(checks), adapter_controls(expected, stored, _first_failure))


def check_adapter(expected: Expectation, stored: Pairs) -> list[Check]:
    """L0 names and shapes, L1 bytes of what is only renamed, L2 the delta of every module."""
    names = _names(expected, stored)
    if not names.passed:
        return [names]
    return [names, _copied_bytes(expected.pairs, stored), _delta(expected.pairs, stored)]


def _first_failure(expected: Expectation, stored: Pairs) -> str:
    """The first check that a set of pairs fails, or an empty string: what a control has to provoke."""
    names = _names(expected, stored)
    if not names.passed:
        return "L0 names, shapes and dtypes"
    if not _copied_bytes(expected.pairs, stored).passed:
        return "L1 bytes"
    right = all(compare(pair, stored[module]).within for module, pair in expected.pairs.items())
    return "" if right else "L2 delta"


def _names(expected: Expectation, stored: Pairs) -> Check:
    wrong = sorted(set(expected.pairs) ^ set(stored))
    for module in set(expected.pairs) & set(stored):
        pair = stored[module]
        dtypes = (pair.down.dtype, pair.up.dtype)
        if pair.shape != expected.pairs[module].shape or dtypes != expected.dtypes[module]:
            wrong.append(module)
    detail = f"missing, unexpected or of another shape: {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    return Check("L0", "every module, shape and dtype", not wrong, len(expected.pairs), detail=detail)


def _copied_bytes(expected: Pairs, stored: Pairs) -> Check:
    """Factors that keep dtype and scale must be the same bytes."""
    count, wrong = 0, []
    for module, pair in expected.items():
        other = stored[module]
        sides = [("down", pair.down, other.down)]
        if pair.scale == other.scale:
            sides.append(("up", pair.up, other.up))
        for side, one, two in sides:
            if isinstance(one, Held) or isinstance(two, Held) or one.dtype != two.dtype:
                continue
            count += 1
            if not same_bytes(one, two):
                wrong.append(f"{module}.{side}")
    detail = f"other bytes in {'; '.join(fold_names(wrong)[:4])}" if wrong else ""
    return Check("L1", "bytes of factors that are only renamed", not wrong, count, detail=detail)


def _delta(expected: Pairs, stored: Pairs) -> Check:
    outcomes = {module: compare(pair, stored[module]) for module, pair in expected.items()}
    inexact = {m: relative_error(expected[m], stored[m]) for m, outcome in outcomes.items() if not outcome.equal}
    wrong = [module for module, outcome in outcomes.items() if not outcome.within]
    detail = f"{len(outcomes) - len(inexact)} of {len(outcomes)} equal number for number"
    if wrong:
        detail = f"another delta in {'; '.join(fold_names(wrong)[:4])}"
    error = max((error for error, _ in inexact.values()), default=0.0)
    bound = max((bound for _, bound in inexact.values()), default=0.0)
    return Check("L2", "delta of every module in float64", not wrong, len(outcomes), error, bound, detail)


def unread_scale(stored: Pairs) -> Check:
    wrong = [module for module, pair in stored.items() if pair.scale != 1]
    detail = f"consumers that ignore the header would apply another strength to {len(wrong)} modules" if wrong else ""
    return Check("L2", "same strength where the header is not read", not wrong, len(stored), detail=detail)

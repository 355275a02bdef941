"""Deliberate mistakes. A proof is only worth something if each of them, made in its output, fails it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loraconv.verifier.delta import ModuleResult, compare_module
from loraconv.verifier.numbers import Expectation, Held, Pair, Tensor, coarse, in_memory, values
from loraconv.verifier.proof import Control

if TYPE_CHECKING:
    from loraconv.verifier.numbers import Array

Pairs = Mapping[str, Pair]
Judge = Callable[[Expectation, Pairs], str]


def adapter_controls(
    expected: Expectation, stored: Pairs, judge: Judge, harmless: Harmless | None = None
) -> tuple[Control, ...]:
    """Make each mistake in a few modules of the stored adapter and let ``judge`` name the check that fails.

    A mistake that is ``harmless``, which without that leaves every number as it is (twice zero), cannot be caught and
    is recorded as such.
    """
    import numpy as np

    # Infinity times zero is one of the mistakes.
    with np.errstate(over="ignore", invalid="ignore"):
        harmless = harmless or _changes_nothing
        return tuple(_control(expected, name, spoilt, judge, harmless) for name, spoilt in _mistakes(stored))


def comparison_controls(
    one: Pairs, other: Pairs, results: Iterable[ModuleResult], bound: float | None
) -> tuple[Control, ...]:
    """Make each mistake in a few modules of ``other``, which was found to be the same as ``one``, and compare again.

    A mistake has to break what made the modules the same: that every number was equal, or equal but for one rounding;
    else that the deltas were, within the ``bound`` of the comparison. A mistake that leaves the deltas as they are is
    recorded as such.
    """
    results = list(results)
    exact, near = all(result.equal for result in results), bound is None and all(result.near for result in results)

    def judge(part: Expectation, spoilt: Pairs) -> str:
        if set(part.pairs) != set(spoilt):
            return "modules"
        again = [compare_module(m, pair, spoilt[m], bound) for m, pair in part.pairs.items()]
        if exact:
            return "" if all(result.equal for result in again) else "numbers"
        if near:
            return "" if all(result.near for result in again) else "roundings"
        return "" if all(result.same for result in again) else "delta"

    dtypes = {module: (pair.down.dtype, pair.up.dtype) for module, pair in other.items()}
    return adapter_controls(Expectation(one, dtypes), other, judge, _same_deltas)


def _same_deltas(spoilt: Spoilt) -> bool:
    """True if float64 sees no difference between the deltas before and after."""
    if set(spoilt.before) != set(spoilt.after):
        return False
    return all(compare_module(m, pair, spoilt.after[m], bound=2.0**-40).same for m, pair in spoilt.before.items())


def _control(expected: Expectation, name: str, spoilt: Spoilt | None, judge: Judge, harmless: Harmless) -> Control:
    if not spoilt:
        return Control(name, None, "this adapter has no place for it")
    touched = [m for m in spoilt.before if m in expected.pairs]
    part = replace(
        expected,
        pairs={m: expected.pairs[m] for m in touched},
        dtypes={m: expected.dtypes[m] for m in touched},
    )
    failed = judge(part, spoilt.after)
    if failed:
        return Control(name, True, failed)
    if harmless(spoilt):
        return Control(name, None, "it changes no number here")
    return Control(name, False, "")


class Spoilt:
    """A few modules of an adapter before and after a mistake."""

    def __init__(self, before: dict[str, Pair], after: dict[str, Pair]) -> None:
        self.before, self.after = before, after


Harmless = Callable[[Spoilt], bool]


def _changes_nothing(spoilt: Spoilt) -> bool:
    import numpy as np

    if set(spoilt.before) != set(spoilt.after):
        return False
    for module, pair in spoilt.before.items():
        other = spoilt.after[module]
        if pair.shape != other.shape:
            return False
        one, two = values(pair.up) * float(pair.scale), values(other.up) * float(other.scale)
        if not (
            np.array_equal(one, two, equal_nan=True)
            and np.array_equal(values(pair.down), values(other.down), equal_nan=True)
        ):
            return False
    return True


def _mistakes(stored: Pairs) -> Iterator[tuple[str, Spoilt | None]]:
    first = next(iter(stored))
    pair = stored[first]
    one = {first: pair}
    yield "q and k swapped", _swapped(stored)
    yield "a module dropped", Spoilt(one, {})
    yield "scale doubled", Spoilt(one, {first: replace(pair, scale=pair.scale * 2)})
    rank = pair.shape[1]
    yield "scale divided by rank", Spoilt(one, {first: replace(pair, scale=pair.scale / rank)}) if rank > 1 else None
    yield "factors transposed", Spoilt(one, {first: Pair(_flipped(pair.up), _flipped(pair.down), pair.scale)})
    yield "layers shifted by one", _shifted(stored)
    yield "up zeroed", Spoilt(one, {first: replace(pair, up=_changed(pair.up, lambda array: array * 0))})
    yield (
        "stored in a lower precision",
        Spoilt(one, {first: replace(pair, up=_changed(pair.up, coarse))}),
    )


def _changed(tensor: Tensor, change: Callable[[Array], Array]) -> Held:
    """Other numbers in the place of a tensor's, which count as stored like those."""
    held = in_memory(tensor)
    return replace(held, values=change(held.values))


def _swapped(stored: Pairs) -> Spoilt | None:
    """q and k of the first layer that has both; where there is none, any two modules of one shape."""
    pairs = [(m, m[: -len("to_q")] + "to_k") for m in stored if m.endswith("to_q")]
    both = next(((q, k) for q, k in pairs if k in stored), None)
    if both is None:
        both = next(((a, b) for a in stored for b in stored if a < b and stored[a].shape == stored[b].shape), None)
    if both is None:
        return None
    a, b = both
    return Spoilt({a: stored[a], b: stored[b]}, {a: stored[b], b: stored[a]})


def _flipped(tensor: Tensor) -> Held:
    return Held(values(tensor).T, tensor.dtype)


def _shifted(stored: Pairs) -> Spoilt | None:
    """The first module gets the factors of the same module one layer on; alone, it gets another layer's name."""
    module = next((m for m in stored if any(step.isdecimal() for step in m.split("."))), None)
    if module is None:
        return None
    steps = module.split(".")
    at = next(n for n, step in enumerate(steps) if step.isdecimal())
    later = ".".join([*steps[:at], str(int(steps[at]) + 1), *steps[at + 1 :]])
    if later in stored:
        return Spoilt({module: stored[module]}, {module: stored[later]})
    return Spoilt({module: stored[module]}, {later: stored[module]})

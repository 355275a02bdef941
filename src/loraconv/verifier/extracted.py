"""The proof of an extracted LoRA: base plus adapter against the fine-tune, weight by weight, in float64.

The error is measured on the weights themselves, a few rows at a time, and has to be what was stated and no more than
was asked for. Every tensor in which the two models differ is a module of the adapter, or was said to be left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loraconv.lazy import TensorRef
from loraconv.names import FLOAT_DTYPES, fold_names
from loraconv.verifier.adapter import unread_scale
from loraconv.verifier.check import as_failure, read_adapter_files
from loraconv.verifier.controls import adapter_controls
from loraconv.verifier.delta import Grams, sides
from loraconv.verifier.numbers import Expectation, Pair, same_bytes, values
from loraconv.verifier.parallel import in_parallel
from loraconv.verifier.proof import Check, Proof
from loraconv.verifier.reshaped import ASKED, NAMES, STATED, Claims, named_check

Pairs = Mapping[str, Pair]
Tensors = Mapping[str, TensorRef]

ALL = "every changed tensor is in the adapter, or said to be left out"
#: Elements of a weight that are looked at in one go.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Models:
    """The tensors of the fine-tune and of its base, by the same names."""

    tuned: Tensors
    base: Tensors

    def rows(self, module: str) -> Iterator[tuple[slice, TensorRef, TensorRef]]:
        """A weight in both models, some rows at a time."""
        tuned, base = (tensors[f"{module}.weight"] for tensors in (self.tuned, self.base))
        step = max(1, _BLOCK // max(tuned.shape[1], 1))
        for start in range(0, tuned.shape[0], step):
            stop = min(start + step, tuned.shape[0])
            yield slice(start, stop), tuned.rows(start, stop), base.rows(start, stop)

    def changed(self, name: str) -> bool:
        """True if a tensor has other numbers, in any dtype."""
        import numpy as np

        one, other = self.tuned[name], self.base[name]
        if same_bytes(one, other):
            return False
        if one.dtype not in FLOAT_DTYPES or other.dtype not in FLOAT_DTYPES:
            return True
        return not np.array_equal(values(one), values(other))


def prove_extracted(
    folder: Path,
    *,
    kind: str,
    files: Sequence[str],
    settings_file: str,
    tuned: Tensors,
    base: Tensors,
    claims: Claims,
    left: frozenset[str],
    scale_ignored: bool,
) -> Proof:
    """Compare the adapter of format ``kind`` in ``folder`` with what ``tuned`` and ``base`` differ by.

    ``left`` are the changed tensors that were said to be left out. Raises :class:`ProofFailed` where the output cannot
    be read or compared at all.
    """
    models = Models(tuned, base)
    with as_failure(folder), ExitStack() as stack:
        stored = read_adapter_files(folder, kind, files, settings_file, stack).pairs
        accounted = _accounted(models, stored, left)
        if not accounted.passed:
            return Proof("adapter", (accounted,), ())
        seen = list(in_parallel(lambda module: _look(models, module, stored[module], claims), list(stored)))
        sizes, *errors = _checks(seen, claims)
        checks = [sizes, accounted, *errors]
        if scale_ignored:
            checks.append(unread_scale(stored))
        if not all(check.passed for check in checks):
            return Proof("adapter", tuple(checks), ())
        # The judge takes the deltas from the models, so that the expected pairs only name the modules.
        expected = Expectation(stored, {m: (pair.down.dtype, pair.up.dtype) for m, pair in stored.items()})
        controls = adapter_controls(expected, stored, lambda part, spoilt: _first_fault(models, part, spoilt, claims))
    return Proof("adapter", tuple(checks), controls)


def _accounted(models: Models, stored: Pairs, left: frozenset[str]) -> Check:
    same_names = set(models.tuned) == set(models.base)
    changed = {name for name in models.base if models.changed(name)} if same_names else set()
    wrong = sorted(changed ^ (left | {f"{module}.weight" for module in stored}))
    return Check("L0", ALL, same_names and not wrong, len(models.base), detail="; ".join(fold_names(wrong)[:4]))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found out about a module: the checks that it fails, its relative error and what that may be."""

    module: str
    faults: tuple[str, ...]
    error: float = 0.0
    bound: float = 0.0


def _look(models: Models, module: str, stored: Pair, claims: Claims) -> _Seen:
    import numpy as np

    shape = models.base[f"{module}.weight"].shape
    fitting = (stored.up.shape[0], stored.down.shape[1]) == shape and stored.up.shape[1] == stored.down.shape[0]
    if not fitting or {stored.down.dtype, stored.up.dtype} != {claims.dtype}:
        return _Seen(module, (NAMES,))
    up, down = sides(stored)
    error = size = 0.0
    for rows, tuned, base in models.rows(module):
        delta = values(tuned) - values(base)
        size += float(np.sum(delta * delta))
        delta -= up[rows] @ down
        error += float(np.sum(delta * delta))
    error, size = math.sqrt(error), math.sqrt(size)
    room, stated = Grams.of(stored).room() + 2.0**-40 * size, claims.errors[module] * size
    faults = [] if abs(error - stated) <= room else [STATED]
    if claims.asked is not None and not error <= claims.asked * size:
        faults.append(ASKED)
    return _Seen(module, tuple(faults), error / size, (stated + room) / size)


def _checks(seen: Sequence[_Seen], claims: Claims) -> Iterator[Check]:
    yield named_check("L0", NAMES, seen)
    worst = max(one.error for one in seen)
    yield replace(named_check("L2", STATED, seen), figure=worst, bound=max(one.bound for one in seen))
    if claims.asked is not None:
        yield replace(named_check("L2", ASKED, seen), figure=worst, bound=claims.asked)


def _first_fault(models: Models, expected: Expectation, stored: Pairs, claims: Claims) -> str:
    """The first check that a set of pairs fails, or an empty string: what a control has to provoke."""
    if set(expected.pairs) != set(stored):
        return NAMES
    found = (_look(models, module, pair, claims).faults for module, pair in stored.items())
    return next((faults[0] for faults in found if faults), "")

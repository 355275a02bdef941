"""Why two adapters differ, in the words a user needs, and the command that mends it.

Each finding is a hypothesis that was tested on the numbers: with it undone, the adapters agree. Adapters that are the
same never have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loraconv.names import fold_names
from loraconv.verifier.delta import (
    ModuleResult,
    is_finite,
    is_zero,
    projection,
    relative_room,
    rounded_through,
    transposed,
)
from loraconv.verifier.numbers import Pair

Pairs = Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause: a stable slug, the sentence, the command that mends it, and the modules it explains."""

    slug: str
    sentence: str
    mend: str
    modules: tuple[str, ...]


def diagnose(one: Pairs, other: Pairs, results: list[ModuleResult]) -> list[Finding]:
    """The causes of every difference between two adapters, most telling first; empty if they are the same."""
    missing, extra = [m for m in one if m not in other], [m for m in other if m not in one]
    wrong = [r.module for r in results if not r.same]
    findings = list(_by_name(missing, extra))
    nan = [m for m in wrong if not (is_finite(one[m]) and is_finite(other[m]))]
    if nan:
        findings.append(_finding("nonfinite", "one of them holds NaN or Inf, in", nan, "use an earlier checkpoint"))
    left = [m for m in wrong if m not in nan]
    for test in (_scaled, _zeroed, _swapped, _shifted, _transposed, _coarser):
        for finding in test(one, other, left):
            findings.append(finding)
            left = [m for m in left if m not in finding.modules]
    if left:
        findings.append(
            _finding("other", "they are different adapters in", left, "compare the runs that they came from")
        )
    return findings


def _finding(slug: str, text: str, modules: list[str], mend: str) -> Finding:
    return Finding(slug, f"{text} {'; '.join(fold_names(modules)[:4])}", mend, tuple(modules))


def _by_name(missing: list[str], extra: list[str]) -> Iterator[Finding]:
    if missing:
        yield _finding(
            "missing", "the second lacks", missing, "convert the first again: loraconv convert A -o OUT --to ..."
        )
    if extra:
        yield _finding("extra", "only the second has", extra, "loraconv inspect B")


def _tolerance(one: Pair, other: Pair) -> float:
    """The relative error that is no difference: what the roundings of either side's stored numbers can make."""
    return max(relative_room(one), relative_room(other))


def _scaled(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    """Modules whose delta is the other's times one constant."""
    by_constant: dict[float, list[str]] = {}
    for module in left:
        constant, rest = projection(one[module], other[module])
        if rest <= _tolerance(one[module], other[module]) and constant:
            near = next((c for c in by_constant if abs(c - constant) <= abs(c) * 1e-3), constant)
            by_constant.setdefault(near, []).append(module)
    for constant, modules in by_constant.items():
        pair, second = one[modules[0]], other[modules[0]]
        if abs(constant - 1) <= _tolerance(pair, second):
            continue
        yield _finding(
            "scale",
            f"the second is {constant:.6g} times as strong ({_why(constant, pair, second)}) in",
            modules,
            "convert it again with the alpha it was trained with: loraconv convert A -o OUT --to ... --alpha ALPHA",
        )


def _why(constant: float, one: Pair, other: Pair) -> str:
    """What the constant is, in terms of rank and scale."""
    rank, scale, second = float(one.shape[1]), float(one.scale), float(other.scale)
    names = [
        (rank, "multiplied by the rank"),
        (1 / rank, "divided by the rank"),
        (1 / scale if scale else 0.0, "alpha ignored"),
        (scale, "the scale applied twice"),
        (-1.0, "the sign turned"),
        (2.0, "doubled"),
        (0.5, "halved"),
    ]
    fitting = [name for value, name in names if value and value != 1.0 and abs(constant - value) <= abs(value) * 1e-3]
    return " or ".join(fitting) or f"the first has scale {scale:.6g}, the second {second:.6g}"


def _zeroed(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    for first, second, which in ((one, other, "second"), (other, one, "first")):
        empty = [m for m in left if is_zero(second[m]) and not is_zero(first[m])]
        if empty:
            yield _finding(
                "zero", f"the {which} does nothing: a factor is zero everywhere, in", empty, "loraconv inspect A"
            )


def _matches(one: Pair, other: Pair) -> bool:
    constant, rest = projection(one, other)
    return rest <= _tolerance(one, other) and abs(constant - 1) <= _tolerance(one, other)


def _permuted(one: Pairs, other: Pairs, left: list[str], partner: Callable[[str], str | None]) -> list[str]:
    """The modules whose second delta is the first's of their partner."""
    found = []
    for module in left:
        source = partner(module)
        if source is not None and source in one and _matches(one[source], other[module]):
            found.append(module)
    return found


def _swapped(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    for first, second in (("to_q", "to_k"), ("to_q", "to_v"), ("to_k", "to_v")):
        ends = {first: second, second: first}

        def partner(module: str, ends: dict[str, str] = ends) -> str | None:
            head, _, end = module.rpartition(".")
            return f"{head}.{ends[end]}" if end in ends else None

        found = _permuted(one, other, left, partner)
        if found:
            yield _finding(
                "swapped",
                f"{first} and {second} are swapped in",
                found,
                "convert it again with this version: loraconv convert A -o OUT --to ...",
            )


def _shifted(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    for step in (1, -1):

        def partner(module: str, step: int = step) -> str | None:
            steps = module.split(".")
            at = next((n for n, s in enumerate(steps) if s.isdigit()), None)
            if at is None:
                return None
            return ".".join([*steps[:at], str(int(steps[at]) + step), *steps[at + 1 :]])

        found = _permuted(one, other, left, partner)
        if found:
            yield _finding(
                "shifted",
                f"layers are shifted: the second has the first's layer {step:+d} in",
                found,
                "convert it again with this version: loraconv convert A -o OUT --to ...",
            )


def _transposed(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    found = [m for m in left if _matches(transposed(one[m]), other[m])]
    if found:
        yield _finding(
            "transposed", "the delta is transposed in", found, "convert it again: loraconv convert A -o OUT --to ..."
        )


def _coarser(one: Pairs, other: Pairs, left: list[str]) -> Iterator[Finding]:
    """Numbers that are all of a narrower dtype than they are stored in: a cast there and back."""
    for dtype in ("BF16", "F16"):
        found = []
        for module in left:
            constant, rest = projection(one[module], other[module])
            room = relative_room(one[module], dtype)
            near = rest <= room and abs(constant - 1) <= room
            if near and rounded_through(other[module], dtype) and not rounded_through(one[module], dtype):
                found.append(module)
        if found:
            yield _finding(
                "precision",
                f"the second was cast through {dtype} on its way, in",
                found,
                "convert the first again without --dtype",
            )
            return

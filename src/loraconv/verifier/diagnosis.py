"""Why two adapters differ, in the words a user needs, and the command that mends it.

Each finding is a hypothesis that was tested on the numbers: with it undone, the adapters agree. Adapters that are the
same never have one. What tells the two formats apart (names, where the scale stands) is gone before this is asked, so
no sentence speaks of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from loraconv.names import fold_names, printable
from loraconv.verifier.delta import (
    ModuleResult,
    delta_norm,
    distance,
    held,
    is_finite,
    is_zero,
    likeness,
    projection,
    relative_room,
    rounded_through,
    tolerance,
    transposed,
)
from loraconv.verifier.numbers import Pair
from loraconv.verifier.parallel import in_parallel
from loraconv.verifier.spectrum import singular_values

Pairs = Mapping[str, Pair]
#: Module -> the scale that the trainer used, by the record of an earlier conversion; without ``""`` for all others.
Scales = Mapping[str, Fraction]

_AGAIN = "loraconv convert {one} -o OUT --to {to}"
#: Constants are told apart by name from this relative distance on.
_ALIKE = 1e-3


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause: a stable slug, the sentence, the command that mends it, and the modules it explains."""

    slug: str
    sentence: str
    mend: str
    modules: tuple[str, ...]


def shown(names: Iterable[str]) -> str:
    """Names folded by layer; of many, the first four and how many more there are."""
    folded = fold_names(names)
    more = f"; and {len(folded) - 4} more like these" if len(folded) > 4 else ""
    return "; ".join(folded[:4]) + more


def finding(slug: str, text: str, names: Iterable[str], mend: str) -> Finding:
    """The finding whose sentence is ``text`` and the names."""
    names = tuple(names)
    return Finding(slug, f"{text} {shown(names)}", mend, names)


def addressed(findings: Iterable[Finding], **words: str) -> tuple[Finding, ...]:
    """The findings with the paths and words that the ``{...}`` in their commands stand for."""
    return tuple(replace(found, mend=found.mend.format(**words)) for found in findings)


@dataclass(frozen=True, slots=True)
class _Two:
    """Both adapters, the modules that are the same, and the scales that their trainers used where they are recorded."""

    one: Pairs
    other: Pairs
    right: frozenset[str]
    trained: tuple[Scales, Scales]


def diagnose(
    one: Pairs, other: Pairs, results: list[ModuleResult], trained: tuple[Scales, Scales] = ({}, {})
) -> list[Finding]:
    """The causes of every difference between two adapters, most telling first; empty if they are the same.

    In a ``mend``, ``{one}`` and ``{other}`` stand for the two paths and ``{to}`` for the format of the second.
    """
    two = _Two(one, other, frozenset(r.module for r in results if r.same), trained)
    missing, extra = [m for m in one if m not in other], [m for m in other if m not in one]
    left = [r.module for r in results if not r.same]
    findings = list(_by_name(missing, extra))
    for test in _TESTS:
        for found in test(two, left):
            findings.append(found)
            left = [m for m in left if m not in found.modules]
    if left:
        worst = max(r.error for r in results if r.module in left)
        findings.append(
            finding(
                "other",
                f"the deltas are up to {worst:.1e} apart (relative) and no known mistake explains it, so these are"
                " different adapters:",
                left,
                "compare the runs that they came from: loraconv inspect {one}; loraconv inspect {other}",
            )
        )
    return findings


def _by_name(missing: list[str], extra: list[str]) -> Iterator[Finding]:
    if missing:
        yield finding("missing", "the second lacks", missing, _AGAIN)
    if extra:
        yield finding("extra", "only the second has", extra, _AGAIN)


def _nonfinite(two: _Two, left: list[str]) -> Iterator[Finding]:
    found = in_parallel(lambda m: (not is_finite(two.one[m]), not is_finite(two.other[m])), left)
    bad = dict(zip(left, found, strict=True))
    for whose, which, mend in (
        ((True, True), "both hold", "use an earlier checkpoint: the training diverged"),
        ((True, False), "the first holds", "use an earlier checkpoint than the first: the training diverged"),
        ((False, True), "the second holds", _AGAIN),
    ):
        modules = [m for m in left if bad[m] == whose]
        if modules:
            yield finding("nonfinite", f"{which} NaN or Inf in", modules, mend)


def _scaled(two: _Two, left: list[str]) -> Iterator[Finding]:
    """Modules whose delta is the other's times one constant."""
    by_constant: dict[float, list[str]] = {}
    for module, (constant, rest, room) in zip(left, in_parallel(partial(_ratio, two), left), strict=True):
        if rest <= room and abs(constant - 1) > room:
            near = next((c for c in by_constant if _alike(c, constant)), constant)
            by_constant.setdefault(near, []).append(module)
    for constant, modules in by_constant.items():
        yield finding(
            "scale",
            f"the second is {constant:.6g} times as strong ({_why(constant, two, modules[0])}) in",
            modules,
            f"{_AGAIN} --alpha ALPHA, with the lora_alpha it was trained with",
        )


def _ratio(two: _Two, module: str) -> tuple[float, float, float]:
    """The constant between two deltas of a module, the relative error left with it, and how much of that is none."""
    return likeness(held(two.one[module]), held(two.other[module]))


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= abs(other) * _ALIKE


def _why(constant: float, two: _Two, module: str) -> str:
    """What the constant can be, in terms of rank and scale; more than one explanation may fit."""
    pair, second = two.one[module], two.other[module]
    rank, (first_scale, second_scale) = float(pair.shape[1]), _scales(two, module)
    names = [(rank, "multiplied by the rank"), (1 / rank, "divided by the rank")]
    if first_scale not in (0, 1):
        names += [
            (1 / first_scale, "alpha ignored in the second"),
            (first_scale, "the scale squared: applied twice in the second"),
        ]
    elif second_scale not in (0, 1):
        names += [
            (second_scale, "alpha ignored in the first"),
            (1 / second_scale, "the scale squared: applied twice in the first"),
        ]
    names += [(-1.0, "the sign turned"), (2.0, "doubled"), (0.5, "halved")]
    fitting = [name for value, name in names if value != 1.0 and _alike(constant, value)]
    told = f"the first is applied at scale {float(pair.scale):.6g}, the second at {float(second.scale):.6g}"
    return " or ".join(fitting) or told


def _scales(two: _Two, module: str) -> tuple[float, float]:
    """The scale that each was trained with as far as it tells: a recorded one, or the one it is applied at."""
    pairs = two.one[module], two.other[module]
    first, second = (
        float(known.get(module, known.get("", pair.scale))) for known, pair in zip(two.trained, pairs, strict=True)
    )
    return first, second


def _zeroed(two: _Two, left: list[str]) -> Iterator[Finding]:
    for first, second, which, mend in (
        (two.one, two.other, "second", _AGAIN),
        (two.other, two.one, "first", "use a later checkpoint than the first, which was saved before it had moved"),
    ):
        empty = [m for m in left if is_zero(second[m]) and not is_zero(first[m])]
        if empty:
            text = f"the {which} does nothing: a factor or the scale is zero, in"
            yield finding("zero", text, empty, mend)


def _truncated(two: _Two, left: list[str]) -> Iterator[Finding]:
    """The best approximation of a lower rank, which by Eckart and Young is as far away as the singular values that it
    leaves out."""
    for whole, part, which, mend in (
        (two.one, two.other, "second", _AGAIN),
        (two.other, two.one, "first", "use the second, which has the whole rank"),
    ):
        groups: dict[tuple[int, int], dict[str, float]] = {}
        for module in left:
            share = _share(whole[module], part[module])
            if share is not None:
                groups.setdefault((part[module].shape[1], whole[module].shape[1]), {})[module] = share
        for (low, high), shares in groups.items():
            text = (
                f"the {which} has rank {low} of {high}: the best approximation of that rank, which holds"
                f" {min(shares.values()):.2%} of the delta (of its squared norm), in"
            )
            yield finding("rank", text, shares, mend)


def _share(whole: Pair, part: Pair) -> float | None:
    """How much of the squared norm the best approximation of a lower rank holds; None if ``part`` is not that."""
    (out, rank, into), (own_out, low, own_into) = whole.shape, part.shape
    if low >= rank or (out, into) != (own_out, own_into):
        return None
    squares = [value**2 for value in singular_values(whole)]
    norm, rest = math.sqrt(math.fsum(squares)), math.sqrt(math.fsum(squares[low:]))
    error = distance(whole, part)
    return 1 - (error / norm) ** 2 if norm and error <= rest + tolerance(whole, part) * norm else None


def _matches(one: Pair, other: Pair) -> bool:
    constant, rest, room = likeness(held(one), held(other))
    return rest <= room and abs(constant - 1) <= room


def _permuted(two: _Two, left: list[str], partner: Callable[[str], str | None]) -> dict[str, str]:
    """The modules whose second delta is the first's of their partner, and the partner."""
    found = {}
    for module in left:
        source = partner(module)
        if source is not None and source in two.one and _matches(two.one[source], two.other[module]):
            found[module] = source
    return found


def _swapped(two: _Two, left: list[str]) -> Iterator[Finding]:
    for first, second in (("to_q", "to_k"), ("to_q", "to_v"), ("to_k", "to_v")):
        ends = {first: second, second: first}

        def partner(module: str, ends: dict[str, str] = ends) -> str | None:
            head, _, end = module.rpartition(".")
            return f"{head}.{ends[end]}" if end in ends else None

        found = _permuted(two, left, partner)
        both = [module for module, source in found.items() if source in found]
        if both:
            yield finding("swapped", f"{first} and {second} are swapped in", both, _AGAIN)


def _shifted(two: _Two, left: list[str]) -> Iterator[Finding]:
    for step in (1, -1):

        def partner(module: str, step: int = step) -> str | None:
            steps = module.split(".")
            at = next((n for n, s in enumerate(steps) if s.isdecimal()), None)
            if at is None:
                return None
            return ".".join([*steps[:at], str(int(steps[at]) + step), *steps[at + 1 :]])

        # A layer that is right itself was not shifted: then the factors were copied, which the next test tells.
        moved = [m for m, source in _permuted(two, left, partner).items() if source not in two.right]
        if moved:
            text = f"layers are shifted: the second has the first's layer {step:+d} in"
            yield finding("shifted", text, moved, _AGAIN)


def _misplaced(two: _Two, left: list[str]) -> Iterator[Finding]:
    """Factors of one module that stand in another, as well or instead."""
    sizes = {module: (delta_norm(pair), relative_room(pair)) for module, pair in two.one.items()} if left else {}
    found: dict[str, str] = {}
    for module in left:
        own, room = delta_norm(two.other[module]), relative_room(two.other[module])
        near = [m for m, (norm, r) in sizes.items() if m != module and abs(norm - own) <= own * max(r, room)]
        source = next((m for m in near if _matches(two.one[m], two.other[module])), None)
        if source is not None:
            found[module] = source
    for slug, kept, where in (("duplicated", True, "in another as well"), ("moved", False, "in the place of another")):
        modules = [m for m, source in found.items() if (source in two.right) == kept]
        if modules:
            example = f"{printable(modules[0])} those of {printable(found[modules[0]])}"
            text = f"the second has the factors of one module {where} ({example}), in"
            yield finding(slug, text, modules, _AGAIN)


def _transposed(two: _Two, left: list[str]) -> Iterator[Finding]:
    found = [m for m in left if _matches(transposed(two.one[m]), two.other[m])]
    if found:
        yield finding("transposed", "the delta is transposed in", found, _AGAIN)


def _coarser(two: _Two, left: list[str]) -> Iterator[Finding]:
    """Numbers that are all of a narrower dtype than they are stored in: a cast there and back."""
    for fine, cast, which, mend in (
        (two.one, two.other, "second", _AGAIN),
        (two.other, two.one, "first", "use the second, which has all digits"),
    ):
        for dtype in ("BF16", "F16"):
            found = [m for m in left if _is_cast(fine[m], cast[m], dtype)]
            if found:
                yield finding("precision", f"the {which} was cast through {dtype} on its way, in", found, mend)
                return


def _is_cast(fine: Pair, cast: Pair, dtype: str) -> bool:
    constant, rest = projection(fine, cast)
    room = relative_room(fine, dtype)
    near = rest <= room and abs(constant - 1) <= room
    return near and rounded_through(cast, dtype) and not rounded_through(fine, dtype)


Test = Callable[[_Two, list[str]], Iterator[Finding]]
_TESTS: tuple[Test, ...] = (
    _nonfinite, _scaled, _zeroed, _truncated, _swapped, _shifted, _misplaced, _transposed, _coarser,
)  # fmt: skip

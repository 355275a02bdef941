"""The text of ``loraconv verify --before --after``: what became of the tensors, folded by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraconv.names import fold_names, printable
from loraconv.verifier.changes.comparison import Change

if TYPE_CHECKING:
    from loraconv.verification.changes import ChangesResult

_WORDS = {
    "identical": "identical",
    "renamed": "renamed",
    "retyped": "in another dtype",
    "changed": "changed",
    "reshaped": "of another shape",
    "missing": "missing",
    "new": "new",
}
#: Folded names that are shown of each kind of change.
_SHOWN = 12


def verdict(result: ChangesResult) -> str:
    counts = ", ".join(f"{result.counts[kind]} {word}" for kind, word in _WORDS.items() if kind in result.counts)
    if result.expect == "only-lora":
        return f"{'nothing but LoRA changed' if result.same else 'MORE than LoRA changed'}: {counts}"
    return f"{'identical' if result.same else 'NOT identical'}: {counts}"


def lines(result: ChangesResult) -> list[str]:
    text = []
    for kind, word in _WORDS.items():
        changes = [change for change in result.changes if change.kind == kind]
        if changes and kind != "identical":
            folded = list(_folded(changes))
            text += [f"  {word}: {line}" for line in folded[:_SHOWN]]
            if len(folded) > _SHOWN:
                text.append(f"  {word}: and {len(folded) - _SHOWN} more lines like these (--json has every tensor)")
    return [*text, *(f"note    {notice}" for notice in result.notices)]


def _folded(changes: Sequence[Change]) -> Iterator[str]:
    groups: dict[tuple[object, ...], list[Change]] = {}
    for change in changes:
        dtypes = tuple(form[0] if form else "" for form in (change.before, change.after))
        key = (_without_layer(change.name), _without_layer(change.other), dtypes)
        groups.setdefault(key, []).append(change)
    for group in groups.values():
        (name,) = fold_names(dict.fromkeys(change.name for change in group))
        other = f" -> {printable(_without_layer(group[0].other))}" if group[0].other else ""
        yield f"{name}{other}{_how(group)}"


def _without_layer(name: str) -> str:
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "{}", name, count=1)


def _how(group: Sequence[Change]) -> str:
    """Dtypes, shapes and figures of changes that are alike."""
    first = group[0]
    if first.before is None or first.after is None or first.kind in ("renamed", "identical"):
        return ""
    text = f", {first.before[0]} -> {first.after[0]}" if first.before[0] != first.after[0] else ""
    if first.kind == "reshaped":
        text += f", {list(first.before[1])} -> {list(first.after[1])}"
    figures = [change.figures for change in group if change.figures is not None]
    if not figures:
        return text
    if not any(f.changed for f in figures):
        return f"{text}, the same values"
    changed, count = sum(f.changed for f in figures), sum(f.count for f in figures)
    moved = f"relative change up to {max(f.relative for f in figures):.1e}, {changed} of {count} numbers"
    if all(f.rounded for f in figures):
        moved += f", rounded once to {figures[0].rounded}"
    return f"{text}, {moved}, by up to {max(f.greatest for f in figures):.1e}"

"""Which name of one checkpoint stands for which of another: the same, the same with a wrapper's mark or another prefix,
or, where names say nothing, the same bytes.

A wrapper's mark is what an adapted layer puts before its own weight: SAT's ``X.original.weight`` and peft's
``X.base_layer.weight`` are ``X.weight`` of the model without LoRA.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from loraconv.lazy import TensorRef

Tensors = Mapping[str, TensorRef]

_MARK = re.compile(r"\.(?:original|base_layer)(?=\.[^.]+$)")
#: Prefixes are looked for among this many leading steps of a name.
_DEPTH = 8


def bare(name: str) -> str:
    """``name`` without the mark of a wrapper."""
    return _MARK.sub("", name)


def match_names(before: Iterable[str], after: Iterable[str]) -> dict[str, str]:
    """Name before -> name after of what is the same tensor by its name."""
    old, new = dict.fromkeys(before), dict.fromkeys(after)
    matched = {name: name for name in old if name in new}
    matched |= _by_bare_name(_rest(old, matched), _rest(new, matched.values()))
    while True:
        left, right = _rest(old, matched), _rest(new, matched.values())
        moved = _by_prefix(left, right)
        if not moved:
            return matched
        matched |= moved


def _rest(names: Iterable[str], known: Iterable[str]) -> list[str]:
    taken = set(known)
    return [name for name in names if name not in taken]


def _by_bare_name(before: list[str], after: list[str]) -> dict[str, str]:
    old, new = _bare_names(before), _bare_names(after)
    return {name: new[short] for short, name in old.items() if short in new}


def _bare_names(names: list[str]) -> dict[str, str]:
    """Bare name -> name, without those that two names share."""
    counts = Counter(map(bare, names))
    return {bare(name): name for name in names if counts[bare(name)] == 1}


def _by_prefix(before: list[str], after: list[str]) -> dict[str, str]:
    """The names that are the same but for the one pair of prefixes that explains most of them."""
    prefixes = _prefixes(before, after)
    if prefixes is None:
        return {}
    first, second = prefixes
    old, new = _bare_names(before), _bare_names(after)
    moved = {name: second + short[len(first) :] for short, name in old.items() if short.startswith(first)}
    return {name: new[short] for name, short in moved.items() if short in new}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """``(prefix, rest)`` of a bare name, longest rest first; the rest has two steps at least."""
    steps = bare(name).split(".")
    for at in range(min(len(steps) - 1, _DEPTH)):
        head = ".".join(steps[:at])
        yield head + "." if head else "", ".".join(steps[at:])


def _prefixes(before: list[str], after: list[str]) -> tuple[str, str] | None:
    """``(old, new)``: the prefixes without which at least two names, and half of the shorter list, are the same."""
    heads: dict[str, list[str]] = {}
    for name in after:
        for head, rest in _splits(name):
            heads.setdefault(rest, []).append(head)
    votes: Counter[tuple[str, str]] = Counter()
    for name in before:
        for head, rest in _splits(name):
            if rest in heads:
                votes.update((head, other) for other in heads[rest][:4])
                break
    if not votes:
        return None
    ((prefixes, count),) = votes.most_common(1)
    return prefixes if count >= max(2, min(len(before), len(after)) / 2) else None


def match_content(before: Tensors, after: Tensors) -> dict[str, str]:
    """Name before -> name after of tensors with the same dtype, shape and bytes.

    Where several hold the same bytes they are matched in order, if there are as many before as after.
    """
    forms = [{(t.dtype, t.shape) for t in tensors.values()} for tensors in (before, after)]
    common = forms[0] & forms[1]
    old, new = (_by_digest(tensors, common) for tensors in (before, after))
    found: dict[str, str] = {}
    for digest, names in old.items():
        others = new.get(digest, [])
        if len(others) == len(names):
            found |= zip(names, others, strict=True)
    return found


def _by_digest(tensors: Tensors, forms: set[tuple[str, tuple[int, ...]]]) -> dict[tuple[object, ...], list[str]]:
    names: dict[tuple[object, ...], list[str]] = {}
    for name, ref in tensors.items():
        if (ref.dtype, ref.shape) in forms:
            digest = hashlib.blake2b(digest_size=32)
            for piece in ref.pieces():
                digest.update(piece)
            names.setdefault((ref.dtype, ref.shape, digest.digest()), []).append(name)
    return names

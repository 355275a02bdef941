"""Patterns of names as a user types them: ``transformer_blocks.{0-9,20}.*``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from loraconv.errors import UsageError
from loraconv.names import fold_names, printable

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")


def choose(
    names: Collection[str], patterns: Sequence[str], option: str = "--modules", what: str = "module of the adapter"
) -> list[str]:
    """The names that fit one of the patterns: ``*`` stands for anything, ``{0-9}`` for a number of that range,
    ``{to_q,to_k}`` for one of the words or ranges. Raises :class:`UsageError` for a pattern that fits none, in the
    words of the ``option`` it came with, and of ``what`` the names are."""
    found: set[str] = set()
    for pattern in patterns:
        expression = _expression(pattern, option)
        fitting = [name for name in names if expression.fullmatch(name)]
        if not fitting:
            raise UsageError(
                f"{option} {printable(pattern, 80)} fits no {what}",
                why=f"it has {'; '.join(fold_names(names)[:4])}",
                hint=_hint(option),
                slug=f"{option.strip('-')}-none",
            )
        found.update(fitting)
    return [name for name in names if name in found]


def _hint(option: str) -> str:
    return f"{option} 'transformer_blocks.{{0-9}}.*'"


def _expression(pattern: str, option: str) -> re.Pattern[str]:
    made, at = [], 0
    for group in _GROUP.finditer(pattern):
        made += [_plain(pattern[at : group.start()]), _one_of(pattern, group.group(1).split(","), option)]
        at = group.end()
    rest = pattern[at:]
    if {"{", "}"} & set("".join([rest, *_GROUP.sub("", pattern)])) or not pattern:
        raise UsageError(f"a brace is not closed in {option} {printable(pattern, 80)}", hint=_hint(option))
    return re.compile("".join(made) + _plain(rest), re.DOTALL)


def _plain(text: str) -> str:
    return ".*".join(map(re.escape, re.sub(r"\*+", "*", text).split("*")))


def _one_of(pattern: str, words: Iterable[str], option: str) -> str:
    """An expression for one of the words, or a number of one of the ranges."""
    made: dict[str, None] = {}
    for word in map(str.strip, words):
        if limits := _RANGE.fullmatch(word):
            first, last = map(int, limits.groups())
            if not first <= last < first + 10_000:
                what = f"not a range of layers: {printable(word)} in {printable(pattern, 80)}"
                raise UsageError(what, hint=_hint(option))
            made |= dict.fromkeys(map(str, range(first, last + 1)))
        else:
            made[_plain(word)] = None
    return f"(?:{'|'.join(made)})"

"""Patterns of module names as a user types them: ``transformer_blocks.{0-9,20}.*``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from loraconv.errors import UsageError
from loraconv.names import fold_names, printable

_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
_HINT = "--modules 'transformer_blocks.{0-9}.*'"


def choose(modules: Collection[str], patterns: Sequence[str]) -> list[str]:
    """The modules that fit one of the patterns: ``*`` stands for anything, ``{0-9}`` for a number of that range,
    ``{to_q,to_k}`` for one of the words or ranges. Raises :class:`UsageError` for a pattern that fits none."""
    found: set[str] = set()
    for pattern in patterns:
        expression = _expression(pattern)
        fitting = [module for module in modules if expression.fullmatch(module)]
        if not fitting:
            raise UsageError(
                f"--modules {printable(pattern, 80)} fits no module of the adapter",
                why=f"it has {'; '.join(fold_names(modules)[:4])}",
                hint=_HINT,
                slug="modules-none",
            )
        found.update(fitting)
    return [module for module in modules if module in found]


def _expression(pattern: str) -> re.Pattern[str]:
    made, at = [], 0
    for group in _GROUP.finditer(pattern):
        made += [_plain(pattern[at : group.start()]), _one_of(pattern, group.group(1).split(","))]
        at = group.end()
    rest = pattern[at:]
    if {"{", "}"} & set("".join([rest, *_GROUP.sub("", pattern)])) or not pattern:
        raise UsageError(f"a brace is not closed in --modules {printable(pattern, 80)}", hint=_HINT)
    return re.compile("".join(made) + _plain(rest), re.DOTALL)


def _plain(text: str) -> str:
    return ".*".join(map(re.escape, re.sub(r"\*+", "*", text).split("*")))


def _one_of(pattern: str, words: Iterable[str]) -> str:
    """An expression for one of the words, or a number of one of the ranges."""
    made: dict[str, None] = {}
    for word in map(str.strip, words):
        if limits := _RANGE.fullmatch(word):
            first, last = map(int, limits.groups())
            if not first <= last < first + 10_000:
                raise UsageError(f"not a range of layers: {printable(word)} in {printable(pattern, 80)}", hint=_HINT)
            made |= dict.fromkeys(map(str, range(first, last + 1)))
        else:
            made[_plain(word)] = None
    return f"(?:{'|'.join(made)})"

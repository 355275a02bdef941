"""Which formats and model families exist: the tables in ``loraconv.converters``, and those that other packages add.

Another package adds a table by an entry point of the group ``loraconv.formats`` that names a :class:`Dialect` or a
:class:`Family`. Nothing registers itself by being imported.
"""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from functools import cache

from loraconv.errors import FormatError
from loraconv.rules import Dialect, Family

_TABLES = {
    "loraconv.converters.sat":              "SAT",
    "loraconv.converters.diffusers":        "DIFFUSERS",
    "loraconv.converters.peft":             "PEFT",
    "loraconv.converters.models.cogvideox": "COGVIDEOX",
}  # fmt: skip


@cache
def _tables() -> tuple[Dialect | Family, ...]:
    own = [getattr(importlib.import_module(module), name) for module, name in _TABLES.items()]
    return (*own, *_third_party())


def _third_party() -> list[Dialect | Family]:
    from importlib.metadata import entry_points

    found: list[Dialect | Family] = []
    for point in entry_points(group="loraconv.formats"):
        table = point.load()
        if not isinstance(table, Dialect | Family):
            raise FormatError(
                f"the entry point {point.name} is neither a Dialect nor a Family",
                where=point.value,
                hint=f"pip uninstall the package that declares {point.value}, or correct its table",
            )
        found.append(table)
    return found


def dialects() -> tuple[Dialect, ...]:
    """Every known dialect, loraconv's own first."""
    return tuple(t for t in _tables() if isinstance(t, Dialect))


def families() -> tuple[Family, ...]:
    """Every known model family, loraconv's own first."""
    return tuple(t for t in _tables() if isinstance(t, Family))


def dialect(name: str) -> Dialect:
    """The dialect of this name; raises :class:`FormatError` with the nearest known name."""
    known = {d.name: d for d in dialects()}
    if name in known:
        return known[name]
    near = get_close_matches(name.lower(), known, n=1)
    raise FormatError(
        f"unknown format: {name!r}",
        why=f"known formats are {', '.join(known)}",
        hint=f"--to {near[0]}" if near else "loraconv formats",
        slug="format-unknown",
    )

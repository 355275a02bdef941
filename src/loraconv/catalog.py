"""The formats that loraconv knows, what each can carry, and what it cannot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from loraconv.naming import namings
from loraconv.registry import dialect, dialects, families
from loraconv.rules import Dialect, fill


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """One format: its keys, where its scale stands, what it can carry, and the source of these facts."""

    name: str
    title: str
    file: str
    keys: tuple[str, ...]
    scale: str
    carries: tuple[str, ...]
    cannot_carry: tuple[str, ...]
    models: tuple[str, ...]
    facts: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def formats(name: str | None = None) -> tuple[FormatInfo, ...]:
    """Every known format, or the one of this name; raises :class:`FormatError` for an unknown name."""
    return tuple(_info(d) for d in (dialects() if name is None else (dialect(name),)))


def _info(d: Dialect) -> FormatInfo:
    models = tuple(f.title for f in families() if namings(d.name, f.name))
    prefix = fill(d.prefixes[0], {"component": next(iter(d.components.values()), "{component}")})
    keys = tuple(prefix + template for template in (d.down, d.up, d.alpha) if template)
    not_carried = (*d.cannot_carry, f"anything: it is read only; {d.read_only}") if d.read_only else d.cannot_carry
    return FormatInfo(d.name, d.title, d.file, keys, _scale(d), d.carries, not_carried, models, d.facts)


def _scale(d: Dialect) -> str:
    if d.sidecar:
        place = f"alpha in {d.sidecar}"
    elif d.alpha:
        place = "alpha in a tensor beside each pair of factors"
    else:
        marks = [mark.header for mark in d.marks if mark.header and not mark.word]
        header = d.header or next(iter(marks), "")
        place = f"alpha in the header ({header})" if header else "no alpha"
    if d.default_alpha is None:
        return place
    return f"{place}; where none: {d.default_why}"

"""Markup that cannot be broken out of: every string that is not :class:`Html` is text and is escaped on its way in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from loraconv.names import fold_names, printable
from loraconv.verifier.proof import Control, caught

_LIMIT = 4000

#: A longer table is folded away.
_FEW = 40
#: Of a longer list in a table the first are shown.
_LISTED = 3


class Html(str):
    """Finished markup. Joining it with ``+`` gives a plain string, which would be escaped: use :func:`joined`."""

    __slots__ = ()


def rounded(value: Any) -> Any:
    """A JSON value with its fractions to four digits. More would change with the number of threads that computed them,
    and with it the bytes of the page."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def text(value: object) -> Html:
    """Text as markup; what could drive a terminal or turn the line around is spelled out."""
    return Html(escape(printable(str(value), _LIMIT)))


def joined(parts: Iterable[Html], between: str = "") -> Html:
    """Parts one after the other; ``between`` is markup."""
    return Html(between.join(parts))


def tag(name: str, *content: str, **attributes: object) -> Html:
    """An element; an attribute's trailing underscore is dropped, others become hyphens, and None leaves it out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    marks = "".join(f' {key}="{text(value)}"' for key, value in given.items())
    inside = "".join(part if isinstance(part, Html) else text(part) for part in content)
    return Html(f"<{name}{marks}>{inside}</{name}>")


def lines(*parts: Html) -> Html:
    """Parts on lines of their own; empty ones are left out."""
    return joined((part for part in parts if part), "\n")


def code(value: object) -> Html:
    """A name or path; isolated, so that letters written from right to left turn nothing around them."""
    return tag("code", tag("bdi", str(value)))


def digest(value: str) -> Html:
    """A checksum, which breaks in its middle where a line is too short for it."""
    half = len(value) // 2
    return tag("code", value[:half], Html("<wbr>"), value[half:])


def number(value: float | None, shown: str | None = None) -> Html:
    """A number for people, with its four digits beside it for programs (``data value``)."""
    if value is None:
        return Html("–")
    if not math.isfinite(value):
        return text("NaN" if math.isnan(value) else "∞")
    return tag("data", shown or short(value), value=json.dumps(rounded(value)))


def short(value: float) -> str:
    """Three digits at most, and no leading zeros in the exponent: ``1.2e-7``, ``0.031``, ``42``."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Html:
    """A table in a box that scrolls by itself; the first cell of a row is its heading."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:])) for cells in rows]
    made = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", joined(body, "\n")))
    return tag("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, str]], class_: str | None = None) -> Html:
    """Labels with their values, side by side; of class ``rows`` one below the other."""
    inside = joined((tag("div", tag("dt", label), tag("dd", value)) for label, value in pairs), "\n")
    return tag("dl", inside, class_=class_)


def details(summary: str, *content: Html) -> Html:
    return tag("details", tag("summary", summary), *content)


def section(title: str, *content: Html) -> Html:
    return tag("section", tag("h2", title), Html("\n"), lines(*content))


def group(title: str, *content: Html) -> Html:
    """A part of a section, for the modules of one kind of block."""
    return tag("div", tag("h3", title or "outside of blocks"), *content, class_="group")


def controls(made: Sequence[Control]) -> Html:
    """The deliberate mistakes and what noticed each; empty where none were made."""
    if not made:
        return Html("")
    words = {True: "caught", False: "MISSED", None: "no effect"}
    rows = [(control.name, words[control.caught], control.by) for control in made]
    return section("Controls", table(("deliberate mistake", "result", "by"), rows, f"{caught(made)} caught"))


def nested(value: Mapping[str, Any]) -> Html:
    """Any JSON object: what is plain as labelled values, then a table for every list of objects."""
    tables = {key: item for key, item in value.items() if _is_table(item)}
    plain = [(key.replace("_", " "), plainly(item)) for key, item in value.items() if key not in tables]
    return lines(facts(plain, class_="rows"), *(_table_of(key, rows) for key, rows in tables.items()))


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _table_of(key: str, rows: Sequence[Mapping[str, Any]]) -> Html:
    """All rows, without columns in which nothing stands; many of them folded away."""
    flat = [_flat(row) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    head = [name for name in names if any(row.get(name) not in (None, "", []) for row in flat)]
    title = f"{key.replace('_', ' ')} ({len(rows)})"
    made = table(head, [[plainly(row.get(name)) for name in head] for row in flat], title)
    return made if len(rows) <= _FEW else details(title, made)


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The values of an object, those of objects inside it beside its own."""
    made: dict[str, Any] = {}
    for key, value in row.items():
        made |= _flat(value, f"{before}{key} ") if isinstance(value, Mapping) and value else {f"{before}{key}": value}
    return made


def plainly(value: Any) -> Html:
    """A JSON value on one line."""
    if isinstance(value, Mapping):
        return joined((joined([text(f"{key} "), plainly(item)]) for key, item in value.items()), ", ") or Html("–")
    if isinstance(value, list):
        return _enumerated(value)
    if isinstance(value, bool):
        return text("yes" if value else "no")
    if isinstance(value, int | float):
        return number(value)
    return text(value) if value not in (None, "") else Html("–")


def _enumerated(values: list[Any]) -> Html:
    """A list on one line: names folded by layer, and of many items the first."""
    if len(values) > 1 and all(isinstance(value, str) for value in values):
        values = fold_names(values)
    more = f", and {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return joined([joined(map(plainly, values[:_LISTED]), ", "), text(more)]) or Html("–")


def raw_json(value: Any) -> Html:
    """The JSON itself, for programs that find the page and not the command."""
    return tag("pre", Html(escape(folded_json(value))), id="json", tabindex="0", role="region", aria_label="JSON")


def folded_json(value: Any, indent: int = 0) -> str:
    """JSON with a line for whatever fits one; a list of numbers always does. Keys are sorted."""
    flat = json.dumps(value, sort_keys=True)
    plain = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
    if len(flat) <= 100 or plain or not isinstance(value, dict | list):
        return flat
    inner = "\n" + " " * (indent + 1)
    if isinstance(value, list):
        items = [folded_json(item, indent + 1) for item in value]
        return "[" + inner + f",{inner}".join(items) + "\n" + " " * indent + "]"
    items = [f"{json.dumps(key)}: {folded_json(value[key], indent + 1)}" for key in sorted(value)]
    return "{" + inner + f",{inner}".join(items) + "\n" + " " * indent + "}"

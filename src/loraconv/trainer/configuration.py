"""Reading a TOML file into dataclasses: every key must be known, every value of the right kind."""

from __future__ import annotations

import tomllib
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from loraconv.errors import UsageError
from loraconv.io.sidecar import read_text
from loraconv.names import printable, quoted
from loraconv.trainer.settings import Settings

T = TypeVar("T")


def read_settings(path: str | Path) -> Settings:
    """The settings in a TOML file; raises :class:`UsageError` for a file that is missing, no TOML or makes no sense."""
    try:
        table = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{printable(str(path))} is not TOML", why=str(error), hint=f"head -n 40 {quoted(path)}", slug="setting"
        ) from None
    try:
        return fill(Settings, table)
    except UsageError as error:
        error.where = error.where or printable(str(path))
        raise


def fill(kind: type[T], table: dict[str, Any], place: str = "") -> T:
    """``kind`` with the values of ``table``; its other fields keep their defaults."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise _unknown(key, place, known)
    return kind(**{key: _value(value, hints[key], f"{place}{key}") for key, value in table.items()})


def _unknown(key: str, place: str, known: list[str]) -> UsageError:
    near = get_close_matches(key, known, n=2)
    return UsageError(
        f"the setting {printable(place + key)} is not known",
        why=f"known here: {', '.join(known)}",
        hint=f"did you mean {' or '.join(place + name for name in near)}?" if near else "leave it out",
        slug="setting-unknown",
    )


def _value(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the field's type; an int where a float is wanted becomes one."""
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return fill(hint, value, f"{name}.")
    origin, inside = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return _value(value, next(i for i in inside if i is not NoneType), name)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(item, inside[0], name) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(item, inside[1], f"{name}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise UsageError(
            f"the setting {printable(name)} is {printable(repr(value), 60)}",
            why=f"it has to be a {_word(hint)}",
            slug="setting",
        )
    return value


def _word(hint: Any) -> str:
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    return words.get(hint, "list" if get_origin(hint) is tuple else "table")

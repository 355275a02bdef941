"""YAML as plain data, built from the parser's events without recursion.

A settings file is as untrusted as a checkpoint. Tags, merge keys and duplicate keys are refused, depth and size are
limited, and a scalar becomes a number only where it looks like one in JSON; so nothing is run and nothing expands.
"""

from __future__ import annotations

import re
from typing import Any

from loraconv.errors import UnsafeCheckpoint
from loraconv.names import printable

MAX_BYTES = 512 << 10
_MAX_DEPTH = 64
_MAX_EVENTS = 100_000
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "true": True, "True": True, "false": False, "False": False}


class BadYaml(Exception):
    """The text is not the YAML of a settings file; the message says why."""


def parse_yaml(text: str, where: str) -> Any:
    """The document in ``text``. Raises :class:`BadYaml`, and :class:`UnsafeCheckpoint` for tags."""
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    builder = _Builder(where)
    try:
        for count, event in enumerate(yaml.parse(text, Loader=loader)):
            if count > _MAX_EVENTS:
                raise BadYaml(f"more than {_MAX_EVENTS} items")
            builder.take(event)
    except yaml.YAMLError as error:
        raise BadYaml(str(getattr(error, "problem", None) or error).splitlines()[0]) from None
    return builder.root


class _Builder:
    """A stack of open collections; each finished value goes into the innermost one."""

    def __init__(self, where: str) -> None:
        self.root: Any = None
        self._where = where
        self._open: list[tuple[Any, list[str]]] = []
        self._anchors: dict[str, Any] = {}
        self._documents = 0

    def take(self, event: Any) -> None:
        kind = type(event).__name__
        if getattr(event, "tag", None) not in (None, "!"):
            raise UnsafeCheckpoint(
                f"{self._where} uses a YAML tag, which plain settings do not need",
                why=printable(str(event.tag), 80),
                hint="remove the tagged lines, or move the file away and pass --alpha",
                slug="yaml-tag",
            )
        if kind == "ScalarEvent":
            self._put(_scalar(event), event.anchor)
        elif kind == "AliasEvent":
            self._put(self._anchored(event.anchor), None)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            self._begin({} if kind == "MappingStartEvent" else [], event.anchor)
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            self._open.pop()
        elif kind == "DocumentStartEvent":
            self._documents += 1
            if self._documents > 1:
                raise BadYaml("more than one document")

    def _anchored(self, name: str) -> Any:
        if name not in self._anchors:
            raise BadYaml(f"an alias to nothing: {printable(name, 60)}")
        return self._anchors[name]

    def _begin(self, value: Any, anchor: str | None) -> None:
        if len(self._open) >= _MAX_DEPTH:
            raise BadYaml(f"nested more than {_MAX_DEPTH} deep")
        self._put(value, anchor)
        self._open.append((value, []))

    def _put(self, value: Any, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = value
        if not self._open:
            self.root = value
            return
        container, pending = self._open[-1]
        if isinstance(container, list):
            container.append(value)
        elif pending:
            container[pending.pop()] = value
        else:
            pending.append(self._key(container, value))

    def _key(self, container: dict[str, Any], value: Any) -> str:
        if isinstance(value, dict | list):
            raise BadYaml("a key that is not a word")
        key = str(value)
        if key == "<<" or key in container:
            raise BadYaml("a merge key" if key == "<<" else f"the key {printable(key, 60)} is given twice")
        return key


def _scalar(event: Any) -> Any:
    """The value of a scalar: a number, boolean or null only where it is plain and looks like one."""
    text: str = event.value
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text

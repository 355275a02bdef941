"""Small text files beside a checkpoint: YAML and JSON, read as plain data. Tags and duplicate keys are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint
from loraconv.io import yaml_read
from loraconv.io.input_file import InputFile
from loraconv.names import printable, quoted

MAX_BYTES = 4 << 20


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """A small UTF-8 file; raises :class:`CorruptCheckpoint` if it is larger than ``limit`` bytes or not text."""
    with InputFile(path) as file:
        if file.size > limit:
            raise CorruptCheckpoint(
                f"{file.shown} is far too large for what its name says",
                why=f"{file.size} bytes, at most {limit} are read",
                hint=f"head -c 300 {quoted(path)}",
            )
        raw = file.pread(0, file.size)
        file.check_unchanged()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file whose root is a mapping. No tag is ever run: a tagged file is refused as unsafe."""
    text = read_text(path, yaml_read.MAX_BYTES)
    try:
        return _mapping(path, yaml_read.parse_yaml(text, printable(str(path), 1000)))
    except yaml_read.BadYaml as error:
        raise _damaged(path, str(error)) from None


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file whose root is an object."""
    return _mapping(path, parse_json(read_text(path), str(path)))


def parse_json(text: str, where: str) -> Any:
    """JSON text as plain data; raises :class:`CorruptCheckpoint` for bad syntax, duplicate keys or absurd nesting."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key is given twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _damaged(where, str(error) or type(error).__name__) from None


def at(mapping: Any, path: str) -> Any:
    """The value at a dotted path, or None where a step is missing or not a mapping."""
    for step in path.split("."):
        if not isinstance(mapping, dict) or step not in mapping:
            return None
        mapping = mapping[step]
    return mapping


def _mapping(path: str | Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(path, f"its root is {type(value).__name__}, not a mapping")
    return value


def _damaged(path: str | Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"cannot read {printable(os.fspath(path), 1000)}",
        why=why,
        hint="restore the file as the trainer wrote it, or move it away and pass its values as options",
    )

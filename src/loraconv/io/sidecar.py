"""Small text files beside a checkpoint: YAML and JSON, read as plain data. Tags and duplicate keys are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint, UnsafeCheckpoint
from loraconv.io.input_file import InputFile

MAX_BYTES = 4 << 20


def read_text(path: str | Path) -> str:
    """A small UTF-8 file; raises :class:`CorruptCheckpoint` if it is larger than 4 MiB or not text."""
    with InputFile(path) as file:
        if file.size > MAX_BYTES:
            raise CorruptCheckpoint(
                f"{file.shown} is far too large for what its name says",
                why=f"{file.size} bytes, at most {MAX_BYTES} are read",
                hint=f"head -c 300 {file.shown}",
            )
        raw = file.pread(0, file.size)
        file.check_unchanged()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file whose root is a mapping. No tag is ever run: a tagged file is refused as unsafe."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path)
    try:
        value = yaml.load(text, Loader=loader)  # a safe loader: it builds plain data only
    except yaml.constructor.ConstructorError as error:
        raise UnsafeCheckpoint(
            f"{path} uses YAML tags or keys that plain data does not need",
            why=str(error.problem or error),
            hint="remove the tagged lines, or move the file away and pass --alpha",
            slug="yaml-tag",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    return _mapping(path, value)


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
    except (ValueError, RecursionError) as error:
        raise _damaged(where, str(error)) from None


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
        f"cannot read {os.fspath(path)}",
        why=why,
        hint="restore the file as the trainer wrote it, or move it away and pass its values as options",
    )

"""What kind of dataset a path is."""

from __future__ import annotations

import os
from pathlib import Path

from loraconv.data.latents import SUFFIX
from loraconv.data.listing import names_in, videos_in
from loraconv.errors import FormatError, UsageError
from loraconv.names import printable, quoted

#: The kinds that can be checked.
CHECKED = ("folder", "csv", "jsonl", "latents", "conversations")
_BY_SUFFIX = {".csv": "csv", ".jsonl": "jsonl", ".json": "conversations"}


def detect_kind(path: Path) -> tuple[str, Path]:
    """The kind and the path of the list itself, which may lie inside ``path``.

    Raises :class:`UsageError` (no such file) and :class:`FormatError` (nothing here is a dataset).
    """
    if not os.path.lexists(path):
        raise UsageError(
            f"no such file: {printable(str(path), 1000)}", slug="not-found", hint=f"ls {quoted(path.parent)}"
        )
    if not path.is_dir():
        kind = _BY_SUFFIX.get(path.suffix.lower())
        if kind is None:
            raise _not_a_dataset(path, "a list is a .csv, a .jsonl or, for image conversations, a .json")
        return kind, path
    for name, kind in (("metadata.csv", "csv"), ("metadata.jsonl", "jsonl")):
        if (path / name).is_file():
            return kind, path / name
    if (path / "videos.txt").is_file() or videos_in(path) or videos_in(path / "videos"):
        return "folder", path
    if any(name.endswith(SUFFIX) for name in names_in(path)):
        return "latents", path
    raise _not_a_dataset(path, f"it holds no video, no metadata.csv, no metadata.jsonl and no {SUFFIX} file")


def _not_a_dataset(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{printable(str(path), 1000)} is not a dataset",
        why=why,
        hint=f"name its kind: loraconv check-data {quoted(path)} --kind {CHECKED[0]}",
        slug="not-a-dataset",
    )

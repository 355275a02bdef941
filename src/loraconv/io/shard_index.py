"""The index of a sharded model: which tensor is in which shard.

The names of shards become paths, so each must be a plain file name on every system; nothing else is ever opened.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PureWindowsPath

from loraconv.errors import CorruptCheckpoint, UnsafeCheckpoint
from loraconv.io.sidecar import read_json
from loraconv.names import printable

_LONGEST_NAME = 255
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{kind}{n}" for kind in ("COM", "LPT") for n in range(10))}


def read_index(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Tensor -> shard, a file that ends in ``suffix``.

    Raises :class:`CorruptCheckpoint`, and :class:`UnsafeCheckpoint` for a shard that is no plain file name, or is the
    same as another one on some file systems.
    """
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()) or not listed:
        raise CorruptCheckpoint(
            f"not an index of shards: {printable(str(path), 1000)}",
            why="weight_map is no map of tensor names to file names",
            hint="fetch or copy the folder again",
            slug="index",
        )
    seen: dict[str, str] = {}
    for shard in dict.fromkeys(listed.values()):
        if why := _not_plain(shard, suffix):
            raise _unsafe(path, shard, why)
        other = seen.setdefault(unicodedata.normalize("NFC", shard).casefold(), shard)
        if other != shard:
            raise _unsafe(path, shard, f"on some file systems it is the same file as {printable(other, 80)}")
    return listed


def _not_plain(name: str, suffix: str) -> str:
    """Why ``name`` is not a plain file name on every system; empty if it is one."""
    # As a Windows path on every system: what is harmless here may not be where the folder goes next.
    path = PureWindowsPath(name)
    if path.drive or path.root or {"/", "\\"} & set(name) or name in ("", ".", ".."):
        return "it is a path, not a file of this folder"
    if not name.isprintable():
        return "it holds characters that cannot be printed"
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
        return f"it is longer than {_LONGEST_NAME} bytes"
    if path.name.partition(".")[0].upper().rstrip() in _DEVICES:
        return "it is the name of a device"
    return "" if os.path.splitext(name)[1] == suffix else f"it does not end in {suffix}"


def _unsafe(path: Path, shard: str, why: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"the index names a shard that cannot be one: '{printable(shard, 80)}'",
        where=printable(str(path), 1000),
        why=why,
        hint="fetch the folder again from a source that you trust: no tool writes such an index",
        slug="index-unsafe",
    )

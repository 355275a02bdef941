"""Everything of a base besides the weights that are fused: settings, and the other parts of a pipeline."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.io.sidecar import read_json
from loraconv.io.target import JOURNAL, MANIFEST
from loraconv.model_folder import CONFIG, Model, inside
from loraconv.names import printable

#: torch's names of the dtypes that a fused model can have.
_TORCH = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
#: What loraconv itself left in a base that was fused before: of that model, not of the next.
_OURS = {MANIFEST, JOURNAL}
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".safetensors", ".index.json")


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that goes to the output as it is: its place in the base, its name there, its size in bytes."""

    path: Path
    name: str
    bytes: int


def rest_of(model: Model, *, whole: bool = True, own_index: bool = False) -> tuple[list[Kept], list[str]]:
    """``(files to keep, notices)``: of a single file its config.json, of a folder all else in it.

    ``whole`` takes in the pipeline around the folder; ``own_index`` says that the base's index is kept too. Raises
    :class:`UnsafeCheckpoint` for a link that leads out of the folder.
    """
    if model.single is not None:
        return [_kept(model.folder, CONFIG)] if model.config is not None else [], []
    pipeline = model.pipeline if whole else None
    root = pipeline or model.folder
    place = model.place if whole else ""
    weights = {place + name for name in model.files}
    index = f"{place}{model.index}"
    names = [name for name in sorted(_files(root)) if name not in weights and name.removeprefix(place) not in _OURS]
    stale = [name for name in names if name.startswith(place) and _is_other_weights(name.removeprefix(place))]
    stale = [name for name in stale if name != index]
    hidden = [name for name in names if (name.startswith(".") and "/" in name) or "\\" in name]
    said = [f"left behind, as it is not fused: {printable(name)}" for name in stale]
    if hidden:
        said.append(f"left behind: {', '.join(sorted({name.partition('/')[0] for name in hidden}))}")
    left = {*stale, *hidden, *([] if own_index else [index])}
    return [_kept(root, name) for name in names if name not in left], said


def _is_other_weights(name: str) -> bool:
    """Another copy of the weights in the model's folder would stay unfused, and be loaded by some consumer."""
    return "/" not in name and name.endswith(_OTHER_WEIGHTS)


def _kept(root: Path, name: str) -> Kept:
    path = inside(root, name)
    return Kept(path, name, os.stat(path).st_size)


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """The names of all files below ``folder``; folders that are links are not entered."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def settings_of(model: Model, dtype: str | None, *, other: bool) -> dict[str, str]:
    """Name and text of a config.json that is not the base's own: of another dtype, or of an ``other`` model.

    transformers loads in the dtype that it finds there (``dtype``, before 4.56 ``torch_dtype``), so it must be that of
    the weights.
    """
    config = model.config
    if config is None or not (other or model.layout.package == "transformers"):
        return {}
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = {**config, key: _TORCH[dtype]}
    if (model.folder / CONFIG).is_file() and config == read_json(inside(model.folder, CONFIG)):
        return {}
    return {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}


Listing = dict[str, tuple[int, ...]]


def listing(folder: Path) -> Listing:
    """Every file and folder below ``folder`` with what tells that it changed."""
    found: Listing = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        info = os.lstat(path)
        changes = () if stat.S_ISDIR(info.st_mode) else (info.st_size, info.st_mtime_ns)
        found[str(path.relative_to(folder))] = info.st_dev, info.st_ino, info.st_mode, *changes
    return found


def refuse_changed(folder: Path, before: Listing) -> None:
    """Raise :class:`CorruptCheckpoint` if something in a folder that shall be replaced changed since then."""
    now = listing(folder)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise CorruptCheckpoint(
            f"{printable(str(folder), 1000)} changed while it was fused, and is left as it is",
            where=", ".join(printable(name) for name in changed[:4]),
            hint="wait until nothing writes to it, then run the same command again",
            slug="input-changed",
        )


def refuse_loss(model: Model, notices: list[str]) -> None:
    """Raise :class:`FormatError` if replacing the folder would delete what is not fused and not kept."""
    if notices:
        raise FormatError(
            f"{printable(str(model.folder), 1000)} holds files that a fused model cannot keep",
            where="; ".join(notices[:4]),
            why="--in-place would delete them",
            hint="move them away, or write to another folder with -o",
            slug="in-place-loss",
        )

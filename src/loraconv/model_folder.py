"""A base model opened for reading: which files hold its weights, checked against each other, and what config.json says.

The index, the headers and the names in both are taken for hostile: a name in an index never leads out of its folder, no
file is opened before that is certain, and index and headers must say the same. A base that is quantised is refused,
since a delta cannot be added to codes. Opening reads headers and no tensor.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UnsafeCheckpoint, UsageError
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.shard_index import read_index
from loraconv.io.sidecar import read_json
from loraconv.io.torch_read import read_tensors
from loraconv.layouts import PICKLED, Layout, is_one_of_several, layout_of
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, printable, quoted
from loraconv.quantised import refuse_quantised

#: The names of a pipeline's list of parts, and of a model's settings.
PIPELINE, CONFIG = "model_index.json", "config.json"
#: The part of a pipeline that is meant where its whole folder is given: the first of these that it has.
COMPONENTS = ("transformer", "unet")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Model:
    """An opened base model.

    ``path`` is as the user gave it; ``folder`` holds the weights (the parent of a single file); ``pipeline`` is the
    pipeline's folder around it, or None, and ``place`` what stands before the names of the model's files there (empty
    where there is none). ``files`` are the opened files by plain name in the order of the index,
    ``tensors`` all tensors (each reference's file is one of them), ``metadata`` each file's header. ``config`` is None
    where there is no config.json, ``index`` (a file name) where there is no index.
    """

    path: Path
    folder: Path
    pipeline: Path | None
    files: dict[str, InputFile]
    tensors: dict[str, TensorRef]
    metadata: dict[str, dict[str, str]]
    config: dict[str, Any] | None
    index: str | None
    layout: Layout

    @property
    def single(self) -> str | None:
        """The name of the one file that was given as the model; None for a folder."""
        return self.path.name if self.folder == self.path.parent and self.path.name in self.files else None

    @property
    def place(self) -> str:
        return f"{self.folder.name}/" if self.pipeline else ""

    @property
    def bytes(self) -> int:
        """The size of the files that hold the weights."""
        return sum(file.size for file in self.files.values())

    def check_unchanged(self) -> None:
        """Raise :class:`CorruptCheckpoint` if a file with weights changed since it was opened."""
        for file in self.files.values():
            file.check_unchanged()


@contextmanager
def open_model(path: str | Path) -> Iterator[Model]:
    """Open a base model; its files are closed at the end of the block.

    ``path`` is the folder of a transformer or UNet of diffusers, a pipeline's folder (its ``transformer/`` or ``unet/``
    is meant), a folder of transformers (safetensors, or ``pytorch_model*.bin``), one file of these, or the id of a Hub
    repository in the local cache (the network is never asked).

    Raises :class:`UsageError` (not there, unreadable, several models), :class:`FormatError` (no weights, quantised),
    :class:`CorruptCheckpoint` (damaged, shards missing or contradicting the index) and :class:`UnsafeCheckpoint` (names
    that lead out of the folder).
    """
    place, single = _place(path)
    with ExitStack() as stack:
        if single:
            layout = PICKLED if PICKLED.holds(place.name) else layout_of(())
            yield _open(Path(path), place.parent, None, {place.name: place}, None, layout, stack)
            return
        pipeline = place if (place / PIPELINE).is_file() else None
        folder = part_of(place) if pipeline or _is_part_of_pipeline(place) else place
        if pipeline:
            _refuse_no_component(folder)
        layout, index, listed = _weights(folder)
        names = list(dict.fromkeys(listed.values())) if index else list(listed)
        places = {name: inside(folder, name) for name in names}
        model = _open(Path(path), folder, pipeline, places, index, layout, stack)
        if index:
            _compare(folder / index, listed, model.tensors)
        yield model


def _place(path: str | Path) -> tuple[Path, bool]:
    """What ``path`` names on disk, and whether that is one file."""
    text = os.fspath(path)
    hint = "loraconv fuse ADAPTER --base TRANSFORMER_FOLDER -o OUT"
    if not text or "\0" in text:
        raise UsageError(f"not a path to a base model: {printable(text)!r}", hint=hint, slug="not-found")
    if os.path.isdir(text):
        return Path(text), False
    if os.path.lexists(text):
        return Path(text), True
    if _HUB_ID.fullmatch(text) and (snapshot := _cached(text)) is not None:
        return snapshot, False
    if _HUB_ID.fullmatch(text):
        raise UsageError(
            f"no such folder, and no such model in the local Hub cache: {printable(text)}",
            why="the network is not asked",
            hint=f"hf download {quoted(text)}",
            slug="not-found",
        )
    raise UsageError(f"no such file or folder: {printable(text, 1000)}", hint=hint, slug="not-found")


def _cached(repository: str) -> Path | None:
    """The snapshot of a Hub repository in the local cache, at the revision that ``main`` had when it was fetched."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # not an id that the Hub would give
        for name in (PIPELINE, *(f"{part}/{CONFIG}" for part in COMPONENTS), CONFIG):
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found.removesuffix(name))
    return None


def part_of(pipeline: Path) -> Path:
    """The folder of the part of a pipeline that is meant."""
    return next((pipeline / part for part in COMPONENTS if os.path.lexists(pipeline / part)), pipeline / COMPONENTS[0])


def _is_part_of_pipeline(folder: Path) -> bool:
    """A pipeline of which only one part was fetched has no list of its parts."""
    return not (folder / CONFIG).exists() and (part_of(folder) / CONFIG).is_file()


def _refuse_no_component(folder: Path) -> None:
    if not folder.is_dir():
        raise FormatError(
            f"the pipeline has no {'/ and no '.join(COMPONENTS)}/: {printable(str(folder.parent), 1000)}",
            why=f"its {PIPELINE} names other parts, or the download is not complete",
            hint=f"ls {quoted(folder.parent)}",
            slug="no-weights",
        )
    if os.path.islink(folder):
        raise _leads_out(folder)


def _weights(folder: Path) -> tuple[Layout, str | None, dict[str, str]]:
    """``(layout, index, tensor -> shard)``, or, where there is no index, ``(layout, None, {the only file: ""})``."""
    names = sorted(os.listdir(folder))
    layout = layout_of(names)
    indexes = [name for name in names if layout.lists(name)]
    listed = read_index(inside(folder, indexes[0]), layout.suffix) if len(indexes) == 1 else {}
    alone = [name for name in names if layout.holds(name) and name not in set(listed.values())]
    if len(indexes) == 1 and not alone:
        return layout, indexes[0], listed
    if not indexes and len(alone) == 1 and not is_one_of_several(alone[0]):
        return layout, None, {alone[0]: ""}
    if not indexes and alone and all(map(is_one_of_several, alone)):
        raise CorruptCheckpoint(
            f"the base model's index is missing: {printable(str(folder), 1000)}",
            why=f"{len(alone)} shards, and no {layout.index} that says what is in them",
            hint="fetch or copy the folder again",
            slug="index-missing",
        )
    if not indexes and not alone:
        # What torchao quantised is saved as pickles, which must not be taken for the reason.
        refuse_quantised(folder, {}, {}, _config(folder))
        raise _no_weights(folder, names)
    raise UsageError(
        f"{printable(str(folder), 1000)} holds the weights of more than one model",
        why=", ".join(printable(name, 80) for name in [*indexes, *alone][:6]),
        hint=f"pass the file that is meant: --base {quoted(folder / (alone or indexes)[0])}",
        slug="base-ambiguous",
    )


def _no_weights(folder: Path, names: list[str]) -> LoraconvError:
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    single = [name for name in names if name.endswith(".safetensors")]
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf and not single and not pickled:
        return _gguf(folder / gguf[0])
    shown = ", ".join(printable(name, 60) for name in names[:6]) + (", ..." if len(names) > 6 else "")
    hint = f"pass the folder that holds diffusion_pytorch_model.safetensors or model.safetensors; ls {quoted(folder)}"
    if single:
        hint = f"if this file is the model, pass it: --base {quoted(folder / single[0])}"
    return FormatError(
        f"no base model in {printable(str(folder), 1000)}",
        why="its weights are pickled; loraconv reads bases as safetensors"
        if pickled
        else (f"it holds {shown}" if names else "the folder is empty"),
        hint="load it in diffusers and save_pretrained(..., safe_serialization=True)" if pickled else hint,
        slug="no-weights",
    )


def inside(folder: Path, name: str) -> Path:
    """``folder / name`` where that is a regular file of the folder, seen without opening it.

    A link may lead to another file of the folder, and in the Hub's cache to its blobs. Raises
    :class:`UnsafeCheckpoint` for any other link, :class:`CorruptCheckpoint` where the file is missing.
    """
    path = folder / name
    real, root = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, root]) != root and os.path.dirname(real) != _blobs(Path(root)):
        raise _leads_out(path)
    try:
        mode = os.stat(real).st_mode
    except OSError as error:
        raise CorruptCheckpoint(
            f"a file of the base model is missing: {printable(str(path), 1000)}",
            why=error.strerror or str(error),
            hint="fetch or copy the folder again",
            slug="shard-missing",
        ) from None
    if not stat.S_ISREG(mode):
        raise UsageError(
            f"not a regular file: {printable(str(path), 1000)}", hint=f"ls -l {quoted(path)}", slug="not-regular"
        )
    return path


def in_hub_cache(folder: Path) -> bool:
    """True for a folder of a snapshot in the Hub's cache, whose files belong to the cache."""
    return _blobs(Path(os.path.realpath(folder))) is not None


def _blobs(folder: Path) -> str | None:
    """Where the links of a snapshot in the Hub's cache lead: ``models--X--Y/snapshots/REVISION/...`` to ``blobs``."""
    steps = (s for s in folder.parents if s.name == "snapshots" and s.parent.name.startswith("models--"))
    return next((str(step.parent / "blobs") for step in steps), None)


def _leads_out(path: Path) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"a link leads out of the base model's folder: {printable(str(path), 1000)}",
        why=f"to {printable(os.path.realpath(path), 300)}",
        hint=f"if that is meant, copy the folder with its links followed: cp -rL {quoted(path.parent)} COPY",
        slug="link-outside",
    )


def _open(
    path: Path,
    folder: Path,
    pipeline: Path | None,
    places: Mapping[str, Path],
    index: str | None,
    layout: Layout,
    stack: ExitStack,
) -> Model:
    files = {name: stack.enter_context(InputFile(place)) for name, place in places.items()}
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, dict[str, str]] = {}
    for name, file in files.items():
        found, metadata[name] = _read(file, layout)
        if twice := [tensor for tensor in found if tensor in tensors]:
            raise _contradiction(file.path, "tensors are in two shards", twice)
        tensors |= found
    config = _config(folder)
    refuse_quantised(path, tensors, metadata, config)
    return Model(path, folder, pipeline, files, tensors, metadata, config, index, layout)


def _config(folder: Path) -> dict[str, Any] | None:
    return read_json(inside(folder, CONFIG)) if os.path.lexists(folder / CONFIG) else None


def _read(file: InputFile, layout: Layout) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Tensors and header of one file of weights."""
    if layout.pickled:
        return read_tensors(file), {}
    _refuse_other_containers(file)
    header = read_safetensors(file)
    return header.tensors, header.metadata


def _refuse_other_containers(file: InputFile) -> None:
    start = file.pread(0, min(9, file.size))
    if start[8:] == b"{":  # safetensors: before that stands a length, whose bytes may look like anything
        return
    if start[:4] == b"GGUF":
        raise _gguf(file.path)
    if start[:2] in (b"PK", b"\x80\x02"):
        raise FormatError(
            f"the base is a pickled torch file: {file.shown}",
            why="loraconv reads bases as safetensors",
            hint="load it in diffusers and save_pretrained(..., safe_serialization=True); of a SAT run, loraconv"
            f" sat2diffusers {quoted(file.path)} --what base -o transformer",
            slug="no-weights",
        )


def _gguf(path: Path) -> FormatError:
    return FormatError(
        f"the base is quantised (GGUF): {printable(str(path), 1000)}",
        why="a delta cannot be added to its blocks of codes without quantising them again",
        hint="pass the model that it was made from, in fp32, fp16 or bf16",
        slug="base-quantised",
    )


def _compare(index: Path, listed: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> None:
    """Every tensor must be in the shard that the index says, and the index must name every tensor."""
    found = {name: ref.file.path.name for name, ref in tensors.items()}
    if apart := [name for name in (*listed, *found) if listed.get(name) != found.get(name)]:
        raise _contradiction(index, "the index and the headers of the shards contradict each other", apart)


def _contradiction(path: Path, what: str, names: list[str]) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the base model is not whole: {what}",
        where=f"{printable(str(path), 1000)}: {'; '.join(fold_names(dict.fromkeys(names))[:4])}",
        why="the folder holds files of different models, or was not copied or fetched completely",
        hint="fetch or copy the folder again",
        slug="index-contradiction",
    )

"""A checkpoint opened for reading: its container, its tensors by name for each rank, and everything else it holds.

Opening reads structure only. Nothing here decides what the names mean; see ``detect``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError
from loraconv.io import safetensors_read, sidecar, torch_read
from loraconv.io.input_file import InputFile
from loraconv.io.run_folder import RunFiles, check_ranks, find_run, find_sidecar
from loraconv.io.torch_pickle import Opaque
from loraconv.io.zero_parts import merged
from loraconv.io.zero_shards import ZeroStep, beside, find_step, refuse_parts_of
from loraconv.lazy import TensorRef, nbytes
from loraconv.names import fold_names, numel, printable, quoted
from loraconv.registry import dialects
from loraconv.rules import match

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Extra:
    """Something in the checkpoint besides the model's tensors: its name, kind, tensor count and bytes."""

    name: str
    kind: str
    tensors: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Source:
    """An opened checkpoint. ``ranks`` maps names to tensors, one map a model-parallel rank (usually one).

    ``incomplete`` names tensors of which the checkpoint holds only a part. ``trained`` is the set of names that the
    trainer says it trained, or None where the container does not tell; ``frozen`` are tensors of the base beside an
    adapter, which are in no rank, and ``whole`` trained tensors as the model ran with them, of which the rank has more
    exact copies. ``config`` is the parsed sidecar.
    """

    path: Path
    container: str
    ranks: list[dict[str, TensorRef]]
    files: list[InputFile]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    config_path: Path | None = None
    extras: list[Extra] = field(default_factory=list)
    trained: frozenset[str] | None = None
    frozen: dict[str, TensorRef] = field(default_factory=dict)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """The tensors of the first rank."""
        return self.ranks[0]

    @property
    def bytes(self) -> int:
        """The size of all files on disk."""
        return sum(f.size for f in self.files)

    def check_unchanged(self) -> None:
        """Raise :class:`CorruptCheckpoint` if any input file changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


@contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """Open a checkpoint file or folder; the files are closed at the end of the block.

    Raises :class:`UsageError` (not there, unreadable), :class:`FormatError` (not a checkpoint, ranks missing),
    :class:`CorruptCheckpoint` and :class:`UnsafeCheckpoint`.
    """
    if not os.fspath(path):
        raise UsageError("no checkpoint was named", hint="loraconv inspect RUN_OR_FILE", slug="not-found")
    if "\0" in str(path):
        raise UsageError(f"not a path: {printable(str(path))}", hint="loraconv inspect RUN_OR_FILE", slug="not-found")
    path = Path(path)
    with ExitStack() as stack:
        yield _open_folder(path, stack) if path.is_dir() else _open_file(path, stack)


def refuse_parts(source: Source) -> None:
    """Raise :class:`FormatError` for a checkpoint that holds only a part of each tensor."""
    if source.incomplete:
        raise FormatError(
            f"{printable(str(source.path))} holds only a part of each tensor",
            where=", ".join(fold_names(source.incomplete)[:3]),
            why="ZeRO-3 with more than one data-parallel rank saves rank 0's part and loses the others",
            hint="train or save again with ZeRO stage 2 (deepspeed.zero_optimization.stage in the YAML)",
            slug="zero3-partial",
        )


def _open_folder(path: Path, stack: ExitStack) -> Source:
    found: dict[Path, RunFiles | None] = {}
    for dialect in dialects():
        if dialect.layout is not None:
            run = find_run(path, dialect.layout)
            if run is not None:
                found[run.files[0]] = run
        elif (file := _weights(path, dialect.file)) is not None:
            found[file] = None
    if len(found) > 1:
        raise UsageError(
            f"{printable(str(path))} holds more than one checkpoint",
            why=", ".join(printable(file.name) for file in found),
            hint="pass the file or sub-folder that is meant",
            slug="source-ambiguous",
        )
    if not found:
        step = find_step(path)
        if step is None:
            raise _nothing_in(path)
        return _open_step(path, step, stack)
    ((file, run),) = found.items()
    if run is None:
        return _open_file(file, stack)
    step = find_step(file.parent)
    return _open_run(path, run, stack) if step is None else _open_step(path, step, stack, run.notices)


def _weights(folder: Path, name: str) -> Path | None:
    """The weights file of this name in ``folder``, also under its older pickled name (``.bin``)."""
    candidates = (folder / name, (folder / name).with_suffix(".bin"))
    return next((c for c in candidates if c.is_file()), None)


def _nothing_in(path: Path) -> LoraconvError:
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        return UsageError(f"cannot list {printable(str(path))}", why=str(error), slug="unreadable")
    inside = [n for n in names if (path / n).is_dir()]
    weights = [n for n in names if n.endswith(_WEIGHT_SUFFIXES)]
    hint = "loraconv formats"
    if weights or inside:
        hint = f"loraconv inspect {quoted(path / (weights or inside)[-1])}"
    shown = ", ".join(printable(n, 60) for n in names[:6]) + (", ..." if len(names) > 6 else "")
    return FormatError(
        f"no checkpoint found in {printable(str(path))}",
        why=f"it holds {shown}" if names else "the folder is empty",
        hint=hint,
        slug="no-checkpoint",
    )


def _open_file(path: Path, stack: ExitStack) -> Source:
    file = stack.enter_context(InputFile(path))
    if torch_read.sniff(file) == "safetensors":
        header = safetensors_read.read_safetensors(file)
        source = Source(path, "safetensors file", [header.tensors], [file], metadata=header.metadata)
        _add_sidecar(source, path)
        return source
    layouts = [d.layout for d in dialects() if d.layout is not None]
    runs = [run for layout in layouts if (run := find_run(path, layout)) is not None]
    # A file under another name is taken alone; the layouts differ in names only, so the first one fits.
    return _open_run(path, next((r for r in runs if r.named), runs[0]), stack)


def _add_sidecar(source: Source, file: Path) -> None:
    for dialect in dialects():
        beside = file.with_name(dialect.sidecar) if dialect.sidecar else None
        if beside is not None and file.stem == Path(dialect.file).stem and beside.is_file():
            read = sidecar.read_yaml if beside.suffix in (".yaml", ".yml") else sidecar.read_json
            source.config, source.config_path = read(beside), beside


def _open_run(path: Path, run: RunFiles, stack: ExitStack) -> Source:
    files = [stack.enter_context(InputFile(p)) for p in run.files]
    roots = [_root(file) for file in files]
    container = "torch file" if len(files) == 1 and path == run.files[0] else "run folder"
    notices = [*run.notices, *filter(None, [beside(run.files[0].parent)])]
    source = Source(path, container, [], files, notices=notices)
    for file, root in zip(files, roots, strict=True):
        _add_rank(source, file, root, run)
    _check_world(source, roots, run)
    if run.sidecar is not None:
        source.config, source.config_path = sidecar.read_yaml(run.sidecar), run.sidecar
    else:
        _add_sidecar(source, run.files[0])
    _leave_frozen(source)
    return source


def _open_step(path: Path, step: ZeroStep, stack: ExitStack, notices: Iterable[str] = ()) -> Source:
    """A step of DeepSpeed whose trained tensors are put together out of the ranks' fp32 copies."""
    files = [stack.enter_context(InputFile(p)) for p in (*step.models, *step.optimizers)]
    roots = [_root(file) for file in files]
    models, optimizers = roots[: len(step.models)], roots[len(step.models) :]
    made = merged(step, models, optimizers)
    container = f"DeepSpeed ZeRO {made.stage} checkpoint"
    source = Source(path, container, [made.tensors], files, trained=made.trained, whole=made.whole)
    source.extras = [_extra(str(key), value) for key, value in models[0].items() if key not in _READ]
    state = [{k: v for k, v in root["optimizer_state_dict"].items() if "fp32" not in k} for root in optimizers]
    source.extras.append(_extra("optimizer_state_dict", state))
    other = f"; those in the training dtype: pass {quoted(step.models[0])}" if step.whole else ""
    ranks = f"{len(optimizers)} rank{'s' if len(optimizers) > 1 else ''}"
    told = f"the trained tensors are the optimizer's fp32 copies, put together from {ranks} of ZeRO {made.stage}{other}"
    source.notices = [*notices, *step.notices, told]
    _add_settings(source, step.folder)
    _leave_frozen(source)
    return source


#: What the tensors of a step are made of.
_READ = ("module", "frozen_param_fragments", "frozen_param_shapes")


def _add_settings(source: Source, folder: Path) -> None:
    """The settings of the run, beside its steps: those of a trainer with a layout, or of an adapter."""
    for dialect in dialects():
        if dialect.layout is not None and source.config is None:
            found = find_sidecar(folder, dialect.layout)
            if found is not None:
                source.config, source.config_path = sidecar.read_yaml(found), found
        if dialect.sidecar and source.config is None:
            _add_sidecar(source, folder.parent / dialect.file)


def _leave_frozen(source: Source) -> None:
    """Set aside the base model that an adapter was trained on, unless the trainer is one whose checkpoints are read for
    their base, too. A frozen factor stays."""
    own = tuple(prefix for d in dialects() if d.layout is not None for prefix in d.prefixes)
    if len(source.ranks) > 1 or not source.trained or any(name.startswith(own) for name in source.tensors):
        return
    spelled = [template for d in dialects() for template in (d.down, d.up) if template]
    for name in [name for name in source.tensors if name not in source.trained]:
        if all(match(template, name) is None for template in spelled):
            source.frozen[name] = source.tensors.pop(name)
    if source.frozen:
        source.notices.append(f"{len(source.frozen)} tensors are the base's own, were not trained, and are left out")


def _root(file: InputFile) -> dict[Any, Any]:
    root = torch_read.read_torch(file)
    if not isinstance(root, dict):
        raise _not_a_state_dict(file, type(root).__name__)
    return root


def _add_rank(source: Source, file: InputFile, root: dict[Any, Any], run: RunFiles) -> None:
    key = next((k for k in run.layout.root if isinstance(root.get(k), dict)), None)
    state = root if key is None else root[key]
    refuse_parts_of(root, state, file.path)
    tensors: dict[str, TensorRef] = {}
    for name, value in state.items():
        tensor = _whole(source, run, str(name), value)
        if tensor is not None:
            name = str(name).removeprefix(run.layout.partial_prefix) if run.partial else str(name)
            tensors[name] = replace(tensor, name=name)
        elif not source.ranks:
            source.extras.append(_extra(str(name), value))
    if not tensors and not source.incomplete:
        raise _not_a_state_dict(file, "a dictionary without tensors")
    if not source.ranks and key is not None:
        source.extras += [_extra(str(k), v) for k, v in root.items() if k != key]
        source.trained = _trained(root.get(run.layout.trained))
    source.ranks.append(tensors)


def _whole(source: Source, run: RunFiles, name: str, value: Any) -> TensorRef | None:
    """The tensor that ``value`` stands for; a data-parallel part is accepted only where it is the whole tensor."""
    if isinstance(value, TensorRef):
        return value
    if not isinstance(value, torch_read.TaggedTensor):
        return None
    shape = value.state.get("ds_shape")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        return value.tensor
    if numel(shape) != numel(value.tensor.shape) or value.tensor.strides is not None:
        source.incomplete.append(name.removeprefix(run.layout.partial_prefix))
        return None
    return replace(value.tensor, shape=shape)


def _extra(name: str, value: Any) -> Extra:
    found = list(_tensors_in(value))
    kind = value.kind if isinstance(value, Opaque) else type(value).__name__
    if found:
        kind = "tensors"
    return Extra(printable(name), kind, len(found), sum(nbytes(t) for t in found))


def _tensors_in(value: Any) -> Iterator[TensorRef]:
    """Every tensor inside nested containers (without recursion: the nesting is the file's choice)."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, TensorRef):
            yield item
        elif isinstance(item, torch_read.TaggedTensor):
            yield item.tensor
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)


def _trained(value: Any) -> frozenset[str] | None:
    if not isinstance(value, list) or not all(isinstance(group, dict) for group in value):
        return None
    return frozenset(str(name) for group in value for name in group)


def _check_world(source: Source, roots: list[Any], run: RunFiles) -> None:
    worlds = {root.get(run.layout.world_size) for root in roots} - {None}
    if run.partial or not worlds:
        return
    where = printable(str(run.files[0].parent))
    if len(worlds) > 1:
        raise CorruptCheckpoint(
            f"the rank files in {where} belong to different runs",
            why=f"they say {run.layout.world_size} = {', '.join(sorted(map(str, worlds)))}",
            hint="copy the rank files of one iteration of one run into a folder of their own",
            slug="rank-mixed",
        )
    world = worlds.pop()
    if type(world) is int and not 1 <= world <= 4096:
        raise CorruptCheckpoint(f"{where}: {run.layout.world_size} is {world}", slug="rank-count")
    if type(world) is int and world < len(source.ranks):
        raise CorruptCheckpoint(
            f"{where} holds more rank files than the run had",
            why=f"{len(source.ranks)} files, {run.layout.world_size} is {world}",
            hint="move the files that do not belong to this run away",
            slug="rank-extra",
        )
    if type(world) is int:
        check_ranks(where, list(range(len(source.ranks))), world)


def _not_a_state_dict(file: InputFile, what: str) -> FormatError:
    return FormatError(
        f"{file.shown} holds no state dict",
        why=f"its content is {what}",
        hint="pass the checkpoint that the trainer saved (mp_rank_00_model_states.pt of a SAT run)",
        slug="no-state-dict",
    )

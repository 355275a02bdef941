"""The files that a fused model is written to: the base's own, or new shards as diffusers makes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from loraconv.io.safetensors_write import in_order
from loraconv.lazy import TensorRef, nbytes
from loraconv.model_folder import Model
from loraconv.names import FLOAT_DTYPES

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the output: ``base`` is what it is made of, ``key`` its name among those of the base; the dtype it
    gets, and whether adapters are added to it. ``called`` is its name in the output, ``more`` the number of rows of
    zeros behind its own."""

    base: TensorRef
    key: str
    dtype: str
    fused: bool
    called: str
    more: int = 0

    @property
    def copied(self) -> bool:
        """True if its bytes are those of ``base``."""
        return not self.fused and self.dtype == self.base.dtype and not self.more

    @property
    def stored(self) -> TensorRef:
        """The reference with the output's dtype and shape: what a header says of it. Not to be read."""
        if not self.more:
            return replace(self.base, dtype=self.dtype)
        return replace(self.base, dtype=self.dtype, shape=(self.base.shape[0] + self.more, *self.base.shape[1:]))


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tensors in the order of their bytes."""

    name: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """The size of its tensors."""
        return sum(nbytes(entry.stored) for entry in self.entries)

    def runs(self) -> Iterator[tuple[Entry, ...]]:
        """The entries in order; those that are copied and lie side by side in one file of the base together."""
        run: list[Entry] = []
        for entry in self.entries:
            if run and not _adjacent(run[-1], entry):
                yield tuple(run)
                run = []
            run.append(entry)
        if run:
            yield tuple(run)


def _adjacent(one: Entry, other: Entry) -> bool:
    side_by_side = one.base.offset + nbytes(one.base) == other.base.offset
    return one.copied and other.copied and one.base.file is other.base.file and side_by_side


def plan_shards(
    model: Model,
    fused: Collection[str],
    dtype: str | None,
    limit: int | None,
    names: Mapping[str, str] = NOTHING,
    more: Mapping[str, int] = NOTHING,
) -> tuple[list[Shard], dict[str, str]]:
    """``(shards, index)``: the base's files, or with ``limit`` (bytes) new ones; name and text of a new index, nothing
    where the base's own or none serves. ``dtype`` (safetensors name) is for every floating tensor. Tensors of ``model``
    that lie in none of its files go behind those of the last one. ``names`` are other names for the output, ``more``
    rows of zeros to add (both by the model's names)."""
    entries = {}
    for name, ref in model.tensors.items():
        stored = dtype if dtype and ref.dtype in FLOAT_DTYPES else ref.dtype
        entries[name] = Entry(ref, name, stored, name in fused, names.get(name, name), more.get(name, 0))
    if limit is not None:
        return _resharded(model, entries, limit)
    own = set(map(id, model.files.values()))
    foreign = [entry for entry in entries.values() if id(entry.base.file) not in own]
    shards = []
    for name, file in model.files.items():
        inside = [entry for entry in entries.values() if entry.base.file is file]
        if name == list(model.files)[-1]:
            inside += foreign
        if foreign or model.layout.pickled:  # as they come, wide dtypes might stand at odd places
            inside = [entries[found] for found, _ in in_order((entry.key, entry.stored) for entry in inside)]
        shards.append(Shard(model.layout.rewritten(name), tuple(inside), model.metadata[name]))
    kept = all((entry.called, entry.stored) == (key, entry.base) for key, entry in entries.items()) and not foreign
    if model.index is None or (kept and not model.layout.pickled):
        return shards, {}
    listed = {entry.called: shard.name for shard in shards for entry in shard.entries}
    index = model.layout.written_index if model.layout.pickled else model.index
    return shards, {index: _index({"total_size": sum(shard.bytes for shard in shards)}, listed)}


def _resharded(model: Model, entries: Mapping[str, Entry], limit: int) -> tuple[list[Shard], dict[str, str]]:
    """As ``save_pretrained`` does. A tensor larger than ``limit`` gets a shard of its own."""
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {entry.called: entry for entry in entries.values()}
    stored = {name: named[name].stored for name in sorted(named)}
    split = split_state_dict_into_shards_factory(
        stored, get_storage_size=nbytes, filename_pattern=model.layout.written_pattern, max_shard_size=limit
    )
    metadata = {key: value for header in reversed(model.metadata.values()) for key, value in header.items()}
    shards = [
        Shard(file, tuple(named[name] for name, _ in in_order((name, stored[name]) for name in names)), metadata)
        for file, names in split.filename_to_tensors.items()
    ]
    return shards, {
        model.layout.written_index: _index(split.metadata, split.tensor_to_filename)
    } if split.is_sharded else {}


def _index(metadata: Mapping[str, object], listed: Mapping[str, str]) -> str:
    return json.dumps({"metadata": metadata, "weight_map": listed}, indent=2, sort_keys=True) + "\n"

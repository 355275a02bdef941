"""Re-read what was written, with readers that share nothing with the writers, and prove it against the source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from loraconv.errors import ProofFailed
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.torch_read import read_torch
from loraconv.lazy import TensorRef
from loraconv.verify.adapter import prove_adapter
from loraconv.verify.base import prove_base
from loraconv.verify.numbers import Expectation
from loraconv.verify.oracles import check_written, pairs_of, yaml_settings
from loraconv.verify.proof import Proof


class Checkpoint(Protocol):
    """The source as the verifier needs it: raw tensors by name for each rank, header, settings."""

    ranks: list[dict[str, TensorRef]]
    metadata: dict[str, str]
    config: dict[str, Any] | None


def prove_written(
    folder: Path,
    *,
    kind: str,
    files: Sequence[str],
    source_kind: str,
    source: Checkpoint,
    dtypes: Mapping[str, tuple[str, str]],
    alpha: Fraction | None = None,
    every_consumer: bool = False,
    dtype: str | None = None,
) -> Proof:
    """The proof of the output of format ``kind`` (``sat``, ``diffusers``, ``peft`` or ``base``) in ``folder``.

    ``every_consumer`` demands that the strength is the same where the header is not read. Raises
    :class:`ProofFailed` where the output cannot be read at all.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(InputFile(folder / name)) for name in files]
        if kind == "base":
            stored = {name: _safetensors(file)[0] for name, file in zip(files, opened, strict=True)}
            _check_index(folder, stored)
            tensors = {n: t for shard in stored.values() for n, t in shard.items()}
            return prove_base(list(source.ranks), tensors, _json(folder / "config.json"), dtype)
        tensors, metadata = _torch(opened[0]) if kind == "sat" else _safetensors(opened[0])
        settings = _settings(kind, folder)
        check_written(kind, tensors, metadata, settings)
        written = pairs_of(kind, [tensors], metadata, settings, None)
        pairs = pairs_of(source_kind, list(source.ranks), source.metadata, source.config, alpha)
        return prove_adapter(Expectation(pairs, dtypes), written, scale_ignored=every_consumer)


def _check_index(folder: Path, shards: Mapping[str, Mapping[str, TensorRef]]) -> None:
    """Every tensor is in one shard, and the index says which; a single file has no index."""
    total = sum(len(tensors) for tensors in shards.values())
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if len(shards) == 1 and not index.exists():
        return
    told = _json(index)["weight_map"]
    found = {name: file for file, tensors in shards.items() for name in tensors}
    if told != found or len(found) != total:
        raise ProofFailed(
            "the index of the shards does not say where the tensors are",
            hint="please report this, with the output of loraconv inspect on the source",
        )


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _safetensors(file: InputFile) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Our own reading of the header, which the format's reference library has to agree with."""
    import safetensors

    ours = read_safetensors(file)
    with safetensors.safe_open(str(file.path), framework="numpy") as theirs:
        names = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118 (no dict)
        same = names == {n: t.shape for n, t in ours.tensors.items()} and (theirs.metadata() or {}) == ours.metadata
    if not same:
        raise ProofFailed(
            "the written header reads differently in the safetensors library",
            hint="please report this, with the output of loraconv inspect on the source",
        )
    return ours.tensors, ours.metadata


def _torch(file: InputFile) -> tuple[dict[str, TensorRef], dict[str, str]]:
    root = read_torch(file)
    assert isinstance(root, dict)
    return {name: ref for name, ref in root["module"].items() if isinstance(ref, TensorRef)}, {}


def _settings(kind: str, folder: Path) -> dict[str, Any] | None:
    """The settings file that was written beside the weights."""
    if kind == "sat":
        return yaml_settings((folder / "training_config.yaml").read_text(encoding="utf-8"))
    if kind == "peft":
        return _json(folder / "adapter_config.json")
    return None

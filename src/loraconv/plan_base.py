"""The plan of a base model: diffusers' transformer folder, sharded as diffusers shards it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from loraconv.errors import UsageError
from loraconv.fold import cast
from loraconv.lazy import Lazy, nbytes
from loraconv.plan import Output, Plan, PlannedFile, exact_recipe, how, proof_claim
from loraconv.rules import Dialect

_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """``10GB`` or ``500MB`` in bytes (powers of 1000, as diffusers counts); raises :class:`UsageError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", text, re.IGNORECASE)
    size = int(float(found.group(1)) * _UNITS[found.group(2).upper()]) if found else 0
    if size < 1:
        raise UsageError(f"not a size: {text!r}", hint="--max-shard-size 10GB")
    return size


def plan_base(
    tensors: Mapping[str, Lazy], config: Mapping[str, Any], target: Dialect, *, dtype: str | None, limit: int
) -> Plan:
    """Shards, index and ``config.json``. A tensor larger than ``limit`` bytes gets a shard of its own."""
    from huggingface_hub import split_state_dict_into_shards_factory

    made = {name: tensor if dtype is None else cast(tensor, dtype) for name, tensor in sorted(tensors.items())}
    split = split_state_dict_into_shards_factory(
        made,
        get_storage_size=nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=limit,
    )
    outputs = {name: Output(name, tensor, how(tensor), exact_recipe(tensor)) for name, tensor in made.items()}
    metadata = {"format": "pt", **proof_claim(outputs.values())}
    files = tuple(
        PlannedFile(file, tuple(outputs[name] for name in names), metadata)
        for file, names in split.filename_to_tensors.items()
    )
    texts = {"config.json": json.dumps(dict(config), indent=2) + "\n"}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        texts[f"{_PATTERN.format(suffix='')}.index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return Plan(target, files, texts)

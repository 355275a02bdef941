"""What the tests of merge, resize, extract and split share: adapters drawn here, and their deltas in float64 numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support import LORA_FILE, Tensors, header

Array = np.ndarray[Any, Any]
MODULES = [
    f"transformer_blocks.{layer}.{kind}"
    for layer in range(2)
    for kind in ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "ff.net.0.proj")
]
WIDTH = 24


def drawn(
    seed: int, rank: int = 4, modules: list[str] | None = None, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> Tensors:
    """Factors of a diffusers adapter; the feed-forward is four times as wide."""
    noise, made = torch.Generator().manual_seed(seed), {}
    for module in MODULES if modules is None else modules:
        out = 4 * width if ".ff." in module else width
        made[f"transformer.{module}.lora_A.weight"] = (torch.randn((rank, width), generator=noise) * 0.3).to(dtype)
        made[f"transformer.{module}.lora_B.weight"] = (torch.randn((out, rank), generator=noise) * 0.3).to(dtype)
    return made


def write(file: Path, tensors: Tensors, alpha: float | None = None) -> Path:
    """A diffusers file; without ``alpha`` its scale is 1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rank = next(t.shape[0] for n, t in tensors.items() if ".lora_A." in n)
    told = {"transformer.r": rank, "transformer.lora_alpha": rank if alpha is None else alpha}
    save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    return file


def delta(tensors: Tensors, scale: float = 1.0, prefix: str = "transformer.") -> dict[str, Array]:
    """Module -> ``scale * up @ down`` in float64."""
    made = {}
    for name, down in tensors.items():
        if ".lora_A." in name:
            up = tensors[name.replace("lora_A", "lora_B")]
            made[name.removeprefix(prefix).removesuffix(".lora_A.weight")] = scale * (
                up.double().numpy() @ down.double().numpy()
            )
    return made


def total(*deltas: Mapping[str, Array]) -> dict[str, Array]:
    """The sum of deltas, module by module."""
    made: dict[str, Array] = {}
    for one in deltas:
        for module, value in one.items():
            made[module] = made.get(module, 0.0) + value
    return made


def in_diffusers(out: Path) -> dict[str, Array]:
    """What diffusers adds for a written file, at every version: its scale has to be 1."""
    told = json.loads(header(out / LORA_FILE)["lora_adapter_metadata"])
    assert told["transformer.lora_alpha"] == told["transformer.r"]
    return delta(load_file(out / LORA_FILE))


def in_peft(out: Path) -> dict[str, Array]:
    """What peft adds for a written folder, by its own rule."""
    config = json.loads((out / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter_model.safetensors")
    made = {}
    for module, value in delta(tensors, prefix="base_model.model.").items():
        rank = config["rank_pattern"].get(module, config["r"])
        assert rank == tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        made[module] = value * (config["alpha_pattern"].get(module, config["lora_alpha"]) / rank)
    return made


def apart(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """The greatest relative distance of two sets of deltas in the Frobenius norm."""
    assert sorted(one) == sorted(other)
    return max(float(np.linalg.norm(one[m] - other[m]) / np.linalg.norm(other[m])) for m in other)

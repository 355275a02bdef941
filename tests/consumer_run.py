"""What real consumers do with adapter files: which of their keys they apply, at what scale, or with which error.

Knows nothing of loraconv, so that it also runs as a script in an environment with another diffusers or peft::

    python consumer_run.py FOLDER

``FOLDER`` holds one sub-folder a file, as :mod:`tests.consumer_zoo` writes them. One JSON object is printed. Nothing is
told by names: a key counts as applied if a parameter of the model holds its numbers, and a scale is measured on what
the layer computes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["DIFFUSERS_VERBOSITY"] = "critical"
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import peft
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 4,
}


def outcome(file: Path) -> dict[str, Any]:
    """What the consumer of ``file`` does: peft where ``adapter_config.json`` is beside it, else diffusers' pipeline.

    ``{"error": ...}``, or ``applied`` (keys of the file), ``stated`` and ``measured`` (module -> scale, None for a
    module whose layer was made and not filled) and ``magnitudes`` (whether DoRA is on).
    """
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**CONFIG).eval()
    try:
        _load(transformer, file)
    except Exception as error:  # whatever a consumer raises is the result
        return {"error": f"{type(error).__name__}: {error}"}
    return _found(transformer, load_file(file))


def _load(transformer: Any, file: Path) -> None:
    if (file.parent / "adapter_config.json").is_file():
        peft.PeftModel.from_pretrained(transformer, str(file.parent))
        return
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
    # Folder and name: a file alone is refused before 0.40 where the hub is offline.
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)


def _found(transformer: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for name, p in transformer.named_parameters() if "lora_" in name and not p.is_meta]
    applied = [k for k, t in tensors.items() if any(p.shape == t.shape and torch.equal(p, t) for p in parameters)]
    stated: dict[str, float] = {}
    measured: dict[str, float | None] = {}
    magnitudes = False
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer) and layer.scaling:
            (stated[name],) = layer.scaling.values()
            measured[name] = None if any(p.is_meta for p in layer.parameters()) else _measure(layer)
            magnitudes |= any(getattr(layer, "use_dora", {}).values())
    return {"applied": applied, "stated": stated, "measured": measured, "magnitudes": magnitudes}


@torch.no_grad()
def _measure(layer: Any) -> float:
    """What the layer adds to its base, in units of ``up @ down``; 0 where the factors do nothing."""
    (adapter,) = layer.scaling
    one = torch.eye(layer.in_features)
    product = (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).T
    added = layer(one) - layer.get_base_layer()(one)
    norm = (product * product).sum()
    return float((added * product).sum() / norm) if norm else 0.0


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    files = {folder.name: next(folder.glob("*.safetensors")) for folder in sorted(Path(sys.argv[1]).iterdir())}
    fields = sorted(name for name, field in peft.LoraConfig.__dataclass_fields__.items() if field.init)
    found = {name: outcome(file) for name, file in files.items()}
    print(json.dumps({"diffusers": diffusers.__version__, "peft": peft.__version__, "fields": fields, "found": found}))


if __name__ == "__main__":
    main()

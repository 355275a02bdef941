"""Tiny LLaVA runs as its trainer saves them: real LLaMA and CLIP classes, an adapter that peft saved, and beside it
``non_lora_trainables.bin`` and ``config.json`` (haotian-liu/LLaVA ``llava/train/train.py``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

Tensors = dict[str, torch.Tensor]

HIDDEN, WIDE, VOCABULARY, RANK, ALPHA = 32, 24, 64, 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WRAPPER = "base_model.model."
BIN = {"weights": "pytorch_model", "end": "bin"}
LLAVA = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": WIDE,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
}


def llama_config(**changes: Any) -> LlamaConfig:
    given = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**{**given, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})


def language_model(dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """Seeded random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes)).to(dtype).eval()


def projector(dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, wide: int = WIDE) -> Tensors:
    """The projector of two layers, under the names of LLaVA's state dict."""
    noise = torch.Generator().manual_seed(3)
    shapes = {"0.weight": (hidden, wide), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    drawn = {name: torch.randn(shape, generator=noise) * 0.1 for name, shape in shapes.items()}
    return {f"model.mm_projector.{name}": tensor.to(dtype) for name, tensor in drawn.items()}


@dataclass(frozen=True)
class Made:
    """A base and a run of it on disk, and what peft's own merge makes of both: ``merged`` in the dtype of the base,
    ``summed`` in float64; ``exact`` is the sum by its definition in float64 (names of the base)."""

    base: Path
    run: Path
    merged: Tensors
    summed: Tensors
    exact: Tensors
    beside: Tensors


def make(
    place: Path,
    dtype: torch.dtype = torch.float16,
    beside: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    run: str = "foo",
    shards: str = "10GB",
) -> Made:
    """A base saved by transformers and a run saved by peft, of random factors (``up`` is not zero)."""
    base, folder = place / "base", place / run
    model = language_model(dtype)
    model.save_pretrained(base, max_shard_size=shards)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    )
    noise = torch.Generator().manual_seed(1)
    for name, value in tuned.named_parameters():
        if ".lora_" in name:
            value.data = (torch.randn(value.shape, generator=noise) * 0.05).to(value.dtype)
    tuned.save_pretrained(folder)
    exact = _exact(state, load_file(folder / "adapter_model.safetensors"))
    summed = deepcopy(tuned).double().merge_and_unload().state_dict()
    merged = {name: tensor.clone() for name, tensor in tuned.merge_and_unload().state_dict().items()}
    whole = dict(projector(dtype) if beside is None else beside)
    torch.save({WRAPPER + name: tensor for name, tensor in whole.items()}, folder / "non_lora_trainables.bin")
    settings = json.loads((base / "config.json").read_text()) | LLAVA | dict(config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    return Made(base, folder, merged, summed, exact, whole)


def _exact(state: Tensors, factors: Tensors) -> Tensors:
    """The base plus ``alpha / rank * up @ down`` in float64, which is exact to 2**-50 here."""
    exact = {name: tensor.double() for name, tensor in state.items()}
    for name, down in factors.items():
        if "lora_A" in name:
            up = factors[name.replace("lora_A", "lora_B")].double()
            home = name.removeprefix(WRAPPER).replace(".lora_A", "")
            exact[home] = exact[home] + ALPHA / RANK * up @ down.double()
    return exact


def pickled(base: Path) -> Path:
    """The same base as torch files, as most LLaMA and Vicuna repositories have them."""
    files = sorted(base.glob("model*.safetensors"))
    for file in files:
        torch.save(load_file(file), base / f"pytorch_{file.stem}.bin")
        file.unlink()
    index = base / "model.safetensors.index.json"
    if index.exists():
        listed = json.loads(index.read_text())
        names = {name: f"pytorch_{Path(shard).stem}.bin" for name, shard in listed["weight_map"].items()}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(listed | {"weight_map": names}))
        index.unlink()
    return base


def vision_tower(folder: Path, full: bool = False) -> CLIPVisionModel:
    """A tiny CLIP tower on disk: as transformers saves it, or ``full``: a CLIP repository with its text half."""
    torch.manual_seed(5)
    settings = {"hidden_size": WIDE, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPVisionConfig(**settings, image_size=28, patch_size=14, projection_dim=16)
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(folder)
    if full:
        state = {f"vision_model.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
        state |= {"text_model.embeddings.token_embedding.weight": torch.ones(4, 4), "logit_scale": torch.tensor(2.0)}
        state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        vision = json.loads((folder / "config.json").read_text())
        text = {"model_type": "clip", "vision_config": vision, "text_config": {}, "projection_dim": 16}
        (folder / "config.json").write_text(json.dumps(text))
    return model

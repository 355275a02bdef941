"""Small adapters in every dialect, written and read again from the formats' definitions alone: real key lists, a few
layers, tiny tensors. Nothing here imports the library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
HIDDEN, RANK, ALPHA = 8, 4, 2.0


@dataclass(frozen=True)
class Module:
    """A module as the model's own repository has it: its rows as diffusers modules, in equal chunks."""

    there: str
    parts: dict[str, tuple[int, ...]]
    chunks: int = 1
    rows: int = HIDDEN

    @property
    def height(self) -> int:
        return self.rows * self.chunks


def one(there: str, here: str, rows: int = HIDDEN) -> Module:
    return Module(there, {here: (0,)}, rows=rows)


def three(there: str, here: str, names: tuple[str, str, str] = ("to_q", "to_k", "to_v")) -> Module:
    return Module(there, {f"{here}.{name}": (n,) for n, name in enumerate(names)}, 3)


ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def linear1(layer: int) -> Module:
    here = f"single_transformer_blocks.{layer}"
    parts = {f"{here}.attn.to_q": (0,), f"{here}.attn.to_k": (1,), f"{here}.attn.to_v": (2,)}
    return Module(f"single_blocks.{layer}.linear1", {**parts, f"{here}.proj_mlp": (3, 4, 5, 6)}, 7)


def swapped(there: str, here: str) -> Module:
    return Module(there, {here: (1, 0)}, 2)


#: Per model, from its own repository and diffusers' conversion script.
MODELS: dict[str, tuple[Module, ...]] = {
    "cogvideox": tuple(
        one(f"transformer_blocks.{n}.{m}", f"transformer_blocks.{n}.{m}")
        for n in (0, 11)
        for m in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    ),
    "flux": (
        three("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn"),
        three("double_blocks.18.txt_attn.qkv", "transformer_blocks.18.attn", ADDED),
        one("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"),
        one("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out"),
        one("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj", 32),
        one("double_blocks.0.txt_mlp.2", "transformer_blocks.0.ff_context.net.2"),
        one("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear", 48),
        linear1(37),
        one("single_blocks.37.linear2", "single_transformer_blocks.37.proj_out"),
        one("single_blocks.37.modulation.lin", "single_transformer_blocks.37.norm.linear", 24),
        swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
        one("img_in", "x_embedder"),
    ),
    "hunyuan-video": (
        three("double_blocks.0.img_attn_qkv", "transformer_blocks.0.attn"),
        three("double_blocks.19.txt_attn_qkv", "transformer_blocks.19.attn", ADDED),
        one("double_blocks.0.img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
        one("double_blocks.0.img_mlp.fc1", "transformer_blocks.0.ff.net.0.proj", 32),
        one("double_blocks.0.txt_mlp.fc2", "transformer_blocks.0.ff_context.net.2"),
        one("double_blocks.0.txt_mod.linear", "transformer_blocks.0.norm1_context.linear", 48),
        linear1(39),
        one("single_blocks.39.linear2", "single_transformer_blocks.39.proj_out"),
        three(
            "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
            "context_embedder.token_refiner.refiner_blocks.1.attn",
        ),
    ),
    "ltx-video": (
        one("transformer_blocks.27.attn1.to_q", "transformer_blocks.27.attn1.to_q"),
        one("transformer_blocks.27.attn2.to_out.0", "transformer_blocks.27.attn2.to_out.0"),
        one("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.0.proj", 32),
        one("patchify_proj", "proj_in"),
        one("adaln_single.linear", "time_embed.linear", 48),
    ),
    "mochi": (
        three("blocks.0.attn.qkv_x", "transformer_blocks.0.attn1"),
        three("blocks.0.attn.qkv_y", "transformer_blocks.0.attn1", ADDED),
        one("blocks.47.attn.proj_x", "transformer_blocks.47.attn1.to_out.0"),
        swapped("blocks.0.mlp_x.w1", "transformer_blocks.0.ff.net.0.proj"),
        one("blocks.0.mlp_x.w2", "transformer_blocks.0.ff.net.2"),
        one("blocks.0.mod_y", "transformer_blocks.0.norm1_context.linear", 16),
        one("blocks.47.mod_y", "transformer_blocks.47.norm1_context.linear_1", 4),
    ),
    "qwen-image": (
        one("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        one("transformer_blocks.59.attn.add_v_proj", "transformer_blocks.59.attn.add_v_proj"),
        one("transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.img_mlp.net.0.proj", 32),
        one("transformer_blocks.0.txt_mod.1", "transformer_blocks.0.txt_mod.1", 48),
        one("img_in", "img_in"),
    ),
    "sd3": (
        three("joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.attn"),
        three("joint_blocks.0.context_block.attn.qkv", "transformer_blocks.0.attn", ADDED),
        one("joint_blocks.0.x_block.attn.proj", "transformer_blocks.0.attn.to_out.0"),
        one("joint_blocks.0.context_block.mlp.fc1", "transformer_blocks.0.ff_context.net.0.proj", 32),
        one("joint_blocks.0.context_block.adaLN_modulation.1", "transformer_blocks.0.norm1_context.linear", 48),
        swapped("joint_blocks.23.context_block.adaLN_modulation.1", "transformer_blocks.23.norm1_context.linear"),
    ),
    "wan": (
        one("blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
        one("blocks.39.self_attn.o", "blocks.39.attn1.to_out.0"),
        one("blocks.0.cross_attn.k", "blocks.0.attn2.to_k"),
        one("blocks.0.cross_attn.v_img", "blocks.0.attn2.add_v_proj"),
        one("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj", 32),
        one("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ),
}


@dataclass(frozen=True)
class Format:
    """How a dialect's file is written. ``alpha`` says where it stands: tensor, header, settings, or nowhere."""

    file: str
    prefix: str
    down: str
    up: str
    original: bool = False
    flat: bool = False
    alpha: str = ""
    header: Callable[[list[str]], dict[str, str]] = lambda modules: {}
    settings: Mapping[str, object] = field(default_factory=dict)


def _peft_header(modules: list[str]) -> dict[str, str]:
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


def _lora_config(modules: list[str]) -> dict[str, str]:
    return {"lora_config": json.dumps({"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True})}


_AB, _DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
_IN_MEMORY = (".lora_A.default.weight", ".lora_B.default.weight")
_PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["to_q"]}
_FILE = "pytorch_lora_weights.safetensors"

FORMATS: dict[str, Format] = {
    "ai-toolkit": Format(
        _FILE, "transformer.", *_AB, header=lambda _: {"software": json.dumps({"name": "ai-toolkit", "version": "1"})}
    ),
    "comfyui": Format("comfyui_lora.safetensors", "diffusion_model.", *_AB, original=True, alpha="tensor"),
    "diffsynth": Format("diffsynth_lora.safetensors", "", *_IN_MEMORY, original=True),
    "diffusers": Format(_FILE, "transformer.", *_AB, alpha="header", header=_peft_header),
    "diffusers-old": Format(_FILE, "transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "diffusion-pipe": Format(
        "adapter_model.safetensors",
        "diffusion_model.",
        *_AB,
        original=True,
        settings={**_PEFT, "lora_alpha": RANK},
    ),
    "finetrainers": Format(_FILE, "transformer.", *_AB, alpha="header", header=_lora_config),
    "kohya": Format("kohya_lora.safetensors", "lora_unet_", *_DOWN_UP, original=True, flat=True, alpha="tensor"),
    "onetrainer": Format("onetrainer_lora.safetensors", "lora_transformer_", *_DOWN_UP, flat=True, alpha="tensor"),
    "peft": Format("adapter_model.safetensors", "base_model.model.", *_AB, alpha="settings", settings=_PEFT),
    "simpletuner": Format(_FILE, "transformer.base_model.model.", *_AB),
    "videox-fun": Format("videox_fun_lora.safetensors", "lora_unet__", *_DOWN_UP, flat=True, alpha="tensor"),
}
READ_ONLY = {"ai-toolkit", "diffusers-old", "diffusion-pipe", "finetrainers", "simpletuner"}


def written_modules(model: str, form: Format) -> list[Module]:
    """The modules as this format has them: the repository's own, or one for each of diffusers'."""
    modules = MODELS[model]
    if form.original:
        return list(modules)
    return [one(here, here, m.rows * len(own)) for m in modules for here, own in m.parts.items()]


def key(form: Format, module: str, end: str) -> str:
    return form.prefix + (module.replace(".", "_") if form.flat else module) + end


def write(form: Format, model: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Write a random adapter and return its deltas by diffusers module, in float64."""
    noise = torch.Generator().manual_seed(sum(map(ord, model)))
    tensors: Tensors = {}
    for module in written_modules(model, form):
        tensors[key(form, module.there, form.down)] = torch.randn(RANK, HIDDEN, generator=noise).to(dtype)
        tensors[key(form, module.there, form.up)] = torch.randn(module.height, RANK, generator=noise).to(dtype)
        if form.alpha == "tensor":
            tensors[key(form, module.there, ".alpha")] = torch.tensor(ALPHA, dtype=dtype)
    folder.mkdir(parents=True)
    modules = [m.there for m in written_modules(model, form)]
    save_file(tensors, folder / form.file, {"format": "pt", **form.header(modules)})
    if form.settings:
        (folder / "adapter_config.json").write_text(json.dumps(form.settings))
    return deltas(form, model, folder)


def deltas(form: Format, model: str, folder: Path) -> dict[str, torch.Tensor]:
    """What a file of this format adds to every diffusers module, in float64."""
    tensors = load_file(folder / form.file)
    made: dict[str, torch.Tensor] = {}
    for module in written_modules(model, form):
        down, up = tensors.pop(key(form, module.there, form.down)), tensors.pop(key(form, module.there, form.up))
        scale = 1.0
        if form.alpha == "tensor":
            scale = tensors.pop(key(form, module.there, ".alpha")).item() / down.shape[0]
        elif form.alpha:
            scale = _peft_alpha(form, folder, module.there, down.shape[0]) / down.shape[0]
        rows = (scale * (up.double() @ down.double())).chunk(module.chunks)
        made |= {here: torch.cat([rows[n] for n in own]) for here, own in module.parts.items()}
    assert not tensors, sorted(tensors)
    return made


def _peft_alpha(form: Format, folder: Path, module: str, rank: int) -> float:
    if form.alpha == "settings":
        config = json.loads((folder / "adapter_config.json").read_text())
    else:
        with safe_open(folder / form.file, "pt") as opened:
            header = opened.metadata()
        text = header.get("lora_adapter_metadata") or header.get("lora_config")
        config = {k.removeprefix("transformer."): v for k, v in json.loads(text).items()}
    assert config.get("rank_pattern", {}).get(module, config["r"]) == rank
    return float(config.get("alpha_pattern", {}).get(module, config["lora_alpha"]))

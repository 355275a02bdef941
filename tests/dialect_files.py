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


_SDXL_BLOCKS = (
    ("input_blocks.5.1", "down_blocks.1.attentions.1"),
    ("input_blocks.7.1", "down_blocks.2.attentions.0"),
    ("middle_block.1", "mid_block.attentions.0"),
    ("output_blocks.2.1", "up_blocks.0.attentions.2"),
    ("output_blocks.3.1", "up_blocks.1.attentions.0"),
)
_SDXL_MODULES = ("proj_in", "transformer_blocks.1.attn2.to_k", "transformer_blocks.0.ff.net.2")

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
    "z-image": (
        three("layers.29.attention.qkv", "layers.29.attention"),
        three("noise_refiner.1.attention.qkv", "noise_refiner.1.attention"),
        one("context_refiner.0.attention.out", "context_refiner.0.attention.to_out.0"),
        one("layers.0.feed_forward.w1", "layers.0.feed_forward.w1", 24),
        one("layers.0.adaLN_modulation.0", "layers.0.adaLN_modulation.0", 32),
        one("x_embedder", "all_x_embedder.2-1"),
        one("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
    "sdxl": (
        *(one(f"unet.{there}.{m}", f"unet.{here}.{m}") for there, here in _SDXL_BLOCKS for m in _SDXL_MODULES),
        one("unet.input_blocks.4.0.emb_layers.1", "unet.down_blocks.1.resnets.0.time_emb_proj", 16),
        one("unet.middle_block.2.emb_layers.1", "unet.mid_block.resnets.1.time_emb_proj", 16),
        one("unet.output_blocks.8.0.emb_layers.1", "unet.up_blocks.2.resnets.2.time_emb_proj", 16),
        one("unet.time_embed.2", "unet.time_embedding.linear_2"),
        one("unet.label_emb.0.0", "unet.add_embedding.linear_1"),
        *(
            one(f"{encoder}.text_model.encoder.layers.{n}.{m}", f"{encoder}.text_model.encoder.layers.{n}.{m}")
            for encoder, n in (("text_encoder", 11), ("text_encoder_2", 31))
            for m in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
        ),
        one("text_encoder_2.text_projection", "text_encoder_2.text_projection"),
    ),
}


@dataclass(frozen=True)
class Format:
    """How a dialect's file is written. ``alpha`` says where it stands: tensor, header, settings, or nowhere.
    ``components`` is what stands before the names of a pipeline's UNet and text encoders, if the dialect has them;
    ``models`` are those that it is for, none for any; ``own_names`` those whose modules it names as their repository
    does, where it has diffusers' names for others."""

    file: str
    prefix: str
    down: str
    up: str
    original: bool = False
    flat: bool = False
    alpha: str = ""
    header: Callable[[list[str]], dict[str, str]] = lambda modules: {}
    settings: Mapping[str, object] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    own_names: tuple[str, ...] = ()


PIPELINE = ("unet", "text_encoder", "text_encoder_2")


def component_of(module: str) -> tuple[str, str]:
    """The component of a module and its name there; a transformer's modules have no component before them."""
    component, _, name = module.partition(".")
    return (component, name) if component in PIPELINE else ("transformer", module)


def _peft_header(modules: list[str]) -> dict[str, str]:
    header: dict[str, object] = {}
    for component in {component_of(m)[0]: None for m in modules}:
        own = [name for part, name in map(component_of, modules) if part == component]
        config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": own}
        header |= {f"{component}.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(header)}


def _lora_config(modules: list[str]) -> dict[str, str]:
    return {"lora_config": json.dumps({"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True})}


_AB, _DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
_IN_MEMORY = (".lora_A.default.weight", ".lora_B.default.weight")
_PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["to_q"]}
_FILE = "pytorch_lora_weights.safetensors"
_DOTTED = {component: f"{component}." for component in PIPELINE}
_COMFYUI = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_DOUBLED = {component: f"{component}.base_model.model." for component in PIPELINE}

FORMATS: dict[str, Format] = {
    "ai-toolkit": Format(
        _FILE, "transformer.", *_AB, header=lambda _: {"software": json.dumps({"name": "ai-toolkit", "version": "1"})}
    ),
    "comfyui": Format(
        "comfyui_lora.safetensors", "diffusion_model.", *_AB, original=True, alpha="tensor", components=_COMFYUI
    ),
    "diffsynth": Format("diffsynth_lora.safetensors", "", *_IN_MEMORY, original=True),
    "diffusers": Format(_FILE, "transformer.", *_AB, alpha="header", header=_peft_header, components=_DOTTED),
    "diffusers-old": Format(
        _FILE,
        "transformer.",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        components=_DOTTED,
    ),
    "diffusion-pipe": Format(
        "adapter_model.safetensors",
        "diffusion_model.",
        *_AB,
        original=True,
        settings={**_PEFT, "lora_alpha": RANK},
    ),
    "finetrainers": Format(_FILE, "transformer.", *_AB, alpha="header", header=_lora_config),
    "genmo": Format("genmo_lora.safetensors", "", ".lora_A", ".lora_B", original=True, models=("mochi",)),
    "kohya": Format(
        "kohya_lora.safetensors",
        "lora_unet_",
        *_DOWN_UP,
        original=True,
        flat=True,
        alpha="tensor",
        components=_KOHYA,
    ),
    "lycoris": Format("lycoris.safetensors", "lycoris_", *_DOWN_UP, flat=True, alpha="tensor"),
    "onetrainer": Format("onetrainer_lora.safetensors", "lora_transformer_", *_DOWN_UP, flat=True, alpha="tensor"),
    "peft": Format("adapter_model.safetensors", "base_model.model.", *_AB, alpha="settings", settings=_PEFT),
    "simpletuner": Format(_FILE, "transformer.base_model.model.", *_AB, components=_DOUBLED),
    "tencent": Format(
        "tencent_lora.safetensors",
        "Hunyuan_video_I2V_lora_",
        *_DOWN_UP,
        original=True,
        flat=True,
        alpha="tensor",
        models=("hunyuan-video",),
    ),
    "videox-fun": Format(
        "videox_fun_lora.safetensors", "lora_unet__", *_DOWN_UP, flat=True, alpha="tensor", own_names=("wan",)
    ),
}
READ_ONLY = {"ai-toolkit", "diffusers-old", "diffusion-pipe", "finetrainers", "genmo", "simpletuner", "tencent"}


def written_modules(model: str, form: Format) -> list[Module]:
    """The modules as this format has them: the repository's own, or one for each of diffusers'."""
    modules = MODELS[model]
    if form.original or model in form.own_names:
        return list(modules)
    return [one(here, here, m.rows * len(own)) for m in modules for here, own in m.parts.items()]


def key(form: Format, module: str, end: str) -> str:
    component, name = component_of(module)
    prefix = form.components.get(component, form.prefix)
    return prefix + (name.replace(".", "_") if form.flat else name) + end


def has(form: Format, model: str) -> bool:
    """True if the format has names for all of the model's modules."""
    if form.models:
        return model in form.models
    return model != "sdxl" or bool(form.components)


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
        component, module = component_of(module)
        module = module.removeprefix("text_model.")
        config = {k.removeprefix(f"{component}."): v for k, v in json.loads(text).items()}
    assert config.get("rank_pattern", {}).get(module, config["r"]) == rank
    return float(config.get("alpha_pattern", {}).get(module, config["lora_alpha"]))

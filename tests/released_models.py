"""The released models, built on the meta device by the class that loads them: what modules they really have.

The configurations are those of the published ``config.json`` files; a value that is the class's default is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

LINEAR = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding)

_COGVIDEOX_5B = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_COGVIDEOX_15 = {**_COGVIDEOX_5B, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81}
_WAN_14B: dict[str, Any] = {}
_SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_CLIP_L = {"projection_dim": 768, "hidden_act": "quick_gelu"}
_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

#: family -> released model -> configuration of the family's class.
RELEASED: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "cogvideox": {
        "CogVideoX-2B": {},
        "CogVideoX-5B": _COGVIDEOX_5B,
        "CogVideoX-5B-I2V": {**_COGVIDEOX_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
        "CogVideoX1.5-5B": _COGVIDEOX_15,
        "CogVideoX1.5-5B-I2V": {**_COGVIDEOX_15, "in_channels": 32, "ofs_embed_dim": 512},
    },
    "flux": {
        "FLUX.1-dev": {"guidance_embeds": True},
        "FLUX.1-schnell": {},
        "FLUX.1-Fill-dev": {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
    },
    "hunyuan-video": {
        "HunyuanVideo": {},
        "HunyuanVideo-I2V": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        "HunyuanVideo-I2V, token replace": {"image_condition_type": "token_replace"},
    },
    "llama": {
        "Llama-2-7b": {},
        "Llama-3.1-8B": {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    },
    "llava": {"llava-1.5-7b": {}},
    "ltx-video": {
        "LTX-Video 0.9": {},
        "LTX-Video 0.9.7 13B": {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
    },
    "mochi": {"mochi-1-preview": {}},
    "qwen-image": {"Qwen-Image": {}},
    "sd3": {
        "SD3-medium": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        "SD3.5-medium": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "SD3.5-large": {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    },
    "sdxl": {"SDXL 1.0": _SDXL},
    "wan": {
        "Wan2.1-T2V-1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "Wan2.1-T2V-14B, Wan2.2-T2V-A14B": {},
        "Wan2.1-I2V-14B": {"in_channels": 36, "added_kv_proj_dim": 5120, "image_dim": 1280},
        "Wan2.2-I2V-A14B": {"in_channels": 36},
        "Wan2.2-TI2V-5B": {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
    },
    "z-image": {"Z-Image, Z-Image-Turbo": {}},
}

ALL = [(family, model) for family, models in RELEASED.items() for model in models]
SD3_DEFAULTS = {"sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "out_channels": 16}


def _transformer(family: str, config: Mapping[str, Any]) -> Any:
    import diffusers

    from loraconv.registry import families

    name = next(f.model_class for f in families() if f.name == family)
    return getattr(diffusers, name)(**config)


def _language_model(family: str, config: Mapping[str, Any]) -> Any:
    import transformers

    if family == "llava":
        return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def _sdxl(config: Mapping[str, Any]) -> dict[str, Any]:
    """The components; transformers 5 builds the first text encoder without the ``text_model`` that its files have."""
    import transformers

    first = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_CLIP_L))
    second = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**_CLIP_BIG_G))
    step = "" if hasattr(first, "text_model") else ".text_model"
    return {"unet": _transformer("sdxl", config), f"text_encoder{step}": first, "text_encoder_2": second}


@cache
def components(family: str, model: str) -> Mapping[str, Any]:
    """The model on the meta device: prefix -> module; one without prefix unless names carry their component."""
    config = RELEASED[family][model]
    with torch.device("meta"):
        if family == "sdxl":
            return _sdxl(config)
        if family in ("llama", "llava"):
            return {"": _language_model(family, config)}
        return {"": _transformer(family, {**SD3_DEFAULTS, **config} if family == "sd3" else config)}


def _named(family: str, model: str) -> dict[str, torch.nn.Module]:
    return {
        f"{prefix}.{name}".strip("."): module
        for prefix, part in components(family, model).items()
        for name, module in part.named_modules()
        if name
    }


@cache
def adaptable(family: str, model: str) -> Mapping[str, tuple[int, int]]:
    """Name -> rows and columns of every module that an adapter can be put on: linear, convolution, embedding."""
    found = {n: m for n, m in _named(family, model).items() if isinstance(m, LINEAR)}
    return {name: (module.weight.shape[0], module.weight.shape[1]) for name, module in found.items()}


@cache
def convolutions(family: str, model: str) -> frozenset[str]:
    """The names of those modules that have a kernel."""
    return frozenset(n for n, m in _named(family, model).items() if isinstance(m, torch.nn.modules.conv._ConvNd))


@cache
def norms(family: str, model: str) -> Mapping[str, tuple[int, int]]:
    """Name -> its numbers, and 1, of every norm layer that has a weight: no other module's weight is a vector."""
    found = {n: getattr(m, "weight", None) for n, m in _named(family, model).items() if not isinstance(m, LINEAR)}
    return {n: (len(w), 1) for n, w in found.items() if isinstance(w, torch.nn.Parameter) and w.ndim == 1}


@cache
def others(family: str, model: str) -> frozenset[str]:
    """The names of all other modules: norms, activations, and what holds modules."""
    return frozenset(n for n, m in _named(family, model).items() if not isinstance(m, LINEAR))

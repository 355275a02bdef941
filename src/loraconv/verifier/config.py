"""What ``config.json`` of a converted CogVideoX base must say, value by value.

Stated from SAT's ``dit_video_concat.py`` and its YAML files, and from diffusers' ``CogVideoXTransformer3DModel``. What
the tensors tell is taken from them; sizes that they do not show from the run's settings; else from the released models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraconv.lazy import TensorRef
from loraconv.names import numel, printable
from loraconv.verifier.proof import Check

DIT = "model.diffusion_model."
POSITIONS = DIT + "mixins.pos_embed.pos_embedding"
#: Either of them is there if and only if the model rotates queries and keys by position.
_ROTARY = (DIT + "transformer.position_embeddings.weight", DIT + "mixins.pos_embed.freqs_sin")
#: What SAT has in code and not in its settings, the same for every CogVideoX.
_CONSTANTS = {
    "_class_name": "CogVideoXTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "temporal_interpolation_scale": 1.0,
    "timestep_activation_fn": "silu",
}
#: Width, height and frames of the released models: 1.0, and 1.5, whose patches are two frames deep.
_RELEASED = {1: (90, 60, 49), 2: (300, 300, 81)}

Tensors = Mapping[str, TensorRef]
Settings = Mapping[str, Any] | None


def is_rotary(tensors: Tensors) -> bool:
    """True if the checkpoint belongs to a model with rotary positions."""
    return any(name in tensors for name in _ROTARY)


def expected_config(tensors: Tensors, settings: Settings) -> dict[str, Any]:
    """Every entry of the configuration; ``settings`` is the run's training YAML, or None."""
    patch, out = _told(settings, "patch_size", 2), _told(settings, "out_channels", 16)
    patch = patch[-1] if isinstance(patch, list) else patch
    depth = _size(tensors, "mixins.final_layer.linear.weight") // (out * patch * patch)
    width, height, frames = _RELEASED[depth]
    places = "modules.pos_embed_config.params."
    rotary = is_rotary(tensors)
    return {
        **_CONSTANTS,
        **_from_tensors(tensors, patch, depth),
        "out_channels": out,
        "patch_size": patch,
        "patch_size_t": None if depth == 1 else depth,
        "patch_bias": depth == 1,
        "sample_width": _told(settings, "latent_width", width),
        "sample_height": _told(settings, "latent_height", height),
        "sample_frames": _told(settings, "num_frames", frames),
        "temporal_compression_ratio": _told(settings, "time_compressed_rate", 4),
        "max_text_seq_length": _told(settings, places + "text_length", 226),
        "norm_elementwise_affine": _told(settings, "elementwise_affine", True),
        "spatial_interpolation_scale": _told(settings, places + "height_interpolation", 1.875),
        "use_rotary_positional_embeddings": rotary,
        "use_learned_positional_embeddings": rotary and POSITIONS in tensors,
    }


def _from_tensors(tensors: Tensors, patch: int, depth: int) -> dict[str, Any]:
    width = _size(tensors, "transformer.final_layernorm.weight")
    head = _size(tensors, "mixins.adaln_layer.query_layernorm_list.0.weight")
    norms = [n for n in tensors if n.startswith(DIT + "transformer.layers.") and n.endswith(".input_layernorm.weight")]
    ofs = DIT + "ofs_embed.0.weight"
    volume = numel(tensors[DIT + "mixins.patch_embed.proj.weight"].shape)
    return {
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "in_channels": volume // (width * patch * patch * depth),
        "num_layers": len(norms),
        "text_embed_dim": _size(tensors, "mixins.patch_embed.text_proj.weight", 1),
        "time_embed_dim": _size(tensors, "time_embed.0.weight"),
        "ofs_embed_dim": tensors[ofs].shape[0] if ofs in tensors else None,
    }


def _size(tensors: Tensors, name: str, dim: int = 0) -> int:
    return tensors[DIT + name].shape[dim]


def _told(settings: Settings, path: str, default: Any) -> Any:
    here: Any = settings
    for step in ("model", "network_config", "params", *path.split(".")):
        here = here.get(step) if isinstance(here, Mapping) else None
    return default if here is None else here


def check_config(expected: Mapping[str, Any], written: Mapping[str, Any]) -> Check:
    """Every entry is there, with this value and this type, and no other entry is."""
    absent = object()
    wrong = []
    for key in sorted({*expected, *written} - {"_diffusers_version"}):
        one, other = expected.get(key, absent), written.get(key, absent)
        if type(one) is not type(other) or one != other:
            told = "is missing" if other is absent else f"= {other!r}"
            wrong.append(f"{key} {told}" + ("" if one is absent else f" instead of {one!r}"))
    detail = printable("; ".join(wrong[:4]), 400)
    return Check("L0", "every value of config.json", not wrong, len(expected), detail=detail)

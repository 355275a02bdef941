"""Inputs that fit a CogVideoX transformer's configuration, and how far apart roundings alone can put two outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: What a user may compute in -> torch's name, and the greatest relative error of one rounding to it.
COMPUTE = {"fp32": ("float32", 2.0**-24), "fp16": ("float16", 2.0**-11), "bf16": ("bfloat16", 2.0**-8)}
#: Products of 16-bit numbers are added up in single precision, too.
_SUM = 2.0**-24
#: Standard deviations that are allowed: of normal errors, one in 500 million is outside.
_DEVIATIONS = 6.0
_SEED = 0


def make_inputs(config: Any, dtype: str) -> dict[str, Any]:
    """Seeded inputs for one sample: the smallest that the configuration of a CogVideoX transformer allows and that
    still has neighbours in time, height and width. A model with learned positions takes its own height and width."""
    import torch
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch, depth = config.patch_size, config.patch_size_t or 1
    height, width = 2 * patch, 3 * patch
    if config.use_learned_positional_embeddings:
        height, width = config.sample_height, config.sample_width
    noise = torch.Generator().manual_seed(_SEED)
    to = getattr(torch, dtype)
    made: dict[str, Any] = {
        "hidden_states": torch.randn((1, 2 * depth, config.in_channels, height, width), generator=noise).to(to),
        "encoder_hidden_states": torch.randn(
            (1, config.max_text_seq_length, config.text_embed_dim), generator=noise
        ).to(to),
        "timestep": torch.tensor([500]),
    }
    if config.use_rotary_positional_embeddings:
        grid = height // patch, width // patch
        made["image_rotary_emb"] = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid, 2)
    if config.ofs_embed_dim is not None:
        made["ofs"] = torch.tensor([2.0]).to(to)
    return made


def rounding_bound(config: Any, inputs: Mapping[str, Any], unit: float) -> float:
    """How far apart, relative, the outputs of two ways may be that are the same in theory: six standard deviations of
    what their roundings add up to, from the configuration and the dtypes alone.

    A rounding is an error of variance ``u**2 / 3`` at most (uniform in ``+-u``). The way through one block leads
    through sums of 9 widths (q, k or v; the output projection; 1 + 4 of the feed-forward; two layer norms), of one
    head's size (scores) and of as many terms as there are tokens (attention), each term rounded in single precision;
    and through 18 results stored in the dtype that is computed in, the fused weights among them. The errors of all
    blocks are taken to add up in the residual stream as independent ones do, and both ways have them. That the layers
    magnify no error beyond its share is assumed and not proved.
    """
    _, frames, _, rows, columns = inputs["hidden_states"].shape
    patch, depth = config.patch_size, config.patch_size_t or 1
    tokens = config.max_text_seq_length + frames // depth * (rows // patch) * (columns // patch)
    width, head = config.num_attention_heads * config.attention_head_dim, config.attention_head_dim
    volume = config.in_channels * patch * patch * depth
    terms = config.num_layers * (9 * width + head + tokens) + 4 * width + max(config.text_embed_dim, volume)
    results = config.num_layers * 18 + 8
    return _DEVIATIONS * math.sqrt(2 / 3 * (terms * _SUM**2 + results * unit**2))


def distance(one: Any, other: Any) -> float:
    """The relative L2 distance, of ``other``'s size; infinite where a number is none."""
    found = float((one - other).norm() / other.norm())
    return found if math.isfinite(found) else math.inf


def described(inputs: Mapping[str, Any], dtype: str) -> str:
    shape = "x".join(str(size) for size in inputs["hidden_states"].shape)
    text = inputs["encoder_hidden_states"].shape[1]
    return f"latents {shape}, {text} text tokens, timestep 500, seed {_SEED}, computed in {dtype}"

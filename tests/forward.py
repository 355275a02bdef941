"""Runs the diffusers transformer on the inputs recorded with a real SAT model."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

Tables = tuple[torch.Tensor, torch.Tensor]

# SAT's final norm uses this value and no field of the diffusers configuration reaches it.
FINAL_NORM_EPS = 1e-6
SPATIAL_SCALE = 8


def make_transformer(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None = None
) -> CogVideoXTransformer3DModel:
    """The diffusers model in fp32 with the given weights, comparable with SAT."""
    transformer = CogVideoXTransformer3DModel.from_config(dict(config)).eval()
    transformer.norm_out.norm.eps = FINAL_NORM_EPS
    if state is not None:
        transformer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return transformer


def add_adapter(
    transformer: CogVideoXTransformer3DModel, adapter: Mapping[str, torch.Tensor], scale: float, name: str = "lora"
) -> None:
    """Load an adapter whose names carry the `transformer.` prefix, and give it its scale."""
    tensors = {key: tensor.float() for key, tensor in adapter.items()}
    transformer.load_lora_adapter(tensors, prefix="transformer", adapter_name=name)
    transformer.set_adapters([name], [scale])


def rotary_tables(transformer: CogVideoXTransformer3DModel, latents: torch.Tensor) -> Tables | None:
    """Cosine and sine tables from the pipeline's own method, for latents laid out as (batch, time, channel, h, w)."""
    if not transformer.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=SPATIAL_SCALE)
    height, width = (side * SPATIAL_SCALE for side in latents.shape[-2:])
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    tables: Tables = prepare(pipeline, height, width, latents.shape[1], latents.device)
    return tables


@torch.no_grad()
def forward(
    transformer: CogVideoXTransformer3DModel,
    reference: Mapping[str, torch.Tensor],
    *,
    rotary: Tables | None = None,
) -> torch.Tensor:
    """One pass over the recorded inputs; `rotary` (cosine, sine) takes the place of the prepared tables."""
    latents = reference["x"]
    tables = rotary or rotary_tables(transformer, latents)
    if "concat_images" in reference:
        latents = torch.cat([latents, reference["concat_images"]], dim=2)
    output: torch.Tensor = transformer(
        hidden_states=latents,
        encoder_hidden_states=reference["context"],
        timestep=reference["timesteps"],
        ofs=reference.get("ofs"),
        image_rotary_emb=tables,
        return_dict=False,
    )[0]
    return output


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance of `got` from `want`, as a share of the size of `want`, summed in double precision."""
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm())

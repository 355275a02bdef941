"""Small random CogVideoX transformers: every variant's own architecture, narrow and shallow enough for a CPU.

Only sizes differ from the released models (``config.json`` of THUDM/CogVideoX-2b, -5b, -5b-I2V, CogVideoX1.5-5B and
CogVideoX1.5-5B-I2V); positions, patches, conditioning and scheduler are theirs.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "max_text_seq_length": 16,
    "sample_height": 8,
    "sample_width": 12,
    "sample_frames": 9,
}
_ROTARY = {"use_rotary_positional_embeddings": True}
_NEWER = {**_ROTARY, "patch_size_t": 2, "patch_bias": False, "sample_frames": 13}

#: Variant -> what ``CogVideoXTransformer3DModel`` is made of.
CONFIGS: dict[str, dict[str, Any]] = {
    "2b":      _COMMON,
    "5b":      {**_COMMON, **_ROTARY},
    "5b-i2v":  {**_COMMON, **_ROTARY, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5":     {**_COMMON, **_NEWER},
    "1.5-i2v": {**_COMMON, **_NEWER, "in_channels": 32, "ofs_embed_dim": 32},
}  # fmt: skip


def scheduler_config(rotary: bool) -> dict[str, Any]:
    """The scheduler of the released models: v-prediction, zero terminal SNR, which the 2B alone (no rotary positions)
    shifts by 3 (``scheduler_config.json`` of the released pipelines)."""
    return {
        "_class_name": "CogVideoXDDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": 1.0 if rotary else 3.0,
        "timestep_spacing": "trailing",
    }

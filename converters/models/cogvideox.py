"""CogVideoX 1.0 (2B, 5B, 5B-I2V) and 1.5 (5B, 5B-I2V): SAT's module names against those of diffusers.

Facts: zai-org/CogVideo ``sat/dit_video_concat.py`` (two generations of it), checkpoints written by it
(``fixtures/sat``), and huggingface/diffusers ``models/transformers/cogvideox_transformer_3d.py``.
"""

from loraconv.rules import (
    By,
    Dropped,
    Family,
    Fused,
    Has,
    Kernel,
    Layers,
    Positions,
    Regrouped,
    Release,
    Rename,
    Setting,
    Size,
    Spelling,
)

SAT = Spelling(
    rules=(
        Fused(
            "transformer.layers.{i}.attention.query_key_value",
            (
                "transformer_blocks.{i}.attn1.to_q",
                "transformer_blocks.{i}.attn1.to_k",
                "transformer_blocks.{i}.attn1.to_v",
            ),
            parallel="rows",
        ),
        Rename("transformer.layers.{i}.attention.dense", "transformer_blocks.{i}.attn1.to_out.0", parallel="columns"),
        Rename("transformer.layers.{i}.mlp.dense_h_to_4h", "transformer_blocks.{i}.ff.net.0.proj", parallel="rows"),
        Rename("transformer.layers.{i}.mlp.dense_4h_to_h", "transformer_blocks.{i}.ff.net.2", parallel="columns"),
        Rename("transformer.layers.{i}.input_layernorm", "transformer_blocks.{i}.norm1.norm"),
        Rename("transformer.layers.{i}.post_attention_layernorm", "transformer_blocks.{i}.norm2.norm"),
        Regrouped(
            "mixins.adaln_layer.adaLN_modulations.{i}.1",
            {
                "transformer_blocks.{i}.norm1.linear": (0, 1, 2, 6, 7, 8),
                "transformer_blocks.{i}.norm2.linear": (3, 4, 5, 9, 10, 11),
            },
        ),
        Rename("mixins.adaln_layer.query_layernorm_list.{i}", "transformer_blocks.{i}.attn1.norm_q"),
        Rename("mixins.adaln_layer.key_layernorm_list.{i}", "transformer_blocks.{i}.attn1.norm_k"),
        Rename("transformer.final_layernorm", "norm_final"),
        Rename("mixins.final_layer.norm_final", "norm_out.norm"),
        Rename("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
        Rename("mixins.final_layer.linear", "proj_out"),
        Rename("time_embed.0", "time_embedding.linear_1"),
        Rename("time_embed.2", "time_embedding.linear_2"),
        Rename("ofs_embed.0", "ofs_embedding.linear_1", when="ofs_embed_dim"),
        Rename("ofs_embed.2", "ofs_embedding.linear_2", when="ofs_embed_dim"),
        Kernel("mixins.patch_embed.proj", "patch_embed.proj", size="patch_size", flat_if="patch_size_t"),
        Rename("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
        Rename(
            "mixins.pos_embed",
            "patch_embed",
            when="use_learned_positional_embeddings",
            params=("pos_embedding",),
        ),
    ),
    dropped=(
        Dropped("mixins.pos_embed.freqs_sin", "rotary table: diffusers computes it"),
        Dropped("mixins.pos_embed.freqs_cos", "rotary table: diffusers computes it"),
        Dropped("transformer.position_embeddings.weight", "never used by CogVideoX"),
    ),
    adapts=("transformer.layers.{i}.attention.query_key_value", "transformer.layers.{i}.attention.dense"),
)

MODULES = (
    "patch_embed.proj",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "ofs_embedding.linear_1",
    "ofs_embedding.linear_2",
    "transformer_blocks.{i}.norm1.linear",
    "transformer_blocks.{i}.attn1.to_q",
    "transformer_blocks.{i}.attn1.to_k",
    "transformer_blocks.{i}.attn1.to_v",
    "transformer_blocks.{i}.attn1.to_out.0",
    "transformer_blocks.{i}.norm2.linear",
    "transformer_blocks.{i}.ff.net.0.proj",
    "transformer_blocks.{i}.ff.net.2",
    "norm_out.linear",
    "proj_out",
)

NORMS = (
    "transformer_blocks.{i}.norm1.norm",
    "transformer_blocks.{i}.attn1.norm_q",
    "transformer_blocks.{i}.attn1.norm_k",
    "transformer_blocks.{i}.norm2.norm",
    "norm_final",
    "norm_out.norm",
)

_NETWORK = "model.network_config.params"

_HEAD_DIM = "mixins.adaln_layer.query_layernorm_list.0.weight"
_PATCH = "mixins.patch_embed.proj.weight"
_POSITIONS = "mixins.pos_embed.pos_embedding"
_ROTARY = ("transformer.position_embeddings.weight", "mixins.pos_embed.freqs_sin")

# In the order of diffusers' own config.json. norm_eps and the constants without a sidecar path are those of every
# released CogVideoX; SAT has them in code, not in its YAML.
SETTINGS = (
    Setting("attention_head_dim", 64, Size(_HEAD_DIM)),
    Setting(
        "num_attention_heads",
        None,
        Size("transformer.final_layernorm.weight", over=("attention_head_dim",)),
        f"{_NETWORK}.num_attention_heads",
    ),
    Setting("out_channels", 16, None, f"{_NETWORK}.out_channels"),
    Setting("patch_size", 2, None, f"{_NETWORK}.patch_size", last=True),
    # The width of the patch projection is ambiguous (image-to-video doubles it as well); the rows of the last layer
    # are not.
    Setting(
        "patch_size_t",
        None,
        Size(
            "mixins.final_layer.linear.weight",
            (0,),
            over=("out_channels", "patch_size", "patch_size"),
            none_if=1,
        ),
    ),
    Setting(
        "in_channels",
        None,
        Size(
            _PATCH,
            over=("num_attention_heads", "attention_head_dim", "patch_size", "patch_size", "patch_size_t"),
        ),
        f"{_NETWORK}.in_channels",
    ),
    Setting("flip_sin_to_cos", True),
    Setting("freq_shift", 0),
    Setting("time_embed_dim", None, Size("time_embed.0.weight", (0,)), f"{_NETWORK}.time_embed_dim"),
    Setting("ofs_embed_dim", None, Size("ofs_embed.0.weight", (0,))),
    Setting("text_embed_dim", None, Size("mixins.patch_embed.text_proj.weight", (1,))),
    Setting("num_layers", None, Layers("transformer.layers.{i}.input_layernorm.weight"), f"{_NETWORK}.num_layers"),
    Setting("dropout", 0.0),
    Setting("attention_bias", True),
    Setting("sample_width", By("patch_size_t", {None: 90, 2: 300}), None, f"{_NETWORK}.latent_width"),
    Setting("sample_height", By("patch_size_t", {None: 60, 2: 300}), None, f"{_NETWORK}.latent_height"),
    Setting("sample_frames", By("patch_size_t", {None: 49, 2: 81}), None, f"{_NETWORK}.num_frames"),
    Setting("temporal_compression_ratio", 4, None, f"{_NETWORK}.time_compressed_rate"),
    Setting("max_text_seq_length", 226, None, f"{_NETWORK}.modules.pos_embed_config.params.text_length"),
    Setting("activation_fn", "gelu-approximate"),
    Setting("timestep_activation_fn", "silu"),
    Setting("norm_elementwise_affine", True, None, f"{_NETWORK}.elementwise_affine", kind="flag"),
    Setting("norm_eps", 1e-05),
    Setting(
        "spatial_interpolation_scale",
        1.875,
        None,
        f"{_NETWORK}.modules.pos_embed_config.params.height_interpolation",
        kind="number",
    ),
    Setting("temporal_interpolation_scale", 1.0),
    Setting("use_rotary_positional_embeddings", None, Has(any_of=_ROTARY)),
    Setting("use_learned_positional_embeddings", None, Has(every=(_POSITIONS,), any_of=_ROTARY)),
    Setting("patch_bias", By("patch_size_t", {None: True, 2: False})),
)

COGVIDEOX = Family(
    name="cogvideox",
    title="CogVideoX",
    model_class="CogVideoXTransformer3DModel",
    component="transformer",
    modules=MODULES,
    convolutions=("patch_embed.proj",),
    norms=NORMS,
    spellings={"sat": SAT},
    settings=SETTINGS,
    positions=(
        Positions(_POSITIONS, 1, text=True),
        Positions("mixins.pos_embed.freqs_sin", 0, text=False),
    ),
    releases=(
        Release(
            "CogVideoX1.5-5B-I2V",
            {"patch_size_t": 2, "in_channels": 32},
            {"num_layers": 42, "num_attention_heads": 48},
        ),
        Release(
            "CogVideoX1.5-5B",
            {"patch_size_t": 2, "in_channels": 16},
            {"num_layers": 42, "num_attention_heads": 48},
        ),
        Release(
            "CogVideoX-5B-I2V",
            {"patch_size_t": None, "in_channels": 32},
            {"num_layers": 42, "num_attention_heads": 48},
        ),
        Release(
            "CogVideoX-5B",
            {"patch_size_t": None, "in_channels": 16, "use_rotary_positional_embeddings": True},
            {"num_layers": 42, "num_attention_heads": 48},
        ),
        Release(
            "CogVideoX-2B",
            {"patch_size_t": None, "in_channels": 16, "use_rotary_positional_embeddings": False},
            {"num_layers": 30, "num_attention_heads": 30},
        ),
    ),
)

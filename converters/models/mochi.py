"""Mochi 1: Genmo's module names against those of diffusers.

Facts: genmoai/mochi ``src/genmo/mochi_preview/dit/joint_model/asymm_models_joint.py``, huggingface/diffusers
``models/transformers/transformer_mochi.py``. The halves of the gated feed-forward and of the last modulation are in
the other order. The last block has no text output: its text modulation is another layer, with half as many rows as
columns instead of twice as many.
"""

from loraconv.rules import Blocks, Family, Fused, Modulation, Regrouped, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        Fused(
            "blocks.{i}.attn.qkv_x",
            (
                "transformer_blocks.{i}.attn1.to_q",
                "transformer_blocks.{i}.attn1.to_k",
                "transformer_blocks.{i}.attn1.to_v",
            ),
        ),
        Fused(
            "blocks.{i}.attn.qkv_y",
            (
                "transformer_blocks.{i}.attn1.add_q_proj",
                "transformer_blocks.{i}.attn1.add_k_proj",
                "transformer_blocks.{i}.attn1.add_v_proj",
            ),
        ),
        *Blocks(
            {"blocks.{i}": "transformer_blocks.{i}"},
            {
                "attn.proj_x": "attn1.to_out.0",
                "attn.proj_y": "attn1.to_add_out",
                "mlp_x.w2":    "ff.net.2",
                "mlp_y.w2":    "ff_context.net.2",
                "mod_x":       "norm1.linear",
            },
        ).renames,
        Modulation(
            "blocks.{i}.mod_y",
            here={"transformer_blocks.{i}.norm1_context.linear": (0,)},
            last={"transformer_blocks.{i}.norm1_context.linear_1": (0,)},
            ratio=0.5,
        ),
        Regrouped("blocks.{i}.mlp_x.w1", {"transformer_blocks.{i}.ff.net.0.proj": (1, 0)}),
        Regrouped("blocks.{i}.mlp_y.w1", {"transformer_blocks.{i}.ff_context.net.0.proj": (1, 0)}),
        Rename("x_embedder.proj", "patch_embed.proj"),
        Rename("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
        Rename("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
        Rename("t5_y_embedder.to_kv", "time_embed.pooler.to_kv"),
        Rename("t5_y_embedder.to_q", "time_embed.pooler.to_q"),
        Rename("t5_y_embedder.to_out", "time_embed.pooler.to_out"),
        Rename("t5_yproj", "time_embed.caption_proj"),
        Regrouped("final_layer.mod", {"norm_out.linear": (1, 0)}),
        Rename("final_layer.linear", "proj_out"),
    ),
    norms=Blocks(
        {"blocks.{i}": "transformer_blocks.{i}"},
        {
            "attn.q_norm_x": "attn1.norm_q",
            "attn.k_norm_x": "attn1.norm_k",
            "attn.q_norm_y": "attn1.norm_added_q",
            "attn.k_norm_y": "attn1.norm_added_k",
        },
    ).norms,
)  # fmt: skip

MOCHI = Family(
    name="mochi",
    title="Mochi 1",
    model_class="MochiTransformer3DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    convolutions=("patch_embed.proj",),
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

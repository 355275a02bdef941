"""Stable Diffusion 3 and 3.5 (medium, large): Stability's module names against those of diffusers.

Facts: Stability-AI/sd3.5 ``mmditx.py``, huggingface/diffusers ``models/transformers/transformer_sd3.py``. The last
modulation is shift and scale, in diffusers scale and shift. So is the text modulation of the last block, which has no
text output: it has twice as many rows as columns, in the other blocks six times as many.
"""

from loraconv.rules import Blocks, Family, Fused, Modulation, Regrouped, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        Fused(
            "joint_blocks.{i}.x_block.attn.qkv",
            (
                "transformer_blocks.{i}.attn.to_q",
                "transformer_blocks.{i}.attn.to_k",
                "transformer_blocks.{i}.attn.to_v",
            ),
        ),
        Fused(
            "joint_blocks.{i}.x_block.attn2.qkv",
            (
                "transformer_blocks.{i}.attn2.to_q",
                "transformer_blocks.{i}.attn2.to_k",
                "transformer_blocks.{i}.attn2.to_v",
            ),
        ),
        Fused(
            "joint_blocks.{i}.context_block.attn.qkv",
            (
                "transformer_blocks.{i}.attn.add_q_proj",
                "transformer_blocks.{i}.attn.add_k_proj",
                "transformer_blocks.{i}.attn.add_v_proj",
            ),
        ),
        *Blocks(
            {"joint_blocks.{i}": "transformer_blocks.{i}"},
            {
                "x_block.attn.proj":          "attn.to_out.0",
                "x_block.attn2.proj":         "attn2.to_out.0",
                "x_block.mlp.fc1":            "ff.net.0.proj",
                "x_block.mlp.fc2":            "ff.net.2",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.attn.proj":    "attn.to_add_out",
                "context_block.mlp.fc1":      "ff_context.net.0.proj",
                "context_block.mlp.fc2":      "ff_context.net.2",
            },
        ).renames,
        Modulation(
            "joint_blocks.{i}.context_block.adaLN_modulation.1",
            here={"transformer_blocks.{i}.norm1_context.linear": (0,)},
            last={"transformer_blocks.{i}.norm1_context.linear": (1, 0)},
            ratio=2,
        ),
        Rename("x_embedder.proj", "pos_embed.proj"),
        Rename("context_embedder", "context_embedder"),
        Rename("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        Rename("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        Rename("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        Rename("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        Regrouped("final_layer.adaLN_modulation.1", {"norm_out.linear": (1, 0)}),
        Rename("final_layer.linear", "proj_out"),
    ),
    norms=Blocks(
        {"joint_blocks.{i}": "transformer_blocks.{i}"},
        {
            "x_block.attn.ln_q":       "attn.norm_q",
            "x_block.attn.ln_k":       "attn.norm_k",
            "x_block.attn2.ln_q":      "attn2.norm_q",
            "x_block.attn2.ln_k":      "attn2.norm_k",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
        },
    ).norms,
)  # fmt: skip

SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    model_class="SD3Transformer2DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    convolutions=("pos_embed.proj",),
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

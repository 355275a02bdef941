"""Qwen-Image and Qwen-Image-Edit: the released model is diffusers' own, so every tool has its names.

Facts: huggingface/diffusers ``models/transformers/transformer_qwenimage.py``.
"""

from loraconv.rules import Family, Same, Spelling

ORIGINAL = Spelling(
    rules=Same(
        (
            "transformer_blocks.{i}.attn.to_q",
            "transformer_blocks.{i}.attn.to_k",
            "transformer_blocks.{i}.attn.to_v",
            "transformer_blocks.{i}.attn.to_out.0",
            "transformer_blocks.{i}.attn.add_q_proj",
            "transformer_blocks.{i}.attn.add_k_proj",
            "transformer_blocks.{i}.attn.add_v_proj",
            "transformer_blocks.{i}.attn.to_add_out",
            "transformer_blocks.{i}.img_mlp.net.0.proj",
            "transformer_blocks.{i}.img_mlp.net.2",
            "transformer_blocks.{i}.img_mod.1",
            "transformer_blocks.{i}.txt_mlp.net.0.proj",
            "transformer_blocks.{i}.txt_mlp.net.2",
            "transformer_blocks.{i}.txt_mod.1",
            "img_in",
            "txt_in",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
            "norm_out.linear",
            "proj_out",
        )
    ).renames,
    norms=Same(
        (
            "transformer_blocks.{i}.attn.norm_q",
            "transformer_blocks.{i}.attn.norm_k",
            "transformer_blocks.{i}.attn.norm_added_q",
            "transformer_blocks.{i}.attn.norm_added_k",
            "txt_norm",
        )
    ).norms,
)

QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    model_class="QwenImageTransformer2DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

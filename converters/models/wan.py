"""Wan 2.1 and 2.2, text to video and image to video: Wan's own module names against those of diffusers.

Facts: Wan-Video/Wan2.1 and Wan2.2 ``wan/modules/model.py``, huggingface/diffusers
``models/transformers/transformer_wan.py``. Both transformers of Wan 2.2 have these names.
"""

from loraconv.rules import Blocks, Family, Norm, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        *Blocks(
            {"blocks.{i}": "blocks.{i}"},
            {
                "self_attn.q":      "attn1.to_q",
                "self_attn.k":      "attn1.to_k",
                "self_attn.v":      "attn1.to_v",
                "self_attn.o":      "attn1.to_out.0",
                "cross_attn.q":     "attn2.to_q",
                "cross_attn.k":     "attn2.to_k",
                "cross_attn.v":     "attn2.to_v",
                "cross_attn.o":     "attn2.to_out.0",
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "ffn.0":            "ffn.net.0.proj",
                "ffn.2":            "ffn.net.2",
            },
        ).renames,
        Rename("patch_embedding", "patch_embedding"),
        Rename("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        Rename("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        Rename("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        Rename("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        Rename("time_projection.1", "condition_embedder.time_proj"),
        Rename("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        Rename("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        Rename("head.head", "proj_out"),
    ),
    norms=(
        *Blocks(
            {"blocks.{i}": "blocks.{i}"},
            {
                "self_attn.norm_q":      "attn1.norm_q",
                "self_attn.norm_k":      "attn1.norm_k",
                "cross_attn.norm_q":     "attn2.norm_q",
                "cross_attn.norm_k":     "attn2.norm_k",
                "cross_attn.norm_k_img": "attn2.norm_added_k",
                "norm3":                 "norm2",
            },
        ).norms,
        Norm("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
        Norm("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ),
)  # fmt: skip

WAN = Family(
    name="wan",
    title="Wan 2.1 and 2.2",
    model_class="WanTransformer3DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    convolutions=("patch_embedding",),
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL, "videox-fun": ORIGINAL},
)

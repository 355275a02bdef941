"""LTX-Video (2B and 13B): Lightricks' module names against those of diffusers.

Facts: Lightricks/LTX-Video ``ltx_video/models/transformers/transformer3d.py``, huggingface/diffusers
``models/transformers/transformer_ltx.py``.
"""

from loraconv.rules import Blocks, Family, Rename, Same, Spelling

ORIGINAL = Spelling(
    rules=(
        *Same(
            (
                "transformer_blocks.{i}.attn1.to_q",
                "transformer_blocks.{i}.attn1.to_k",
                "transformer_blocks.{i}.attn1.to_v",
                "transformer_blocks.{i}.attn1.to_out.0",
                "transformer_blocks.{i}.attn2.to_q",
                "transformer_blocks.{i}.attn2.to_k",
                "transformer_blocks.{i}.attn2.to_v",
                "transformer_blocks.{i}.attn2.to_out.0",
                "transformer_blocks.{i}.ff.net.0.proj",
                "transformer_blocks.{i}.ff.net.2",
                "caption_projection.linear_1",
                "caption_projection.linear_2",
                "proj_out",
            )
        ).renames,
        Rename("patchify_proj", "proj_in"),
        Rename("adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
        Rename("adaln_single.emb.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
        Rename("adaln_single.linear", "time_embed.linear"),
    ),
    norms=Blocks(
        {"transformer_blocks.{i}": "transformer_blocks.{i}"},
        {
            "attn1.q_norm": "attn1.norm_q",
            "attn1.k_norm": "attn1.norm_k",
            "attn2.q_norm": "attn2.norm_q",
            "attn2.k_norm": "attn2.norm_k",
        },
    ).norms,
)

LTX_VIDEO = Family(
    name="ltx-video",
    title="LTX-Video",
    model_class="LTXVideoTransformer3DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

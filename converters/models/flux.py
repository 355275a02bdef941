"""FLUX.1 (dev, schnell, Fill, Kontext): the module names of Black Forest Labs against those of diffusers.

Facts: black-forest-labs/flux ``src/flux/modules/layers.py`` and ``model.py``, huggingface/diffusers
``models/transformers/transformer_flux.py``. ``linear1`` is q, k, v and, four times as wide, the first layer of the
feed-forward. The last modulation is shift and scale, in diffusers scale and shift.
Control adapters hold whole norms.
"""

from loraconv.rules import Blocks, Family, Fused, Norm, Regrouped, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        Fused(
            "double_blocks.{i}.img_attn.qkv",
            (
                "transformer_blocks.{i}.attn.to_q",
                "transformer_blocks.{i}.attn.to_k",
                "transformer_blocks.{i}.attn.to_v",
            ),
        ),
        Fused(
            "double_blocks.{i}.txt_attn.qkv",
            (
                "transformer_blocks.{i}.attn.add_q_proj",
                "transformer_blocks.{i}.attn.add_k_proj",
                "transformer_blocks.{i}.attn.add_v_proj",
            ),
        ),
        *Blocks(
            {"double_blocks.{i}": "transformer_blocks.{i}"},
            {
                "img_attn.proj": "attn.to_out.0",
                "img_mlp.0":     "ff.net.0.proj",
                "img_mlp.2":     "ff.net.2",
                "img_mod.lin":   "norm1.linear",
                "txt_attn.proj": "attn.to_add_out",
                "txt_mlp.0":     "ff_context.net.0.proj",
                "txt_mlp.2":     "ff_context.net.2",
                "txt_mod.lin":   "norm1_context.linear",
            },
        ).renames,
        Regrouped(
            "single_blocks.{i}.linear1",
            {
                "single_transformer_blocks.{i}.attn.to_q": (0,),
                "single_transformer_blocks.{i}.attn.to_k": (1,),
                "single_transformer_blocks.{i}.attn.to_v": (2,),
                "single_transformer_blocks.{i}.proj_mlp":  (3, 4, 5, 6),
            },
        ),
        Rename("single_blocks.{i}.linear2", "single_transformer_blocks.{i}.proj_out"),
        Rename("single_blocks.{i}.modulation.lin", "single_transformer_blocks.{i}.norm.linear"),
        Rename("img_in", "x_embedder"),
        Rename("txt_in", "context_embedder"),
        Rename("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        Rename("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        Rename("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        Rename("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        Rename("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        Rename("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        Regrouped("final_layer.adaLN_modulation.1", {"norm_out.linear": (1, 0)}),
        Rename("final_layer.linear", "proj_out"),
    ),
    norms=(
        *Blocks(
            {"double_blocks.{i}": "transformer_blocks.{i}"},
            {
                "img_attn.norm.query_norm": "attn.norm_q",
                "img_attn.norm.key_norm":   "attn.norm_k",
                "txt_attn.norm.query_norm": "attn.norm_added_q",
                "txt_attn.norm.key_norm":   "attn.norm_added_k",
            },
        ).norms,
        Norm("single_blocks.{i}.norm.query_norm", "single_transformer_blocks.{i}.attn.norm_q"),
        Norm("single_blocks.{i}.norm.key_norm", "single_transformer_blocks.{i}.attn.norm_k"),
    ),
)  # fmt: skip

#: XLabs' trainer puts its layers into attention processors. A single block's first linear layer has another use for the
#: rows behind q, k and v, which no adapter of it has.
XLABS = Spelling(
    rules=(
        Fused(
            "double_blocks.{i}.processor.qkv_lora1",
            (
                "transformer_blocks.{i}.attn.to_q",
                "transformer_blocks.{i}.attn.to_k",
                "transformer_blocks.{i}.attn.to_v",
            ),
        ),
        Fused(
            "double_blocks.{i}.processor.qkv_lora2",
            (
                "transformer_blocks.{i}.attn.add_q_proj",
                "transformer_blocks.{i}.attn.add_k_proj",
                "transformer_blocks.{i}.attn.add_v_proj",
            ),
        ),
        Fused(
            "single_blocks.{i}.processor.qkv_lora",
            (
                "single_transformer_blocks.{i}.attn.to_q",
                "single_transformer_blocks.{i}.attn.to_k",
                "single_transformer_blocks.{i}.attn.to_v",
            ),
        ),
        Rename("double_blocks.{i}.processor.proj_lora1", "transformer_blocks.{i}.attn.to_out.0"),
        Rename("double_blocks.{i}.processor.proj_lora2", "transformer_blocks.{i}.attn.to_add_out"),
        Rename("single_blocks.{i}.processor.proj_lora", "single_transformer_blocks.{i}.proj_out"),
    ),
)

#: Facts: huggingface/transformers ``models/clip/modeling_clip.py``. Of the two text encoders the first, CLIP-L.
_CLIP = (
    "text_encoder.text_model.embeddings.token_embedding",
    "text_encoder.text_model.embeddings.position_embedding",
    "text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.{i}.self_attn.k_proj",
    "text_encoder.text_model.encoder.layers.{i}.self_attn.v_proj",
    "text_encoder.text_model.encoder.layers.{i}.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.{i}.mlp.fc1",
    "text_encoder.text_model.encoder.layers.{i}.mlp.fc2",
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    model_class="FluxTransformer2DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    norms=ORIGINAL.norm_heres,
    replaces_norms=True,
    beside=_CLIP,
    spellings={"original": ORIGINAL, "xlabs": XLABS, "bfl-control": ORIGINAL},
)

"""HunyuanVideo, text to video and image to video: Tencent's module names against those of diffusers.

Facts: Tencent/HunyuanVideo ``hyvideo/modules/models.py`` and ``token_refiner.py``, huggingface/diffusers
``models/transformers/transformer_hunyuan_video.py``. ``linear1`` is q, k, v and, four times as wide, the first layer of
the feed-forward. The last modulation is shift and scale, in diffusers scale and shift.
"""

from loraconv.rules import Blocks, Family, Fused, Regrouped, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        Fused(
            "double_blocks.{i}.img_attn_qkv",
            (
                "transformer_blocks.{i}.attn.to_q",
                "transformer_blocks.{i}.attn.to_k",
                "transformer_blocks.{i}.attn.to_v",
            ),
        ),
        Fused(
            "double_blocks.{i}.txt_attn_qkv",
            (
                "transformer_blocks.{i}.attn.add_q_proj",
                "transformer_blocks.{i}.attn.add_k_proj",
                "transformer_blocks.{i}.attn.add_v_proj",
            ),
        ),
        *Blocks(
            {"double_blocks.{i}": "transformer_blocks.{i}"},
            {
                "img_attn_proj":  "attn.to_out.0",
                "img_mlp.fc1":    "ff.net.0.proj",
                "img_mlp.fc2":    "ff.net.2",
                "img_mod.linear": "norm1.linear",
                "txt_attn_proj":  "attn.to_add_out",
                "txt_mlp.fc1":    "ff_context.net.0.proj",
                "txt_mlp.fc2":    "ff_context.net.2",
                "txt_mod.linear": "norm1_context.linear",
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
        Rename("single_blocks.{i}.modulation.linear", "single_transformer_blocks.{i}.norm.linear"),
        Fused(
            "txt_in.individual_token_refiner.blocks.{i}.self_attn_qkv",
            (
                "context_embedder.token_refiner.refiner_blocks.{i}.attn.to_q",
                "context_embedder.token_refiner.refiner_blocks.{i}.attn.to_k",
                "context_embedder.token_refiner.refiner_blocks.{i}.attn.to_v",
            ),
        ),
        *Blocks(
            {"txt_in.individual_token_refiner.blocks.{i}": "context_embedder.token_refiner.refiner_blocks.{i}"},
            {
                "self_attn_proj":     "attn.to_out.0",
                "mlp.fc1":            "ff.net.0.proj",
                "mlp.fc2":            "ff.net.2",
                "adaLN_modulation.1": "norm_out.linear",
            },
        ).renames,
        Rename("txt_in.input_embedder", "context_embedder.proj_in"),
        Rename("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
        Rename("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
        Rename("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1"),
        Rename("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2"),
        Rename("img_in.proj", "x_embedder.proj"),
        Rename("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        Rename("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        Rename("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        Rename("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        Rename("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
        Rename("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
        Regrouped("final_layer.adaLN_modulation.1", {"norm_out.linear": (1, 0)}),
        Rename("final_layer.linear", "proj_out"),
    ),
    norms=(
        *Blocks(
            {"double_blocks.{i}": "transformer_blocks.{i}"},
            {
                "img_attn_q_norm": "attn.norm_q",
                "img_attn_k_norm": "attn.norm_k",
                "txt_attn_q_norm": "attn.norm_added_q",
                "txt_attn_k_norm": "attn.norm_added_k",
            },
        ).norms,
        *Blocks(
            {"single_blocks.{i}": "single_transformer_blocks.{i}"},
            {"q_norm": "attn.norm_q", "k_norm": "attn.norm_k"},
        ).norms,
        *Blocks(
            {"txt_in.individual_token_refiner.blocks.{i}": "context_embedder.token_refiner.refiner_blocks.{i}"},
            {"norm1": "norm1", "norm2": "norm2"},
        ).norms,
    ),
)  # fmt: skip

HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    title="HunyuanVideo",
    model_class="HunyuanVideoTransformer3DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    convolutions=("x_embedder.proj",),
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

"""LLaVA 1.5: the names of the LLaVA repository against those of transformers (5.0 and later).

Facts: haotian-liu/LLaVA ``llava/model/llava_arch.py`` and ``multimodal_encoder/clip_encoder.py``,
huggingface/transformers ``models/llava/modeling_llava.py``. In the repository the language model is the root, so
that an adapter of it alone reads as one of LLaMA.
"""

from loraconv.rules import Blocks, Family, Rename, Spelling

ORIGINAL = Spelling(
    rules=(
        *Blocks(
            {"model.layers.{i}": "model.language_model.layers.{i}"},
            {
                "self_attn.q_proj": "self_attn.q_proj",
                "self_attn.k_proj": "self_attn.k_proj",
                "self_attn.v_proj": "self_attn.v_proj",
                "self_attn.o_proj": "self_attn.o_proj",
                "mlp.gate_proj":    "mlp.gate_proj",
                "mlp.up_proj":      "mlp.up_proj",
                "mlp.down_proj":    "mlp.down_proj",
            },
        ).renames,
        *Blocks(
            {"model.vision_tower.vision_tower.vision_model": "model.vision_tower"},
            {
                "embeddings.patch_embedding":            "embeddings.patch_embedding",
                "embeddings.position_embedding":         "embeddings.position_embedding",
                "encoder.layers.{i}.self_attn.q_proj":   "encoder.layers.{i}.self_attn.q_proj",
                "encoder.layers.{i}.self_attn.k_proj":   "encoder.layers.{i}.self_attn.k_proj",
                "encoder.layers.{i}.self_attn.v_proj":   "encoder.layers.{i}.self_attn.v_proj",
                "encoder.layers.{i}.self_attn.out_proj": "encoder.layers.{i}.self_attn.out_proj",
                "encoder.layers.{i}.mlp.fc1":            "encoder.layers.{i}.mlp.fc1",
                "encoder.layers.{i}.mlp.fc2":            "encoder.layers.{i}.mlp.fc2",
            },
        ).renames,
        Rename("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        Rename("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        Rename("model.embed_tokens", "model.language_model.embed_tokens"),
        Rename("lm_head", "lm_head"),
    ),
)  # fmt: skip

LLAVA = Family(
    name="llava",
    title="LLaVA 1.5",
    model_class="LlavaForConditionalGeneration",
    component="",
    modules=ORIGINAL.heres,
    convolutions=("embeddings.patch_embedding",),
    spellings={"original": ORIGINAL},
)

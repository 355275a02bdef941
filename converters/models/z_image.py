"""Z-Image and Z-Image-Turbo: the module names of ComfyUI, with q, k and v in one, against those of diffusers.

Facts: huggingface/diffusers ``models/transformers/transformer_z_image.py`` and its reader of single files. What
diffusers calls ``2-1`` is the patch size, in space and in time, of the released models.
"""

from loraconv.rules import Blocks, Family, Fused, Norm, Rename, Same, Spelling

_BLOCKS = {
    "layers.{i}":          "layers.{i}",
    "noise_refiner.{i}":   "noise_refiner.{i}",
    "context_refiner.{i}": "context_refiner.{i}",
}  # fmt: skip

_IN_BLOCKS = {
    "attention.out":   "attention.to_out.0",
    "feed_forward.w1": "feed_forward.w1",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w3",
}  # fmt: skip

_NORMS_IN_BLOCKS = {
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention_norm1":  "attention_norm1",
    "attention_norm2":  "attention_norm2",
    "ffn_norm1":        "ffn_norm1",
    "ffn_norm2":        "ffn_norm2",
}  # fmt: skip

ORIGINAL = Spelling(
    rules=(
        Fused(
            "layers.{i}.attention.qkv",
            ("layers.{i}.attention.to_q", "layers.{i}.attention.to_k", "layers.{i}.attention.to_v"),
        ),
        Fused(
            "noise_refiner.{i}.attention.qkv",
            (
                "noise_refiner.{i}.attention.to_q",
                "noise_refiner.{i}.attention.to_k",
                "noise_refiner.{i}.attention.to_v",
            ),
        ),
        Fused(
            "context_refiner.{i}.attention.qkv",
            (
                "context_refiner.{i}.attention.to_q",
                "context_refiner.{i}.attention.to_k",
                "context_refiner.{i}.attention.to_v",
            ),
        ),
        *Blocks(_BLOCKS, _IN_BLOCKS).renames,
        *Same(
            (
                "layers.{i}.adaLN_modulation.0",
                "noise_refiner.{i}.adaLN_modulation.0",
                "t_embedder.mlp.0",
                "t_embedder.mlp.2",
                "cap_embedder.1",
            )
        ).renames,
        Rename("x_embedder", "all_x_embedder.2-1"),
        Rename("final_layer.linear", "all_final_layer.2-1.linear"),
        Rename("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
    norms=(
        *Blocks(_BLOCKS, _NORMS_IN_BLOCKS).norms,
        Norm("cap_embedder.0", "cap_embedder.0"),
    ),
)

Z_IMAGE = Family(
    name="z-image",
    title="Z-Image",
    model_class="ZImageTransformer2DModel",
    component="transformer",
    modules=ORIGINAL.heres,
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

"""Stable Diffusion XL, its UNet and both text encoders: the names of Stability's UNet against those of diffusers.

Facts: Stability-AI/generative-models ``sgm/modules/diffusionmodules/openaimodel.py``, huggingface/diffusers
``models/unets/unet_2d_condition.py``, huggingface/transformers ``models/clip/modeling_clip.py``. Module names begin
with their component. Tools that train SDXL name the text encoders as transformers does, with ``text_model`` in both.
"""

from loraconv.rules import Blocks, Family, Norm, Rename, Spelling

_RESNETS = {
    "unet.input_blocks.1.0":  "unet.down_blocks.0.resnets.0",
    "unet.input_blocks.2.0":  "unet.down_blocks.0.resnets.1",
    "unet.input_blocks.4.0":  "unet.down_blocks.1.resnets.0",
    "unet.input_blocks.5.0":  "unet.down_blocks.1.resnets.1",
    "unet.input_blocks.7.0":  "unet.down_blocks.2.resnets.0",
    "unet.input_blocks.8.0":  "unet.down_blocks.2.resnets.1",
    "unet.middle_block.0":    "unet.mid_block.resnets.0",
    "unet.middle_block.2":    "unet.mid_block.resnets.1",
    "unet.output_blocks.0.0": "unet.up_blocks.0.resnets.0",
    "unet.output_blocks.1.0": "unet.up_blocks.0.resnets.1",
    "unet.output_blocks.2.0": "unet.up_blocks.0.resnets.2",
    "unet.output_blocks.3.0": "unet.up_blocks.1.resnets.0",
    "unet.output_blocks.4.0": "unet.up_blocks.1.resnets.1",
    "unet.output_blocks.5.0": "unet.up_blocks.1.resnets.2",
    "unet.output_blocks.6.0": "unet.up_blocks.2.resnets.0",
    "unet.output_blocks.7.0": "unet.up_blocks.2.resnets.1",
    "unet.output_blocks.8.0": "unet.up_blocks.2.resnets.2",
}  # fmt: skip

# The blocks whose input and output differ in width.
_SHORTCUTS = {
    "unet.input_blocks.4.0":  "unet.down_blocks.1.resnets.0",
    "unet.input_blocks.7.0":  "unet.down_blocks.2.resnets.0",
    "unet.output_blocks.0.0": "unet.up_blocks.0.resnets.0",
    "unet.output_blocks.1.0": "unet.up_blocks.0.resnets.1",
    "unet.output_blocks.2.0": "unet.up_blocks.0.resnets.2",
    "unet.output_blocks.3.0": "unet.up_blocks.1.resnets.0",
    "unet.output_blocks.4.0": "unet.up_blocks.1.resnets.1",
    "unet.output_blocks.5.0": "unet.up_blocks.1.resnets.2",
    "unet.output_blocks.6.0": "unet.up_blocks.2.resnets.0",
    "unet.output_blocks.7.0": "unet.up_blocks.2.resnets.1",
    "unet.output_blocks.8.0": "unet.up_blocks.2.resnets.2",
}  # fmt: skip

_ATTENTIONS = {
    "unet.input_blocks.4.1":  "unet.down_blocks.1.attentions.0",
    "unet.input_blocks.5.1":  "unet.down_blocks.1.attentions.1",
    "unet.input_blocks.7.1":  "unet.down_blocks.2.attentions.0",
    "unet.input_blocks.8.1":  "unet.down_blocks.2.attentions.1",
    "unet.middle_block.1":    "unet.mid_block.attentions.0",
    "unet.output_blocks.0.1": "unet.up_blocks.0.attentions.0",
    "unet.output_blocks.1.1": "unet.up_blocks.0.attentions.1",
    "unet.output_blocks.2.1": "unet.up_blocks.0.attentions.2",
    "unet.output_blocks.3.1": "unet.up_blocks.1.attentions.0",
    "unet.output_blocks.4.1": "unet.up_blocks.1.attentions.1",
    "unet.output_blocks.5.1": "unet.up_blocks.1.attentions.2",
}  # fmt: skip

_IN_ATTENTIONS = {
    "proj_in":                                "proj_in",
    "proj_out":                               "proj_out",
    "transformer_blocks.{i}.attn1.to_q":      "transformer_blocks.{i}.attn1.to_q",
    "transformer_blocks.{i}.attn1.to_k":      "transformer_blocks.{i}.attn1.to_k",
    "transformer_blocks.{i}.attn1.to_v":      "transformer_blocks.{i}.attn1.to_v",
    "transformer_blocks.{i}.attn1.to_out.0":  "transformer_blocks.{i}.attn1.to_out.0",
    "transformer_blocks.{i}.attn2.to_q":      "transformer_blocks.{i}.attn2.to_q",
    "transformer_blocks.{i}.attn2.to_k":      "transformer_blocks.{i}.attn2.to_k",
    "transformer_blocks.{i}.attn2.to_v":      "transformer_blocks.{i}.attn2.to_v",
    "transformer_blocks.{i}.attn2.to_out.0":  "transformer_blocks.{i}.attn2.to_out.0",
    "transformer_blocks.{i}.ff.net.0.proj":   "transformer_blocks.{i}.ff.net.0.proj",
    "transformer_blocks.{i}.ff.net.2":        "transformer_blocks.{i}.ff.net.2",
}  # fmt: skip

_NORMS_IN_ATTENTIONS = {
    "norm":                         "norm",
    "transformer_blocks.{i}.norm1": "transformer_blocks.{i}.norm1",
    "transformer_blocks.{i}.norm2": "transformer_blocks.{i}.norm2",
    "transformer_blocks.{i}.norm3": "transformer_blocks.{i}.norm3",
}  # fmt: skip

_TEXT_MODELS = {
    "text_encoder.text_model":   "text_encoder.text_model",
    "text_encoder_2.text_model": "text_encoder_2.text_model",
}  # fmt: skip

_IN_TEXT_MODELS = {
    "embeddings.token_embedding":            "embeddings.token_embedding",
    "embeddings.position_embedding":         "embeddings.position_embedding",
    "encoder.layers.{i}.self_attn.q_proj":   "encoder.layers.{i}.self_attn.q_proj",
    "encoder.layers.{i}.self_attn.k_proj":   "encoder.layers.{i}.self_attn.k_proj",
    "encoder.layers.{i}.self_attn.v_proj":   "encoder.layers.{i}.self_attn.v_proj",
    "encoder.layers.{i}.self_attn.out_proj": "encoder.layers.{i}.self_attn.out_proj",
    "encoder.layers.{i}.mlp.fc1":            "encoder.layers.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.fc2":            "encoder.layers.{i}.mlp.fc2",
}  # fmt: skip

_NORMS_IN_TEXT_MODELS = {
    "encoder.layers.{i}.layer_norm1": "encoder.layers.{i}.layer_norm1",
    "encoder.layers.{i}.layer_norm2": "encoder.layers.{i}.layer_norm2",
    "final_layer_norm":               "final_layer_norm",
}  # fmt: skip

ORIGINAL = Spelling(
    rules=(
        *Blocks(_RESNETS, {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj"}).renames,
        *Blocks(_SHORTCUTS, {"skip_connection": "conv_shortcut"}).renames,
        *Blocks(_ATTENTIONS, _IN_ATTENTIONS).renames,
        Rename("unet.input_blocks.0.0", "unet.conv_in"),
        Rename("unet.input_blocks.3.0.op", "unet.down_blocks.0.downsamplers.0.conv"),
        Rename("unet.input_blocks.6.0.op", "unet.down_blocks.1.downsamplers.0.conv"),
        Rename("unet.output_blocks.2.2.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        Rename("unet.output_blocks.5.2.conv", "unet.up_blocks.1.upsamplers.0.conv"),
        Rename("unet.out.2", "unet.conv_out"),
        Rename("unet.time_embed.0", "unet.time_embedding.linear_1"),
        Rename("unet.time_embed.2", "unet.time_embedding.linear_2"),
        Rename("unet.label_emb.0.0", "unet.add_embedding.linear_1"),
        Rename("unet.label_emb.0.2", "unet.add_embedding.linear_2"),
        *Blocks(_TEXT_MODELS, _IN_TEXT_MODELS).renames,
        Rename("text_encoder_2.text_projection", "text_encoder_2.text_projection"),
    ),
    norms=(
        *Blocks(_RESNETS, {"in_layers.0": "norm1", "out_layers.0": "norm2"}).norms,
        *Blocks(_ATTENTIONS, _NORMS_IN_ATTENTIONS).norms,
        Norm("unet.out.0", "unet.conv_norm_out"),
        *Blocks(_TEXT_MODELS, _NORMS_IN_TEXT_MODELS).norms,
    ),
)

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    model_class="UNet2DConditionModel",
    component="",
    modules=ORIGINAL.heres,
    convolutions=("conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    norms=ORIGINAL.norm_heres,
    spellings={"original": ORIGINAL},
)

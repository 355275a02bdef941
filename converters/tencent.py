"""The file of Tencent's HunyuanVideo-I2V: kohya's factors behind ``Hunyuan_video_I2V_lora_``, original names flattened.

Facts: Tencent-Hunyuan/HunyuanVideo-I2V ``load_lora_for_pipeline``, which passes over alpha tensors and applies
``--lora-scale`` alone: that is the trained strength where alpha is the rank or is not there.
"""

from loraconv.rules import Dialect

TENCENT = Dialect(
    name="tencent",
    title="Tencent's LoRA file of HunyuanVideo-I2V",
    container="safetensors-file",
    file="tencent_lora.safetensors",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    alpha="{module}.alpha",
    prefixes=("Hunyuan_video_I2V_lora_",),
    components={"transformer": ""},
    spellings=("original",),
    separator="_",
    default_alpha="rank",
    default_why="Tencent's loader applies scale 1 (alpha = rank)",
    read_only="nothing but Tencent's own loader reads it: use --to kohya, or --to diffusers",
    carries=("any module", "a rank and an alpha for each module"),
    facts="Tencent-Hunyuan/HunyuanVideo-I2V load_lora_for_pipeline",
)

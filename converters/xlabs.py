"""The file of XLabs' FLUX trainer: LoRA in the processors of the attention, q, k and v in one.

Facts: huggingface/diffusers ``loaders/lora_conversion_utils.py``, which applies scale 1; the file has no alpha.
"""

from loraconv.rules import Dialect

XLABS = Dialect(
    name="xlabs",
    title="XLabs FLUX LoRA file",
    container="safetensors-file",
    file="lora.safetensors",
    down="{module}.down.weight",
    up="{module}.up.weight",
    prefixes=("", "diffusion_model."),
    components={"transformer": ""},
    spellings=("xlabs",),
    default_alpha="rank",
    default_why="diffusers applies scale 1 (alpha = rank) to such a file",
    read_only="it holds the attention alone: use --to diffusers, or --to comfyui",
    carries=("attention projections, and those out of single blocks", "a rank for each module"),
    facts="huggingface/diffusers src/diffusers/loaders/lora_conversion_utils.py",
)

"""The file of XLabs' FLUX trainer: LoRA in the processors of the attention, q, k and v in one.

Facts: XLabs-AI/x-flux ``src/flux/modules/layers.py``; huggingface/diffusers ``loaders/lora_conversion_utils.py``. The
trainer has no alpha, so its scale is 1.
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
    default_why="XLabs' trainer and its loaders apply scale 1",
    read_only="it holds the attention alone: use --to diffusers, or --to comfyui",
    carries=("attention projections, and those out of single blocks", "a rank for each module"),
    facts="XLabs-AI/x-flux src/flux/modules/layers.py; huggingface/diffusers loaders/lora_conversion_utils.py",
)

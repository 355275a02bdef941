"""The file of Genmo's own Mochi fine-tuning: original names without a prefix, factors without ``.weight``.

Facts: comfyanonymous/ComfyUI ``comfy/lora.py``, which calls it the official format of Mochi.
"""

from loraconv.rules import Dialect

GENMO = Dialect(
    name="genmo",
    title="Genmo's LoRA file of Mochi",
    container="safetensors-file",
    file="genmo_lora.safetensors",
    down="{module}.lora_A",
    up="{module}.lora_B",
    prefixes=("",),
    components={"transformer": ""},
    spellings=("original",),
    default_alpha="rank",
    default_why="no tensor says it, and ComfyUI applies scale 1 (alpha = rank)",
    read_only="ComfyUI reads it for Mochi alone: use --to comfyui",
    carries=("any module", "a rank for each module"),
    facts="comfyanonymous/ComfyUI comfy/lora.py",
)

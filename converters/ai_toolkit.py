"""The file of ai-toolkit for models that it trains under diffusers' names (FLUX.1, SD3, Qwen-Image).

Facts: ostris/ai-toolkit ``toolkit/network_mixins.py``, ``toolkit/lora_special.py``; ``info.py`` and
``toolkit/metadata.py`` (header ``software``: JSON with the name). In peft's format alpha is the rank. Other models have
their original names behind ``diffusion_model.``: that is ComfyUI's format, whatever the header says.
"""

from loraconv.rules import Dialect, Mark

AI_TOOLKIT = Dialect(
    name="ai-toolkit",
    title="ai-toolkit LoRA file",
    container="safetensors-file",
    file="pytorch_lora_weights.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    prefixes=("{component}.",),
    default_alpha="rank",
    default_why="ai-toolkit trains with alpha = rank in this format",
    variant_of="diffusers",
    marks=(Mark(header="software", word="ai-toolkit"),),
    read_only="its keys are diffusers': use --to diffusers",
    carries=("any module", "a rank for each module"),
    facts="ostris/ai-toolkit toolkit/network_mixins.py, toolkit/lora_special.py",
)

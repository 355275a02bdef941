"""Files of some releases of SimpleTuner, in which diffusers' prefix and peft's stand one behind the other.

Facts: bghira/SimpleTuner; comfyanonymous/ComfyUI#4347, bghira/SimpleTuner#779 (``.lora.down``). Nothing loads such a
file as it is.
"""

from loraconv.rules import Dialect

SIMPLETUNER = Dialect(
    name="simpletuner",
    title="SimpleTuner LoRA file with doubled prefix",
    container="safetensors-file",
    file="pytorch_lora_weights.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    also=(("{module}.lora.down.weight", "{module}.lora.up.weight"),),
    prefixes=("{component}.base_model.model.",),
    default_alpha="rank",
    default_why="the file says none, and diffusers would apply scale 1",
    read_only="nothing loads it: use --to diffusers",
    carries=("any module", "a rank for each module"),
    facts="bghira/SimpleTuner; comfyanonymous/ComfyUI#4347",
)

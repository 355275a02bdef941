"""The file of VideoX-Fun (CogVideoX-Fun, Wan-Fun): kohya's, with two underscores behind the prefix.

Facts: aigc-apps/VideoX-Fun ``videox_fun/utils/lora_utils.py``. The root module has no name there, which is why one more
underscore stands behind ``lora_unet``. Module names are those of its own classes: diffusers' names, but Wan's own for
Wan, by which ComfyUI (``comfy/lora_convert.py``) tells such a file.
"""

from loraconv.rules import Dialect

VIDEOX_FUN = Dialect(
    name="videox-fun",
    title="VideoX-Fun LoRA file",
    container="safetensors-file",
    file="videox_fun_lora.safetensors",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    alpha="{module}.alpha",
    prefixes=("lora_{component}__",),
    components={"transformer": "unet"},
    spellings=("videox-fun", ""),
    separator="_",
    default_alpha="rank",
    default_why="VideoX-Fun takes alpha = rank where there is no alpha tensor",
    carries=("any module", "a rank and an alpha for each module"),
    cannot_carry=("rsLoRA as such: its square root is counted into alpha",),
    facts="aigc-apps/VideoX-Fun videox_fun/utils/lora_utils.py",
)

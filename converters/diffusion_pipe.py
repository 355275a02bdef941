"""The folder of diffusion-pipe: ComfyUI's keys, with peft's settings file beside them.

Facts: tdrussell/diffusion-pipe ``models/base.py``, ``utils/saver.py``, ``train.py``. The trainer forces alpha to be the
rank, and ComfyUI, which reads the file, does not look at the settings.
"""

from loraconv.rules import Dialect, Mark

DIFFUSION_PIPE = Dialect(
    name="diffusion-pipe",
    title="diffusion-pipe adapter folder",
    container="safetensors-file",
    file="adapter_model.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    prefixes=("diffusion_model.", "transformer."),
    components={"transformer": ""},
    spellings=("original", ""),
    sidecar="adapter_config.json",
    rank_at="r",
    alpha_at="lora_alpha",
    default_alpha="rank",
    default_why="diffusion-pipe trains with alpha = rank",
    variant_of="comfyui",
    marks=(Mark(beside="adapter_config.json"),),
    read_only="its files are ComfyUI's with settings that nothing reads: use --to comfyui",
    carries=("any module", "one rank for the whole adapter"),
    facts="tdrussell/diffusion-pipe models/base.py, utils/saver.py, train.py",
)

"""The file with the model's original names that ComfyUI loads as it is.

Facts: comfyanonymous/ComfyUI ``comfy/lora.py``, ``comfy/weight_adapter/lora.py``. ComfyUI asks for each weight's name
in several spellings of the factors; alpha is a tensor beside them, and the rank without it. Text encoders
have the names that they have in ComfyUI, behind ``text_encoders.``. ``transformer.`` before
original names is what diffusion-pipe writes for HunyuanVideo.
"""

from loraconv.rules import LYCORIS, Dialect

COMFYUI = Dialect(
    name="comfyui",
    title="ComfyUI LoRA file with the model's original names",
    container="safetensors-file",
    file="comfyui_lora.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    also=(
        ("{module}.lora_down.weight", "{module}.lora_up.weight"),
        ("{module}.lora_A.default.weight", "{module}.lora_B.default.weight"),
        ("{module}.lora_A", "{module}.lora_B"),
    ),
    alpha="{module}.alpha",
    more=LYCORIS,
    prefixes=("{component}.", "transformer."),
    components={
        "transformer":    "diffusion_model",
        "unet":           "diffusion_model",
        "text_encoder":   "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    },
    spellings=("original", ""),
    default_alpha="rank",
    default_why="ComfyUI applies scale 1 (alpha = rank) where there is no alpha tensor",
    convolutions=True,
    carries=(
        "any module",
        "a rank and an alpha for each module",
        "LoHa, LoKr, full differences, Tucker cores, DoRA, norm layers",
    ),
    cannot_carry=("alpha for diffusers, whose loaders of HunyuanVideo, LTX-Video and others do not read it",),
    facts="comfyanonymous/ComfyUI comfy/lora.py, comfy/weight_adapter/lora.py",
)  # fmt: skip

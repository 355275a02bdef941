"""The file of kohya's sd-scripts and musubi-tuner, which most image and video trainers can write.

Facts: kohya-ss/sd-scripts ``networks/lora.py``, ``networks/lora_flux.py``; kohya-ss/musubi-tuner ``networks/lora.py``.
Dots are underscores; alpha is a tensor beside each pair, of any dtype; without it a loader takes the rank. With
``split_qkv`` sd-scripts trains q, k and v apart and saves them side by side with the alpha of one of them
(kohya-ss/sd-scripts#2204).
"""

from loraconv.rules import LYCORIS, Dialect, Mark

KOHYA = Dialect(
    name="kohya",
    title="kohya LoRA file (sd-scripts, musubi-tuner)",
    container="safetensors-file",
    file="kohya_lora.safetensors",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    alpha="{module}.alpha",
    more=LYCORIS,
    prefixes=("lora_{component}_",),
    components={
        "transformer":    "unet",
        "unet":           "unet",
        "text_encoder":   "te1",
        "text_encoder_2": "te2",
        "text_encoder_3": "te3",
    },
    spellings=("original", ""),
    separator="_",
    header_alpha="ss_network_alpha",
    alpha_of_block=(Mark(header="ss_network_args", word='"split_qkv": "true"'),),
    default_alpha="rank",
    default_why="kohya's loaders take alpha = rank where there is no alpha tensor",
    convolutions=True,
    carries=(
        "any module",
        "a rank and an alpha for each module",
        "LoHa, LoKr, full differences, Tucker cores, DoRA, norm layers",
    ),
    cannot_carry=("rsLoRA as such: its square root is counted into alpha",),
    facts="kohya-ss/sd-scripts networks/lora.py, lora_flux.py; kohya-ss/musubi-tuner networks/lora.py",
)  # fmt: skip

"""The folder that peft's ``save_pretrained`` writes: ``adapter_config.json`` and ``adapter_model.safetensors``.

Facts: huggingface/peft ``tuners/lora``, ``utils/save_and_load.py``. Every consumer reads alpha from the
configuration, so the factors are kept as they are. Where the model was its own repository's, names are original ones
(fal's FLUX Kontext).
"""

from loraconv.rules import PEFT_TUNERS, Dialect

PEFT = Dialect(
    name="peft",
    title="peft adapter folder",
    container="safetensors-file",
    file="adapter_model.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    also=(("{module}.lora_A.{adapter}.weight", "{module}.lora_B.{adapter}.weight"),),
    more=PEFT_TUNERS,
    prefixes=("base_model.model.",),
    spellings=("", "original"),
    sidecar="adapter_config.json",
    rank_at="r",
    alpha_at="lora_alpha",
    rank_pattern_at="rank_pattern",
    alpha_pattern_at="alpha_pattern",
    rslora_at="use_rslora",
    targets_at="target_modules",
    dora_at="use_dora",
    bias_at="lora_bias",
    settings={
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "task_type": None,
    },
    any_model=True,
    convolutions=True,
    carries=(
        "any module",
        "a rank and an alpha for each module",
        "rsLoRA",
        "DoRA with a magnitude for each row",
        "biases of lora_B",
    ),
    cannot_carry=("LoHa, LoKr and full differences in a LoRA's folder: --approximate svd makes the nearest LoRA",),
    facts="huggingface/peft src/peft/tuners/lora, src/peft/utils/save_and_load.py",
)

"""The file that diffusers' ``save_lora_weights`` writes and ``load_lora_weights`` reads.

Facts: huggingface/diffusers ``loaders/lora_base.py``, ``loaders/peft.py``. The header key ``lora_adapter_metadata``
is read since 0.34; before that, and in most other consumers, the scale is 1 whatever the file says.
"""

from loraconv.rules import PEFT_MORE, Dialect

DIFFUSERS = Dialect(
    name="diffusers",
    title="diffusers LoRA file",
    container="safetensors-file",
    file="pytorch_lora_weights.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    more=PEFT_MORE,
    norm="{module}.weight",
    prefixes=("{component}.", ""),
    header="lora_adapter_metadata",
    bias_at="lora_bias",
    default_alpha="rank",
    default_why="diffusers applies scale 1 (alpha = rank) to a file without lora_adapter_metadata, also where the"
    " trainer did not (CogVideo's finetune/ has alpha 64 and rank 128 unless told otherwise, and writes neither)",
    every_consumer_reads_alpha=False,
    convolutions=True,
    carries=(
        "any module",
        "a rank for each module",
        "alpha in the header (read by diffusers 0.34 and later)",
        "biases of lora_B, whole norm layers of FLUX's control LoRA",
    ),
    cannot_carry=(
        "alpha for consumers that ignore the header: loraconv folds the scale into lora_B",
        "DoRA, LoHa, LoKr and full differences: --approximate svd makes the nearest LoRA of the last three",
    ),
    facts="huggingface/diffusers src/diffusers/loaders/lora_base.py, peft.py",
)

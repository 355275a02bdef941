"""The file of finetrainers (CogVideoX-Factory): diffusers' keys, with alpha in a header key that diffusers never reads.

Facts: a-r-r-o-w/finetrainers ``finetrainers/trainer/sft_trainer/trainer.py``. Loaded by diffusers as it is, the adapter
is applied at scale 1 whatever alpha says.
"""

from loraconv.rules import Dialect, Mark

FINETRAINERS = Dialect(
    name="finetrainers",
    title="finetrainers LoRA file",
    container="safetensors-file",
    file="pytorch_lora_weights.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    prefixes=("{component}.",),
    default_alpha="rank",
    default_why="finetrainers' header lora_config names no alpha",
    variant_of="diffusers",
    marks=(Mark(header="lora_config"),),
    read_only="diffusers does not read its alpha: write a file that says the same with --to diffusers",
    carries=("any module", "one rank and one alpha for the whole adapter"),
    facts="a-r-r-o-w/finetrainers finetrainers/trainer/sft_trainer/trainer.py",
)

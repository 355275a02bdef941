"""The file of DiffSynth-Studio: no prefix, and peft's keys as they are in memory.

Facts: modelscope/DiffSynth-Studio ``diffsynth/diffusion/training_module.py``, ``diffsynth/utils/lora``. The trainer
sets alpha to the rank and writes it nowhere; the loader applies scale 1.
"""

from loraconv.rules import Dialect

DIFFSYNTH = Dialect(
    name="diffsynth",
    title="DiffSynth-Studio LoRA file",
    container="safetensors-file",
    file="diffsynth_lora.safetensors",
    down="{module}.lora_A.default.weight",
    up="{module}.lora_B.default.weight",
    prefixes=("",),
    components={"transformer": ""},
    spellings=("original", ""),
    default_alpha="rank",
    default_why="DiffSynth trains with alpha = rank and applies scale 1",
    every_consumer_reads_alpha=False,
    carries=("any module", "a rank for each module"),
    cannot_carry=("alpha: loraconv folds the scale into lora_B",),
    facts="modelscope/DiffSynth-Studio diffsynth/diffusion/training_module.py, diffsynth/utils/lora",
)

"""SwissArmyTransformer's older ``lora`` mixin: q, k, v and output beside the layers, which keep their names.

Facts: THUDM/SwissArmyTransformer ``sat/model/finetune/lora.py``. ``delta = lora_alpha / r * B @ A`` for each of
``Q``, ``K``, ``V`` and ``O``; the mixin's own name is the training code's choice. Alpha is in no tensor.
"""

from dataclasses import replace

from .sat import SAT

_MIXIN = "model.diffusion_model.mixins.{param}.lora_linear.{i}"
_ATTENTION = "model.diffusion_model.transformer.layers.{i}.attention"

SAT_LORA = replace(
    SAT,
    name="sat-lora",
    title="SAT (SwissArmyTransformer) training run with the older lora mixin",
    down="{module}_A",
    up="{module}_B",
    frozen="",
    parts=(
        (f"{_MIXIN}.Q", f"{_ATTENTION}.query_key_value", 0),
        (f"{_MIXIN}.K", f"{_ATTENTION}.query_key_value", 1),
        (f"{_MIXIN}.V", f"{_ATTENTION}.query_key_value", 2),
        (f"{_MIXIN}.O", f"{_ATTENTION}.dense", 0),
    ),
    default_why="SAT's LoRAMixin uses lora_alpha = 1 unless it is told otherwise",
    read_only="SAT has a newer one: use --to sat",
    facts="THUDM/SwissArmyTransformer sat/model/finetune/lora.py",
)

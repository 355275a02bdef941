"""SwissArmyTransformer's older ``lora`` mixin: q, k, v and output beside the layers, which keep their names.

Facts: THUDM/SwissArmyTransformer ``sat/model/finetune/lora.py``. ``delta = lora_alpha / r * B @ A`` for each of
``Q``, ``K``, ``V`` and ``O``; the mixin's own name is the training code's choice. Alpha is in no tensor.
"""

from loraconv.rules import Dialect

from .sat import SAT

_MIXIN = "model.diffusion_model.mixins.{param}.lora_linear.{i}"
_ATTENTION = "model.diffusion_model.transformer.layers.{i}.attention"

SAT_LORA = Dialect(
    name="sat-lora",
    title="SAT (SwissArmyTransformer) training run with the older lora mixin",
    container=SAT.container,
    file=SAT.file,
    down="{module}_A",
    up="{module}_B",
    prefixes=SAT.prefixes,
    spellings=SAT.spellings,
    foreign=SAT.foreign,
    layout=SAT.layout,
    parts=(
        (f"{_MIXIN}.Q", f"{_ATTENTION}.query_key_value", 0),
        (f"{_MIXIN}.K", f"{_ATTENTION}.query_key_value", 1),
        (f"{_MIXIN}.V", f"{_ATTENTION}.query_key_value", 2),
        (f"{_MIXIN}.O", f"{_ATTENTION}.dense", 0),
    ),
    sidecar=SAT.sidecar,
    rank_at=SAT.rank_at,
    alpha_at=SAT.alpha_at,
    default_alpha=SAT.default_alpha,
    default_why="SAT's LoRAMixin uses lora_alpha = 1 unless it is told otherwise",
    carries=SAT.carries,
    cannot_carry=SAT.cannot_carry,
    read_only="SAT has a newer one: use --to sat",
    facts="THUDM/SwissArmyTransformer sat/model/finetune/lora.py",
)

"""The file of OneTrainer for transformers: kohya's, with diffusers' module names behind ``lora_transformer_``.

Facts: Nerogar/OneTrainer ``modules/module/LoRAModule.py``, ``modules/modelSaver/mixin/LoRASaverMixin.py``. Its files
for UNets are kohya's. The prefix tells such a file: its header (``ot_branch``, ``ot_revision``, ``ot_config``) need
not.
"""

from loraconv.rules import LYCORIS, Dialect

ONETRAINER = Dialect(
    name="onetrainer",
    title="OneTrainer LoRA file",
    container="safetensors-file",
    file="onetrainer_lora.safetensors",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    alpha="{module}.alpha",
    more=LYCORIS,
    prefixes=("lora_{component}_",),
    components={"transformer": "transformer"},
    separator="_",
    default_alpha="rank",
    default_why="OneTrainer takes alpha = rank where there is no alpha tensor",
    convolutions=True,
    carries=("any module of the transformer", "a rank and an alpha for each module", "LoHa, DoRA, norm layers"),
    cannot_carry=("rsLoRA as such: its square root is counted into alpha",),
    facts="Nerogar/OneTrainer modules/module/LoRAModule.py",
)

"""The file of LyCORIS' own wrapper (``create_lycoris``), as SimpleTuner saves it: kohya's sides behind ``lycoris_``.

Facts: KohakuBlueleaf/LyCORIS ``lycoris/wrapper.py``, ``modules/*.py``. Modules are named as in the model that was
wrapped, which is diffusers'; nothing says which component it was, and only a transformer or a UNet is read.
"""

from loraconv.rules import LYCORIS as SIDES
from loraconv.rules import Dialect

LYCORIS = Dialect(
    name="lycoris",
    title="LyCORIS file with its own prefix",
    container="safetensors-file",
    file="lycoris.safetensors",
    down="{module}.lora_down.weight",
    up="{module}.lora_up.weight",
    alpha="{module}.alpha",
    more=SIDES,
    prefixes=("lycoris_",),
    components={"transformer": "", "unet": ""},
    separator="_",
    default_alpha="rank",
    default_why="LyCORIS takes alpha = rank where there is no alpha tensor",
    carries=(
        "any module",
        "a rank and an alpha for each module",
        "LoHa, LoKr, full differences, Tucker cores, DoRA, norm layers",
    ),
    cannot_carry=("rsLoRA as such: its square root is counted into alpha",),
    facts="KohakuBlueleaf/LyCORIS lycoris/wrapper.py, lycoris/modules",
)

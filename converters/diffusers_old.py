"""The older keys of diffusers: LoRA in attention processors, and ``lora_linear_layer``.

Facts: huggingface/diffusers ``utils/state_dict_utils.py``. diffusers still reads them and writes them no longer.
"""

from loraconv.rules import Dialect

DIFFUSERS_OLD = Dialect(
    name="diffusers-old",
    title="LoRA file of diffusers before peft",
    container="safetensors-file",
    file="pytorch_lora_weights.safetensors",
    down="{module}_lora.down.weight",
    up="{module}_lora.up.weight",
    also=(
        ("{module}.lora_linear_layer.down.weight", "{module}.lora_linear_layer.up.weight"),
        ("{module}.lora.down.weight", "{module}.lora.up.weight"),
    ),
    prefixes=("{component}.", ""),
    rewrites=(
        ("{module}.processor.to_out", "{module}.to_out.0"),
        ("{module}.processor.{param}", "{module}.{param}"),
        ("{module}.self_attn.to_q", "{module}.self_attn.q_proj"),
        ("{module}.self_attn.to_k", "{module}.self_attn.k_proj"),
        ("{module}.self_attn.to_v", "{module}.self_attn.v_proj"),
        ("{module}.self_attn.to_out", "{module}.self_attn.out_proj"),
    ),
    default_alpha="rank",
    default_why="diffusers applies scale 1 (alpha = rank) to such a file",
    read_only="diffusers itself writes newer keys: use --to diffusers",
    carries=("any module", "a rank for each module"),
    facts="huggingface/diffusers src/diffusers/utils/state_dict_utils.py",
)

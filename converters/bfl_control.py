"""The file of Black Forest Labs' FLUX control LoRA (FLUX.1-Depth-dev-lora, FLUX.1-Canny-dev-lora).

Every linear layer has factors and a bias of ``lora_B``, and the norms of queries and keys are there as a whole: they
take the place of the base's. No alpha: what the three add up to is applied at scale 1. ``img_in`` is wider than the
base's, which its readers widen with zeros. They know the format by its norms, and diffusers wants every module; it
swaps the halves of the last modulation in lora_A as well as in lora_B (0.42), which makes another delta of it.
Facts: black-forest-labs/flux ``src/flux/modules/lora.py``, huggingface/diffusers ``loaders/lora_conversion_utils.py``
and ``lora_pipeline.py``, comfyanonymous/ComfyUI ``comfy/lora_convert.py``.
"""

from loraconv.rules import Dialect

BFL_CONTROL = Dialect(
    name="bfl-control",
    title="Black Forest Labs' FLUX control LoRA file",
    container="safetensors-file",
    file="flux_control_lora.safetensors",
    down="{module}.lora_A.weight",
    up="{module}.lora_B.weight",
    more={"lora_B.bias": "bias"},
    norm="{module}.scale",
    prefixes=("",),
    components={"transformer": ""},
    spellings=("bfl-control",),
    needs=(
        "double_blocks.{i}.img_attn.norm.key_norm",
        "double_blocks.{i}.img_attn.norm.query_norm",
        "double_blocks.{i}.img_attn.proj",
        "double_blocks.{i}.img_attn.qkv",
        "double_blocks.{i}.img_mlp.0",
        "double_blocks.{i}.img_mlp.2",
        "double_blocks.{i}.img_mod.lin",
        "double_blocks.{i}.txt_attn.norm.key_norm",
        "double_blocks.{i}.txt_attn.norm.query_norm",
        "double_blocks.{i}.txt_attn.proj",
        "double_blocks.{i}.txt_attn.qkv",
        "double_blocks.{i}.txt_mlp.0",
        "double_blocks.{i}.txt_mlp.2",
        "double_blocks.{i}.txt_mod.lin",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
        "img_in",
        "single_blocks.{i}.linear1",
        "single_blocks.{i}.linear2",
        "single_blocks.{i}.modulation.lin",
        "single_blocks.{i}.norm.key_norm",
        "single_blocks.{i}.norm.query_norm",
        "time_in.in_layer",
        "time_in.out_layer",
        "txt_in",
        "vector_in.in_layer",
        "vector_in.out_layer",
    ),
    default_alpha="rank",
    default_why="it is applied at scale 1 (alpha = rank)",
    every_consumer_reads_alpha=False,
    carries=("a whole control adapter: every module, biases of lora_B, whole norm layers", "a rank for each module"),
    cannot_carry=("an adapter of some modules alone", "alpha: loraconv folds the scale into lora_B and its bias"),
    facts="black-forest-labs/flux src/flux/modules/lora.py",
)

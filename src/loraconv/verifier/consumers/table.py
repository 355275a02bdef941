"""What the consumers of CogVideoX adapters do with a file: data alone, which ``consumers`` interprets.

The rows of diffusers and peft were read in those releases' sources and are tested against the releases themselves
(``tests/test_consumers.py``; the older ones with ``pytest -m old_consumers``). The other rows are read in the public
sources that they name and were not run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ByConfig:
    """A consumer that makes a layer for each module that a configuration names, and fills it with the keys that fit.

    ``prefix`` is what stands before module names; a key without it is dropped, or, ``unless_all_lack_it``, kept where
    no key has it. ``must_contain``: a key without this word raises. ``ignored``: a key with this word is dropped
    first. ``renames``: replacements inside keys, made where the first key has no ``lora_A``. ``config`` is where
    alpha and rank are read; without any, the ranks are those of the tensors and ``default_alpha`` says alpha:
    ``rank``; the ``first`` key's rank for every module; or ``first, if one differs``, else its own. ``required``: a
    configuration without one of these raises. ``layers_by``: whether the configuration's ``target_modules`` or the
    keys of the file say which layers are made. ``peft`` is the oldest peft of its time. ``strict``: a field that peft
    does not know raises; else it is passed over. ``dora`` and ``bias``: whether magnitudes and biases of ``lora_B``
    are applied. ``unfilled`` is what a layer computes whose factors are not in the file: numbers that are
    ``undefined``, or ``nothing``. ``in_memory``: the adapter's name in a key that it takes all the same.
    """

    name: str
    meant_for: tuple[str, ...]
    mend: str
    facts: str
    prefix: str
    config: Literal["nowhere", "header", "adapter_config.json"]
    peft: tuple[int, int]
    default_alpha: Literal["rank", "first", "first, if one differs"] = "rank"
    unless_all_lack_it: bool = False
    must_contain: str = ""
    ignored: str = ""
    renames: Pairs = ()
    required: tuple[str, ...] = ("target_modules",)
    strict: bool = True
    layers_by: Literal["targets", "keys"] = "targets"
    dora: bool = True
    bias: bool = True
    unfilled: Literal["undefined", "nothing"] = "undefined"
    in_memory: str = ""


@dataclass(frozen=True, slots=True)
class ByName:
    """A consumer that looks for names which it makes of its own model's modules, and adds what it finds.

    ``names`` are pairs of its own and diffusers' module name; ``dotted`` and ``underscored`` prefixes stand before
    them as they are, or with every dot written as an underscore. ``factors`` are endings of (down, up). Alpha is a
    tensor ``.alpha`` beside them, and the rank where there is none. ``magnitude`` is the ending of DoRA's magnitudes.
    ``unknown``: what it does with any other key. ``delegates``: with a key that contains the first word, everything is
    left to the consumer of the second name. ``divides``: with one of these words in the file's path, and when it is
    told to fuse, it applies 1/rank of that. ``lacks`` says why it finds nothing at all; ``instead``, who does, where no
    format mends that.
    """

    name: str
    meant_for: tuple[str, ...]
    mend: str
    facts: str
    names: Pairs
    factors: Pairs
    dotted: tuple[str, ...] = ()
    underscored: tuple[str, ...] = ()
    magnitude: str = ""
    unknown: Literal["dropped", "raises"] = "dropped"
    delegates: tuple[str, str] = ("", "")
    divides: tuple[str, ...] = ()
    lacks: str = ""
    instead: str = ""


Consumer = ByConfig | ByName

#: The modules of CogVideoXTransformer3DModel that can carry a LoRA: its linear layers and its patch convolution.
MODULES = (
    "transformer_blocks.{i}.attn1.to_q",
    "transformer_blocks.{i}.attn1.to_k",
    "transformer_blocks.{i}.attn1.to_v",
    "transformer_blocks.{i}.attn1.to_out.0",
    "transformer_blocks.{i}.ff.net.0.proj",
    "transformer_blocks.{i}.ff.net.2",
    "transformer_blocks.{i}.norm1.linear",
    "transformer_blocks.{i}.norm2.linear",
    "patch_embed.proj",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "ofs_embedding.linear_1",
    "ofs_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
#: ComfyUI's own names of the same: Comfy-Org/ComfyUI comfy/ldm/cogvideo/model.py, CogVideoXBlock.
_COMFY_MODULES = (
    ("blocks.{i}.q", "transformer_blocks.{i}.attn1.to_q"),
    ("blocks.{i}.k", "transformer_blocks.{i}.attn1.to_k"),
    ("blocks.{i}.v", "transformer_blocks.{i}.attn1.to_v"),
    ("blocks.{i}.attn_out", "transformer_blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.ff_proj", "transformer_blocks.{i}.ff.net.0.proj"),
    ("blocks.{i}.ff_out", "transformer_blocks.{i}.ff.net.2"),
    ("blocks.{i}.norm1.linear", "transformer_blocks.{i}.norm1.linear"),
    ("blocks.{i}.norm2.linear", "transformer_blocks.{i}.norm2.linear"),
    ("patch_embed.proj", "patch_embed.proj"),
    ("patch_embed.text_proj", "patch_embed.text_proj"),
    ("time_embedding_linear_1", "time_embedding.linear_1"),
    ("time_embedding_linear_2", "time_embedding.linear_2"),
    ("ofs_embedding_linear_1", "ofs_embedding.linear_1"),
    ("ofs_embedding_linear_2", "ofs_embedding.linear_2"),
    ("norm_out.linear", "norm_out.linear"),
    ("proj_out", "proj_out"),
)

#: Endings of (down, up) in the order in which ComfyUI looks for them: comfy/weight_adapter/lora.py, LoRAAdapter.load.
_COMFY_FACTORS = (
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_A", ".lora_B"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
_KOHYA_FACTORS = ((".lora_down.weight", ".lora_up.weight"),)

#: Every spelling above and peft's: what a factor's key can end with, and what can stand before the module's name.
FACTORS = _COMFY_FACTORS
DOTTED = ("transformer.base_model.model.", "base_model.model.", "diffusion_model.", "transformer.", "")
UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

#: diffusers ``utils/state_dict_utils.py``, UNET_TO_DIFFUSERS and KEYS_TO_ALWAYS_REPLACE; the first that fits is made.
_OLD_NAMES = (
    (".to_out_lora.up", ".to_out.0.lora_B"),
    (".to_out_lora.down", ".to_out.0.lora_A"),
    (".to_q_lora.down", ".to_q.lora_A"),
    (".to_q_lora.up", ".to_q.lora_B"),
    (".to_k_lora.down", ".to_k.lora_A"),
    (".to_k_lora.up", ".to_k.lora_B"),
    (".to_v_lora.down", ".to_v.lora_A"),
    (".to_v_lora.up", ".to_v.lora_B"),
    (".lora.up", ".lora_B"),
    (".lora.down", ".lora_A"),
)

#: Fields of peft's LoraConfig -> the first release that knows it. Whoever builds one from a file raises on others.
CONFIG_FIELDS: dict[str, tuple[int, int]] = {
    "alora_invocation_tokens": (0, 18),
    "alpha_pattern":           (0, 13),
    "arrow_config":            (0, 18),
    "auto_mapping":            (0, 13),
    "base_model_name_or_path": (0, 13),
    "bias":                    (0, 13),
    "corda_config":            (0, 15),
    "ensure_weight_tying":     (0, 18),
    "eva_config":              (0, 14),
    "exclude_modules":         (0, 14),
    "fan_in_fan_out":          (0, 13),
    "inference_mode":          (0, 13),
    "init_lora_weights":       (0, 13),
    "kasa_config":             (0, 21),
    "layer_replication":       (0, 13),
    "layers_pattern":          (0, 13),
    "layers_to_transform":     (0, 13),
    "loftq_config":            (0, 13),
    "lora_alpha":              (0, 13),
    "lora_bias":               (0, 14),
    "lora_dropout":            (0, 13),
    "lora_ga_config":          (0, 19),
    "megatron_config":         (0, 13),
    "megatron_core":           (0, 13),
    "modules_to_save":         (0, 13),
    "monteclora_config":       (0, 20),
    "peft_type":               (0, 13),
    "peft_version":            (0, 18),
    "qalora_group_size":       (0, 16),
    "r":                       (0, 13),
    "rank_pattern":            (0, 13),
    "revision":                (0, 13),
    "runtime_config":          (0, 13),
    "target_modules":          (0, 13),
    "target_parameters":       (0, 17),
    "task_type":               (0, 13),
    "trainable_token_indices": (0, 15),
    "use_bdlora":              (0, 19),
    "use_dora":                (0, 13),
    "use_qalora":              (0, 16),
    "use_rslora":              (0, 13),
    "velora_config":           (0, 20),
}  # fmt: skip
#: Fields that the interpreter follows, and fields from which nothing is computed.
FOLLOWED = {
    "alpha_pattern",
    "exclude_modules",
    "lora_alpha",
    "lora_bias",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
NOTES = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
#: peft's defaults of the other fields, where they are neither false nor empty.
DEFAULTS: dict[str, object] = {
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}

_DIFFUSERS = ByConfig(
    name="diffusers",
    meant_for=("diffusers",),
    mend="diffusers",
    facts="",
    prefix="transformer.",
    config="header",
    peft=(0, 20),
    must_contain="lora",
    ignored="dora_scale",
    renames=_OLD_NAMES,
)
_PEFT = ByConfig(
    name="peft",
    meant_for=("peft",),
    mend="peft",
    facts="",
    prefix="base_model.model.",
    config="adapter_config.json",
    peft=(0, 15),
    strict=False,
    unfilled="nothing",
)

CONSUMERS: tuple[Consumer, ...] = (
    replace(
        _DIFFUSERS,
        name="diffusers 0.31",
        # Without the dot: transformer_blocks of a file without prefix pass as well.
        prefix="transformer",
        config="nowhere",
        default_alpha="first",
        dora=False,
        bias=False,
        peft=(0, 13),
        facts="huggingface/diffusers loaders/lora_pipeline.py CogVideoXLoraLoaderMixin.load_lora_into_transformer",
    ),
    replace(
        _DIFFUSERS,
        name="diffusers 0.32",
        config="nowhere",
        unless_all_lack_it=True,
        # _maybe_adjust_config compares a module's name with a rank, which always differ.
        default_alpha="first, if one differs",
        peft=(0, 14),
        facts="huggingface/diffusers loaders/peft.py PeftAdapterMixin.load_lora_adapter, _maybe_adjust_config",
    ),
    replace(
        _DIFFUSERS,
        name="diffusers 0.33",
        config="nowhere",
        default_alpha="first",
        peft=(0, 15),
        facts="huggingface/diffusers#10187, loaders/peft.py PeftAdapterMixin.load_lora_adapter",
    ),
    replace(
        _DIFFUSERS,
        name="diffusers 0.34",
        default_alpha="first",
        required=("rank_pattern", "target_modules"),
        peft=(0, 15),
        facts="huggingface/diffusers#11324, utils/peft_utils.py _maybe_raise_error_for_ambiguous_keys",
    ),
    replace(
        _DIFFUSERS,
        name="diffusers 0.35 to 0.39",
        default_alpha="first",
        required=("rank_pattern", "target_modules"),
        layers_by="keys",
        peft=(0, 17),
        facts="huggingface/diffusers loaders/peft.py PeftAdapterMixin.load_lora_adapter (state_dict=state_dict)",
    ),
    replace(
        _DIFFUSERS,
        name="diffusers 0.40 and later",
        layers_by="keys",
        facts="huggingface/diffusers#14409, utils/peft_utils.py get_peft_kwargs, _create_lora_config",
    ),
    replace(
        _PEFT,
        name="peft 0.15 to 0.20",
        facts="huggingface/peft PeftModel.from_pretrained, utils/save_and_load.py set_peft_model_state_dict",
    ),
    replace(
        _PEFT,
        name="peft 0.21 and later",
        in_memory="default",
        peft=(0, 21),
        facts="huggingface/peft tuners/tuners_utils.py BaseTuner._remap_adapter_state_dict_for_load",
    ),
    ByName(
        name="ComfyUI",
        meant_for=("comfyui",),
        mend="",
        instead="ComfyUI-CogVideoXWrapper",
        # model_lora_keys_unet has branches for the diffusers names of other models, and none for CogVideoX.
        facts="Comfy-Org/ComfyUI comfy/lora.py model_lora_keys_unet and load_lora, Comfy-Org/ComfyUI#13351",
        names=_COMFY_MODULES,
        factors=_COMFY_FACTORS,
        dotted=("diffusion_model.",),
        underscored=("lora_unet_",),
        magnitude=".dora_scale",
    ),
    ByName(
        name="ComfyUI-CogVideoXWrapper",
        meant_for=("diffusers", "kohya"),
        mend="diffusers",
        facts="kijai/ComfyUI-CogVideoXWrapper model_loading.py loadmodel, lora_utils.py merge_lora; #307",
        names=tuple((name, name) for name in MODULES),
        factors=_KOHYA_FACTORS,
        underscored=("lora_unet__", "lora_unet_"),
        unknown="raises",
        delegates=("lora_B", "diffusers 0.40 and later"),
        divides=("orbit", "dimensionx"),
    ),
    ByName(
        name="kohya sd-scripts",
        meant_for=(),
        mend="",
        facts="kohya-ss/sd-scripts networks/lora.py create_network_from_weights, LoRANetwork.load_state_dict",
        names=(),
        factors=_KOHYA_FACTORS,
        underscored=("lora_unet_",),
        lacks="it has no CogVideoX model",
    ),
)

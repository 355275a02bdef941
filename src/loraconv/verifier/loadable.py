"""What a consumer needs before it looks at a single number: file names, key prefixes, settings that build the modules.

Stated for the three formats of loraconv itself, from what diffusers, peft and SAT look for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraconv.errors import ProofFailed
from loraconv.lazy import TensorRef
from loraconv.names import printable
from loraconv.verifier.oracles import by_component, by_pattern, header_config, sat_setting, whole_norms

Tensors = Mapping[str, TensorRef]
#: What ``load_lora_weights``, ``PeftModel.from_pretrained`` and SAT's ``load_checkpoint`` open. SAT's is in a folder
#: that ``latest`` names.
_ADAPTER_FILES = {
    "bfl-control": "flux_control_lora.safetensors",
    "comfyui": "comfyui_lora.safetensors",
    "diffsynth": "diffsynth_lora.safetensors",
    "kohya": "kohya_lora.safetensors",
    "lycoris": "lycoris.safetensors",
    "onetrainer": "onetrainer_lora.safetensors",
    "videox-fun": "videox_fun_lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "sat": "mp_rank_00_model_states.pt",
}
SETTINGS_FILES = {"peft": "adapter_config.json", "sat": "training_config.yaml"}
_BASE_FILE = "diffusion_pytorch_model{}.safetensors"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}

#: The mathematics of plain LoRA, which the pairs are compared for, and notes that nothing is computed from.
_COMPARED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
_NOTES = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}
#: peft's own defaults that are neither false nor empty.
_DEFAULTS = {
    "bias": "none",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "qalora_group_size": 16,
}


def adapter_file(kind: str, folder: Path, files: Sequence[str]) -> str:
    """The file that a consumer of this format opens in ``folder``; raises unless it is the one that was written.

    Nothing is known about the names of another package's format.
    """
    if kind not in _ADAPTER_FILES:
        return files[0]
    name = _ADAPTER_FILES[kind]
    if kind == "sat":
        name = f"{(folder / 'latest').read_text(encoding='utf-8').strip()}/{name}"
    _check_files(folder, [name], files)
    return name


def check_base_files(folder: Path, files: Sequence[str]) -> None:
    """The file or the numbered shards that ``from_pretrained`` opens."""
    count = len(files)
    numbered = [f"-{n:05d}-of-{count:05d}" for n in range(1, count + 1)]
    _check_files(folder, [_BASE_FILE.format(n) for n in (numbered if count > 1 else [""])], files)


def _check_files(folder: Path, wanted: list[str], files: Sequence[str]) -> None:
    beside = (folder / wanted[0]).parent
    found = {path for path in beside.iterdir() if path.suffix in _WEIGHTS} if beside.is_dir() else set()
    if sorted(files) != wanted or found != {folder / name for name in wanted}:
        told = ", ".join(dict.fromkeys([*files, *sorted(path.name for path in found)]))
        raise unloadable(f"they look for {printable(wanted[0])}, written was {printable(told)}")


def check_torch(root: Mapping[Any, Any]) -> None:
    """The parts of SAT's payload that its loader trusts."""
    world = root["mp_world_size"]
    if type(world) is not int or world != 1:
        raise unloadable(f"mp_world_size is {world!r}, the file is one rank's")


def check_written(
    kind: str, tensors: Tensors, metadata: Mapping[str, str], settings: Mapping[str, Any] | None, *, dora: bool = False
) -> None:
    """Raise :class:`ProofFailed` where a consumer would not build the right modules from what was written.

    A consumer makes the modules that the configuration names, of the rank that it names, before it fills them; and
    diffusers passes over every key without the component's prefix. ``dora``: there are magnitudes besides ``tensors``.
    """
    if kind == "bfl-control":
        _check_control(tensors)
    if kind not in ("diffusers", "peft", "sat"):
        return
    if kind == "sat":
        ranks = {ref.shape[0] for name, ref in tensors.items() if ".matrix_A." in name}
        told = {sat_setting(settings, "r")}
        if ranks != told:
            raise unloadable(f"the settings say r = {told}, the factors have {ranks}")
        return
    if kind == "peft":
        _check_modules("base_model.model.", tensors, _peft_config(settings), dora)
        return
    factors, _ = whole_norms(tensors)
    if any(not name.startswith("transformer.") for name in tensors.keys() - factors.keys()):
        raise unloadable("whole norms without the prefix transformer.")
    components = by_component(factors)
    _check_header(metadata, components)
    for component, own in components.items():
        # by_component leaves the transformer's prefix where it is
        prefix = "transformer." if component == "transformer" else ""
        _check_modules(prefix, own, header_config(metadata, component), dora)


#: diffusers looks for the first to know the format, ComfyUI for the others.
_CONTROL = ("query_norm.scale", "single_blocks.0.norm.key_norm.scale", "img_in.lora_A.weight")


def _check_control(tensors: Tensors) -> None:
    missing = [end for end in _CONTROL if not any(name.endswith(end) for name in tensors)]
    if missing:
        raise unloadable(f"they know a control LoRA by {missing[0]}, which is not there")


def _check_modules(prefix: str, tensors: Tensors, config: Mapping[str, Any], dora: bool) -> None:
    """The modules of the file are those that the configuration makes, each of the rank that it says."""
    names = {name.removeprefix(prefix).rpartition(".lora_")[0] for name in tensors if name.startswith(prefix)}
    biases = any(name.endswith(".lora_B.bias") for name in tensors)
    if len(names) * (2 + biases) != len(tensors):
        raise unloadable(f"keys without the prefix {prefix}, or biases of some modules alone")
    for key, there, what in (("use_dora", dora, "magnitudes"), ("lora_bias", biases, "biases of lora_B")):
        if (config.get(key) is True) != there:
            raise unloadable(f"{key} is {config.get(key)!r}, {what} are {'there' if there else 'not there'}")
    _check_plain({key: value for key, value in config.items() if key not in ("use_dora", "lora_bias")})
    # peft asks for the end of a name, and transformers 5 has text encoders without this step.
    wanted = {name.removeprefix("text_model.") for name in names}
    if not isinstance(config["target_modules"], list) or wanted != set(config["target_modules"]):
        raise unloadable("target_modules are not the modules of the file")
    wrong = [n for n in names if tensors[f"{prefix}{n}.lora_A.weight"].shape[0] != by_pattern(config, "r", n)]
    if wrong:
        raise unloadable(f"another rank than the configuration says: {wrong[0]}")


def _peft_config(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    config = settings or {}
    if config["peft_type"] != "LORA":
        raise unloadable(f"adapter_config.json says peft_type = {config['peft_type']!r}")
    return config


def _check_header(metadata: Mapping[str, str], components: Iterable[str]) -> None:
    begins = tuple(f"{component}." for component in components)
    bare = [key for key in json.loads(metadata["lora_adapter_metadata"]) if not key.startswith(begins)]
    if bare:
        raise unloadable(f"header keys without the prefix {' or '.join(begins)}: {printable(', '.join(bare))}")


def _check_plain(config: Mapping[str, Any]) -> None:
    """Whatever is not plain LoRA must be as if it were not there."""
    for key in sorted({*config} - _COMPARED - _NOTES):
        value = config[key]
        default = _DEFAULTS.get(key)
        if value is not None and value != default and (default is not None or value not in (False, [], {})):
            raise unloadable(f"the configuration asks for more than plain LoRA: {printable(f'{key} = {value!r}')}")


def unloadable(why: str) -> ProofFailed:
    """The refusal of an output that its consumers would not load as it is."""
    return ProofFailed(
        "consumers would not load the written output as it is",
        why=why,
        hint="please report this, with the output of loraconv inspect on the source",
    )

"""Consumers that make peft's layers after a configuration and fill them by key: diffusers and peft itself."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loraconv.names import printable
from loraconv.verifier.consumers.reading import AdapterFile, Reading, Refused, Scale, Unsure, template
from loraconv.verifier.consumers.table import CONFIG_FIELDS, DEFAULTS, FOLLOWED, MODULES, NOTES, ByConfig

#: What follows ``.lora_`` in a key -> the parameter of peft's layer.
_PARAMETERS = {
    "A.weight": "down",
    "B.weight": "up",
    "B.bias": "bias",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}
#: peft's defaults where a configuration says neither.
_RANK, _ALPHA = 8, 8


@dataclass(frozen=True, slots=True)
class _Made:
    """The layers that the consumer makes: module -> (rank, scale); whether they have magnitudes and biases; and the
    oldest peft that takes the configuration, if not all of the consumer's time do."""

    layers: Mapping[str, tuple[int, Scale]]
    magnitudes: bool
    bias: bool
    needs: str = ""


def read_by_config(consumer: ByConfig, file: AdapterFile) -> Reading:
    """What the consumer makes of the file. Raises :class:`Refused` and :class:`Unsure`."""
    kept = _kept(consumer, list(file.tensors))
    shapes = {key: file.tensors[name].shape for key, name in kept.items()}
    config = _stated(consumer, file)
    if not kept and consumer.config != "adapter_config.json":
        return Reading(consumer.name, dropped=tuple(file.tensors))
    made = _inferred(consumer, shapes) if config is None else _configured(consumer, config, shapes, file.tensors)
    filled = _filled(consumer, made, kept)
    for module, parameters in filled.items():
        _check_size(module, made.layers[module][0], parameters, shapes)
    undefined = _undefined(consumer, made, filled)
    applied = {kept[key] for parameters in filled.values() for key in parameters.values()}
    return Reading(
        consumer.name,
        scales={m: made.layers[m][1] for m, p in filled.items() if {"down", "up"} <= {*p} and m not in undefined},
        undefined=undefined,
        dropped=tuple(name for name in file.tensors if name not in applied),
        magnitudes=made.magnitudes,
        needs=made.needs,
    )


def _kept(consumer: ByConfig, names: list[str]) -> dict[str, str]:
    """The keys that the consumer looks at, as it spells them -> as the file does."""
    if consumer.ignored:
        names = [name for name in names if consumer.ignored not in name]
    if not all(consumer.must_contain in name for name in names):
        raise Refused("Invalid LoRA checkpoint", f"a key does not contain the word {consumer.must_contain}")
    ours = [name for name in names if name.startswith(consumer.prefix)]
    if not ours and consumer.unless_all_lack_it:
        ours = names
    kept = {name.removeprefix(consumer.prefix.rstrip(".") + "."): name for name in ours}
    if kept and "lora_A" not in next(iter(kept)):
        return {_renamed(consumer, key): name for key, name in kept.items()}
    return kept


def _renamed(consumer: ByConfig, key: str) -> str:
    if not consumer.renames:
        return key
    key = key.replace(".processor.", ".")
    old, new = next((pair for pair in consumer.renames if pair[0] in key), ("", ""))
    return key.replace(old, new) if old else key


def _stated(consumer: ByConfig, file: AdapterFile) -> Mapping[str, Any] | None:
    """The configuration that the file brings, None where the consumer infers one."""
    if consumer.config == "adapter_config.json":
        if file.settings is None:
            raise Refused("adapter_config.json", "there is no adapter_config.json beside an adapter_model file")
        kind = file.settings.get("peft_type")
        if kind is None:
            raise Refused("KeyError", "adapter_config.json has no peft_type")
        if kind != "LORA":
            raise Unsure(f"peft_type is {printable(str(kind), 40)}, which is no LoRA")
        return file.settings
    text = file.metadata.get("lora_adapter_metadata") if consumer.config == "header" else None
    if not text:
        return None
    try:
        stated = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("JSONDecodeError", "lora_adapter_metadata in the header is not JSON") from None
    if not isinstance(stated, dict):
        raise Refused("AttributeError", "lora_adapter_metadata in the header is not an object")
    return {k.removeprefix("transformer."): v for k, v in stated.items() if k.startswith("transformer.")}


def _inferred(consumer: ByConfig, shapes: Mapping[str, tuple[int, ...]]) -> _Made:
    """Ranks from the tensors, alpha by the consumer's rule, layers from the keys."""
    ranks = {}
    for key, shape in shapes.items():
        if "lora_B" in key and len(shape) > 1:
            ranks[key.split(".lora_B")[0]] = shape[1]
        elif "lora_B" in key and not consumer.bias:
            raise Refused("IndexError: tuple index out of range", "it takes the rank from every lora_B, biases too")
    if not ranks:
        raise Refused("IndexError: list index out of range", "no key holds lora_B, from which it takes the rank")
    first, common = next(iter(ranks.values())), Counter(ranks.values()).most_common()[0][0]
    odd = sum(rank != common for rank in ranks.values())
    by_rank = consumer.default_alpha == "rank" or (consumer.default_alpha == "first, if one differs" and odd > 1)
    layers = {}
    for module in _known({key.split(".lora")[0] for key in shapes}):
        rank = ranks.get(module, common)
        layers[module] = rank, Fraction(1) if by_rank else Fraction(first, rank)
    magnitudes = consumer.dora and any("lora_magnitude_vector" in key for key in shapes)
    bias = any("lora_B" in key and key.endswith(".bias") for key in shapes)
    return _Made(layers, magnitudes, bias)


def _configured(consumer: ByConfig, config: Mapping[str, Any], kept: Collection[str], names: Collection[str]) -> _Made:
    """Ranks, alphas and, where the consumer goes by them, layers from a configuration. ``names``: the file's keys."""
    absent = [name for name in consumer.required if config.get(name) is None]
    if absent:
        raise Refused("KeyError", f"the configuration has no {absent[0]}")
    strange = [name for name in config if name not in CONFIG_FIELDS]
    if strange and consumer.strict:
        raise Refused("could not be instantiated", f"no peft knows the configuration's {printable(strange[0], 60)}")
    for name in sorted({*config} & {*CONFIG_FIELDS} - FOLLOWED - NOTES):
        if config[name] not in (None, False, [], {}, DEFAULTS.get(name)):
            raise Unsure(f"the configuration sets {name}, which the table does not follow")
    by_keys = consumer.layers_by == "keys"
    known = _known({key.rpartition(".lora_")[0] for key in kept}) if by_keys else _targeted(config, names)
    layers = {module: _rank_and_scale(config, module) for module in known}
    needed = max(CONFIG_FIELDS[name] for name in config if name in CONFIG_FIELDS)
    needs = "peft {}.{}".format(*needed) if consumer.strict and needed > consumer.peft else ""
    return _Made(layers, config.get("use_dora") is True, config.get("lora_bias") is True, needs)


def _known(modules: Collection[str]) -> list[str]:
    """Those of the modules that the model has. Raises :class:`Refused` if it has none of them."""
    known = [m for m in sorted(modules) if any(template(text).fullmatch(m) for text in MODULES)]
    if not known:
        raise Refused("not found in the base model", "CogVideoX has none of the modules that the keys name")
    return known


def _targeted(config: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The modules of the layers that the keys name, and those outside of layers, that ``target_modules`` selects."""
    numbers = {match.group(1) for name in names if (match := re.search(r"blocks[._](\d+)", name))} or {"0"}
    there = [text.replace("{i}", n) for text in MODULES for n in (sorted(numbers, key=int) if "{i}" in text else [""])]
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    found = [m for m in there if targets == "all-linear" or _selects(targets, m)]
    if not found:
        raise Refused("not found in the base model", "CogVideoX has none of the configuration's target_modules")
    return [m for m in found if not _selects(excluded, m)]


def _selects(targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return _pattern(targets).fullmatch(module) is not None
    if not isinstance(targets, list):
        raise Refused("TypeError", "target_modules are neither a list nor a pattern")
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, Scale]:
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", _RANK))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", _ALPHA))
    if type(rank) is not int or rank <= 0:
        raise Refused("ValueError", "the rank is no positive integer")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise Unsure(f"alpha is {printable(repr(alpha), 40)}")
    if config.get("use_rslora") is not True:
        return rank, Fraction(alpha) / rank
    root = math.isqrt(rank)
    return rank, Fraction(alpha) / root if root * root == rank else float(alpha) / math.sqrt(rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """peft's ``get_pattern_key``: the first expression that fits the whole name, or its end behind a dot."""
    for expression, value in patterns.items() if isinstance(patterns, dict) else ():
        if _pattern(str(expression), r"(.*\.)?({})$").match(module):
            return value
    return default


def _pattern(expression: str, frame: str = "{}") -> re.Pattern[str]:
    # An expression from a file must not be able to keep the matcher busy for years.
    if len(expression) > 200 or len(re.findall(r"[*+?{]", expression)) > 2 or re.search(r"\)[*+?{]", expression):
        raise Unsure(f"a pattern of the configuration is too complicated: {printable(expression, 60)}")
    try:
        return re.compile(frame.format(expression))
    except re.error:
        raise Refused("error", f"no regular expression: {printable(expression, 60)}") from None


def _filled(consumer: ByConfig, made: _Made, kept: Collection[str]) -> dict[str, dict[str, str]]:
    """Module -> parameter -> the key that fills it."""
    wanted = {"down", "up", *(["magnitude"] if made.magnitudes else []), *(["bias"] if made.bias else [])}
    filled: dict[str, dict[str, str]] = {}
    for key in kept:
        module, _, rest = key.rpartition(".lora_")
        if consumer.in_memory:
            rest = rest.replace(f".{consumer.in_memory}.", ".")
        parameter = _PARAMETERS.get(rest)
        if parameter in wanted and module in made.layers:
            filled.setdefault(module, {})[str(parameter)] = key
    return filled


def _check_size(module: str, rank: int, parameters: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for parameter, dim in (("down", 0), ("up", 1)):
        shape = shapes[parameters[parameter]] if parameter in parameters else ()
        if shape and (len(shape) <= dim or shape[dim] != rank):
            why = f"it expects rank {rank} for {printable(module)}, and the file's is another"
            raise Refused("size mismatch for", why)


def _undefined(consumer: ByConfig, made: _Made, filled: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """The modules of which a needed parameter is not in the file."""
    whole = 2 + made.magnitudes + made.bias
    short = [module for module in made.layers if len(filled.get(module, ())) < whole]
    if consumer.unfilled == "undefined":
        return tuple(short)
    if any({"down", "up"} <= {*filled.get(module, ())} for module in short):
        raise Unsure("some modules lack the magnitudes or biases that the configuration asks for")
    # peft begins with a random down and an up of zeros, so that what is not filled adds nothing.
    return tuple(module for module in short if "up" in filled.get(module, ()))

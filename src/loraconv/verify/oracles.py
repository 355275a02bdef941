"""What each adapter format says, in this module's own words: module (diffusers name) -> factors and scale.

Written from the formats' definitions (SwissArmyTransformer ``lora2.py``, diffusers ``loaders``, peft ``tuners/lora``),
not from the tables that the converter uses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import yaml

from loraconv.errors import ProofFailed
from loraconv.lazy import TensorRef, read
from loraconv.names import printable
from loraconv.verify.numbers import Held, Pair, difference_norm, product_norm, values

_SAT_FACTOR = re.compile(
    r"model\.diffusion_model\.transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d+)"
)
_SAT_MODULES = {
    ("query_key_value", 0): "to_q",
    ("query_key_value", 1): "to_k",
    ("query_key_value", 2): "to_v",
    ("dense", 0): "to_out.0",
}
Tensors = Mapping[str, TensorRef]


def sat_pairs(ranks: list[Tensors], settings: Mapping[str, Any] | None, alpha: Fraction | None) -> dict[str, Pair]:
    """SAT: ``W + (lora_alpha / r) * matrix_B.n @ matrix_A.n``; n = 0, 1, 2 is q, k, v; ``lora_alpha`` is 1 unless set.

    With several model-parallel ranks: the mean over ranks of what each of them added (see :func:`_mean_over_ranks`).
    """
    found = [_sat_factors(tensors) for tensors in ranks]
    told = _sat_alpha(settings) if alpha is None else alpha
    pairs = {}
    for (layer, kind, part), sides in found[0].items():
        module = f"transformer_blocks.{layer}.attn1.{_SAT_MODULES[kind, part]}"
        if len(found) == 1:
            down, up = sides["A"], sides["B"]
            pairs[module] = Pair(down, up, told / down.shape[0])
        else:
            pairs[module] = _mean_over_ranks([f[layer, kind, part] for f in found], kind, told)
    return pairs


def _sat_factors(tensors: Tensors) -> dict[tuple[int, str, int], dict[str, TensorRef]]:
    factors: dict[tuple[int, str, int], dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        match = _SAT_FACTOR.fullmatch(name)
        if match is None and ".matrix_" in name:
            raise _not_covered(name)
        if match:
            layer, kind, side, part = match.groups()
            factors.setdefault((int(layer), kind, int(part)), {})[side] = ref
    return factors


def _not_covered(name: str) -> ProofFailed:
    return ProofFailed(
        f"the source holds a tensor that the proof does not cover: {printable(name)}",
        hint="please report this, with the output of loraconv inspect on the source",
    )


def _mean_over_ranks(sides: list[dict[str, TensorRef]], kind: str, alpha: Fraction) -> Pair:
    """Column-parallel (q, k, v): rank k computes its own rows of the output, from its copy of A; A is averaged.

    Row-parallel (dense): rank k sees its own columns of the input and adds ``B_k A_k`` of them alone. The mean over
    ranks of what they add is ``mean(B) @ [A_0, A_1, ...] / ranks``, B being copies that drifted apart slightly.
    """
    import numpy as np

    count = len(sides)
    downs, ups = [read(s["A"]) for s in sides], [read(s["B"]) for s in sides]
    dtype_a, dtype_b = sides[0]["A"].dtype, sides[0]["B"].dtype
    if kind == "query_key_value":
        down, up = np.sum(downs, axis=0) / count, np.concatenate(ups, axis=0)
    else:
        down, up = np.concatenate(downs, axis=1), np.sum(ups, axis=0) / count / count
    return Pair(Held(down, dtype_a), Held(up, dtype_b), alpha / down.shape[0])


def rank_distances(ranks: list[Tensors]) -> dict[str, float]:
    """How far the nearest single adapter is from what the ranks computed: projection -> relative Frobenius error of
    the delta, the worst over layers and ranks. A rank is compared in the rows or columns that it held."""
    found = [_sat_factors(tensors) for tensors in ranks]
    worst: dict[str, float] = {}
    for key in found[0]:
        sides = [f[key] for f in found]
        merged = _mean_over_ranks(sides, key[1], Fraction(1))
        up, down = values(merged.up), values(merged.down)
        for number, own in enumerate(sides):
            own_up, own_down = read(own["B"]), read(own["A"])
            if key[1] == "query_key_value":
                rows = slice(number * own_up.shape[0], (number + 1) * own_up.shape[0])
                gap = difference_norm(own_up, own_down, up[rows], down)
            else:
                whole = down * 0
                whole[:, number * own_down.shape[1] : (number + 1) * own_down.shape[1]] = own_down
                gap = difference_norm(own_up, whole, up, down)
            size = product_norm(own_up, own_down)
            name = _SAT_MODULES[key[1], key[2]]
            worst[name] = max(worst.get(name, 0.0), gap / size if size else gap)
    return worst


def _sat_alpha(settings: Mapping[str, Any] | None) -> Fraction:
    told = _sat_setting(settings, "lora_alpha")
    return Fraction(1) if told is None else Fraction(told)


def _sat_setting(settings: Mapping[str, Any] | None, key: str) -> Any:
    here: Any = settings
    for step in ("model", "network_config", "params", "modules", "lora_config", "params", key):
        here = here.get(step) if isinstance(here, Mapping) else None
    return here


def diffusers_pairs(tensors: Tensors, metadata: Mapping[str, str], alpha: Fraction | None) -> dict[str, Pair]:
    """diffusers: peft's rule on the header's ``lora_adapter_metadata`` (or finetrainers' ``lora_config``); else 1."""
    return _peft_like(tensors, ("transformer.", ""), _header_config(metadata), alpha)


def _header_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    if "lora_adapter_metadata" in metadata:
        stated = json.loads(metadata["lora_adapter_metadata"])
        return {key.removeprefix("transformer."): value for key, value in stated.items()}
    config: dict[str, Any] = json.loads(metadata.get("lora_config", "{}"))
    return config


def peft_pairs(tensors: Tensors, config: Mapping[str, Any], alpha: Fraction | None) -> dict[str, Pair]:
    """peft: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; both patterns are by module name."""
    return _peft_like(tensors, ("base_model.model.",), config, alpha)


def _peft_like(
    tensors: Tensors, prefixes: tuple[str, ...], config: Mapping[str, Any], alpha: Fraction | None
) -> dict[str, Pair]:
    sides: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        module, _, side = name.rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            raise _not_covered(name)
        prefix = next(p for p in prefixes if module.startswith(p))
        sides.setdefault(module[len(prefix) :], {})[side[0]] = ref
    pairs = {}
    for module, both in sides.items():
        if len(both) < 2:
            raise _not_covered(f"{module}, one factor of two")
        rank = both["A"].shape[0]
        told = alpha if alpha is not None else _peft_alpha(config, module, rank)
        pairs[module] = Pair(both["A"], both["B"], _peft_scale(told, rank, config.get("use_rslora") is True))
    return pairs


def _peft_alpha(config: Mapping[str, Any], module: str, rank: int) -> Fraction:
    for key, value in (config.get("alpha_pattern") or {}).items():
        # peft anchors a key at the end of the name, behind a dot, unless it begins with ^ itself.
        if re.match(key, module) if key[:1] == "^" else re.fullmatch(f"(?:.*\\.)?(?:{key})", module):
            return Fraction(value)
    value = config.get("lora_alpha")
    return Fraction(rank) if value is None else Fraction(value)


def _peft_scale(alpha: Fraction, rank: int, rslora: bool) -> Fraction | float:
    if not rslora:
        return alpha / rank
    root = math.isqrt(rank)
    return alpha / root if root * root == rank else float(alpha) / math.sqrt(rank)


def yaml_settings(text: str) -> dict[str, Any]:
    """A settings file as plain data (no tags)."""
    value = yaml.safe_load(text)
    return value if isinstance(value, dict) else {}


def pairs_of(
    kind: str,
    ranks: list[Tensors],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any] | None,
    alpha: Fraction | None,
) -> dict[str, Pair]:
    """The adapter that a checkpoint of this format holds. ``alpha`` overrides what the files say."""
    if kind == "sat":
        return sat_pairs(ranks, settings, alpha)
    if kind == "peft":
        return peft_pairs(ranks[0], settings or {}, alpha)
    return diffusers_pairs(ranks[0], metadata, alpha)


def check_written(kind: str, tensors: Tensors, metadata: Mapping[str, str], settings: Mapping[str, Any] | None) -> None:
    """Raise :class:`ProofFailed` where a consumer would not build the right modules from what was written.

    A consumer makes the modules that the configuration names, of the rank that it names, before it fills them; and
    diffusers passes over every key without the component's prefix.
    """
    if kind == "sat":
        ranks = {ref.shape[0] for name, ref in tensors.items() if ".matrix_A." in name}
        told = {_sat_setting(settings, "r")}
        if ranks != told:
            raise _unloadable(f"the settings say r = {told}, the factors have {ranks}")
        return
    config = (settings or {}) if kind == "peft" else _header_config(metadata)
    prefix = "base_model.model." if kind == "peft" else "transformer."
    names = {name.removeprefix(prefix).rpartition(".lora_")[0] for name in tensors if name.startswith(prefix)}
    if len(names) * 2 != len(tensors):
        raise _unloadable(f"keys without the prefix {prefix}")
    if names != set(config.get("target_modules", ())):
        raise _unloadable("target_modules are not the modules of the file")
    special = config.get("rank_pattern") or {}
    wrong = [n for n in names if tensors[f"{prefix}{n}.lora_A.weight"].shape[0] != special.get(n, config.get("r"))]
    if wrong:
        raise _unloadable(f"another rank than the configuration says: {wrong[0]}")


def _unloadable(why: str) -> ProofFailed:
    return ProofFailed(
        "consumers would not load the written adapter as it is",
        why=why,
        hint="please report this, with the output of loraconv inspect on the source",
    )

"""What each adapter format says, in this module's own words: module (diffusers name) -> factors and scale.

Written from the formats' definitions (SwissArmyTransformer ``lora2.py``, diffusers ``loaders``, peft ``tuners/lora``),
not from the tables that the converter uses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from loraconv.errors import FormatError, ProofFailed
from loraconv.lazy import TensorRef, read
from loraconv.names import printable
from loraconv.verifier import file_oracles
from loraconv.verifier.algebra import as_matrix, column, special_pairs
from loraconv.verifier.numbers import Held, Pair, difference_norm, product_norm, values
from loraconv.verifier.pipeline_names import of_pipeline, with_text_model

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


def sat_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
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


_OLD_SAT_FACTOR = re.compile(r"model\.diffusion_model\.mixins\.[^.]+\.lora_linear\.(\d+)\.([QKVO])_([AB])")


def sat_lora_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """SAT's older mixin: ``lora_alpha / r * B @ A`` for q, k, v and the output projection, on one rank."""
    told = _sat_alpha(settings) if alpha is None else alpha
    sides: dict[str, dict[str, TensorRef]] = {}
    for name, ref in ranks[0].items():
        found = _OLD_SAT_FACTOR.fullmatch(name)
        if (found is None and ".lora_linear." in name) or len(ranks) > 1:
            raise _not_covered(name)
        if found:
            here = {"Q": "to_q", "K": "to_k", "V": "to_v", "O": "to_out.0"}[found[2]]
            sides.setdefault(f"transformer_blocks.{found[1]}.attn1.{here}", {})[found[3]] = ref
    return {module: Pair(s["A"], s["B"], told / s["A"].shape[0]) for module, s in sides.items()}


def is_sat_factor(name: str) -> bool:
    """True for the name of a LoRA factor in a SAT checkpoint, of either mixin."""
    return any(factor.fullmatch(name) for factor in (_SAT_FACTOR, _OLD_SAT_FACTOR))


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
    told = sat_setting(settings, "lora_alpha")
    return Fraction(1) if told is None else Fraction(told)


def sat_setting(settings: Mapping[str, Any] | None, key: str) -> Any:
    """One of the LoRA settings in a run's training YAML, or None."""
    here: Any = settings
    for step in ("model", "network_config", "params", "modules", "lora_config", "params", key):
        here = here.get(step) if isinstance(here, Mapping) else None
    return here


def diffusers_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """diffusers: peft's rule on the header's ``lora_adapter_metadata`` (or finetrainers' ``lora_config``); else 1.

    A pipeline's components have a configuration each, and names that begin with theirs. Norms of queries and keys that
    are there as a whole take the place of the base's.
    """
    factors, pairs = whole_norms(ranks[0])
    for component, tensors in by_component(factors).items():
        config = header_config(metadata, component)
        found = _peft_like(tensors, ("transformer.", ""), config, alpha)
        begin = "" if component == "transformer" else f"{component}."
        pairs |= {begin + with_text_model(component, module): pair for module, pair in found.items()}
    return pairs


#: What diffusers' FLUX pipelines load into the model itself (``_control_lora_supported_norm_keys``).
_WHOLE_NORM = re.compile(r"(?:transformer\.)?(.+\.norm_(?:added_)?[qk]\.weight)")


def whole_norms(tensors: Tensors) -> tuple[dict[str, TensorRef], dict[str, Pair]]:
    """``(everything else, whole weights of norms)``, these by the name of the parameter that they replace: a name that
    no difference has, for a difference goes by the module's."""
    found = {name: _WHOLE_NORM.fullmatch(name) for name in tensors}
    norms = {match[1]: column(tensors[name], Fraction(1)) for name, match in found.items() if match is not None}
    return {name: ref for name, ref in tensors.items() if found[name] is None}, norms


def by_component(tensors: Tensors) -> dict[str, dict[str, TensorRef]]:
    """The tensors of each component of a UNet's pipeline, without its name; all others are the transformer's."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        component, dot, rest = name.partition(".")
        if not dot or component not in ("unet", "text_encoder", "text_encoder_2"):
            component, rest = "transformer", name
        found.setdefault(component, {})[rest] = ref
    return found


def header_config(metadata: Mapping[str, str], component: str = "transformer") -> dict[str, Any]:
    """peft's configuration of a component, as diffusers takes it out of the header: only what has its prefix."""
    if "lora_adapter_metadata" in metadata:
        stated: dict[str, Any] = json.loads(metadata["lora_adapter_metadata"])
        begin = f"{component}."
        own = {key.removeprefix(begin): v for key, v in stated.items() if key.startswith(begin)}
        return own or stated
    config: dict[str, Any] = json.loads(metadata.get("lora_config", "{}"))
    return config


def peft_pairs(
    ranks: list[Tensors], metadata: Mapping[str, str], settings: Mapping[str, Any] | None, alpha: Fraction | None
) -> dict[str, Pair]:
    """peft: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; both patterns are by module name."""
    pairs = _peft_like(ranks[0], ("base_model.model.",), settings or {}, alpha)
    of_unet = of_pipeline(list(pairs), {"": "unet"})
    return dict(zip(of_unet, pairs.values(), strict=True)) if of_unet else file_oracles.of_original_names(pairs)


#: In memory the adapter's own name stands in the key; trainers that dump their state leave it there.
_PEFT_TUNER = re.compile(r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))")
_PEFT_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.(weight|bias)")


def _peft_like(
    tensors: Tensors, prefixes: tuple[str, ...], config: Mapping[str, Any], alpha: Fraction | None
) -> dict[str, Pair]:
    sides: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        found, prefix = _PEFT_FACTOR.fullmatch(name), next((p for p in prefixes if name.startswith(p)), "")
        tuner = _PEFT_TUNER.fullmatch(name)
        if tuner is not None:
            sides.setdefault(tuner[1][len(prefix) :], {})[tuner[2]] = ref
            continue
        if found is None or (found[3] == "bias" and found[2] == "A"):
            raise _not_covered(name)
        side = "bias" if found[3] == "bias" else found[2]
        sides.setdefault(found[1][len(prefix) :], {})[side] = ref
    pairs = {}
    for module, both in sides.items():
        if not {"A", "B", "bias"} & both.keys():
            pairs[module] = replace(special_pairs(both, None)[""], scale=_tuner_scale(config, module, alpha))
            continue
        if not {"A", "B"} <= both.keys():
            raise _not_covered(f"{module}, one factor of two")
        rank = both["A"].shape[0]
        told = alpha if alpha is not None else _peft_alpha(config, module, rank)
        scale = _peft_scale(told, rank, config.get("use_rslora") is True)
        pairs[module] = Pair(as_matrix(both["A"]), as_matrix(both["B"]), scale, kernel=both["A"].shape[2:])
        if "bias" in both:  # lora_B's own, which is scaled as its product is
            pairs[f"{module}.bias"] = column(both["bias"], scale)
    return pairs


def _tuner_scale(config: Mapping[str, Any], module: str, alpha: Fraction | None) -> Fraction:
    """peft's LoHa and LoKr: ``alpha / r`` by the settings, whatever the shapes."""
    told = by_pattern({**config, "lora_alpha": config.get("alpha")}, "lora_alpha", module)
    return (Fraction(told) if alpha is None else alpha) / Fraction(by_pattern(config, "r", module))


def _peft_alpha(config: Mapping[str, Any], module: str, rank: int) -> Fraction:
    value = by_pattern(config, "lora_alpha", module)
    return Fraction(rank) if value is None else Fraction(value)


def by_pattern(config: Mapping[str, Any], key: str, module: str) -> Any:
    """``r`` or ``lora_alpha`` of one module: the first pattern that fits its name, else the value for all."""
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
    for pattern, value in patterns.items():
        # peft wants the end of the name, behind a dot or from its beginning; with ^ that leaves the whole name.
        if re.fullmatch(f"(?:.*\\.)?(?:{pattern})", module):
            return value
    return config.get(key)


def _peft_scale(alpha: Fraction, rank: int, rslora: bool) -> Fraction | float:
    if not rslora:
        return alpha / rank
    root = math.isqrt(rank)
    return alpha / root if root * root == rank else float(alpha) / math.sqrt(rank)


def yaml_settings(text: str) -> dict[str, Any]:
    """A settings file as plain data (no tags)."""
    import yaml  # of a SAT run alone

    value = yaml.safe_load(text)
    return value if isinstance(value, dict) else {}


Oracle = Callable[
    [list[Tensors], Mapping[str, str], Mapping[str, Any] | None, Fraction | None],
    dict[str, Pair],
]
#: Format name -> what a checkpoint of it holds: (tensors of each rank, header, settings file, alpha of the user).
ORACLES: dict[str, Oracle] = {
    "ai-toolkit": diffusers_pairs,
    "bfl-control": file_oracles.bfl_control_pairs,
    "comfyui": file_oracles.comfyui_pairs,
    "diffsynth": file_oracles.diffsynth_pairs,
    "diffusers": diffusers_pairs,
    "diffusers-old": file_oracles.diffusers_old_pairs,
    "diffusion-pipe": file_oracles.diffusion_pipe_pairs,
    "finetrainers": diffusers_pairs,
    "genmo": file_oracles.genmo_pairs,
    "kohya": file_oracles.kohya_pairs,
    "lycoris": file_oracles.lycoris_pairs,
    "onetrainer": file_oracles.onetrainer_pairs,
    "peft": peft_pairs,
    "sat": sat_pairs,
    "sat-lora": sat_lora_pairs,
    "simpletuner": file_oracles.simpletuner_pairs,
    "tencent": file_oracles.tencent_pairs,
    "videox-fun": file_oracles.videox_fun_pairs,
    "xlabs": file_oracles.xlabs_pairs,
}
_GROUP = "loraconv.oracles"


def pairs_of(
    kind: str,
    ranks: list[Tensors],
    metadata: Mapping[str, str],
    settings: Mapping[str, Any] | None,
    alpha: Fraction | None,
) -> dict[str, Pair]:
    """The adapter that a checkpoint of this format holds. ``alpha`` overrides what the files say.

    Raises :class:`FormatError` for a format without an oracle.
    """
    return oracle_of(kind)(ranks, metadata, settings, alpha)


def oracle_of(kind: str) -> Oracle:
    """The oracle of a format: loraconv's own, or the one that an installed package names in ``loraconv.oracles``."""
    if kind in ORACLES:
        return ORACLES[kind]
    from importlib.metadata import entry_points

    for point in entry_points(group=_GROUP, name=kind):
        try:
            found: Oracle = point.load()
        except Exception as error:  # another package's code: whatever it raises, the user needs its name
            raise _bad_oracle(point.name, point.value, f"{type(error).__name__}: {error}") from error
        if not callable(found):
            raise _bad_oracle(point.name, point.value, f"it is {type(found).__name__}")
        return found
    raise FormatError(
        f"the format {printable(kind)} has no oracle, so nothing could prove that its output is right",
        why=f"no oracle in loraconv, no entry point {printable(kind)} in the group {_GROUP}",
        hint="add one as CONTRIBUTING.md says, step 4: a function like those in loraconv.verifier.oracles",
        slug="no-oracle",
    )


def _bad_oracle(name: str, value: str, why: str) -> FormatError:
    return FormatError(
        f"the entry point {printable(name)} of the group {_GROUP} gives no oracle",
        where=printable(value),
        why=printable(why),
        hint=f"uninstall or correct the package that declares {printable(value)}",
        slug="oracle-plugin",
    )

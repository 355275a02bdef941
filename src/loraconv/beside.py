"""LoRA whose up has a bias, and whole norm layers: the factors go the way of every LoRA, and these beside them.

A bias is scaled as the product is, so what is folded into ``up`` is folded into it. A whole norm takes the place of the
base's and has no scale. Facts: huggingface/peft ``tuners/lora/layer.py`` (``lora_bias``), huggingface/diffusers
``loaders/lora_pipeline.py`` (``_load_norm_into_transformer``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from loraconv.adapter import Factor
from loraconv.algebra import Special, rows_of
from loraconv.detect import Detected
from loraconv.errors import FormatError
from loraconv.fold import folded
from loraconv.lazy import Lazy
from loraconv.names import fold_names
from loraconv.naming import in_component
from loraconv.plan import Output, Plan, ScaleIn, exact_recipe, how, plan_adapter, proof_claim
from loraconv.products import read_plain
from loraconv.rules import Dialect, Family, fill
from loraconv.source import Source
from loraconv.written import family_for, naming_for, write_vectors


def can_be_beside(specials: Sequence[Special], target: Dialect) -> bool:
    """True if all of them are pairs of factors, their biases or whole norms, and the target has names for these."""
    sides = {side for one in specials for side in one.tensors} - {"down", "up", "alpha"}
    held = {*({"bias"} & {*target.more.values()}), *({"norm"} if target.norm else ())}
    return sides <= held and all(one.is_plain for one in specials)


def plan_beside(
    source: Source, detected: Detected, specials: Sequence[Special], target: Dialect, *, strict: bool, scale_in: ScaleIn
) -> Plan:
    """The factors as those of any LoRA, and biases and whole norms beside them; see :func:`can_be_beside`.

    Raises :class:`FormatError` where only some modules have a bias, where a bias would be rounded though the factors
    are not, and where the target needs more modules.
    """
    family = family_for([m for one in specials for m in one.targets], target, (detected.family, *detected.alike))
    naming = naming_for(target, family)
    pairs = [one for one in specials if one.kind == "LoRA"]
    whole = {m: v for o in specials if "norm" in o.tensors for m, v in rows_of(o.tensors["norm"], o, detected).items()}
    norms = write_vectors(whole, dict.fromkeys(whole, 0), naming)
    adapter = read_plain(source, detected, pairs, alpha=None, strict=strict)
    plan = plan_adapter(adapter, target, detected.family, alike=detected.alike, scale_in=scale_in, norms=norms.keys())
    found = {m: v for o in pairs if "bias" in o.tensors for m, v in rows_of(o.tensors["bias"], o, detected).items()}
    _refuse_some(found, adapter.factors)
    planned = {factor.module: factor for factor in plan.factors}
    biases = {f.module: _scaled(found[f.module], f, planned[f.module]) for f in adapter.factors if found}
    columns = {factor.module: factor.down.shape[1] for factor in adapter.factors}
    end = next((end for end, side in target.more.items() if side == "bias"), "")
    spelled = {f"{name}.{end}": vector for name, vector in write_vectors(biases, columns, naming).items()}
    spelled |= {fill(target.norm, {"module": name}): vector for name, vector in norms.items()}
    made = (Output(name, vector, how(vector), exact_recipe(vector)) for name, vector in spelled.items())
    file = replace(plan.files[0], outputs=(*plan.files[0].outputs, *made))
    file = replace(file, metadata={**file.metadata, **proof_claim(file.outputs)})
    plan = replace(plan, files=(file,))
    return _saying_so(plan, target, family) if biases and target.bias_at else plan


def _refuse_some(biases: dict[str, Lazy], factors: Sequence[Factor]) -> None:
    """All modules have a bias or none: peft's settings speak of all, and diffusers leaves what is missing undefined."""
    modules = {factor.module for factor in factors}
    apart = sorted(modules ^ biases.keys()) if biases else []
    if apart:
        raise FormatError(
            f"{len(apart)} modules have factors without a bias, or a bias without factors, and others have both",
            where="; ".join(fold_names(apart)[:4]),
            why="peft's lora_bias is for all modules or none",
            hint="leave the biases behind: --drop '*.lora_B.bias'",
            slug="cannot-carry",
        )


def _scaled(bias: Lazy, before: Factor, after: Factor) -> Lazy:
    """The bias with what went into ``up``; widened where the factors are."""
    one, two = before.scale, after.scale
    ratio: Fraction | float = Fraction(1)
    if one != two and two.value:
        ratio = one.exact / two.exact if one.exact is not None and two.exact is not None else one.value / two.value
    made = folded(bias, ratio, bias.dtype if after.up.dtype == before.up.dtype else after.up.dtype)
    if exact_recipe(after.up) and not exact_recipe(made):
        raise FormatError(
            "a bias cannot be scaled as its factors are without being rounded",
            where=f"{before.module}, times {float(ratio):g}",
            hint="--scale-in metadata keeps every bit",
            slug="cannot-carry",
        )
    return made


def _saying_so(plan: Plan, target: Dialect, family: Family) -> Plan:
    """The settings, in their file or in the header, say that there are biases."""
    if target.sidecar:
        settings = {**json.loads(plan.texts[target.sidecar]), target.bias_at: True}
        return replace(
            plan, texts={**plan.texts, target.sidecar: json.dumps(settings, indent=2, sort_keys=True) + "\n"}
        )
    (file,) = plan.files
    components = {in_component(family, factor.module)[0] for factor in plan.factors}
    told = {**json.loads(file.metadata[target.header]), **{f"{c}.{target.bias_at}": True for c in components}}
    metadata = {**file.metadata, target.header: json.dumps(told, sort_keys=True)}
    return replace(plan, files=(replace(file, metadata=metadata),))

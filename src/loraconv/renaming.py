"""Adapters that are no plain LoRA in a format that holds the same tensors: every byte under the target's names.

DoRA alone has two spellings: ``dora_scale``, a column, in kohya's and ComfyUI's files, and peft's
``lora_magnitude_vector``; between them the factors go the way of every LoRA, and the magnitudes beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from loraconv.algebra import Special, row_magnitudes
from loraconv.detect import FAMILY_KEY, Detected
from loraconv.errors import FormatError
from loraconv.lazy import Lazy, Number, Viewed, read
from loraconv.names import fold_names
from loraconv.naming import Naming
from loraconv.plan import Output, Plan, PlannedFile, ScaleIn, plan_adapter, proof_claim
from loraconv.products import read_plain
from loraconv.rules import Dialect, fill
from loraconv.source import Source
from loraconv.written import family_for, naming_for, write_vectors


def plan_renamed(source: Source, detected: Detected, specials: Sequence[Special], target: Dialect) -> Plan | None:
    """Every tensor as it is, under the names of ``target``; None where that has no names for some kind of tensor or
    writes a module as several, or where one of the two keeps alpha elsewhere.

    Raises :class:`FormatError` (a format that is only read, names, several families)."""
    sides = {side for one in specials for side in one.tensors} - {"down", "up", "alpha"}
    modules = [module for one in specials for module in one.targets]
    family = family_for(modules, target, (detected.family, *detected.alike))
    naming = naming_for(target, family)
    alphas = {one.module: _alpha(one) for one in specials if one.told is not None}
    told = bool(detected.dialect.alpha) or (len(alphas) == len(specials) and None not in alphas.values())
    if not (told and target.alpha) or not sides <= set(target.more.values()):
        return None
    outputs: list[Output] = []
    for one in specials:
        name = _name(one, detected, naming)
        if name is None:
            return None
        outputs += [Output(_spelled(target, name, side), tensor, "copied") for side, tensor in one.tensors.items()]
        number = alphas.get(one.module)
        if number is not None:
            outputs.append(Output(_spelled(target, name, "alpha"), number, "copied"))
    metadata = {"format": "pt", **_kept(source), **proof_claim(outputs)}
    if not detected.alike:
        metadata[FAMILY_KEY] = family.name
    return Plan(target, (PlannedFile(target.file, tuple(outputs), metadata),), {}, (), ())


def _alpha(one: Special) -> Number | None:
    """The alpha tensor that gives a module the scale of its settings; None where there is none, as LyCORIS leaves alpha
    out of a LoKr of two whole matrices."""
    assert one.told is not None
    told, rank = one.told
    factor = next((one.tensors[side] for side in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if side in one.tensors), None)
    alpha = told * (1 if factor is None else factor.shape[0]) / rank
    held = Number(float(alpha), "F32")
    exact = Fraction(float(read(held))) == alpha
    return held if exact and (factor is not None or alpha == 1) else None


def _kept(source: Source) -> dict[str, str]:
    """What trainers write about themselves; kohya's loaders take alpha and its meaning from it."""
    return {key: value for key, value in source.metadata.items() if key.startswith("ss_")}


def _name(one: Special, detected: Detected, naming: Naming) -> str | None:
    """The name of the module in the target's file; None where its rows are divided otherwise there."""
    found = detected.naming.find(one.module)
    assert found is not None
    written = {w[0]: w[1] for target in one.targets if (w := naming.write(target)) is not None}
    if len(written) != 1:
        return None
    name, rule = next(iter(written.items()))
    return name if rule.targets == found[0].targets or len(rule.targets) == len(one.targets) == 1 else None


def _spelled(target: Dialect, module: str, side: str) -> str:
    own = {"down": target.down, "up": target.up, "alpha": target.alpha}
    if side in own:
        return fill(own[side], {"module": module})
    return f"{module}.{next(end for end, what in target.more.items() if what == side)}"


# ---------------------------------------------------------------------------------------------------------------------
# DoRA from one spelling to the other


def plan_dora(
    source: Source,
    detected: Detected,
    specials: Sequence[Special],
    target: Dialect,
    *,
    alpha: Fraction | None,
    strict: bool,
    scale_in: ScaleIn,
) -> Plan:
    """The factors as those of any LoRA, and the magnitudes of the weights' rows beside them.

    Raises :class:`FormatError` where the target has no magnitudes, or none of columns, or divides their rows otherwise.
    """
    family = family_for([m for one in specials for m in one.targets], target, (detected.family, *detected.alike))
    naming = naming_for(target, family)
    _refuse_columns(specials, target, naming)
    magnitudes = {m: vector for one in specials for m, vector in row_magnitudes(one, detected).items()}
    adapter = read_plain(source, detected, specials, alpha=alpha, strict=strict)
    plan = plan_adapter(adapter, target, detected.family, alike=detected.alike, scale_in=scale_in)
    columns = {f.module: f.down.shape[1] for f in adapter.factors}
    outputs = _written(magnitudes, columns, naming, target)
    file = replace(plan.files[0], outputs=(*plan.files[0].outputs, *outputs))
    file = replace(file, metadata={**file.metadata, **proof_claim(file.outputs)})
    texts = {n: _with_dora(t, target) if n == target.sidecar else t for n, t in plan.texts.items()}
    return replace(plan, files=(file,), texts=texts)


def _refuse_columns(specials: Sequence[Special], target: Dialect, naming: Naming) -> None:
    """The norm of a column is one over all rows of the module, so the rows must be those of one module there too."""
    by_column = [one for one in specials if one.has_magnitude and one.by_column]
    divided = [one for one in by_column if len(one.targets) > 1 or _is_part(one.targets[0], naming)]
    wrong = by_column if target.dora_at else divided
    if wrong:
        rows = f"{target.name} divides the rows otherwise, over which they are normalised"
        peft = "it was trained with wd_on_out=False, and peft's DoRA normalises rows"
        raise FormatError(
            f"{target.name} cannot carry this DoRA: its magnitudes are those of the weight's columns",
            where="; ".join(fold_names([one.module for one in wrong])[:4]),
            why=peft if target.dora_at else rows,
            hint="put it into the base: loraconv fuse ADAPTER --base MODEL -o OUT",
            slug="cannot-carry",
        )


def _is_part(module: str, naming: Naming) -> bool:
    found = naming.write(module)
    return found is not None and len(found[1].targets) > 1


def _written(
    magnitudes: Mapping[str, Lazy], columns: Mapping[str, int], naming: Naming, target: Dialect
) -> list[Output]:
    made = []
    for name, vector in write_vectors(magnitudes, columns, naming).items():
        shape = vector.shape if target.dora_at or len(vector.shape) > 1 else (*vector.shape, 1)
        tensor = vector if shape == vector.shape else Viewed(vector, shape)
        made.append(Output(_spelled(target, name, "magnitude"), tensor, "copied"))
    return made


def _with_dora(text: str, target: Dialect) -> str:
    """The settings file of a DoRA."""
    return json.dumps({**json.loads(text), target.dora_at: True}, indent=2, sort_keys=True) + "\n"

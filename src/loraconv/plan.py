"""The plan of a conversion: which files, which tensors in each, the recipe of every tensor, and what is lossy.

A plan is what ``--dry-run`` prints and ``convert`` runs. Making one reads tensor data only to learn whether the scale
can be folded without rounding.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar

from loraconv import __version__
from loraconv.adapter import Adapter, Factor
from loraconv.detect import FAMILY_KEY
from loraconv.errors import FormatError
from loraconv.fold import cast, fits, folded, refuse_ruin
from loraconv.lazy import (
    Averaged,
    InMemory,
    Joined,
    Lazy,
    Number,
    Padded,
    Rows,
    Scaled,
    TensorRef,
    Viewed,
    nbytes,
    read,
)
from loraconv.naming import in_component
from loraconv.rules import Dialect, Family, fill, match
from loraconv.scale import ORIGIN_KEY, Origin, Place, Scale
from loraconv.written import Written, family_for, refuse_parts_of_a_model, write_pairs

ScaleIn = Literal["auto", "fold", "metadata"]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write. ``how`` says what happens to it; ``exact`` is false where a rounding happens."""

    name: str
    tensor: Lazy
    how: str
    exact: bool = True


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of tensors, relative to the output folder; ``kind`` is ``safetensors`` or ``torch``."""

    name: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    kind: Literal["safetensors", "torch"] = "safetensors"

    @property
    def bytes(self) -> int:
        """The size of the tensors (without the header)."""
        return sum(nbytes(o.tensor) for o in self.outputs)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will write. ``factors`` are the adapter's as they will stand in the output."""

    dialect: Dialect
    files: tuple[PlannedFile, ...]
    texts: Mapping[str, str] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """True if no tensor is rounded."""
        return all(o.exact for f in self.files for o in f.outputs)

    @property
    def bytes(self) -> int:
        """The size of everything that will be written, without the headers."""
        return sum(f.bytes for f in self.files) + sum(len(t) for t in self.texts.values())


def plan_adapter(
    adapter: Adapter,
    target: Dialect,
    family: Family,
    *,
    alike: Sequence[Family] = (),
    dtype: str | None = None,
    scale_in: ScaleIn = "auto",
    norms: Collection[str] = (),
) -> Plan:
    """Plan an adapter for ``target``. ``dtype`` (safetensors name) casts every factor; None keeps each as it is.
    ``alike`` are families that the adapter may belong to as well, ``norms`` the whole norms that will be beside it.

    Raises :class:`FormatError` where the target cannot carry what the adapter says.
    """
    factors, notices = adapter.factors, list(adapter.notices)
    family = family_for([f.module for f in factors], target, (family, *alike))
    if dtype is not None:
        factors = tuple(_cast(f, dtype) for f in factors)
    if target.every_consumer_reads_alpha:
        factors = tuple(_unfolded(f, keep_dtype=dtype is not None) for f in factors)
    else:
        factors, said = _place_scale(factors, target, scale_in, dtype)
        notices += said
    refuse_ruin({f"{f.module}.{side}": t for f in factors for side, t in (("down", f.down), ("up", f.up))})
    if target.container == "run-folder":
        return _plan_run(factors, target, family, tuple(notices))
    plan = _plan_file(factors, target, family, tuple(notices))
    if target.needs:
        made = (match(target.down, output.name) for output in plan.files[0].outputs)
        refuse_parts_of_a_model(target, {*(fields["module"] for fields in made if fields), *norms})
    return plan if alike else _with_family(plan, family)


def _with_family(plan: Plan, family: Family) -> Plan:
    files = tuple(replace(f, metadata={**f.metadata, FAMILY_KEY: family.name}) for f in plan.files)
    return replace(plan, files=files)


def _cast(factor: Factor, dtype: str) -> Factor:
    return replace(factor, down=cast(factor.down, dtype), up=cast(factor.up, dtype))


def _place_scale(
    factors: tuple[Factor, ...], target: Dialect, scale_in: ScaleIn, dtype: str | None
) -> tuple[tuple[Factor, ...], list[str]]:
    """The factors of a file that some consumers read at scale 1: the scale goes into ``up``, or into the header."""
    if not folds(factors, target, scale_in):
        kept = tuple(replace(f, origin=_origin(f, "header")) for f in factors)
        unread = any(f.scale.exact != 1 for f in factors)
        note = "the scale is in the header only: diffusers before 0.34 and ComfyUI will apply this LoRA at strength 1"
        return kept, [note] if unread else []
    exact = all(f.scale.exact is not None and fits(f.up, f.scale.exact, f.up.dtype) for f in factors)
    if exact or dtype is not None:
        return tuple(_folded(f, f.up.dtype) for f in factors), []
    narrow = sorted({f.up.dtype for f in factors} - {"F32", "F64"})
    wide = tuple(_folded(_widened(f), "F64" if f.up.dtype == "F64" else "F32") for f in factors)
    said = []
    if narrow:
        said.append(f"folding the scale into {', '.join(narrow)} would round it, so the factors are written in F32")
    if not all(exact_recipe(f.up) for f in wide):
        scale = factors[0].scale
        said.append(
            f"the scale {scale.exact if scale.exact is not None else scale.value} is no power of two, so lora_B is"
            " rounded once in F32; --scale-in metadata keeps every bit"
        )
    return wide, said


def folds(factors: tuple[Factor, ...], target: Dialect, scale_in: ScaleIn) -> bool:
    """True if a file that some consumers read at scale 1 shall have the scale in ``up``: where that was asked for, and
    by default unless the adapter comes from a diffusers file that had it in its header.

    Raises :class:`FormatError` where the scale was wanted in the header of a format that has no room for it there.
    """
    if not target.header:
        if scale_in == "metadata":
            raise FormatError(
                f"{target.name} cannot carry a scale beside the factors",
                why="no consumer of it reads alpha",
                hint="leave --scale-in out, or use --to diffusers --scale-in metadata",
                slug="cannot-carry",
            )
        return True
    in_header = any(f.origin is not None and f.origin.place == "header" for f in factors)
    return scale_in == "fold" or (scale_in == "auto" and not in_header)


def _widened(factor: Factor) -> Factor:
    dtype = "F64" if factor.up.dtype == "F64" else "F32"
    return replace(factor, down=cast(factor.down, dtype), origin=_origin(factor, "up"))


def _folded(factor: Factor, dtype: str) -> Factor:
    scale = factor.scale
    up = folded(factor.up, scale.exact if scale.exact is not None else scale.value, dtype)
    return replace(
        factor, up=up, origin=_origin(factor, "up"), scale=Scale(Fraction(factor.rank), factor.rank, "folded into up")
    )


def _origin(factor: Factor, place: Place) -> Origin:
    """What to record: an earlier record where it says the same scale, else what was read now."""
    scale, old = factor.scale, factor.origin
    if old is not None and (old.alpha, old.rank) == (scale.alpha, scale.rank):
        return replace(old, place=place)
    if old is not None and old.place == "up" and scale.exact == 1:
        return old
    return Origin(scale.alpha, scale.rank, scale.source, factor.up.dtype, place)


def _unfolded(factor: Factor, *, keep_dtype: bool) -> Factor:
    """The factor as the trainer had it, where an earlier conversion folded its scale and that can be undone exactly."""
    origin = factor.origin
    if origin is None or origin.place != "up" or factor.scale.exact != 1 or origin.rank != factor.rank:
        return factor
    dtype = factor.up.dtype if keep_dtype else origin.dtype
    scale = origin.alpha / origin.rank
    if not scale:
        return factor
    up = folded(factor.up, 1 / scale, dtype)
    undone = fits(factor.down, Fraction(1), dtype) and fits(factor.up, 1 / scale, dtype, back=scale)
    if not undone:
        return factor
    return replace(factor, down=cast(factor.down, dtype), up=up, scale=Scale(origin.alpha, origin.rank, origin.source))


# ---------------------------------------------------------------------------------------------------------------------
# one function a container


def _outputs(factors: tuple[Factor, ...], target: Dialect, family: Family) -> tuple[Output, ...]:
    """The tensors of every pair under the target's names."""
    made = []
    for pair in write_pairs(factors, target, family):
        fields = {"module": pair.module, "part": pair.part}
        for template, tensor in ((target.down, pair.down), (target.up, pair.up)):
            made.append(Output(fill(template, fields), tensor, how(tensor), exact_recipe(tensor)))
        if target.alpha:
            made.append(_alpha(fill(target.alpha, fields), pair))
    return tuple(made)


def _alpha(name: str, pair: Written) -> Output:
    """alpha as consumers divide it by the rank, so that rsLoRA's square root is counted in; float32 as trainers do."""
    scale, rank = pair.scale, pair.scale.rank
    alpha = scale.exact * rank if scale.exact is not None else Fraction(scale.value) * rank
    tensor = Number(float(alpha), "F64" if pair.up.dtype == "F64" else "F32")
    return Output(name, tensor, "alpha", Fraction(float(read(tensor))) == alpha)


def how(tensor: Lazy) -> str:
    """What a recipe does, in words for a plan."""
    if isinstance(tensor, TensorRef):
        return "copied"
    if isinstance(tensor, Joined):
        parts = " and ".join(dict.fromkeys(map(how, tensor.parts)))
        return f"joined along dimension {tensor.dim}" + ("" if parts == "copied" else f": {parts}")
    if isinstance(tensor, Averaged):
        return "averaged over ranks"
    if isinstance(tensor, InMemory):
        return f"computed, stored as {tensor.dtype}"
    if isinstance(tensor, Scaled):
        times = "" if tensor.factor == 1 else f"times {Fraction(tensor.factor).limit_denominator(1 << 20)}, "
        return f"{how(tensor.source)}, {times}stored as {tensor.dtype}"
    return "reshaped"


def exact_recipe(tensor: Lazy) -> bool:
    """False where the recipe rounds."""
    if isinstance(tensor, Scaled):
        return exact_recipe(tensor.source) and tensor.exact
    if isinstance(tensor, Joined):
        return all(map(exact_recipe, tensor.parts))
    if isinstance(tensor, Rows | Padded | Viewed):
        return exact_recipe(tensor.source)
    return not isinstance(tensor, Averaged | InMemory)


def _origin_json(factors: tuple[Factor, ...]) -> dict[str, Any]:
    """The origins by module; the most common one stands for all that do not differ."""
    known = {f.module: f.origin or _origin(f, _place(f)) for f in factors}
    most = max(known.values(), key=list(known.values()).count)
    own = {module: o.to_json() for module, o in known.items() if o != most}
    return {"": most.to_json(), **own}


def proof_claim(outputs: Iterable[Output]) -> dict[str, str]:
    """The header's short proof. It is written first and is true of every file that is left: a file whose own proof
    does not bear it out is never committed. ``loraconv.json`` beside the file has the whole proof."""
    made = list(outputs)
    claim = {
        "controls": "all caught",
        "levels": "L0 L1 L2",
        "numbers": "equal" if all(o.exact for o in made) else "within half a unit in the last place",
        "tensors": len(made),
    }
    return {"loraconv.proof": json.dumps(claim, sort_keys=True), "loraconv.version": __version__}


def _place(factor: Factor) -> Place:
    """Where the scale of a factor stands that was neither folded nor recorded: a header counts as the user's choice."""
    return "header" if factor.scale.source.startswith("header ") and factor.scale.exact != 1 else "file"


def _plan_file(factors: tuple[Factor, ...], target: Dialect, family: Family, notices: tuple[str, ...]) -> Plan:
    """One safetensors file, and the settings file beside it where the format has one."""
    outputs = _outputs(factors, target, family)
    metadata = {"format": "pt", ORIGIN_KEY: json.dumps(_origin_json(factors), sort_keys=True), **proof_claim(outputs)}
    if target.header:
        metadata[target.header] = json.dumps(_header_config(factors, family), sort_keys=True)
    texts = (
        {target.sidecar: _settings_text(_settings(factors, target, family), target.sidecar)} if target.sidecar else {}
    )
    return Plan(target, (PlannedFile(target.file, outputs, metadata),), texts, factors, notices)


def _header_config(factors: tuple[Factor, ...], family: Family) -> dict[str, Any]:
    """peft's configuration of every component that has an adapter, each key behind the component's name.

    transformers 5 builds a text encoder without the step ``text_model``, which diffusers takes out of a file's keys and
    not out of its header. peft asks for the end of a name, so that without it the header fits all.
    """
    grouped: dict[str, list[Factor]] = {}
    for factor in factors:
        component, name = in_component(family, factor.module)
        grouped.setdefault(component, []).append(replace(factor, module=name.removeprefix("text_model.")))
    configs = {component: _lora_config(tuple(own)) for component, own in grouped.items()}
    return {f"{component}.{key}": value for component, config in configs.items() for key, value in config.items()}


def _plan_run(factors: tuple[Factor, ...], target: Dialect, family: Family, notices: tuple[str, ...]) -> Plan:
    """A run folder with one torch file, its settings and the pointer to its only iteration."""
    assert target.layout is not None
    outputs = _outputs(factors, target, family)
    settings = {**_settings(factors, target, family), ORIGIN_KEY: _origin_json(factors)}
    texts = {target.layout.pointer: "1", target.sidecar: _settings_text(settings, target.sidecar)}
    file = PlannedFile(f"1/{target.file}", outputs, kind="torch")
    return Plan(target, (file,), texts, factors, notices)


def _settings(factors: tuple[Factor, ...], target: Dialect, family: Family) -> dict[str, Any]:
    """Dotted path -> value of the settings file: what the format always has, and rank and alpha where it wants them."""
    # Such a file is one model's, whose modules have no component before them.
    config = _lora_config(tuple(replace(f, module=in_component(family, f.module)[1]) for f in factors))
    if not target.rank_pattern_at:
        rank, alpha = _single_scale(factors, target)
        config |= {"r": rank, "lora_alpha": plain(alpha)}
    paths = {
        target.rank_at: "r",
        target.alpha_at: "lora_alpha",
        target.rank_pattern_at: "rank_pattern",
        target.alpha_pattern_at: "alpha_pattern",
        target.rslora_at: "use_rslora",
        target.targets_at: "target_modules",
    }
    return {**target.settings, **{path: config[key] for path, key in paths.items() if path}}


def _settings_text(settings: Mapping[str, Any], name: str) -> str:
    nested = _nested(settings)
    if not name.endswith((".yaml", ".yml")):
        return json.dumps(nested, indent=2, sort_keys=True) + "\n"
    import yaml

    return yaml.safe_dump(nested, sort_keys=True)


def _lora_config(factors: tuple[Factor, ...]) -> dict[str, Any]:
    """The part of peft's ``LoraConfig`` that decides the mathematics: rank, alpha and their exceptions by module.

    Target modules are full names, so that an adapter of some layers never touches the others. Patterns are, too, and
    those that another module's name ends with begin with ``^``, which peft takes for the beginning since 0.15
    (huggingface/peft#2419).
    """
    ranks = {f.module: f.rank for f in factors}
    alphas = {f.module: plain(f.scale.alpha) for f in factors}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    return {
        "alpha_pattern": _patterns(alphas, alpha),
        "lora_alpha": alpha,
        "r": rank,
        "rank_pattern": _patterns(ranks, rank),
        "target_modules": sorted(ranks),
        "use_rslora": factors[0].scale.rslora,
    }


def _patterns(values: Mapping[str, _Value], most: _Value) -> dict[str, _Value]:
    """The values that are not ``most``, by the expression that peft finds the module by."""
    rare = {module: value for module, value in values.items() if value != most}
    ends = (
        {".".join(steps[n:]) for steps in (m.split(".") for m in values) for n in range(1, len(steps))} if rare else ()
    )
    return {f"^{module}" if module in ends else module: value for module, value in rare.items()}


def plain(value: Fraction) -> int | float:
    """A fraction as JSON and YAML write it: an int where it is one, else the nearest float64."""
    return int(value) if value.denominator == 1 else float(value)


def _single_scale(factors: tuple[Factor, ...], target: Dialect) -> tuple[int, Fraction]:
    """The one rank and alpha of all factors; raises :class:`FormatError` where there are several, or rsLoRA."""
    kinds = {(f.rank, f.scale.exact) for f in factors}
    if len(kinds) > 1 or factors[0].scale.exact is None:
        raise FormatError(
            f"{target.name} cannot carry this adapter's scales",
            why=f"it has one rank and one alpha for all modules; this adapter has {len(kinds)} combinations"
            if len(kinds) > 1
            else "it has no rsLoRA, and alpha / sqrt(rank) is irrational here",
            hint="convert to diffusers or peft instead: --to peft",
            slug="cannot-carry",
        )
    rank, scale = kinds.pop()
    assert scale is not None
    return rank, scale * rank


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths as nested mappings."""
    root: dict[str, Any] = {}
    for path, value in values.items():
        *steps, last = path.split(".")
        place = root
        for step in steps:
            place = place.setdefault(step, {})
        place[last] = value
    return root

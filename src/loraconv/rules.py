"""What a format table is made of: templates, dialects, families and the few kinds of rule they use.

Tables are data. A template spells numbers as ``{i}`` and is anchored at both ends, so each rule reads the same way in
both directions. Every object checks itself when it is made: a table that loses a field or names a part twice fails at
import, not on a user's file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from loraconv.io.run_folder import RunLayout

__all__ = [
    "LYCORIS",
    "NORM_SIDES",
    "PEFT_MORE",
    "PEFT_TUNERS",
    "Blocks",
    "By",
    "Dialect",
    "Dropped",
    "Family",
    "Foreign",
    "Fused",
    "Has",
    "Kernel",
    "Layers",
    "Mark",
    "Modulation",
    "Norm",
    "Positions",
    "Regrouped",
    "Release",
    "Rename",
    "Rule",
    "RunLayout",
    "Same",
    "Setting",
    "Size",
    "Spelling",
    "fill",
    "match",
]

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = r"(?:0|[1-9][0-9]*)"
_ANY_NUMBER = re.compile(r"\{\w+\}|\d+")


@lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    """The pattern of a template; ``{module}``, ``{param}`` and ``{adapter}`` stand for names, other fields for a
    number."""
    out, at = [], 0
    for match in _FIELD.finditer(template):
        out.append(re.escape(template[at : match.start()]))
        word = match.group(1)
        inside = {"module": ".+", "param": r"[^.]+", "adapter": r"[^.]+"}.get(word, _NUMBER)
        out.append(f"(?P<{word}>{inside})")
        at = match.end()
    out.append(re.escape(template[at:]))
    return re.compile("".join(out), re.DOTALL)


def match(template: str, name: str) -> dict[str, str] | None:
    """The fields of ``name`` under ``template``, or None if it does not match as a whole."""
    found = _pattern(template).fullmatch(name)
    return found.groupdict() if found else None


def fill(template: str, fields: Mapping[str, str]) -> str:
    """``template`` with its fields filled in; the inverse of :func:`match`."""
    return _FIELD.sub(lambda m: fields[m.group(1)], template)


def _fields(template: str) -> set[str]:
    return set(_FIELD.findall(template))


def _check_fields(there: str, here: str) -> None:
    if _fields(there) != _fields(here):
        raise ValueError(f"{there} and {here} do not have the same fields")


def _shape(name: str) -> str:
    """A name or template with ``#`` for every number and field: what fits one template has one shape."""
    return _ANY_NUMBER.sub("#", name)


def _overlap(one: list[str], other: list[str]) -> bool:
    """True if some name fits both templates (given as steps): each step is equal, or a field meets a number."""
    if len(one) != len(other):
        return False
    unlike = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return all(_meets(a, b) or _meets(b, a) for a, b in unlike)


def _meets(field: str, step: str) -> bool:
    return field.startswith("{") and (step.startswith("{") or step.isdigit())


#: Which equal chunks of a module's rows each of its targets has, in this order; none if there is no such target.
Pieces = tuple[tuple[int, ...], ...]

#: How model parallelism splits a module: ``rows`` splits weight, bias and up along dimension 0 (a column-parallel
#: linear layer), ``columns`` splits weight and down along dimension 1 (a row-parallel one), ``whole`` copies it.
Parallel = Literal["whole", "rows", "columns"]


@dataclass(frozen=True, slots=True)
class Rename:
    """One module under another name, with the parameters ``params``.

    With ``when``, it belongs to the model only if that configuration value is true (or set).
    """

    there: str
    here: str
    parallel: Parallel = "whole"
    when: str = ""
    params: tuple[str, ...] = ("weight", "bias")

    def __post_init__(self) -> None:
        _check_fields(self.there, self.here)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.here,)

    def pieces(self, rows: int, columns: int) -> Pieces:
        return ((0,),)


@dataclass(frozen=True, slots=True)
class Norm(Rename):
    """A norm layer under another name. It takes no factors, but differences of its weight and bias."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The same modules in several blocks: one :class:`Rename` for each block and each module in it.

    ``blocks`` and ``modules`` give the trainer's part of a name and the one of diffusers.
    """

    blocks: Mapping[str, str]
    modules: Mapping[str, str]

    @property
    def renames(self) -> tuple[Rename, ...]:
        pairs = [(block, module) for block in self.blocks.items() for module in self.modules.items()]
        return tuple(Rename(f"{b[0]}.{m[0]}", f"{b[1]}.{m[1]}") for b, m in pairs)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The same where the modules are norm layers."""
        return tuple(Norm(rule.there, rule.here) for rule in self.renames)


@dataclass(frozen=True, slots=True)
class Same:
    """Modules that the trainer names as diffusers does."""

    modules: tuple[str, ...]

    @property
    def renames(self) -> tuple[Rename, ...]:
        return tuple(Rename(name, name) for name in self.modules)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The same where the modules are norm layers."""
        return tuple(Norm(name, name) for name in self.modules)


@dataclass(frozen=True, slots=True)
class Fused:
    """One module whose output rows are several modules, one after another (q, k and v).

    An adapter keeps one pair of factors a part, so parts may have unequal rows; a weight is cut into equal parts
    unless the adapter of the same module says otherwise.
    """

    there: str
    here: tuple[str, ...]
    parallel: Parallel = "whole"

    def __post_init__(self) -> None:
        if len(set(self.here)) != len(self.here) or any(_fields(h) != _fields(self.there) for h in self.here):
            raise ValueError(f"{self.there}: the parts {self.here} repeat or do not have the same fields")

    @property
    def targets(self) -> tuple[str, ...]:
        return self.here

    def pieces(self, rows: int, columns: int) -> Pieces:
        return tuple((n,) for n in range(len(self.here)))


@dataclass(frozen=True, slots=True)
class Regrouped:
    """One module cut into equal chunks of rows, which are dealt out to several modules in another order."""

    there: str
    here: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        dealt = [n for chunks in self.here.values() for n in chunks]
        if sorted(dealt) != list(range(len(dealt))):
            raise ValueError(f"{self.there}: chunks {sorted(dealt)} are not each dealt out once")
        if any(_fields(h) != _fields(self.there) for h in self.here):
            raise ValueError(f"{self.there}: a target does not have the same fields")

    @property
    def chunks(self) -> int:
        return sum(len(c) for c in self.here.values())

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.here)

    def pieces(self, rows: int, columns: int) -> Pieces:
        return tuple(self.here.values())


@dataclass(frozen=True, slots=True)
class Modulation:
    """A module of every block whose rows mean something else in the last block.

    No name tells which block is the last one, but there the module has ``ratio`` times as many rows as columns.
    ``here`` and ``last`` deal out the chunks as :class:`Regrouped` does.
    """

    there: str
    here: Mapping[str, tuple[int, ...]]
    last: Mapping[str, tuple[int, ...]]
    ratio: float

    def __post_init__(self) -> None:
        Regrouped(self.there, self.here)
        Regrouped(self.there, self.last)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.here, *self.last)))

    def pieces(self, rows: int, columns: int) -> Pieces:
        dealt = self.last if rows == self.ratio * columns else self.here
        return tuple(dealt.get(target, ()) for target in self.targets)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A patch projection that some trainers store flat, ``(out, C*p*p)``, and diffusers as a kernel ``(out, C, p, p)``.

    ``size`` and ``flat_if`` name configuration values: the patch size, and one that is set when diffusers keeps the
    weight flat too.
    """

    there: str
    here: str
    size: str
    flat_if: str

    def __post_init__(self) -> None:
        _check_fields(self.there, self.here)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.here,)

    def pieces(self, rows: int, columns: int) -> Pieces:
        return ((0,),)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor (full name) that the target model does not have; ``why`` goes into the ledger."""

    there: str
    why: str


#: A rule cuts the rows of ``there`` (of a weight, a bias, or an adapter's ``up``) into as many equal chunks as
#: ``pieces(rows, columns)`` has numbers, and gives each target its chunks; ``columns`` are those of weight or ``down``.
Rule = Rename | Fused | Regrouped | Modulation | Kernel


def _refuse_ambiguous(templates: list[str]) -> None:
    """Raises :class:`ValueError` if some name fits two of these templates, which have one shape."""
    numbers = [tuple("{}" if n.startswith("{") else n for n in _ANY_NUMBER.findall(name)) for name in templates]
    fields = {tuple(n == "{}" for n in one) for one in numbers}
    if len(fields) == 1 and len(set(numbers)) == len(numbers):
        return  # fields at the same places, and other numbers: no need to look at every pair
    steps = [name.split(".") for name in templates]
    for number, name in enumerate(templates):
        for other in range(number):
            if _overlap(steps[other], steps[number]):
                both = f"{templates[other]} and {name} fit one name"
                what = f"{name} is there more than once" if templates[other] == name else both
                raise ValueError(f"ambiguous table: {what}")


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one trainer names the modules of a family: the rules to diffusers names, and what has no counterpart.

    ``adapts`` lists the trainer's modules (templates) that its LoRA can be put on; empty means any. ``norms`` are the
    norm layers that have a weight, where an adapter may hold differences of them.
    """

    rules: tuple[Rule, ...]
    dropped: tuple[Dropped, ...] = ()
    adapts: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ()
    _theres: Mapping[str, list[Rule]] = field(init=False, repr=False, compare=False)
    _heres: Mapping[str, list[tuple[Rule, int]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        strange = set(self.adapts) - {rule.there for rule in self.rules}
        if strange:
            raise ValueError(f"adapts names modules without a rule: {sorted(strange)}")
        theres: dict[str, list[Rule]] = {}
        heres: dict[str, list[tuple[Rule, int]]] = {}
        for rule in (*self.rules, *self.norms):
            theres.setdefault(_shape(rule.there), []).append(rule)
            for part, here in enumerate(rule.targets):
                heres.setdefault(_shape(here), []).append((rule, part))
        for rules in theres.values():
            _refuse_ambiguous([rule.there for rule in rules])
        for parts in heres.values():
            _refuse_ambiguous([rule.targets[part] for rule, part in parts])
        object.__setattr__(self, "_theres", theres)
        object.__setattr__(self, "_heres", heres)

    @property
    def heres(self) -> tuple[str, ...]:
        """The diffusers names that the rules lead to."""
        return tuple(here for rule in self.rules for here in rule.targets)

    @property
    def norm_heres(self) -> tuple[str, ...]:
        """The diffusers names of the norm layers."""
        return tuple(rule.here for rule in self.norms)

    def find(self, module: str) -> tuple[Rule, dict[str, str]] | None:
        """The rule for a trainer's module name, with the fields of the match."""
        for rule in self._theres.get(_shape(module), ()):
            fields = match(rule.there, module)
            if fields is not None:
                return rule, fields
        return None

    def find_part(self, here: str) -> tuple[str, int] | None:
        """The trainer's module and part number for a diffusers module name: the table read the other way."""
        for rule, part in self._heres.get(_shape(here), ()):
            fields = match(rule.targets[part], here)
            if fields is not None:
                return fill(rule.there, fields), part
        return None

    def can_adapt(self, module: str) -> bool:
        """True if the trainer's LoRA can be put on this module (its own name)."""
        return not self.adapts or any(match(template, module) is not None for template in self.adapts)

    def drops(self, name: str) -> str:
        """Why a tensor of this full name has no counterpart; empty if it has one."""
        return next((d.why for d in self.dropped if match(d.there, name) is not None), "")


# ---------------------------------------------------------------------------------------------------------------------
# configuration: how each value of a model's config.json follows from tensors and from the trainer's own settings


@dataclass(frozen=True, slots=True)
class Size:
    """The product of some dimensions of a tensor, divided by configuration values that are already known.

    ``name`` is the trainer's full tensor name. ``dims`` empty means all of them. A divisor whose value is None counts
    as 1. A result equal to ``none_if`` is written as null.
    """

    name: str
    dims: tuple[int, ...] = ()
    over: tuple[str, ...] = ()
    none_if: int | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """How many layers the tensors show: the numbers that ``{i}`` takes in this template, which must be 0, 1, 2, ..."""

    name: str


@dataclass(frozen=True, slots=True)
class Has:
    """True if every tensor of ``every`` is there, and at least one of ``any_of`` if that is not empty."""

    every: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class By:
    """A default that depends on another configuration value: ``cases[value]``."""

    key: str
    cases: Mapping[object, object]


@dataclass(frozen=True, slots=True)
class Setting:
    """One entry of a model's ``config.json``.

    ``tensors`` is how the tensors tell it, ``sidecar`` the path of the trainer's own setting (from the root of its
    file), ``default`` the value of the released models. Tensors come first; a sidecar that contradicts them is an
    error. ``last`` takes the last element where the sidecar holds a list. ``kind`` is what a sidecar's value must be:
    a positive whole number, a positive number, or true or false.
    """

    key: str
    default: object = None
    tensors: Size | Layers | Has | None = None
    sidecar: str = ""
    last: bool = False
    kind: Literal["count", "number", "flag"] = "count"


@dataclass(frozen=True, slots=True)
class Positions:
    """A table with one row for each position of the video, behind ``text`` rows for the text if that is true.

    Dimension ``dim`` must agree with the sample size in the configuration.
    """

    name: str
    dim: int
    text: bool


@dataclass(frozen=True, slots=True)
class Release:
    """A released model: what its configuration always has (``layout``), and what tells its exact size (``size``)."""

    title: str
    layout: Mapping[str, object]
    size: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: its diffusers class, the trainers' spellings of it, and how its configuration is told.

    ``component`` is the pipeline part that adapters belong to (the prefix in diffusers files); where it is empty,
    module names begin with theirs. ``modules`` are templates of the modules (diffusers names) that an adapter can be
    put on, ``convolutions`` the ends of the names of those that are a convolution in some release, ``norms`` templates
    of its norm layers that have a weight (of image and video models). ``replaces_norms`` is true where an adapter may
    hold whole weights of ``norms``, which take the place of the base's. ``beside`` are templates of modules of other
    pipeline parts, each behind its part's name: text encoders, which every tool names as transformers does.
    ``spellings`` are the other names of ``modules``: ``sat``, or ``original`` for those of the model's own repository.
    ``settings`` and ``releases`` (from the most to the least specific) are there where a whole model can be converted.
    """

    name: str
    title: str
    model_class: str
    component: str
    modules: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    replaces_norms: bool = False
    beside: tuple[str, ...] = ()
    spellings: Mapping[str, Spelling] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    releases: tuple[Release, ...] = ()
    positions: tuple[Positions, ...] = ()
    _listed: Mapping[str, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        listed: dict[str, list[str]] = {}
        for template in (*self.modules, *self.beside):
            listed.setdefault(_shape(template), []).append(template)
        object.__setattr__(self, "_listed", listed)

    def knows(self, module: str) -> bool:
        """True if ``module`` (diffusers name) is one that the family has."""
        listed = any(match(template, module) is not None for template in self._listed.get(_shape(module), ()))
        return listed or any(s.find_part(module) for s in self.spellings.values())

    def may_convolve(self, module: str) -> bool:
        """True if ``module`` (diffusers name) is a convolution in some release."""
        return any(f".{module}".endswith(f".{end}") for end in self.convolutions)


# ---------------------------------------------------------------------------------------------------------------------
# dialects: how a trainer spells factors, where it keeps alpha, and how its files lie on disk


@dataclass(frozen=True, slots=True)
class Foreign:
    """Tensors of another model in the same checkpoint: a prefix, and what it is."""

    prefix: str
    what: str


Container = Literal["run-folder", "safetensors-file"]

#: How LyCORIS, kohya and ComfyUI spell what is no pair of factors, or more than one: the end of a name, and the side of
#: the module that the tensor is. From KohakuBlueleaf/LyCORIS ``modules/*.py`` and ComfyUI ``weight_adapter/*.py``.
LYCORIS: Mapping[str, str] = {
    **{f"hada_{side}": f"hada_{side}" for side in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{side}": f"lokr_{side}" for side in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "lora_mid.weight": "mid",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "w_norm",
    "b_norm": "b_norm",
    "dora_scale": "magnitude",
}

#: Of these the sides of a norm layer, which has no others: LyCORIS adds them, times the strength, to weight and bias.
NORM_SIDES = frozenset({"w_norm", "b_norm"})

#: What peft's LoRA has besides its factors, in files and as dumped from memory (huggingface/peft
#: ``tuners/lora/layer.py``, ``tuners/lora/dora.py``).
PEFT_MORE: Mapping[str, str] = {
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "lora_B.bias": "bias",
    "lora_B.default.bias": "bias",
}

#: What peft's folders have besides a LoRA's factors: those of its LoHa and LoKr, whose alpha is in the settings
#: (huggingface/peft ``tuners/loha/layer.py``, ``tuners/lokr/layer.py``).
PEFT_TUNERS: Mapping[str, str] = {
    **PEFT_MORE,
    **{end: side for end, side in LYCORIS.items() if end.startswith(("hada_", "lokr_"))},
}


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a dialect from another with the same keys: a header key whose value, in lower case, holds ``word``, or
    a file beside the weights (``beside``)."""

    header: str = ""
    word: str = ""
    beside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one tool spells an adapter. Templates use ``{module}``, ``{param}``, ``{adapter}`` and ``{part}`` (a number).

    Keys. ``down`` and ``up`` spell the factors; ``also`` are other spellings of the two that are read. ``alpha`` spells
    the tensor that holds alpha, empty if there is none. ``prefixes`` is what stands before module names; in them
    ``{component}`` is the pipeline component. ``components`` are those that the dialect has and what it calls them;
    empty means all, under their own names. ``spellings`` name the family's spellings that may follow, empty for
    diffusers' own names. Of prefixes and spellings the first that the family has is written.
    ``more`` are the ends of the names of tensors that make a module more than a pair of factors, and what they are.
    ``norm`` spells the whole weight of a norm layer, in families whose adapters replace them. ``needs`` are templates
    of the modules and norms (their names in the file) without which its readers do not know it for what it is.
    ``separator`` replaces the dots in module names. ``rewrites`` turn module names into the usual ones when read;
    ``parts`` turn the names of parts into those of their modules and the number of the part.
    ``frozen`` spells the untouched weight of an adapted module.

    Scale. ``sidecar`` is the settings file beside the weights (YAML or JSON, by its suffix); ``alpha_at``, ``rank_at``
    and, where modules may differ, ``alpha_pattern_at``, ``rank_pattern_at`` and ``rslora_at`` are paths into it.
    ``dora_at`` is where the settings say that there are magnitudes, which are vectors then, and elsewhere columns;
    ``bias_at`` where they, or the header, say that the ups have biases.
    ``header`` is the key of a safetensors header that holds peft's configuration as JSON, ``header_alpha`` one that
    holds alpha as text. ``alpha_of_block`` marks files whose pairs may be several side by side, with the alpha of one
    of them. ``targets_at`` is where the names of the adapted modules stand, ``settings`` what the format's own settings
    file always says.
    ``default_alpha`` is the documented convention where no file says alpha: a number, ``"rank"``, or None for unknown.
    ``every_consumer_reads_alpha`` is false where some consumer of the format applies scale 1 whatever the file says,
    so that the scale has to be folded into ``up``.

    Kin. ``any_model`` is true where the format is for any model, and not only for the components of image and video
    pipelines; ``convolutions`` where its consumers take pairs of factors of convolutions, down with the kernel and up
    (out, rank, 1, 1). A dialect that is a ``variant_of`` another has the same keys and is told from it by one of its
    ``marks``. ``read_only`` says why a dialect is not written, and what to write instead.
    """

    name: str
    title: str
    container: Container
    file: str
    down: str
    up: str
    prefixes: tuple[str, ...]
    also: tuple[tuple[str, str], ...] = ()
    alpha: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    norm: str = ""
    needs: tuple[str, ...] = ()
    components: Mapping[str, str] = field(default_factory=dict)
    spellings: tuple[str, ...] = ("",)
    separator: str = "."
    rewrites: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str, int], ...] = ()
    frozen: str = ""
    foreign: tuple[Foreign, ...] = ()
    layout: RunLayout | None = None
    sidecar: str = ""
    rank_at: str = ""
    alpha_at: str = ""
    rank_pattern_at: str = ""
    alpha_pattern_at: str = ""
    rslora_at: str = ""
    targets_at: str = ""
    dora_at: str = ""
    bias_at: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    header: str = ""
    header_alpha: str = ""
    alpha_of_block: tuple[Mark, ...] = ()
    default_alpha: int | Literal["rank"] | None = None
    default_why: str = ""
    every_consumer_reads_alpha: bool = True
    any_model: bool = False
    convolutions: bool = False
    variant_of: str = ""
    marks: tuple[Mark, ...] = ()
    read_only: str = ""
    carries: tuple[str, ...] = ()
    cannot_carry: tuple[str, ...] = ()
    facts: str = ""

    @property
    def by_part(self) -> bool:
        """True if a module that is several of diffusers has a pair of factors for each."""
        return "{part}" in self.down or bool(self.parts)

    @property
    def holds_models(self) -> bool:
        """True if the dialect's files hold the whole model that was trained, and not an adapter alone."""
        return self.container == "run-folder"

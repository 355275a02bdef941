"""The canonical adapter: diffusers module name -> down, up and scale.

Tensors are lazy; every input key is accounted for.

``delta = scale * up @ down`` with ``down`` of shape (rank, in) and ``up`` of shape (out, rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction

from loraconv.algebra import in_words, read_specials
from loraconv.detect import Detected, factor_key
from loraconv.errors import FormatError
from loraconv.lazy import Lazy, TensorRef
from loraconv.names import fold_names, printable, quoted
from loraconv.nearest import nearest_pairs
from loraconv.pairs import read_pairs
from loraconv.rules import NORM_SIDES, fill
from loraconv.scale import Origin, Scale, find_scales, origins
from loraconv.source import Source, refuse_parts


@dataclass(frozen=True, slots=True)
class Factor:
    """The adapter of one module. ``origin`` is what an earlier conversion recorded about its scale, if any;
    ``magnitude`` that of a DoRA, which only a fusion asks for."""

    module: str
    down: Lazy
    up: Lazy
    scale: Scale
    origin: Origin | None = None
    magnitude: Lazy | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def leaves(self) -> Iterator[TensorRef]:
        """Every byte range that the two factors are made of."""
        yield from self.down.leaves()
        yield from self.up.leaves()


@dataclass(frozen=True, slots=True)
class Adapter:
    """All factors of a checkpoint in natural order of their modules, and what had to be said while reading them."""

    factors: tuple[Factor, ...]
    notices: tuple[str, ...] = ()

    @property
    def layers(self) -> list[int]:
        """The layer numbers that the adapter covers."""
        return sorted({n for f in self.factors if (n := layer_of(f.module)) is not None})

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the factors."""
        return sorted({t.dtype for f in self.factors for t in (f.down, f.up)})


def layer_of(module: str) -> int | None:
    """The first number in a module name; None where there is none."""
    return next((int(step) for step in module.split(".") if step.isdecimal()), None)


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key that orders ``blocks.2`` before ``blocks.10``."""
    return [(0, int(step)) if step.isdecimal() else (1, step) for step in name.split(".")]


def read_adapter(
    source: Source, detected: Detected, *, alpha: Fraction | None = None, strict: bool = False, nearest: bool = False
) -> Adapter:
    """The adapter in ``source``. Raises :class:`FormatError` and :class:`CorruptCheckpoint`.

    ``alpha`` overrides every other source of alpha; ``strict`` refuses a mere convention; ``nearest`` accepts a
    model-parallel adapter, of which only the nearest single adapter exists.
    """
    _refuse_what_is_none(source, detected)
    if len(source.ranks) > 1 and not nearest:
        raise _no_single_adapter(source)
    ranks = [read_pairs(source, detected, tensors) for tensors in source.ranks]
    pairs = ranks[0] if len(ranks) == 1 else nearest_pairs(source, detected, ranks)
    scales, notices = find_scales(source, detected, {m: h.stated for m, h in pairs.items()}, alpha, strict)
    known = origins(source)
    factors = [
        Factor(module, h.down, h.up, scales[module].of_rank(h.down.shape[0]), known.get(module, known.get("")))
        for module, h in sorted(pairs.items(), key=lambda item: natural(item[0]))
    ]
    return Adapter(tuple(factors), tuple(notices))


def _refuse_what_is_none(source: Source, detected: Detected) -> None:
    refuse_parts(source)
    where = printable(str(source.path))
    if not detected.has_factors:
        trained = f"the trainer lists {len(source.trained)} trained tensors; " if source.trained else ""
        training = bool(source.extras or detected.ledger.foreign)
        kind = "a full fine-tune" if source.trained else "a whole model" if training else "base weights"
        raise FormatError(
            f"{where} holds no LoRA: it is {kind} of {detected.family.title}",
            why=f"{trained}{len(detected.ledger.base)} base tensors, no LoRA factor among them",
            hint=f"loraconv sat2diffusers {quoted(source.path)} --what base -o transformer",
            slug="no-lora",
        )
    _refuse_more_than_lora(source, detected)
    strange = [n for n in detected.ledger.unknown if factor_key(detected.dialect, n)]
    if strange:
        raise _unknown_modules(detected, strange, strange)


def _unknown_modules(detected: Detected, strange: list[str], rest: list[str]) -> FormatError:
    """``strange``: LoRA tensors whose modules the family does not have; ``rest``: all that are not understood."""
    keys = [factor_key(detected.dialect, name) for name in strange]
    modules = dict.fromkeys(key.module for key in keys if key is not None)
    norms = all(key is not None and key.side in NORM_SIDES for key in keys)
    near = _near(next(iter(modules)), detected.naming.names(norms))
    return FormatError(
        f"the adapter holds {len(rest)} tensors besides plain LoRA factors of {detected.family.title}'s modules",
        where="; ".join(fold_names(strange)[:4]),
        why=near or f"{detected.family.title} has no such {'norm layers' if norms else 'modules'}",
        hint=_past(strange),
        slug="module-unknown",
    )


def _near(name: str, known: list[str]) -> str:
    """The known names nearest to one that is not; those of the first layer stand for all."""
    near = get_close_matches(name, known, n=2, cutoff=0.5)
    return f"names near to it: {', '.join(near)}" if near else ""


def _past(unknown: list[str]) -> str:
    norms = all(name.endswith(tuple(NORM_SIDES)) for name in unknown)
    pattern = "*_norm" if norms else printable(unknown[0])
    return f"convert it with --keep-unknown, or with --drop '{pattern}' and so on"


def _keys(detected: Detected) -> list[str]:
    """Every key that the format has for modules of the first layer."""
    dialect = detected.dialect
    spelled = [template for template in (dialect.down, dialect.up, dialect.alpha) if template]
    names = detected.naming.names()
    return [fill(template, {"module": name, "part": "0"}) for name in names for template in spelled]


#: What the end of a key says about a tensor that is no plain LoRA factor.
_MORE = {
    "lora_magnitude_vector": "DoRA: the magnitudes need the base model",
    "lora_magnitude_vector.weight": "DoRA: the magnitudes need the base model",
    "dora_scale": "DoRA: the magnitudes need the base model",
    "lora_B.bias": "a LoRA with bias",
    "weight": "whole weights saved beside the LoRA (modules_to_save)",
    "bias": "biases trained beside the LoRA",
}


def refuse_rest(source: Source, detected: Detected) -> None:
    """A file that is only an adapter must hold the tensors of its modules and nothing else: dropping the rest would
    change it. Raises :class:`FormatError`."""
    refuse_parts(source)
    rest = [*detected.ledger.unknown, *detected.ledger.base] if not detected.dialect.holds_models else []
    strange = [n for n in rest if factor_key(detected.dialect, n)]
    if strange:
        raise _unknown_modules(detected, strange, rest)
    if rest:
        kinds = {why for name in rest for end, why in _MORE.items() if name.endswith("." + end)}
        raise FormatError(
            f"the adapter holds {len(rest)} tensors besides plain LoRA factors",
            where="; ".join(fold_names(rest)[:4]),
            why="; ".join(sorted(kinds))
            or _near(rest[0], _keys(detected))
            or f"they are no {detected.dialect.name} keys of {detected.family.title}",
            hint=_past(rest),
            slug="not-plain-lora",
        )


def _refuse_more_than_lora(source: Source, detected: Detected) -> None:
    if detected.ledger.more:
        raise _no_plain_lora(source, detected)
    refuse_rest(source, detected)
    config = source.config if not detected.dialect.holds_models else None
    told = [f"{key} = {config[key]!r}" for key in _BEYOND_LORA if config and config.get(key) not in _PLAIN]
    if told:
        raise FormatError(
            f"the adapter's configuration asks for more than plain LoRA: {printable(', '.join(told), 120)}",
            where=printable(str(source.config_path)),
            hint="loraconv formats",
            slug="not-plain-lora",
        )


def _no_plain_lora(source: Source, detected: Detected) -> FormatError:
    specials = [one for one in read_specials(source, detected) if one.what != "LoRA"]
    dora, path = any(one.has_magnitude for one in specials), quoted(source.path)
    near = all(one.can_be_approximated for one in specials)
    hint = f"add it to its base: loraconv fuse {path} --base MODEL -o OUT"
    if near:
        hint = f"loraconv convert {path} -o OUT --to peft --approximate svd --max-error 1e-3"
    elif any(one.kind == "whole norm" for one in specials):
        hint = f"loraconv convert {path} -o OUT --to diffusers keeps what it is"
    return FormatError(
        f"the adapter is no plain LoRA: {in_words(specials)}",
        where="; ".join(fold_names(detected.ledger.more)[:4]),
        why="the magnitudes of DoRA act on the sum of weight and delta" if dora else "it is no pair of factors alone",
        hint=hint,
        slug="not-plain-lora",
    )


#: Fields of peft's ``LoraConfig`` that change the mathematics beyond ``scale * up @ down``, and their harmless values.
_BEYOND_LORA = (
    "alora_invocation_tokens",
    "bias",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
_PLAIN: tuple[object, ...] = (None, False, "none", [], {})


def _no_single_adapter(source: Source) -> FormatError:
    return FormatError(
        f"this LoRA was trained on {len(source.ranks)} model-parallel ranks, and no single adapter equals it",
        where=printable(str(source.path)),
        why="SAT never sums the output projection's adapter over the ranks, so each rank computed another function",
        hint="add --nearest for the nearest single adapter (the report says how far off it is), or train with"
        " model_parallel_size 1",
        slug="model-parallel-lora",
    )

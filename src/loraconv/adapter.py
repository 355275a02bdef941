"""The canonical adapter: diffusers module name -> down, up and scale.

Tensors are lazy; every input key is accounted for.

``delta = scale * up @ down`` with ``down`` of shape (rank, in) and ``up`` of shape (out, rank).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from loraconv.detect import Detected, base_name, factor_key
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.lazy import Averaged, Joined, Lazy, TensorRef, nbytes, read
from loraconv.names import FLOAT_DTYPES, fold_names, printable, quoted
from loraconv.ranks import mixed, of_rank, refuse_copies, same_in_all, split_dim
from loraconv.rules import Fused, Rename, fill
from loraconv.scale import Origin, Scale, find_scales, origins
from loraconv.source import Source, refuse_parts


@dataclass(frozen=True, slots=True)
class Factor:
    """The adapter of one module. ``origin`` is what an earlier conversion recorded about its scale, if any."""

    module: str
    down: Lazy
    up: Lazy
    scale: Scale
    origin: Origin | None = None

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
    ranks = [_pairs(source, detected, tensors) for tensors in source.ranks]
    pairs = ranks[0] if len(ranks) == 1 else _nearest(source, detected, ranks)
    sizes = {module: down.shape[0] for module, (down, _) in pairs.items()}
    scales, notices = find_scales(source, detected, sizes, alpha, strict)
    known = origins(source)
    factors = [
        Factor(module, down, up, scales[module], known.get(module, known.get("")))
        for module, (down, up) in sorted(pairs.items(), key=lambda item: natural(item[0]))
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
    strange = [n for n in detected.ledger.unknown if factor_key(detected.dialect, n.removeprefix(detected.prefix))]
    if strange:
        raise FormatError(
            f"{len(strange)} LoRA tensors belong to modules that {detected.family.title} does not have",
            where="; ".join(fold_names(strange)[:4]),
            hint="loraconv formats",
            slug="module-unknown",
        )


#: What the end of a key says about a tensor that is no plain LoRA factor.
_MORE = {
    "lora_magnitude_vector": "DoRA: the magnitudes need the base model",
    "lora_magnitude_vector.weight": "DoRA: the magnitudes need the base model",
    "dora_scale": "DoRA: the magnitudes need the base model",
    "lora_B.bias": "a LoRA with bias",
    "weight": "whole weights saved beside the LoRA (modules_to_save)",
    "bias": "biases trained beside the LoRA",
}


def _refuse_more_than_lora(source: Source, detected: Detected) -> None:
    """A file that is only an adapter must hold LoRA factors and nothing else: dropping the rest would change it."""
    rest = [*detected.ledger.unknown, *detected.ledger.base] if detected.spelling is None else []
    if rest:
        kinds = {why for name in rest for end, why in _MORE.items() if name.endswith("." + end)}
        raise FormatError(
            f"the adapter holds {len(rest)} tensors besides plain LoRA factors",
            where="; ".join(fold_names(rest)[:4]),
            why="; ".join(sorted(kinds)) or f"they are no {detected.dialect.name} keys of {detected.family.title}",
            hint="loraconv formats",
            slug="not-plain-lora",
        )
    config = source.config if detected.spelling is None else None
    told = [f"{key} = {config[key]!r}" for key in _BEYOND_LORA if config and config.get(key) not in _PLAIN]
    if told:
        raise FormatError(
            f"the adapter's configuration asks for more than plain LoRA: {printable(', '.join(told), 120)}",
            where=printable(str(source.config_path)),
            hint="loraconv formats",
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


def _pairs(source: Source, detected: Detected, tensors: dict[str, TensorRef]) -> dict[str, tuple[TensorRef, TensorRef]]:
    """Module (diffusers name) -> (down, up) of one rank, each pair checked for shape and dtype."""
    halves: dict[str, dict[str, TensorRef]] = {}
    for name in detected.ledger.factors:
        key = factor_key(detected.dialect, name[len(detected.prefix) :])
        assert key is not None
        halves.setdefault(_here(detected, key.module, key.part, name), {})[key.side] = of_rank(tensors, name)
    broken = [module for module, sides in halves.items() if len(sides) != 2]
    if broken:
        raise CorruptCheckpoint(
            f"{len(broken)} modules have only one of the two LoRA factors",
            where="; ".join(fold_names(broken)[:4]),
            hint="save the checkpoint again, or copy it again from where it was trained",
            slug="factor-missing",
        )
    for module, sides in halves.items():
        _check_pair(source, module, sides["down"], sides["up"])
    return {module: (sides["down"], sides["up"]) for module, sides in halves.items()}


def _here(detected: Detected, module: str, part: int, name: str) -> str:
    """The diffusers module of a factor."""
    if detected.spelling is None:
        return module
    found = detected.spelling.find(module)
    assert found is not None
    rule, fields = found
    if not isinstance(rule, Rename | Fused) or part >= len(rule.targets):
        raise FormatError(
            f"{printable(name)} is part {part} of a module that has {len(rule.targets)}",
            why=f"the {detected.family.title} table knows no such part",
            hint="loraconv formats",
            slug="part-unknown",
        )
    return fill(rule.targets[part], fields)


def _check_pair(source: Source, module: str, down: TensorRef, up: TensorRef) -> None:
    flat = len(down.shape) == 2 and len(up.shape) == 2
    if not flat or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CorruptCheckpoint(
            f"the two LoRA factors of {printable(module)} do not fit together",
            where=printable(str(source.path)),
            why=f"down is {list(down.shape)}, up is {list(up.shape)}",
            hint="save the checkpoint again, or copy it again from where it was trained",
            slug="factor-shape",
        )
    for tensor in (down, up):
        if tensor.dtype not in FLOAT_DTYPES:
            raise FormatError(
                f"{printable(tensor.name)} is {tensor.dtype}, not a floating dtype",
                hint="save the adapter in fp32, fp16 or bf16",
                slug="dtype-unsupported",
            )


def _nearest(
    source: Source, detected: Detected, ranks: list[dict[str, tuple[TensorRef, TensorRef]]]
) -> dict[str, tuple[Lazy, Lazy]]:
    """The single adapter nearest to what the model-parallel ranks computed.

    A rows-parallel module (q, k, v) has its ``up`` rows on the ranks, and copies of ``down`` that drifted apart
    slightly: their mean. A columns-parallel one (the output projection) has its ``down`` columns on the ranks, and each
    rank added only its own share, so the mean over ranks of what they added is the concatenation divided by their
    number. On a recorded run this is 5 and 7 % from the two ranks' outputs; the undivided sum is 8 and 10 %.
    """
    count = len(ranks)
    _check_one_run(source, detected)
    made: dict[str, tuple[Lazy, Lazy]] = {}
    for module in ranks[0]:
        downs, ups = (list(side) for side in zip(*(rank[module] for rank in ranks), strict=True))
        found = detected.spelling.find_part(module) if detected.spelling else None
        rule = detected.spelling.find(found[0]) if detected.spelling and found else None
        parallel = rule[0].parallel if rule and isinstance(rule[0], Rename | Fused) else "whole"
        if parallel == "rows":
            refuse_copies(ups)
            _check_copies(downs)
            made[module] = Averaged(tuple(downs), count), Joined(tuple(ups), 0)
        elif parallel == "columns":
            _check_copies(ups)
            made[module] = Joined(tuple(downs), 1), Averaged(tuple(ups), count * count)
        else:
            made[module] = Averaged(tuple(downs), count), Averaged(tuple(ups), count)
    return made


#: Base tensors up to this many bytes are compared between ranks; the greater ones would say no more.
_SMALL = 1 << 16


def _check_one_run(source: Source, detected: Detected) -> None:
    """Small base tensors that every rank holds whole must be the same bytes: they are frozen in a LoRA run."""
    for name in detected.ledger.base:
        refs = [of_rank(tensors, name) for tensors in source.ranks]
        found = detected.spelling.find(_module(detected, name)) if detected.spelling else None
        whole = found is not None and split_dim(getattr(found[0], "parallel", "whole"), refs[0]) is None
        if whole and nbytes(refs[0]) <= _SMALL:
            same_in_all(refs)


def _module(detected: Detected, name: str) -> str:
    return base_name(detected.dialect, name[len(detected.prefix) :]).rpartition(".")[0]


def _check_copies(refs: list[TensorRef]) -> None:
    """Copies of one factor drift apart by thousandths in training; half of their norm apart, they never were copies."""
    first = read(refs[0])
    for other in refs[1:]:
        gap, size = (first - read(other)) ** 2, first**2
        if gap.sum() > size.sum() / 4:
            raise mixed(refs[0], other)

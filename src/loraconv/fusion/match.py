"""Which weight of the base each module of the adapters belongs to; nothing is written before every one has its home."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Sequence
from fractions import Fraction

from loraconv.adapter import Factor, natural
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError
from loraconv.fusion.adapters import Used
from loraconv.fusion.dora import refuse_beside_dora, term_of
from loraconv.fusion.homes import home_of, refuse_other_parts
from loraconv.fusion.merging import DTYPES, Term, as_matrix
from loraconv.io.sidecar import parse_json
from loraconv.io.target import JOURNAL
from loraconv.lazy import TensorRef
from loraconv.model_folder import Model
from loraconv.names import fold_names, printable, quoted
from loraconv.patterns import choose

#: The header key of every fused file: the adapters in it, as a list.
FUSED_KEY = "loraconv.fused"
#: Enough names to find the one that was meant; a hostile base may have many more.
_LOOKED_AT = 5000


def terms_of(model: Model, used: Sequence[Used], patterns: Sequence[str]) -> tuple[list[str], dict[str, list[Term]]]:
    """``(chosen modules, tensor -> its terms)``, both in natural order.

    Raises :class:`UsageError` (a pattern that fits nothing) and :class:`FormatError` (``other-component``,
    ``base-mismatch``, ``no-home``, ``dtype-unsupported``).
    """
    factors = [(one, factor) for one in used for factor in one.adapter.factors]
    modules = sorted({factor.module for _, factor in factors}, key=natural)
    chosen = choose(modules, patterns) if patterns else modules
    refuse_other_parts(model, used[0].path, chosen)
    names = {module: home_of(module, model) for module in chosen}
    homes = {module: model.tensors.get(name) for module, name in names.items()}
    _check_shapes(model, homes, [factor for _, factor in factors])
    _check_homes(model, homes, set(names.values()), used)
    _check_dtypes([ref for ref in homes.values() if ref is not None])
    made: dict[str, list[Term]] = {name: [] for name in names.values()}
    for one, factor in factors:
        if factor.module in homes:
            plain = Term(factor.up, factor.down, one.strength * _scale(factor))
            home, name = homes[factor.module], names[factor.module]
            assert home is not None
            made[name].append(plain if factor.magnitude is None else term_of(factor, one.strength, home))
    refuse_beside_dora(made)
    return chosen, made


def _scale(factor: Factor) -> Fraction:
    """The scale as a fraction; rsLoRA's irrational one is the float64 that every trainer computes."""
    exact = factor.scale.exact
    return exact if exact is not None else Fraction(factor.scale.value)


def _check_shapes(model: Model, homes: dict[str, TensorRef | None], factors: Sequence[Factor]) -> None:
    wrong = {}
    for factor in factors:
        home, shape = homes.get(factor.module), (factor.up.shape[0], factor.down.shape[1])
        if home is not None and as_matrix(home).shape != shape:
            wrong[factor.module] = f"base {_size(home.shape)}, adapter {_size(shape)}"
    if wrong:
        first = next(iter(wrong))
        raise FormatError(
            f"the adapter was trained on another model: {len(wrong)} of its modules do not fit the base's weights",
            where=f"{'; '.join(fold_names(wrong)[:4])}: {wrong[first]}",
            why=f"the base is {_described(model)}",
            hint=f"pass the model that the adapter was trained on as --base; this one is {quoted(model.path)}",
            slug="base-mismatch",
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _described(model: Model) -> str:
    config = model.config or {}
    told = [
        f"{key} {config[key]}" for key in ("num_layers", "num_attention_heads", "attention_head_dim") if key in config
    ]
    kind = printable(str(config.get("_class_name", "a model")), 60)
    return f"{kind} with {printable(', '.join(told), 100)}" if told else f"{kind} of {len(model.tensors)} tensors"


def _check_homes(
    model: Model, homes: dict[str, TensorRef | None], taken: Collection[str], used: Sequence[Used]
) -> None:
    missing = [module for module, home in homes.items() if home is None]
    if missing:
        free = [name for name in list(model.tensors)[:_LOOKED_AT] if name.endswith(".weight") and name not in taken]
        known = [name.removesuffix(".weight") for name in free]
        raise FormatError(
            f"{len(missing)} of the adapter's {len(homes)} modules are not in the base",
            where="; ".join(fold_names(missing)[:4]),
            why=f"nearest names in the base: {_nearest(missing, known)}",
            hint="pass the model that the adapter was trained on; what it is for: loraconv inspect"
            f" {quoted(used[0].path)}",
            slug="no-home",
        )


def _nearest(missing: Sequence[str], known: Sequence[str]) -> str:
    shown = list({module.rpartition(".")[2]: module for module in reversed(missing)}.values())[:3]
    found = [name for module in shown for name in difflib.get_close_matches(module, known, n=1)]
    return printable(", ".join(dict.fromkeys(found)) or "none that is like them", 300)


def _check_dtypes(homes: Sequence[TensorRef]) -> None:
    other = [ref for ref in homes if ref.dtype not in DTYPES]
    if other:
        raise FormatError(
            f"the base's weights are {other[0].dtype}, to which nothing can be added",
            where="; ".join(fold_names(ref.name for ref in other)[:4]),
            hint="store the base in fp32, fp16 or bf16 first: save_pretrained after .to(torch.float32)",
            slug="dtype-unsupported",
        )


def fused_before(model: Model) -> list[dict[str, str]]:
    """What earlier fusions wrote into the base's headers; raises :class:`CorruptCheckpoint` if that is no list."""
    found: dict[str, dict[str, str]] = {}
    for name, header in model.metadata.items():
        value = parse_json(header.get(FUSED_KEY, "[]"), f"{printable(name)}, header key {FUSED_KEY}")
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise CorruptCheckpoint(
                f"the header of {printable(name)} is not as loraconv writes it",
                why=f"{FUSED_KEY} is no list of adapters",
                hint="fuse into the original base",
                slug="settings",
            )
        found |= {json.dumps(entry, sort_keys=True): entry for entry in value}
    return list(found.values())


def refuse_fused_twice(model: Model, used: Sequence[Used]) -> list[str]:
    """Notices about adapters that the base holds already; raises :class:`UsageError` (``fused-twice``) for one of
    ``used``, and for one that is named twice."""
    digests: Collection[str] = [one.digest for one in used]
    for one in used:
        if list(digests).count(one.digest) > 1:
            raise _twice(f"{one.name} is named twice", "add up its strengths: loraconv fuse ADAPTER@1.5 ...")
    before = fused_before(model)
    for entry in before:
        same = [one for one in used if one.digest == entry.get("digest")]
        if same:
            raise _twice(f"{same[0].name} is in this base already: it would be fused twice", _way_back(model))
    names = [printable(f"{entry.get('adapter')}@{entry.get('strength')}", 80) for entry in before]
    return [f"the base was fused before, with {', '.join(names)}"] if before else []


def _way_back(model: Model) -> str:
    places = [place for place in (model.folder, model.pipeline) if place is not None]
    journal = any(os.path.lexists(place / JOURNAL) for place in places)
    back = f", or go back to it: loraconv unfuse {quoted(model.path)} -o BASE" if journal else ""
    return f"take the original base{back}"


def _twice(what: str, hint: str) -> LoraconvError:
    return UsageError(what, why="its delta would count double", hint=hint, slug="fused-twice")

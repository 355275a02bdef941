"""What a checkpoint is, as data: container, dialect, model, rank, alpha and its source, and everything else in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from loraconv.adapter import Adapter, layer_of, read_adapter, refuse_rest
from loraconv.algebra import Special, read_specials
from loraconv.base import bare_tensors
from loraconv.detect import Detected, detect, group_bytes
from loraconv.errors import FormatError
from loraconv.lazy import nbytes
from loraconv.model_config import check_positions, infer_config, release_of
from loraconv.names import fold_names, printable, quoted, ranges
from loraconv.products import read_plain
from loraconv.scale import given_alpha
from loraconv.source import Source, open_source


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of content: how many tensors, how many bytes, and its names, folded by layer."""

    what: str
    tensors: int
    bytes: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The LoRA in a checkpoint. ``alpha`` and ``scale`` are given as text where they are exact fractions.

    More than one entry in ``ranks`` or ``scales`` means that modules differ.
    """

    ranks: tuple[int, ...]
    alphas: tuple[str, ...]
    alpha_sources: tuple[str, ...]
    scales: tuple[str, ...]
    targets: tuple[str, ...]
    modules: int
    layers: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything ``loraconv inspect`` shows. ``adapter`` is None where no LoRA can be read; ``problem`` says why."""

    path: str
    container: str
    ranks: int
    bytes: int
    dialect: str
    reason: str
    model: str
    config: dict[str, Any] | None
    adapter: AdapterFacts | None
    problem: str
    contents: tuple[Group, ...]
    notices: tuple[str, ...]
    next: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {"schema": 1, **asdict(self)}


def inspect(src: str | Path, *, alpha: float | None = None) -> Summary:
    """Say what ``src`` is, from names and shapes alone; ``alpha`` overrides what the files say.

    Raises :class:`UsageError`, :class:`FormatError` (unknown), :class:`CorruptCheckpoint`, :class:`UnsafeCheckpoint`.
    """
    with open_source(src) as source:
        summary = summarise(source, detect(source), alpha=given_alpha(alpha))
        source.check_unchanged()
        return summary


def summarise(source: Source, detected: Detected, *, alpha: Fraction | None = None) -> Summary:
    """The summary of an opened source."""
    config, model, config_problem = _model(source, detected)
    adapter, problem = None, ""
    try:
        read = _read(source, detected, alpha)
        adapter = read
    except FormatError as error:
        problem = error.what if detected.has_factors or source.incomplete else ""
        read = None
    notices = [*source.notices, *(read.notices if read else ()), *_notices(source, detected), *config_problem]
    return Summary(
        path=str(source.path),
        container=source.container,
        ranks=len(source.ranks),
        bytes=source.bytes,
        dialect=detected.dialect.name,
        reason=detected.reason,
        model=model,
        config=config,
        adapter=_facts(adapter) if adapter else None,
        problem=problem,
        contents=tuple(_contents(source, detected)),
        notices=tuple(notices),
        next=_next(source, detected, problem),
    )


def _read(source: Source, detected: Detected, alpha: Fraction | None) -> Adapter:
    """The factors; biases and whole norms that stand beside them are among the contents."""
    specials = read_specials(source, detected) if detected.ledger.more else []
    if not specials or not all(one.is_plain for one in specials):
        return read_adapter(source, detected, alpha=alpha, nearest=True)
    refuse_rest(source, detected)
    return read_plain(source, detected, [one for one in specials if one.kind == "LoRA"], alpha=alpha, strict=False)


def _model(source: Source, detected: Detected) -> tuple[dict[str, Any] | None, str, list[str]]:
    family = detected.family
    if not detected.dialect.holds_models or not detected.ledger.base:
        titles = " or ".join(f.title for f in (family, *detected.alike))
        return None, f"{titles} (the adapter alone does not tell which)", []
    try:
        bare = bare_tensors(source, detected)
        config = infer_config(family, bare, source.config).values
    except FormatError as error:
        return None, family.title, [f"base model: {error.what}"]
    notices = []
    try:
        check_positions(family, bare, config, source.config is not None)
    except FormatError as error:
        notices.append(f"base model: {error.what}")
    release, whole = release_of(family, config)
    size = f"{config['num_layers']} layers, hidden {config['num_attention_heads'] * config['attention_head_dim']}"
    if release is None:
        return config, f"{family.title} of unknown layout, {size}", notices
    return config, f"{release.title}, {size}" if whole else f"{release.title} layout in another size: {size}", notices


def _notices(source: Source, detected: Detected) -> list[str]:
    notices = []
    if len(source.ranks) > 1 and detected.has_factors:
        notices.append(
            f"trained on {len(source.ranks)} model-parallel ranks: no single adapter equals this LoRA (--nearest)"
        )
    if detected.dialect.name == "diffusers" and not detected.prefix:
        notices.append("keys lack the prefix 'transformer.': diffusers 0.33 and later loads nothing from this file")
    if detected.ledger.unknown:
        notices.append(f"{len(detected.ledger.unknown)} tensors are not understood")
    return notices


def _facts(adapter: Adapter) -> AdapterFacts:
    factors = adapter.factors
    scales = {f.scale: None for f in factors}
    targets = {_without_layer(f.module): None for f in factors}
    return AdapterFacts(
        ranks=tuple(sorted({f.rank for f in factors})),
        alphas=tuple(dict.fromkeys(str(s.alpha) for s in scales)),
        alpha_sources=tuple(dict.fromkeys(s.source for s in scales)),
        scales=tuple(dict.fromkeys(str(s.exact) if s.exact is not None else repr(s.value) for s in scales)),
        targets=tuple(targets),
        modules=len(factors),
        layers=ranges(adapter.layers),
        dtypes=tuple(adapter.dtypes),
    )


def _without_layer(module: str) -> str:
    """``transformer_blocks.3.attn1.to_q`` -> ``attn1.to_q``."""
    layer = layer_of(module)
    return module if layer is None else module.partition(f".{layer}.")[2] or module


def _contents(source: Source, detected: Detected) -> list[Group]:
    ledger = detected.ledger
    named = [
        *(_kinds(source, detected) if ledger.more else [("LoRA factors", ledger.factors)]),
        ("alpha tensors", ledger.alphas),
        (f"{detected.family.title} base", ledger.base),
        *ledger.foreign.items(),
        ("known, not needed", list(ledger.dropped)),
        ("not understood", ledger.unknown),
        ("parts of tensors", source.incomplete),
    ]
    groups = [
        Group(what, len(names), _bytes(source, names), tuple(fold_names(names))) for what, names in named if names
    ]
    if source.frozen:
        size = sum(map(nbytes, source.frozen.values()))
        groups.append(Group("frozen base, left out", len(source.frozen), size, tuple(fold_names(source.frozen))))
    state = [e for e in source.extras if e.tensors]
    other = [e for e in source.extras if not e.tensors]
    if state:
        names = tuple(f"{e.name} ({e.tensors} tensors)" for e in state)
        groups.append(
            Group("trainer state with tensors", sum(e.tensors for e in state), sum(e.bytes for e in state), names)
        )
    if other:
        groups.append(Group("trainer state", 0, 0, tuple(f"{e.name} ({printable(e.kind)})" for e in other)))
    return groups


def _kinds(source: Source, detected: Detected) -> list[tuple[str, list[str]]]:
    """The tensors by the kind of their module, where some are more than pairs of factors."""
    made: dict[str, list[Special]] = {}
    for one in read_specials(source, detected):
        made.setdefault(one.what, []).append(one)
    tensors = {
        w: [t.name for o in ones for side, t in o.tensors.items() if side != "alpha"] for w, ones in made.items()
    }
    return [(f"{what}, {len(made[what])} modules", names) for what, names in tensors.items()]


def _bytes(source: Source, names: list[str]) -> int:
    return group_bytes(source, [n for n in names if n in source.tensors])


def _next(source: Source, detected: Detected, problem: str) -> str:
    path = quoted(source.path)
    if source.incomplete:
        return ""
    if detected.dialect.holds_models:
        if not detected.has_factors:
            return f"loraconv sat2diffusers {path} --what base -o transformer"
        nearest = " --nearest" if len(source.ranks) > 1 else ""
        given = " --alpha A" if problem else ""
        return f"loraconv sat2diffusers {path} -o lora{given}{nearest}"
    specials = read_specials(source, detected) if detected.ledger.more else []
    if specials and all(one.is_plain for one in specials):
        to = "bfl-control" if any(one.kind == "whole norm" for one in specials) else "peft"
        return f"loraconv convert {path} -o out --to {to if detected.dialect.name == 'diffusers' else 'diffusers'}"
    if detected.ledger.more:
        return f"loraconv convert {path} -o out --to {'kohya' if detected.dialect.name == 'comfyui' else 'comfyui'}"
    if detected.has_factors:
        return f"loraconv convert {path} -o out --to {'diffusers' if detected.dialect.name == 'peft' else 'peft'}"
    return ""

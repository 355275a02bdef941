"""The base model inside a checkpoint: diffusers tensor names -> lazy tensors, merged over model-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loraconv.detect import Detected, FactorKey, base_name, factor_key
from loraconv.errors import CorruptCheckpoint, FormatError
from loraconv.lazy import Lazy, TensorRef, Viewed
from loraconv.names import FLOAT_DTYPES, fold_names, printable, quoted
from loraconv.ranks import join, merge, of_rank, same_in_all, split_dim
from loraconv.rules import Fused, Kernel, Regrouped, Rename, Rule, fill
from loraconv.source import Source, refuse_parts


def bare_tensors(source: Source, detected: Detected) -> dict[str, TensorRef]:
    """The base tensors of the first rank under the trainer's names, prefix and ``.original`` removed."""
    names = [*detected.ledger.base, *detected.ledger.dropped]
    return {_bare(detected, name): source.tensors[name] for name in names}


def _bare(detected: Detected, name: str) -> str:
    return base_name(detected.dialect, name[len(detected.prefix) :])


def read_base(source: Source, detected: Detected, config: dict[str, Any]) -> dict[str, Lazy]:
    """diffusers tensor name -> tensor, for every base tensor of the checkpoint.

    Raises :class:`FormatError` for tensors that no rule explains, quantised weights and partial shards, and
    :class:`CorruptCheckpoint` where ranks that must agree do not.
    """
    _refuse(source, detected)
    _refuse_gaps(source, detected, config)
    made: dict[str, Lazy] = {}
    for name in detected.ledger.base:
        refs = [of_rank(tensors, name) for tensors in source.ranks]
        module, _, param = _bare(detected, name).rpartition(".")
        found = detected.spelling.find(module) if detected.spelling else None
        assert found is not None, module
        rule, fields = found
        for here, tensor in _targets(source, detected, rule, param, refs, config, module):
            made[f"{fill(here, fields)}.{param}"] = tensor
    return made


def _refuse(source: Source, detected: Detected) -> None:
    refuse_parts(source)
    where = printable(str(source.path))
    if not detected.dialect.holds_models or not detected.ledger.base:
        raise FormatError(
            f"{where} holds no base model to convert",
            why="it is an adapter alone" if detected.has_factors else "it is in diffusers' own layout already",
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="no-base",
        )
    unknown = [name for name in detected.ledger.unknown if name.startswith(detected.prefix)]
    if unknown:
        raise FormatError(
            f"{len(unknown)} tensors are not part of any known {detected.family.title}",
            where="; ".join(fold_names(unknown)[:6]),
            why="dropping them without a word would change the model",
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="keys-unknown",
        )
    odd = [n for n in detected.ledger.base if source.tensors[n].dtype not in FLOAT_DTYPES]
    if odd:
        raise FormatError(
            f"the base weights are quantised ({source.tensors[odd[0]].dtype})",
            where="; ".join(fold_names(odd)[:4]),
            hint="convert the adapter alone (--what lora) and use the original base model",
            slug="base-quantised",
        )


def _refuse_gaps(source: Source, detected: Detected, config: dict[str, Any]) -> None:
    """Every parameter of every module that the table and the configuration know must be there, in every layer."""
    assert detected.spelling is not None
    present = set(bare_tensors(source, detected))
    missing = []
    for rule in detected.spelling.rules:
        if isinstance(rule, Rename) and rule.when and not config[rule.when]:
            continue
        params = rule.params if isinstance(rule, Rename) else ("weight", "bias")
        layers = range(config["num_layers"]) if "{i}" in rule.there else (0,)
        wanted = [f"{fill(rule.there, {'i': str(i)})}.{param}" for i in layers for param in params]
        missing += [name for name in wanted if name not in present]
    if missing:
        raise CorruptCheckpoint(
            f"the base model is incomplete: {len(missing)} tensors are missing",
            where=f"{printable(str(source.path))}: {'; '.join(fold_names(missing)[:4])}",
            why="the checkpoint was cut down or saved in parts",
            hint="save the checkpoint again, or convert the adapter alone: --what lora",
            slug="tensors-missing",
        )


def _targets(
    source: Source,
    detected: Detected,
    rule: Rule,
    param: str,
    refs: list[TensorRef],
    config: dict[str, Any],
    module: str,
) -> Iterator[tuple[str, Lazy]]:
    """The target templates of one source tensor, and the tensor of each."""
    if isinstance(rule, Fused):
        rows = _equal_parts(source, detected, rule, module, refs[0])
        for part, here in enumerate(rule.here):
            yield here, join([ref.rows(part * rows, (part + 1) * rows) for ref in refs], 0)
    elif isinstance(rule, Regrouped):
        whole = same_in_all(refs)
        chunk, left = divmod(whole.shape[0], rule.chunks)
        if left:
            raise _odd_rows(whole, rule.chunks)
        for here, numbers in rule.here.items():
            yield here, join([whole.rows(n * chunk, (n + 1) * chunk) for n in numbers], 0)
    elif isinstance(rule, Kernel):
        yield rule.here, _kernel(rule, same_in_all(refs), config)
    elif isinstance(rule, Rename) and (not rule.when or config[rule.when]):
        yield rule.here, merge(refs, split_dim(rule.parallel, refs[0]))


def _equal_parts(source: Source, detected: Detected, rule: Fused, module: str, ref: TensorRef) -> int:
    """The rows of each part of a fused module on one rank; raises :class:`FormatError` where parts are not equal."""
    ups = set()
    for name in detected.ledger.factors:
        key = factor_key(detected.dialect, name[len(detected.prefix) :])
        if key == FactorKey(module, key.part if key else 0, "up"):
            ups.add(source.tensors[name].shape[0])
    rows, left = divmod(ref.shape[0], len(rule.here))
    if left or len(ups) > 1:
        raise FormatError(
            f"{printable(module)} has parts of unequal size, which {detected.family.model_class} cannot hold",
            why=f"{ref.shape[0]} rows" + (f", the adapter's parts have {sorted(ups)}" if ups else ""),
            hint="convert the adapter alone: --what lora",
            slug="partition-unequal",
        )
    return rows


def _odd_rows(ref: TensorRef, chunks: int) -> FormatError:
    return FormatError(
        f"{printable(ref.name)} has {ref.shape[0]} rows, which are not {chunks} equal chunks", slug="partition-unknown"
    )


def _kernel(rule: Kernel, ref: TensorRef, config: dict[str, Any]) -> Lazy:
    if len(ref.shape) != 2 or config[rule.flat_if] is not None:
        return ref
    size = config[rule.size]
    return Viewed(ref, (ref.shape[0], ref.shape[1] // (size * size), size, size))

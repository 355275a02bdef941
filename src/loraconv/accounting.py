"""The two ways past a tensor that no rule knows: left behind on purpose, or copied byte for byte under its own name.

Neither is ever taken unasked, and both are recorded and proved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraconv.detect import Detected, factor_key
from loraconv.errors import FormatError
from loraconv.lazy import TensorRef
from loraconv.names import fold_names, printable
from loraconv.patterns import choose
from loraconv.plan import Output, Plan, proof_claim
from loraconv.rules import Dialect
from loraconv.source import Source


@dataclass(frozen=True, slots=True)
class Aside:
    """What a conversion takes no adapter from: the names that are left behind, and the tensors that are copied."""

    dropped: tuple[str, ...] = ()
    kept: Mapping[str, TensorRef] = field(default_factory=dict)


def leave_behind(source: Source, patterns: Sequence[str]) -> tuple[Source, tuple[str, ...]]:
    """The source without the keys that fit ``patterns``, and those keys.

    Raises :class:`UsageError` for a pattern that fits none.
    """
    names = tuple(choose(source.tensors, patterns, "--drop", "key of the checkpoint")) if patterns else ()
    return without(source, names), names


def without(source: Source, names: Iterable[str]) -> Source:
    """The source less these keys."""
    gone = set(names)
    return replace(source, ranks=[{n: ref for n, ref in rank.items() if n not in gone} for rank in source.ranks])


def refuse_half_pairs(detected: Detected, dropped: Sequence[str]) -> None:
    """Raise :class:`FormatError` where a pair of factors loses a part: what is left would be another adapter."""
    left = {_pair(detected.dialect, name) for name in (*detected.ledger.factors, *detected.ledger.alphas)}
    halves = [name for name in dropped if _pair(detected.dialect, name) in left - {None}]
    if halves:
        raise FormatError(
            f"--drop would take {len(halves)} tensors away from pairs of factors that stay",
            where="; ".join(fold_names(halves)[:4]),
            why="a pair without one of its factors is no adapter, and without its alpha it is one of another strength",
            hint=f"--drop '{printable(_module(detected.dialect, halves[0]))}.*'",
            slug="half-pair",
        )


def _pair(dialect: Dialect, name: str) -> tuple[str, int] | None:
    """The pair that is another adapter, or none, without this tensor; without its bias it is the LoRA that it was."""
    key = factor_key(dialect, name)
    return None if key is None or key.side == "bias" else (key.module, key.part)


def _module(dialect: Dialect, name: str) -> str:
    key = factor_key(dialect, name)
    return name if key is None else key.module


def set_apart(source: Source, detected: Detected, target: Dialect) -> tuple[Source, Detected, dict[str, TensorRef]]:
    """The source and its reading without the tensors that no rule knows, and those tensors.

    Raises :class:`FormatError` where the target's container has no room for them, or where they are ranks' shares.
    """
    ledger = detected.ledger
    names = [*ledger.unknown, *([] if detected.dialect.holds_models else ledger.base)]
    if names and target.container != "safetensors-file":
        raise _no_room(f"{target.name} has no room for tensors that are none of its own", names)
    if names and len(source.ranks) > 1:
        raise _no_room("each of several model-parallel ranks has its own share of them, perhaps", names)
    base = ledger.base if detected.dialect.holds_models else []
    known = replace(ledger, base=base, unknown=[])
    kept = {name: source.tensors[name] for name in names}
    return without(source, names), replace(detected, ledger=known), kept


def _no_room(why: str, names: Sequence[str]) -> FormatError:
    return FormatError(
        f"{len(names)} unknown tensors cannot be kept",
        where="; ".join(fold_names(names)[:4]),
        why=why,
        hint="--drop the ones that may stay behind, or convert to a safetensors file: --to diffusers --keep-unknown",
        slug="cannot-carry",
    )


def with_kept(plan: Plan, kept: Mapping[str, TensorRef]) -> Plan:
    """The plan with the kept tensors in its file. Raises :class:`FormatError` where one has an output's name."""
    if not kept:
        return plan
    (file,) = plan.files
    twice = [o.name for o in file.outputs if o.name in kept]
    if twice:
        raise FormatError(
            f"{len(twice)} unknown tensors have names that the output needs for its own",
            where="; ".join(fold_names(twice)[:4]),
            hint=f"--drop '{printable(twice[0])}'",
            slug="kept-twice",
        )
    outputs = (*file.outputs, *(Output(name, ref, "kept as it is") for name, ref in kept.items()))
    file = replace(file, outputs=outputs, metadata={**file.metadata, **proof_claim(outputs)})
    return replace(plan, files=(file,))


def aside_notices(aside: Aside) -> list[str]:
    """What has to be said about tensors that were set aside."""
    told = (
        (aside.dropped, "tensors were left behind, as --drop says"),
        (aside.kept, "unknown tensors are in the output as they were, and whether anything reads them is not known"),
    )
    return [f"{len(names)} {what}: {'; '.join(fold_names(names)[:4])}" for names, what in told if names]

"""The text of ``loraconv fuse``: each scale and what it is made of, what was written, and the proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraconv.names import fold_names, human_bytes, printable

if TYPE_CHECKING:
    from loraconv.fusion.result import FusedAdapter, FuseResult, ScaleFacts

#: Below this share of the adapters' change the rounding to the base's dtype is worth a word.
_KEPT = 0.95


def fused(result: FuseResult) -> str:
    return "\n".join(_lines(result))


def _lines(result: FuseResult) -> Iterator[str]:
    for adapter in result.adapters:
        yield from _scales(adapter, many=len(result.adapters) > 1)
    would = "would fuse" if result.dry_run else "fused  "
    share = f"{human_bytes(result.fused_bytes)} of {human_bytes(sum(file.bytes for file in result.base_files))}"
    yield f"{would} {len(result.fused)} of {result.tensors} tensors, {share}"
    if result.dry_run:
        yield from (f"        {name}" for name in fold_names(result.fused))
    if result.beside:
        yield f"whole   {len(result.beside)} tensors are not the base's: {'; '.join(fold_names(result.beside)[:2])}"
    weights = [file for file in result.files if file.name.endswith(".safetensors") and file.sha256 is None]
    for file in weights:
        if not file.linked:
            where = printable(str(result.out / file.name), 1000)
            yield f"{'would write' if result.dry_run else 'wrote  '} {where}  {human_bytes(file.bytes)}"
    for proof in result.proofs:
        yield f"proof   {proof.checks[0].count} tensors: the exact sum, rounded once; controls caught {proof.caught}"
    if result.kept is not None and result.kept < _KEPT:
        yield f"kept    {result.kept:.0%} of the change; the rest is lost in the rounding (--dtype fp32 keeps it)"
    if not result.dry_run:
        yield from _ways_on(result)


def _ways_on(result: FuseResult) -> Iterator[str]:
    if not result.proofs:
        yield "proof   none: it was not asked for"
    yield f"next    {result.next}"
    if result.journal is not None:
        yield f"back    loraconv unfuse {printable(str(result.out), 1000)} -o BASE"


def _scales(adapter: FusedAdapter, many: bool) -> Iterator[str]:
    """``scale 0.5 = alpha 64 (--alpha) / rank 128 (tensors)``, one line for each scale."""
    for scale in adapter.scales:
        notes = [adapter.path] if many else []
        notes += [f"{scale.modules} modules"] if len(adapter.scales) > 1 else []
        notes += [f"strength {adapter.strength:g}"] if adapter.strength != 1 else []
        yield f"{_made_of(scale)}{''.join(f', {note}' for note in notes)}"


def _made_of(scale: ScaleFacts) -> str:
    rank = f"sqrt(rank {scale.rank})" if scale.rslora else f"rank {scale.rank}"
    return f"scale {scale.value:.10g} = alpha {scale.alpha:.10g} ({printable(scale.told_by)}) / {rank} (tensors)"

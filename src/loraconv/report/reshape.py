"""The text of ``merge``, ``resize``, ``extract`` and ``split``: ranks, what they cost, what was written, the proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraconv.names import fold_names, human_bytes, printable, quoted
from loraconv.report.text import proof

if TYPE_CHECKING:
    from loraconv.reshaping.result import ModuleFacts, ReshapeResult

#: The modules whose error stands in the text.
_SHOWN = 8


def reshaped(result: ReshapeResult) -> str:
    return "\n".join(_lines(result))


def _lines(result: ReshapeResult) -> Iterator[str]:
    for one in result.inputs:
        strength = "" if one.strength == 1 else f", strength {one.strength:g}"
        yield f"input   {printable(one.path, 1000)} ({one.format}{strength})"
    if result.modules:
        yield f"rank    {_ranks(result.modules)}"
    if any(module.error for module in result.modules):
        yield f"error   {result.error:.2e} of the delta's Frobenius norm over all {len(result.modules)} modules"
        yield from _errors(result.modules)
    for part in result.parts:
        yield f"part    {part.name}: {'; '.join(fold_names(part.modules)[:4])}"
    if result.other:
        shown = "; ".join(fold_names(result.other)[:6])
        yield f"LOST    {len(result.other)} changed tensors that no LoRA holds: {shown}"
    if result.dry_run:
        yield f"would write {printable(str(result.out), 1000)}, format {result.to}"
        return
    for file in result.files:
        if file.name.endswith((".safetensors", ".pt")):
            where = printable(str(result.out / file.name), 1000)
            yield f"wrote   {where}  {human_bytes(file.bytes)}  sha256 {file.sha256}"
    yield from (f"proof   {proof(one)}" for one in result.proofs)
    yield f"next    loraconv inspect {quoted(result.out / result.parts[0].name if result.parts else result.out)}"


def _ranks(modules: tuple[ModuleFacts, ...]) -> str:
    before, after = ([getattr(m, key) for m in modules] for key in ("rank_before", "rank"))
    return f"{_span(before)} -> {_span(after)} in {len(modules)} modules" if before != after else _span(after)


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"


def _errors(modules: tuple[ModuleFacts, ...]) -> Iterator[str]:
    """One line for each of the worst modules."""
    for module in sorted(modules, key=lambda one: -one.error)[:_SHOWN]:
        yield f"        {module.error:.2e}  rank {module.rank_before} -> {module.rank}  {printable(module.module)}"
    if len(modules) > _SHOWN:
        yield f"        and {len(modules) - _SHOWN} modules with smaller errors: --json and loraconv.json have all"

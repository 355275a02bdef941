"""The text of ``loraconv unfuse``: what was restored, and by what that is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraconv.names import human_bytes, printable, quoted

if TYPE_CHECKING:
    from loraconv.unfusing import UnfuseResult


def unfused(result: UnfuseResult) -> str:
    """Every file of the base with its SHA-256, how much was restored, and what to do next."""
    return "\n".join(_lines(result))


def _lines(result: UnfuseResult) -> Iterator[str]:
    verb = "would write" if result.dry_run else "wrote  "
    for file in result.files:
        path = printable(str(result.out / file.name), 1000)
        yield f"{verb} {path}  {human_bytes(file.bytes)}  sha256 {file.sha256}"
    if result.kept:
        yield f"{verb} {len(result.kept)} other files as they are  {human_bytes(sum(f.bytes for f in result.kept))}"
    yield f"base    {result.restored} of {result.tensors} tensors had been fused"
    if result.dry_run:
        yield "proof   none yet: the fused tensors are those of the journal (CRC-32)"
        return
    yield f"proof   {len(result.files)} files are the base's, byte for byte (SHA-256)"
    yield f"next    loraconv verify {quoted(result.out)}"

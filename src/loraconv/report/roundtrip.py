"""The text of ``loraconv roundtrip``: every hop with its proof, and whether the end is the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraconv.names import human_bytes, printable
from loraconv.report.text import proof

if TYPE_CHECKING:
    from loraconv.roundtripping import Hop, RoundtripResult


def roundtrip(result: RoundtripResult) -> str:
    """The verdict, a line for every hop, and why not."""
    way = " -> ".join([result.format, *(hop.to for hop in result.hops)])
    verdict = "the same again, bit for bit" if result.same else "NOT the same again"
    text = [f"verdict {verdict}: {way}", f"source  {printable(result.source, 1000)}"]
    text += [_line(hop) for hop in result.hops]
    alpha = "the same alpha" if result.alpha else "another alpha"
    text.append(f"end     {result.identical}/{result.factors} factors have the bytes of the start; {alpha}")
    for finding in result.findings:
        text += [f"why     {finding.sentence}", f"mend    {finding.mend}"]
    return "\n".join(text)


def _line(hop: Hop) -> str:
    apart = f"; the others within {hop.error:.1e}" if hop.equal < hop.modules else ""
    same = "the same adapter" if hop.same else "NOT the same adapter"
    return (
        f"  {hop.to}, {human_bytes(hop.bytes)}: {proof(hop.proof)}; against the start: {same},"
        f" {hop.equal}/{hop.modules} modules equal number for number{apart}; controls {hop.controls} caught"
    )

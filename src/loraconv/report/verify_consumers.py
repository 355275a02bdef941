"""The text of ``loraconv verify --consumers FILE``: a line for each group of consumers that do the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraconv.verification.consumers import ConsumersResult


def verdict(result: ConsumersResult) -> str:
    kind = f"a {result.format} file" if result.format else "this file"
    if result.same:
        return f"every consumer of {kind} applies it as trained"
    return f"NOT every consumer of {kind} applies it as trained"


def lines(result: ConsumersResult) -> list[str]:
    made = [f"  as trained: {_scales(result)}"]
    for (sentence, mend, meant), uses in groupby(result.uses, key=lambda use: (use.sentence, use.mend, use.meant)):
        made.append(f"  {_joined([use.consumer for use in uses])}: {sentence}")
        if mend and not meant:
            made.append(f"      {mend}")
    return made


def _scales(result: ConsumersResult) -> str:
    by_scale: dict[str, int] = {}
    for scale in result.trained.values():
        by_scale[f"{float(scale):.6g}"] = by_scale.get(f"{float(scale):.6g}", 0) + 1
    return ", ".join(f"scale {scale} in {count} modules" for scale, count in by_scale.items())


def _joined(consumers: Sequence[str]) -> str:
    """The names of consumers, those of one library behind its name: ``diffusers 0.31, 0.32``."""
    rows: dict[str, list[str]] = {}
    for name in consumers:
        library, _, version = name.partition(" ")
        rows.setdefault(library, []).append(version)
    return "; ".join(f"{library} {', '.join(versions)}".strip() for library, versions in rows.items())

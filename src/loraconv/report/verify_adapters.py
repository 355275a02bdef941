"""The text of ``loraconv verify A B``: the modules folded by projection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraconv.names import printable
from loraconv.verifier.delta import ModuleResult
from loraconv.verifier.proof import caught

if TYPE_CHECKING:
    from loraconv.verification.adapters import AdaptersResult

#: Findings about keys: those of the second adapter hold the first one's numbers and are not loaded.
_SAME_NUMBERS = {"foreign-prefix", "in-memory-names", "no-prefix", "peft-prefix"}


def verdict(result: AdaptersResult) -> str:
    if not result.same and all(f.slug in _SAME_NUMBERS for f in result.findings):
        return "NOT the same adapter to the consumers named below: the factors are the same, the keys are not"
    if not result.same:
        return "NOT the same adapter"
    return "the same adapter" + (f", within the bound given ({result.bound:g})" if result.bound is not None else "")


def lines(result: AdaptersResult) -> list[str]:
    groups: dict[str, list[ModuleResult]] = {}
    for module in result.modules:
        groups.setdefault(re.sub(r"\.\d+\.", ".{}.", module.module, count=1), []).append(module)
    text = [_line(name, modules) for name, modules in groups.items()]
    if result.magnitudes is not None:
        found = result.magnitudes
        text.append(
            f"  DoRA magnitudes: {found.one} in the first, {found.other} in the second, {found.equal} equal; the deltas"
            " above are those of the factors alone"
        )
    if result.controls:
        text.append(f"  controls {caught(result.controls)} caught")
    return text


def _line(name: str, modules: Sequence[ModuleResult]) -> str:
    apart = [m for m in modules if not m.equal]
    how = "equal number for number"
    if apart:
        worst = max(apart, key=lambda m: m.error - m.bound)
        how = f"relative error up to {worst.error:.1e}, allowed {worst.bound:.1e}"
    good = sum(m.same for m in modules)
    return f"  {printable(name)}: {good}/{len(modules)} the same; {how}"

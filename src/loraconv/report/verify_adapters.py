"""The text of ``loraconv verify A B``: the modules folded by projection."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraconv.names import printable
from loraconv.verification.adapters import AdaptersResult
from loraconv.verifier.delta import ModuleResult


def verdict(result: AdaptersResult) -> str:
    if not result.same:
        return "NOT the same adapter"
    return "the same adapter" + (f", within the bound given ({result.bound:g})" if result.bound is not None else "")


def lines(result: AdaptersResult) -> list[str]:
    groups: dict[str, list[ModuleResult]] = {}
    for module in result.modules:
        groups.setdefault(re.sub(r"\.\d+\.", ".{}.", module.module, count=1), []).append(module)
    return [_line(name, modules) for name, modules in groups.items()]


def _line(name: str, modules: Sequence[ModuleResult]) -> str:
    apart = [m for m in modules if not m.equal]
    how = "equal number for number"
    if apart:
        worst = max(apart, key=lambda m: m.error - m.bound)
        how = f"relative error up to {worst.error:.1e}, allowed {worst.bound:.1e}"
    good = sum(m.same for m in modules)
    return f"  {printable(name)}: {good}/{len(modules)} the same; {how}"

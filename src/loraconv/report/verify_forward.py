"""The text of ``loraconv verify --forward``: what was run, and how far every output is from the live adapter's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraconv.verification.forward import ForwardResult


def verdict(result: ForwardResult) -> str:
    return "the same forward pass" if result.same else "NOT the same forward pass"


def lines(result: ForwardResult) -> list[str]:
    return [
        f"  inputs: {result.inputs}",
        f"  the adapter changes the output by {result.effect:.1e} (relative L2; so are all distances)",
        *(f"  {o.what}: {o.distance:.1e} from the live adapter, allowed {o.allowed:.1e}" for o in result.outputs),
        *(f"  told apart: {name}, {distance:.1e}" for name, distance in result.mistakes.items()),
        f"  saved and loaded: {len(result.changed) or 'no'} tensor changed",
    ]

"""NaN and Inf: where the first one appeared, in words that name the sample or the module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from loraconv.trainer.adapters import Trained
from loraconv.trainer.sharding import share

Kind = Literal["data", "loss", "gradient", "weight"]


class Fault(Exception):
    """A number that is not finite ended a step. ``kind`` is what held it, ``where`` names its first place."""

    def __init__(self, kind: Kind, where: str) -> None:
        super().__init__(f"NaN or Inf in the {kind}: {where}")
        self.kind, self.where = kind, where


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """True if no tensor holds NaN or Inf, as far as this process has it; costs one pass and one look at the device."""
    shares = [s for t in tensors if (s := share(t)).numel()]
    norms = torch._foreach_norm(shares, ord=float("inf"))
    return bool(torch.isfinite(torch.stack([n.float() for n in norms])).all()) if norms else True


def first_bad(trained: Iterable[Trained], what: Callable[[Trained], torch.Tensor | None]) -> str:
    """The first parameter whose tensor is not finite, and how many there are; empty if this process has none."""
    bad = [t.name for t in trained if (tensor := what(t)) is not None and not finite([tensor])]
    return f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else "".join(bad)


def first_bad_module(model: torch.nn.Module, run: Callable[[], object]) -> str:
    """The first module in the order of execution whose output holds NaN or Inf; empty if none does."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, found))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _watch(name: str, found: list[str]) -> Callable[..., None]:
    def look(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        if not found and not all(bool(torch.isfinite(t).all()) for t in tensors if isinstance(t, torch.Tensor)):
            found.append(name.replace(".base_layer", "").replace(".default", ""))

    return look

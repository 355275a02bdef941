"""What a log line says about the weights: their norm, and how large the adapter is beside what it adapts."""

from __future__ import annotations

from typing import Any

import torch

from loraconv.trainer.adapters import AdaptedModule, Trainees
from loraconv.trainer.sharding import is_share, share
from loraconv.trainer.world import World


def of(trainees: Trainees, world: World) -> dict[str, Any]:
    """``weight_norm`` of all trained parameters, and ``delta_ratio``: ``|scale * up @ down| / |W|`` of each transformer
    block, in the Frobenius norm over its adapted modules (without DoRA's magnitudes)."""
    with torch.no_grad():
        row: dict[str, Any] = {"weight_norm": float(total_norm([t.parameter for t in trainees.parameters], world))}
        if trainees.modules:
            row["delta_ratio"] = delta_ratios(trainees.modules)
    return row


def total_norm(tensors: list[torch.Tensor], world: World) -> torch.Tensor:
    """The Euclidean norm of all numbers together, also where processes hold shares of them (all have to ask then)."""
    shares = [share(t) for t in tensors]
    norm = torch.nn.utils.get_total_norm(shares)
    if not any(map(is_share, tensors)):
        return norm
    return torch.tensor(world.sum(float(norm) ** 2) ** 0.5, device=norm.device)


def delta_ratios(modules: tuple[AdaptedModule, ...]) -> dict[str, float]:
    """Block -> ratio. ``|up @ down|^2`` is the sum of ``(up' up) * (down down')``, at rank size."""
    deltas: dict[str, float] = {}
    weights: dict[str, float] = {}
    for m in modules:
        block = ".".join(m.module.split(".")[:2])
        up, down = m.up.detach().double(), m.down.detach().double()
        square = float(((up.T @ up) * (down @ down.T)).sum()) * m.scale.value**2
        deltas[block] = deltas.get(block, 0.0) + max(0.0, square)
        weights[block] = weights.get(block, 0.0) + m.weight_norm**2
    return {block: (deltas[block] / weights[block]) ** 0.5 for block in deltas if weights[block]}

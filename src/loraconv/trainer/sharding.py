"""FSDP: every process keeps a share of the weights, and a block's are put together while it is computed.

The factors of a LoRA stay whole on every process. They are small, and their gradients are averaged as without FSDP, so
that such a run is, bit for bit, the one of as many processes that hold everything. A full fine-tune has shares of
weights, gradients and moments alike, and FSDP itself averages the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from loraconv.trainer.world import World


def shard(transformer: Any, world: World, whole: Iterable[torch.nn.Parameter]) -> None:
    """Split all parameters but ``whole`` over the processes, block by block; nothing is done where ``world`` is not
    sharded. Shares, and what stays whole, are then on the world's device."""
    if not world.sharded:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kept = set(whole)
    for parameter in kept:
        parameter.data = parameter.data.to(world.device)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in (*transformer.transformer_blocks, transformer):
        fully_shard(module, mesh=mesh, ignored_params=kept)


def is_share(tensor: torch.Tensor) -> bool:
    """True for a tensor of which this process has a part only."""
    return hasattr(tensor, "full_tensor")


def share(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: all of it, or its share; the memory is the tensor's own."""
    there: Any = tensor  # torch has no stubs for its DTensor's own methods
    mine: torch.Tensor = there.to_local() if is_share(tensor) else tensor
    return mine


def as_shared(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every process, split as ``like`` is; all processes have to call it."""
    if not is_share(like):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    return distribute_tensor(tensor.to(like.device), there.device_mesh, there.placements)


def collect(named: Iterable[tuple[str, torch.Tensor]], world: World) -> dict[str, torch.Tensor]:
    """The whole tensors by name on the first process, nothing on the others; all processes have to call it."""
    held = {}
    for name, tensor in named:
        there: Any = tensor
        whole = there.full_tensor().cpu() if is_share(tensor) else tensor
        if world.first:
            held[name] = whole.detach()
    return held

"""The processes of a run: what ``accelerate launch`` or ``torchrun`` started, or this one alone.

Each process learns from its own batches; gradients are averaged before the step. Each holds the whole model, or, under
``accelerate launch --use_fsdp``, its share of it. Only the first writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from loraconv.errors import UsageError
from loraconv.names import printable


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of them; ``sharded`` if each has a share of the weights only."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def sum(self, value: float) -> float:
        """The sum of a number over the processes, in float64."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total)

    def first_said(self, value: Any) -> Any:
        """The first of the processes' values that is not None, by rank; None if all are."""
        if self.size == 1:
            return value
        said: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(said, value)
        return next((v for v in said if v is not None), None)

    def all(self, fine: bool) -> bool:
        """True if it is so on every process. Whole weights are equal on all, so only about shares is there something
        to ask."""
        return self.sum(float(not fine)) == 0 if self.sharded else fine

    def wait(self) -> None:
        """Return when every process has come this far."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that the launcher's environment describes; its processes part at the end of the block."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)  # where NCCL puts the objects that it gathers
    torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(rank, size, place, _sharded())
    finally:
        torch.distributed.destroy_process_group()


def _sharded() -> bool:
    """True if ``accelerate launch`` was told to use FSDP; raises :class:`UsageError` for what is not offered."""
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "training does not use DeepSpeed",
            why="accelerate was told to",
            hint="accelerate launch --use_fsdp -m loraconv train splits the weights over the processes, too",
            slug="no-deepspeed",
        )
    # With it, transformers would fill the text encoder with weights on the first process only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return _asked("ACCELERATE_USE_FSDP")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def _device(name: str, local: int) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"there is no device {printable(name)}",
                why=printable(str(error)).splitlines()[0],
                hint='device = "auto" in [model]',
                slug="no-device",
            ) from None
    return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

"""The learning rate of every parameter at every step, and a warning where rate and scale cannot train.

With Adam every number of a factor moves by about its rate in a step. While ``up`` is small, one step can therefore
change what a layer adds by ``rate x scale x |down x|_1``: with peft's uniform ``down`` (of variance ``1 / (3 in)``) and
an input of unit variance about ``REACH x rate x scale x rank``. That is the yardstick of both warnings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from loraconv.names import fold_names
from loraconv.trainer.adapters import AdaptedModule, Trained, Trainees, by_pattern
from loraconv.trainer.settings import OptimizerSettings, ScheduleSettings, Settings

#: E|N(0, 1/3)|: the mean size of one number of ``down @ x`` before training.
REACH = math.sqrt(2 / (3 * math.pi))
#: One step that changes a layer's output by this share of its input throws the model off: blur and noise.
TOO_MUCH = 0.3
#: All steps together, each in the same direction, change no layer's output by more than this share: no effect.
TOO_LITTLE = 0.01


def share(schedule: ScheduleSettings, step: int, steps: int) -> float:
    """The share of the full rate at ``step`` (from 0) of ``steps``."""
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    gone, whole = step - schedule.warmup, max(1, steps - schedule.warmup)
    match schedule.kind:
        case "linear":
            return 1 - (1 - schedule.end) * gone / whole
        case "cosine":
            return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * gone / whole)) / 2
        case "step":
            return schedule.gamma ** (gone // schedule.every)
        case _:
            return 1.0


def full_rate(trained: Trained, optimizer: OptimizerSettings) -> float:
    """The rate of one parameter before warm-up and decay: its module's own, else its factor's, else the common one."""
    by_side = {"down": optimizer.down, "up": optimizer.up, "other": None}[trained.side]
    default = optimizer.rate if by_side is None else by_side
    return float(by_pattern(trained.module, optimizer.rates, default))


def make_optimizer(trainees: Trainees, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW with one group for each rate; ``full_rate`` of a group is what :func:`set_rates` scales."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for trained in trainees.parameters:
        groups.setdefault(full_rate(trained, settings), []).append(trained.parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "full_rate": rate} for rate, parameters in groups.items()],
        lr=settings.rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def set_rates(optimizer: torch.optim.Optimizer, schedule: ScheduleSettings, step: int, steps: int) -> float:
    """Give every group its rate of this step; returns the share of the full rate."""
    now = share(schedule, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * now
    return now


def rest_at_zero(optimizer: torch.optim.Optimizer) -> None:
    """A rate of 0 leaves the parameters alone: Adam would still turn -0.0 into 0.0 and keep moments."""
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def warnings(trainees: Trainees, settings: Settings) -> list[str]:
    """What is wrong with rate x scale, in words with the figures; empty where it can train."""
    reach = {m.module: _reach(m, settings.optimizer) for m in trainees.modules}
    total = sum(share(settings.schedule, step, settings.steps) for step in range(settings.steps))
    said = []
    strong = [m for m, r in reach.items() if r > TOO_MUCH]
    if strong:
        said.append(
            f"rate x scale is too large in {_named(strong)}: one step can change a layer's output by"
            f" {max(reach.values()):.2g} times its input (rate x scale x rank x {REACH:.2f}), and above {TOO_MUCH} the"
            " result is blur or noise; lower rate or alpha"
        )
    trained = {m: r for m, r in reach.items() if r > 0}
    weak = [m for m, r in trained.items() if r * total < TOO_LITTLE]
    if weak:
        said.append(
            f"rate x scale is too small in {_named(weak)}: {settings.steps} steps, all in one direction, would change a"
            f" layer's output by {max(trained[m] for m in weak) * total:.2g} of its input, so the LoRA would have no"
            " visible effect; raise rate, alpha or steps"
        )
    if len(trained) < len(reach) or not any(full_rate(t, settings.optimizer) for t in trainees.parameters):
        said.append("a rate of 0 leaves weights exactly as they are")
    return said


def _reach(module: AdaptedModule, settings: OptimizerSettings) -> float:
    rate = full_rate(Trained("", module.module, "up", module.up), settings)
    return REACH * rate * module.scale.value * module.scale.rank


def _named(modules: Iterable[str]) -> str:
    return "; ".join(fold_names(modules)[:4])

"""The training loop: a step at a time, with everything that is not finite stopped before it reaches a weight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from loraconv.data.sample import Dataset
from loraconv.errors import TrainingStopped
from loraconv.names import quoted
from loraconv.trainer import measures
from loraconv.trainer.adapters import Trainees
from loraconv.trainer.batches import Batch, Numbers, Order, held_out_batch, training_batch
from loraconv.trainer.faults import Fault, Kind, finite, first_bad, first_bad_module
from loraconv.trainer.loss import losses
from loraconv.trainer.loss_scale import LossScale
from loraconv.trainer.model import DTYPES, Base
from loraconv.trainer.randomness import seeded
from loraconv.trainer.schedule import rest_at_zero, set_rates
from loraconv.trainer.settings import Settings
from loraconv.trainer.sharding import is_share, share
from loraconv.trainer.world import World

Row = dict[str, Any]
Done = TypeVar("Done")


@dataclass(slots=True)
class Progress:
    """Where a run is: all of it is saved with every checkpoint. ``step`` counts the steps that are done; ``faulty`` are
    those that ended without an update."""

    step: int = 0
    scale: LossScale = field(default_factory=LossScale)
    faulty: list[int] = field(default_factory=list)
    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    stopped: bool = False


@dataclass(slots=True)
class Session:
    """Everything a step needs. ``save``, ``restore`` and ``log`` are how the loop reaches the disk; ``restore`` goes
    back to the last checkpoint and returns False where there is none."""

    settings: Settings
    base: Base
    trainees: Trainees
    optimizer: torch.optim.AdamW
    training: Dataset
    held_out: Dataset
    world: World
    progress: Progress
    save: Callable[[], None] = lambda: None
    restore: Callable[[], bool] = lambda: False
    log: Callable[[Row], None] = lambda row: None

    @property
    def order(self) -> Order:
        settings, world = self.settings, self.world
        return Order(len(self.training), settings.seed, settings.batch, world.rank, world.size)


def run(session: Session) -> None:
    """Train to the end of the run, or until the held-out loss no longer improves.

    Raises :class:`TrainingStopped` after too many faults, or one that nothing can be done about.
    """
    settings, progress = session.settings, session.progress
    if settings.safety.nonfinite == "rollback" and progress.step == 0:
        session.save()
    while progress.step < settings.steps and not progress.stopped:
        step, started = progress.step, time.monotonic()
        row: Row = {"step": step + 1}
        if step not in progress.faulty:
            try:
                row |= train_step(session, step)
            except Fault as fault:
                _handle(session, fault)
                continue
        progress.step += 1
        better = _validate(session, row)
        last = progress.step == settings.steps or progress.stopped
        if progress.step % settings.log.every == 0 or last or row.keys() & {"held_out_loss", "held_out_fault"}:
            row |= measures.of(session.trainees, session.world) | {"seconds": round(time.monotonic() - started, 4)}
            session.log(row)
        if better or last or progress.step % settings.checkpoints.every == 0:
            session.save()


def train_step(session: Session, step: int) -> Row:
    """One update from ``accumulate`` batches on every process; returns its loss, gradient norm and rate.

    Raises :class:`Fault`, on every process alike; the weights are then as they were unless the fault is in a weight.
    """
    settings, optimizer, progress = session.settings, session.optimizer, session.progress
    rate = set_rates(optimizer, settings.schedule, step, settings.steps)
    optimizer.zero_grad()
    loss = _agreed(session.world, lambda: _accumulate(session, step))
    row = {"loss": session.world.sum(loss) / session.world.size, "rate": rate * settings.optimizer.rate}
    norm = _clipped(session)
    if norm is None:
        return row | {"loss_scale": progress.scale.value, "skipped": "the loss scale was too large"}
    rest_at_zero(optimizer)
    optimizer.step()
    progress.scale.went_well()
    trained = session.trainees.parameters
    if not session.world.all(finite(t.parameter.data for t in trained)):
        raise _fault(session.world, "weight", first_bad(trained, lambda t: t.parameter.data))
    return row | {"gradient_norm": norm, **progress.scale.row()}


def _clipped(session: Session) -> float | None:
    """The gradients of all processes together, without the loss scale, clipped; returns their norm before that, and
    None if the loss scale was too large. Raises :class:`Fault` where that is not the reason for NaN or Inf."""
    world, trained = session.world, session.trainees.parameters
    gradients = [t.parameter.grad for t in trained if t.parameter.grad is not None]
    world.average([g for g in gradients if not is_share(g)])
    shares = [share(g) for g in gradients]
    torch._foreach_mul_(shares, 1 / session.progress.scale.value)
    norm = measures.total_norm(gradients, world)
    if not bool(torch.isfinite(norm)):
        if session.progress.scale.overflowed():
            return None
        raise _fault(world, "gradient", first_bad(trained, lambda t: t.parameter.grad))
    # As torch.nn.utils.clip_grads_with_norm_ does it, which knows no shares.
    torch._foreach_mul_(shares, (session.settings.optimizer.clip / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)


def _accumulate(session: Session, step: int) -> float:
    """The gradients of this process's batches, added up; returns their mean loss."""
    settings, base = session.settings, session.base
    total, steps = 0.0, base.scheduler.config.num_train_timesteps
    base.transformer.train()
    for numbers in session.order.of_step(step):

        def fetch(numbers: Numbers = numbers) -> Batch:
            return training_batch(session.training, session.order, numbers, settings.conditioning, steps)

        batch = _in_step(session.world, fetch).to(session.world.device)
        with seeded(settings.seed, "dropout", numbers[0]):
            loss = _loss(session, batch)
            torch.autograd.backward(loss * (session.progress.scale.value / settings.batch.accumulate))
        total += float(loss.detach()) / settings.batch.accumulate
    return total


def _loss(session: Session, batch: Batch) -> torch.Tensor:
    with _precision(session):
        each = losses(session.base, batch)
    if not session.world.all(bool(torch.isfinite(each).all())):
        bad = [n for n, value in zip(batch.names, each, strict=True) if not bool(torch.isfinite(value))]
        with _precision(session):
            module = first_bad_module(session.base.transformer, lambda: losses(session.base, batch))
        raise Fault("loss", f"sample {', '.join(bad)}, first in {module or 'the loss itself'}" if bad else "")
    return each.mean()


def _precision(session: Session) -> AbstractContextManager[Any]:
    """A full fine-tune keeps its weights in fp32 and computes in 16 bits; a LoRA's base is stored in 16 bits itself."""
    name = session.settings.model.precision
    if session.settings.kind == "lora" or name == "fp32":
        return nullcontext()
    return torch.autocast(session.world.device.type, DTYPES[name])


def _agreed(world: World, work: Callable[[], Done]) -> Done:
    """Do the work; if it failed on any process, fail on all of them with the same fault. A fault without a place is
    one that this process knows of and another can name."""
    fault, result = None, None
    try:
        result = work()
    except Fault as found:
        fault = found
    said = world.first_said((fault.kind, fault.where) if fault and fault.where else None)
    if said is not None:
        raise Fault(*said)
    if fault is not None:
        raise fault
    return cast(Done, result)


def _in_step(world: World, work: Callable[[], Done]) -> Done:
    """Before a forward pass of a sharded model, which no process can make alone, all have to have something to pass."""
    return _agreed(world, work) if world.sharded else work()


def _fault(world: World, kind: Kind, where: str) -> Fault:
    """The same fault on every process; of shares, not every process has the bad one."""
    return Fault(kind, world.first_said(where or None) or "the norm of all together is too large for float32")


def _handle(session: Session, fault: Fault) -> None:
    """Note the fault, and go on as the settings say; a ruined weight always means going back."""
    progress, safety = session.progress, session.settings.safety
    step = progress.step
    back = safety.nonfinite == "rollback" or fault.kind == "weight"
    session.log(
        {
            "step": step + 1,
            "fault": fault.kind,
            "where": fault.where,
            "action": "rollback" if back else safety.nonfinite,
        }
    )
    faulty = sorted({*progress.faulty, step})
    if safety.nonfinite == "stop" or len(faulty) > safety.limit:
        raise _stopped(session, fault, f"{len(faulty)} steps failed, {safety.limit} are allowed")
    if back and not session.restore():
        raise _stopped(session, fault, "there is no checkpoint to go back to")
    session.progress.faulty = faulty


def _check_data(path: Path | None) -> str:
    return (
        "loraconv train --resume goes on without that step" if path is None else f"loraconv check-data {quoted(path)}"
    )


def _stopped(session: Session, fault: Fault, why: str) -> TrainingStopped:
    allowed = session.settings.safety.nonfinite != "stop"
    hints = {
        "data": _check_data(session.settings.data.path),
        "gradient": "lower rate or clip in [optimizer], or take bf16 instead of fp16",
        "loss": "lower rate in [optimizer], or take bf16 instead of fp16",
        "weight": "lower rate in [optimizer]",
    }
    return TrainingStopped(
        f"step {session.progress.step + 1} gave numbers that are not finite, and the run stopped",
        where=f"{fault.kind}: {fault.where}",
        why=why if allowed else "nonfinite = 'stop' in [safety]",
        hint=hints[fault.kind],
    )


def _validate(session: Session, row: Row) -> bool:
    """Put the held-out loss into the row when it is due, and decide about early stopping; True if it is the best
    yet."""
    how, progress = session.settings.validation, session.progress
    due = how.every and (progress.step % how.every == 0 or progress.step == session.settings.steps)
    if not due or not len(session.held_out):
        return False
    try:
        loss = session.world.sum(_agreed(session.world, lambda: held_out_loss(session)))
    except Fault as fault:
        row["held_out_fault"] = str(fault)
        return False
    sound = math.isfinite(loss)
    row |= {"held_out_loss": loss} if sound else {"held_out_fault": "NaN or Inf in the loss"}
    better = sound and (progress.best is None or loss < progress.best - how.improvement)
    if better:
        progress.best, progress.best_step, progress.worse = loss, progress.step, 0
    else:
        progress.worse += 1
    progress.stopped = bool(how.patience) and progress.worse >= how.patience
    return better


def held_out_loss(session: Session) -> float:
    """This process's share of the mean loss over held-out samples and evenly spaced timesteps, with the same noise
    every time. Raises :class:`Fault` for NaN or Inf in a sample."""
    how, base, world = session.settings.validation, session.base, session.world
    samples = min(how.samples, len(session.held_out))
    cases = [(index, part) for index in range(samples) for part in range(how.timesteps)]
    total, steps = 0.0, base.scheduler.config.num_train_timesteps
    with _resting(base.transformer), torch.no_grad(), _precision(session):
        for at in range(world.rank, len(cases) + world.rank, world.size):
            index, part = cases[at % len(cases)]

            def fetch(index: int = index, part: int = part) -> Batch:
                return held_out_batch(session.held_out, index, part, how.timesteps, session.settings.seed, steps)

            loss = float(losses(base, _in_step(world, fetch).to(world.device)))
            total += loss if at < len(cases) else 0.0  # in the last round some have nothing left, and go along
    return total / len(cases)


@contextmanager
def _resting(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout within the block."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)

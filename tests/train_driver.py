"""Runs trainings and kills them, for test_train_resume.py: torch is imported once, every run is a fork of this process.

``train_driver.py OUT VARIANT POINT ...``: an undisturbed run into OUT/whole, then for each point a run into OUT/POINT
that is killed there with SIGKILL and resumed. A point is ``sample:N`` (the Nth sample that is asked for), ``save:N``
(in the middle of writing the Nth checkpoint), ``settle:N`` (between that checkpoint and the links to it) or
``twice`` (killed, resumed, killed again, resumed).
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  (imported before the forks, so that none of them has to)
import peft  # noqa: F401
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel  # noqa: F401

from loraconv.trainer import checkpoints, run
from loraconv.trainer.settings import BatchSettings, CheckpointSettings, LoraSettings, ModelSettings, ValidationSettings
from tests.train_support import full, opener, short, train


def settings(variant: str) -> Any:
    made = full("2b") if variant == "full" else short(variant, lora=LoraSettings(rank=4, alpha=2.0, dropout=0.3))
    precision = {"5b": "fp16", "1.5": "bf16"}.get(variant, "fp32")
    return replace(
        made,
        steps=8,
        batch=BatchSettings(accumulate=1 if precision == "fp32" else 2),
        model=replace(ModelSettings(tiny=made.model.tiny, device="cpu"), precision=precision),
        checkpoints=CheckpointSettings(every=3, keep=9),
        validation=ValidationSettings(every=2, samples=1, timesteps=2),
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_sample(last: int) -> None:
    asked = iter(range(10**6))

    def spoil(_index: int, sample: Any) -> Any:
        if next(asked) == last:
            kill()
        return sample

    run.open_dataset = opener(spoil=spoil)


def kill_before_settling(last: int) -> None:
    settled = iter(range(1, 10**6))
    real = checkpoints.settle

    def settle(*given: Any) -> None:
        if next(settled) == last:
            kill()
        real(*given)

    checkpoints.settle = settle


def kill_in_save(last: int) -> None:
    saved = iter(range(1, 10**6))
    real = checkpoints.write_state

    def write_state(*given: Any) -> None:
        real(*given)
        if next(saved) == last:
            kill()

    checkpoints.write_state = write_state


def child(out: Path, variant: str, *, point: str = "", resume: bool = False) -> int:
    """The exit status of one training in a fork of this process."""
    process = os.fork()
    if not process:
        torch.set_num_threads(1)
        run.open_dataset = opener()
        kind, _, number = point.partition(":")
        if kind == "sample":
            kill_at_sample(int(number))
        if kind == "save":
            kill_in_save(int(number))
        if kind == "settle":
            kill_before_settling(int(number))
        train(settings(variant), out, resume=resume)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def main() -> None:
    out, variant = Path(sys.argv[1]), sys.argv[2]
    assert child(out / "whole", variant) == 0
    for point in sys.argv[3:]:
        place = out / point
        first = "sample:5" if point == "twice" else point
        assert child(place, variant, point=first) == signal.SIGKILL, point
        if point == "twice":
            assert child(place, variant, point="sample:2", resume=True) == signal.SIGKILL
        assert child(place, variant, resume=True) == 0, point


if __name__ == "__main__":
    main()

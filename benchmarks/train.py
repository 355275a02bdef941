"""What the trainer's care costs: its step against a bare loop over the same diffusers model, in turn, on one machine.

``python benchmarks/train.py [ROUNDS]``. The bare loop has forward, loss, backward, clipping and AdamW, and its batches
ready; the trainer also draws its batches, looks for NaN and Inf four times, sets rates and makes a log row every tenth
step. Times are of the processor, so that other work on the machine counts for nothing.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from loraconv.trainer import loop, measures, run, tiny
from loraconv.trainer.batches import training_batch
from loraconv.trainer.loss import losses
from loraconv.trainer.settings import LoraSettings, tiny_settings
from loraconv.trainer.world import World

#: A tenth of the 2B: enough work in a step that the fixed costs of Python are not what is measured.
SIZE: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 64,
    "num_layers": 6,
    "time_embed_dim": 256,
    "sample_height": 20,
    "sample_width": 28,
}
STEPS = 10


def session() -> loop.Session:
    settings = replace(tiny_settings("2b"), lora=LoraSettings(rank=64, alpha=64.0))
    with mock.patch.dict(tiny.CONFIGS, {"2b": {**tiny.CONFIGS["2b"], **SIZE}}):
        return run._session(replace(settings, batch=replace(settings.batch, size=1)), World())


def bare(made: loop.Session) -> float:
    """Seconds of the processor for ten steps."""
    order = made.order
    batches = [training_batch(made.training, order, (n,), made.settings.conditioning, 1000) for n in range(STEPS)]
    parameters = [t.parameter for t in made.trainees.parameters]
    started = time.process_time()
    for batch in batches:
        made.optimizer.zero_grad()
        losses(made.base, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made.optimizer.step()
    return time.process_time() - started


def ours(made: loop.Session) -> float:
    started = time.process_time()
    for step in range(STEPS):
        row = loop.train_step(made, step)
    row |= measures.of(made.trainees, made.world)
    return time.process_time() - started


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    made = session()
    bare(made)
    peaks, ratios = [], []
    for _ in range(rounds):
        base = bare(made)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        ratios.append(ours(made) / base)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"a step takes {statistics.median(ratios):.3f} of the bare loop's ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"peak memory {peaks[0] / 1e6:.2f} GB bare, {peaks[-1] / 1e6:.2f} GB after both")


if __name__ == "__main__":
    main()

"""What the tests of training share: a small data set with a hole to put NaN into, short settings, one run at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraconv.data import DataSettings, ModelNeeds, Sample
from loraconv.trainer import loop
from loraconv.trainer.adapters import prepare
from loraconv.trainer.loss_scale import initial
from loraconv.trainer.model import load_base
from loraconv.trainer.run import Outcome, perform
from loraconv.trainer.schedule import make_optimizer
from loraconv.trainer.settings import (
    BatchSettings,
    CheckpointSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    Settings,
    ValidationSettings,
)
from loraconv.trainer.world import World

VARIANTS = ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")
#: What tests/sat_run.py calls the same models.
SAT_VARIANTS = dict(zip(VARIANTS, ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"), strict=True))
SPOIL = Callable[[int, Sample], Sample]


class Clips:
    """Seeded latents of the size that the model needs; ``spoil`` may change a sample on its way out."""

    def __init__(self, needs: ModelNeeds, count: int, first: int = 0, spoil: SPOIL | None = None) -> None:
        self.needs, self.count, self.first, self.spoil = needs, count, first, spoil
        self.fingerprint = f"clips {needs} {count} {first}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        noise = torch.Generator().manual_seed(1000 + self.first + index)
        image = torch.zeros(self.needs.shape) if self.needs.image else None
        if image is not None:
            image[0] = torch.randn(self.needs.shape[1:], generator=noise)
        latents = torch.randn(self.needs.shape, generator=noise).cumsum(dim=-1) / 3
        prompt = torch.randn(self.needs.tokens, self.needs.text_dim, generator=noise)
        sample = Sample(f"clip-{self.first + index}", latents, prompt, image)
        return self.spoil(index, sample) if self.spoil else sample


def opener(count: int = 6, spoil: SPOIL | None = None) -> Callable[[DataSettings, ModelNeeds], tuple[Clips, Clips]]:
    """What stands in for ``open_dataset``."""
    return lambda _settings, needs: (Clips(needs, count, spoil=spoil), Clips(needs, 2, first=count))


def short(variant: str = "2b", **changes: Any) -> Settings:
    """A few steps with everything that a run does; ``changes`` are whole sections or top-level values."""
    settings = Settings(
        steps=6,
        model=ModelSettings(tiny=variant, device="cpu"),
        lora=LoraSettings(rank=4, alpha=2.0),
        optimizer=OptimizerSettings(rate=1e-2),
        schedule=ScheduleSettings(warmup=0),
        batch=BatchSettings(size=1),
        validation=ValidationSettings(every=0),
        checkpoints=CheckpointSettings(every=3),
        log=LogSettings(every=1),
    )
    return replace(settings, **changes)


def full(variant: str = "2b", **changes: Any) -> Settings:
    """The same for a full fine-tune."""
    return short(variant, kind="full", lora=LoraSettings(), **changes)


def train(settings: Settings, out: Path, *, resume: bool = False) -> Outcome:
    """One run, without a word."""
    return perform(settings, out, resume=resume, dry_run=False, say=lambda *_: None)


def session(settings: Settings, *, count: int = 6, spoil: SPOIL | None = None) -> loop.Session:
    """A session that writes nothing."""
    base = load_base(settings.model, settings.seed, settings.kind)
    trainees = prepare(base.transformer, settings)
    needs = base.needs(settings.data, settings.model.precision, "cpu")
    training, held_out = opener(count, spoil)(settings.data, needs)
    return loop.Session(
        settings,
        base,
        trainees,
        make_optimizer(trainees, settings.optimizer),
        training,
        held_out,
        World(),
        loop.Progress(scale=initial(settings.model.precision)),
    )


def weights(made: loop.Session) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {t.name: t.parameter.detach().clone() for t in made.trainees.parameters}


def rows(out: Path) -> list[dict[str, Any]]:
    """The metrics as they stand in the file."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

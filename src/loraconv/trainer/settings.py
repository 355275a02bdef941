"""What a training run is to do: a TOML file, read strictly into plain values, each with a default and a check.

A key that is not known is an error that names the nearest one, never a setting that silently does nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraconv.data.settings import DataSettings
from loraconv.errors import UsageError

TINY = ("2b", "5b", "5b-i2v", "1.5", "1.5-i2v")
LAYOUTS = ("sat", "diffusers", "peft")
PRECISIONS = ("fp32", "bf16", "fp16")
TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The ``[model]``: ``path`` is a pipeline or transformer folder, or a Hub id that is in the local cache; ``tiny``
    is one of :data:`TINY`, a small random model of that kind. Exactly one of the two. ``precision`` is that of the
    frozen weights; the factors of a LoRA, and every weight of a full fine-tune, are always kept in fp32."""

    path: str = ""
    tiny: str = ""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        _one_of("tiny", self.tiny, ("", *TINY))
        _one_of("precision", self.precision, PRECISIONS)


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The ``[lora]``. ``targets`` are names or patterns (``attn1.to_q``, ``ff.*``) of linear layers in the transformer
    blocks; ``ranks`` and ``alphas`` give a pattern its own value; ``layers`` (``0-9, 20``) is empty for all of them.
    ``scale = alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``; ``dora`` as in peft."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    layers: str = ""
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        for name, rank in {"rank": self.rank, **self.ranks}.items():
            _check(rank >= 1, name, rank, "a rank is at least 1")
        for name, alpha in {"alpha": self.alpha, **self.alphas}.items():
            _check(0 < alpha < math.inf, name, alpha, "with an alpha of 0 or less nothing can be learned")
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "it is a share")
        _check(bool(self.targets), "targets", "empty", "nothing would be trained")


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW. ``down`` and ``up`` are the rates of the two factors (default: ``rate``); ``rates`` gives the modules of a
    pattern their own. ``clip`` is the greatest gradient norm of one step, over all parameters together."""

    rate: float = 1e-4
    down: float | None = None
    up: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0

    def __post_init__(self) -> None:
        given = {"rate": self.rate, "down": self.down, "up": self.up, **self.rates}
        for name, rate in given.items():
            _check(rate is None or 0 <= rate < math.inf, name, rate, "a learning rate is a number from 0 on")
        _check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two shares below 1")
        _check(self.eps > 0, "eps", self.eps, "it keeps a division from being one by zero")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "weights would grow without end")
        _check(self.clip > 0, "clip", self.clip, "no gradient would be left")


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """The learning rate over the run: ``warmup`` steps up to the full rate, then ``constant``, ``linear`` or ``cosine``
    down to the share ``end`` of it, or ``step``: times ``gamma`` after every ``every`` steps."""

    kind: str = "constant"
    warmup: int = 20
    end: float = 0.0
    every: int = 1000
    gamma: float = 0.5

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("constant", "linear", "cosine", "step"))
        _check(self.warmup >= 0, "warmup", self.warmup, "it is a number of steps")
        _check(0 <= self.end <= 1, "end", self.end, "it is a share of the full rate")
        _check(self.every >= 1, "every", self.every, "it is a number of steps")
        _check(0 < self.gamma <= 1, "gamma", self.gamma, "it is a share")


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """One step learns from ``size * accumulate`` samples on each process."""

    size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check(self.size >= 1, "size", self.size, "it is a number of samples")
        _check(self.accumulate >= 1, "accumulate", self.accumulate, "it is a number of batches")


@dataclass(frozen=True, slots=True)
class ConditioningSettings:
    """I2V only: log-normal noise on the conditioning image (the mean and spread of the logarithm of its strength), and
    the share of samples without an image. Defaults: the reference training of CogVideoX (zai-org/CogVideo)."""

    noise_mean: float = -3.0
    noise_std: float = 0.5
    dropout: float = 0.05

    def __post_init__(self) -> None:
        _check(self.noise_std >= 0, "noise_std", self.noise_std, "a spread is at least 0")
        _check(0 <= self.dropout <= 1, "dropout", self.dropout, "it is a share")


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """NaN or Inf anywhere ends the step without an update. Then ``nonfinite`` says what follows: ``skip`` goes on with
    the next step, ``rollback`` goes back to the last checkpoint first, ``stop`` ends the run. More than ``limit`` such
    steps end it in any case."""

    nonfinite: str = "skip"
    limit: int = 10

    def __post_init__(self) -> None:
        _one_of("nonfinite", self.nonfinite, ("skip", "rollback", "stop"))
        _check(self.limit >= 0, "limit", self.limit, "it is a number of steps")


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """The loss on held-out samples with fixed noise and timesteps, ``every`` so many steps (0: never). ``patience``
    stops the run after so many validations without an improvement of more than ``improvement`` (0: never)."""

    every: int = 100
    samples: int = 8
    timesteps: int = 4
    patience: int = 0
    improvement: float = 0.0

    def __post_init__(self) -> None:
        for name in ("every", "patience", "improvement"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "it is at least 0")
        _check(self.samples >= 1, "samples", self.samples, "something has to be measured")
        _check(self.timesteps >= 1, "timesteps", self.timesteps, "something has to be measured")


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """A checkpoint ``every`` so many steps, and one at the end; the last ``keep`` and the best one stay. ``layouts``
    are of :data:`LAYOUTS` (empty: all that can carry what is trained, SAT, which holds the base as well, for tiny
    models only). ``model_parallel`` is the number of rank files of the SAT layout."""

    every: int = 100
    keep: int = 2
    layouts: tuple[str, ...] = ()
    model_parallel: int = 1

    def __post_init__(self) -> None:
        _check(self.every >= 1, "every", self.every, "it is a number of steps")
        _check(self.keep >= 1, "keep", self.keep, "the last one is needed to go on from")
        _check(self.model_parallel in (1, 2), "model_parallel", self.model_parallel, "1 and 2 are written")
        for layout in self.layouts:
            _one_of("layouts", layout, LAYOUTS)


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Metrics ``every`` so many steps go to ``metrics.jsonl``, to TensorBoard if that is installed, and to
    ``tracker``."""

    every: int = 10
    tracker: str = ""
    project: str = "loraconv"

    def __post_init__(self) -> None:
        _check(self.every >= 1, "every", self.every, "it is a number of steps")
        _one_of("tracker", self.tracker, ("", *TRACKERS))


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole file. ``kind`` is ``lora``, or ``full`` for the transformer itself; ``frozen`` are patterns of
    parameters that a full fine-tune leaves alone."""

    steps: int = 1000
    seed: int = 0
    kind: str = "lora"
    frozen: tuple[str, ...] = ()
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    conditioning: ConditioningSettings = field(default_factory=ConditioningSettings)
    safety: SafetySettings = field(default_factory=SafetySettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, ("lora", "full"))
        _check(self.steps >= 1, "steps", self.steps, "nothing would be trained")
        _check(0 <= self.seed < 1 << 63, "seed", self.seed, "it is a number from 0 on")
        _check(self.kind == "full" or not self.frozen, "frozen", self.frozen, "a LoRA freezes everything anyway")
        if self.kind == "full" and self.lora != LoraSettings():
            raise UsageError("[lora] has no meaning for kind = 'full'", hint="leave [lora] out, or kind = 'lora'")
        given = self.checkpoints.layouts
        unable = {"peft"} if self.kind == "full" else {"sat", "diffusers"} if self.lora.dora else set()
        for layout in sorted(unable & set(given)):
            raise UsageError(f"the {layout} layout cannot carry what is trained", hint="leave it out of layouts")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _check(fine: bool, name: str, value: object, why: str) -> None:
    if not fine:
        raise UsageError(f"{name} = {value} makes no sense", why=why, slug="setting")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _check(value in known, name, repr(value), f"it is one of {', '.join(k for k in known if k)}")


def tiny_settings(variant: str) -> Settings:
    """Settings that train a tiny model in less than a minute on a CPU; the rate is what its width asks for."""
    return Settings(
        steps=200,
        model=ModelSettings(tiny=variant),
        lora=LoraSettings(rank=8, alpha=8.0),
        optimizer=OptimizerSettings(rate=5e-3),
        batch=BatchSettings(size=4),
        validation=ValidationSettings(every=50),
        checkpoints=CheckpointSettings(every=50),
    )

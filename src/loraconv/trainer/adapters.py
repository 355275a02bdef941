"""What is trained: LoRA factors that peft puts into the transformer, or the transformer's own weights.

Trained weights are kept in fp32, whatever the precision of the frozen ones: at the learning rates of LoRA most updates
would be lost to the rounding of a 16-bit weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Literal

import torch

from loraconv.adapter import layer_of
from loraconv.errors import UsageError
from loraconv.names import printable
from loraconv.scale import Scale
from loraconv.trainer.randomness import seeded
from loraconv.trainer.settings import LoraSettings, Settings
from loraconv.trainer.sharding import shard
from loraconv.trainer.world import World

ADAPTER = "default"
Side = Literal["down", "up", "other"]


@dataclass(frozen=True, slots=True)
class Trained:
    """One trained parameter: its module (diffusers name), which factor it is, and the parameter itself in fp32."""

    name: str
    module: str
    side: Side
    parameter: torch.nn.Parameter


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """A linear layer with LoRA factors: ``down`` (rank, in), ``up`` (out, rank), ``magnitude`` (out) with DoRA.
    ``weight_norm`` is the Frobenius norm of its frozen weight."""

    module: str
    weight_norm: float
    down: torch.nn.Parameter
    up: torch.nn.Parameter
    scale: Scale
    magnitude: torch.nn.Parameter | None = None


@dataclass(frozen=True, slots=True)
class Trainees:
    """Everything that is trained, in the order of the model; ``modules`` is empty for a full fine-tune."""

    parameters: tuple[Trained, ...]
    modules: tuple[AdaptedModule, ...] = ()

    @property
    def count(self) -> int:
        return sum(t.parameter.numel() for t in self.parameters)


def matches(name: str, pattern: str) -> bool:
    """True if ``pattern`` (``*`` and ``?`` as in a shell) is ``name``, or its end behind a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def by_pattern(name: str, values: Mapping[str, Any], default: Any) -> Any:
    """The value of the last pattern that matches, so that a later line of the file can narrow an earlier one."""
    return next((value for pattern, value in reversed(list(values.items())) if matches(name, pattern)), default)


def prepare(transformer: Any, settings: Settings, world: World | None = None) -> Trainees:
    """Freeze what is not trained, add the adapter, and split the weights if the world is sharded; raises
    :class:`UsageError` for a pattern that matches nothing."""
    world = world or World()
    transformer.requires_grad_(False)
    if settings.kind == "full":
        shard(transformer, world, ())
        trainees = _weights(transformer, settings.frozen)
    else:
        trainees = _adapter(transformer, settings.lora, settings.seed)
        shard(transformer, world, [t.parameter for t in trainees.parameters])
    for pattern in settings.optimizer.rates:
        _refuse_unmatched("rates", pattern, [t.module for t in trainees.parameters])
    return trainees


def _weights(transformer: Any, frozen: tuple[str, ...]) -> Trainees:
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in frozen:
        _refuse_unmatched("frozen", pattern, names)
    made = []
    for name, parameter in transformer.named_parameters():
        if not any(matches(name, p) or matches(name.rpartition(".")[0], p) for p in frozen):
            parameter.requires_grad_(True)
            made.append(Trained(name, name.rpartition(".")[0], "other", parameter))
    if not made:
        raise UsageError("every parameter is frozen, so nothing would be trained", slug="setting")
    return Trainees(tuple(made))


def _adapter(transformer: Any, lora: LoraSettings, seed: int) -> Trainees:
    from peft import LoraConfig

    targets = _targets(transformer, lora)
    ranks = {name: int(by_pattern(name, lora.ranks, lora.rank)) for name in targets}
    alphas = {name: float(by_pattern(name, lora.alphas, lora.alpha)) for name in targets}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides whatever number it is
        target_modules=targets,
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != lora.rank},
        alpha_pattern={f"^{re.escape(name)}$": alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    with seeded(seed, "adapter"):
        transformer.add_adapter(config, ADAPTER)
    modules = tuple(
        _adapted(transformer, name, Scale(Fraction(alphas[name]), ranks[name], "the run's settings", lora.rslora))
        for name in targets
    )
    return Trainees(tuple(t for m in modules for t in _factors(m)), modules)


def _adapted(transformer: torch.nn.Module, name: str, scale: Scale) -> AdaptedModule:
    layer: Any = transformer.get_submodule(name)
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight if len(layer.lora_magnitude_vector) else None
    factors = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, magnitude]
    for factor in factors:
        if factor is not None:
            factor.data = factor.data.float()
            factor.requires_grad_(True)
    if not abs(layer.scaling[ADAPTER] - scale.value) <= 1e-12 * abs(scale.value):
        raise RuntimeError(f"{name}: peft applies {layer.scaling[ADAPTER]}, not {scale.value}")
    norm = float(layer.base_layer.weight.detach().float().norm())
    return AdaptedModule(name, norm, factors[0], factors[1], scale, magnitude)


def _factors(module: AdaptedModule) -> list[Trained]:
    made = [
        Trained(f"{module.module}.lora_A.weight", module.module, "down", module.down),
        Trained(f"{module.module}.lora_B.weight", module.module, "up", module.up),
    ]
    if module.magnitude is not None:
        made.append(Trained(f"{module.module}.lora_magnitude_vector", module.module, "other", module.magnitude))
    return made


def _targets(transformer: torch.nn.Module, lora: LoraSettings) -> list[str]:
    """The full names of the linear layers that get factors, in the order of the model."""
    layers = _layers(lora.layers)
    linear = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")
    ]
    for pattern in (*lora.targets, *lora.ranks, *lora.alphas):
        _refuse_unmatched("lora", pattern, linear)
    blocks = {layer_of(name) for name in linear}
    if layers is not None and layers - blocks:
        raise UsageError(
            f"the model has no layer {max(layers)}", why=f"its layers are 0 to {len(blocks) - 1}", slug="setting"
        )
    chosen = [n for n in linear if any(matches(n, p) for p in lora.targets)]
    return [name for name in chosen if layers is None or layer_of(name) in layers]


def _layers(text: str) -> set[int] | None:
    """``0-9, 20`` as a set of numbers; None for an empty text."""
    layers: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        found = re.fullmatch(r"(\d{1,4})(?:\s*-\s*(\d{1,4}))?", part)
        if found is None:
            raise UsageError(f"layers = {text!r} makes no sense", hint='layers = "0-9, 20"', slug="setting")
        layers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return layers or None


def _refuse_unmatched(section: str, pattern: str, names: list[str]) -> None:
    if not any(matches(name, pattern) or matches(name.rpartition(".")[0], pattern) for name in names):
        inside = sorted({re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in names})
        raise UsageError(
            f"the pattern {printable(pattern)} of {section} matches nothing in the model",
            why=f"there are {', '.join(inside[:12])}",
            hint="take one of these names; * stands for any characters",
            slug="setting",
        )

"""A CogVideoX transformer and its LoRA under SAT's names: the converter's table of the family, read backwards.

Facts about what a rank of a model-parallel run holds: SwissArmyTransformer 0.4.12 ``sat/mpu``, ``lora2.py``;
checkpoints written by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from loraconv.data.tensors import InMemory
from loraconv.errors import FormatError
from loraconv.lazy import Joined, Lazy
from loraconv.names import fold_names
from loraconv.registry import dialect, families
from loraconv.rules import Fused, Regrouped, Rename, Rule, Spelling, fill, match
from loraconv.trainer.adapters import AdaptedModule

Tensors = Mapping[str, torch.Tensor]
Part = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class SatModule:
    """One rank's state dict under full names, and which of them are trained."""

    tensors: dict[str, Lazy]
    trained: tuple[str, ...]


def sat_module(
    base: Tensors,
    adapter: Iterable[AdaptedModule],
    trained: Iterable[str],
    extra: Tensors,
    *,
    rank: int = 0,
    world: int = 1,
) -> SatModule:
    """Rank ``rank`` of ``world``. ``base`` and ``trained`` (for a full fine-tune) have diffusers' names; ``extra`` has
    SAT's, and is the same on every rank. Raises :class:`FormatError` for what SAT has no name for.

    Every rank of SAT adds ``up @ down`` of the output projection to the sum over the ranks, and the one that reads such
    a checkpoint takes the mean over the ranks; so that this mean is the adapter, ``up`` of that projection is written
    ``world`` times as large (exact, a power of two).
    """
    spelling = next(f for f in families() if f.name == "cogvideox").spellings["sat"]
    split = _Split(rank, world)
    factors = _factors(adapter, spelling, split)
    adapted = {name.partition(".matrix_")[0] for name in factors}
    made: dict[str, Lazy] = {}
    origin: dict[str, str] = {}
    for name in base:
        there, tensor = _weight(name, base, spelling, split)
        original = there.rpartition(".")
        there = f"{original[0]}.original.{original[2]}" if original[0] in adapted else there
        made.setdefault(there, tensor)
        origin[name] = there
    prefix = dialect("sat").prefixes[0]
    tensors = {**extra_tensors(extra), **made, **factors}
    names = [*factors, *dict.fromkeys(origin[name] for name in trained)]
    if not factors:  # the table that CogVideoX never uses is a parameter like any other to a full fine-tune by SAT
        names += [name for name in extra if name.startswith("transformer.")]
    return SatModule({prefix + n: t for n, t in tensors.items()}, tuple(prefix + n for n in names))


def extra_tensors(extra: Tensors) -> dict[str, Lazy]:
    return {name: InMemory(tensor) for name, tensor in extra.items()}


@dataclass(frozen=True, slots=True)
class _Split:
    """What one model-parallel rank holds of a tensor."""

    rank: int
    world: int

    def part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.world, dim)[self.rank]

    def weight(self, rule: Rule, param: str, tensor: torch.Tensor) -> torch.Tensor:
        parallel = rule.parallel if isinstance(rule, Rename | Fused) else "whole"
        if parallel == "rows":
            return self.part(tensor, 0)
        return self.part(tensor, 1) if parallel == "columns" and param == "weight" else tensor

    def factors(self, rule: Rule, module: AdaptedModule) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(rule, Fused):
            return module.down, self.part(module.up, 0)
        return self.part(module.down, 1), module.up * self.world


def _factors(adapter: Iterable[AdaptedModule], spelling: Spelling, split: _Split) -> dict[str, Lazy]:
    sat = dialect("sat")
    made: dict[str, Lazy] = {}
    for module in adapter:
        found = spelling.find_part(module.module)
        if found is None or not spelling.can_adapt(found[0]):
            raise _unnamed([module.module])
        rule, _ = spelling.find(found[0]) or (None, None)
        assert rule is not None
        for template, tensor in zip((sat.down, sat.up), split.factors(rule, module), strict=True):
            made[fill(template, {"module": found[0], "part": str(found[1])})] = InMemory(tensor.detach())
    return made


def _weight(name: str, base: Tensors, spelling: Spelling, split: _Split) -> tuple[str, Lazy]:
    """SAT's name of a parameter, and the tensor that stands there: the whole of it, whichever part ``name`` is."""
    module, _, param = name.rpartition(".")
    for rule in spelling.rules:
        if param not in (rule.params if isinstance(rule, Rename) else ("weight", "bias")):
            continue
        fields = next((f for t in rule.targets if (f := match(t, module)) is not None), None)
        if fields is not None:
            parts = [split.weight(rule, param, base[f"{fill(t, fields)}.{param}"]) for t in rule.targets]
            return f"{fill(rule.there, fields)}.{param}", _joined(rule, parts)
    raise _unnamed([name])


def _joined(rule: Rule, parts: list[torch.Tensor]) -> Lazy:
    if isinstance(rule, Regrouped):
        dealt = {n: chunk for numbers, part in zip(rule.here.values(), parts, strict=True)
                 for n, chunk in zip(numbers, part.chunk(len(numbers)), strict=True)}  # fmt: skip
        parts = [dealt[n] for n in sorted(dealt)]
    made = tuple(InMemory(part.detach()) for part in parts)
    return made[0] if len(made) == 1 else Joined(made, 0)


def _unnamed(names: list[str]) -> FormatError:
    return FormatError(
        "SAT has no name for a part of the model",
        where="; ".join(fold_names(names)[:4]),
        hint='leave sat out: layouts = ["diffusers", "peft"] in [checkpoints]',
        slug="cannot-carry",
    )

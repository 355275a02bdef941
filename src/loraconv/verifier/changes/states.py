"""Two states of a checkpoint and what was expected of the second: which changes should not be, and what else is worth
saying about those that may."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from loraconv.lazy import TensorRef
from loraconv.verifier.changes.comparison import Change, elements, is_up
from loraconv.verifier.changes.renames import bare
from loraconv.verifier.diagnosis import shown

Tensors = Mapping[str, TensorRef]
Expect = Literal["identical", "only-lora"]

#: Parts of a training engine's checkpoint that a released model keeps in other files, and what they are.
_COMPONENTS = {"first_stage_model.": "the VAE", "conditioner.": "the text encoder"}
#: What a trainer keeps beside the weights where it keeps it among them: averages, moments.
_EXTRA = re.compile(r"^(?:model_ema|optimizer)\.|\.exp_avg(?:_sq)?$")


@dataclass(frozen=True, slots=True)
class States:
    """One rank of a checkpoint in two states. ``averaged`` says of each whether it is the EMA copy of a run;
    ``trained`` are the names that the trainer says it trained, None where it does not say."""

    before: Tensors
    after: Tensors
    changes: tuple[Change, ...]
    expect: Expect | None = None
    averaged: tuple[bool, bool] = (False, False)
    trained: frozenset[str] | None = None

    def unexpected(self) -> list[Change]:
        """The changes that should not be: without a word, or with ``identical``, every one; with ``only-lora`` all but
        those of LoRA factors, of names that the LoRA's wrapper marks, of what a trainer keeps beside the weights, and
        of whole components that the first state has nothing of."""
        return [change for change in self.changes if not self._is_expected(change)]

    def _is_expected(self, change: Change) -> bool:
        if change.kind == "identical":
            return True
        if self.expect != "only-lora" or change.kind == "missing":
            return False
        if change.kind == "renamed":
            return is_marked(change)
        appeared = change.kind == "new" and self.component(change.name) is not None
        return change.is_factor or _EXTRA.search(change.name) is not None or appeared

    def component(self, name: str) -> str | None:
        """The component of an engine that ``name`` belongs to, if the first state has nothing of it."""
        prefix = next((p for p in _COMPONENTS if name.startswith(p)), None)
        held = prefix is None or any(n.startswith(prefix) for n in self.before)
        return None if held or prefix is None else _COMPONENTS[prefix]

    def parted(self) -> Iterator[list[str]]:
        """Names that shared one storage before and do not any more."""
        after = {c.name: c.other or c.name for c in self.changes if c.kind != "missing"}
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, ref in self.before.items():
            if ref.storage[1]:
                place = (ref.file.inode, ref.storage, ref.offset, ref.shape, ref.strides)
                groups.setdefault(place, []).append(name)
        for names in groups.values():
            held = [self.after[after[name]] for name in names if name in after]
            if len({(ref.file.inode, ref.storage, ref.offset) for ref in held}) > 1:
                yield names

    def untrained(self) -> list[str]:
        """The names of all up factors of the second state if every one is zero everywhere; else none."""
        ups = [name for name in self.after if is_up(name)]
        return [] if any(chunk.any() for name in ups for chunk in elements(self.after[name])) else ups


def is_marked(change: Change) -> bool:
    """True where a weight got the mark of an adapted layer: ``X.weight`` is ``X.original.weight`` now."""
    return bool(change.other) and bare(change.other) == change.name


def remarks(states: States) -> Iterator[str]:
    """What is worth knowing about changes that were expected."""
    for names in states.parted():
        yield f"{shown(names)} were one tensor before and are stored one by one now"
    if states.expect != "only-lora":
        return
    marked = [change.name for change in states.changes if is_marked(change)]
    if marked:
        yield f"{len(marked)} weights have the mark of an adapted layer now, with the same bytes: {shown(marked)}"
    factors = [change for change in states.changes if change.is_factor]
    kinds = ", ".join(sorted({change.kind for change in factors}))
    yield f"{len(factors)} LoRA factors: {kinds}" if factors else "no tensor is a LoRA factor"
    if states.untrained():
        yield "the LoRA never moved: every up factor is zero"
    if states.averaged[0] != states.averaged[1]:
        yield f"the {'second' if states.averaged[1] else 'first'} is the moving average (EMA) of the weights"
    beside = [states.component(change.name) for change in states.changes if change.kind == "new"]
    found = [component for component in dict.fromkeys(beside) if component is not None]
    if found:
        yield f"the second also holds {' and '.join(found)}, of which the first has nothing to compare with"

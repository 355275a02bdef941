"""A checkpoint before and after a training, a save or a load: which tensors are the same, what became of the others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, UsageError
from loraconv.health import check_storage
from loraconv.lazy import TensorRef
from loraconv.model_folder import CONFIG, PIPELINE, Model, open_model
from loraconv.names import printable, quoted
from loraconv.source import Source, open_source, refuse_parts
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.changes.comparison import Change, Figures, compare_states
from loraconv.verifier.changes.diagnosis import diagnose_changes
from loraconv.verifier.changes.states import Expect, States, remarks
from loraconv.verifier.diagnosis import addressed


@dataclass(frozen=True, slots=True)
class ChangesResult(VerifyResult):
    """What became of every tensor. ``same`` is true if it is what was expected: with ``only-lora`` LoRA factors alone
    changed or appeared, else nothing did. ``notices`` are worth knowing and no reason to object."""

    mode: ClassVar[str] = "changes"

    before: str = ""
    after: str = ""
    expect: Expect | None = None
    changes: tuple[Change, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Kind of change -> number of tensors, without kinds that do not occur."""
        return dict(Counter(change.kind for change in self.changes))

    def details(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "expect": self.expect,
            "counts": self.counts,
            "tensors": [_entry(change) for change in self.changes if change.kind != "identical"],
            "notices": list(self.notices),
        }


def _entry(change: Change) -> dict[str, Any]:
    forms = (
        {"dtype": form[0], "shape": list(form[1])} if form is not None else None
        for form in (change.before, change.after)
    )
    before, after = forms
    return {
        "kind": change.kind,
        "name": change.name,
        "other": change.other,
        "rank": change.rank,
        "before": before,
        "after": after,
        "figures": _figures(change.figures),
    }


def _figures(figures: Figures | None) -> dict[str, Any] | None:
    return None if figures is None else {**asdict(figures), "relative": number(figures.relative)}


def verify_changes(before: str | Path, after: str | Path, *, expect: str | None = None) -> ChangesResult:
    """Compare two states of a checkpoint: SAT runs, torch or safetensors files, diffusers or peft folders.

    ``expect`` is ``identical`` (also if it is None) or ``only-lora``. Raises :class:`FormatError` (``not-comparable``)
    where the two name their tensors in different ways or have none in common, :class:`CorruptCheckpoint` where numbers
    differ because a file is damaged, and what opening them raises.
    """
    wanted: Expect | None = next((word for word in get_args(Expect) if word == expect), None)
    if wanted != expect:
        raise UsageError(f"unknown expectation: {printable(str(expect))}", hint="--expect identical or only-lora")
    with _open(before) as one, _open(after) as two:
        _refuse_other_spelling(one, two)
        ranks = [
            States(
                first,
                second,
                tuple(compare_states(first, second, rank)),
                wanted,
                (one.averaged, two.averaged),
                two.trained,
            )
            for rank, (first, second) in enumerate(zip(one.ranks, two.ranks, strict=True))
        ]
        _refuse_nothing_in_common(one, two, ranks)
        _refuse_damage(ranks)
        findings = dict.fromkeys(finding for states in ranks for finding in diagnose_changes(states))
        notices = dict.fromkeys([*(said for states in ranks for said in remarks(states)), *_not_compared(one, two)])
        for opened in (one, two):
            opened.container.check_unchanged()
    return ChangesResult(
        not findings,
        addressed(findings, before=quoted(before), after=quoted(after)),
        str(before),
        str(after),
        wanted,
        tuple(change for states in ranks for change in states.changes),
        tuple(notices),
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint of any container: one map of tensors a model-parallel rank."""

    path: str
    container: Source | Model
    ranks: list[dict[str, TensorRef]]
    trained: frozenset[str] | None = None
    averaged: bool = False


@contextmanager
def _open(path: str | Path) -> Iterator[_Opened]:
    folder = Path(path)
    if os.fspath(path) and any((folder / name).is_file() for name in (CONFIG, PIPELINE)):
        with open_model(path) as model:
            yield _Opened(str(path), model, [model.tensors])
        return
    with open_source(path) as source:
        refuse_parts(source)
        averaged = source.files[0].path.resolve().parent.name.endswith("-ema")
        ranks = [{**source.frozen, **source.tensors}, *source.ranks[1:]]
        yield _Opened(str(path), source, ranks, source.trained, averaged)


def _refuse_other_spelling(one: _Opened, two: _Opened) -> None:
    """Two states are compared by their names, so both must spell them alike, and be cut into as many ranks."""
    if len(one.ranks) != len(two.ranks):
        raise _not_comparable(
            one,
            two,
            f"the first has {len(one.ranks)} model-parallel ranks, the second {len(two.ranks)}",
            "compare the merged bases: loraconv sat2diffusers RUN --what base -o OUT, for each",
        )
    read = [_detected(opened) for opened in (one, two)]
    spelled = [None if d is None else d.dialect.holds_models for d in read]
    if None in spelled or spelled[0] == spelled[1]:
        return
    sat, factors = (one, two)[spelled.index(True)], all(d is not None and d.has_factors for d in read)
    first, second = ("transformer" if o is sat else quoted(o.path) for o in (one, two))
    hint = (
        f"loraconv verify {quoted(one.path)} {quoted(two.path)}"
        if factors
        else f"loraconv sat2diffusers {quoted(sat.path)} --what base -o transformer && loraconv verify --before {first}"
        f" --after {second}"
    )
    why = "; ".join(f"{printable(o.path)}: {d.reason}" for o, d in zip((one, two), read, strict=True) if d)
    raise _not_comparable(one, two, why, hint)


def _detected(opened: _Opened) -> Detected | None:
    """The format of a checkpoint; None where no table knows it, which a comparison by names does not need."""
    source = opened.container
    if isinstance(source, Model):
        source = Source(source.path, "model folder", opened.ranks, list(source.files.values()))
    try:
        return detect(source)
    except FormatError:
        return None


def _refuse_nothing_in_common(one: _Opened, two: _Opened, ranks: list[States]) -> None:
    if all(change.kind in ("missing", "new") for states in ranks for change in states.changes):
        raise _not_comparable(
            one, two, "no tensor of one is in the other, by name or by content", f"loraconv inspect {quoted(two.path)}"
        )


def _not_comparable(one: _Opened, two: _Opened, why: str, hint: str) -> FormatError:
    return FormatError(
        f"{printable(one.path)} and {printable(two.path)} are not two states of one checkpoint as they are",
        why=why,
        hint=hint,
        slug="not-comparable",
    )


def _refuse_damage(ranks: list[States]) -> None:
    """Numbers that differ because a file was damaged are no change: its own checksum tells."""
    leaves: dict[tuple[tuple[int, int], tuple[int, int]], TensorRef] = {}
    for states in ranks:
        for change in states.changes:
            if change.kind in ("changed", "retyped"):
                for ref in (states.before[change.name], states.after[change.other or change.name]):
                    leaves[ref.file.inode, ref.storage] = ref
    for leaf in leaves.values():
        check_storage(leaf)


def _not_compared(one: _Opened, two: _Opened) -> Iterator[str]:
    for which, opened in (("first", one), ("second", two)):
        if isinstance(opened.container, Source):
            state = [extra.name for extra in opened.container.extras if extra.tensors]
            if state:
                yield f"trainer state of the {which} is not compared: {', '.join(state)}"

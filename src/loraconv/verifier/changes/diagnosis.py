"""What happened between two states of a checkpoint, in the words a user needs, and what mends it.

Each finding is a hypothesis that was tested on the names and numbers, and explains the changes it names; what no
hypothesis explains is told as it is. Changes that were expected have no finding. In a ``mend``, ``{before}`` and
``{after}`` stand for the two paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loraconv.names import printable
from loraconv.verifier.changes.comparison import Change, is_factor
from loraconv.verifier.changes.renames import bare
from loraconv.verifier.changes.states import States, is_marked
from loraconv.verifier.changes.tables import fate_of, is_table
from loraconv.verifier.diagnosis import Finding, finding, shown

_AGAIN = "loraconv verify --before {before} --after {after} --expect only-lora"

Test = Callable[[States, list[Change]], Iterator[Finding]]


def diagnose_changes(states: States) -> list[Finding]:
    """The causes of every unexpected change; empty if there is none."""
    left = states.unexpected()
    findings: list[Finding] = []
    for test in _TESTS:
        for found in test(states, left):
            findings.append(found)
            left = [change for change in left if change.name not in found.modules]
    return findings


def _named(slug: str, text: str, changes: list[Change], mend: str) -> Finding:
    return finding(slug, text, [change.name for change in changes], mend)


def _nonfinite(_: States, left: list[Change]) -> Iterator[Finding]:
    bad = [c for c in left if c.figures is not None and c.figures.nonfinite]
    if bad:
        count = sum(c.figures.nonfinite for c in bad if c.figures is not None)
        yield _named(
            "nonfinite",
            f"{count} numbers became NaN or Inf, in",
            bad,
            "go back to {before}: the training diverged after it",
        )


def _split(states: States, left: list[Change]) -> Iterator[Finding]:
    changed = {c.name for c in left if c.kind in ("changed", "retyped", "missing")}
    for names in states.parted():
        moved = [name for name in names if name in changed]
        if moved and len(moved) < len(names):
            yield finding(
                "split",
                f"{shown(names)} were one tensor and are not any more: only some of them changed:",
                moved,
                "tie them again after loading: tie_weights(), or assign one to the other",
            )


def _cast(_: States, left: list[Change]) -> Iterator[Finding]:
    """Numbers that are those before, rounded once, or the same in another dtype."""
    groups: dict[tuple[str, str, str], list[Change]] = {}
    for change in left:
        if change.figures is not None and change.before is not None and change.after is not None:
            exact = change.kind == "retyped" and not change.figures.changed
            if change.kind != "reshaped" and (exact or change.figures.rounded):
                groups.setdefault((change.before[0], change.figures.rounded, change.after[0]), []).append(change)
    for (old, rounded, new), changes in groups.items():
        stored = f"stored as {new} now" if old != new else f"stored as {new} as before"
        if rounded:
            text = f"each number is the one before rounded once to {rounded}, {stored}, in {len(changes)} tensors:"
            yield _named("rounded", text, changes, "keep {before}: what the rounding took away is only there")
        else:
            text = f"the numbers are the same, {stored} instead of {old}, in {len(changes)} tensors:"
            yield _named("retyped", text, changes, f"nothing is lost: cast them back to {old}")


def _reshaped(_: States, left: list[Change]) -> Iterator[Finding]:
    figures = {c.name: c.figures for c in left if c.kind == "reshaped" and c.figures is not None}
    for rounded in sorted({f.rounded for f in figures.values()}):
        kept = [c for c in left if (f := figures.get(c.name)) and f.rounded == rounded and (rounded or not f.changed)]
        if kept:
            how = f"rounded once to {rounded} and" if rounded else "the same"
            yield _named(
                "reshaped",
                f"the numbers are {how} in another shape, in the same order:",
                kept,
                "reshape them on loading; loraconv sat2diffusers {after} --what base -o OUT reads either shape",
            )


_FATES = {
    "lost": (
        "the learned table of positions is not in the second, so that whoever loads it starts from another one and"
        " gets noise:",
        "take the base from the first: loraconv sat2diffusers {before} --what base -o transformer",
    ),
    "remade": (
        "the learned table of positions was made anew, it does not come from the one before:",
        "take the base from the first: loraconv sat2diffusers {before} --what base -o transformer",
    ),
    "resized": (
        "a table of sines and cosines was computed for another size or scale:",
        "give the run that wrote the second the sample size of the first in its YAML",
    ),
    "recomputed": (
        "a table of sines and cosines was computed again, and differs by rounding alone:",
        "nothing to mend: it is the same table",
    ),
    "uncomputed": (
        "a computed table is not in the second; code that computes it itself does without it:",
        "nothing to mend where the second is loaded by the code that wrote it",
    ),
    "unused": (
        "a table that a model with rotary positions never uses is another one or missing:",
        "nothing to mend",
    ),
}


def _positions(states: States, left: list[Change]) -> Iterator[Finding]:
    fates: dict[str, list[Change]] = {}
    for change in left:
        if change.kind in ("missing", "changed", "reshaped") and is_table(change.name):
            fates.setdefault(fate_of(change, states.before, states.after), []).append(change)
    for fate, (text, mend) in _FATES.items():
        if fate in fates:
            yield _named(f"table-{fate}", text, fates[fate], mend)


def _original(states: States, left: list[Change]) -> Iterator[Finding]:
    """The mark of an adapted layer was put in or taken out."""
    put_in = [c for c in left if c.kind == "renamed" and is_marked(c)]
    if put_in:
        yield _named("lora-inserted", f"LoRA was put in: {len(put_in)} weights have a mark now:", put_in, _AGAIN)
    lost = [c for c in left if c.other and c.other == bare(c.name)]
    if lost:
        moved = any(c.kind == "changed" for c in lost)
        how = "and hold other numbers, as merging does" if moved else "and are as they were: the LoRA was not merged"
        yield _named(
            "original-lost",
            f"{len(lost)} adapted weights lost their mark (.original) {how}:",
            lost,
            "the adapter is in the first: loraconv sat2diffusers {before} -o lora",
        )


def _prefixed(states: States, _: list[Change]) -> Iterator[Finding]:
    """Names that begin in another way, whatever became of the numbers."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in states.unexpected():
        if change.other and (pair := _swapped_prefix(change)) is not None:
            groups.setdefault(pair, []).append(change)
    for (old, new), changes in groups.items():
        was, now = repr(printable(old)), repr(printable(new))
        mend = f"rename them before loading: key.replace({now}, {was}, 1)".replace("{", "{{").replace("}", "}}")
        text = f"names begin with {now} instead of {was}, so that a loader finds none of {len(changes)} tensors:"
        yield _named("prefix", text, changes, mend)


def _swapped_prefix(change: Change) -> tuple[str, str] | None:
    """``(old, new)`` where nothing but the beginning of the name differs."""
    one, two = bare(change.name).split("."), bare(change.other).split(".")
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    if common < 2 or (common == len(one) == len(two)):
        return None
    old, new = one[: len(one) - common], two[: len(two) - common]
    return ".".join([*old, ""]) if old else "", ".".join([*new, ""]) if new else ""


def _lost_lora(_: States, left: list[Change]) -> Iterator[Finding]:
    lost = [c for c in left if c.kind == "missing" and c.is_factor]
    if lost:
        yield _named("lora-lost", f"{len(lost)} LoRA factors are gone:", lost, "the first still has them: {before}")


def _average(states: States, left: list[Change]) -> Iterator[Finding]:
    """One of the two is the EMA copy of a run, which differs in what was trained and in nothing else."""
    if states.averaged[0] == states.averaged[1]:
        return
    trained = [c for c in left if c.kind == "changed" and (c.name in (states.trained or ()) or c.is_factor)]
    if trained:
        which, raw = ("second", "first") if states.averaged[1] else ("first", "second")
        yield _named(
            "ema",
            f"the {which} is the moving average (EMA) of the weights and the {raw} is not, so they differ in what was"
            " trained:",
            trained,
            "compare folders of one kind: both ITERATION, or both ITERATION-ema",
        )


def _base_moved(states: States, left: list[Change]) -> Iterator[Finding]:
    moved = [c for c in left if c.kind == "changed" and not c.is_factor]
    if moved and any(map(is_factor, states.after)):
        base = sum(1 for c in states.changes if not c.is_factor and c.kind != "new")
        yield _named(
            "base-moved",
            f"the base under the LoRA moved: {len(moved)} of {base} tensors, {_how_far(moved)}:",
            moved,
            "freeze it (SAT: not_trainable_prefixes: ['all']); what was trained is LoRA plus base, so convert both:"
            " loraconv sat2diffusers {after} --what all -o OUT",
        )


def _how_far(changes: list[Change]) -> str:
    figures = [c.figures for c in changes if c.figures is not None]
    if not figures:
        return "in bytes that are no numbers"
    relative, greatest = max(f.relative for f in figures), max(f.greatest for f in figures)
    return f"by up to {relative:.1e} relative and {greatest:.1e} absolute"


def _untrained(states: States, _: list[Change]) -> Iterator[Finding]:
    ups = states.untrained()
    if states.unexpected() and ups:
        yield Finding("untrained", f"the LoRA of the second does nothing: all {len(ups)} up factors are zero",
                      "use a later checkpoint, or look for a learning rate of zero", ())  # fmt: skip


def _components(states: States, left: list[Change]) -> Iterator[Finding]:
    found: dict[str, list[Change]] = {}
    for change in left:
        if change.kind == "new" and (component := states.component(change.name)) is not None:
            found.setdefault(component, []).append(change)
    for component, changes in found.items():
        text = f"the second also holds {component}, of which the first has nothing: {len(changes)} tensors:"
        yield _named("component", text, changes, f"leave it out: {_AGAIN}")


_REST = {
    "changed": ("changed, {how}:", "look at what wrote the second"),
    "reshaped": ("have another shape:", "the two are of different models or sizes: loraconv inspect {after}"),
    "renamed": ("hold the same bytes under another name:", "rename them before loading"),
    "missing": ("are not in the second:", "save it again, whole; what loads it takes something else in their place"),
    "new": ("are only in the second:", "loraconv inspect {after} --verbose"),
}


#: What is more to say about numbers that changed; what was just run is no advice.
_LOOK = {
    "only-lora": "; if an adapter was fused into it: loraconv verify --base {before} ADAPTER {after}",
    None: f"; for a LoRA run: {_AGAIN}",
    "identical": f"; for a LoRA run: {_AGAIN}",
}


def _rest(states: States, left: list[Change]) -> Iterator[Finding]:
    for kind, (text, mend) in _REST.items():
        changes = [c for c in left if c.kind == kind]
        if kind == "renamed":
            changes = [c for c in changes if _swapped_prefix(c) is None]
        if changes:
            what = "LoRA factors" if all(c.is_factor for c in changes) else "tensors"
            mend += _LOOK[states.expect] if kind == "changed" else ""
            yield _named(kind, f"{len(changes)} {what} {text.format(how=_how_far(changes))}", changes, mend)


_TESTS: tuple[Test, ...] = (
    _nonfinite, _split, _cast, _reshaped, _positions, _original, _lost_lora, _average, _base_moved, _untrained,
    _components, _rest, _prefixed,
)  # fmt: skip

"""Which dialect and family a checkpoint is written in, decided by its keys against the tables, and why.

Every key ends up in exactly one group of the :class:`Ledger`, so nothing can be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from loraconv.errors import FormatError
from loraconv.lazy import nbytes
from loraconv.names import fold_names, printable
from loraconv.registry import dialects, families
from loraconv.rules import Dialect, Family, Spelling, match
from loraconv.source import Source


@dataclass(slots=True)
class Ledger:
    """Where each tensor of the checkpoint belongs (names as in the file)."""

    factors: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Detected:
    """The tables that fit a source: ``prefix`` is what stands before module names; ``reason`` is for people."""

    dialect: Dialect
    family: Family
    prefix: str
    reason: str
    ledger: Ledger

    @property
    def spelling(self) -> Spelling | None:
        """The family's spelling in this dialect; None where names are diffusers' own."""
        return self.family.spellings[self.dialect.spelling] if self.dialect.spelling else None

    @property
    def has_factors(self) -> bool:
        return bool(self.ledger.factors)


@dataclass(frozen=True, slots=True)
class FactorKey:
    """What the name of a factor says: the module (as spelled in the file), the part of it, and ``down`` or ``up``."""

    module: str
    part: int
    side: str


def factor_key(dialect: Dialect, name: str) -> FactorKey | None:
    """The factor that ``name`` (prefix removed) spells in ``dialect``, or None if it spells none."""
    for side, template in (("down", dialect.down), ("up", dialect.up)):
        fields = match(template, name)
        if fields is not None:
            return FactorKey(fields["module"], int(fields.get("part", 0)), side)
    return None


def detect(source: Source) -> Detected:
    """The best reading of the source's keys; raises :class:`FormatError` (unknown or ambiguous)."""
    readings = [
        (_ledger(source.tensors, dialect, family, prefix), dialect, family, prefix)
        for dialect in dialects()
        for family in families()
        for prefix in dialect.prefixes
        if not dialect.spelling or dialect.spelling in family.spellings
    ]
    best = max(_score(ledger) for ledger, *_ in readings)
    if best == (0, 0):
        return _detect_parts(source)
    winners = [r for r in readings if _score(r[0]) == best]
    names = sorted({dialect.name for _, dialect, _, _ in winners})
    if len(names) > 1 and best[0] > 0:
        raise FormatError(
            f"{printable(str(source.path))} can be read in more than one way",
            why=f"{best[0]} keys fit {' and '.join(names)} alike",
            hint="loraconv formats",
            slug="format-ambiguous",
        )
    ledger, dialect, family, prefix = winners[0]
    return Detected(dialect, family, prefix, _reason(ledger, dialect, family, len(source.tensors)), ledger)


def _detect_parts(source: Source) -> Detected:
    """A checkpoint that holds only parts of its tensors: their names still tell what it is."""
    for dialect in dialects():
        for family in families():
            if not dialect.spelling or dialect.spelling not in family.spellings:
                continue
            ledger = _ledger(source.incomplete, dialect, family, dialect.prefixes[0])
            if _score(ledger) > (0, 0):
                reason = f"parts of {len(source.incomplete)} {dialect.name} tensors of {family.title}"
                return Detected(dialect, family, dialect.prefixes[0], reason, Ledger())
    raise _unknown(source)


def _score(ledger: Ledger) -> tuple[int, int]:
    return len(ledger.factors), len(ledger.base)


def _ledger(names: Iterable[str], dialect: Dialect, family: Family, prefix: str) -> Ledger:
    ledger = Ledger()
    spelling = family.spellings[dialect.spelling] if dialect.spelling else None
    for name in names:
        other = next((f.what for f in dialect.foreign if name.startswith(f.prefix)), "")
        if other:
            ledger.foreign.setdefault(other, []).append(name)
        elif not name.startswith(prefix):
            ledger.unknown.append(name)
        else:
            _place(ledger, name, name[len(prefix) :], dialect, family, spelling)
    return ledger


def _place(ledger: Ledger, name: str, bare: str, dialect: Dialect, family: Family, spelling: Spelling | None) -> None:
    key = factor_key(dialect, bare)
    module = key.module if key else base_name(dialect, bare).rpartition(".")[0]
    known = family.knows(module) if spelling is None else spelling.find(module) is not None
    why = spelling.drops(bare) if spelling else ""
    if why:
        ledger.dropped[name] = why
    elif not known:
        ledger.unknown.append(name)
    elif key:
        ledger.factors.append(name)
    else:
        ledger.base.append(name)


def base_name(dialect: Dialect, bare: str) -> str:
    """The name of a base tensor without the mark that an adapted module's own weight carries (``.original``)."""
    fields = match(dialect.frozen, bare) if dialect.frozen else None
    return f"{fields['module']}.{fields['param']}" if fields else bare


def _reason(ledger: Ledger, dialect: Dialect, family: Family, total: int) -> str:
    if ledger.factors:
        return f"{len(ledger.factors)} keys are {dialect.name} factors of {family.title} modules, of {total}"
    return f"{len(ledger.base)} of {total} keys are {family.title} base weights; no factors"


def _unknown(source: Source) -> FormatError:
    names = list(source.tensors) or source.incomplete
    folded = fold_names(names[:2000])
    return FormatError(
        f"unknown format: {printable(str(source.path))}",
        why=f"no known format has keys like {', '.join(folded[:3])}",
        hint="loraconv formats",
        slug="format-unknown",
    )


def group_bytes(source: Source, names: list[str]) -> int:
    """The bytes of the named tensors of the first rank; storage that is shared counts once."""
    spans = {(ref.storage, ref.offset): nbytes(ref) for ref in (source.tensors[n] for n in names)}
    return sum(spans.values())

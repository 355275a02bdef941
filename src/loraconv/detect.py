"""Which dialect and family a checkpoint is written in, decided by its keys against the tables, and why.

Every key ends up in exactly one group of the :class:`Ledger`, so nothing can be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loraconv.errors import FormatError
from loraconv.lazy import nbytes
from loraconv.names import fold_names, once_a_layer, printable
from loraconv.naming import Naming, namings
from loraconv.other_kinds import refuse_other_kinds
from loraconv.registry import dialects, families
from loraconv.rules import NORM_SIDES, Dialect, Family, Mark, Norm, Spelling, fill, match
from loraconv.source import Source


@dataclass(slots=True)
class Ledger:
    """Where each tensor of the checkpoint belongs (names as in the file). ``more`` are those that make a module more
    than a pair of factors: LoHa, DoRA and others."""

    factors: list[str] = field(default_factory=list)
    alphas: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Detected:
    """The tables that fit a source, and why (``reason``, for people). ``alike`` are families whose modules have the
    very names that the file has, so that the names do not tell which of them it is."""

    dialect: Dialect
    family: Family
    naming: Naming
    reason: str
    ledger: Ledger
    alike: tuple[Family, ...] = ()

    @property
    def prefix(self) -> str:
        """What stands before module names."""
        return self.naming.prefix

    @property
    def spelling(self) -> Spelling | None:
        """The family's spelling in the file; None where names are diffusers' own."""
        return self.naming.spelling

    @property
    def has_factors(self) -> bool:
        return bool(self.ledger.factors or self.ledger.more)


@dataclass(frozen=True, slots=True)
class FactorKey:
    """What the name of a tensor says: the module (as spelled in the file), the part of it, and which ``side`` of it the
    tensor is: ``down``, ``up``, ``alpha``, or one of those in the dialect's ``more``."""

    module: str
    part: int
    side: str


def factor_key(dialect: Dialect, name: str) -> FactorKey | None:
    """The side of a module that ``name`` spells in ``dialect``, or None if it spells none."""
    spelled = [("down", dialect.down), ("up", dialect.up), ("alpha", dialect.alpha)]
    spelled += [pair for down, up in dialect.also for pair in (("down", down), ("up", up))]
    for side, template in spelled:
        fields = match(template, name) if template else None
        if fields is not None:
            return FactorKey(*_rewritten(dialect, fields["module"], int(fields.get("part", 0))), side)
    for end, side in dialect.more.items():
        if name.endswith(end) and name[: -len(end)].endswith("."):
            return FactorKey(*_rewritten(dialect, name[: -len(end) - 1], 0), side)
    return None


def norm_key(naming: Naming, name: str) -> FactorKey | None:
    """The norm layer whose whole weight ``name`` is, where an adapter of the family may hold such."""
    fields = match(naming.dialect.norm, name) if naming.dialect.norm and naming.family.replaces_norms else None
    found = naming.find(fields["module"]) if fields else None
    return FactorKey(fields["module"], 0, "norm") if fields and found and isinstance(found[0], Norm) else None


def _rewritten(dialect: Dialect, module: str, part: int) -> tuple[str, int]:
    for there, here, number in (*((there, here, part) for there, here in dialect.rewrites), *dialect.parts):
        fields = match(there, module)
        if fields is not None:
            return fill(here, fields), number
    return module, part


#: A name, what it spells, and the number of names that it stands for.
_Key = tuple[str, FactorKey | None, int]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One way to read the source: how many keys it explains (``factors``, then ``base``), whether something besides the
    keys speaks for the dialect (``mark``)."""

    naming: Naming
    factors: int
    base: int
    mark: Mark | None

    @property
    def dialect(self) -> Dialect:
        return self.naming.dialect

    @property
    def score(self) -> tuple[int, int, int]:
        return self.factors, self.base, -self.naming.place


#: The header key in which loraconv keeps the name of the family, which the names of modules do not always tell.
FAMILY_KEY = "loraconv.family"


def detect(source: Source, family: str | None = None) -> Detected:
    """The best reading of the source's keys. ``family`` (a name) decides between models that have the same names.

    Raises :class:`FormatError` (unknown, ambiguous, no such family, or not one that the names fit; no kind of LoRA).
    """
    refuse_other_kinds(source.path, source.tensors)
    readings = _readings(source, once_a_layer(source.tensors))
    if not readings:
        return _detect_parts(source)
    best = max(reading.score for reading in readings)
    winners = [r for r in readings if r.score == best]
    kin = {r.dialect.variant_of for r in winners}
    winners = [r for r in winners if r.dialect.name not in kin]
    names = list(dict.fromkeys(r.dialect.name for r in winners))
    if len(names) > 1 and best[0] > 0:
        raise FormatError(
            f"{printable(str(source.path))} can be read in more than one way",
            why=f"{best[0]} keys fit {' and '.join(sorted(names))} alike",
            hint="loraconv formats",
            slug="format-ambiguous",
        )
    first = winners[0]
    alike: dict[str, _Reading] = {}
    for reading in winners:
        if reading.dialect is first.dialect:
            alike.setdefault(reading.naming.family.name, reading)
    told = family or source.metadata.get(FAMILY_KEY, "")
    if family is not None and family not in alike:
        raise _other_family(source, family, alike)
    first = alike.get(told, first)
    others = () if told in alike else tuple(r.naming.family for r in alike.values() if r is not first)
    return _detected(source, first, others)


def _detected(source: Source, first: _Reading, alike: tuple[Family, ...]) -> Detected:
    ledger = _ledger(source.tensors, first.naming)
    reason = _reason(ledger, first, alike, len(source.tensors))
    return Detected(first.dialect, first.naming.family, first.naming, reason, ledger, alike)


def _readings(source: Source, names: Mapping[str, int]) -> list[_Reading]:
    """Every reading that explains some of ``names``, which stand for as many keys each; of those without factors none
    where some reading has factors."""
    able = {d.name for d in dialects() if any(factor_key(d, name) is not None for name in names)}
    found = [r for d in dialects() if d.name in able for r in _readings_as(source, d, names)]
    if any(reading.factors for reading in found):
        return found
    return found + [r for d in dialects() if d.name not in able for r in _readings_as(source, d, names)]


def _readings_as(source: Source, dialect: Dialect, names: Mapping[str, int]) -> Iterator[_Reading]:
    mark = next((m for m in dialect.marks if is_there(m, source)), None)
    if dialect.variant_of and mark is None:
        return
    begins = tuple({prefix for f in families() for way in namings(dialect.name, f.name) for prefix in way.begins})
    keys = [(n, factor_key(dialect, n), count) for n, count in names.items() if n.startswith(begins)]
    for family in families():
        for naming in namings(dialect.name, family.name):
            factors, base = _score(keys, naming)
            if factors or base:
                yield _Reading(naming, factors, base, mark)


def _score(keys: Sequence[_Key], naming: Naming) -> tuple[int, int]:
    factors = base = 0
    for name, key, count in keys:
        if not name.startswith(naming.begins):
            continue
        group = _group(name, key, naming)
        factors += count * (group in ("factors", "alphas", "more", "norms"))
        base += count * (group == "base")
    return factors, base


def is_there(mark: Mark, source: Source) -> bool:
    """True if the source has this mark."""
    if mark.header:
        return mark.header in source.metadata and mark.word in source.metadata[mark.header].lower()
    return source.config_path is not None and source.config_path.name == mark.beside


def _detect_parts(source: Source) -> Detected:
    """A checkpoint that holds only parts of its tensors: their names still tell what it is."""
    for reading in _readings(source, once_a_layer(source.incomplete)):
        naming = reading.naming
        if reading.dialect.holds_models:
            reason = f"parts of {len(source.incomplete)} {reading.dialect.name} tensors of {naming.family.title}"
            return Detected(reading.dialect, naming.family, naming, reason, Ledger())
    raise _unknown(source)


def _ledger(names: Iterable[str], naming: Naming) -> Ledger:
    ledger, dialect, spelling = Ledger(), naming.dialect, naming.spelling
    norms = []
    for name in names:
        group = _group(name, factor_key(dialect, name), naming)
        if group == "norms":
            norms.append(name)
        elif group == "foreign":
            what = next(f.what for f in dialect.foreign if name.startswith(f.prefix))
            ledger.foreign.setdefault(what, []).append(name)
        elif group == "dropped":
            assert spelling is not None
            ledger.dropped[name] = spelling.drops(name[len(naming.prefix) :])
        else:
            getattr(ledger, group).append(name)
    # Whole norms are an adapter's where factors stand beside them; every base has them too.
    (ledger.more if ledger.factors else ledger.base).extend(norms)
    return ledger


#: The field of the :class:`Ledger` for the sides that every dialect has.
_GROUPS = {"down": "factors", "up": "factors", "alpha": "alphas"}


def _group(name: str, key: FactorKey | None, naming: Naming) -> str:
    """The field of the :class:`Ledger` in which a tensor belongs; ``norms`` for a norm layer's whole weight, of which
    the other tensors tell whether it is the adapter's or the base's."""
    dialect, spelling, prefix = naming.dialect, naming.spelling, naming.prefix
    if any(name.startswith(f.prefix) for f in dialect.foreign):
        return "foreign"
    if key is not None:
        found = naming.find(key.module)
        known = found is not None and isinstance(found[0], Norm) == (key.side in NORM_SIDES)
        return _GROUPS.get(key.side, "more") if known else "unknown"
    if norm_key(naming, name) is not None:
        return "norms"
    if not name.startswith(prefix):
        return "unknown"
    bare = name[len(prefix) :]
    if spelling is not None and spelling.drops(bare):
        return "dropped"
    return "unknown" if naming.find(prefix + base_name(dialect, bare).rpartition(".")[0]) is None else "base"


def base_name(dialect: Dialect, bare: str) -> str:
    """The name of a base tensor without the mark that an adapted module's own weight carries (``.original``)."""
    fields = match(dialect.frozen, bare) if dialect.frozen else None
    return f"{fields['module']}.{fields['param']}" if fields else bare


def _reason(ledger: Ledger, reading: _Reading, alike: tuple[Family, ...], total: int) -> str:
    dialect, naming = reading.dialect, reading.naming
    titles = " or ".join(f.title for f in (naming.family, *alike))
    if not (ledger.factors or ledger.more):
        return f"{len(ledger.base)} of {total} keys are {titles} base weights; no factors"
    alphas = f" and {len(ledger.alphas)} alphas" if ledger.alphas else ""
    count = len(ledger.factors) + len(ledger.more)
    said = [f"{count} keys are {dialect.name} factors{alphas} of {titles} modules, of {total}"]
    if reading.mark is not None:
        told = f"header {reading.mark.header}" if reading.mark.header else reading.mark.beside
        said.append(f"told from {dialect.variant_of} by {told}" if dialect.variant_of else f"as {told} says")
    return "; ".join(said)


def _other_family(source: Source, family: str, alike: Mapping[str, _Reading]) -> FormatError:
    return FormatError(
        f"{printable(str(source.path))} is no adapter of {printable(family)}",
        why=f"its names fit {', '.join(alike)}",
        hint=f"--family {next(iter(alike))}",
        slug="family",
    )


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

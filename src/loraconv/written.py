"""An adapter's factors as a target's file has them: under its names, several modules in one where it fuses them.

Modules that share their down become one pair with their ups as its rows. Others stand side by side: up is zero outside
of its blocks, the ranks add up, and alpha grows with the rank, so that the scale stays (which is what
kohya-ss/sd-scripts#2204 is about).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loraconv.adapter import Factor
from loraconv.errors import FormatError
from loraconv.lazy import Joined, Lazy, Padded, Rows, Zeros, same_bytes
from loraconv.names import fold_names, printable
from loraconv.naming import Naming, namings
from loraconv.rules import Dialect, Family, Rule, match
from loraconv.scale import Scale


@dataclass(frozen=True, slots=True)
class Written:
    """One pair of factors under the name of its module in the file (prefix and all); ``part`` is empty or a number."""

    module: str
    part: str
    down: Lazy
    up: Lazy
    scale: Scale


def write_pairs(factors: Sequence[Factor], target: Dialect, family: Family) -> list[Written]:
    """The pairs of the target's file. Raises :class:`FormatError` for what it has no names for or cannot fuse."""
    naming = naming_for(target, family)
    grouped: dict[str, tuple[Rule, dict[int, Factor]]] = {}
    for factor, (written, rule, part) in zip(factors, _names(factors, naming), strict=True):
        grouped.setdefault(written, (rule, {}))[1][part] = factor
    made: list[Written] = []
    for module, (rule, parts) in grouped.items():
        if target.by_part:
            made += [Written(module, str(part), f.down, f.up, f.scale) for part, f in parts.items()]
        else:
            made.append(_fused(module, rule, parts))
    return made


def write_vectors(vectors: Mapping[str, Lazy], columns: Mapping[str, int], naming: Naming) -> dict[str, Lazy]:
    """Vectors with a number for each row of a module, by its name in the file, from those by diffusers name.

    ``columns`` are those of the weights. Raises :class:`FormatError` where one part of a module has none.
    """
    grouped: dict[str, tuple[Rule, dict[int, str]]] = {}
    for module in vectors:
        found = naming.write(module)
        assert found is not None  # its factors are written under that name
        grouped.setdefault(found[0], (found[1], {}))[1][found[2]] = module
    return {
        name: _one_vector(name, rule, {n: vectors[m] for n, m in parts.items()}, columns[next(iter(parts.values()))])
        for name, (rule, parts) in grouped.items()
    }


def _one_vector(name: str, rule: Rule, parts: Mapping[int, Lazy], columns: int) -> Lazy:
    """The vector of a module whose rows are several modules."""
    first = next(iter(parts.values()))
    pieces = rule.pieces(first.shape[0], columns)
    if pieces == ((0,),):
        return first
    if set(parts) != {n for n, own in enumerate(pieces) if own}:
        raise FormatError(
            f"{printable(name)} is several modules, of which one has magnitudes or a bias and another has none",
            why="its rows have a number each, or none of them has",
            hint="convert to peft instead: --to peft",
            slug="cannot-carry",
        )
    rows: dict[int, Lazy] = {}
    for number, vector in parts.items():
        chunk = vector.shape[0] // len(pieces[number])
        rows |= {own: Rows(vector, nth * chunk, (nth + 1) * chunk) for nth, own in enumerate(pieces[number])}
    return Joined(tuple(rows[n] for n in sorted(rows)), 0)


def naming_for(target: Dialect, family: Family) -> Naming:
    """How the target's file names the modules. Raises :class:`FormatError` where it is not written, or has no names."""
    if target.read_only:
        raise FormatError(f"{target.name} is read, not written", why=target.read_only, slug="read-only")
    ways = namings(target.name, family.name)
    if not ways:
        raise FormatError(
            f"{target.name} has no names for the modules of {family.title}",
            why=f"no table spells them for {' or '.join(target.spellings)}",
            hint="loraconv formats",
            slug="cannot-carry",
        )
    return ways[0]


def refuse_parts_of_a_model(target: Dialect, modules: Collection[str]) -> None:
    """Raise :class:`FormatError` where ``modules`` (names in the file, norms too) lack some that its readers need."""
    missing = [need for need in target.needs if not any(match(need, module) is not None for module in modules)]
    if missing:
        raise FormatError(
            f"{target.name} holds whole control adapters, and this adapter lacks {len(missing)} kinds of its modules",
            where="; ".join(missing[:4]),
            why="its readers know it by its norm layers, and want every module of the model",
            hint="--to diffusers",
            slug="cannot-carry",
        )


def family_for(modules: Sequence[str], target: Dialect, families: Sequence[Family]) -> Family:
    """The one of ``families`` (which the adapter's names fit alike) whose names the target's file gets.

    Raises :class:`FormatError` where they have different names there.
    """
    ways = [(f, ways[0]) for f in families if (ways := namings(target.name, f.name))]
    written = {f.name: tuple((w[0], w[2]) if (w := way.write(m)) else None for m in modules) for f, way in ways}
    named = {name: names for name, names in written.items() if None not in names}
    if len(set(named.values())) > 1:
        raise FormatError(
            f"the adapter's names do not tell which model it is of, and {target.name} names their modules differently",
            why=f"it may be one of {', '.join(named)}",
            hint=f"--family {next(iter(named))}",
            slug="family-ambiguous",
        )
    return next((f for f, _ in ways if f.name in named), families[0])


def _names(factors: Sequence[Factor], naming: Naming) -> list[tuple[str, Rule, int]]:
    found = [naming.write(f.module) for f in factors]
    spelling = naming.spelling
    only = spelling.adapts if spelling is not None else ()
    able = [w is not None and (not only or w[1].there in only) for w in found]
    foreign = [f.module for f, fine in zip(factors, able, strict=True) if not fine]
    if foreign:
        raise FormatError(
            f"{naming.dialect.name} cannot carry {len(foreign)} of the adapter's modules",
            where="; ".join(fold_names(foreign)[:4]),
            why=f"it adapts {' and '.join(only)} only" if only else "it has no names for them",
            hint="convert to diffusers or peft instead: --to peft",
            slug="cannot-carry",
        )
    return [w for w in found if w is not None]


def _fused(module: str, rule: Rule, parts: dict[int, Factor]) -> Written:
    """The one pair for what belongs to one module of the file, a part of it by its number among the rule's targets."""
    first = next(iter(parts.values()))
    pieces = rule.pieces(first.up.shape[0], first.down.shape[1])
    used = [own for own in pieces if own]
    if used == [(0,)] and pieces[next(iter(parts))]:
        return Written(module, "", first.down, first.up, first.scale)
    chunk = _chunk(module, pieces, parts)
    shared = all(same_bytes(f.down, first.down) for f in parts.values()) and len(parts) == len(used)
    rank = first.rank if shared else first.rank * len(used)
    rows: list[Lazy] = [Zeros(first.up.dtype, (chunk, rank))] * sum(map(len, used))
    # A part that the adapter does not have is a block of zeros.
    downs: list[Lazy] = [Zeros(first.down.dtype, first.down.shape)] * len(used)
    for place, number in enumerate(n for n, own in enumerate(pieces) if own):
        if number not in parts:
            continue
        downs[place] = parts[number].down
        up = parts[number].up if shared else Padded(parts[number].up, place * first.rank, rank)
        for nth, own in enumerate(pieces[number]):
            rows[own] = Rows(up, nth * chunk, (nth + 1) * chunk) if len(pieces[number]) > 1 else up
    down = first.down if shared else _joined(downs)
    return Written(module, "", down, _joined(rows), first.scale.of_rank(rank))


def _joined(parts: list[Lazy]) -> Lazy:
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), 0)


def _chunk(module: str, pieces: Sequence[Sequence[int]], parts: dict[int, Factor]) -> int:
    """The rows of one chunk; raises :class:`FormatError` where the parts cannot be one module."""
    found = [divmod(f.up.shape[0], len(pieces[n])) if pieces[n] else (0, 1) for n, f in parts.items()]
    kinds = {(f.scale.exact or f.scale.value, f.down.shape, f.down.dtype, f.up.dtype) for f in parts.values()}
    if len(set(found)) > 1 or found[0][1] or len(kinds) > 1:
        shown = "; ".join(fold_names(f.module for f in parts.values())[:4])
        raise FormatError(
            f"these modules are one in the target, {printable(module)}, and cannot be put into it",
            where=shown,
            why="their scales, ranks, dtypes or sizes differ, and one pair of factors has one of each",
            hint="convert to diffusers or peft instead: --to peft",
            slug="cannot-carry",
        )
    return found[0][0]

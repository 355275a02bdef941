"""The adapters of a fusion: what the user named, opened and read, each with its strength, and seen to be sound."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from loraconv.adapter import Adapter, read_adapter
from loraconv.algebra import Special, specials_in
from loraconv.deltas import Delta
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, UsageError
from loraconv.health import Health, check_adapter, check_copies, check_tensors, nonfinite_error
from loraconv.names import fold_names, printable
from loraconv.notices import left_behind, nearest_notices, unknown_notices
from loraconv.scale import Scale, given_alpha
from loraconv.source import Source, open_source

#: A number as people type a strength. ``Fraction`` alone would also take ``1e999999999``, and compute it.
_STRENGTH = re.compile(r"[+-]?(\d{1,4}(\.\d{0,12})?|\.\d{1,12})")
#: Files larger than this are not hashed: a whole training run, of which the adapter is a small part.
_HASHED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Used:
    """An adapter that is fused. ``alpha`` is the caller's own; ``digest`` is the SHA-256 of its factors' bytes."""

    path: Path
    strength: Fraction
    source: Source
    detected: Detected
    adapter: Adapter
    alpha: Fraction | None
    digest: str
    notices: tuple[str, ...]

    @property
    def name(self) -> str:
        """The bare name, however the path was spelled: outputs do not depend on the place."""
        return printable(Path(os.path.abspath(self.path)).name)

    @property
    def scales(self) -> dict[Scale, int]:
        """The different scales of its modules and the number of modules of each, the most frequent first."""
        found = [factor.scale for factor in self.adapter.factors]
        return dict(sorted({s: found.count(s) for s in found}.items(), key=lambda item: -item[1]))


class Reader(Protocol):
    """Reads an adapter of which some modules are more than a pair of factors of a linear layer."""

    def __call__(
        self, source: Source, detected: Detected, specials: Sequence[Special], *, alpha: Fraction | None, strict: bool
    ) -> Adapter: ...


def open_adapters(
    given: Iterable[str | Path],
    stack: ExitStack,
    *,
    alpha: float | None,
    rank: int | None,
    strict: bool,
    nearest: bool,
    special: Reader,
) -> tuple[Used, ...]:
    """Open and read every adapter; ``stack`` closes them. ``special`` reads one that is more than a plain LoRA.

    Raises :class:`UsageError` (none, a senseless strength, ``alpha`` or ``rank`` of several), what :func:`read_adapter`
    raises, :class:`FormatError` (``rank-contradiction``, ``adapter-zero``) and :class:`CorruptCheckpoint` (NaN, Inf).
    """
    named = [split_strength(text) for text in given]
    if not named:
        raise UsageError("no adapter was named", hint="loraconv fuse ADAPTER --base MODEL -o OUT")
    if len(named) > 1 and (alpha is not None or rank is not None):
        raise UsageError(
            "--alpha and --rank speak of one adapter, and several are named",
            hint="write it into the adapter that lacks it: loraconv convert ADAPTER --alpha A --to peft -o FIXED",
        )
    used = tuple(
        _open(path, strength, stack, given_alpha(alpha), rank, strict, nearest, special) for path, strength in named
    )
    if all(_is_zero(one) for one in used):
        raise FormatError(
            "the adapter does nothing: every up factor (lora_B) is zero",
            where=", ".join(printable(str(one.path), 1000) for one in used),
            why="it was saved before the first training step",
            hint="use a later iteration of the run",
            slug="adapter-zero",
        )
    return used


def split_strength(text: str | Path) -> tuple[Path, Fraction]:
    """``PATH@0.8`` as path and strength; a path that exists is a path, whatever is in its name."""
    path, at, number = os.fspath(text).rpartition("@")
    if not at or "\0" in os.fspath(text) or os.path.lexists(text):
        return Path(text), Fraction(1)
    if not path or not _STRENGTH.fullmatch(number) or not Fraction(number):
        raise UsageError(
            f"not an adapter with a strength: {printable(os.fspath(text), 200)}",
            why=f"'{printable(number, 60)}' is not a number other than 0 with at most four digits before the point",
            hint="loraconv fuse ADAPTER@0.8 --base MODEL -o OUT",
            slug="strength",
        )
    return Path(path), Fraction(number)


def _open(
    path: Path,
    strength: Fraction,
    stack: ExitStack,
    alpha: Fraction | None,
    rank: int | None,
    strict: bool,
    near: bool,
    special: Reader,
) -> Used:
    source = stack.enter_context(open_source(path))
    detected = detect(source)
    specials = specials_in(source, detected)
    if specials:
        adapter = special(source, detected, specials, alpha=alpha, strict=strict)
    else:
        adapter = read_adapter(source, detected, alpha=alpha, strict=strict, nearest=near)
    _check_rank(source, adapter, rank)
    check_copies(source.whole, source.tensors)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(_digest, adapter)
        health = check_tensors(t for one in specials for t in one.floats) if specials else check_adapter(adapter)
    said = [*source.notices, *adapter.notices, *unknown_notices(detected), *left_behind(source, detected)]
    said += [*nearest_notices(source), *_health_notices(path, adapter, health)]
    return Used(path, strength, source, detected, adapter, alpha, digest.result(), tuple(said))


def _check_rank(source: Source, adapter: Adapter, rank: int | None) -> None:
    other = [factor.module for factor in adapter.factors if rank is not None and factor.rank != rank]
    if other:
        ranks = sorted({factor.rank for factor in adapter.factors})
        raise FormatError(
            f"--rank contradicts the tensors: it says {rank}, they say {', '.join(map(str, ranks))}",
            where=f"{printable(str(source.path), 1000)}: {'; '.join(fold_names(other)[:4])}",
            why="the rank is the number of rows of lora_A, and the scale is alpha / rank",
            hint="leave --rank out, and pass the --alpha that the trainer was given",
            slug="rank-contradiction",
        )


def _health_notices(path: Path, adapter: Adapter, health: Health) -> list[str]:
    if health.nonfinite:
        error = nonfinite_error(health.nonfinite, str(path))
        error.hint = "use an earlier iteration of the run"
        raise error
    if not health.zero_up:
        return []
    return [f"{printable(path.name)}: up is zero, so these do nothing: {'; '.join(fold_names(health.zero_up)[:4])}"]


def _is_zero(used: Used) -> bool:
    from loraconv.health import is_zero

    pairs = [(f.up, f.down) for f in used.adapter.factors]
    return all(is_zero(up) or (not isinstance(up, Delta) and is_zero(down)) for up, down in pairs)


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for factor in adapter.factors:
        sides = (factor.down, factor.up, *([factor.magnitude] if factor.magnitude is not None else []))
        # What is computed in float64 is not the same everywhere to the last bit; what it is computed from is.
        for side in [s for given in sides for s in (given.leaves() if isinstance(given, Delta) else [given])]:
            digest.update(f"{factor.module} {side.dtype} {side.shape} ".encode())
            for piece in side.pieces():
                digest.update(piece)
    return digest.hexdigest()


def file_digests(used: Used) -> list[str | None]:
    """The SHA-256 of each of its files, None for one that is much more than an adapter."""
    found: list[str | None] = []
    for file in used.source.files:
        digest = hashlib.sha256() if file.size <= _HASHED_BYTES else None
        for at in range(0, file.size if digest else 0, 1 << 20):
            digest.update(file.pread(at, min(1 << 20, file.size - at)))  # type: ignore[union-attr]
        found.append(digest.hexdigest() if digest else None)
    return found

"""The proof of a split: the parts have no module in common, together they are the source, and no byte has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from loraconv.verifier.adapter import prove_adapter
from loraconv.verifier.check import as_failure, read_adapter_files
from loraconv.verifier.numbers import Expectation, Pair
from loraconv.verifier.proof import Check, Proof

Pairs = Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class PartOf:
    """A part that was written: its folder, format, files and settings file, and the modules that it shall have."""

    place: str
    kind: str
    files: tuple[str, ...]
    settings_file: str
    modules: frozenset[str]


def prove_parts(folder: Path, *, parts: Sequence[PartOf], source: Pairs) -> Proof:
    """Read every part of ``folder`` by its format's own definition, and compare their union with the ``source``.

    Raises :class:`ProofFailed` where a part cannot be read or compared at all.
    """
    with as_failure(folder), ExitStack() as stack:
        found = [
            read_adapter_files(folder / part.place, part.kind, part.files, part.settings_file, stack).pairs
            for part in parts
        ]
        union = {module: pair for pairs in found for module, pair in pairs.items()}
        wrong = [part.place for part, pairs in zip(parts, found, strict=True) if set(pairs) != part.modules]
        apart = not wrong and sum(map(len, found)) == len(union)
        own = Check("L0", "each module in its own part", apart, len(parts), detail="; ".join(wrong[:4]))
        dtypes = {module: (pair.down.dtype, pair.up.dtype) for module, pair in source.items()}
        proof = prove_adapter(Expectation(source, dtypes), union, scale_ignored=False)
        return replace(proof, checks=(proof.checks[0], own, *map(_all_bytes(source), proof.checks[1:])))


def _all_bytes(source: Pairs) -> Callable[[Check], Check]:
    """The check of bytes has to have seen both factors of every module: none may have got another scale or dtype."""

    def strict(check: Check) -> Check:
        if check.level != "L1" or check.count == 2 * len(source):
            return check
        return replace(check, passed=False, detail=f"only {check.count} of {2 * len(source)} factors keep their bytes")

    return strict

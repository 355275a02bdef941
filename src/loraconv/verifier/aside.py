"""What is no part of a converted adapter by the user's wish: every key left behind on purpose takes no pair apart, and
every kept tensor is in the output byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraconv.lazy import TensorRef
from loraconv.names import fold_names
from loraconv.verifier.numbers import same_bytes
from loraconv.verifier.proof import Check

Tensors = Mapping[str, TensorRef]

#: A factor or an alpha, as any format spells it; the first group is the module, the second the part.
_OF_A_PAIR = re.compile(
    r"(.+?)(?:[._](?:lora(?:_linear_layer)?[._](?:A|B|up|down)(?:(?:\.[^.]+)?\.weight)?|matrix_[AB]\.(\d+))|\.alpha)"
)


@dataclass(frozen=True, slots=True)
class SetAside:
    """The keys of a source that were left behind, and those that were kept as they are."""

    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def rest(self, tensors: Tensors) -> dict[str, TensorRef]:
        """The tensors that are neither: what the adapter is made of, and nothing may be missing from."""
        gone = {*self.dropped, *self.kept}
        return {name: ref for name, ref in tensors.items() if name not in gone}


def check_aside(aside: SetAside, source: Tensors, kept: Tensors) -> Iterator[Check]:
    """The checks of what was set aside; none where nothing was. ``kept`` are the tensors found in the output."""
    if aside.dropped:
        left = {_pair(name) for name in aside.rest(source)} - {None}
        wrong = [name for name in aside.dropped if name not in source or _pair(name) in left]
        shown = f"left behind: {'; '.join(fold_names(aside.dropped)[:4])}"
        shown = f"not in the source, or half of a pair: {'; '.join(fold_names(wrong)[:4])}" if wrong else shown
        yield Check("L0", "keys left behind on purpose", not wrong, len(aside.dropped), detail=shown)
    if aside.kept:
        wrong = [name for name in aside.kept if name not in kept or not same_bytes(source[name], kept[name])]
        shown = f"kept: {'; '.join(fold_names(aside.kept)[:4])}"
        shown = f"missing, or other bytes: {'; '.join(fold_names(wrong)[:4])}" if wrong else shown
        yield Check("L1", "bytes of unknown tensors that are kept", not wrong, len(aside.kept), detail=shown)


def _pair(name: str) -> tuple[str, str | None] | None:
    found = _OF_A_PAIR.fullmatch(name)
    return (found[1], found[2]) if found else None

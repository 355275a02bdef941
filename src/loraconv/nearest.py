"""The single adapter nearest to what several model-parallel ranks computed: none equals it."""

from __future__ import annotations

from loraconv.detect import Detected, base_name
from loraconv.lazy import Averaged, Joined, Lazy, TensorRef, nbytes, read
from loraconv.pairs import Halves
from loraconv.ranks import mixed, of_rank, refuse_copies, same_in_all, split_dim
from loraconv.rules import Fused, Rename
from loraconv.source import Source


def nearest_pairs(source: Source, detected: Detected, ranks: list[dict[str, Halves]]) -> dict[str, Halves]:
    """The single adapter nearest to what the model-parallel ranks computed.

    A rows-parallel module (q, k, v) has its ``up`` rows on the ranks, and copies of ``down`` that drifted apart
    slightly: their mean. A columns-parallel one (the output projection) has its ``down`` columns on the ranks, and each
    rank added only its own share, so the mean over ranks of what they added is the concatenation divided by their
    number. On a recorded run this is 5 and 7 % from the two ranks' outputs; the undivided sum is 8 and 10 %.
    """
    count = len(ranks)
    _check_one_run(source, detected)
    made: dict[str, Halves] = {}
    for module, first in ranks[0].items():
        downs, ups = _refs([rank[module].down for rank in ranks]), _refs([rank[module].up for rank in ranks])
        found = detected.spelling.find_part(module) if detected.spelling else None
        rule = detected.spelling.find(found[0]) if detected.spelling and found else None
        parallel = rule[0].parallel if rule and isinstance(rule[0], Rename | Fused) else "whole"
        down: Lazy
        up: Lazy
        if parallel == "rows":
            refuse_copies(ups)
            _check_copies(downs)
            down, up = Averaged(tuple(downs), count), Joined(tuple(ups), 0)
        elif parallel == "columns":
            _check_copies(ups)
            down, up = Joined(tuple(downs), 1), Averaged(tuple(ups), count * count)
        else:
            down, up = Averaged(tuple(downs), count), Averaged(tuple(ups), count)
        made[module] = Halves(down, up, first.stated)
    return made


def _refs(tensors: list[Lazy]) -> list[TensorRef]:
    """The byte ranges in the rank files: a trainer with ranks keeps one pair of factors a part, so nothing was cut."""
    return [tensor for tensor in tensors if isinstance(tensor, TensorRef)]


#: Base tensors up to this many bytes are compared between ranks; the greater ones would say no more.
_SMALL = 1 << 16


def _check_one_run(source: Source, detected: Detected) -> None:
    """Small base tensors that every rank holds whole must be the same bytes: they are frozen in a LoRA run."""
    for name in detected.ledger.base:
        refs = [of_rank(tensors, name) for tensors in source.ranks]
        found = detected.spelling.find(_module(detected, name)) if detected.spelling else None
        whole = found is not None and split_dim(getattr(found[0], "parallel", "whole"), refs[0]) is None
        if whole and nbytes(refs[0]) <= _SMALL:
            same_in_all(refs)


def _module(detected: Detected, name: str) -> str:
    return base_name(detected.dialect, name[len(detected.prefix) :]).rpartition(".")[0]


def _check_copies(refs: list[TensorRef]) -> None:
    """Copies of one factor drift apart by thousandths in training; half of their norm apart, they never were copies."""
    first = read(refs[0])
    for other in refs[1:]:
        gap, size = (first - read(other)) ** 2, first**2
        if gap.sum() > size.sum() / 4:
            raise mixed(refs[0], other)

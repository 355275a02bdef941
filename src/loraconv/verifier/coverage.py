"""Nothing of the source is lost: every number of the base is part of an output, or on a short list of what is not.

The list is stated here a second time: what diffusers computes itself, and a table that CogVideoX never uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from loraconv.lazy import Lazy, TensorRef
from loraconv.names import fold_names, numel
from loraconv.verifier.config import DIT, POSITIONS, is_rotary
from loraconv.verifier.numbers import same_bytes
from loraconv.verifier.oracles import is_sat_factor
from loraconv.verifier.proof import Check

Tensors = Mapping[str, TensorRef]
_COMPUTED = (
    DIT + "mixins.pos_embed.freqs_sin",
    DIT + "mixins.pos_embed.freqs_cos",
    DIT + "transformer.position_embeddings.weight",
)


def check_coverage(ranks: list[Tensors], made: Iterable[Lazy]) -> Check:
    """Every base tensor of every rank is used up by the byte ranges that ``made`` (the outputs) consist of.

    What all ranks hold whole is used once; the other ranks' copies must be the same bytes.
    """
    dropped = {*_COMPUTED} if is_rotary(ranks[0]) else {*_COMPUTED, POSITIONS}
    used = _used(made)
    count, lost = 0, []
    for number, tensors in enumerate(ranks):
        for name, ref in tensors.items():
            if not name.startswith(DIT) or is_sat_factor(name) or name in dropped:
                continue
            count += 1
            places = {(leaf.file.inode, ref.name) for leaf in ref.leaves()}
            whole = sum(sum(used.get(place, {}).values()) for place in places) == numel(ref.shape)
            copy = number > 0 and name in ranks[0] and same_bytes(ranks[0][name], ref)
            if not whole and not copy:
                lost.append(name)
    detail = f"lost on the way: {'; '.join(fold_names(lost)[:4])}" if lost else ""
    return Check("L0", "every tensor of the source is used", not lost, count, detail=detail)


def _used(made: Iterable[Lazy]) -> dict[tuple[tuple[int, int], str], dict[int, int]]:
    """``(file, tensor)`` -> where each range of it that is used begins, and how many numbers it has."""
    used: dict[tuple[tuple[int, int], str], dict[int, int]] = {}
    for tensor in made:
        for leaf in tensor.leaves():
            used.setdefault((leaf.file.inode, leaf.name), {})[leaf.offset] = numel(leaf.shape)
    return used

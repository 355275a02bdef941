"""Which samples are held out: the same ones on every machine, in whatever order they are listed.

Samples are ranked by a hash of seed and content, so adding a few moves few, and equal samples stay on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from loraconv.data.sample import Dataset, Sample
from loraconv.errors import FormatError


class Whole(Dataset, Protocol):
    """A dataset that says what each of its samples is: ``contents`` has one digest a sample."""

    @property
    def contents(self) -> Sequence[str]: ...


class Part:
    """Some samples of a dataset, in its order."""

    def __init__(self, whole: Whole, indices: Sequence[int]) -> None:
        self._whole, self._indices = whole, indices
        chosen = " ".join([whole.fingerprint, *map(str, indices)])
        self.fingerprint = hashlib.sha256(chosen.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._whole[self._indices[index]]


def split(whole: Whole, share: float, seed: int) -> tuple[Part, Part]:
    """The training part and the held-out part: ``share`` of the samples, and at least one unless it is 0.

    Raises :class:`FormatError` where nothing would be left to train on.
    """
    ranks = [hashlib.sha256(f"{seed} {content}".encode()).digest() for content in whole.contents]
    order = sorted(range(len(ranks)), key=lambda index: ranks[index])
    count = max(1, round(share * len(order))) if share else 0
    while 0 < count < len(order) and ranks[order[count]] == ranks[order[count - 1]]:
        count += 1
    if count >= len(order):
        raise FormatError(
            f"{len(order)} samples cannot be split into a training and a held-out part",
            why="equal samples are never put on both sides",
            hint="add samples, or set held_out = 0",
            slug="too-few-samples",
        )
    held = set(order[:count])
    return Part(whole, [i for i in range(len(order)) if i not in held]), Part(whole, sorted(held))

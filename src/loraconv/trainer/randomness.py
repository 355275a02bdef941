"""Every random number of a run follows from its seed and from what it is for: nothing depends on what came before.

So there is no generator whose state has to be saved: a run that goes on after a stop, and one on several processes,
draws for a sample what the uninterrupted run on one process draws for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def number(*parts: int | str) -> int:
    """A number from 0 to ``2**63 - 1`` that the parts determine, on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, so that the numbers are the same for every device."""
    return torch.Generator().manual_seed(number(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Within the block torch's own generators start from the parts; afterwards they are as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(number(*parts))
        yield


def permutation(count: int, *parts: int | str) -> list[int]:
    """The numbers below ``count`` in random order."""
    order: list[int] = torch.randperm(count, generator=generator(*parts)).tolist()
    return order

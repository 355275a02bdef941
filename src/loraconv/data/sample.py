"""One training example, and what a set of them offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example, already encoded; every tensor is float32.

    ``name`` is where it came from, for error messages. ``latents`` is ``(frames, channels, height, width)``, scaled as
    the model's VAE config asks. ``prompt`` is ``(tokens, text_dim)``, the text encoder's output. ``image`` (I2V only)
    has the shape of ``latents``: the first frame encoded alone, then zeros; no noise has been added to it. ``noised``
    (I2V with a VAE only) encodes that frame again, with noise of this standard deviation in its pixels, which run from
    -1 to 1.
    """

    name: str
    latents: Tensor
    prompt: Tensor
    image: Tensor | None
    noised: Callable[[Tensor, Generator], Tensor] | None = None


class Dataset(Protocol):
    """Samples by number. ``fingerprint`` changes when any content changes."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...

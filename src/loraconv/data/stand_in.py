"""Stand-ins for the VAE and the text encoder, for tiny models that have neither: fixed, linear, documented.

Latents: pixels from -1 to 1 are averaged over 8 x 8 squares, the first frame alone and then groups of 4 frames; latent
channel ``c`` then adds or subtracts red, green and blue as the lowest three bits of ``c`` say (0 adds, 1 subtracts).
With a multiple of 4 channels the three columns are orthogonal, so the averages come back as ``signs.T @ latents /
channels``. Prompt: each word becomes a vector drawn from its SHA-256, uniform with mean 0 and variance 1; the positions
behind the last word hold the vector of the empty word. Both are the same numbers on every machine.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from loraconv.data.settings import SPATIAL, TEMPORAL, ModelNeeds, padding

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor


class StandIn:
    """The stand-in encoder for one model; it needs no files."""

    noises = False

    def __init__(self, model: ModelNeeds) -> None:
        self._model = model
        self.key = f"stand-in 1 {model.channels} {model.patch_size_t} {model.image} {model.tokens} {model.text_dim}"

    def video(self, pixels: np.ndarray[Any, Any], digest: str) -> tuple[Tensor, Tensor | None]:
        """uint8 ``(frames, height, width, 3)`` as latents and, for I2V, conditioning latents."""
        import torch

        latents = torch.from_numpy(linear_latents(pixels, self._model.channels))
        first = latents[:1]
        pad = padding(len(latents), self._model.patch_size_t)
        latents = torch.cat([first.expand(pad, -1, -1, -1), latents])
        if not self._model.image:
            return latents, None
        return latents, torch.cat([first.expand(pad + 1, -1, -1, -1), torch.zeros_like(latents[pad + 1 :])])

    def noised(self, frame: Tensor, strength: Tensor, draw: Generator) -> Tensor:
        """Not offered: an average over 8 x 8 squares would take most of the noise away again."""
        raise NotImplementedError

    def prompt(self, text: str) -> Tensor:
        """``(tokens, text_dim)``."""
        import torch

        return torch.from_numpy(word_vectors(text, self._model.tokens, self._model.text_dim))

    def close(self) -> None:
        """Nothing to free."""


def linear_latents(pixels: np.ndarray[Any, Any], channels: int) -> np.ndarray[Any, Any]:
    """uint8 ``(1 + 4k, 8h, 8w, 3)`` as float32 ``(1 + k, channels, h, w)``."""
    import numpy as np

    frames, height, width, _ = pixels.shape
    values = pixels.astype(np.float64) / 127.5 - 1
    squares = values.reshape(frames, height // SPATIAL, SPATIAL, width // SPATIAL, SPATIAL, 3).mean(axis=(2, 4))
    groups = squares[1:].reshape(frames // TEMPORAL, TEMPORAL, *squares.shape[1:]).mean(axis=1)
    averages = np.concatenate([squares[:1], groups])
    # einsum promises no order of additions; three terms written out have one.
    red, green, blue = (averages[:, None, :, :, k] * signs(channels)[None, :, None, None, k] for k in range(3))
    latents: np.ndarray[Any, Any] = (red + green + blue).astype(np.float32)
    return latents


def signs(channels: int) -> np.ndarray[Any, Any]:
    """The map from red, green, blue to latent channels: ``(channels, 3)`` of 1 and -1."""
    import numpy as np

    return 1.0 - 2.0 * (np.arange(channels)[:, None] >> np.arange(3)[None, :] & 1)


def word_vectors(text: str, tokens: int, text_dim: int) -> np.ndarray[Any, Any]:
    """The prompt as float32 ``(tokens, text_dim)``; words beyond ``tokens`` are cut off, as a tokenizer does."""
    import numpy as np

    words = [*text.lower().split(), *[""] * tokens][:tokens]
    known = {word: _vector(word, text_dim) for word in set(words)}
    return np.stack([known[word] for word in words])


def _vector(word: str, size: int) -> np.ndarray[Any, Any]:
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:16], "little")
    # The raw stream of a bit generator never changes between versions of numpy; its distributions may.
    uniform = (np.random.PCG64(seed).random_raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((uniform * 2 - 1) * 3**0.5).astype(np.float32)

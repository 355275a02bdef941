"""Clips (pixels and a prompt) as encoded samples: through an encoder, and through a cache where encoding is costly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loraconv.data.sample import Sample
from loraconv.data.settings import PixelSize
from loraconv.data.shapes import Scene, draw

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

    from loraconv.data.cache import Cache


class Clip(Protocol):
    """A video with its prompt. ``digest`` changes with its pixels; ``files`` are the files it is read from."""

    @property
    def name(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    def pixels(self) -> np.ndarray[Any, Any]: ...


class Encoder(Protocol):
    """Turns pixels and prompts into what the model takes. ``key`` changes with everything it does; ``noises`` is True
    if the image can get its noise before it is encoded, with :meth:`noised`."""

    key: str
    noises: bool

    def video(self, pixels: np.ndarray[Any, Any], digest: str) -> tuple[Tensor, Tensor | None]: ...
    def noised(self, frame: Tensor, strength: Tensor, draw: Generator) -> Tensor: ...
    def prompt(self, text: str) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ShapesClip:
    """One scene of the moving shapes."""

    name: str
    scene: Scene
    size: PixelSize

    @property
    def prompt(self) -> str:
        return self.scene.prompt

    @property
    def digest(self) -> str:
        return _sha256(f"{self.scene} {self.size}")

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def pixels(self) -> np.ndarray[Any, Any]:
        """uint8 ``(frames, height, width, 3)``."""
        return draw(self.scene, self.size)


class EncodedDataset:
    """Clips seen through an encoder. With a cache, everything is encoded at the start and later read from there."""

    def __init__(self, clips: Sequence[Clip], encoder: Encoder, cache: Cache | None) -> None:
        self._clips, self._encoder, self._cache = clips, encoder, cache
        self.contents = [_sha256(f"{clip.digest} {clip.prompt!a}") for clip in clips]
        self.fingerprint = _sha256(" ".join([encoder.key, *self.contents]))
        if cache is not None:
            self._fill(cache)
            encoder.close()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Sample:
        clip = self._clips[index]
        video, text = self._video(clip), self._prompt(clip)
        noised = partial(self._encoder.noised, video["frame"]) if self._encoder.noises else None
        return Sample(clip.name, video["latents"], text["prompt_embeds"], video.get("image_latents"), noised)

    def _fill(self, cache: Cache) -> None:
        # Videos first, prompts second: of the VAE and the text encoder only one is in memory at a time.
        for clip in self._clips:
            if not cache.has(self._video_key(clip)):
                self._video(clip)
        for clip in self._clips:
            if not cache.has(self._prompt_key(clip)):
                self._prompt(clip)

    def _video(self, clip: Clip) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            pixels = clip.pixels()
            latents, image = self._encoder.video(pixels, clip.digest)
            frame = {"frame": _frame(pixels)} if self._encoder.noises else {}
            return {"latents": latents} | ({} if image is None else {"image_latents": image}) | frame

        if self._cache is None:
            return make()
        return self._cache.get(self._video_key(clip), make, clip.files)

    def _prompt(self, clip: Clip) -> dict[str, Tensor]:
        def make() -> dict[str, Tensor]:
            return {"prompt_embeds": self._encoder.prompt(clip.prompt)}

        return make() if self._cache is None else self._cache.get(self._prompt_key(clip), make, ())

    def _video_key(self, clip: Clip) -> str:
        return _sha256(f"video {self._encoder.key} {clip.digest}")

    def _prompt_key(self, clip: Clip) -> str:
        return _sha256(f"prompt {self._encoder.key} {clip.prompt!a}")


def _frame(pixels: np.ndarray[Any, Any]) -> Tensor:
    """The first frame, ``(3, height, width)`` from 0 to 255, in a dtype of floats that holds these numbers exactly."""
    import torch

    return torch.from_numpy(pixels[0]).permute(2, 0, 1).half()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

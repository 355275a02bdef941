"""Latents and prompt embeddings from the VAE and the text encoder of a diffusers pipeline folder.

What they are made of is what CogVideoXPipeline and CogVideoXImageToVideoPipeline (diffusers 0.42) do: latents times
``scaling_factor``; the first frame, encoded alone, divided by it where the VAE says ``invert_scale_latents``; the first
latent frame repeated in front until time splits into patches; T5's output for the padded tokens, without a mask.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraconv.data.settings import ModelNeeds, padding
from loraconv.errors import FormatError, UsageError
from loraconv.io.input_file import InputFile
from loraconv.names import printable, quoted

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

PARTS = ("vae", "text_encoder", "tokenizer")
_SAMPLED = 1 << 20


class PipelineEncoder:
    """Loads each part when it is first needed. Raises :class:`UsageError` for a folder that lacks one."""

    def __init__(self, folder: Path, model: ModelNeeds) -> None:
        self._folder, self._model = folder, model
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise UsageError(
                f"{printable(str(folder), 1000)} is not a pipeline folder: it has no {', '.join(missing)}",
                hint=f"ls {quoted(folder)}",
                slug="not-a-pipeline",
            )
        # Everything of the model but where its parts lie and run.
        what = replace(model, pipeline=None, device="")
        self.key = " ".join([f"pipeline 2 {what}", *(_sampled_digest(folder / part) for part in PARTS)])
        self.noises = model.image
        self._vae: Any = None
        self._text: Any = None

    def video(self, pixels: np.ndarray[Any, Any], digest: str) -> tuple[Tensor, Tensor | None]:
        """uint8 ``(frames, height, width, 3)`` as latents and, for I2V, conditioning latents.

        Latents are drawn from the VAE's distribution, as the model was trained, with a seed taken from ``digest``.
        """
        import torch

        values = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        drawn = torch.Generator().manual_seed(int(digest[:15], 16))
        latents = self._encoded(values, drawn)
        latents = latents * self._vae.config.scaling_factor
        pad = padding(len(latents), self._model.patch_size_t)
        latents = torch.cat([latents[:1].expand(pad, -1, -1, -1), latents])
        self._check(tuple(latents.shape), self._model.shape, "latents")
        if not self._model.image:
            return latents, None
        first = self._first(values[:, :, :1], drawn)
        return latents, torch.cat([first.expand(pad + 1, -1, -1, -1), torch.zeros_like(latents[pad + 1 :])])

    def noised(self, frame: Tensor, strength: Tensor, draw: Generator) -> Tensor:
        """The latents ``(channels, height, width)`` of a frame (``(3, height, width)``, 0 to 255) with noise in its
        pixels, as the reference training makes them (zai-org/CogVideo ``finetune/models/cogvideox_i2v``)."""
        import torch

        values = frame[None, :, None] / 127.5 - 1
        return self._first(values + strength * torch.randn(values.shape, generator=draw), draw)[0]

    def prompt(self, text: str) -> Tensor:
        """``(tokens, text_dim)``; what is longer is cut off, as the pipeline does."""
        import torch

        if self._text is None:
            self._vae, self._text = None, self._load_text()
        tokenizer, encoder = self._text
        tokens = tokenizer(
            text, padding="max_length", max_length=self._model.tokens, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            embeds: Tensor = encoder(tokens.input_ids.to(encoder.device))[0][0].float().cpu()
        self._check(tuple(embeds.shape), (self._model.tokens, self._model.text_dim), "prompt embeddings")
        return embeds

    def close(self) -> None:
        """Free both parts."""
        self._vae = self._text = None

    def _first(self, values: Tensor, drawn: Generator) -> Tensor:
        """One frame as scaled latents ``(1, channels, height, width)``."""
        latents = self._encoded(values, drawn)
        factor: float = self._vae.config.scaling_factor
        return latents / factor if self._vae.config.invert_scale_latents else latents * factor

    def _encoded(self, values: Tensor, drawn: Generator) -> Tensor:
        """One video as unscaled float32 latents ``(frames, channels, height, width)``."""
        import torch

        if self._vae is None:
            self._vae = self._load_vae()
        with torch.no_grad():
            found = self._vae.encode(values.to(self._vae.device, self._vae.dtype)).latent_dist.sample(drawn)
        latents: Tensor = found[0].permute(1, 0, 2, 3).float().cpu()
        return latents

    def _load_vae(self) -> Any:
        import diffusers

        kind: Any = diffusers.AutoencoderKLCogVideoX  # untyped
        return kind.from_pretrained(self._folder, subfolder="vae", **self._how()).to(self._model.device).eval()

    def _load_text(self) -> tuple[Any, Any]:
        import transformers

        kind: Any = transformers.T5EncoderModel  # its .to() is mistyped
        encoder = kind.from_pretrained(self._folder, subfolder="text_encoder", **self._how())
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder / "tokenizer", local_files_only=True)
        return tokenizer, encoder.to(self._model.device).eval()

    def _how(self) -> dict[str, Any]:
        """Nothing is fetched and nothing is unpickled; the dtype is the settings'."""
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self._model.dtype]
        return {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}

    def _check(self, found: tuple[int, ...], needed: tuple[int, ...], what: str) -> None:
        if found != needed:
            raise FormatError(
                f"the {what} of {printable(str(self._folder), 1000)} do not fit the model",
                why=f"they are {list(found)}, the model takes {list(needed)}",
                hint="take the pipeline that the transformer comes from",
                slug="pipeline-does-not-fit",
            )


def _sampled_digest(folder: Path) -> str:
    """Names, sizes, and the first and last megabyte of every file: enough to tell two models apart, without reading
    the 9 GB of a text encoder at every start."""
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_file():
            continue
        with InputFile(folder / name) as file:
            digest.update(f"{name} {file.size} ".encode("utf-8", "surrogateescape"))
            for at in (0, max(0, file.size - _SAMPLED)):
                digest.update(file.pread(at, min(_SAMPLED, file.size - at)))
    return digest.hexdigest()

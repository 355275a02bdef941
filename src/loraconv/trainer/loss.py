"""The diffusion loss of CogVideoX, as its reference training has it (zai-org/CogVideo ``finetune``,
huggingface/diffusers ``examples/cogvideo``): v-prediction, turned into a prediction of the clean latents and weighted
by ``1 / (1 - alpha)``.

With ``v = sqrt(alpha) noise - sqrt(1 - alpha) clean`` that weighting makes it the mean squared error of ``v`` itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from loraconv.errors import FormatError
from loraconv.trainer.batches import Batch
from loraconv.trainer.model import Base

#: What the released 1.5 I2V pipeline feeds its ``ofs`` embedding (huggingface/diffusers
#: ``CogVideoXImageToVideoPipeline``).
OFS = 2.0
Tables = tuple[torch.Tensor, torch.Tensor]


def losses(base: Base, batch: Batch) -> torch.Tensor:
    """The loss of every sample, ``(samples,)`` in float32. The batch is on the model's device."""
    noisy = base.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    velocity = predict(base, noisy, batch)
    clean: torch.Tensor = base.scheduler.get_velocity(velocity, noisy, batch.timesteps)
    alpha = base.scheduler.alphas_cumprod.to(noisy.device)[batch.timesteps]
    weight: torch.Tensor = (1 / (1 - alpha)).to(clean.dtype)
    return weight * (clean - batch.latents).square().flatten(1).mean(dim=1)


def predict(base: Base, noisy: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The transformer's prediction for noisy latents, in float32."""
    model = base.transformer
    dtype = model.patch_embed.proj.weight.dtype
    inputs = noisy if batch.image is None else torch.cat([noisy, batch.image], dim=2)
    ofs = None if model.config.ofs_embed_dim is None else inputs.new_full((1,), OFS, dtype=dtype)
    velocity: torch.Tensor = model(
        hidden_states=inputs.to(dtype),
        encoder_hidden_states=batch.prompt.to(dtype),
        timestep=batch.timesteps,
        ofs=ofs,
        image_rotary_emb=rotary(base, noisy.shape[1], noisy.shape[3], noisy.shape[4], noisy.device),
        return_dict=False,
    )[0]
    return velocity.float()


def rotary(base: Base, frames: int, height: int, width: int, device: torch.device) -> Tables | None:
    """Cosine and sine of the rotary positions for latents of this size, as the pipelines prepare them: 1.0 stretches
    its native grid over the latents, 1.5 takes a slice of it. None for a model without them."""
    config = base.config
    if not config.use_rotary_positional_embeddings:
        return None
    patch = config.patch_size
    grid, native = (height // patch, width // patch), (config.sample_height // patch, config.sample_width // patch)
    return _tables(config.attention_head_dim, config.patch_size_t, frames, grid, native, device)


@lru_cache(maxsize=4)
def _tables(
    width: int, depth: int | None, frames: int, grid: tuple[int, int], native: tuple[int, int], device: torch.device
) -> Tables:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if depth is None:
        made = get_3d_rotary_pos_embed(width, _crop(grid, native), grid, frames, device=device)
    else:
        _whole_patches(frames, depth)
        made = get_3d_rotary_pos_embed(
            width, None, grid, frames // depth, grid_type="slice", max_size=native, device=device
        )
    cosine, sine = made
    return cosine, sine


def _crop(grid: tuple[int, int], native: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the grid lies on the native one, scaled to fit and centred (``get_resize_crop_region_for_grid``)."""
    (rows, columns), (native_rows, native_columns) = grid, native
    if rows / columns > native_rows / native_columns:
        size = native_rows, round(native_rows / rows * columns)
    else:
        size = round(native_columns / columns * rows), native_columns
    top, left = round((native_rows - size[0]) / 2.0), round((native_columns - size[1]) / 2.0)
    return (top, left), (top + size[0], left + size[1])


def _whole_patches(frames: int, depth: int) -> None:
    if frames % depth:
        raise FormatError(
            f"{frames} latent frames do not split into patches of {depth}",
            why="CogVideoX 1.5 puts copies of the first latent frame in front until they do",
            hint="let loraconv encode the videos, or pad the latents",
            slug="frames",
        )

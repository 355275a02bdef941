"""Which samples a step learns from, in what order, and everything random that is drawn for each of them.

Samples are numbered through the whole run: number ``n`` is a place in the shuffled order of its epoch. The order
follows from the seed, so a run that goes on after a stop needs to know its step and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraconv.data.sample import Dataset, Sample
from loraconv.errors import FormatError
from loraconv.names import printable
from loraconv.trainer import randomness
from loraconv.trainer.faults import Fault
from loraconv.trainer.settings import BatchSettings, ConditioningSettings

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples put together: latents and image ``(samples, frames, channels, height, width)``, prompt ``(samples,
    tokens, text_dim)``, all float32. ``noise`` has the shape of the latents, ``timesteps`` is int64 ``(samples,)``."""

    names: tuple[str, ...]
    latents: torch.Tensor
    prompt: torch.Tensor
    image: torch.Tensor | None
    noise: torch.Tensor
    timesteps: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        image = None if self.image is None else self.image.to(device)
        latents, prompt, noise = (t.to(device) for t in (self.latents, self.prompt, self.noise))
        return Batch(self.names, latents, prompt, image, noise, self.timesteps.to(device))


@dataclass(frozen=True, slots=True)
class Order:
    """The order of the training samples on process ``rank`` of ``world``."""

    count: int
    seed: int
    batch: BatchSettings
    rank: int = 0
    world: int = 1

    def of_step(self, step: int) -> Iterator[Numbers]:
        """The sample numbers of this process's batches in one step. Batch ``k`` of process ``r`` has the samples that
        batch ``k * world + r`` has on a single process that accumulates ``world`` times as many."""
        size, batches = self.batch.size, self.batch.accumulate * self.world
        for own in range(self.batch.accumulate):
            first = (step * batches + own * self.world + self.rank) * size
            yield tuple(range(first, first + size))

    def index(self, number: int) -> int:
        """The place in the dataset of sample ``number``: each epoch goes through all of them once."""
        epoch, place = divmod(number, self.count)
        return _shuffled(self.count, self.seed, epoch)[place]


_known: dict[tuple[int, int, int], list[int]] = {}


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    key = (count, seed, epoch)
    if key not in _known:
        _known.clear()
        _known[key] = randomness.permutation(count, seed, "order", epoch)
    return _known[key]


def training_batch(data: Dataset, order: Order, numbers: Numbers, how: ConditioningSettings, timesteps: int) -> Batch:
    """The samples of these numbers with their noise and timesteps. Raises :class:`Fault` for NaN or Inf in a sample."""
    samples = [data[order.index(n)] for n in numbers]
    draws = [randomness.generator(order.seed, "sample", n) for n in numbers]
    times = [int(torch.randint(timesteps, (1,), generator=g)) for g in draws]
    noise = [torch.randn(s.latents.shape, generator=g) for s, g in zip(samples, draws, strict=True)]
    images = [_conditioned(s, g, how) for s, g in zip(samples, draws, strict=True)]
    return _together(samples, noise, times, images)


def held_out_batch(data: Dataset, index: int, part: int, parts: int, seed: int, timesteps: int) -> Batch:
    """One held-out sample at the middle of part ``part`` of the timesteps, with noise that is the same every time."""
    sample = data[index]
    noise = torch.randn(sample.latents.shape, generator=randomness.generator(seed, "held-out", index, part))
    return _together([sample], [noise], [(2 * part + 1) * timesteps // (2 * parts)], [sample.image])


def _conditioned(sample: Sample, draw: torch.Generator, how: ConditioningSettings) -> torch.Tensor | None:
    """The conditioning latents as the model meets them in training: noise on the first frame, now and then no image.

    As in the reference the noise is in the pixels that are encoded. Where there is no VAE, the latents get it.
    """
    image = sample.image
    if image is None:
        return None
    strength = torch.exp(how.noise_mean + how.noise_std * torch.randn((), generator=draw))
    if torch.rand((), generator=draw) < how.dropout:
        return torch.zeros_like(image)
    noisy = image.clone()
    given = image.flatten(1).any(dim=1)  # the first frame, and for CogVideoX 1.5 its copies
    if sample.noised is None:
        noisy[given] += strength * torch.randn(image[0].shape, generator=draw)
    else:
        noisy[given] = sample.noised(strength, draw)
    return noisy


def _together(
    samples: list[Sample], noise: list[torch.Tensor], times: list[int], images: list[torch.Tensor | None]
) -> Batch:
    _check(samples)
    given = [image for image in images if image is not None]
    return Batch(
        tuple(s.name for s in samples),
        torch.stack([s.latents for s in samples]),
        torch.stack([s.prompt for s in samples]),
        torch.stack(given) if given else None,
        torch.stack(noise),
        torch.tensor(times),
    )


def _check(samples: list[Sample]) -> None:
    for sample in samples:
        parts = {"latents": sample.latents, "prompt": sample.prompt, "image": sample.image}
        for what, tensor in parts.items():
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise Fault("data", f"sample {printable(sample.name)}, {what}")
    shapes = {s.name: (tuple(s.latents.shape), tuple(s.prompt.shape)) for s in samples}
    if len(set(shapes.values())) > 1:
        one, other = samples[0].name, next(n for n in shapes if shapes[n] != shapes[samples[0].name])
        raise FormatError(
            "samples of different sizes cannot be put into one batch",
            where=printable(f"{one}: {shapes[one]}; {other}: {shapes[other]}", 400),
            hint="set size = 1 in [batch], or prepare the samples at one size",
            slug="sizes-differ",
        )

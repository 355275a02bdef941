"""The loss is CogVideoX's own: held against the pipelines' preparation and float64 mathematics written here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from loraconv.data import DataSettings, Sample
from loraconv.errors import FormatError
from loraconv.trainer.batches import Batch, Order, held_out_batch, training_batch
from loraconv.trainer.loss import losses, predict, rotary
from loraconv.trainer.model import Base, load_base
from loraconv.trainer.settings import BatchSettings, ConditioningSettings, ModelSettings
from tests.train_support import VARIANTS, Clips

pytest_plugins = ["tests.train_fixtures"]

PLAIN = ConditioningSettings(noise_mean=-100.0, noise_std=0.0, dropout=0.0)


def tiny(variant: str) -> Base:
    return load_base(ModelSettings(tiny=variant), 0, "lora")


def batch_of(base: Base, count: int = 2, how: ConditioningSettings = PLAIN) -> Batch:
    data = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6)
    return training_batch(data, Order(6, 0, BatchSettings(size=count)), tuple(range(count)), how, 1000)


def alphas(shift: float) -> torch.Tensor:
    """The cumulative products of the CogVideoX noise schedule, from its definition, in float64: scaled-linear betas,
    the SNR divided by ``shift``, then the square root stretched so that the last one is zero."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    product = torch.cumprod(1 - betas, 0)
    root = (product / (shift + (1 - shift) * product)).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_squared_error_of_the_velocity(variant: str) -> None:
    base = tiny(variant)
    batch = batch_of(base)
    alpha = alphas(3.0 if variant == "2b" else 1.0)[batch.timesteps].view(-1, 1, 1, 1, 1)
    clean, noise = batch.latents.double(), batch.noise.double()
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    with torch.no_grad():
        got = losses(base, batch)
        velocity = predict(base, noisy.float(), batch).double()
    want = (velocity - target).square().flatten(1).mean(1)
    # The weight 1 / (1 - alpha) enlarges float32's rounding of the clean latents at the first timesteps.
    assert torch.allclose(got.double(), want, rtol=1e-4)
    assert got.shape == (2,)


@pytest.mark.parametrize("timestep", [0, 999])
def test_the_weighting_is_finite_at_both_ends(timestep: int) -> None:
    base = tiny("2b")
    batch = batch_of(base, 1)
    ends = Batch(batch.names, batch.latents, batch.prompt, None, batch.noise, torch.tensor([timestep]))
    with torch.no_grad():
        assert bool(torch.isfinite(losses(base, ends)).all())


@pytest.mark.parametrize("size", [(3, 8, 12), (5, 8, 12), (2, 12, 8), (4, 8, 8), (2, 4, 16)])
@pytest.mark.parametrize("variant", ["5b", "1.5"])
def test_rotary_positions_are_those_that_the_pipeline_prepares(variant: str, size: tuple[int, int, int]) -> None:
    base = tiny(variant)
    frames, height, width = size
    if base.config.patch_size_t:
        frames, height, width = frames + frames % 2, min(height, 8), min(width, 12)
    pipeline: Any = SimpleNamespace(transformer=base.transformer, vae_scale_factor_spatial=8)
    want = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, height * 8, width * 8, frames, torch.device("cpu")
    )
    got = rotary(base, frames, height, width, torch.device("cpu"))
    assert got is not None
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_model_with_sincos_positions_has_no_rotary_ones() -> None:
    assert rotary(tiny("2b"), 3, 8, 12, torch.device("cpu")) is None


def test_frames_that_do_not_fill_a_patch_are_refused() -> None:
    with pytest.raises(FormatError, match="patches of 2"):
        rotary(tiny("1.5"), 3, 8, 12, torch.device("cpu"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_gets_its_own_inputs(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny(variant)
    batch, seen = batch_of(base), {}
    real = CogVideoXTransformer3DModel.forward

    def watch(self: Any, *args: Any, **given: Any) -> Any:
        seen.update(given)
        return real(self, *args, **given)

    monkeypatch.setattr(CogVideoXTransformer3DModel, "forward", watch)
    with torch.no_grad():
        predict(base, batch.latents, batch)
    latents = seen["hidden_states"]
    assert torch.equal(latents[:, :, :16], batch.latents)
    if base.image:
        assert torch.equal(latents[:, :, 16:], batch.image)
    assert latents.shape[2] == base.config.in_channels
    # CogVideoXImageToVideoPipeline feeds 2.0 where there is an ofs embedding.
    assert (seen["ofs"] is None) == (variant != "1.5-i2v")
    if variant == "1.5-i2v":
        assert seen["ofs"].tolist() == [2.0]
    assert seen["timestep"].dtype == torch.int64


# --- order and noise --------------------------------------------------------------------------------------------------


def test_every_epoch_goes_through_all_samples_once_in_another_order() -> None:
    order = Order(7, 0, BatchSettings())
    epochs = [[order.index(7 * e + i) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_several_processes_share_the_samples_of_one() -> None:
    alone = Order(10, 0, BatchSettings(size=2, accumulate=4))
    pair = [Order(10, 0, BatchSettings(size=2, accumulate=2), rank, 2) for rank in (0, 1)]
    for step in range(3):
        one, two = (list(order.of_step(step)) for order in pair)
        assert [one[0], two[0], one[1], two[1]] == list(alone.of_step(step))


def test_a_sample_draws_the_same_noise_in_whatever_batch_it_is() -> None:
    base = tiny("2b")
    data, order = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6), Order(6, 0, BatchSettings())
    both = training_batch(data, order, (4, 5), PLAIN, 1000)
    alone = training_batch(data, order, (5,), PLAIN, 1000)
    assert both.names[1] == alone.names[0]
    assert torch.equal(both.noise[1], alone.noise[0])
    assert both.timesteps[1] == alone.timesteps[0]
    assert not torch.equal(both.noise[0], both.noise[1])


def test_noise_is_standard_normal_and_timesteps_cover_their_range() -> None:
    base = tiny("2b")
    data, order = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6), Order(6, 0, BatchSettings())
    batch = training_batch(data, order, tuple(range(200)), PLAIN, 1000)
    assert abs(float(batch.noise.mean())) < 4 / batch.noise.numel() ** 0.5
    assert abs(float(batch.noise.var()) - 1) < 4 * (2 / batch.noise.numel()) ** 0.5
    # 200 draws from 0 to 999: the mean's standard deviation is 20.
    assert abs(float(batch.timesteps.double().mean()) - 499.5) < 4 * 20.5
    assert 0 <= int(batch.timesteps.min()) < 50
    assert 950 < int(batch.timesteps.max()) <= 999


def test_held_out_noise_is_fixed_and_its_timesteps_are_spread_evenly() -> None:
    base = tiny("2b")
    data = Clips(base.needs(DataSettings(), "fp32", "cpu"), 2)
    parts = [held_out_batch(data, 0, part, 4, 0, 1000) for part in range(4)]
    assert [int(p.timesteps) for p in parts] == [125, 375, 625, 875]
    assert torch.equal(parts[1].noise, held_out_batch(data, 0, 1, 4, 0, 1000).noise)
    assert not torch.equal(parts[0].noise, parts[1].noise)


# --- image conditioning -----------------------------------------------------------------------------------------------


def images(how: ConditioningSettings, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The conditioning of ``count`` samples, and what it was before noise."""
    base = tiny("5b-i2v")
    data, order = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6), Order(6, 0, BatchSettings())
    batch = training_batch(data, order, tuple(range(count)), how, 1000)
    assert batch.image is not None
    clean = [data[order.index(n)].image for n in range(count)]
    return batch.image, torch.stack([c for c in clean if c is not None])


def test_noise_on_the_image_has_the_log_normal_strength_of_the_reference() -> None:
    noisy, clean = images(ConditioningSettings(dropout=0.0), 100)
    strength = (noisy - clean)[:, 0].flatten(1).std(dim=1).log()
    # 100 draws of N(-3, 0.5): four standard errors.
    assert abs(float(strength.mean()) + 3.0) < 4 * 0.05
    assert abs(float(strength.std()) - 0.5) < 4 * 0.05 / 2**0.5


def test_where_there_is_a_vae_the_noise_goes_into_the_pixels() -> None:
    base, asked = tiny("1.5-i2v"), []

    def noised(strength: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        asked.append(float(strength))
        return torch.randn(16, 8, 12, generator=draw)

    def copied(_index: int, sample: Sample) -> Sample:
        image = sample.image.clone()
        image[1] = image[0]
        return Sample(sample.name, sample.latents, sample.prompt, image, noised)

    data = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6, spoil=copied)
    order, how = Order(6, 0, BatchSettings()), ConditioningSettings(dropout=0.0)
    image = training_batch(data, order, tuple(range(100)), how, 1000).image
    assert image is not None
    assert torch.equal(image[:, 0], image[:, 1])
    assert not image[:, 2:].any()
    assert len({float(one[0, 0, 0, 0]) for one in image}) == 100, "other noise for every sample"
    strength = torch.tensor(asked).log()
    assert abs(float(strength.mean()) + 3.0) < 4 * 0.05
    assert abs(float(strength.std()) - 0.5) < 4 * 0.05 / 2**0.5


def test_frames_without_an_image_stay_zero() -> None:
    noisy, _ = images(ConditioningSettings(dropout=0.0), 4)
    assert not noisy[:, 1:].any()


def test_the_copies_of_the_first_frame_get_the_same_noise() -> None:
    base = tiny("1.5-i2v")

    def copied(_index: int, sample: Sample) -> Sample:
        image = sample.image.clone()
        image[1] = image[0]
        return Sample(sample.name, sample.latents, sample.prompt, image)

    data = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6, spoil=copied)
    batch = training_batch(data, Order(6, 0, BatchSettings()), (0,), ConditioningSettings(dropout=0.0), 1000)
    assert torch.equal(batch.image[0, 0], batch.image[0, 1])
    assert batch.image[0, 0].any()


def test_a_share_of_the_samples_has_no_image() -> None:
    noisy, _ = images(ConditioningSettings(dropout=0.25), 200)
    without = float((~noisy.flatten(1).any(dim=1)).double().mean())
    assert abs(without - 0.25) < 4 * (0.25 * 0.75 / 200) ** 0.5


def test_samples_of_two_sizes_do_not_go_into_one_batch() -> None:
    base = tiny("2b")

    def taller(index: int, sample: Sample) -> Sample:
        return sample if index else Sample(sample.name, torch.ones(3, 16, 10, 12), sample.prompt, None)

    data = Clips(base.needs(DataSettings(), "fp32", "cpu"), 6, spoil=taller)
    with pytest.raises(FormatError, match="different sizes") as error:
        training_batch(data, Order(6, 0, BatchSettings()), tuple(range(6)), PLAIN, 1000)
    assert "clip-0" in error.value.where

"""Encoding with the VAE and text encoder of a pipeline, compared with what diffusers' own pipelines do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from loraconv.data import DataSettings, ModelNeeds, Sample, open_dataset
from loraconv.data.pipeline import PipelineEncoder
from loraconv.errors import FormatError, UsageError
from tests.videos import noise, write_video

#: 9 frames of 16 x 32 pixels become 3 latent frames of 2 x 4.
NEEDS = ModelNeeds(channels=4, frames=3, height=2, width=4, tokens=8, text_dim=16, image=True)
PIXELS = noise(0)
PROMPT = "a red square moves left"


def _vae(**more: Any) -> AutoencoderKLCogVideoX:
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        scaling_factor=0.7,
        **more,
    ).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as ``save_pretrained`` writes it: tiny random VAE and T5, a tokenizer of eight words."""
    folder = tmp_path_factory.mktemp("pipeline")
    _vae().save_pretrained(folder / "vae")
    torch.manual_seed(1)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    T5EncoderModel(T5Config(vocab_size=10, **sizes)).save_pretrained(folder / "text_encoder")
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *PROMPT.split()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "tokenizer")
    return folder


def _sample(pipeline: Path, folder: Path, needs: ModelNeeds = NEEDS, **more: Any) -> Sample:
    if not (folder / "set").exists():
        write_video(folder / "set" / "a.mkv", PIXELS)
        (folder / "set" / "a.txt").write_text(PROMPT)
    settings = DataSettings(kind="folder", path=folder / "set", cache=folder / "cache", held_out=0.0, **more)
    return open_dataset(settings, replace(needs, pipeline=pipeline))[0][0]


def _parts(pipeline: Path) -> dict[str, Any]:
    return {
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(pipeline / "tokenizer"),
        "text_encoder": T5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        "vae": AutoencoderKLCogVideoX.from_pretrained(pipeline / "vae"),
        "scheduler": CogVideoXDPMScheduler(),
    }


def _transformer(patch_size_t: int | None) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=1, patch_size_t=patch_size_t
    )


class Calm(AutoencoderKLCogVideoX):  # type: ignore[misc]
    """Encodes without chance: its distribution has no width, so that draws by different generators are equal."""

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        found = super().encode(x, return_dict)
        found.latent_dist.std.zero_()
        return found


def test_prompts_are_embedded_as_the_pipeline_does(pipeline: Path, tmp_path: Path) -> None:
    pipe = CogVideoXPipeline(transformer=_transformer(None), **_parts(pipeline))
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=8)
    assert torch.equal(_sample(pipeline, tmp_path).prompt, expected[0])


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_latents_are_scaled_and_padded_as_the_pipelines_do(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inverted: bool, patch_size_t: int | None
) -> None:
    vae = Calm.from_pretrained(pipeline / "vae", invert_scale_latents=inverted)
    monkeypatch.setattr(PipelineEncoder, "_load_vae", lambda self: vae)
    needs = replace(NEEDS, frames=3 if patch_size_t is None else 4, patch_size_t=patch_size_t)
    found = _sample(pipeline, tmp_path, needs, frames=9)
    pipe = CogVideoXImageToVideoPipeline(transformer=_transformer(patch_size_t), **{**_parts(pipeline), "vae": vae})
    values = torch.from_numpy(PIXELS).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        plain = vae.encode(values).latent_dist.mean[0].permute(1, 0, 2, 3)
        _, image = pipe.prepare_latents(
            values[:, :, 0], 1, 4, 9, 16, 32, torch.float32, torch.device("cpu"), torch.Generator()
        )
    repeated = needs.frames - 3
    assert torch.allclose(found.latents[repeated:], plain * 0.7, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.latents[:repeated], found.latents[repeated : 2 * repeated])
    assert found.image is not None
    assert torch.allclose(found.image, image[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_image_gets_its_noise_before_it_is_encoded(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inverted: bool
) -> None:
    vae = Calm.from_pretrained(pipeline / "vae", invert_scale_latents=inverted)
    monkeypatch.setattr(PipelineEncoder, "_load_vae", lambda self: vae)
    sample = _sample(pipeline, tmp_path, frames=9)
    assert sample.noised is not None
    got = sample.noised(torch.tensor(0.5), torch.Generator().manual_seed(3))
    values = torch.from_numpy(PIXELS[:1]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    noisy = values + 0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = vae.encode(noisy).latent_dist.mean[0, :, 0]
    assert torch.equal(got, want / 0.7 if inverted else want * 0.7)
    assert sample.image is not None
    assert not torch.equal(got, sample.image[0])
    assert torch.equal(sample.noised(torch.tensor(0.0), torch.Generator()), sample.image[0])


def test_without_an_image_there_is_nothing_to_put_noise_on(pipeline: Path, tmp_path: Path) -> None:
    assert _sample(pipeline, tmp_path, replace(NEEDS, image=False)).noised is None


def test_latents_are_drawn_and_the_same_again(pipeline: Path, tmp_path: Path) -> None:
    one = _sample(pipeline, tmp_path).latents
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(_sample(pipeline, tmp_path).latents, one)
    vae = AutoencoderKLCogVideoX.from_pretrained(pipeline / "vae")
    values = torch.from_numpy(PIXELS).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        spread = vae.encode(values).latent_dist
    away = (one / 0.7 - spread.mean[0].permute(1, 0, 2, 3)) / spread.std[0].permute(1, 0, 2, 3)
    assert 0.8 < float(away.std()) < 1.2, "as far from the mean as the distribution is wide"


def test_shapes_go_through_the_vae_as_well(pipeline: Path, tmp_path: Path) -> None:
    settings = DataSettings(count=2, held_out=0.0, cache=tmp_path / "cache")
    train, _ = open_dataset(settings, replace(NEEDS, pipeline=pipeline, image=False))
    assert train[0].latents.shape == NEEDS.shape
    assert train[0].image is None
    assert not torch.equal(train[0].latents, train[1].latents)


def test_another_vae_is_not_served_from_the_cache(pipeline: Path, tmp_path: Path) -> None:
    before = _sample(pipeline, tmp_path).latents
    other = tmp_path / "other"
    for part in ("text_encoder", "tokenizer"):
        (other / part).mkdir(parents=True)
        for path in (pipeline / part).iterdir():
            (other / part / path.name).write_bytes(path.read_bytes())
    vae = AutoencoderKLCogVideoX.from_pretrained(pipeline / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.conv.bias += 1
    vae.save_pretrained(other / "vae")
    assert not torch.equal(_sample(other, tmp_path).latents, before)


def test_the_encoders_run_in_the_dtype_asked_for(pipeline: Path, tmp_path: Path) -> None:
    exact = _sample(pipeline, tmp_path)
    rough = _sample(pipeline, tmp_path, replace(NEEDS, dtype="bf16"))
    assert rough.prompt.dtype == torch.float32
    assert not torch.equal(rough.prompt, exact.prompt)
    assert np.allclose(rough.prompt, exact.prompt, rtol=0.1, atol=0.1)


def test_a_pipeline_of_another_model_is_refused_with_both_shapes(pipeline: Path, tmp_path: Path) -> None:
    for wrong, words in ((replace(NEEDS, text_dim=32), "[8, 16]"), (replace(NEEDS, channels=16), "[3, 4, 2, 4]")):
        with pytest.raises(FormatError, match="do not fit the model") as caught:
            _sample(pipeline, tmp_path, wrong)
        assert words in caught.value.why


def test_a_folder_without_the_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="vae, text_encoder, tokenizer"):
        _sample(tmp_path / "empty", tmp_path)

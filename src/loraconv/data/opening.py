"""Open a dataset of any kind as a training and a held-out part."""

from __future__ import annotations

import os
from pathlib import Path

from loraconv.data.cache import Cache
from loraconv.data.encoded import Clip, EncodedDataset, Encoder, ShapesClip
from loraconv.data.latents import LatentsDataset
from loraconv.data.sample import Dataset
from loraconv.data.settings import DataSettings, ModelNeeds, PixelSize, pixel_size
from loraconv.data.shapes import scene
from loraconv.data.split import Whole, split
from loraconv.data.stand_in import StandIn


def open_dataset(settings: DataSettings, model: ModelNeeds) -> tuple[Dataset, Dataset]:
    """The training samples and the held-out ones (none if ``settings.held_out`` is 0).

    Videos and prompts that are not in the cache are encoded now, with the pipeline's VAE and text encoder or with the
    stand-ins. Raises :class:`UsageError` (no such file, PyAV missing), :class:`FormatError` (not a dataset, wrong
    fields, a size that does not fit), :class:`CorruptCheckpoint` (a file that cannot be decoded) and
    :class:`WriteFailed` (the cache).
    """
    return split(_whole(settings, model), settings.held_out, settings.seed)


def _whole(settings: DataSettings, model: ModelNeeds) -> Whole:
    if settings.kind == "latents":
        assert settings.path is not None
        return LatentsDataset(settings.path, model)
    size = pixel_size(settings, model)
    cheap = settings.kind == "shapes" and model.pipeline is None
    cache = None if cheap else Cache(settings.cache or default_cache())
    return EncodedDataset(_clips(settings, size), _encoder(model), cache)


def _clips(settings: DataSettings, size: PixelSize) -> list[Clip]:
    if settings.kind == "shapes":
        return [
            ShapesClip(f"shapes seed {settings.seed} number {index}", scene(settings.seed, index), size)
            for index in range(settings.count)
        ]
    from loraconv.data.clips import video_clips

    return video_clips(settings, size)


def _encoder(model: ModelNeeds) -> Encoder:
    if model.pipeline is None:
        return StandIn(model)
    from loraconv.data.pipeline import PipelineEncoder

    return PipelineEncoder(model.pipeline, model)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/loraconv/data``, which is ``~/.cache/loraconv/data`` if the variable is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraconv" / "data"

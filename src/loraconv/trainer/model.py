"""The base model of a training run: read from a folder or made at random, with its scheduler and a fingerprint.

The fingerprint is a SHA-256 over name, dtype, shape and CRC-32 of every tensor, as the base's own files have them, so
that a later tool can tell whether an adapter meets the base it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loraconv.data.settings import SPATIAL, DataSettings, ModelNeeds, padding
from loraconv.data.tensors import InMemory
from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.io.crc import crc32
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors
from loraconv.io.sidecar import read_json
from loraconv.lazy import Lazy
from loraconv.names import fold_names, printable, quoted
from loraconv.trainer.randomness import seeded
from loraconv.trainer.settings import ModelSettings
from loraconv.trainer.tiny import CONFIGS, scheduler_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: CogVideoX 1.5: its config.json has the size in latents that its positions reach, not its native one of 768 x 1360.
_REACH_NEWER, _NATIVE_NEWER = (300, 300), (96, 170)
_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


@dataclass(frozen=True, slots=True)
class Base:
    """diffusers' ``CogVideoXTransformer3DModel`` and the scheduler it was trained with (neither has type annotations).

    ``name`` is what to call the model, ``pipeline`` the folder with its VAE and text encoder, if there is one.
    """

    transformer: Any
    scheduler: Any
    name: str
    fingerprint: str
    pipeline: Path | None = None

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def image(self) -> bool:
        """True for image-to-video: half of the input channels are the conditioning latents."""
        return bool(self.config.in_channels > self.config.out_channels)

    def needs(self, data: DataSettings, precision: str, device: str) -> ModelNeeds:
        """What one sample must look like: of the size that the data asks for, else the model's own. Learned positions
        (5B-I2V) fit one height and width only."""
        c = self.config
        height, width = c.sample_height, c.sample_width
        if (height, width) == _REACH_NEWER:
            height, width = _NATIVE_NEWER
        if not c.use_learned_positional_embeddings:
            height, width = (data.height or height * SPATIAL) // SPATIAL, (data.width or width * SPATIAL) // SPATIAL
        frames = ((data.frames or c.sample_frames) - 1) // c.temporal_compression_ratio + 1
        return ModelNeeds(
            channels=c.out_channels,
            frames=frames + padding(frames, c.patch_size_t),
            height=height,
            width=width,
            tokens=c.max_text_seq_length,
            text_dim=c.text_embed_dim,
            image=self.image,
            patch_size_t=c.patch_size_t,
            dtype=precision,
            device=device,
            pipeline=self.pipeline,
        )


def load_base(settings: ModelSettings, seed: int, kind: str) -> Base:
    """The base in the precision asked for (a full fine-tune: fp32). Raises :class:`UsageError` where there is none,
    :class:`FormatError` where it is no CogVideoX."""
    if bool(settings.path) == bool(settings.tiny):
        raise UsageError(
            "a run trains one model: a folder, or a tiny random one",
            hint='loraconv train --tiny 2b, or path = "..." in [model]',
            slug="no-model",
        )
    dtype = DTYPES["fp32" if kind == "full" else settings.precision]
    base = _random(settings.tiny, seed) if settings.tiny else _local(settings.path, dtype)
    # Module's own method: diffusers' logs a warning for every cast. Position tables of a folder come in float64.
    torch.nn.Module.to(base.transformer, dtype)
    if settings.gradient_checkpointing:
        base.transformer.enable_gradient_checkpointing()
    return base


def _random(variant: str, seed: int) -> Base:
    diffusers: Any = import_module("diffusers")
    with seeded(seed, "base", variant):
        transformer = diffusers.CogVideoXTransformer3DModel(**CONFIGS[variant])
    rotary = transformer.config.use_rotary_positional_embeddings
    scheduler = diffusers.CogVideoXDDIMScheduler.from_config(scheduler_config(rotary))
    tensors: dict[str, Lazy] = {name: InMemory(tensor) for name, tensor in transformer.state_dict().items()}
    return Base(transformer, scheduler, f"tiny-{variant}", fingerprint(tensors))


def _local(path: str, dtype: torch.dtype) -> Base:
    diffusers: Any = import_module("diffusers")
    pipeline = _pipeline(path)
    folder = pipeline / "transformer" if (pipeline / "transformer").is_dir() else pipeline
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "CogVideoXTransformer3DModel":
        raise FormatError(
            f"{printable(path)} holds no CogVideoX transformer",
            where=printable(str(folder / "config.json")),
            why=f"its class is {printable(str(config.get('_class_name')))}",
            slug="not-cogvideox",
        )
    told = pipeline / "scheduler" / "scheduler_config.json"
    # A transformer folder alone has no scheduler: then it is that of the released models.
    schedule = read_json(told) if told.is_file() else scheduler_config(bool(config["use_rotary_positional_embeddings"]))
    if schedule.get("_class_name") not in _SCHEDULERS or schedule.get("prediction_type") != "v_prediction":
        raise FormatError(
            "CogVideoX is trained with v-prediction and one of its own schedulers",
            where=printable(str(told)),
            why=printable(f"{schedule.get('_class_name')}, {schedule.get('prediction_type')}"),
            slug="scheduler",
        )
    transformer = _weights(diffusers.CogVideoXTransformer3DModel, folder, dtype)
    # Where torch puts them, not where the file has them: kernels round by the alignment of their operands.
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()
    scheduler = getattr(diffusers, schedule["_class_name"]).from_config(schedule)
    whole = pipeline if (pipeline / "vae").is_dir() else None
    return Base(transformer, scheduler, Path(path).name, _fingerprint_of(folder), whole)


def _weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The transformer with every weight from the folder: diffusers itself would fill a gap with random numbers."""
    try:
        transformer, loaded = kind.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(folder, printable(str(error), 400)) from None
    wrong = [key for names in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in map(str, loaded[names])]
    if wrong:
        raise _unloadable(folder, f"missing, unknown or of another shape: {'; '.join(fold_names(wrong)[:4])}")
    return transformer


def _unloadable(folder: Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "the base model cannot be loaded as it is",
        where=printable(str(folder)),
        why=why,
        hint="fetch or copy the folder again and compare its size with the original",
        slug="base-incomplete",
    )


def _pipeline(path: str) -> Path:
    """The folder at ``path``, or that of a Hub id in the local cache; the network is never asked."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UsageError(
            f"no such folder, and not in the local cache: {printable(path)}",
            hint=f"hf download {quoted(path)}",
            slug="not-found",
        ) from None


def _fingerprint_of(folder: Path) -> str:
    tensors: dict[str, Lazy] = {}
    files = [InputFile(path) for path in sorted(folder.glob("*.safetensors"))]
    try:
        for file in files:
            tensors |= read_safetensors(file).tensors
        return fingerprint(tensors)
    finally:
        for file in files:
            file.close()


def fingerprint(tensors: Mapping[str, Lazy]) -> str:
    """A SHA-256 in hexadecimal over ``[name, dtype, shape, CRC-32]`` of every tensor, sorted, as JSON."""
    rows = []
    for name, tensor in sorted(tensors.items()):
        crc = 0
        for piece in tensor.pieces():
            crc = crc32(piece, crc)
        rows.append([name, tensor.dtype, list(tensor.shape), f"{crc:08x}"])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

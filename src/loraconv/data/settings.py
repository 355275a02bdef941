"""What a user says about the training data, and what the model needs of it; both as plain values, checked here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraconv.errors import FormatError, UsageError

KINDS = ("shapes", "latents", "folder", "csv", "jsonl")

#: How many pixels one latent stands for, along height and width, and how many frames after the first: the VAE of
#: every CogVideoX (diffusers AutoencoderKLCogVideoX: vae_scale_factor_spatial, vae_scale_factor_temporal).
SPATIAL, TEMPORAL = 8, 4

MAX_COUNT = 10_000_000


@dataclass(frozen=True, slots=True)
class DataSettings:
    """The ``[data]`` of a run.

    ``kind`` is one of :data:`KINDS`; ``path`` is the folder, the ``.csv`` or the ``.jsonl`` (unused for ``shapes``);
    ``count`` is how many samples ``shapes`` makes; ``held_out`` is the share that is never trained on; ``seed`` draws
    the shapes and that share. ``frames``, ``height`` and ``width`` are the pixels' (None: what the model needs).
    ``cache`` holds encoded samples (None: ``~/.cache/loraconv/data``). The fields are columns of a CSV or keys of a
    JSONL. Raises :class:`UsageError` for a value that makes no sense.
    """

    kind: str = "shapes"
    path: Path | None = None
    count: int = 64
    held_out: float = 0.125
    seed: int = 0
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    cache: Path | None = None
    video_field: str = "video"
    prompt_field: str = "prompt"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"data kind {self.kind!r} is unknown", hint=f"kind is one of {', '.join(KINDS)}")
        if self.kind != "shapes" and self.path is None:
            raise UsageError(f"data of kind {self.kind!r} needs a path", hint='[data] path = "..."')
        if not 1 <= self.count <= MAX_COUNT:
            raise UsageError(f"count {self.count} is out of range", why=f"1 to {MAX_COUNT} samples can be made")
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held_out {self.held_out} is not a share", why="it is at least 0 and below 1")
        check_size(self.frames, self.height, self.width)


def check_size(frames: int | None, height: int | None, width: int | None) -> None:
    """Raise :class:`UsageError` for a size in pixels that the VAE cannot encode; None is not checked."""
    if frames is not None and (frames < 1 or frames % TEMPORAL != 1):
        below = max(1, (frames - 1) // TEMPORAL * TEMPORAL + 1)
        raise UsageError(
            f"{frames} frames cannot be encoded",
            why=f"the VAE takes one frame and then groups of {TEMPORAL}",
            hint=f"choose {below} or {below + TEMPORAL} frames",
        )
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 1 or size % SPATIAL):
            raise UsageError(f"{name} {size} cannot be encoded", why=f"the VAE takes multiples of {SPATIAL} pixels")


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What the transformer takes: one sample's latents are ``(frames, channels, height, width)``.

    ``channels`` are those of the VAE's latents alone (half of ``in_channels`` for I2V); ``frames`` is what the
    transformer sees: with ``patch_size_t`` (CogVideoX 1.5) a multiple of it. ``tokens`` and ``text_dim`` are the
    prompt's. ``image`` asks for conditioning latents. ``pipeline`` is a diffusers pipeline folder whose VAE and text
    encoder run in ``dtype`` (``fp32``, ``bf16`` or ``fp16``) on ``device``; None takes the documented stand-ins.
    """

    channels: int
    frames: int
    height: int
    width: int
    tokens: int
    text_dim: int
    image: bool = False
    patch_size_t: int | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    pipeline: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of one sample's latents."""
        return self.frames, self.channels, self.height, self.width


@dataclass(frozen=True, slots=True)
class PixelSize:
    """Of the videos that are encoded: frames, height, width."""

    frames: int
    height: int
    width: int


def padding(latent_frames: int, patch_size_t: int | None) -> int:
    """How many copies of the first latent frame stand before the others, so that time splits into whole patches."""
    return -latent_frames % (patch_size_t or 1)


def pixel_size(settings: DataSettings, model: ModelNeeds) -> PixelSize:
    """The size of the videos whose latents fit ``model``; raises :class:`FormatError` if the settings say otherwise."""
    if padding(model.frames, model.patch_size_t):
        raise FormatError(
            f"{model.frames} latent frames do not split into patches of {model.patch_size_t}",
            hint=f"choose a multiple of {model.patch_size_t} latent frames",
        )
    frames = settings.frames or (model.frames - 1) * TEMPORAL + 1
    height, width = settings.height or model.height * SPATIAL, settings.width or model.width * SPATIAL
    latent = (frames - 1) // TEMPORAL + 1
    made = (latent + padding(latent, model.patch_size_t), height // SPATIAL, width // SPATIAL)
    needed = (model.frames, model.height, model.width)
    if made != needed:
        raise FormatError(
            f"videos of {frames} frames, {height} x {width} pixels do not fit the model",
            why="they become latents of {} frames, {} x {}; the model takes {} frames, {} x {}".format(*made, *needed),
            hint="leave frames, height and width out of [data] to take the model's",
        )
    return PixelSize(frames, height, width)

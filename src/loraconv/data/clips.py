"""The videos of a list as clips to encode; the first thing that is wrong with the list is an error."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraconv.data.encoded import Clip
from loraconv.data.latents import file_digest
from loraconv.data.listing import Listing, Row, read_listing
from loraconv.data.settings import DataSettings, PixelSize
from loraconv.data.video import read_video
from loraconv.errors import FormatError, UsageError
from loraconv.names import printable, quoted

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class VideoClip:
    """One video file of a list; ``content`` is the SHA-256 of its bytes."""

    name: str
    prompt: str
    path: Path
    content: str
    size: PixelSize

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.content} {self.size}".encode()).hexdigest()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def pixels(self) -> np.ndarray[Any, Any]:
        """uint8 ``(frames, height, width, 3)``."""
        return read_video(self.path, self.size)


def video_clips(settings: DataSettings, size: PixelSize) -> list[Clip]:
    """Every video of the list. Raises :class:`FormatError` for a row without a video or without a prompt."""
    assert settings.path is not None
    listing = read_listing(settings.path, settings.kind, settings.video_field, settings.prompt_field)
    return [_clip(listing, row, size) for row in listing.rows]


def _clip(listing: Listing, row: Row, size: PixelSize) -> Clip:
    video, prompt = row.values.get(listing.video_field), row.values.get(listing.prompt_field)
    for name, value in ((listing.video_field, video), (listing.prompt_field, prompt)):
        if row.broken or not isinstance(value, str) or not value.strip():
            raise FormatError(
                f"{row.where} cannot be trained on",
                where=printable(str(listing.path), 1000),
                why=row.broken or f"it has no {printable(name)}",
                hint=f"loraconv check-data {quoted(listing.path)}",
                slug="bad-row",
            )
    assert isinstance(video, str)
    assert isinstance(prompt, str)
    path = listing.place(video)
    try:
        return VideoClip(row.where, prompt.strip(), path, file_digest(path), size)
    except UsageError as error:
        raise UsageError(
            error.what,
            where=f"{row.where} of {printable(str(listing.path), 1000)}",
            why=error.why,
            hint=f"loraconv check-data {quoted(listing.path)}",
            slug=error.slug,
        ) from None

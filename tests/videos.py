"""Small video files for the data tests, written with PyAV; FFV1 keeps every pixel as it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

Pixels = np.ndarray[Any, Any]

FRAMES, HEIGHT, WIDTH, RATE = 9, 16, 32, 8


def noise(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Pixels:
    """A video that is different for every seed and moves everywhere: uint8 ``(frames, height, width, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def plain(level: int | tuple[int, int, int], frames: int = FRAMES) -> Pixels:
    """One colour, all the time."""
    return np.full((frames, HEIGHT, WIDTH, 3), level, np.uint8)


def write_video(path: Path, pixels: Pixels, *, rate: int = RATE, codec: str = "ffv1", **options: str) -> Path:
    """Write ``pixels`` in the container that the name says; lossless unless another codec is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path

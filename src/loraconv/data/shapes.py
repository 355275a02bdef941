"""Moving shapes: a coloured square or circle that glides over a grey ground, and the sentence that says so.

Sample ``index`` of ``seed`` is the same on every machine: its choices come from a SHA-256, its pixels from comparisons
of correctly rounded numbers. The world is a torus, and a shape crosses half of it in one clip, so the first frame and
the prompt together determine every other frame (I2V), and the prompt alone everything but start and size (T2V).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraconv.data.settings import PixelSize

if TYPE_CHECKING:
    import numpy as np

#: Red, green and blue: 0 or 255, which is -1 or 1 for the model.
COLOURS = {
    "red":     (255, 0, 0),
    "green":   (0, 255, 0),
    "blue":    (0, 0, 255),
    "yellow":  (255, 255, 0),
    "cyan":    (0, 255, 255),
    "magenta": (255, 0, 255),
}  # fmt: skip
SHAPES = ("square", "circle")
#: Steps along height and width.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
GROUND = 128

#: Goes into every fingerprint: to be raised when the same seed gives other pixels or prompts.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip. ``start`` is the first centre as shares of height and width, ``radius`` a share of the shorter side."""

    colour: str
    shape: str
    direction: str
    start: tuple[float, float]
    radius: float

    @property
    def prompt(self) -> str:
        """Such as ``a red square moves left``."""
        return f"a {self.colour} {self.shape} moves {self.direction}"


def scene(seed: int, index: int) -> Scene:
    """The scene that belongs to these two numbers."""
    raw = hashlib.sha256(f"shapes {VERSION} {seed} {index}".encode()).digest()
    colour, shape, direction, *shares = (int.from_bytes(raw[at : at + 4], "little") for at in range(0, 24, 4))
    down, across, size = (share / 2**32 for share in shares)
    return Scene(
        list(COLOURS)[colour % len(COLOURS)],
        SHAPES[shape % len(SHAPES)],
        list(DIRECTIONS)[direction % len(DIRECTIONS)],
        (down, across),
        0.2 + 0.1 * size,
    )


def draw(scene: Scene, size: PixelSize) -> np.ndarray[Any, Any]:
    """The clip as uint8 ``(frames, height, width, 3)``."""
    import numpy as np

    step = DIRECTIONS[scene.direction]
    short = min(size.height, size.width)
    frames = np.full((size.frames, size.height, size.width, 3), GROUND, np.uint8)
    for number in range(size.frames):
        gone = 0.5 * number / max(1, size.frames - 1)
        away = []
        for length, start, direction in zip((size.height, size.width), scene.start, step, strict=True):
            places = (np.arange(length) + 0.5) / length
            # The shorter way around the torus, in units of the shorter side.
            away.append(((places - start - gone * direction + 0.5) % 1 - 0.5) * (length / short))
        down, across = np.abs(away[0])[:, None], np.abs(away[1])[None, :]
        if scene.shape == "square":
            inside = np.maximum(down, across) <= scene.radius
        else:
            inside = down * down + across * across <= scene.radius * scene.radius
        frames[number][inside] = COLOURS[scene.colour]
    return frames

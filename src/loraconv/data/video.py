"""Frames of a video file, decoded with PyAV.

A video file is hostile: FFmpeg sees it only through ``InputFile``, and only demuxers of plain containers may open it.
By default it also takes playlists (HLS), which open other files and addresses by themselves.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraconv.data.settings import PixelSize
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError
from loraconv.io.input_file import InputFile
from loraconv.names import printable, quoted

if TYPE_CHECKING:
    import av
    import numpy as np

VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".flv",
    ".ogv",
    ".wmv",
)
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,flv,ogg,asf"

#: Larger frames and longer videos are refused: no training video is, and decoding one takes all memory or all day.
MAX_PIXELS = 8192 * 8192
MAX_FRAMES = 100_000


class Stream(io.RawIOBase):
    """An :class:`InputFile` as a file object for libraries that want one."""

    def __init__(self, file: InputFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._file.size - self._at))
        if count:  # a position behind the end is legal for a file object
            buffer[:count] = self._file.pread(self._at, count)
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What decoding a whole video showed.

    ``declared`` is the number of frames that its header promises (None, as for most of MPEG-TS, if it promises none),
    ``rate`` is in frames a second. ``low`` and ``high`` are the extremes of red, green and blue over all frames;
    ``moves`` is whether any frame differs from the first one by more than what coding does. ``rotation`` is in degrees,
    as a player would turn it.
    """

    frames: int
    declared: int | None
    height: int
    width: int
    rate: Fraction | None
    low: tuple[int, int, int]
    high: tuple[int, int, int]
    moves: bool
    rotation: int


#: Levels of 255 by which coding alone changes a pixel.
NOISE = 4


def scan_video(path: Path) -> VideoFacts:
    """Decode every frame. Raises :class:`UsageError` (no such file, PyAV missing) and :class:`CorruptCheckpoint`."""
    import numpy as np

    with _opened(path) as (container, stream):
        count, rotation, moves = 0, 0, False
        first: np.ndarray[Any, Any] | None = None
        low, high = np.full(3, 255), np.zeros(3, int)
        for frame in _frames(container, stream, path):
            image = frame.to_ndarray(format="rgb24")
            if first is None:
                first, rotation = image, int(frame.rotation)
            elif not moves:
                moves = image.shape != first.shape or int(np.abs(image.astype(np.int16) - first).max()) > NOISE
            low, high = np.minimum(low, image.min(axis=(0, 1))), np.maximum(high, image.max(axis=(0, 1)))
            count += 1
        if first is None:
            raise _unreadable(path, "it holds no frame")
        height, width, _ = first.shape
        rate = stream.average_rate
        declared = _declared(container, stream, rate)
    red, green, blue = (tuple(map(int, levels)) for levels in zip(low, high, strict=True))
    lows, highs = zip(red, green, blue, strict=True)
    return VideoFacts(count, declared, height, width, rate, lows, highs, moves, rotation)


def read_video(path: Path, size: PixelSize) -> np.ndarray[Any, Any]:
    """The first frames, scaled down to cover ``size`` and cut at the centre: uint8 ``(frames, height, width, 3)``.

    Raises what :func:`scan_video` raises, and :class:`FormatError` for a video that is too short or too small.
    """
    import numpy as np

    pixels = np.empty((size.frames, size.height, size.width, 3), np.uint8)
    with _opened(path) as (container, stream):
        found = 0
        for frame in _frames(container, stream, path):
            pixels[found] = _fitted(frame, size, path)
            found += 1
            if found == size.frames:
                return pixels
    raise _does_not_fit(path, f"it has {found} frames, {size.frames} are needed")


def _fitted(frame: av.VideoFrame, size: PixelSize, path: Path) -> np.ndarray[Any, Any]:
    # The larger of the two ratios, so that the frame covers the size.
    over = max(Fraction(size.height, frame.height), Fraction(size.width, frame.width))
    if over > 1:
        raise _does_not_fit(path, f"{frame.height} x {frame.width} pixels, {size.height} x {size.width} are needed")
    height, width = max(size.height, round(frame.height * over)), max(size.width, round(frame.width * over))
    image = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    top, left = (height - size.height) // 2, (width - size.width) // 2
    return image[top : top + size.height, left : left + size.width]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream; what PyAV raises in the block becomes :class:`CorruptCheckpoint`."""
    av = _pyav()
    with InputFile(path) as file:
        try:
            # The buffer is what makes read() of the raw stream as long as FFmpeg asks.
            source = io.BufferedReader(Stream(file), 1 << 16)
            options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none"}
            with av.open(source, options=options, metadata_errors="replace") as container:
                if not container.streams.video:
                    raise _unreadable(path, "it holds no video stream")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise _unreadable(path, "its coding is unknown")
                stream.thread_type = "AUTO"
                _check_pixels(path, stream.width, stream.height)
                yield container, stream
        except LoraconvError:
            raise
        except (av.error.FFmpegError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
            raise _unreadable(path, getattr(error, "strerror", None) or f"{type(error).__name__}: {error}") from None
        file.check_unchanged()


def _frames(container: av.container.InputContainer, stream: av.VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    for number, frame in enumerate(container.decode(stream)):
        if number == MAX_FRAMES:
            raise _unreadable(path, f"it has more than {MAX_FRAMES} frames")
        if frame.is_corrupt:
            raise _unreadable(path, f"frame {number} is damaged", slug="video-truncated")
        _check_pixels(path, frame.width, frame.height)
        yield frame


def _declared(container: av.container.InputContainer, stream: av.VideoStream, rate: Fraction | None) -> int | None:
    """The number of frames by the header and by the duration, whichever is less.

    The count alone is too large where an edit list hides frames, as in every clip cut out of a file without encoding.
    """
    counts = [int(stream.frames)] if stream.frames else []
    if rate and stream.duration is not None and stream.time_base is not None:
        counts.append(round(stream.duration * stream.time_base * rate))
    elif rate and container.duration is not None and len(container.streams) == 1:  # sound may last longer
        counts.append(round(Fraction(container.duration, 1_000_000) * rate))
    return min(counts, default=None)


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _unreadable(path, f"{width} x {height} pixels are more than any training video has")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError(
            "videos are decoded with PyAV, which is not installed",
            why=str(error),
            hint="pip install 'loraconv[train]'",
            slug="pyav-missing",
        ) from None
    av.logging.set_level(None)
    return av


def _unreadable(path: Path, why: str, slug: str = "video-unreadable") -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"cannot decode {printable(str(path), 1000)}",
        why=printable(why),
        hint=f"loraconv check-data {quoted(path.parent)}",
        slug=slug,
    )


def _does_not_fit(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{printable(str(path), 1000)} does not fit", why=why, hint=f"loraconv check-data {quoted(path.parent)}"
    )

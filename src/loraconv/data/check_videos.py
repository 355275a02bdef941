"""The videos themselves: do they decode to their end, and are frames, size, rate and pixels what a training needs?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from loraconv.data.listing import Row
from loraconv.data.problems import Findings
from loraconv.data.video import NOISE, VideoFacts, scan_video
from loraconv.errors import CorruptCheckpoint

#: Levels of 255 that still count as black, or (from the other end) as white.
DARK = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the training will ask for, in pixels; None where the user did not say."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None


def check_videos(videos: Iterable[tuple[Row, Path]], wanted: Wanted, findings: Findings) -> None:
    """Decode every video. Raises :class:`UsageError` if PyAV is missing."""
    known: dict[str, VideoFacts] = {}
    for row, path in videos:
        try:
            facts = scan_video(path)
        except CorruptCheckpoint as error:
            slug = error.slug if error.slug == "video-truncated" else "video-unreadable"
            findings.add(slug, row.where, error.why)
            continue
        known[row.where] = facts
        _check_whole(row.where, facts, findings)
        _check_size(row.where, facts, wanted, findings)
        _check_rate(row.where, facts, wanted, findings)
        _check_pixels(row.where, facts, findings)
        findings.count("frames", facts.frames)
        findings.count("size", _size(facts))
        findings.count("rate", _rate(facts))
    if wanted.frames is None:
        _check_majority("frames-differ", known, lambda facts: str(facts.frames), findings)
    if wanted.height is None and wanted.width is None:
        _check_majority("size-mixed", known, _size, findings)
    if wanted.fps is None:
        _check_majority("rate-mixed", known, _rate, findings)


def _size(facts: VideoFacts) -> str:
    return f"{facts.height} x {facts.width}"


def _rate(facts: VideoFacts) -> str:
    return "unknown" if facts.rate is None else f"{float(facts.rate):.6g}"


def _check_whole(where: str, facts: VideoFacts, findings: Findings) -> None:
    # A header counts or rounds its last frames differently; a file that was cut off lacks more than that.
    if facts.declared is not None and facts.frames < facts.declared * 0.95 - 1:
        findings.add("video-truncated", where, f"{facts.frames} of {facts.declared} frames are there")


def _check_size(where: str, facts: VideoFacts, wanted: Wanted, findings: Findings) -> None:
    if wanted.frames is not None and facts.frames != wanted.frames:
        slug = "frames-few" if facts.frames < wanted.frames else "frames-many"
        findings.add(slug, where, f"{facts.frames} frames, {wanted.frames} are needed")
    height, width = wanted.height or facts.height, wanted.width or facts.width
    if (facts.height, facts.width) != (height, width):
        small = facts.height < height or facts.width < width
        findings.add("size-small" if small else "size-differs", where, f"{_size(facts)}, not {height} x {width}")
    if facts.rotation % 360:
        findings.add("video-rotated", where, f"by {facts.rotation} degrees")


def _check_rate(where: str, facts: VideoFacts, wanted: Wanted, findings: Findings) -> None:
    if wanted.fps is None:
        return
    # 23.976 and 24 are two ways to write one rate.
    if facts.rate is None or abs(facts.rate - Fraction(wanted.fps)) > Fraction(wanted.fps) / 100:
        findings.add("rate-wrong", where, f"{_rate(facts)} frames a second, not {wanted.fps:g}")


def _check_pixels(where: str, facts: VideoFacts, findings: Findings) -> None:
    if max(facts.high) <= DARK:
        findings.add("video-black", where)
    elif min(facts.low) >= 255 - DARK:
        findings.add("video-white", where)
    elif all(high - low <= NOISE for low, high in zip(facts.low, facts.high, strict=True)):
        findings.add("video-constant", where, f"red, green, blue about {', '.join(map(str, facts.low))}")
    elif not facts.moves:
        findings.add("video-still", where, f"{facts.frames} equal frames")


def _check_majority(
    slug: str, known: dict[str, VideoFacts], value: Callable[[VideoFacts], str], findings: Findings
) -> None:
    """Name the samples that differ from what more than half of them have."""
    counts = Counter(map(value, known.values()))
    for most, count in counts.most_common(1):
        if count * 2 > len(known):
            for where, facts in known.items():
                if value(facts) != most:
                    findings.add(slug, where, f"{value(facts)}, most have {most}")

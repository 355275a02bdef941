"""Image conversations as LLaVA's trainer reads them: ``[{id, image, conversations: [{from, value}, ...]}, ...]``.

Facts: haotian-liu/LLaVA docs/Finetune_Custom_Data.md, and train.py, which replaces ``<image>`` and reads the turns in
pairs of human and gpt. A conversation without an image holds no ``<image>``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from loraconv.data.fields import missing
from loraconv.data.problems import Findings
from loraconv.data.video import Stream
from loraconv.errors import LoraconvError
from loraconv.io.input_file import InputFile
from loraconv.names import printable

TOKEN = "<image>"
SPEAKERS = ("human", "gpt")
#: Formats whose decoders run nothing (EPS and others call programs).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 16384 * 16384


def check_conversations(entries: list[Any], images: Path, findings: Findings) -> None:
    """Check every conversation; image paths start from ``images``."""
    ids: dict[str, str] = {}
    for number, entry in enumerate(entries):
        where = sample_name(number)
        if not isinstance(entry, dict):
            findings.add("row-broken", where, f"it is {type(entry).__name__}, not an object")
            continue
        _check_id(where, entry, ids, findings)
        has_image = "image" in entry
        if has_image:
            _check_image(where, entry["image"], images, findings)
        if "conversations" not in entry:
            findings.add("field-missing", where, missing("conversations", entry))
            continue
        turns = entry["conversations"]
        if not isinstance(turns, list) or not turns:
            findings.add("turns-missing", where)
        elif _check_turns(where, turns, findings):
            _check_token(where, [turn["value"] for turn in turns], has_image, findings)
        findings.count("turns", len(turns) if isinstance(turns, list) else 0)


def sample_name(number: int) -> str:
    """How entry ``number`` (from 0) of the list is called."""
    return f"entry {number}"


def _check_id(where: str, entry: dict[str, Any], ids: dict[str, str], findings: Findings) -> None:
    if entry.get("id") in (None, ""):
        findings.add("id-missing", where)
        return
    earlier = ids.setdefault(str(entry["id"]), where)
    if earlier != where:
        findings.add("id-duplicate", where, f"as {earlier}")


def _check_image(where: str, value: Any, images: Path, findings: Findings) -> None:
    if not isinstance(value, str) or not value.strip():
        findings.add("file-missing", where, f"no image is named ({type(value).__name__})")
        return
    try:
        findings.count("image", _image_size(images / value))
    except LoraconvError as error:
        findings.add("file-missing" if error.slug == "not-found" else "image-unreadable", where, error.what)
    except (OSError, ValueError, SyntaxError, LookupError, ArithmeticError, MemoryError) as error:
        findings.add("image-unreadable", where, printable(str(error) or type(error).__name__))


def _image_size(path: Path) -> str:
    """Decode the whole image; its size. Raises whatever Pillow raises."""
    from PIL import Image

    with InputFile(path) as file, Image.open(io.BufferedReader(Stream(file)), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        image.load()
        return f"{image.height} x {image.width}"


def _check_turns(where: str, turns: list[Any], findings: Findings) -> bool:
    """Whether every turn has a known speaker and a text; their order is checked as well."""
    for number, turn in enumerate(turns):
        problem = _malformed(turn)
        if problem:
            findings.add("turn-malformed", where, f"turn {number}: {problem}")
            return False
    for number, turn in enumerate(turns):
        if not turn["value"].strip():
            findings.add("turn-empty", where, f"turn {number}")
            break
    speakers = [turn["from"] for turn in turns]
    if speakers != [SPEAKERS[number % 2] for number in range(len(turns))] or len(turns) % 2:
        findings.add("turn-order", where, ", ".join(speakers[:6]))
    return True


def _malformed(turn: Any) -> str:
    if not isinstance(turn, dict):
        return f"it is {type(turn).__name__}"
    for name in ("from", "value"):
        if name not in turn:
            return missing(name, turn)
        if not isinstance(turn[name], str):
            return f"{name!r} is {type(turn[name]).__name__}"
    return "" if turn["from"] in SPEAKERS else f"from {printable(turn['from'], 40)!r}"


def _check_token(where: str, values: list[str], has_image: bool, findings: Findings) -> None:
    counts: list[int] = [value.count(TOKEN) for value in values]
    if has_image and (counts[0] != 1 or sum(counts) != 1):
        findings.add("image-token", where, f"{sum(counts)} in all, {counts[0]} in the first turn")
    elif not has_image and any(counts):
        findings.add("image-token", where, f"{sum(counts)}, but there is no image")

"""The rows of a list of samples (a folder, a CSV, a JSONL), as they stand there; nothing is judged yet.

Three kinds of folder are known: ``NAME.txt`` beside each video; ``videos/`` with ``labels/NAME.txt`` (SAT's
SFTDataset); ``videos.txt`` and ``prompts.txt`` with one line a video (diffusers' CogVideoX training scripts).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraconv.data.video import VIDEO_SUFFIXES
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError
from loraconv.io.sidecar import parse_json, read_text
from loraconv.names import printable, quoted

#: A list of a million samples is about as large.
MAX_LIST = 256 << 20
MAX_PROMPT = 64 << 10


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as it is listed. ``where`` is a name for people; ``broken`` is why it could not be parsed, if so."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """``root`` is what relative paths start from; the two fields are the names of the values that matter."""

    kind: str
    path: Path
    root: Path
    video_field: str
    prompt_field: str
    rows: tuple[Row, ...]

    def place(self, value: str) -> Path:
        """Where the file of a row is."""
        return self.root / value


def read_listing(path: Path, kind: str, video_field: str = "video", prompt_field: str = "prompt") -> Listing:
    """Read a list of ``kind`` (``folder``, ``csv`` or ``jsonl``).

    Raises :class:`UsageError` (no such file), :class:`FormatError` (nothing in it) and :class:`CorruptCheckpoint`.
    """
    if kind == "folder":
        rows, root, video_field, prompt_field = list(_folder_rows(path)), path, "video", "prompt"
    else:
        # A byte order mark, which spreadsheets write, would become part of the first column's name.
        text = read_text(path, MAX_LIST).removeprefix("\ufeff")
        rows, root = list(_csv_rows(path, text) if kind == "csv" else _jsonl_rows(path, text)), path.parent
    if not rows:
        raise FormatError(
            f"no sample in {printable(str(path), 1000)}",
            why="it holds no video" if kind == "folder" else "it has no row",
            hint=f"ls {quoted(path)}" if kind == "folder" else f"head -n 3 {quoted(path)}",
            slug="no-samples",
        )
    return Listing(kind, path, root, video_field, prompt_field, tuple(rows))


def names_in(folder: Path) -> list[str]:
    """What is in a folder, in order; raises :class:`UsageError` if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(
            f"cannot list {printable(str(folder), 1000)}",
            why=error.strerror or str(error),
            hint=f"ls -ld {quoted(folder)}",
        ) from None


def videos_in(folder: Path) -> list[str]:
    """The names of the video files of a folder, in order; nothing if it is none."""
    return [name for name in names_in(folder) if name.lower().endswith(VIDEO_SUFFIXES)] if folder.is_dir() else []


def _folder_rows(folder: Path) -> Iterator[Row]:
    if (folder / "videos.txt").is_file() and (folder / "prompts.txt").is_file():
        yield from _two_lists(folder)
        return
    videos, labels = ("videos/", "labels/") if (folder / "labels").is_dir() else ("", "")
    for name in videos_in(folder / videos):
        prompt_file = folder / labels / Path(name).with_suffix(".txt").name
        row = Row(printable(videos + name), {"video": videos + name})
        try:
            prompt = read_text(prompt_file, MAX_PROMPT).removeprefix("\ufeff").strip() if prompt_file.exists() else None
            row.values.update({} if prompt is None else {"prompt": prompt})
            yield row
        except LoraconvError as error:
            yield Row(row.where, broken=f"{error.what}: {error.why}")


def _two_lists(folder: Path) -> Iterator[Row]:
    videos, prompts = (_lines(folder / name) for name in ("videos.txt", "prompts.txt"))
    if len(videos) != len(prompts):
        raise CorruptCheckpoint(
            f"videos.txt and prompts.txt of {printable(str(folder), 1000)} do not belong together",
            why=f"{len(videos)} videos and {len(prompts)} prompts: from some line on, each prompt is another video's",
            hint=f"wc -l {quoted(folder / 'videos.txt')} {quoted(folder / 'prompts.txt')}",
            slug="lists-differ",
        )
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True), 1):
        yield Row(f"videos.txt line {number}", {"video": video, "prompt": prompt})


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path, MAX_LIST).removeprefix("\ufeff").rstrip("\n").split("\n")]


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names):
            raise csv.Error(f"two columns have the same name: {', '.join(names)}")
        for cells in reader:
            where = f"{printable(path.name)} line {reader.line_num}"
            if len(cells) == len(names):
                yield Row(where, dict(zip(names, cells, strict=True)))
            elif cells:
                yield Row(where, broken=f"{len(cells)} cells under {len(names)} columns; is a comma not quoted?")
    except csv.Error as error:
        raise CorruptCheckpoint(
            f"cannot read {printable(str(path), 1000)}",
            where=f"line {reader.line_num}",
            why=printable(str(error)),
            hint=f"sed -n {max(1, reader.line_num)}p {quoted(path)}",
        ) from None


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{printable(path.name)} line {number}"
        if not line.strip():
            continue
        try:
            value = parse_json(line, where)
        except CorruptCheckpoint as error:
            yield Row(where, broken=printable(error.why))
            continue
        if isinstance(value, dict):
            yield Row(where, value)
        else:
            yield Row(where, broken=f"it is {type(value).__name__}, not an object")


def dumped(listing: Listing, rows: list[dict[str, Any]]) -> str:
    """Rows as the text of a list: a CSV stays a CSV, everything else becomes JSONL."""
    if listing.kind != "csv":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

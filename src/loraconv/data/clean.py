"""A cleaned copy of a list: the samples that are good, in a new folder. The dataset itself is never changed.

A list is written as ``clean.csv``, ``clean.jsonl`` or ``clean.json``; its video paths are made relative to the new
folder. Precomputed samples are copied, because a folder of them is its own list.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraconv.data.listing import Listing, dumped
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile
from loraconv.io.target import MANIFEST


def clean_listing(listing: Listing, bad: set[str], out: Path, overwrite: bool) -> str:
    """Write the good rows of a list of videos; returns the name of the file."""
    kept = []
    for row in listing.rows:
        if row.where not in bad:
            path = os.path.realpath(listing.place(row.values[listing.video_field]))
            kept.append({**row.values, listing.video_field: os.path.relpath(path, os.path.realpath(out))})
    name = "clean.csv" if listing.kind == "csv" else "clean.jsonl"
    # The list alone is the input: a new folder among the videos is fine.
    inputs = [] if listing.kind == "folder" else [listing.path]
    _write_text(out, name, dumped(listing, kept), inputs, overwrite)
    return name


def clean_conversations(path: Path, entries: list[Any], out: Path, overwrite: bool) -> str:
    """Write the good conversations as they were; returns the name of the file."""
    _write_text(out, "clean.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n", [path], overwrite)
    return "clean.json"


def clean_latents(files: list[Path], out: Path, overwrite: bool) -> str:
    """Copy the good sample files; returns their number in words."""
    needed = sum(path.stat().st_size for path in files)
    with _output(out, files, needed, overwrite) as (folder, made):
        for path in files:
            with folder.file(path.name) as file, InputFile(path) as source:
                file.copy(source, 0, source.size)
                source.check_unchanged()
            made[path.name] = file
    return f"{len(files)} samples"


def _write_text(out: Path, name: str, text: str, inputs: Iterable[Path], overwrite: bool) -> None:
    # A lone surrogate in JSON is legal there and has no UTF-8; it goes back as it came.
    raw = text.encode("utf-8", "surrogatepass")
    with _output(out, inputs, len(raw), overwrite) as (folder, made):
        with folder.file(name) as file:
            file.write(raw)
        made[name] = file


@contextmanager
def _output(
    out: Path, inputs: Iterable[Path], needed: int, overwrite: bool
) -> Iterator[tuple[OutputFolder, dict[str, OutputFile]]]:
    """The folder and what was written to it, which the manifest at its end lists, so that it may be replaced."""
    made: dict[str, OutputFile] = {}
    with output_folder(out, inputs=inputs, needed=needed + (1 << 16), overwrite=overwrite) as folder:
        yield folder, made
        files = [{"name": name, "bytes": file.size, "sha256": file.sha256} for name, file in made.items()]
        with folder.file(MANIFEST) as manifest:
            manifest.write(json.dumps({"schema": 1, "files": files}, indent=1).encode() + b"\n")

"""A list of videos and prompts: rows, fields, files and prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraconv.data.fields import missing
from loraconv.data.latents import file_digest
from loraconv.data.listing import Listing, Row, names_in, videos_in
from loraconv.data.problems import Findings
from loraconv.errors import UsageError
from loraconv.names import printable

#: How many tokens of a prompt CogVideoX sees (max_text_seq_length); a word is at least one.
TOKENS = 226


@dataclass(slots=True)
class Seen:
    """What earlier rows held, by what makes it the same; the value is the earlier sample."""

    files: dict[str, str]
    contents: dict[str, str]
    prompts: dict[str, str]


def check_rows(listing: Listing, findings: Findings) -> Iterator[tuple[Row, Path]]:
    """Check every row; yields those whose video is there for the first time, to be looked at."""
    seen = Seen({}, {}, {})
    for row in listing.rows:
        if row.broken:
            findings.add("row-broken", row.where, row.broken)
            continue
        _check_prompt(listing, row, seen, findings)
        path = _video(listing, row, findings)
        if path is not None and _is_new(path, row.where, seen, findings):
            yield row, path
    _check_unlisted(listing, seen, findings)


def _check_prompt(listing: Listing, row: Row, seen: Seen, findings: Findings) -> None:
    if listing.prompt_field not in row.values:
        if listing.kind == "folder":
            findings.add("prompt-missing", row.where, "there is no .txt of its name")
        else:
            findings.add("field-missing", row.where, missing(listing.prompt_field, row.values))
        return
    prompt = row.values[listing.prompt_field]
    if prompt is None:
        findings.add("prompt-missing", row.where, "it is null")
    elif not isinstance(prompt, str):
        findings.add("prompt-not-text", row.where, f"it is {type(prompt).__name__}")
    elif not prompt.strip():
        findings.add("prompt-empty", row.where)
    else:
        _check_words(prompt.casefold().split(), row.where, seen, findings)


def _check_words(words: list[str], where: str, seen: Seen, findings: Findings) -> None:
    if len(words) > TOKENS:
        findings.add("prompt-long", where, f"{len(words)} words")
    earlier = seen.prompts.setdefault(" ".join(words), where)
    if earlier != where:
        findings.add("prompt-duplicate", where, f"as {earlier}")


def _video(listing: Listing, row: Row, findings: Findings) -> Path | None:
    if listing.video_field not in row.values:
        findings.add("field-missing", row.where, missing(listing.video_field, row.values))
        return None
    value = row.values[listing.video_field]
    if not isinstance(value, str) or not value.strip():
        findings.add("file-missing", row.where, f"no video is named ({type(value).__name__})")
        return None
    return listing.place(value)


def _is_new(path: Path, where: str, seen: Seen, findings: Findings) -> bool:
    """Whether this is a readable file that no earlier row held."""
    try:
        content = file_digest(path)
    except UsageError as error:
        findings.add("file-missing", where, error.what)
        return False
    earlier = seen.files.setdefault(os.path.realpath(path), where)
    if earlier != where:
        findings.add("listed-twice", where, f"as {earlier}")
        return False
    earlier = seen.contents.setdefault(content, where)
    if earlier != where:
        findings.add("content-duplicate", where, f"as {earlier}")
        return False
    return True


def _check_unlisted(listing: Listing, seen: Seen, findings: Findings) -> None:
    """Videos beside the listed ones that no row names, and prompts of a folder whose video is gone."""
    for folder in sorted({os.path.dirname(path) for path in seen.files}):
        for name in videos_in(Path(folder)):
            path = os.path.join(folder, name)
            if os.path.realpath(path) not in seen.files:
                findings.add("file-unlisted", printable(os.path.relpath(path, os.path.realpath(listing.root))))
    if listing.kind == "folder" and not (listing.root / "videos.txt").is_file():
        stems = {Path(str(row.values.get("video", row.where))).stem for row in listing.rows}
        labels = listing.root / "labels" if (listing.root / "labels").is_dir() else listing.root
        for name in names_in(labels):
            if name.endswith(".txt") and Path(name).stem not in stems:
                findings.add("file-unlisted", printable(name), "a prompt without a video")

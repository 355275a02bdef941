"""``loraconv check-data``: everything that is wrong with a dataset, found before it costs a GPU hour.

A problem is an error where a sample with it cannot or must not be trained on, and a warning where the user has to know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.names import printable, quoted

if TYPE_CHECKING:
    from loraconv.data.check_videos import Wanted
    from loraconv.data.problems import Findings, Problem


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found. ``samples`` counts those listed, ``good`` those without an error.

    ``facts`` says how often each value of a property occurs; ``wrote`` is the cleaned list, where one was asked for.
    """

    path: Path
    kind: str
    samples: int
    good: int
    problems: tuple[Problem, ...] = ()
    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    wrote: Path | None = None

    @property
    def fine(self) -> bool:
        """Whether every sample can be trained on; there may be warnings."""
        return not any(problem.fatal for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "path": str(self.path),
            "kind": self.kind,
            "fine": self.fine,
            "samples": self.samples,
            "good": self.good,
            "problems": [problem.to_dict() for problem in self.problems],
            "facts": self.facts,
            "wrote": None if self.wrote is None else str(self.wrote),
        }


@dataclass(frozen=True, slots=True)
class _Request:
    path: Path
    wanted: Wanted
    video_field: str
    prompt_field: str
    images: Path | None
    fix: Path | None
    overwrite: bool


def check_data(
    path: str | Path,
    *,
    kind: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    video_field: str = "video",
    prompt_field: str = "prompt",
    images: str | Path | None = None,
    fix: str | Path | None = None,
    overwrite: bool = False,
) -> DataReport:
    """Check a folder or list of videos and prompts, a folder of latents, or a JSON of image conversations.

    ``kind`` is ``folder``, ``csv``, ``jsonl``, ``latents`` or ``conversations`` (None: told from ``path``). ``frames``,
    ``height``, ``width`` (pixels) and ``fps`` are what training will ask for; what is not given is compared with what
    most samples have. ``images`` is the folder that image paths start from (None: the JSON's own). ``fix`` is a new
    folder for a cleaned list; ``overwrite`` replaces an earlier one.

    Raises :class:`UsageError` (no such file, a senseless size, PyAV missing), :class:`FormatError` (not a dataset; no
    good sample to write), :class:`CorruptCheckpoint` (a list that cannot be parsed at all) and :class:`WriteFailed`.
    """
    from loraconv.data.check_videos import Wanted
    from loraconv.data.kinds import CHECKED, detect_kind
    from loraconv.data.settings import check_size

    check_size(frames, height, width)
    if fps is not None and not 0 < fps < 1000:
        raise UsageError(f"{fps:g} frames a second is no frame rate", hint="CogVideoX: 8, CogVideoX 1.5: 16")
    if kind is not None and kind not in CHECKED:
        raise UsageError(f"kind {printable(kind)!r} is unknown", hint=f"kind is one of {', '.join(CHECKED)}")
    found, place = (kind, Path(path)) if kind else detect_kind(Path(path))
    request = _Request(
        place,
        Wanted(frames, height, width, fps),
        video_field,
        prompt_field,
        None if images is None else Path(images),
        None if fix is None else Path(fix),
        overwrite,
    )
    checks = {"latents": _latents, "conversations": _conversations}
    return checks[found](request) if found in checks else _list(request, found)


def _list(request: _Request, kind: str) -> DataReport:
    from loraconv.data.check_list import check_rows
    from loraconv.data.check_videos import check_videos
    from loraconv.data.clean import clean_listing
    from loraconv.data.listing import read_listing
    from loraconv.data.problems import Findings

    listing, findings = read_listing(request.path, kind, request.video_field, request.prompt_field), Findings()
    check_videos(check_rows(listing, findings), request.wanted, findings)
    good = sum(row.where not in findings.bad for row in listing.rows)
    wrote = None
    if request.fix is not None:
        _require(good, request)
        wrote = request.fix / clean_listing(listing, findings.bad, request.fix, request.overwrite)
    return _report(request, kind, findings, len(listing.rows), good, wrote)


def _latents(request: _Request) -> DataReport:
    from loraconv.data.check_latents import check_latents
    from loraconv.data.clean import clean_latents
    from loraconv.data.latents import sample_files
    from loraconv.data.problems import Findings

    files, findings = sample_files(request.path), Findings()
    check_latents(files, request.wanted, findings)
    good = [path for path in files if printable(path.name) not in findings.bad]
    if request.fix is not None:
        _require(len(good), request)
        clean_latents(good, request.fix, request.overwrite)
    return _report(request, "latents", findings, len(files), len(good), request.fix)


def _conversations(request: _Request) -> DataReport:
    from loraconv.data.check_conversations import check_conversations, sample_name
    from loraconv.data.clean import clean_conversations
    from loraconv.data.problems import Findings

    entries, findings = _entries(request.path), Findings()
    check_conversations(entries, request.images or request.path.parent, findings)
    good = [entry for number, entry in enumerate(entries) if sample_name(number) not in findings.bad]
    wrote = None
    if request.fix is not None:
        _require(len(good), request)
        wrote = request.fix / clean_conversations(request.path, good, request.fix, request.overwrite)
    return _report(request, "conversations", findings, len(entries), len(good), wrote)


def _entries(path: Path) -> list[Any]:
    """The root of the JSON, which is a list that holds at least one object."""
    from loraconv.data.listing import MAX_LIST
    from loraconv.io.sidecar import parse_json, read_text

    try:
        root = parse_json(read_text(path, MAX_LIST).removeprefix("\ufeff"), str(path))
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(error.what, why=error.why, hint=f"python3 -m json.tool {quoted(path)} | tail") from None
    if not isinstance(root, list) or not any(isinstance(entry, dict) for entry in root):
        raise FormatError(
            f"{printable(str(path), 1000)} is not a list of conversations",
            why=f"its root is {type(root).__name__}" + ("" if not isinstance(root, list) else " without objects"),
            hint="write [{id, image, conversations: [{from, value}, ...]}, ...]",
            slug="not-a-dataset",
        )
    return root


def _require(good: int, request: _Request) -> None:
    if not good:
        raise FormatError(
            "no sample is good, so there is no cleaned list to write",
            where=printable(str(request.path), 1000),
            hint=f"loraconv check-data {quoted(request.path)}",
            slug="nothing-left",
        )


def _report(
    request: _Request, kind: str, findings: Findings, samples: int, good: int, wrote: Path | None
) -> DataReport:
    return DataReport(request.path, kind, samples, good, findings.problems(), findings.facts, wrote)

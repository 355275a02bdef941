"""Everything that can be wrong with training data: what it is, whether a sample with it must go, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem. ``fatal``: a sample that has it cannot or must not be trained on."""

    fatal: bool
    what: str
    mend: str


def _error(what: str, mend: str) -> Kind:
    return Kind(True, what, mend)


def _warning(what: str, mend: str) -> Kind:
    return Kind(False, what, mend)


KINDS = {
    # lists
    "row-broken": _error("the row cannot be parsed", "quote cells that hold commas; write one JSON object a line"),
    "field-missing": _error("a field is missing", "rename the field, or name it: --video-field, --prompt-field"),
    "file-missing": _error("the file is not there", "restore it, or correct its path (relative to the list)"),
    "listed-twice": _error("the file is listed again", "remove the later row"),
    "content-duplicate": _error("the file has the same bytes as an earlier one", "remove one: it would count double"),
    "file-unlisted": _warning("the file belongs to no sample", "list it, or remove it"),
    # prompts
    "prompt-missing": _error("there is no prompt", "write one"),
    "prompt-empty": _error("the prompt is empty", "write one"),
    "prompt-not-text": _error("the prompt is not text", "write it as a string"),
    "prompt-long": _warning("the prompt has more words than T5 sees tokens (226)", "shorten it: its end is cut off"),
    "prompt-duplicate": _warning("an earlier sample has the same prompt", "say how the videos differ, if they do"),
    # videos
    "video-unreadable": _error("the video cannot be decoded", "fetch it again, or encode it anew as H.264 in .mp4"),
    "video-truncated": _error("the video ends before its end", "fetch it again"),
    "frames-few": _error("the video has too few frames", "remove it, or train on fewer frames"),
    "frames-many": _warning("the video is longer than what is trained on", "cut it: only its beginning is seen"),
    "frames-differ": _warning("most videos have another number of frames", "pass --frames to say how many you need"),
    "size-small": _error("the video is smaller than what is trained on", "remove it: enlarging it teaches blur"),
    "size-differs": _warning("the video has another size than what is trained on", "expect it scaled and cut"),
    "size-mixed": _warning("most videos have another size", "pass --height and --width to say what you need"),
    "rate-wrong": _error("the video has another frame rate", "encode it at the rate the model was trained at"),
    "rate-mixed": _warning("most videos have another frame rate", "pass --fps to say what you need"),
    "video-black": _error("every pixel is black", "remove it"),
    "video-white": _error("every pixel is white", "remove it"),
    "video-constant": _error("every pixel has the same colour", "remove it"),
    "video-still": _warning("nothing moves", "remove it, unless stills are what you want"),
    "video-rotated": _warning("players turn the video, the trainer does not", "encode it anew, turned"),
    # precomputed latents
    "tensors-unreadable": _error("not a whole safetensors file of floating-point numbers", "save it again"),
    "tensor-missing": _error("a tensor is missing", "save latents, prompt_embeds and, for I2V, image_latents"),
    "tensor-shape": _error("a tensor has the wrong shape", "save latents as (frames, channels, height, width)"),
    "shape-mixed": _error("most samples have another shape", "remove it, or encode it anew"),
    "not-finite": _error("there are NaN or Inf", "encode it anew in float32 or bfloat16: float16 overflows"),
    "latents-scale": _error("the numbers are not those of scaled latents", "multiply by the VAE's scaling_factor"),
    "embeds-zero": _error("the prompt embeddings are all zero", "encode the prompt again"),
    "image-rest": _error("image latents go on after the first frame", "put zeros there: the model sees one image"),
    # conversations
    "id-missing": _error("there is no id", "give each conversation one"),
    "id-duplicate": _error("an earlier conversation has the same id", "rename one"),
    "image-unreadable": _error("the image cannot be decoded", "fetch it again, or save it anew as PNG"),
    "turns-missing": _error("there are no turns", "remove the conversation"),
    "turn-malformed": _error("a turn is not {from, value}", "write from (human or gpt) and value, both text"),
    "turn-empty": _error("a turn is empty", "remove the conversation, or write the turn"),
    "turn-order": _error("human and gpt do not take turns", "begin with human, alternate, end with gpt"),
    "image-token": _error("<image> does not stand where it must", "put <image> once, in the first turn of human"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem and every sample that has it; ``details`` says of each what was found."""

    slug: str
    samples: tuple[str, ...]
    details: tuple[str, ...]

    @property
    def fatal(self) -> bool:
        return KINDS[self.slug].fatal

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        kind = KINDS[self.slug]
        return {
            "slug": self.slug,
            "severity": "error" if kind.fatal else "warning",
            "what": kind.what,
            "mend": kind.mend,
            "samples": [{"name": n, "detail": d} for n, d in zip(self.samples, self.details, strict=True)],
        }


@dataclass(slots=True)
class Findings:
    """What a check has found so far, and ``facts``: how often each value of a property occurs."""

    found: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)

    def add(self, slug: str, sample: str, detail: str = "") -> None:
        """Sample ``sample`` has the problem ``slug``."""
        self.found.setdefault(slug, []).append((sample, detail))
        if KINDS[slug].fatal:
            self.bad.add(sample)

    def count(self, fact: str, value: object) -> None:
        """One more sample has this value."""
        values = self.facts.setdefault(fact, {})
        values[str(value)] = values.get(str(value), 0) + 1

    def problems(self) -> tuple[Problem, ...]:
        """In the order of :data:`KINDS`, errors first."""
        slugs = sorted((slug for slug in KINDS if slug in self.found), key=lambda slug: not KINDS[slug].fatal)
        return tuple(Problem(slug, *_columns(self.found[slug])) for slug in slugs)


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(name for name, _ in pairs), tuple(detail for _, detail in pairs)

"""Every failure a user can meet, each with a stable slug, an exit code and the command that mends it.

The library raises these and never prints; only ``loraconv.cli`` turns one into text. An exception that is not a
:class:`LoraconvError` is a bug in loraconv (exit code 1).
"""

from __future__ import annotations

from typing import ClassVar


class LoraconvError(Exception):
    """A failure with four parts: what happened, where, why, and a hint (a command that mends it).

    ``slug`` is a stable machine-readable name; ``exit_code`` is what the command line exits with.
    """

    exit_code: ClassVar[int] = 1
    default_slug: ClassVar[str] = "error"

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "", slug: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint
        self.slug = slug or self.default_slug

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.why:
            parts.append(f"why: {self.why}")
        if self.hint:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, object]:
        """The same four parts as a JSON-ready dict, with slug and exit code."""
        return {
            "code": self.exit_code,
            "slug": self.slug,
            "message": self.what,
            "where": self.where,
            "why": self.why,
            "hint": self.hint,
        }


class UsageError(LoraconvError):
    """The call itself is wrong: a missing path, two options that exclude each other (exit 2)."""

    exit_code = 2
    default_slug = "usage"


class FormatError(LoraconvError):
    """The input is readable, but its format is unknown, ambiguous, unsupported or lacks a value (exit 3)."""

    exit_code = 3
    default_slug = "format"


class CorruptCheckpoint(LoraconvError):
    """The input is damaged, truncated, or changed while it was read (exit 4)."""

    exit_code = 4
    default_slug = "corrupt"


class UnsafeCheckpoint(LoraconvError):
    """The input asks for something a checkpoint never needs: code, a bomb, a path outside its folder (exit 4)."""

    exit_code = 4
    default_slug = "unsafe"


class ProofFailed(LoraconvError):
    """The written output does not equal its source; nothing was left behind (exit 5)."""

    exit_code = 5
    default_slug = "proof-failed"


class TrainingStopped(LoraconvError):
    """A training cannot go on: NaN or Inf too often, or nothing to go back to. Its checkpoints are whole (exit 5)."""

    exit_code = 5
    default_slug = "training-stopped"


class WriteFailed(LoraconvError):
    """The output could not be written: space, permission, an existing target (exit 6)."""

    exit_code = 6
    default_slug = "write-failed"

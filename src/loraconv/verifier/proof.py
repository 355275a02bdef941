"""A proof as data: which checks were made on an output, with a figure and a bound for each, and which deliberate
mistakes they catch. It survives a trip through JSON unchanged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the output. ``figure`` and ``bound`` are relative errors where they are not None."""

    level: str
    name: str
    passed: bool
    count: int
    figure: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Control:
    """A deliberate mistake. ``caught`` is None where the mistake changes nothing (a doubled zero)."""

    name: str
    caught: bool | None
    by: str


def caught(controls: Iterable[Control]) -> str:
    """``8/8``: controls caught, of those that change anything."""
    real = [c for c in controls if c.caught is not None]
    return f"{sum(c.caught is True for c in real)}/{len(real)}"


@dataclass(frozen=True, slots=True)
class Proof:
    """The checks and controls of one output (``subject``: adapter or base)."""

    subject: str
    checks: tuple[Check, ...]
    controls: tuple[Control, ...]

    @property
    def passed(self) -> bool:
        """True if every check passed and every control that changes anything was caught, at least one among them."""
        caught = [c.caught for c in self.controls]
        return all(c.passed for c in self.checks) and False not in caught and True in caught

    @property
    def caught(self) -> str:
        """``8/8``: controls caught, of those that change anything."""
        return caught(self.controls)

    @property
    def rounded(self) -> bool:
        """True if a check of stored numbers (L2) found them rounded."""
        return any(c.level == "L2" and c.bound for c in self.checks)

    def failures(self) -> list[str]:
        """Every check that failed and every control that was missed, in words."""
        failed = [f"{c.level} {c.name}: {c.detail}" for c in self.checks if not c.passed]
        return failed + [f"control not caught: {c.name}" for c in self.controls if c.caught is False]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, from which :meth:`from_dict` makes the same proof."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Proof:
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError for anything else."""
        return cls(
            value["subject"],
            tuple(Check(**c) for c in value["checks"]),
            tuple(Control(**c) for c in value["controls"]),
        )

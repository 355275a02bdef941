"""Which modules are mistaken for each other: the projections of one attention, and the same module in another layer."""

from __future__ import annotations

from collections.abc import Iterator

_PROJECTIONS = ("to_q", "to_k", "to_v")


def other_projections(module: str) -> Iterator[str]:
    """The modules that this one may have been swapped with: q, k and v of the same attention."""
    head, _, end = module.rpartition(".")
    if end in _PROJECTIONS:
        yield from (f"{head}.{other}" for other in _PROJECTIONS if other != end)


def in_layer(module: str, step: int) -> str | None:
    """The same module ``step`` layers on; None for a module of no layer."""
    steps = module.split(".")
    at = next((n for n, s in enumerate(steps) if s.isdecimal()), None)
    if at is None:
        return None
    return ".".join([*steps[:at], str(int(steps[at]) + step), *steps[at + 1 :]])

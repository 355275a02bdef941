"""What goes into the question "what would this consumer do with that file?", and what comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

from loraconv.lazy import TensorRef

Scale = Fraction | float


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file as a consumer meets it: its path, its tensors in the order of their bytes, its header, and
    ``adapter_config.json`` if that stands beside it. ``training``: a trainer's checkpoint, with more in it than an
    adapter."""

    path: str
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    training: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What one consumer makes of a file.

    ``why``: it does not load the file; ``error`` is then a part of the message that it raises with. ``unsure``: why the
    table cannot tell. With either, the rest is empty. ``scales``: the scale
    of every module (diffusers name) whose factors it applies. ``undefined``: modules whose layer it makes and never
    fills, so that its output is an error or arbitrary numbers. ``dropped``: keys that change nothing. ``magnitudes``:
    DoRA's are applied. ``needs``: the oldest peft that takes the file, empty if all of its time do. ``note``: a trap.
    """

    consumer: str
    why: str = ""
    error: str = ""
    unsure: str = ""
    scales: Mapping[str, Scale] = field(default_factory=dict)
    undefined: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    magnitudes: bool = False
    needs: str = ""
    note: str = ""


class Refused(Exception):
    """A consumer raises for the file: a part of its own message, and what that means."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.message = message
        self.why = why


class Unsure(Exception):
    """Why the table cannot tell what a consumer does with a file."""


@cache
def template(text: str, underscored: bool = False) -> re.Pattern[str]:
    """The pattern of a module's name, in which ``{i}`` is a number; with every dot an underscore if asked for."""
    spelled = text.replace(".", "_") if underscored else text
    return re.compile(re.escape(spelled).replace(r"\{i\}", r"(\d+)"))

"""What a merge, resize, extract or split did, as data, and the record that is written beside the output."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loraconv import __version__
from loraconv.names import printable
from loraconv.verifier.proof import Proof

Kind = Literal["merged", "resized", "extracted", "split"]


@dataclass(frozen=True, slots=True)
class Input:
    """An input: its path, what it is (a format, ``base`` or ``tuned``), its strength, the SHA-256 of its factors."""

    path: str
    format: str
    strength: float = 1.0
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """A module of the output. ``rank_before`` is that of all inputs together (extract: the most there could be),
    ``norm`` the Frobenius norm of the exact delta (None where nobody had to know it), ``error`` the distance from it
    relative to that, which cutting the rank costs: 0 where the rank was kept."""

    module: str
    rank_before: int
    rank: int
    norm: float | None
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a split adapter: the folder in the output, and its modules."""

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A file of the output: its name relative to the folder, size in bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class ReshapeResult:
    """What was done, or, with ``dry_run``, would be (then ``files`` and ``proofs`` are empty).

    ``other`` are tensors that a full fine-tune changed and no LoRA can hold; they are not in the output.
    """

    kind: Kind
    out: Path
    to: str
    inputs: tuple[Input, ...]
    modules: tuple[ModuleFacts, ...] = ()
    parts: tuple[Part, ...] = ()
    other: tuple[str, ...] = ()
    files: tuple[MadeFile, ...] = ()
    proofs: tuple[Proof, ...] = ()
    notices: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def error(self) -> float:
        """The distance of all deltas together from the exact ones, relative to the norm of these."""
        norms = [m.norm or 0.0 for m in self.modules]
        size = math.hypot(*norms)
        return math.hypot(*(m.error * norm for m, norm in zip(self.modules, norms, strict=True))) / (size or 1.0)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "kind": self.kind,
            "out": str(self.out),
            "to": self.to,
            "dry_run": self.dry_run,
            "inputs": [asdict(one) for one in self.inputs],
            "modules": [asdict(one) for one in self.modules],
            "error": self.error,
            "parts": [{"name": part.name, "modules": list(part.modules)} for part in self.parts],
            "other": list(self.other),
            "files": [asdict(file) for file in self.files],
            "proofs": [proof.to_dict() for proof in self.proofs],
            "notices": list(self.notices),
            "options": dict(self.options),
        }

    def record(self) -> str:
        """``loraconv.json``: all of this except where it ran, so that its bytes are the same again."""
        import numpy

        value = self.to_dict()
        del value["out"], value["dry_run"]
        for one in value["inputs"]:
            one["path"] = printable(Path(os.path.abspath(one["path"])).name)
        value["versions"] = {"loraconv": __version__, "numpy": numpy.__version__}
        return json.dumps(value, indent=1, sort_keys=True) + "\n"

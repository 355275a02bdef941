"""What a fusion did, as data, and the record that is written beside the fused model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraconv import __version__
from loraconv.fusion.adapters import Used
from loraconv.names import printable
from loraconv.scale import Scale
from loraconv.verifier.proof import Proof


@dataclass(frozen=True, slots=True)
class ScaleFacts:
    """A scale and what it is made of: ``scale`` as a fraction (rsLoRA: a decimal number), ``value`` as float64,
    ``told_by`` where alpha was found, ``modules`` how many modules have it."""

    scale: str
    value: float
    alpha: int | float
    rank: int
    rslora: bool
    told_by: str
    modules: int

    @classmethod
    def of(cls, scale: Scale, modules: int) -> ScaleFacts:
        text = str(scale.exact) if scale.exact is not None else repr(scale.value)
        alpha = int(scale.alpha) if scale.alpha.denominator == 1 else float(scale.alpha)
        return cls(text, scale.value, alpha, scale.rank, scale.rslora, scale.source, modules)


@dataclass(frozen=True, slots=True)
class FusedAdapter:
    """An adapter of the fused model. ``digest`` is the SHA-256 of its factors, ``sha256`` that of each of its files
    (None for one that is much more than an adapter)."""

    path: str
    format: str
    strength: float
    scales: tuple[ScaleFacts, ...]
    digest: str
    sha256: tuple[str | None, ...] = ()

    @classmethod
    def of(cls, used: Used, sha256: Sequence[str | None] = ()) -> FusedAdapter:
        scales = tuple(ScaleFacts.of(scale, count) for scale, count in used.scales.items())
        return cls(used.name, used.detected.dialect.name, float(used.strength), scales, used.digest, tuple(sha256))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``scale``, ``alpha``, ``rank`` and ``told_by`` are those of most modules."""
        most = asdict(self.scales[0])
        return {**{key: most[key] for key in ("scale", "alpha", "rank", "told_by")}, **asdict(self)}


@dataclass(frozen=True, slots=True)
class FusedFile:
    """A file of the output: name, size in bytes, SHA-256, and whether it is a link to the base's own.

    Weights have no SHA-256; ``FuseResult.crc32`` has the checksums of their tensors.
    """

    name: str
    bytes: int
    sha256: str | None = None
    linked: bool = False


@dataclass(frozen=True, slots=True)
class FuseResult:
    """What ``fuse`` did, or, with ``dry_run``, would do (then files have no checksums and there is no proof).

    ``fused`` are the names of the tensors that adapters were added to, ``beside`` of those that the run trained whole,
    ``tensors`` the number of all. ``crc32`` are
    checksums of all tensors as they are written, ``base_crc32`` those of the fused ones before. ``kept`` is the share
    of the adapters' change that the rounding to the output's dtype left, None where nothing was proved.
    """

    out: Path
    base: Path
    next: str
    adapters: tuple[FusedAdapter, ...]
    base_files: tuple[FusedFile, ...]
    fused: tuple[str, ...]
    fused_bytes: int
    tensors: int
    files: tuple[FusedFile, ...]
    beside: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    crc32: Mapping[str, str] = field(default_factory=dict)
    base_crc32: Mapping[str, str] = field(default_factory=dict)
    proofs: tuple[Proof, ...] = ()
    kept: float | None = None
    journal: str | None = None
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "kind": "fused",
            "out": str(self.out),
            "dry_run": self.dry_run,
            "base": {
                "path": str(self.base),
                "files": [{"name": f.name, "bytes": f.bytes} for f in self.base_files],
                "crc32": dict(self.base_crc32),
            },
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "fused": list(self.fused),
            "beside": list(self.beside),
            "tensors": self.tensors,
            "files": [asdict(file) for file in self.files],
            "crc32": dict(self.crc32),
            "kept": self.kept,
            "proofs": [proof.to_dict() for proof in self.proofs],
            "notices": list(self.notices),
            "options": dict(self.options),
            "journal": self.journal,
        }

    def record(self) -> str:
        """``loraconv.json``: all of this except where it ran, so that its bytes are the same again."""
        import numpy

        value = self.to_dict()
        del value["out"], value["dry_run"]
        value["base"]["path"] = printable(Path(os.path.abspath(self.base)).name)
        if self.kept is not None:
            value["kept"] = round(self.kept, 6)  # a sum of float64, whose last digits depend on BLAS
        value["versions"] = {"loraconv": __version__, "numpy": numpy.__version__}
        return json.dumps(value, indent=1, sort_keys=True) + "\n"

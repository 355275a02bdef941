"""What every kind of verification has in common: a verdict, and in words why it is not the good one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from loraconv.verifier.diagnosis import Finding


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verdict. ``mode`` says what was compared (``adapters``, ``record``, ``fused``, ``changes``, ``consumers``,
    ``forward``) and with it which further fields there are; ``findings`` is empty where ``same`` is true."""

    mode: ClassVar[str] = ""

    same: bool
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1); a number that is infinite or none is null."""
        return {
            "schema": 1,
            "mode": self.mode,
            "same": self.same,
            "findings": [
                {"slug": f.slug, "sentence": f.sentence, "mend": f.mend, "modules": list(f.modules)}
                for f in self.findings
            ],
            **self.details(),
        }

    def details(self) -> dict[str, Any]:
        """The fields of this mode, JSON-ready."""
        raise NotImplementedError


def number(value: float) -> float | None:
    """JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None

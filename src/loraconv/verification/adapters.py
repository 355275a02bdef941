"""Two adapters, in whatever formats: are they the same delta, module by module, by the formats' own definitions?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loraconv.adapter import natural
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError
from loraconv.names import printable, quoted
from loraconv.scale import given_alpha
from loraconv.source import Source, open_source
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.delta import ModuleResult, compare_adapters
from loraconv.verifier.diagnosis import diagnose
from loraconv.verifier.numbers import Pair
from loraconv.verifier.oracles import pairs_of


@dataclass(frozen=True, slots=True)
class AdaptersResult(VerifyResult):
    """The modules that both adapters have. ``bound`` is the user's own, None where the dtypes gave one a module."""

    mode: ClassVar[str] = "adapters"

    one: str = ""
    other: str = ""
    modules: tuple[ModuleResult, ...] = ()
    bound: float | None = None

    def details(self) -> dict[str, Any]:
        return {
            "one": self.one,
            "other": self.other,
            "bound": self.bound,
            "modules": [
                {
                    "module": m.module,
                    "equal": m.equal,
                    "error": number(m.error),
                    "bound": number(m.bound),
                    "norm": number(m.norm),
                    "same": m.same,
                }
                for m in self.modules
            ],
        }


def verify_adapters(
    one: str | Path, other: str | Path, *, alpha: float | None = None, bound: float | None = None
) -> AdaptersResult:
    """Compare two adapters. Raises :class:`FormatError` where they cannot be compared, and what opening them raises."""
    with open_source(one) as first, open_source(other) as second:
        left, right = adapter_pairs(first, alpha), adapter_pairs(second, None)
        results = compare_adapters(left, right, bound)
        same = set(left) == set(right) and all(r.same for r in results)
        findings = [] if same else diagnose(left, right, results)
        for source in (first, second):
            source.check_unchanged()
        return AdaptersResult(same, tuple(findings), str(one), str(other), tuple(results), bound)


def adapter_pairs(source: Source, alpha: float | None) -> dict[str, Pair]:
    """Module (diffusers name) -> the factors and scale in a source, by its format's own definition, in natural order.

    Raises :class:`FormatError` (``not-comparable``) where it holds no whole adapter.
    """
    detected = detect(source)
    _refuse(source, detected)
    pairs = pairs_of(detected.dialect.name, list(source.ranks), source.metadata, source.config, given_alpha(alpha))
    return dict(sorted(pairs.items(), key=lambda item: natural(item[0])))


def _refuse(source: Source, detected: Detected) -> None:
    if not detected.has_factors or source.incomplete:
        raise FormatError(
            f"{printable(str(source.path))} holds no whole adapter, so it cannot be compared as one",
            why=detected.reason,
            hint=f"loraconv inspect {quoted(source.path)}",
            slug="not-comparable",
        )

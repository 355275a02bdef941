"""Two adapters, in whatever formats: are they the same delta, module by module, by the formats' own definitions?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from loraconv.adapter import natural
from loraconv.algebra import specials_in
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, ProofFailed
from loraconv.names import fold_names, printable, quoted
from loraconv.scale import given_alpha, origins
from loraconv.source import Source, open_source
from loraconv.verification.evidence import Evidence, gather
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.controls import comparison_controls
from loraconv.verifier.delta import ModuleResult, compare_adapters
from loraconv.verifier.diagnosis import Finding, addressed, diagnose
from loraconv.verifier.numbers import Pair
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.proof import Control
from loraconv.verifier.spelled import Keys, Magnitudes, compare_magnitudes, passed_over, sort_keys


@dataclass(frozen=True, slots=True)
class AdaptersResult(VerifyResult):
    """The modules that both adapters have. ``bound`` is the user's own, None where the dtypes gave one a module;
    ``controls`` are the deliberate mistakes that the comparison was tried on, empty where the adapters differ;
    ``magnitudes`` is None unless one of them is a DoRA; ``evidence`` is None unless a report was asked for."""

    mode: ClassVar[str] = "adapters"

    one: str = ""
    other: str = ""
    modules: tuple[ModuleResult, ...] = ()
    bound: float | None = None
    evidence: Evidence | None = None
    controls: tuple[Control, ...] = ()
    magnitudes: Magnitudes | None = None

    def details(self) -> dict[str, Any]:
        evidence = {} if self.evidence is None else {"evidence": self.evidence.to_dict()}
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
            "controls": [asdict(control) for control in self.controls],
            "magnitudes": None if self.magnitudes is None else asdict(self.magnitudes),
            **evidence,
        }


def verify_adapters(
    one: str | Path,
    other: str | Path,
    *,
    alpha: float | None = None,
    bound: float | None = None,
    evidence: bool = False,
) -> AdaptersResult:
    """Compare two adapters, and gather the ``evidence`` that a report shows.

    Raises :class:`FormatError` where they cannot be compared, or where the comparison misses a deliberate mistake
    (``controls``), and what opening them raises.
    """
    with open_source(one) as first, open_source(other) as second:
        sides = _read(first, alpha), _read(second, None)
        left, right = sides[0].pairs, sides[1].pairs
        results = compare_adapters(left, right, bound)
        magnitudes, findings = compare_magnitudes(sides[0].keys.magnitudes, sides[1].keys.magnitudes)
        known = {found.slug for found in sides[0].passed_over()}
        findings += [found for found in sides[1].passed_over() if found.slug not in known]
        if set(left) != set(right) or not all(r.same for r in results):
            findings += diagnose(left, right, results, (sides[0].trained(), sides[1].trained()))
        again = f"loraconv verify {quoted(one)} {quoted(other)}"
        controls = () if findings else _controls(left, right, results, bound, again)
        equal = {r.module for r in results if r.equal}
        gathered = gather((sides[0].plain, sides[1].plain), left, right, equal) if evidence else None
        for source in (first, second):
            source.check_unchanged()
    paths = {"one": quoted(one), "other": quoted(other), "to": sides[1].detected.dialect.name}
    return AdaptersResult(
        not findings,
        addressed(findings, **paths),
        str(one),
        str(other),
        tuple(results),
        bound,
        evidence=gathered,
        controls=controls,
        magnitudes=magnitudes if magnitudes.one or magnitudes.other else None,
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two adapters: ``plain`` is the source with its keys as the format defines them, less magnitudes."""

    plain: Source
    keys: Keys
    detected: Detected
    pairs: dict[str, Pair]

    def passed_over(self) -> list[Finding]:
        has_settings = self.plain.config is not None
        return list(passed_over(self.keys, self.detected.dialect.name, self.detected.prefix, has_settings))

    def trained(self) -> dict[str, Fraction]:
        """Module -> the scale that it was trained with, where an earlier conversion recorded it."""
        known = origins(self.plain).items()
        return {module: origin.alpha / origin.rank for module, origin in known if origin.rank > 0}


def _read(source: Source, alpha: float | None) -> _Side:
    keys = Keys(dict(source.tensors), {}, {}) if _has_names(source) else sort_keys(source.tensors)
    plain = replace(source, ranks=[keys.plain, *source.ranks[1:]])
    return _Side(plain, keys, detect(plain), adapter_pairs(plain, alpha))


def _has_names(source: Source) -> bool:
    """True if an adapter's name in the keys is how the format is written, and no slip."""
    try:
        return ".default." in detect(source).dialect.down
    except FormatError:
        return False


def _controls(
    one: dict[str, Pair], other: dict[str, Pair], results: list[ModuleResult], bound: float | None, again: str
) -> tuple[Control, ...]:
    """The deliberate mistakes, each caught or without effect; raises :class:`FormatError` if one was missed."""
    controls = comparison_controls(one, other, results, bound)
    missed = [control.name for control in controls if control.caught is False]
    if missed:
        raise FormatError(
            "the two adapters cannot be told from wrong ones, so they are not called the same",
            why=f"this comparison would not notice: {', '.join(missed)}; the bound is too loose for these numbers",
            hint=f"{again} --bound 1e-6" if bound is None or bound > 1e-6 else again,
            slug="controls",
        )
    return controls


def adapter_pairs(source: Source, alpha: float | None) -> dict[str, Pair]:
    """Module (diffusers name) -> the factors and scale in a source, by its format's own definition, in natural order.

    Raises :class:`FormatError` (``not-comparable``) where it holds no whole adapter.
    """
    detected = detect(source)
    _refuse(source, detected)
    try:
        pairs = pairs_of(detected.dialect.name, list(source.ranks), source.metadata, source.config, given_alpha(alpha))
    except ProofFailed as error:
        raise _not_comparable(source, error.what) from error
    return dict(sorted(pairs.items(), key=lambda item: natural(item[0])))


def _refuse(source: Source, detected: Detected) -> None:
    if not detected.has_factors or source.incomplete:
        raise _not_comparable(source, detected.reason)
    specials_in(source, detected)  # their shapes
    rest = [*detected.ledger.unknown, *detected.ledger.base] if not detected.dialect.holds_models else []
    if rest:
        raise _not_comparable(source, f"besides plain LoRA factors it holds {'; '.join(fold_names(rest)[:4])}")


def _not_comparable(source: Source, why: str) -> FormatError:
    return FormatError(
        f"{printable(str(source.path))} is not an adapter and nothing else, so it cannot be compared as one",
        why=why,
        hint=f"loraconv inspect {quoted(source.path)}",
        slug="not-comparable",
    )

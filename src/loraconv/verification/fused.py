"""A fused model against its base and adapters: is it exactly their sum, and untouched everywhere else?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from loraconv.errors import UsageError
from loraconv.fusion.adapters import split_strength
from loraconv.model_folder import Model, open_model
from loraconv.names import DTYPE_WORDS, printable
from loraconv.patterns import choose
from loraconv.source import open_source
from loraconv.verification.adapters import adapter_pairs
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused import FusedReport, Term, prove_fused
from loraconv.verifier.proof import Check

#: Notes in diffusers' config.json about where it came from, which the class that is to be built does not read.
_NOTES = {"_diffusers_version", "_name_or_path"}


@dataclass(frozen=True, slots=True)
class Fused:
    """What was compared: paths as given, each adapter with its strength, and what the user asked for, if anything."""

    base: str
    adapters: tuple[tuple[str, Fraction], ...]
    fused: str
    dtype: str | None
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedResult(VerifyResult):
    """The verdict on a fused model, and all that was measured for it."""

    mode: ClassVar[str] = "fused"

    subject: Fused
    report: FusedReport

    def details(self) -> dict[str, Any]:
        subject, report = self.subject, self.report
        return {
            "base": subject.base,
            "adapters": [{"path": path, "strength": str(strength)} for path, strength in subject.adapters],
            "fused": subject.fused,
            "dtype": subject.dtype,
            "bound": subject.bound,
            "kept": _number(report.kept),
            "checks": [asdict(check) | {"figure": _number(check.figure)} for check in report.proof.checks],
            "controls": [asdict(control) for control in report.proof.controls],
            "tensors": list(self._tensors()),
        }

    def _tensors(self) -> Iterator[dict[str, Any]]:
        for tensor in self.report.tensors:
            figures = tensor.figures
            yield {
                "tensor": tensor.name,
                "same": tensor.same,
                "elements": figures.elements,
                "changed": figures.changed,
                "misrounded": figures.misrounded,
                "wrong": figures.wrong,
                "nonfinite": figures.nonfinite,
                "ulps": number(figures.ulps),
                "error": number(figures.error),
                "kept": _number(figures.kept),
            }


def _number(value: float | None) -> float | None:
    return None if value is None else number(value)


def verify_fused(
    base: str | Path,
    paths: Sequence[str | Path],
    *,
    alpha: float | None = None,
    dtype: str | None = None,
    bound: float | None = None,
    modules: Sequence[str] = (),
) -> FusedResult:
    """Prove the last of ``paths``, a fused model, against ``base`` and the adapters before it (``PATH@STRENGTH``).

    ``alpha`` is that of the adapter, where there is one and its files do not say it; ``dtype`` (fp32, fp16, bf16) the
    one that the fused model was asked to have; ``bound`` a relative error of the delta to allow; ``modules`` the
    patterns of those that were fused, none for all. Raises :class:`FormatError` (``not-comparable``) where they cannot
    be compared, and what opening them raises.
    """
    subject = _subject(base, paths, alpha, dtype, bound)
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path)) for path, _ in subject.adapters]
        pairs = [adapter_pairs(source, alpha) for source in sources]
        terms = [Term(found, strength) for found, (_, strength) in zip(pairs, subject.adapters, strict=True)]
        before, after = (stack.enter_context(open_model(path)) for path in (base, paths[-1]))
        only = choose({module: None for found in pairs for module in found}, modules) if modules else None
        report = prove_fused(before.tensors, terms, after.tensors, only=only, dtype=subject.dtype, bound=bound)
        report = _with_config(report, before, after)
        for source in sources:
            source.check_unchanged()
        before.check_unchanged()
        after.check_unchanged()
    proof = report.proof
    same = proof.passed if bound is None else all(check.passed for check in proof.checks)
    return FusedResult(same, report.findings, subject=subject, report=report)


def _subject(
    base: str | Path, paths: Sequence[str | Path], alpha: float | None, dtype: str | None, bound: float | None
) -> Fused:
    hint = "loraconv verify --base BASE ADAPTER[@STRENGTH] FUSED"
    if len(paths) < 2:
        raise UsageError("with --base, an adapter and the fused model are needed", hint=hint)
    if alpha is not None and len(paths) > 2:
        raise UsageError("--alpha belongs to one adapter, and there are several", hint=hint)
    if dtype is not None and dtype not in DTYPE_WORDS:
        raise UsageError(
            f"--dtype is one of {', '.join(DTYPE_WORDS)}, not {printable(dtype)}", hint=f"{hint} --dtype bf16"
        )
    adapters = tuple((str(path), strength) for path, strength in map(split_strength, paths[:-1]))
    word = None if dtype is None else DTYPE_WORDS[dtype]
    return Fused(os.fspath(base), adapters, os.fspath(paths[-1]), word, bound)


def _with_config(report: FusedReport, base: Model, fused: Model) -> FusedReport:
    """The report with a check of ``config.json``, where both models have one."""
    if base.config is None or fused.config is None:
        return report
    one, other = base.config, fused.config
    keys = [key for key in (one | other) if key not in _NOTES and one.get(key) != other.get(key)]
    detail = f"other values of {', '.join(printable(key, 60) for key in keys[:6])}" if keys else ""
    check = Check("L0", "config.json is that of the base", not keys, 1, detail=detail)
    proof = replace(report.proof, checks=(*report.proof.checks, check))
    if not keys:
        return replace(report, proof=proof)
    sentence = f"config.json is not that of the base: {detail}"
    finding = Finding("config", sentence, "copy the base's config.json into the fused model's folder", ())
    return replace(report, proof=proof, findings=(*report.findings, finding))

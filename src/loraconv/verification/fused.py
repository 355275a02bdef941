"""A fused model against its base and adapters: is it exactly their sum, and untouched everywhere else?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from loraconv.errors import UsageError
from loraconv.fusion.adapters import split_strength
from loraconv.fusion.llava import refuse_unfinished, trained_whole
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import read_json
from loraconv.io.torch_read import read_tensors
from loraconv.lazy import TensorRef
from loraconv.model_folder import CONFIG, Model, open_model
from loraconv.names import DTYPE_WORDS, printable
from loraconv.patterns import choose
from loraconv.source import open_source
from loraconv.verification.adapters import adapter_pairs
from loraconv.verification.result import VerifyResult, number
from loraconv.verifier.diagnosis import Finding
from loraconv.verifier.fused import FusedReport, Term, prove_fused
from loraconv.verifier.llava import (
    NOTES,
    as_original,
    is_renamed,
    is_tower,
    main_dtype,
    other_settings,
    tower_beside,
    trained_beside,
)
from loraconv.verifier.proof import Check
from loraconv.verifier.spelled import apart


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
    vision_tower: str | Path | None = None,
) -> FusedResult:
    """Prove the last of ``paths``, a fused model, against ``base`` and the adapters before it (``PATH@STRENGTH``).

    ``alpha`` is that of the adapter, where there is one and its files do not say it; ``dtype`` (fp32, fp16, bf16) the
    one that the fused model was asked to have; ``bound`` a relative error of the delta to allow; ``modules`` the
    patterns of those that were fused, none for all; ``vision_tower`` the CLIP model that a fused
    ``LlavaForConditionalGeneration`` has besides. Raises :class:`FormatError` (``not-comparable``) where they cannot be
    compared, :class:`UsageError` (``tower-missing``), and what opening them raises.
    """
    subject = _subject(base, paths, alpha, dtype, bound)
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(path)) for path, _ in subject.adapters]
        divided = [apart(source.tensors) if len(source.ranks) == 1 else (source.tensors, {}) for source in sources]
        plain = [replace(s, ranks=[own, *s.ranks[1:]]) for s, (own, _) in zip(sources, divided, strict=True)]
        pairs = [adapter_pairs(source, alpha) for source in plain]
        strengths = [strength for _, strength in subject.adapters]
        magnitudes = [found for _, found in divided]
        terms = [Term(*term) for term in zip(pairs, strengths, magnitudes, strict=True)]
        before, after = (stack.enter_context(open_model(path)) for path in (base, paths[-1]))
        beside = _beside([source.path for source in sources], stack)
        tower = _tower(after, {**before.tensors, **beside.tensors}, vision_tower, stack)
        made, rows = after.tensors, None
        if tower is not None:
            parts = {name: ref for name, ref in tower.tensors.items() if name not in before.tensors}
            beside = replace(beside, tensors={**parts, **beside.tensors})
            made, rows = as_original(after.tensors, {**before.tensors, **beside.tensors})
        dtype_of = subject.dtype or (main_dtype(before.tensors) if beside.tensors else None)
        only = choose({module: None for found in pairs for module in found}, modules) if modules else None
        report = prove_fused(before.tensors, terms, made, only=only, dtype=dtype_of, bound=bound, beside=beside.tensors)
        if rows is not None:
            report = replace(report, proof=replace(report.proof, checks=(*report.proof.checks, rows)))
        mend = "copy the base's config.json into the fused model's folder" if tower is None else "fuse it again"
        report = _with_config(report, _other_settings(beside.config or before.config, after, tower), mend)
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


@dataclass(frozen=True, slots=True)
class _Beside:
    """What a LLaVA run among the adapters holds besides: tensors under the base's names, and the model's settings."""

    tensors: dict[str, TensorRef]
    config: dict[str, Any] | None


def _tower(fused: Model, given: Mapping[str, TensorRef], path: str | Path | None, stack: ExitStack) -> _Beside | None:
    """The vision tower of a model of transformers' own LLaVA class, under LLaVA's names; None for other models.

    ``given`` are base and run. Raises :class:`UsageError` where these lack the tower and ``path`` names none.
    """
    if (fused.config or {}).get("model_type") != "llava" or not any(map(is_renamed, fused.tensors)):
        if path is not None:
            raise UsageError("--vision-tower is for a model that was fused --to hf-llava", hint="leave it out")
        return None
    if path is not None:
        tower = stack.enter_context(open_model(path))
        return _Beside(tower_beside(tower.tensors), tower.config)
    if not any(map(is_tower, given)):
        raise UsageError(
            "a LlavaForConditionalGeneration has the vision tower in it, which neither the base nor the run has",
            where=printable(str(fused.path), 1000),
            hint="add --vision-tower TOWER, the CLIP model that it was fused with",
            slug="tower-missing",
        )
    return _Beside({}, None)


def _beside(adapters: Sequence[Path], stack: ExitStack) -> _Beside:
    for path in adapters:
        folder = path if path.is_dir() else path.parent
        name = trained_whole(folder)
        if name is not None:
            refuse_unfinished(folder)
            tensors = trained_beside(read_tensors(stack.enter_context(InputFile(folder / name))))
            return _Beside(tensors, read_json(folder / CONFIG))
    return _Beside({}, None)


def _other_settings(given: dict[str, Any] | None, fused: Model, tower: _Beside | None) -> list[str] | None:
    """The keys of ``config.json`` that are not as they should be; None where one of the models has no settings."""
    if given is None or fused.config is None:
        return None
    if tower is not None:
        return other_settings(fused.config, given, tower.config)
    one, other = given, fused.config
    return [key for key in (one | other) if key not in NOTES and one.get(key) != other.get(key)]


def _with_config(report: FusedReport, keys: Sequence[str] | None, mend: str) -> FusedReport:
    """The report with a check of ``config.json``."""
    if keys is None:
        return report
    detail = f"other values of {', '.join(printable(key, 60) for key in keys[:6])}" if keys else ""
    check = Check("L0", "config.json is that of the base or the run", not keys, 1, detail=detail)
    proof = replace(report.proof, checks=(*report.proof.checks, check))
    if not keys:
        return replace(report, proof=proof)
    sentence = f"config.json is not that of the base: {detail}"
    finding = Finding("config", sentence, mend, ())
    return replace(report, proof=proof, findings=(*report.findings, finding))

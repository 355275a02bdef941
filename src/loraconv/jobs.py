"""The parts of a conversion before anything is written: what the caller asked for, the plan of the adapter and of the
base, the checks of their numbers, and everything that has to be said about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from loraconv.accounting import Aside, aside_notices, with_kept
from loraconv.adapter import Adapter, read_adapter
from loraconv.base import bare_tensors, read_base
from loraconv.detect import Detected
from loraconv.errors import FormatError, UsageError
from loraconv.fold import refuse_ruin
from loraconv.health import check_adapter, check_base, nonfinite_error
from loraconv.model_config import check_positions, infer_config
from loraconv.names import DTYPE_WORDS, fold_names, printable
from loraconv.plan import Plan, ScaleIn, folds, plan_adapter
from loraconv.plan_base import plan_base
from loraconv.registry import dialect
from loraconv.scale import given_alpha
from loraconv.source import Source
from loraconv.verifier.aside import SetAside
from loraconv.verifier.oracles import rank_distances
from loraconv.watch import Watch


@dataclass(frozen=True, slots=True)
class Options:
    alpha: float | None
    dtype: str | None
    scale_in: ScaleIn
    strict: bool
    nearest: bool
    allow_nonfinite: bool

    @property
    def exact_alpha(self) -> Fraction | None:
        return given_alpha(self.alpha)

    @property
    def dtype_name(self) -> str | None:
        if self.dtype is None:
            return None
        if self.dtype not in DTYPE_WORDS:
            raise UsageError(f"unknown dtype: {self.dtype!r}", hint=f"use one of {', '.join(DTYPE_WORDS)}")
        return DTYPE_WORDS[self.dtype]


@dataclass(slots=True)
class Job:
    """One part of a conversion: the plan, the sub-folder it goes to, and what its proof needs.

    ``check`` raises if the source's numbers are not sound, and returns the CRC-32 of every tensor; it reads what its
    watch has not seen.
    """

    plan: Plan
    place: str
    proof: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Watch], dict[str, str]] | None = None


def adapter_job(
    source: Source, detected: Detected, to: str, options: Options, aside: Aside | None = None
) -> tuple[Job, list[str]]:
    """The adapter's part; ``source`` and ``detected`` are without what is ``aside``."""
    aside = aside or Aside()
    alpha = options.exact_alpha
    adapter = read_adapter(source, detected, alpha=alpha, strict=options.strict, nearest=options.nearest)
    notices = _health_notices(source, adapter, options) + left_behind(source, detected) + nearest_notices(source)
    notices += aside_notices(aside)
    target = dialect(to)
    plan = plan_adapter(
        adapter,
        target,
        detected.family,
        alike=detected.alike,
        dtype=options.dtype_name,
        scale_in=options.scale_in,
    )
    proof = {
        "aside": SetAside(aside.dropped, tuple(aside.kept)),
        "alpha": alpha,
        "every_consumer": not target.every_consumer_reads_alpha and folds(adapter.factors, target, options.scale_in),
        "dtype": options.dtype_name,
    }
    return Job(with_kept(plan, aside.kept), "", proof), notices


def _health_notices(source: Source, adapter: Adapter, options: Options) -> list[str]:
    health = check_adapter(adapter)
    notices = []
    if health.nonfinite:
        if not options.allow_nonfinite:
            raise nonfinite_error(health.nonfinite, str(source.path))
        notices.append(
            f"{len(health.nonfinite)} factors hold NaN or Inf: {'; '.join(fold_names(health.nonfinite)[:4])}"
        )
    if len(health.zero_up) == len(adapter.factors):
        notices.append("every up factor (lora_B) is zero: the adapter is untrained and does nothing")
    elif health.zero_up:
        notices.append(f"the up factor is zero, so these do nothing: {'; '.join(fold_names(health.zero_up)[:4])}")
    return notices


def nearest_notices(source: Source) -> list[str]:
    """What has to be said about an adapter that was trained on several model-parallel ranks."""
    if len(source.ranks) == 1:
        return []
    gaps = ", ".join(f"{name} {gap:.2%}" for name, gap in sorted(rank_distances(list(source.ranks)).items()))
    return [
        f"this is the nearest single adapter to {len(source.ranks)} model-parallel ranks, and equals none of them;"
        f" its delta is off from a rank's own by (worst layer): {gaps}"
    ]


def left_behind(source: Source, detected: Detected) -> list[str]:
    """Trained tensors that are no LoRA factor stay behind when the LoRA alone is converted: say so."""
    trained = sorted((source.trained or frozenset()) - set(detected.ledger.factors))
    trained = [name for name in trained if name in source.tensors]
    if not trained:
        return []
    return [
        f"{len(trained)} tensors were trained besides the LoRA and are not in it: {'; '.join(fold_names(trained)[:4])}"
    ]


def base_job(source: Source, detected: Detected, options: Options, limit: int, place: str) -> Job:
    bare = bare_tensors(source, detected)
    inferred = infer_config(detected.family, bare, source.config)
    config = inferred.values
    check_positions(detected.family, bare, config, source.config is not None)
    tensors = read_base(source, detected, config)
    plan = plan_base(tensors, config, dialect("diffusers"), dtype=options.dtype_name, limit=limit)

    def check(watch: Watch) -> dict[str, str]:
        made = {o.name: o.tensor for file in plan.files for o in file.outputs}
        refuse_ruin(made)
        bad, checksums = check_base(made, watch)
        if bad and not options.allow_nonfinite:
            raise nonfinite_error(bad, str(source.path))
        return checksums

    if source.config is None and inferred.assumed:
        plan = replace(plan, notices=(_assumed(source, inferred.assumed, options.strict),))
    return Job(plan, place, {"dtype": options.dtype_name}, check)


def _assumed(source: Source, keys: tuple[str, ...], strict: bool) -> str:
    """The notice that values of ``config.json`` are only the released models'; raises with ``strict``."""
    text = f"no settings file was found, so these are the released models' values: {', '.join(keys)}"
    if strict:
        raise FormatError(
            f"the model's configuration is not known: {text}",
            where=printable(str(source.path)),
            hint="put the run's training_config.yaml into its folder, or leave --strict out",
            slug="config-unknown",
        )
    return text


def unknown_notices(detected: Detected) -> list[str]:
    names = detected.ledger.unknown
    shown = "; ".join(fold_names(names)[:4])
    return [f"{len(names)} tensors are not understood and stay behind: {shown}"] if names else []

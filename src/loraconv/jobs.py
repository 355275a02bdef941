"""The parts of a conversion before anything is written: what the caller asked for, the plan of the adapter and of the
base, the checks of their numbers, and everything that has to be said about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from loraconv.accounting import Aside, aside_notices, with_kept
from loraconv.adapter import Adapter, read_adapter, refuse_rest
from loraconv.algebra import Special, in_words, specials_in
from loraconv.approximating import approximate
from loraconv.base import bare_tensors, read_base
from loraconv.beside import can_be_beside, plan_beside
from loraconv.detect import Detected
from loraconv.errors import FormatError, UsageError
from loraconv.fold import refuse_ruin
from loraconv.health import adapter_tensors, check_copies, check_tensors, check_watched, nonfinite_error, zero_up
from loraconv.model_config import check_positions, infer_config
from loraconv.names import DTYPE_WORDS, fold_names, printable, quoted
from loraconv.notices import left_behind, nearest_notices
from loraconv.plan import Plan, ScaleIn, folds, plan_adapter
from loraconv.plan_base import plan_base
from loraconv.products import read_kernels, refuse_kernels_of_linear_layers
from loraconv.registry import dialect
from loraconv.renaming import plan_dora, plan_renamed
from loraconv.rules import Dialect
from loraconv.scale import given_alpha
from loraconv.source import Source
from loraconv.truncation import Wanted, wanted
from loraconv.verifier.aside import SetAside
from loraconv.verifier.reshaped import Claims
from loraconv.watch import Watch


@dataclass(frozen=True, slots=True)
class Options:
    alpha: float | None
    dtype: str | None
    scale_in: ScaleIn
    strict: bool
    nearest: bool
    allow_nonfinite: bool
    approximate: Literal["svd"] | None = None
    max_error: float | None = None
    rank: int | None = None

    @property
    def wanted(self) -> Wanted | None:
        """How near an approximation shall be; None where none was asked for."""
        hint = "--approximate svd --max-error 1e-3"
        if self.approximate is None:
            if self.max_error is not None or self.rank is not None:
                raise UsageError("--max-error and --rank are for an approximation", hint=hint)
            return None
        if self.approximate != "svd":
            raise UsageError(f"unknown way to approximate: {self.approximate!r}", hint=hint)
        return wanted(self.rank, None, self.max_error, hint)

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


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found out about a source's numbers: the CRC-32 of every tensor of a base, and what has to be said."""

    crc32: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """One part of a conversion: the plan, the sub-folder it goes to, and what its proof needs (``claims``, where the
    factors are an approximation).

    ``check`` raises if the source's numbers are not sound; it reads what its watch has not seen.
    """

    plan: Plan
    place: str
    proof: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Watch], Checked] | None = None
    claims: Claims | None = None
    is_base: bool = False


def adapter_job(
    source: Source, detected: Detected, to: str, options: Options, aside: Aside | None = None
) -> tuple[Job, list[str]]:
    """The adapter's part; ``source`` and ``detected`` are without what is ``aside``."""
    aside = aside or Aside()
    set_aside = SetAside(aside.dropped, tuple(aside.kept))
    check_copies(source.whole, source.tensors)
    specials = specials_in(source, detected)
    if specials or options.wanted is not None:
        job, notices = _special_job(source, detected, specials, dialect(to), options)
        job = replace(job, plan=with_kept(job.plan, aside.kept), proof={**job.proof, "aside": set_aside})
        return job, [*notices, *aside_notices(aside)]
    alpha = options.exact_alpha
    adapter = read_adapter(source, detected, alpha=alpha, strict=options.strict, nearest=options.nearest)
    notices = _zero_notices(adapter) + left_behind(source, detected) + nearest_notices(source)
    notices += aside_notices(aside)
    target = dialect(to)

    def check(watch: Watch) -> Checked:
        bad, _ = check_watched(adapter_tensors(adapter), watch)
        return Checked(notices=_nonfinite_notices(source, bad, options))

    try:
        plan = plan_adapter(
            adapter,
            target,
            detected.family,
            alike=detected.alike,
            dtype=options.dtype_name,
            scale_in=options.scale_in,
        )
    except FormatError:
        check(Watch())  # damage may make numbers that no dtype can hold
        raise
    proof = {
        "aside": set_aside,
        "alpha": alpha,
        "every_consumer": not target.every_consumer_reads_alpha and folds(adapter.factors, target, options.scale_in),
        "dtype": options.dtype_name,
    }
    return Job(with_kept(plan, aside.kept), "", proof, check), notices


def _special_job(
    source: Source, detected: Detected, specials: Sequence[Special], target: Dialect, options: Options
) -> tuple[Job, list[str]]:
    """An adapter that is no plain LoRA: the same tensors, DoRA in another spelling, or the nearest plain LoRA."""
    how, alpha = options.wanted, options.exact_alpha
    if not specials:
        raise UsageError(
            "the adapter is a plain LoRA already, of which nothing has to be approximated",
            hint="without --approximate; for a smaller rank: loraconv resize ADAPTER -o OUT --rank R",
        )
    refuse_rest(source, detected)
    refuse_kernels_of_linear_layers(source, detected, specials)
    notices = _nonfinite_notices(source, check_tensors(t for one in specials for t in one.floats).nonfinite, options)
    kernels = any(one.kernel for one in specials) and not target.convolutions
    if how is not None and kernels:
        raise _cannot_carry(source, specials, target)
    if how is not None:
        dtype = options.dtype_name or "F32"
        made = approximate(specials, detected, how, alpha, dtype)
        plan = plan_adapter(made.adapter, target, detected.family, alike=detected.alike)
        claims = Claims(made.errors, how.error, dtype)
        proof = {"alpha": alpha, "every_consumer": not target.every_consumer_reads_alpha}
        return Job(plan, "", proof, claims=claims), notices
    plain = all(one.what == "LoRA" for one in specials)  # some of them on convolutions
    if options.dtype is not None or (alpha is not None and not (plain or all(one.is_dora for one in specials))):
        raise UsageError(
            f"--dtype and --alpha are for factors, and these keep their bytes: {in_words(specials)}",
            hint="without them, or with --approximate svd --max-error 1e-3",
        )
    renamed = None if alpha is not None else plan_renamed(source, detected, specials, target)
    if renamed is not None:
        return Job(renamed, "", {"alpha": None}), notices
    if plain and not kernels:
        adapter = read_kernels(source, detected, specials, alpha=alpha, strict=options.strict)
        plan = plan_adapter(adapter, target, detected.family, alike=detected.alike, scale_in=options.scale_in)
        folded = not target.every_consumer_reads_alpha and folds(adapter.factors, target, options.scale_in)
        return Job(plan, "", {"alpha": alpha, "every_consumer": folded}), notices
    if alpha is None and can_be_beside(specials, target):
        beside = plan_beside(source, detected, specials, target, strict=options.strict, scale_in=options.scale_in)
        every = not target.every_consumer_reads_alpha and folds(beside.factors, target, options.scale_in)
        return Job(beside, "", {"alpha": None, "every_consumer": every}), notices
    if not all(one.is_dora for one in specials) or "magnitude" not in target.more.values() or target.header:
        raise _cannot_carry(source, specials, target)
    dora = plan_dora(source, detected, specials, target, alpha=alpha, strict=options.strict, scale_in=options.scale_in)
    return Job(dora, "", {"alpha": alpha}), notices


def _cannot_carry(source: Source, specials: Sequence[Special], target: Dialect) -> FormatError:
    only = [one for one in specials if not one.is_dora or one.has_magnitude]
    kernels = any(one.kernel for one in specials) and not target.convolutions
    near = all(one.can_be_approximated for one in specials) and not kernels
    way = f"--to {target.name} --approximate svd --max-error 1e-3" if near else "--to comfyui"
    dora = "the magnitudes of DoRA normalise the sum of weight and delta; its consumers would leave them out"
    pairs = "its files hold pairs of factors for linear layers, or divide the rows of these modules otherwise"
    beside = [one for one in only if one.is_plain]
    if beside and not can_be_beside(beside, target):
        pairs = f"{target.name} has no names for biases of lora_B, nor for norm layers as a whole"
        way = f"--to diffusers; without them: {_without(beside)}"
    if all(one.kind == "norm" for one in only):
        pairs = f"{target.name} has no names for what is added to the weight and bias of a norm layer"
        way += "; without them: --drop '*_norm'" if len(only) < len(specials) else ""
    return FormatError(
        f"{target.name} cannot carry {in_words(only)}",
        where="; ".join(fold_names(one.module for one in only)[:4]),
        why=dora if any(one.has_magnitude for one in only) else pairs,
        hint=f"loraconv convert {quoted(source.path)} -o OUT {way}",
        slug="cannot-carry",
    )


def _without(specials: Sequence[Special]) -> str:
    """The options that leave biases and whole norms behind, as far as these have any."""
    names = [t.name for one in specials for side, t in one.tensors.items() if side in ("bias", "norm")]
    ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in names)
    return " ".join(f"--drop '*.{end}'" for end in ends)


def _zero_notices(adapter: Adapter) -> list[str]:
    zero = zero_up(adapter)
    if len(zero) == len(adapter.factors):
        return ["every up factor (lora_B) is zero: the adapter is untrained and does nothing"]
    return [f"the up factor is zero, so these do nothing: {'; '.join(fold_names(zero)[:4])}"] if zero else []


def _nonfinite_notices(source: Source, names: list[str], options: Options) -> list[str]:
    if not names:
        return []
    if not options.allow_nonfinite:
        raise nonfinite_error(names, str(source.path))
    return [f"{len(names)} factors hold NaN or Inf: {'; '.join(fold_names(names)[:4])}"]


def base_job(source: Source, detected: Detected, options: Options, limit: int, place: str) -> Job:
    bare = bare_tensors(source, detected)
    inferred = infer_config(detected.family, bare, source.config)
    config = inferred.values
    check_positions(detected.family, bare, config, source.config is not None)
    tensors = read_base(source, detected, config)
    plan = plan_base(tensors, config, dialect("diffusers"), dtype=options.dtype_name, limit=limit)

    def check(watch: Watch) -> Checked:
        made = {o.name: o.tensor for file in plan.files for o in file.outputs}
        refuse_ruin(made)
        bad, checksums = check_watched(made, watch)
        if bad and not options.allow_nonfinite:
            raise nonfinite_error(bad, str(source.path))
        return Checked(checksums)

    if source.config is None and inferred.assumed:
        plan = replace(plan, notices=(_assumed(source, inferred.assumed, options.strict),))
    return Job(plan, place, {"dtype": options.dtype_name}, check, is_base=True)


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

"""Convert an adapter or a base model, prove the output, and leave nothing behind if the proof fails.

Every public function here is one command of the same name and options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from loraconv import __version__
from loraconv.adapter import Adapter, read_adapter
from loraconv.base import bare_tensors, read_base
from loraconv.describe import Summary, summarise
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, ProofFailed, UsageError
from loraconv.fold import refuse_ruin
from loraconv.health import check_adapter, check_base, nonfinite_error
from loraconv.io.atomic import OutputFile, OutputFolder, output_folder
from loraconv.io.safetensors_write import write_safetensors
from loraconv.io.target import MANIFEST
from loraconv.io.torch_write import write_torch
from loraconv.lazy import Lazy
from loraconv.model_config import check_positions, infer_config
from loraconv.names import DTYPE_WORDS, fold_names, printable, quoted
from loraconv.plan import Plan, ScaleIn, plan_adapter
from loraconv.plan_base import parse_size, plan_base
from loraconv.registry import dialect
from loraconv.scale import given_alpha
from loraconv.source import Source, open_source
from loraconv.verify.check import prove_written
from loraconv.verify.oracles import rank_distances
from loraconv.verify.proof import Proof

What = Literal["lora", "base", "all"]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of the output: its name relative to the output folder, size in bytes, SHA-256.

    The shards of a base model have no SHA-256, which would take longer than copying them; ``ConvertResult.crc32`` has
    the CRC-32 of each of their tensors.
    """

    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion did, or, with ``dry_run``, would do (then ``files`` and ``proofs`` are empty)."""

    out: Path
    to: str
    source: Summary
    plans: tuple[Plan, ...]
    files: tuple[WrittenFile, ...] = ()
    proofs: tuple[Proof, ...] = ()
    notices: tuple[str, ...] = ()
    crc32: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "out": str(self.out),
            "to": self.to,
            "dry_run": self.dry_run,
            "source": self.source.to_dict(),
            "files": [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in self.files],
            "plan": [tensor for plan in self.plans for tensor in _planned(plan)],
            "crc32": dict(self.crc32),
            "notices": list(self.notices),
            "proofs": [p.to_dict() for p in self.proofs],
        }


@dataclass(slots=True)
class _Job:
    """One part of a conversion: the plan, the sub-folder it goes to, and what its proof needs.

    ``check`` reads the source once more beside the writing, raises if its numbers are not sound, and returns the
    CRC-32 of every tensor.
    """

    plan: Plan
    place: str
    proof: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], dict[str, str]] | None = None


def convert(
    src: str | Path,
    *,
    out: str | Path,
    to: str,
    alpha: float | None = None,
    dtype: str | None = None,
    scale_in: ScaleIn = "auto",
    strict: bool = False,
    nearest: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertResult:
    """Convert the adapter in ``src`` to the format ``to`` (``diffusers``, ``peft`` or ``sat``) in the folder ``out``.

    ``alpha`` overrides what the files say; ``dtype`` is ``fp32``, ``fp16`` or ``bf16`` (None keeps it); ``scale_in``
    says where a diffusers file carries the scale (``fold`` into up, ``metadata`` only, or ``auto``); ``strict`` refuses
    a mere convention for alpha; ``nearest`` accepts a model-parallel adapter; ``allow_nonfinite`` accepts NaN and Inf;
    ``overwrite`` replaces an earlier output of loraconv; ``dry_run`` writes nothing.

    Raises the errors of ``loraconv.errors``; on any of them ``out`` is as it was.
    """
    target = dialect(to)
    options = _Options(alpha, dtype, scale_in, strict, nearest, allow_nonfinite)
    with open_source(src) as source:
        detected = detect(source)
        job, notices = _adapter_job(source, detected, target.name, options)
        return _finish(source, detected, [job], notices, _Request(out, to, options, overwrite, dry_run))


def sat2diffusers(
    src: str | Path,
    *,
    out: str | Path,
    what: What = "lora",
    alpha: float | None = None,
    dtype: str | None = None,
    scale_in: ScaleIn = "auto",
    max_shard_size: str = "10GB",
    strict: bool = False,
    nearest: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ConvertResult:
    """Convert a SAT checkpoint: its LoRA, its base transformer, or both.

    ``what`` is ``lora`` (a file that diffusers loads at the trained strength), ``base`` (a diffusers transformer
    folder, sharded at ``max_shard_size``) or ``all`` (both, the base in ``transformer/``). The other options are those
    of :func:`convert`; ``alpha``, ``scale_in``, ``strict`` and ``nearest`` concern the LoRA only.
    """
    options = _Options(alpha, dtype, scale_in, strict, nearest, allow_nonfinite)
    limit = parse_size(max_shard_size)
    with open_source(src) as source:
        detected = detect(source)
        if not detected.dialect.spelling:
            raise FormatError(
                f"{printable(str(src))} is not a SAT checkpoint: {detected.reason}",
                hint=f"loraconv convert {quoted(src)} -o {quoted(out)} --to diffusers",
                slug="not-sat",
            )
        jobs, notices = [], []
        if what in ("lora", "all"):
            job, said = _adapter_job(source, detected, "diffusers", options)
            jobs.append(job)
            notices += said
        if what in ("base", "all"):
            jobs.append(_base_job(source, detected, options, limit, "transformer/" if what == "all" else ""))
        return _finish(source, detected, jobs, notices, _Request(out, "diffusers", options, overwrite, dry_run))


@dataclass(frozen=True, slots=True)
class _Options:
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


@dataclass(frozen=True, slots=True)
class _Request:
    """Where to write what, and how."""

    out: str | Path
    to: str
    options: _Options
    overwrite: bool
    dry_run: bool


def _adapter_job(source: Source, detected: Detected, to: str, options: _Options) -> tuple[_Job, list[str]]:
    alpha = options.exact_alpha
    adapter = read_adapter(source, detected, alpha=alpha, strict=options.strict, nearest=options.nearest)
    notices = _health_notices(source, adapter, options) + _left_behind(source, detected) + _nearest_notices(source)
    plan = plan_adapter(adapter, dialect(to), detected.family, dtype=options.dtype_name, scale_in=options.scale_in)
    proof = {
        "alpha": alpha,
        "every_consumer": to == "diffusers" and plan.factors[0].scale.source == "folded into up",
        "dtype": options.dtype_name,
    }
    return _Job(plan, "", proof), notices


def _health_notices(source: Source, adapter: Adapter, options: _Options) -> list[str]:
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


def _nearest_notices(source: Source) -> list[str]:
    if len(source.ranks) == 1:
        return []
    gaps = ", ".join(f"{name} {gap:.2%}" for name, gap in sorted(rank_distances(list(source.ranks)).items()))
    return [
        f"this is the nearest single adapter to {len(source.ranks)} model-parallel ranks, and equals none of them;"
        f" its delta is off from a rank's own by (worst layer): {gaps}"
    ]


def _left_behind(source: Source, detected: Detected) -> list[str]:
    """Trained tensors that are no LoRA factor stay behind when the LoRA alone is converted: say so."""
    trained = sorted((source.trained or frozenset()) - set(detected.ledger.factors))
    trained = [name for name in trained if name in source.tensors]
    if not trained:
        return []
    return [
        f"{len(trained)} tensors were trained besides the LoRA and are not in it: {'; '.join(fold_names(trained)[:4])}"
    ]


def _base_job(source: Source, detected: Detected, options: _Options, limit: int, place: str) -> _Job:
    bare = bare_tensors(source, detected)
    inferred = infer_config(detected.family, bare, source.config)
    config = inferred.values
    check_positions(detected.family, bare, config, source.config is not None)
    tensors = read_base(source, detected, config)
    plan = plan_base(tensors, config, dialect("diffusers"), dtype=options.dtype_name, limit=limit)

    def check() -> dict[str, str]:
        made = {o.name: o.tensor for file in plan.files for o in file.outputs}
        refuse_ruin(made)
        bad, checksums = check_base(made)
        if bad and not options.allow_nonfinite:
            raise nonfinite_error(bad, str(source.path))
        return checksums

    if source.config is None and inferred.assumed:
        plan = replace(plan, notices=(_assumed(source, inferred.assumed, options.strict),))
    return _Job(plan, place, {"dtype": options.dtype_name}, check)


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


def _finish(
    source: Source,
    detected: Detected,
    jobs: Sequence[_Job],
    notices: list[str],
    request: _Request,
) -> ConvertResult:
    """Write, prove and commit the jobs; or only report them."""
    summary = summarise(source, detected, alpha=request.options.exact_alpha)
    plans = tuple(job.plan for job in jobs)
    said = tuple(
        dict.fromkeys([*source.notices, *notices, *_unknown(detected), *(n for p in plans for n in p.notices)])
    )
    if request.dry_run:
        for job in jobs:
            if job.check is not None:
                job.check()
        return ConvertResult(Path(request.out), request.to, summary, plans, notices=said, dry_run=True)
    needed = sum(plan.bytes for plan in plans) + (1 << 20)
    # The folder that holds a single input file is no input: a new folder beside that file is fine.
    inputs = [source.path, *(f.path for f in source.files), *([source.config_path] if source.config_path else [])]
    source.check_unchanged()
    with output_folder(request.out, inputs=inputs, needed=needed, overwrite=request.overwrite) as folder:
        with ThreadPoolExecutor(1) as beside:
            healthy = [beside.submit(job.check) for job in jobs if job.check is not None]
            made = {name: file for job in jobs for name, file in _write(folder, job)}
            # The proof runs while threads still compute the checksums.
            proofs = _proofs(source, detected, folder, jobs, healthy)
        crc32 = {name: value for check in healthy for name, value in check.result().items()}
        files = tuple(WrittenFile(name, file.size, file.sha256) for name, file in made.items())
        source.check_unchanged()
        result = ConvertResult(Path(request.out), request.to, summary, plans, files, proofs, said, crc32)
        _write_text(folder, MANIFEST, _manifest(result, request.options))
    return result


def _unknown(detected: Detected) -> list[str]:
    names = detected.ledger.unknown
    shown = "; ".join(fold_names(names)[:4])
    return [f"{len(names)} tensors are not understood and stay behind: {shown}"] if names else []


def _proofs(
    source: Source,
    detected: Detected,
    folder: OutputFolder,
    jobs: Sequence[_Job],
    healthy: list[Future[dict[str, str]]],
) -> tuple[Proof, ...]:
    """The proof of every job; where one fails because the source itself is unsound, that is the error to show."""
    try:
        return tuple(_prove(source, detected, folder, job) for job in jobs)
    except ProofFailed:
        for check in healthy:
            check.result()
        raise


def _write(folder: OutputFolder, job: _Job) -> Iterator[tuple[str, OutputFile]]:
    for planned in job.plan.files:
        with folder.file(job.place + planned.name, hashed=bool(job.plan.factors)) as file:
            tensors: dict[str, Lazy] = {o.name: o.tensor for o in planned.outputs}
            if planned.kind == "torch":
                write_torch(file, tensors, {"iteration": 1, "mp_world_size": 1})
            else:
                write_safetensors(file, tensors.items(), planned.metadata)
        yield job.place + planned.name, file
    for name, text in job.plan.texts.items():
        yield job.place + name, _write_text(folder, job.place + name, text)


def _write_text(folder: OutputFolder, name: str, text: str) -> OutputFile:
    with folder.file(name) as file:
        file.write(text.encode("utf-8"))
    return file


def _prove(source: Source, detected: Detected, folder: OutputFolder, job: _Job) -> Proof:
    proof = prove_written(
        folder.path / job.place,
        kind=job.plan.dialect.name if job.plan.factors else "base",
        files=[f.name for f in job.plan.files],
        source_kind=detected.dialect.name,
        source=source,
        settings_file=job.plan.dialect.sidecar,
        **job.proof,
    )
    failures = proof.failures()
    if job.plan.exact and proof.rounded:
        failures.append("numbers were rounded that the plan calls exact")
    if failures or not proof.passed:
        raise ProofFailed(
            "the written output does not equal its source; nothing was left behind",
            where="; ".join(failures[:4]) or "no control could be made",
            why="a defect in loraconv, a damaged disk, or a dtype that cannot hold these numbers",
            hint=_mend(failures),
        )
    return proof


def _mend(failures: list[str]) -> str:
    if any("positions" in failure for failure in failures):
        return "put the run's own training_config.yaml into its folder: the sample size and interpolation stand there"
    return "without --dtype the numbers are kept as they are; if you passed none, please report this"


def _planned(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "file": file.name,
            "name": o.name,
            "dtype": o.tensor.dtype,
            "shape": list(o.tensor.shape),
            "how": o.how,
            "exact": o.exact,
        }
        for file in plan.files
        for o in file.outputs
    ]


def _manifest(result: ConvertResult, options: _Options) -> str:
    """``loraconv.json``: everything about this conversion except where it ran, so that its bytes are the same again."""
    import numpy

    value = result.to_dict()
    del value["out"], value["dry_run"]
    del value["source"]["next"]
    # The bare name, however the path was spelled: the bytes must not depend on the place.
    value["source"]["path"] = printable(Path(os.path.abspath(value["source"]["path"])).name)
    value["options"] = {
        "alpha": options.alpha,
        "allow_nonfinite": options.allow_nonfinite,
        "dtype": options.dtype,
        "nearest": options.nearest,
        "scale_in": options.scale_in,
        "strict": options.strict,
    }
    value["versions"] = {"loraconv": __version__, "numpy": numpy.__version__}
    return json.dumps(value, indent=1, sort_keys=True) + "\n"

"""Convert an adapter or a base model, prove the output, and leave nothing behind if the proof fails.

Every public function here is one command of the same name and options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from loraconv import __version__
from loraconv.accounting import Aside, leave_behind, refuse_half_pairs, set_apart, without
from loraconv.describe import Summary, summarise
from loraconv.detect import Detected, detect
from loraconv.errors import FormatError, ProofFailed
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.growing import GrowingFile
from loraconv.io.input_file import InputFile
from loraconv.io.output_file import OutputFile
from loraconv.io.safetensors_write import begin_safetensors, write_safetensors, write_tensors
from loraconv.io.target import MANIFEST
from loraconv.io.torch_write import write_torch
from loraconv.jobs import Checked, Job, Options, adapter_job, base_job
from loraconv.lazy import Lazy
from loraconv.names import printable, quoted
from loraconv.notices import unknown_notices
from loraconv.plan import Plan, ScaleIn
from loraconv.plan_base import parse_size
from loraconv.registry import dialect
from loraconv.source import Source, open_source
from loraconv.verifier.check import prove_written
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.proof import Proof
from loraconv.verifier.reshaped import Claims, Term, prove_reshaped
from loraconv.watch import Watch

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
    """What a conversion did, or, with ``dry_run``, would do (then ``files`` and ``proofs`` are empty). ``dropped`` are
    the keys that were left behind on purpose, ``kept`` the unknown ones that were copied."""

    out: Path
    to: str
    source: Summary
    plans: tuple[Plan, ...]
    files: tuple[WrittenFile, ...] = ()
    proofs: tuple[Proof, ...] = ()
    notices: tuple[str, ...] = ()
    crc32: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

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
            "dropped": list(self.dropped),
            "kept": list(self.kept),
            "crc32": dict(self.crc32),
            "notices": list(self.notices),
            "proofs": [p.to_dict() for p in self.proofs],
        }


def convert(
    src: str | Path,
    *,
    out: str | Path,
    to: str,
    family: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
    scale_in: ScaleIn = "auto",
    strict: bool = False,
    nearest: bool = False,
    allow_nonfinite: bool = False,
    drop: Sequence[str] = (),
    keep_unknown: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    approximate: Literal["svd"] | None = None,
    max_error: float | None = None,
    rank: int | None = None,
) -> ConvertResult:
    """Convert the adapter in ``src`` to the format ``to`` (``diffusers``, ``kohya``, ... see :func:`formats`) in the
    folder ``out``.

    ``family`` is the model's (``cogvideox``, ``mochi``), where the adapter's names fit several; ``alpha`` overrides
    what the files say; ``dtype`` is ``fp32``, ``fp16`` or ``bf16`` (None keeps it); ``scale_in`` says where a diffusers
    file carries the scale (``fold`` into up, ``metadata`` only, or ``auto``); ``strict`` refuses a mere convention for
    alpha; ``nearest`` accepts a model-parallel adapter; ``allow_nonfinite`` accepts NaN and Inf; ``overwrite`` replaces
    an earlier output of loraconv; ``dry_run`` writes nothing.

    A key that no rule knows is an error, with two ways past it: ``drop`` are patterns (``lora_te1_*``) of keys to leave
    behind, a pair of factors whole or not at all, and ``keep_unknown`` copies the others byte for byte under their own
    names, where the output is a safetensors file. The record and the proof name both.

    LoHa, LoKr and full differences keep their tensors where ``to`` has names for them. ``approximate`` makes a plain
    LoRA of them, the nearest one of the rank ``rank``, or of the smallest rank whose relative error is at most
    ``max_error`` in every module; the notices say the error, and the proof measures it.

    Raises :class:`UsageError` (no such file, a senseless option, an output inside an input), :class:`FormatError`
    (unknown, ambiguous, unsupported, alpha or rank missing or contradictory), :class:`CorruptCheckpoint` and
    :class:`UnsafeCheckpoint` (damage, NaN, anything executable), :class:`ProofFailed`, and :class:`WriteFailed`. On all
    of them ``out`` is as it was, except a WriteFailed of the slugs ``durability-unknown`` and ``old-remains``: then the
    new output is in place.
    """
    target = dialect(to)
    options = Options(alpha, dtype, scale_in, strict, nearest, allow_nonfinite, approximate, max_error, rank)
    with open_source(src) as source:
        less, dropped = leave_behind(source, drop)
        detected = detect(less, family)
        refuse_half_pairs(detected, dropped)
        aside = Aside(dropped)
        if keep_unknown:
            less, detected, kept = set_apart(less, detected, target)
            aside = Aside(dropped, kept)
        job, notices = adapter_job(less, detected, target.name, options, aside)
        request = _Request(out, to, options, overwrite, dry_run, tuple(drop), keep_unknown, aside)
        return _finish(source, detected, [job], notices, request)


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
    of :func:`convert`; ``alpha``, ``scale_in`` and ``nearest`` concern the LoRA only, and ``strict`` also refuses a
    base whose sample size no settings file tells. Raises what :func:`convert` raises.
    """
    options = Options(alpha, dtype, scale_in, strict, nearest, allow_nonfinite)
    limit = parse_size(max_shard_size)
    with open_source(src) as source:
        detected = detect(source)
        if not detected.dialect.holds_models:
            raise FormatError(
                f"{printable(str(src))} is not a SAT checkpoint: {detected.reason}",
                hint=f"loraconv convert {quoted(src)} -o {quoted(out)} --to diffusers",
                slug="not-sat",
            )
        jobs, notices = [], []
        if what in ("lora", "all"):
            job, said = adapter_job(source, detected, "diffusers", options)
            jobs.append(job)
            notices += said
        if what in ("base", "all"):
            jobs.append(base_job(source, detected, options, limit, "transformer/" if what == "all" else ""))
        return _finish(source, detected, jobs, notices, _Request(out, "diffusers", options, overwrite, dry_run))


@dataclass(frozen=True, slots=True)
class _Request:
    """Where to write what, and how."""

    out: str | Path
    to: str
    options: Options
    overwrite: bool
    dry_run: bool
    drop: tuple[str, ...] = ()
    keep_unknown: bool = False
    aside: Aside = field(default_factory=Aside)


def _finish(
    source: Source,
    detected: Detected,
    jobs: Sequence[Job],
    notices: list[str],
    request: _Request,
) -> ConvertResult:
    """Write, prove and commit the jobs; or only report them."""
    dropped, kept = request.aside.dropped, tuple(request.aside.kept)
    summary = summarise(without(source, (*dropped, *kept)), detected, alpha=request.options.exact_alpha)
    plans = tuple(job.plan for job in jobs)
    said = tuple(
        dict.fromkeys([*source.notices, *notices, *unknown_notices(detected), *(n for p in plans for n in p.notices)])
    )
    if request.dry_run:
        said = tuple(dict.fromkeys([*said, *_checked(jobs, Watch()).notices]))
        planned = ConvertResult(Path(request.out), request.to, summary, plans, notices=said, dry_run=True)
        return replace(planned, dropped=dropped, kept=kept)
    needed = sum(plan.bytes for plan in plans) + (1 << 20)
    # The folder that holds a single input file is no input: a new folder beside that file is fine.
    inputs = [source.path, *(f.path for f in source.files), *([source.config_path] if source.config_path else [])]
    source.check_unchanged()
    with output_folder(request.out, inputs=inputs, needed=needed, overwrite=request.overwrite) as folder:
        watch = Watch()
        with ThreadPoolExecutor(1) as beside:
            work = [_write(folder, job, _Proving(source, detected, folder, beside, watch)) for job in jobs]
            proofs = _proofs([proof for _, proof in work], jobs, watch)
        checked = _checked(jobs, watch)
        made = {name: file for written, _ in work for name, file in written.items()}
        files = tuple(WrittenFile(name, file.size, file.sha256) for name, file in made.items())
        source.check_unchanged()
        said = tuple(dict.fromkeys([*said, *checked.notices]))
        result = ConvertResult(Path(request.out), request.to, summary, plans, files, proofs, said, checked.crc32)
        result = replace(result, dropped=dropped, kept=kept)
        _write_text(folder, MANIFEST, _manifest(result, request))
    return result


def _proofs(proving: Sequence[Callable[[], Proof]], jobs: Sequence[Job], watch: Watch) -> tuple[Proof, ...]:
    """The proof of every job; where one fails because the source itself is unsound, that is the error to show."""
    try:
        return tuple(proof() for proof in proving)
    except ProofFailed:
        _checked(jobs, watch)
        raise


def _checked(jobs: Sequence[Job], watch: Watch) -> Checked:
    """What is found out about the numbers of the source; raises where they are not sound."""
    found = [job.check(watch) for job in jobs if job.check is not None]
    crc32 = {name: crc for one in found for name, crc in one.crc32.items()}
    return Checked(crc32, [notice for one in found for notice in one.notices])


@dataclass(frozen=True, slots=True)
class _Proving:
    """What every proof needs; those of a base run ``beside`` the writing, and note in ``watch`` what they read."""

    source: Source
    detected: Detected
    folder: OutputFolder
    beside: ThreadPoolExecutor
    watch: Watch


Written = tuple[dict[str, OutputFile], Callable[[], Proof]]


def _write(folder: OutputFolder, job: Job, proving: _Proving) -> Written:
    """The files of a job by name, and what waits for its proof or makes it."""
    texts = {job.place + name: _write_text(folder, job.place + name, text) for name, text in job.plan.texts.items()}
    made, proof = _write_adapter(folder, job, proving) if not job.is_base else _write_base(folder, job, proving)
    return {**made, **texts}, proof


def _write_adapter(folder: OutputFolder, job: Job, proving: _Proving) -> Written:
    made = {}
    for planned in job.plan.files:
        with folder.file(job.place + planned.name) as file:
            tensors: dict[str, Lazy] = {o.name: o.tensor for o in planned.outputs}
            if planned.kind == "torch":
                write_torch(file, tensors, {"iteration": 1, "mp_world_size": 1})
            else:
                write_safetensors(file, tensors.items(), planned.metadata)
        made[job.place + planned.name] = file
    return made, lambda: _prove(proving, job)


def _write_base(folder: OutputFolder, job: Job, proving: _Proving) -> Written:
    """The shards of a base. Their headers come first, so that the proof can follow the writer through the bytes."""
    made: dict[str, OutputFile] = {}
    try:
        with ExitStack() as stack:
            for planned in job.plan.files:
                # No SHA-256: see WrittenFile.
                made[planned.name] = file = stack.enter_context(folder.file(job.place + planned.name, hashed=False))
                begin_safetensors(file, [(o.name, o.tensor) for o in planned.outputs], planned.metadata)
            proof = proving.beside.submit(_prove, proving, job, lambda path: GrowingFile(made[path.name]))
            for planned in job.plan.files:
                write_tensors(made[planned.name], [(o.name, o.tensor) for o in planned.outputs])
    except BaseException:
        for file in made.values():
            file.abandon()  # or the proof would wait for its bytes for ever
        raise
    return {job.place + name: file for name, file in made.items()}, proof.result


def _write_text(folder: OutputFolder, name: str, text: str) -> OutputFile:
    with folder.file(name) as file:
        file.write(text.encode("utf-8"))
    return file


def _prove(proving: _Proving, job: Job, opener: Callable[[Path], InputFile] = InputFile) -> Proof:
    source = proving.source
    if job.check is not None:
        source = replace(source, ranks=proving.watch.over(source.ranks))
    if job.claims is not None:
        return _prove_approximated(proving, job, job.claims)
    proof = prove_written(
        proving.folder.path / job.place,
        kind="base" if job.is_base else job.plan.dialect.name,
        files=[f.name for f in job.plan.files],
        source_kind=proving.detected.dialect.name,
        source=source,
        settings_file=job.plan.dialect.sidecar,
        opener=opener,
        **job.proof,
    )
    failures = proof.failures()
    if job.plan.exact and proof.rounded:
        failures.append("numbers were rounded that the plan calls exact")
    return _passed(proof, failures)


def _prove_approximated(proving: _Proving, job: Job, claims: Claims) -> Proof:
    source, alpha, aside = proving.source, job.proof["alpha"], job.proof["aside"]
    ranks = [aside.rest(tensors) for tensors in source.ranks]
    pairs = pairs_of(proving.detected.dialect.name, ranks, source.metadata, source.config, alpha)
    proof = prove_reshaped(
        proving.folder.path / job.place,
        kind=job.plan.dialect.name,
        files=[f.name for f in job.plan.files],
        settings_file=job.plan.dialect.sidecar,
        terms=[Term(pairs, Fraction(1))],
        claims=claims,
        scale_ignored=job.proof["every_consumer"],
        aside=(aside, source.tensors),
    )
    return _passed(proof, proof.failures())


def _passed(proof: Proof, failures: list[str]) -> Proof:
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


def _manifest(result: ConvertResult, request: _Request) -> str:
    """``loraconv.json``: everything about this conversion except where it ran, so that its bytes are the same again."""
    import numpy

    value = result.to_dict()
    del value["out"], value["dry_run"]
    del value["source"]["next"]
    # The bare name, however the path was spelled: the bytes must not depend on the place.
    value["source"]["path"] = printable(Path(os.path.abspath(value["source"]["path"])).name)
    options = request.options
    value["options"] = {
        "alpha": options.alpha,
        "allow_nonfinite": options.allow_nonfinite,
        "approximate": options.approximate,
        "drop": list(request.drop),
        "dtype": options.dtype,
        "keep_unknown": request.keep_unknown,
        "max_error": options.max_error,
        "nearest": options.nearest,
        "rank": options.rank,
        "scale_in": options.scale_in,
        "strict": options.strict,
    }
    value["versions"] = {"loraconv": __version__, "numpy": numpy.__version__}
    return json.dumps(value, indent=1, sort_keys=True) + "\n"

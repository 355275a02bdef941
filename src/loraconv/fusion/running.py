"""The part of a fusion that writes: the shards, the rest of the base, the journal, the proof and the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraconv.fusion.adapters import file_digests
from loraconv.fusion.changes import predicted
from loraconv.fusion.planned import Plan
from loraconv.fusion.rest import refuse_changed
from loraconv.fusion.result import FusedAdapter, FusedFile, FuseResult
from loraconv.fusion.stream import Progress, write_shards
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.input_file import InputFile
from loraconv.io.target import MANIFEST
from loraconv.lazy import TensorRef
from loraconv.model_folder import open_model

if TYPE_CHECKING:
    from loraconv.verifier.fused import FusedReport


def run(plan: Plan, planned: FuseResult, *, overwrite: bool, journal: bool, prove: bool) -> FuseResult:
    """Write and prove what is planned; the output is in place when this returns."""
    model = plan.model
    check = None if plan.replaces is None else partial(refuse_changed, model.folder, plan.replaces)
    room = (model.bytes if journal else 0) // 8 + (1 << 20)
    folder_of = partial(output_folder, inputs=_inputs(plan), needed=plan.bytes + room, replaces=check)
    with folder_of(planned.out, overwrite=overwrite) as folder, ThreadPoolExecutor(1) as beside:
        digests = [beside.submit(file_digests, one) for one in plan.used]
        prover = beside.submit(_prover) if prove else None
        progress = Progress(plan.bytes)
        kept = _keep(folder, plan, progress)
        written = write_shards(folder, plan.place, plan.shards, plan.terms, progress, proved=prove, cached=journal)
        files = [*kept, *(FusedFile(name, file.size) for name, file in written.files.items())]
        files += [_write_text(folder, plan.place + name, text) for name, text in plan.texts.items()]
        result = planned
        with open_model(_output(folder, plan)) as made:
            if prover is not None:
                report = prover.result()(plan, made.tensors)
                written.add((entry for shard in plan.shards for entry in shard.entries), report.crc32)
                result = replace(result, proofs=(report.proof,), kept=report.kept)
            if journal:
                files.append(_write_journal(folder, plan, made.tensors))
        _check_unchanged(plan)
        adapters = tuple(FusedAdapter.of(one, d.result()) for one, d in zip(plan.used, digests, strict=True))
        result = replace(
            result, adapters=adapters, files=tuple(files), crc32=written.crc32, base_crc32=written.base_crc32
        )
        _write_text(folder, MANIFEST, result.record())
    return result


def _prover() -> Callable[[Plan, Mapping[str, TensorRef]], FusedReport]:
    """The proof: a third of all modules, which are imported while the shards are written, or not at all."""
    from loraconv.fusion.proving import prove

    return prove


def _inputs(plan: Plan) -> list[Path]:
    """What the output may not touch. The folder that holds a single input file is no input; a replaced one is none."""
    sources = [one.source for one in plan.used]
    found = [path for s in sources for path in (s.path, *(f.path for f in s.files), s.config_path) if path is not None]
    run, hf = plan.joined.run, plan.joined.hf
    found += [] if run is None else [run.file.path]
    found += [] if hf is None else [hf.tower.folder]
    if plan.replaces is None:
        model = plan.model
        found += [file.path for file in model.files.values()]
        found += [] if model.single else [model.pipeline or model.folder]
    return found


def _check_unchanged(plan: Plan) -> None:
    plan.model.check_unchanged()
    for one in plan.used:
        one.source.check_unchanged()
    plan.joined.check_unchanged()


def _keep(folder: OutputFolder, plan: Plan, progress: Progress) -> list[FusedFile]:
    """Copy or link everything besides the weights."""
    made = []
    with ExitStack() as opened:
        for kept in plan.kept:
            if plan.links(kept):
                folder.link(kept.name, kept.path)
                made.append(FusedFile(kept.name, kept.bytes, linked=True))
                continue
            source = opened.enter_context(InputFile(kept.path))
            with folder.file(kept.name) as file:
                file.copy(source, 0, source.size)
            source.check_unchanged()
            progress.add(file.size)
            made.append(FusedFile(kept.name, file.size, file.sha256))
    return made


def _write_text(folder: OutputFolder, name: str, text: str) -> FusedFile:
    with folder.file(name) as file:
        file.write(text.encode("utf-8"))
    return FusedFile(name, file.size, file.sha256)


def _output(folder: OutputFolder, plan: Plan) -> Path:
    """Where the model is that was written: its folder, or its one file if the base was one."""
    alone = plan.model.single is not None and plan.shards[0].name == plan.model.single
    return folder.path / plan.place / (plan.shards[0].name if alone else "")


def _write_journal(folder: OutputFolder, plan: Plan, made: Mapping[str, TensorRef]) -> FusedFile:
    from loraconv.journal import write_journal

    file = write_journal(folder, plan.model, made, list(plan.terms), lambda name: predicted(plan.terms[name]))
    return FusedFile(file.path.name, file.size, file.sha256)

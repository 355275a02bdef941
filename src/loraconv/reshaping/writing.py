"""The end of every reshaping: write what is planned into a new folder, prove it there, and commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraconv.errors import ProofFailed
from loraconv.fusion.adapters import Used
from loraconv.io.atomic import OutputFolder, output_folder
from loraconv.io.output_file import OutputFile
from loraconv.io.safetensors_write import write_safetensors
from loraconv.io.target import MANIFEST
from loraconv.io.torch_write import write_torch
from loraconv.plan import Plan
from loraconv.reshaping.result import MadeFile, ReshapeResult
from loraconv.verifier.oracles import pairs_of
from loraconv.verifier.proof import Proof
from loraconv.verifier.reshaped import Term


@dataclass(frozen=True, slots=True)
class Planned:
    """An adapter to write, and where in the output: empty, or the name of a folder with a slash."""

    place: str
    plan: Plan


def write(
    result: ReshapeResult,
    planned: Sequence[Planned],
    *,
    inputs: Sequence[Path],
    unchanged: Callable[[], None],
    prove: Callable[[Path], Proof],
    overwrite: bool,
) -> ReshapeResult:
    """Write every adapter of ``planned``; the output is in place when this returns.

    ``prove`` is given the folder, before it is in place; ``unchanged`` raises if an input is not what was opened.
    """
    needed = sum(one.plan.bytes for one in planned) + (1 << 20)
    unchanged()
    with output_folder(result.out, inputs=inputs, needed=needed, overwrite=overwrite) as folder:
        made = {name: file for one in planned for name, file in _write(folder, one).items()}
        proof = prove(folder.path)
        if not proof.passed:
            raise ProofFailed(
                "the written adapter is not what was asked for; nothing was left behind",
                where="; ".join(proof.failures()[:4]) or "no control could be made",
                why="a defect in loraconv, a damaged disk, or a dtype that cannot hold these numbers",
                hint="without --dtype the numbers are kept in float32; if you passed none, please report this",
            )
        unchanged()
        files = tuple(MadeFile(name, file.size, file.sha256) for name, file in made.items())
        result = replace(result, files=files, proofs=(proof,))
        with folder.file(MANIFEST) as file:
            file.write(result.record().encode("utf-8"))
    return result


def _write(folder: OutputFolder, planned: Planned) -> dict[str, OutputFile]:
    made = {}
    for part in planned.plan.files:
        with folder.file(planned.place + part.name) as file:
            if part.kind == "torch":
                write_torch(file, {o.name: o.tensor for o in part.outputs}, {"iteration": 1, "mp_world_size": 1})
            else:
                write_safetensors(file, ((o.name, o.tensor) for o in part.outputs), part.metadata)
        made[planned.place + part.name] = file
    for name, text in planned.plan.texts.items():
        with folder.file(planned.place + name) as file:
            file.write(text.encode("utf-8"))
        made[planned.place + name] = file
    return made


def adapter_paths(used: Sequence[Used]) -> list[Path]:
    """What the output may not touch. The folder that holds a single input file is no input."""
    sources = [one.source for one in used]
    return [path for s in sources for path in (s.path, *(f.path for f in s.files), s.config_path) if path is not None]


def check_unchanged(used: Sequence[Used]) -> None:
    """Raise :class:`CorruptCheckpoint` if a file of an adapter changed since it was opened."""
    for one in used:
        one.source.check_unchanged()


def proven_term(used: Used) -> Term:
    """The adapter as the verifier knows it, by the format's own definition."""
    source = used.source
    pairs = pairs_of(used.detected.dialect.name, list(source.ranks), source.metadata, source.config, used.alpha)
    return Term(pairs, used.strength)

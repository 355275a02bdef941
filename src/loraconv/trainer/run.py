"""One run from its settings to its last checkpoint: everything is made here, and the loop is given it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraconv import __version__
from loraconv.data import open_dataset
from loraconv.data.tensors import InMemory
from loraconv.errors import FormatError, TrainingStopped, UsageError
from loraconv.io.atomic import output_folder
from loraconv.io.safetensors_write import write_safetensors
from loraconv.io.target import MANIFEST
from loraconv.names import fold_names, printable
from loraconv.trainer import checkpoints, loop
from loraconv.trainer.adapters import Trainees, prepare
from loraconv.trainer.checkpoints import RunFolder
from loraconv.trainer.faults import finite
from loraconv.trainer.files import Files, write_text
from loraconv.trainer.layouts import chosen_layouts
from loraconv.trainer.loop import Progress, Row, Session
from loraconv.trainer.loss_scale import initial
from loraconv.trainer.model import Base, load_base
from loraconv.trainer.page import page
from loraconv.trainer.schedule import make_optimizer, warnings
from loraconv.trainer.settings import Settings
from loraconv.trainer.tiny import CONFIGS
from loraconv.trainer.tracking import Log, read_rows
from loraconv.trainer.world import World, joined

Say = Callable[[str, Row], None]


@dataclass(slots=True)
class Outcome:
    """What became of a run."""

    progress: Progress
    parameters: int
    layouts: tuple[str, ...]
    notices: list[str] = field(default_factory=list)
    loss: float | None = None


def perform(settings: Settings, out: Path, *, resume: bool, dry_run: bool, say: Say) -> Outcome:
    """Train; see :func:`loraconv.train`. torch's random state and determinism switch are as before afterwards."""
    run = RunFolder(out)
    if not resume:
        checkpoints.refuse_used(run)
    with joined(settings.model.device) as world, _deterministic(), _memory():
        session = _session(settings, world)
        layouts, notices = chosen_layouts(settings, session.trainees)
        outcome = Outcome(
            session.progress, session.trainees.count, layouts, warnings(session.trainees, settings) + notices
        )
        if not dry_run:
            _train(run, session, outcome, resume, say)
    return outcome


def _session(settings: Settings, world: World) -> Session:
    base = load_base(settings.model, settings.seed, settings.kind)
    _refuse_unsound(base)
    _refuse_stand_ins(base, settings)
    training, held_out = open_dataset(
        settings.data, base.needs(settings.data, settings.model.precision, str(world.device))
    )
    if not len(training):
        hint = "lower held_out in [data], or add samples"
        raise UsageError("there is no sample to train on", hint=hint, slug="no-data")
    if not world.sharded:
        base.transformer.to(world.device)
    trainees = prepare(base.transformer, settings, world)
    optimizer = make_optimizer(trainees, settings.optimizer)
    progress = Progress(scale=initial(settings.model.precision))
    return Session(settings, base, trainees, optimizer, training, held_out, world, progress)


def _train(run: RunFolder, session: Session, outcome: Outcome, resume: bool, say: Say) -> None:
    world, settings = session.world, session.settings
    identity = {"base": session.base.fingerprint, "data": session.training.fingerprint, "processes": world.size}
    record = _record(session)
    if resume:
        outcome.notices += _resume(run, session, identity)
    if world.first:
        run.sweep()
        if resume:
            checkpoints.settle(run, session)
        _write_run(run, session, record)
    world.wait()
    log = Log(run.path, settings, lambda row: say("%s", {**row, "steps": settings.steps})) if world.first else None

    def save() -> None:
        checkpoints.save(run, session, outcome.layouts, identity, record)
        world.wait()

    def restore() -> bool:
        place, _ = _newest(run, world)
        if place is not None:
            checkpoints.load(place, session, identity)
        return place is not None

    session.save, session.restore = save, restore
    session.log = log or (lambda row: None)
    try:
        loop.run(session)
    finally:
        if log is not None:
            log.close()
            _report(run, session, outcome)


def _resume(run: RunFolder, session: Session, identity: dict[str, Any]) -> list[str]:
    place, said = _newest(run, session.world)
    if place is None:
        raise UsageError(
            f"there is no whole checkpoint in {printable(str(run.path))} to go on from",
            why="; ".join(said),
            hint="leave --resume out to begin a new run",
            slug="no-checkpoint",
        )
    checkpoints.load(place, session, identity)
    return said


def _newest(run: RunFolder, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: the first process looks, because it moves damaged ones aside."""
    found: tuple[Path | None, list[str]] = world.first_said(run.newest() if world.first else None)
    return found


def _write_run(run: RunFolder, session: Session, record: dict[str, Any]) -> None:
    """The resolved settings, and for a tiny model the base itself, without which its adapters are worth nothing."""
    with output_folder(run.path / "settings", inputs=[], needed=1 << 20, overwrite=True) as temporary:
        folder = Files(temporary)
        write_text(folder, "settings.json", json.dumps(session.settings.to_dict(), indent=1, sort_keys=True) + "\n")
        write_text(folder, MANIFEST, _manifest(folder, record))
    if session.settings.model.tiny:
        _write_base(run.path / "base", session, record)


def _write_base(place: Path, session: Session, record: dict[str, Any]) -> None:
    """The untrained model as a pipeline folder: the transformer in fp32, as its fingerprint has it, and the
    scheduler."""
    base = load_base(session.settings.model, session.settings.seed, "full")
    tensors = {name: InMemory(t) for name, t in base.transformer.state_dict().items()}
    texts = {
        "model_index.json": {
            "_class_name": "CogVideoXImageToVideoPipeline" if base.image else "CogVideoXPipeline",
            "scheduler": ["diffusers", type(base.scheduler).__name__],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        },
        "transformer/config.json": json.loads(base.transformer.to_json_string()),
        "scheduler/scheduler_config.json": json.loads(base.scheduler.to_json_string()),
    }
    size = sum(t.tensor.numel() * 4 for t in tensors.values()) + (1 << 20)
    with output_folder(place, inputs=[], needed=size, overwrite=True) as temporary:
        folder = Files(temporary)
        with folder.file("transformer/diffusion_pytorch_model.safetensors") as file:
            write_safetensors(file, tensors.items(), {"format": "pt"})
        for name, value in texts.items():
            write_text(folder, name, json.dumps(value, indent=2, sort_keys=True) + "\n")
        write_text(folder, MANIFEST, _manifest(folder, record))


def _report(run: RunFolder, session: Session, outcome: Outcome) -> None:
    """The curves of the whole run, also of one that was stopped."""
    rows = read_rows(run.path, session.progress.step + 1)  # the step that ended the run, if one did
    outcome.loss = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
    text = page(rows, session.settings, outcome.notices)
    with output_folder(run.path / "report", inputs=[], needed=len(text) + (1 << 20), overwrite=True) as temporary:
        folder = Files(temporary)
        write_text(folder, "report.html", text)
        write_text(folder, MANIFEST, _manifest(folder, {}))


def _manifest(folder: Files, record: dict[str, Any]) -> str:
    files = [{"name": name, "bytes": f.size, "sha256": f.sha256} for name, f in folder.made.items()]
    return json.dumps({"schema": 1, "files": files, "training": record}, indent=1, sort_keys=True) + "\n"


def _record(session: Session) -> dict[str, Any]:
    """What every checkpoint and layout says about how it was made; no time, and no path beyond a bare name."""
    settings = session.settings.to_dict()
    settings["data"] = {**settings["data"], "cache": None, "path": Path(settings["data"]["path"] or "").name}
    settings["model"] = {**settings["model"], "path": Path(settings["model"]["path"]).name}
    del settings["log"]
    return {
        "tool": f"loraconv {__version__}",
        "seed": session.settings.seed,
        "base": {"name": session.base.name, "fingerprint": session.base.fingerprint},
        "data": {"fingerprint": session.training.fingerprint},
        "adapter": _adapter_record(session.trainees, session.settings),
        "settings": settings,
    }


def _adapter_record(trainees: Trainees, settings: Settings) -> dict[str, Any] | None:
    if not trainees.modules:
        return None
    lora = settings.lora
    return {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "ranks": {m.module: m.scale.rank for m in trainees.modules if m.scale.rank != lora.rank},
        "alphas": {m.module: float(m.scale.alpha) for m in trainees.modules if m.scale.alpha != lora.alpha},
        "targets": [m.module for m in trainees.modules],
        "rslora": lora.rslora,
        "dora": lora.dora,
    }


def _refuse_stand_ins(base: Base, settings: Settings) -> None:
    """Without VAE and text encoder there are only stand-ins, which mean nothing to a model that was trained with real
    ones."""
    tiny = base.config.text_embed_dim == CONFIGS["2b"]["text_embed_dim"]
    if base.pipeline is None and not tiny and settings.data.kind != "latents":
        raise UsageError(
            f"{base.name} comes without the VAE and the text encoder that have to encode the data",
            hint='path = the whole pipeline folder in [model], or kind = "latents" in [data]',
            slug="no-encoder",
        )


def _refuse_unsound(base: Base) -> None:
    state = base.transformer.state_dict()
    if not finite(state.values()):
        bad = [name for name, t in state.items() if not bool(torch.isfinite(t).all())]
        raise FormatError(
            f"the base model holds NaN or Inf in {len(bad)} tensors",
            where="; ".join(fold_names(bad)[:4]),
            why="in fp16 this may be the conversion: bf16 has the range of fp32",
            hint='precision = "bf16" in [model], or fetch the model again',
            slug="nonfinite",
        )


@contextmanager
def _memory() -> Iterator[None]:
    """Say what helps where the device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            "the memory of the device does not suffice",
            why=printable(str(error)).splitlines()[0],
            hint='gradient_checkpointing = true and precision = "bf16" in [model], size = 1 in [batch], smaller videos',
            slug="out-of-memory",
        ) from None


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same numbers every time on one machine, as far as torch has such kernels; its random state is left alone.

    On a CPU all that is used here is deterministic, and the switch alone would cost a second of imports.
    """
    with torch.random.fork_rng():
        if not torch.cuda.is_available():
            yield
            return
        before, warn = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn)

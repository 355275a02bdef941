"""The checkpoints of a run: one folder each, whole or not there, with the state to go on from and the trained weights
in the layouts of their consumers; the newest and the best have names of their own.

``RUN/checkpoints/step-00000100/`` holds ``state/``, ``sat/``, ``diffusers/``, ``peft/`` and ``loraconv.json``, the
record of all its files, which is written last and deleted first: a folder without it is no checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraconv import __version__
from loraconv.errors import LoraconvError, TrainingStopped, UsageError
from loraconv.io.atomic import output_folder
from loraconv.io.target import MANIFEST
from loraconv.names import printable, quoted
from loraconv.trainer.faults import finite, first_bad
from loraconv.trainer.files import Files, write_text
from loraconv.trainer.layouts import Subject, base_weights, needs_base, write_layouts
from loraconv.trainer.loop import Session
from loraconv.trainer.sharding import collect
from loraconv.trainer.state import read_state, state_tensors, write_state
from loraconv.verification.record import verify_record

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps its checkpoints."""

    path: Path

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, the newest last."""
        with suppress(FileNotFoundError):
            found = [(_NAME.fullmatch(p.name), p) for p in (self.path / "checkpoints").iterdir()]
            return sorted(int(match[1]) for match, p in found if match and (p / MANIFEST).is_file())
        return []

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose every byte is as it was written, and what is wrong with newer ones, which are
        moved aside."""
        said: list[str] = []
        for step in reversed(self.steps()):
            place = self.checkpoint(step)
            try:
                wrong = [f"{f.name}: {f.difference}" for f in verify_record(place).files if f.difference]
            except LoraconvError as error:
                wrong = [error.what]
            if not wrong:
                return place, said
            aside = place.with_name(f"{place.name}.damaged-{secrets.token_hex(4)}")
            place.rename(aside)
            said.append(f"{printable(str(place))} is damaged ({wrong[0]}); it is now {aside.name}")
        return None, said

    def sweep(self) -> None:
        """Remove what a run that was killed left of a checkpoint that it was deleting."""
        with suppress(FileNotFoundError):
            for place in (self.path / "checkpoints").iterdir():
                if _NAME.fullmatch(place.name) and not (place / MANIFEST).is_file():
                    shutil.rmtree(place, ignore_errors=True)


def save(
    run: RunFolder, session: Session, layouts: tuple[str, ...], identity: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write the checkpoint of this step, point to it, and delete the ones that are no longer kept. All processes have
    to call it; the first writes.

    Raises :class:`TrainingStopped` rather than write NaN or Inf, and :class:`WriteFailed`.
    """
    parameters, progress, world = session.trainees.parameters, session.progress, session.world
    if not world.all(finite(t.parameter.data for t in parameters)):
        raise TrainingStopped(
            "the weights hold NaN or Inf, so no checkpoint was written",
            where=first_bad(parameters, lambda t: t.parameter.data),
            hint="loraconv train --resume goes on from the last checkpoint",
        )
    weights = collect(base_weights(session.base) if needs_base(session.settings, layouts) else (), world)
    state = collect(state_tensors(session), world)
    if not world.first:
        return
    place = run.checkpoint(progress.step)
    subject = Subject(session.base, session.trainees, weights, session.settings, progress.step, world.size,
                      {**record, "step": progress.step})  # fmt: skip
    with output_folder(place, inputs=[], needed=_size(session, layouts), overwrite=True) as temporary:
        folder = Files(temporary)
        write_layouts(folder, layouts, subject)
        write_state(folder, session, state, identity)
        write_text(folder, MANIFEST, _manifest(folder, dict(subject.record)))
    settle(run, session)


def settle(run: RunFolder, session: Session) -> None:
    """Point to the last checkpoint, which is this step's, and to the best; delete the ones that are no longer kept. A
    run that was killed before it came to that does it when it goes on."""
    point(run.path / "last", run.checkpoint(session.progress.step))
    if session.progress.best_step is not None:
        point(run.path / "best", run.checkpoint(session.progress.best_step))
    _delete_old(run, session)


def load(place: Path, session: Session, identity: dict[str, Any]) -> None:
    """Put the session back to where it was at a checkpoint."""
    read_state(place, session, identity)


def _size(session: Session, layouts: tuple[str, ...]) -> int:
    """Bytes that a checkpoint takes, at most: weights and two moments, each layout, the base in SAT's."""
    base: int = sum(t.numel() * t.element_size() for t in session.base.transformer.state_dict().values())
    return (3 + len(layouts)) * 4 * session.trainees.count + base * ("sat" in layouts) + (4 << 20)


def _manifest(folder: Files, record: dict[str, Any]) -> str:
    import diffusers
    import peft
    import torch

    files = [{"name": name, "bytes": f.size, "sha256": f.sha256} for name, f in folder.made.items()]
    value = {
        "schema": 1,
        "kind": "training-checkpoint",
        "files": files,
        "training": record,
        "versions": {
            "loraconv": __version__,
            "diffusers": diffusers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
    }
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def point(name: Path, place: Path) -> None:
    """Make ``name`` a link to a checkpoint, in one step."""
    fresh = name.with_name(f".{name.name}.new")
    with suppress(FileNotFoundError):
        os.unlink(fresh)
    os.symlink(os.path.relpath(place, name.parent), fresh)
    os.replace(fresh, name)


def _delete_old(run: RunFolder, session: Session) -> None:
    steps = run.steps()
    kept = {*steps[-session.settings.checkpoints.keep :], session.progress.best_step}
    for step in steps:
        if step not in kept:
            place = run.checkpoint(step)
            os.unlink(place / MANIFEST)
            shutil.rmtree(place, ignore_errors=True)


def refuse_used(run: RunFolder) -> None:
    """Raise :class:`UsageError` if there is a run in the folder already, or if it is none."""
    if run.path.exists() and not run.path.is_dir():
        raise UsageError(
            f"{printable(str(run.path))} is not a folder", hint=f"ls -ld {quoted(run.path)}", slug="not-a-folder"
        )
    if run.steps():
        raise UsageError(
            f"there is a run in {printable(str(run.path))} already",
            why=f"its last checkpoint is of step {run.steps()[-1]}",
            hint=f"loraconv train --resume -o {quoted(run.path)} goes on with it; or choose another folder with -o",
            slug="output-exists",
        )

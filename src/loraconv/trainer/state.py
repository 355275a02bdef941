"""The full state of a run: trained weights, optimizer moments, progress; safetensors and JSON, never a pickle.

There is nothing else to save: the learning rate, the order of the data and every random number follow from the step and
the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loraconv.data.tensors import InMemory, load_tensors
from loraconv.errors import CorruptCheckpoint, UsageError
from loraconv.io.safetensors_write import write_safetensors
from loraconv.io.sidecar import read_json
from loraconv.names import printable
from loraconv.trainer.files import Files, write_text
from loraconv.trainer.loop import Progress, Session
from loraconv.trainer.loss_scale import LossScale
from loraconv.trainer.sharding import as_shared

TENSORS, VALUES = "state/state.safetensors", "state/state.json"
Tensors = Mapping[str, torch.Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")
#: What may differ when a run goes on: how long it takes and what it leaves behind, not what a step computes.
_FREE = {("steps",), ("checkpoints",), ("log",), ("model", "device"), ("data", "cache")}


def state_tensors(session: Session) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained weight and its two moments, if it has them; where the model is sharded, shares of them."""
    for trained in session.trainees.parameters:
        yield f"weight/{trained.name}", trained.parameter
        moments = session.optimizer.state.get(trained.parameter, {})
        for moment in _MOMENTS if moments else ():
            yield f"{moment}/{trained.name}", moments[moment]


def write_state(folder: Files, session: Session, tensors: Tensors, identity: dict[str, Any]) -> None:
    """Write both files: ``tensors`` are :func:`state_tensors`, whole; ``identity`` is what must be the same when the
    run goes on."""
    moments = {t.name: session.optimizer.state.get(t.parameter, {}) for t in session.trainees.parameters}
    steps = {name: float(known["step"]) for name, known in moments.items() if known}
    value = {
        "schema": 1,
        "progress": asdict(session.progress),
        "optimizer_steps": steps,
        "identity": identity,
        "settings": session.settings.to_dict(),
    }
    with folder.file(TENSORS) as file:
        write_safetensors(file, ((name, InMemory(tensor)) for name, tensor in tensors.items()), {"format": "pt"})
    write_text(folder, VALUES, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_state(folder: Path, session: Session, identity: dict[str, Any]) -> None:
    """Put the state in ``folder`` into the session, in place.

    Raises :class:`UsageError` where it belongs to another run, :class:`CorruptCheckpoint` where it is damaged.
    """
    value = read_json(folder / VALUES)
    tensors = load_tensors(folder / TENSORS)
    try:
        _refuse_another_run(folder, value, session, identity)
        with torch.no_grad():
            for trained in session.trainees.parameters:
                _restore(session, trained.name, trained.parameter, tensors, value["optimizer_steps"])
        told = value["progress"]
        restored = Progress(**{**told, "scale": LossScale(**told["scale"])})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CorruptCheckpoint(
            f"{printable(str(folder))} is not the state of a run",
            why=f"{type(error).__name__}: {printable(str(error))}",
            hint="remove that checkpoint and resume from the one before it",
            slug="state",
        ) from None
    for name in Progress.__slots__:
        setattr(session.progress, name, getattr(restored, name))


def _restore(
    session: Session,
    name: str,
    parameter: torch.nn.Parameter,
    tensors: dict[str, torch.Tensor],
    steps: dict[str, float],
) -> None:
    parameter.copy_(as_shared(tensors[f"weight/{name}"], parameter))
    session.optimizer.state.pop(parameter, None)
    if name in steps:
        moments = {m: as_shared(tensors[f"{m}/{name}"], parameter) for m in _MOMENTS}
        session.optimizer.state[parameter] = {"step": torch.tensor(float(steps[name])), **moments}


def _refuse_another_run(folder: Path, value: dict[str, Any], session: Session, identity: dict[str, Any]) -> None:
    """Another base, other data or other settings would make the rest of the run something that no settings describe."""
    now = session.settings.to_dict()
    changed = [key for key in identity if value["identity"].get(key) != identity[key]]
    changed += [".".join(path) for path in _differences(value["settings"], now, ()) if not _free(path)]
    if changed:
        raise UsageError(
            f"the run in {printable(str(folder.parent.parent))} was trained with something else",
            where=", ".join(changed[:6]),
            why="its steps so far would not be those of the run you ask for",
            hint="take the settings it was begun with, or begin a new run in another folder with -o",
            slug="resume-differs",
        )


def _differences(one: Any, other: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [d for key in sorted({*one, *other}) for d in _differences(one.get(key), other.get(key), (*path, key))]
    return [] if one == other else [path]


def _free(path: tuple[str, ...]) -> bool:
    return any(path[: len(free)] == free for free in _FREE)

"""Train a LoRA, or the whole transformer, of a CogVideoX model, and leave checkpoints that are whole and say how they
were made.

The parts are in ``loraconv.trainer``, which loads torch; this module does so only when a run begins.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraconv.errors import UsageError
from loraconv.trainer.configuration import read_settings
from loraconv.trainer.settings import Settings, tiny_settings

if TYPE_CHECKING:
    from loraconv.trainer.run import Outcome

#: Every row of metrics is logged here, with the row as its only argument.
LOGGER = logging.getLogger("loraconv.training")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run did, or, with ``dry_run``, would do (then nothing was written and the losses are None).

    ``best`` and ``last`` are checkpoint folders; ``held_out`` is the least held-out loss, ``loss`` the last training
    loss; ``faults`` are the steps that ended without an update because of NaN or Inf.
    """

    out: Path
    settings: dict[str, Any]
    parameters: int
    layouts: tuple[str, ...]
    steps: int = 0
    loss: float | None = None
    held_out: float | None = None
    best: Path | None = None
    last: Path | None = None
    faults: tuple[int, ...] = ()
    notices: tuple[str, ...] = ()
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict (schema 1)."""
        return {
            "schema": 1,
            "out": str(self.out),
            "settings": self.settings,
            "parameters": self.parameters,
            "layouts": list(self.layouts),
            "steps": self.steps,
            "loss": self.loss,
            "held_out": self.held_out,
            "best": None if self.best is None else str(self.best),
            "last": None if self.last is None else str(self.last),
            "faults": list(self.faults),
            "notices": list(self.notices),
            "dry_run": self.dry_run,
        }


def train(
    *,
    out: str | Path,
    config: str | Path | None = None,
    tiny: str | None = None,
    steps: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> TrainResult:
    """Train as the TOML file ``config`` says and write into the folder ``out``.

    ``tiny`` trains a small random model (``2b``, ``5b``, ``5b-i2v``, ``1.5`` or ``1.5-i2v``) instead of the file's, or,
    without a file, with settings that suit it. ``steps`` overrides the file's. ``resume`` goes on from the last whole
    checkpoint in ``out``, bit for bit as if it had never stopped. ``dry_run`` says what would be trained and writes
    nothing.

    Raises :class:`UsageError` (settings, no such model, a run is there already), :class:`FormatError` (data or model of
    another kind), :class:`TrainingStopped` (NaN or Inf that nothing can be done about) and :class:`WriteFailed`.
    """
    settings = _settings(config, tiny, steps)
    from loraconv.trainer.run import perform

    outcome = perform(settings, Path(out), resume=resume, dry_run=dry_run, say=LOGGER.info)
    return _result(settings, Path(out), outcome, dry_run)


def _settings(config: str | Path | None, tiny: str | None, steps: int | None) -> Settings:
    if config is None and tiny is None:
        raise UsageError(
            "a run needs settings, or a tiny model",
            hint="loraconv train --config run.toml -o RUN; or loraconv train --tiny 2b -o RUN",
            slug="no-model",
        )
    if config is None:
        settings = tiny_settings(tiny or "")
    else:
        settings = read_settings(config)
        if tiny is not None:
            settings = replace(settings, model=replace(settings.model, path="", tiny=tiny))
    return settings if steps is None else replace(settings, steps=steps)


def _result(settings: Settings, out: Path, outcome: Outcome, dry_run: bool) -> TrainResult:
    progress = outcome.progress
    links = {name: out / name if (out / name).exists() else None for name in ("best", "last")}
    return TrainResult(
        out=out,
        settings=settings.to_dict(),
        parameters=outcome.parameters,
        layouts=outcome.layouts,
        steps=progress.step,
        loss=outcome.loss,
        held_out=progress.best,
        best=links["best"],
        last=links["last"],
        faults=tuple(step + 1 for step in progress.faulty),
        notices=tuple(outcome.notices),
        dry_run=dry_run,
    )

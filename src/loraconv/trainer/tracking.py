"""Where metrics go: always ``metrics.jsonl``, a line a row; TensorBoard, trackio or wandb beside it.

The file only grows. A run that goes on after a stop writes some steps again, so the last row of a step counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from loraconv.errors import UsageError
from loraconv.io.atomic import append_line
from loraconv.io.input_file import InputFile
from loraconv.io.sidecar import read_text
from loraconv.trainer.loop import Row
from loraconv.trainer.settings import LogSettings, Settings

METRICS = "metrics.jsonl"
_LARGEST = 1 << 30


class Tracker(Protocol):
    """Something that takes the numbers of a row."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Log:
    """The metrics of a run in ``folder``. ``say`` gets every row too."""

    def __init__(self, folder: Path, settings: Settings, say: Callable[[Row], None] | None) -> None:
        self._file, self._say = folder / METRICS, say
        if _unfinished(self._file):
            append_line(self._file, "")
        self._tracker = open_tracker(settings.log, folder, settings.to_dict())

    def __call__(self, row: Row) -> None:
        append_line(self._file, json.dumps(row))
        if self._tracker is not None:
            self._tracker.log(numbers_of(row), row["step"])
        if self._say is not None:
            self._say(row)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()


def _unfinished(file: Path) -> bool:
    """True if a run was killed in the middle of its last line."""
    if not file.is_file():
        return False
    with InputFile(file) as opened:
        return opened.size > 0 and opened.pread(opened.size - 1, 1) != b"\n"


def read_rows(folder: Path, last: int) -> list[Row]:
    """The rows of steps 1 to ``last``, each as it was written last; a line that a killed run left unfinished is
    none."""
    path = folder / METRICS
    rows: dict[tuple[int, bool], Row] = {}
    if path.is_file():
        for line in read_text(path, _LARGEST).splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= last:
                    rows[row["step"], "fault" in row] = row
            except (ValueError, KeyError, TypeError):
                continue
    return [rows[key] for key in sorted(rows)]


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of a row under flat names: ``delta_ratio/transformer_blocks.0``."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        inside: Iterable[tuple[str, Any]] = value.items() if isinstance(value, dict) else [("", value)]
        for name, number in inside:
            if isinstance(number, int | float) and not isinstance(number, bool) and key != "step":
                flat[f"{key}/{name}".rstrip("/")] = float(number)
    return flat


def open_tracker(settings: LogSettings, folder: Path, config: dict[str, Any]) -> Tracker | None:
    """The tracker that was asked for; TensorBoard without being asked, where it is installed.

    Raises :class:`UsageError` for one that is not.
    """
    name = settings.tracker or ("tensorboard" if find_spec("tensorboard") else "")
    if not name:
        return None
    if not find_spec(name):
        raise UsageError(f"{name} is not installed", hint=f"pip install {name}", slug="not-installed")
    if name == "tensorboard":
        return _TensorBoard(folder / "tensorboard")
    return _Hosted(name, settings.project, folder, config)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """trackio and wandb have the same three functions. They print what belongs to no result, so not on stdout."""

    def __init__(self, name: str, project: str, folder: Path, config: dict[str, Any]) -> None:
        from importlib import import_module

        self._module = import_module(name)
        more = {"dir": str(folder)} if name == "wandb" else {}  # wandb's own place is the working directory
        with redirect_stdout(sys.stderr):
            self._module.init(project=project, config=config, **more)

    def log(self, numbers: dict[str, float], step: int) -> None:
        with redirect_stdout(sys.stderr):
            self._module.log(numbers, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._module.finish()

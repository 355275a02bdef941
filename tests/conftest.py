"""Fixtures for every test file: no test may change a recorded checkpoint, and each is converted once a session."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loraconv
from loraconv.io.input_file import InputFile
from loraconv.io.safetensors_read import read_safetensors

if TYPE_CHECKING:
    from tests.support import Recorded

FIXTURES = Path(__file__).parent.parent / "fixtures"


def file_states(root: Path) -> dict[str, tuple[str, int, int]]:
    """SHA-256, mode and modification time of every file below ``root``."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            status = path.stat()
            found[str(path)] = (hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mode, status.st_mtime_ns)
    return found


@pytest.fixture(scope="session", autouse=True)
def recorded_checkpoints_stay_as_they_are() -> Iterator[None]:
    """SHA-256, mode and modification time of every recorded file are the same after the session."""
    before = file_states(FIXTURES)
    assert before
    yield
    assert file_states(FIXTURES) == before


Converted = Callable[..., Path]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """``converted(recorded, **options)``: the output folder of ``sat2diffusers``, made once for the same options."""
    known: dict[object, Path] = {}

    def convert(recorded: Recorded, **options: object) -> Path:
        key = (recorded, *sorted(options.items()))
        if key not in known:
            out = tmp_path_factory.mktemp("converted") / "out"
            loraconv.sat2diffusers(recorded.run, out=out, **options)  # type: ignore[arg-type]
            known[key] = out
        return known[key]

    return convert


@pytest.fixture
def read(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A function that writes arrays into a file and reads it."""
    files: list[InputFile] = []

    def tensors(arrays: dict[str, Any]) -> Any:
        path = tmp_path / f"{len(files)}.safetensors"
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
        files.append(InputFile(path))
        return read_safetensors(files[-1]).tensors

    yield tensors
    for file in files:
        file.close()

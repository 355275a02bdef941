"""Fixtures for every test file: no test may change a recorded checkpoint, and each is converted once a session."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import loraconv

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

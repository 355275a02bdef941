"""Fixtures of the command-line tests, named as a plugin by the files that use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraconv.cli import run
from tests.cli_support import Cli, Done, Refusals, kept_handler


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run one command line in this process."""

    def call(*words: str | Path) -> Done:
        capfd.readouterr()
        with kept_handler():
            code = run([str(word) for word in words])
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return call


@pytest.fixture
def refusals(cli: Cli, tmp_path: Path) -> Refusals:
    return Refusals(cli, tmp_path)

"""What the command-line tests share: running a command in this process or in its own, and what a refusal must be."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import cli_driver
from tests.cli_driver import argv
from tests.sat_run import RunSpec, build

#: As small as a run can be without losing a kind of content: 24 KB of tensors, base, VAE, T5, RNG state.
TINY = RunSpec(
    num_layers=1,
    hidden=16,
    heads=2,
    rank=2,
    lora_alpha=4.0,
    channels=4,
    time_embed_dim=8,
    text_hidden=8,
    text_length=4,
    max_sequence_length=8,
    latent_width=4,
    latent_height=4,
    num_frames=5,
    vae_channels=1,
    t5=(16, 8, 8, 1, 2),
    rng=False,
)
CODES = {2, 3, 4, 6}


@dataclass(frozen=True)
class Done:
    """One command that has ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@contextmanager
def kept_handler() -> Iterator[None]:
    """The CLI takes signals for itself; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(
    words: Sequence[str | Path], *, env: Mapping[str, str] | None = None, code: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run one command line in a process of its own; ``code`` is Python that replaces ``-m loraconv``."""
    program = ["-c", code] if code else ["-m", "loraconv"]
    command = [sys.executable, *program, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, **options}
    return subprocess.run(command, env={**os.environ, **(env or {})}, text=True, check=False, **pipes)


def driven(job: str, *words: str, **options: Any) -> dict[str, Any]:
    """What a job of ``cli_driver`` reports."""
    command = [sys.executable, "-m", cli_driver.__name__, job, *words]
    root = Path(cli_driver.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == 0, f"died with {done.returncode}: {done.stderr[-2000:]}"
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def tiny_run(folder: Path, **changes: Any) -> Path:
    """A fresh tiny run below ``folder``, named ``run``."""
    values = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    return build(RunSpec(**{**values, "experiment": "run", **changes}), folder)


def rank_file(run_folder: Path) -> Path:
    return run_folder / "2" / "mp_rank_00_model_states.pt"


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Kind, mode, size, time and the digest of every file below ``folder`` (large ones by their first megabytes)."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        digest = b""
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            with path.open("rb") as file:
                digest = hashlib.sha256(file.read(8 << 20)).digest()
        found[str(path.relative_to(folder))] = (info.st_mode, info.st_size, info.st_mtime_ns, digest)
    return found


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an output."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def harmless(text: str) -> bool:
    """No control byte that could drive a terminal: newline and tab are the only ones."""
    return not [c for c in text if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in "\u202e\u2066\u200b"]


def assert_clear_error(done: Done, codes: set[int] = CODES) -> None:
    """One error with a reason or a hint, a documented code, and nothing else."""
    assert done.code in codes, done
    assert "Traceback" not in done.err
    assert "defect in loraconv" not in done.err
    assert done.out == ""
    assert harmless(done.err), ascii(done.err)
    assert len(done.err) < 9000
    if done.err.startswith("Usage: "):
        assert "\nError: " in done.err
        return
    lines = done.err.splitlines()
    assert lines[0].startswith("error: "), done.err
    assert len(lines[0]) > len("error: ")
    assert all(line.startswith(("  where: ", "  why: ", "  hint: ")) for line in lines[1:]), done.err
    assert any(line.startswith(("  why: ", "  hint: ")) for line in lines[1:]), done.err


class Refusals:
    """Runs commands on hostile inputs in ``inputs``, outputs to ``outputs``: nothing may change in either."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self.cli = cli
        self.inputs, self.outputs = folder / "in", folder / "out"
        for place in (self.inputs, self.outputs):
            place.mkdir(exist_ok=True)

    def file(self, data: bytes, name: str = "case.pt") -> Path:
        path = self.inputs / name
        path.write_bytes(data)
        return path

    def __call__(self, command: str, src: Path | str, codes: set[int] = CODES, more: Sequence[str] = ()) -> Done:
        """The command is refused with one of ``codes``."""
        done = self.either(command, src, codes, more)
        assert done.code in codes, done
        return done

    def either(self, command: str, src: Path | str, codes: set[int] = CODES, more: Sequence[str] = ()) -> Done:
        """The command is refused with one of ``codes``, or succeeds; its output is then removed."""
        before = snapshot(self.inputs)
        done = self.cli(*argv(command, src, self.outputs / "result", *more))
        assert snapshot(self.inputs) == before, "the input was changed"
        assert harmless(done.out), ascii(done.out)
        left = os.listdir(self.outputs)
        if done.code == 0:
            assert left == ([] if command == "inspect" else ["result"])
            assert "Traceback" not in done.err
            assert harmless(done.err), ascii(done.err)
            return done
        assert_clear_error(done, codes)
        assert left == [], f"left behind: {left}"
        return done


def parsed_hint(line: str) -> None:
    """Parse a command line as the CLI would, without running it; raises what click raises."""
    import shlex

    from loraconv.cli.commands import root

    words = shlex.split(line)
    assert words[0] == "loraconv"
    context = root.make_context("loraconv", words[1:])
    name, command, rest = root.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    command.make_context(name, rest, parent=context)


def error_json(err: str) -> dict[str, Any]:
    """The last line of ``err``, which is the error as JSON."""
    value = json.loads(err.strip().splitlines()[-1])
    assert value["message_type"] == "exit_error"
    return dict(value)

"""Several processes train what one trains: the same files, the same result but for the order of a sum."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraconv.trainer.world import World, joined
from tests.train_support import contents, rows

ROOT = Path(__file__).parent.parent
CONFIG = """
steps = 4
[model]
tiny = "{variant}"
device = "cpu"
[lora]
rank = 4
alpha = 2
[optimizer]
rate = 1e-3
[schedule]
warmup = 0
[data]
count = 12
[batch]
size = 1
accumulate = {accumulate}
[validation]
every = 2
samples = 2
timesteps = 2
[checkpoints]
every = 2
[log]
every = 1
"""


def launch(out: Path, variant: str, processes: int, *more: str) -> None:
    """``loraconv train`` in so many processes, with the environment that accelerate and torchrun give them."""
    config = out.with_suffix(".toml")
    config.write_text(CONFIG.format(variant=variant, accumulate=4 // processes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [sys.executable, "-m", "loraconv", "train", "--config", str(config), "-o", str(out), *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, env=environment, text=True, **pipes))
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, said
    assert [bool(text) for text, _ in said] == [True] + [False] * (processes - 1)  # the first alone reports


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["2b", "1.5-i2v"])
def test_two_processes_train_what_one_trains(tmp_path: Path, variant: str) -> None:
    launch(tmp_path / "one", variant, 1)
    launch(tmp_path / "two", variant, 2)
    one, two = (contents(tmp_path / name / "checkpoints") for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    for left, right in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # float32 sums of four gradients in another order, through at most four steps of Adam.
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-4)
        assert left.keys() == right.keys()
        if "held_out_loss" in left:
            assert left["held_out_loss"] == pytest.approx(right["held_out_loss"], rel=1e-5)
    files = [load_file(tmp_path / name / "last/peft/adapter_model.safetensors") for name in ("one", "two")]
    for name, tensor in files[0].items():
        # Adam divides a gradient by its own size, so one at the level of rounding may turn: a rate a step at most.
        assert float((tensor - files[1][name]).abs().max()) <= 2 * 4 * 1e-3
        assert float((tensor - files[1][name]).norm()) < 1e-3 * float(tensor.norm()), name


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    import shutil

    launch(tmp_path / "whole", "2b", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000004")
    launch(tmp_path / "part", "2b", 2, "--resume")
    one, other = (contents(tmp_path / name / "checkpoints/step-00000004") for name in ("whole", "part"))
    assert one == other


def test_one_process_alone_has_nothing_to_agree_on() -> None:
    world = World()
    tensor = torch.ones(3)
    world.average([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert (world.sum(2.5), world.first_said("x"), world.first_said(None), world.first) == (2.5, "x", None, True)


def test_without_a_launcher_this_process_is_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert not torch.distributed.is_initialized()

"""Several processes train what one trains: the same files with the same numbers, with DDP and with FSDP.

Two batches are added up alike by one process after another and by two at once (a sum of two has one order, and a half
is exact), so there the results are equal to the bit. Of more, the order differs: that is held against its bound.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraconv.errors import UsageError
from loraconv.trainer import loop
from loraconv.trainer.settings import BatchSettings
from loraconv.trainer.world import World, joined
from tests.cli_support import launch
from tests.train_support import contents, rows, session, short

pytest_plugins = ["tests.train_fixtures"]

CONFIG = """
steps = 4
kind = "{kind}"
[model]
tiny = "{variant}"
device = "cpu"
[optimizer]
rate = 1e-3
clip = 1e9
[schedule]
warmup = 0
[data]
count = 12
[batch]
accumulate = {accumulate}
[validation]
every = 2
samples = 1
timesteps = 3
[checkpoints]
every = 1
keep = 9
[log]
every = 1
"""
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def accelerate(launcher: str, script: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of ``accelerate launch``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plain = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    words = [sys.executable, "-m", "accelerate.commands.launch", launcher, "--num_processes=2", *plain, *script]
    env = {**os.environ, **QUIET, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train(out: Path, kind: str, variant: str, launcher: str = "", *, resume: bool = False) -> None:
    """``loraconv train`` under ``accelerate launch`` in two processes, without a launcher in one."""
    config = out.with_suffix(".toml")
    config.write_text(CONFIG.format(kind=kind, variant=variant, accumulate=1 if launcher else 2))
    words = ["train", "--config", str(config), "-o", str(out), *["--resume"] * resume]
    done = accelerate(launcher, ["-m", "loraconv", *words], out.parent) if launcher else launch(words, env=QUIET)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report ") == 1, "the first process alone reports"


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Every number of every safetensors file of the checkpoints."""
    files = sorted((out / "checkpoints").rglob("*.safetensors"))
    return {f"{f.relative_to(out)} {n}": t for f in files for n, t in load_file(f).items()}


def same_files(one: Path, other: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    assert sorted(contents(one / "checkpoints")) == sorted(contents(other / "checkpoints"))
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    return left, right


def equal_runs(one: Path, other: Path, numbers: int) -> None:
    """The same files, tensors and losses to the bit; norms of so many numbers as two orders of addition allow."""
    left, right = same_files(one, other)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == b["loss"]
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=numbers * 2.0**-24)
        assert a.get("held_out_loss", 0) == pytest.approx(b.get("held_out_loss", 0), rel=3 * 2.0**-52)


def test_two_processes_with_fsdp_train_a_lora_as_one_does_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path / "one", "lora", "1.5-i2v")
    train(tmp_path / "two", "lora", "1.5-i2v", "--use_fsdp")
    equal_runs(tmp_path / "one", tmp_path / "two", 49152)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), [("full", "5b-i2v"), ("lora", "2b")])
def test_two_processes_with_ddp_train_what_one_trains_bit_for_bit(tmp_path: Path, kind: str, variant: str) -> None:
    train(tmp_path / "one", kind, variant)
    train(tmp_path / "two", kind, variant, "--multi_gpu")
    equal_runs(tmp_path / "one", tmp_path / "two", 200_000)


@pytest.mark.slow
def test_two_processes_with_fsdp_fine_tune_all_weights_as_one_does(tmp_path: Path) -> None:
    """The gradients are equal. The optimizer goes through shares of a tensor, and a vector kernel rounds the numbers at
    the ends of an array, which it takes one by one, not always as those within."""
    train(tmp_path / "one", "full", "5b")
    train(tmp_path / "two", "full", "5b", "--use_fsdp")
    left, right = same_files(tmp_path / "one", tmp_path / "two")
    first = [name for name in left if "step-00000001/state" in name and " weight/" in name]
    assert len(first) > 60
    for name in first:
        # Decay and addition round at the size of the weight; the moments, the root, the quotient and eps, ten times at
        # most, at that of the update, which Adam's first step makes the rate. Either run may round its own way.
        allowed = 2 * 2.0**-24 * (2 * left[name].double().abs() + 10 * 1e-3)
        assert bool(((left[name].double() - right[name].double()).abs() <= allowed).all()), name
    losses = [[row["loss"] for row in rows(tmp_path / place)] for place in ("one", "two")]
    assert losses[0][0] == losses[1][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "launchers"), [("lora", ("--multi_gpu", "--use_fsdp")), ("full", ("--use_fsdp",) * 2)]
)
def test_a_run_on_two_processes_goes_on_bit_for_bit(tmp_path: Path, kind: str, launchers: tuple[str, str]) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(whole, kind, "2b", launchers[0])
    shutil.copytree(whole, part, symlinks=True)
    for step in (3, 4):
        shutil.rmtree(part / f"checkpoints/step-0000000{step}")
    train(part, kind, "2b", launchers[1], resume=True)
    one, other = (contents(place / "checkpoints/step-00000004") for place in (whole, part))
    assert one == other


@pytest.mark.slow
def test_a_bad_sample_ends_a_step_on_every_process_of_a_sharded_run(tmp_path: Path) -> None:
    """The one that has it must not leave the other waiting in a forward pass that needs both."""
    config, script = tmp_path / "run.toml", tmp_path / "spoiled.py"
    config.write_text(CONFIG.format(kind="lora", variant="2b", accumulate=1))
    script.write_text("from tests.test_train_world import spoiled_main; spoiled_main()")
    words = [str(script), "train", "--config", str(config), "-o", str(tmp_path / "bad")]
    accelerate("--use_fsdp", words, tmp_path)
    faults = [row for row in rows(tmp_path / "bad") if "fault" in row]
    assert [row["fault"] for row in faults] == ["data"]
    assert "clip-2" in faults[0]["where"]


def spoiled_main() -> None:
    """``loraconv`` with NaN in one sample."""
    from loraconv.cli import main
    from loraconv.trainer import run
    from tests.test_train_loop import spoiled
    from tests.train_support import opener

    run.open_dataset = opener(8, spoiled(float("nan")))  # every sample once in a run
    sys.exit(main())


def test_the_gradients_of_four_batches_on_two_processes_differ_by_the_order_of_a_sum() -> None:
    def gradients(world: World, accumulate: int) -> list[torch.Tensor]:
        made = session(replace(short(), batch=BatchSettings(accumulate=accumulate)))
        with torch.no_grad():
            for m in made.trainees.modules:
                m.up.fill_(0.01)
        loop._accumulate(replace(made, world=world), 0)
        return [t.parameter.grad for t in made.trainees.parameters]

    alone = gradients(World(), 4)
    pair = [gradients(World(rank, 2), 2) for rank in (0, 1)]
    single = [gradients(World(rank, 4), 1) for rank in range(4)]
    for index, whole in enumerate(alone):
        both = (pair[0][index] + pair[1][index]) / 2
        size = sum(s[index].double().abs() for s in single) / 4
        # Three additions in float32 on either side, each with half a unit in the last place.
        assert bool(((whole.double() - both.double()).abs() <= 6.01 * 2.0**-24 * size).all())
        exact = sum(s[index].double() for s in single) / 4
        assert bool(((whole.double() - exact).abs() <= 3.01 * 2.0**-24 * size).all())


def test_one_process_alone_has_nothing_to_agree_on() -> None:
    world = World()
    tensor = torch.ones(3)
    world.average([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert (world.sum(2.5), world.first_said("x"), world.first_said(None), world.first) == (2.5, "x", None, True)
    assert (world.all(True), world.all(False)) == (True, False)


def test_without_a_launcher_this_process_is_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as world:
        assert (world.rank, world.size, world.device.type, world.sharded) == (0, 1, "cpu", False)
    assert not torch.distributed.is_initialized()


def test_deepspeed_is_refused_rather_than_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv.trainer import world

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed") as error:
        world._sharded()
    assert "--use_fsdp" in error.value.hint


def test_with_fsdp_every_process_reads_the_text_encoder_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraconv.trainer import world

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert world._sharded()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"

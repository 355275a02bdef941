"""Really trained adapters all the way: the shipped set is what it claims to be, and training, converting, verifying and
fusing hold for every variant."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from loraconv.data import Dataset, DataSettings, open_dataset
from loraconv.trainer.batches import held_out_batch
from loraconv.trainer.configuration import read_settings
from loraconv.trainer.model import load_base
from tests.cli_support import Cli
from tests.forward import rotary_tables
from tests.support import FIXTURES
from tests.test_train_loss import alphas
from tests.train_support import VARIANTS

pytest_plugins = ["tests.cli_fixtures", "tests.train_fixtures"]

SET = FIXTURES / "trained"
FEW_STEPS = """
steps = 6
[lora]
rank = 2
alpha = 4
[optimizer]
rate = 2e-2
[schedule]
warmup = 0
[data]
count = 6
[validation]
every = 0
[checkpoints]
every = 6
"""


def prove(cli: Cli, trained: Path, out: Path) -> None:
    """sat2diffusers, verify, fuse, verify the fused weights, verify --forward; then the other two layouts."""
    file, base, fused = out / "c/pytorch_lora_weights.safetensors", out / "c/transformer", out / "fused"
    for words in (
        ("sat2diffusers", trained / "sat", "-o", out / "c", "--what", "all"),
        ("verify", trained / "sat", file),
        ("fuse", file, "--base", base, "-o", fused),
        ("verify", "--base", base, file, fused),
        ("verify", "--forward", "--model", base, file, fused),
        ("verify", trained / "sat", trained / "diffusers"),
        ("verify", trained / "sat", trained / "peft"),
    ):
        done = cli(*words)
        assert done.code == 0, f"{words[0]}: {done.out} {done.err}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_trained_is_converted_verified_fused_and_run(cli: Cli, tmp_path: Path, variant: str) -> None:
    (tmp_path / "run.toml").write_text(FEW_STEPS)
    done = cli("train", "--config", tmp_path / "run.toml", "--tiny", variant, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    prove(cli, tmp_path / "run/last", tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shipped_set_is_converted_verified_fused_and_run(cli: Cli, tmp_path: Path, variant: str) -> None:
    prove(cli, SET / variant, tmp_path)


# --- it learned -------------------------------------------------------------------------------------------------------


def losses(model: Any, data: Dataset, shift: float, parts: int = 5) -> list[float]:
    """The mean squared error of the velocity for every sample, from its definition, at fixed noise and timesteps."""
    found = []
    for index in range(len(data)):
        total = 0.0
        for part in range(parts):
            batch = held_out_batch(data, index, part, parts, 0, 1000)
            alpha = alphas(shift)[batch.timesteps].view(-1, 1, 1, 1, 1)
            clean, noise = batch.latents.double(), batch.noise.double()
            noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).float()
            inputs = noisy if batch.image is None else torch.cat([noisy, batch.image], dim=2)
            with torch.no_grad():
                velocity = model(
                    hidden_states=inputs,
                    encoder_hidden_states=batch.prompt,
                    timestep=batch.timesteps,
                    ofs=None if model.config.ofs_embed_dim is None else torch.full((1,), 2.0),
                    image_rotary_emb=rotary_tables(model, noisy),
                    return_dict=False,
                )[0]
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            total += float((velocity.double() - target).square().mean()) / parts
        found.append(total)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shipped_set_learned(cli: Cli, tmp_path: Path, variant: str) -> None:
    place = SET / variant
    assert cli("sat2diffusers", place / "sat", "-o", tmp_path / "c", "--what", "base").code == 0
    model: Any = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "c").eval()
    settings, shift = read_settings(place / "run.toml"), 3.0 if variant == "2b" else 1.0
    needs = load_base(settings.model, settings.seed, "lora").needs(settings.data, "fp32", "cpu")
    held_out = open_dataset(settings.data, needs)[1]
    fresh = open_dataset(DataSettings(count=16, seed=1, held_out=0.0), needs)[0]
    before = losses(model, fresh, shift, 2), losses(model, held_out, shift)
    model.load_lora_adapter(load_file(place / "diffusers/pytorch_lora_weights.safetensors"), prefix="transformer")
    after = losses(model, fresh, shift, 2), losses(model, held_out, shift)
    # Each of 16 scenes that were never seen: by chance one time in 65 536.
    assert all(now < then for now, then in zip(after[0], before[0], strict=True))
    rates = json.loads((place / "rates.json").read_text())
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    curve = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    # The trainer's own float32 loss divides by 1 - alpha, 0.03 and more at these timesteps; the sums are of thousands.
    assert rates["held_out_loss"]["0.0"] == pytest.approx(sum(before[1]) / len(before[1]), rel=1e-4)
    assert min(curve) == pytest.approx(sum(after[1]) / len(after[1]), rel=1e-4)
    assert curve[-1] < curve[0] < rates["held_out_loss"]["0.0"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rate_of_the_shipped_set_is_the_best_that_is_not_warned_of(variant: str) -> None:
    rates = json.loads((SET / variant / "rates.json").read_text())
    allowed = {float(r): loss for r, loss in rates["held_out_loss"].items() if float(r) not in rates["warned_of"]}
    assert rates["chosen"] == min(allowed, key=allowed.__getitem__)
    assert tomllib.loads((SET / variant / "run.toml").read_text())["optimizer"]["rate"] == rates["chosen"]


def test_the_shipped_set_is_small() -> None:
    assert sum(path.stat().st_size for path in SET.rglob("*") if path.is_file()) < 5_000_000

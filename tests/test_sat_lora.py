"""Runs of SAT's older lora mixin: the checkpoint of a newer run with other keys, as ``lora.py`` names them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import FormatError
from tests.sat_run import build
from tests.support import LORA_FILE, small

LETTERS = {"query_key_value": "QKV", "dense": "O"}
HERE = {"Q": "to_q", "K": "to_k", "V": "to_v", "O": "to_out.0"}


def older(name: str, mixin: str) -> str:
    """A key of ``lora2.py`` as ``lora.py`` has it: factors in the mixin, the frozen weight under its plain name."""
    found = re.fullmatch(r"(.*)transformer\.layers\.(\d+)\.attention\.(\w+)\.matrix_([AB])\.(\d)", name)
    if found is None:
        return name.replace(".original.", ".")
    return f"{found[1]}mixins.{mixin}.lora_linear.{found[2]}.{LETTERS[found[3]][int(found[5])]}_{found[4]}"


@pytest.fixture(params=["lora", "my_adapter"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = build(small(rank=4, lora_alpha=2), tmp_path / "run")
    (file,) = made.glob("*/mp_rank_00_model_states.pt")
    root = torch.load(file, weights_only=False)
    root["module"] = {older(name, request.param): tensor for name, tensor in root["module"].items()}
    root.pop("param_shapes", None)
    torch.save(root, file)
    return made


def factors(run: Path) -> dict[tuple[str, str, str], torch.Tensor]:
    (file,) = run.glob("*/mp_rank_00_model_states.pt")
    state = torch.load(file, weights_only=False)["module"]
    found = {re.search(r"lora_linear\.(\d+)\.(\w)_([AB])$", name): tensor for name, tensor in state.items()}
    return {(m[1], m[2], m[3]): tensor for m, tensor in found.items() if m}


def test_every_projection_is_converted_at_lora_alpha_over_r(run: Path, tmp_path: Path) -> None:
    assert loraconv.inspect(run).dialect == "sat-lora"
    loraconv.convert(run, out=tmp_path / "out", to="diffusers", scale_in="fold")
    made, was = load_file(tmp_path / "out" / LORA_FILE), factors(run)
    assert len(made) == len(was) > 0
    for (layer, letter, side), tensor in was.items():
        name = f"transformer.transformer_blocks.{layer}.attn1.{HERE[letter]}.lora_{side}.weight"
        want = tensor if side == "A" else tensor * 2 / 4
        assert torch.equal(made[name], want), name


def test_the_newer_mixin_holds_the_same(run: Path, tmp_path: Path) -> None:
    loraconv.convert(run, out=tmp_path / "sat", to="sat")
    assert loraconv.inspect(tmp_path / "sat").dialect == "sat"
    assert loraconv.verify(run, tmp_path / "sat").same


def test_the_base_beside_it_is_the_newer_run_s_base(tmp_path: Path, run: Path) -> None:
    newer = build(small(rank=4, lora_alpha=2), tmp_path / "newer")
    for source, out in ((run, "one"), (newer, "two")):
        loraconv.sat2diffusers(source, out=tmp_path / out, what="base")
    one, two = (load_file(tmp_path / out / "diffusion_pytorch_model.safetensors") for out in ("one", "two"))
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_it_is_not_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.convert(run, out=tmp_path / "out", to="sat-lora")
    assert caught.value.slug == "read-only"

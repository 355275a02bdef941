"""Every dialect into every other, for every model, against deltas computed from the formats' definitions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

import loraconv
from loraconv.errors import FormatError
from tests.dialect_files import FORMATS, MODELS, READ_ONLY, deltas, has, write

WRITABLE = [name for name in FORMATS if name not in READ_ONLY]
HELD = [(model, name) for model in MODELS for name in FORMATS if has(FORMATS[name], model)]
PAIRS = [(model, a, b) for (model, a), b in product(HELD, WRITABLE) if (model, b) in HELD]
#: Three models stand for the rest in the default run: one without names of its own, one with everything fused, and a
#: pipeline of several components.
SHORT = ("cogvideox", "flux", "sdxl")


def same_deltas(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Equal within float64: every scale here is a power of two, which no dtype rounds."""
    assert sorted(got) == sorted(want)
    for module, delta in want.items():
        torch.testing.assert_close(got[module], delta, rtol=1e-12, atol=1e-12, msg=module)


def marked(model: str, source: str, target: str) -> object:
    marks = () if model in SHORT else (pytest.mark.slow,)
    return pytest.param(model, source, target, marks=marks, id=f"{model}-{source}-{target}")


@pytest.mark.parametrize(("model", "source", "target"), [marked(*pair) for pair in PAIRS])
def test_a_delta_is_the_same_in_every_dialect(model: str, source: str, target: str, tmp_path: Path) -> None:
    want = write(FORMATS[source], model, tmp_path / "in")
    result = loraconv.convert(tmp_path / "in", out=tmp_path / "out", to=target, family=model)
    same_deltas(deltas(FORMATS[target], model, tmp_path / "out"), want)
    assert [proof.passed for proof in result.proofs] == [True]
    assert len(result.proofs[0].controls) == 8


def sat_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """What a SAT run folder adds to each projection, by ``lora2.py``: ``lora_alpha / r * matrix_B @ matrix_A``."""
    state = torch.load(folder / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    lora = yaml.safe_load((folder / "training_config.yaml").read_text())
    for step in ("model", "network_config", "params", "modules", "lora_config", "params"):
        lora = lora[step]
    made = {}
    for name, down in state.items():
        if ".matrix_A." in name:
            up = state[name.replace(".matrix_A.", ".matrix_B.")]
            _, _, _, _, layer, _, kind, _, part = name.split(".")
            here = ("to_q", "to_k", "to_v")[int(part)] if kind == "query_key_value" else "to_out.0"
            delta = lora["lora_alpha"] / lora["r"] * (up.double() @ down.double())
            made[f"transformer_blocks.{layer}.attn1.{here}"] = delta
    return made


@pytest.mark.parametrize("source", [name for model, name in HELD if model == "cogvideox"])
def test_sat_holds_what_any_dialect_held(source: str, tmp_path: Path) -> None:
    want = write(FORMATS[source], "cogvideox", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="sat")
    same_deltas(sat_deltas(tmp_path / "out"), want)


@pytest.mark.parametrize("target", WRITABLE)
def test_any_dialect_holds_what_sat_held(target: str, tmp_path: Path) -> None:
    write(FORMATS["kohya"], "cogvideox", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "sat", to="sat")
    loraconv.convert(tmp_path / "sat", out=tmp_path / "out", to=target)
    same_deltas(deltas(FORMATS[target], "cogvideox", tmp_path / "out"), sat_deltas(tmp_path / "sat"))


@pytest.mark.parametrize(("model", "name"), HELD)
def test_each_dialect_is_told_from_every_other(name: str, model: str, tmp_path: Path) -> None:
    write(FORMATS[name], model, tmp_path / "in")
    summary = loraconv.inspect(tmp_path / "in")
    assert summary.dialect == name
    assert not summary.problem


@pytest.mark.parametrize("model", [model for model in MODELS if model != "sdxl"])
def test_peft_reads_the_model_s_own_names(model: str, tmp_path: Path) -> None:
    form = replace(FORMATS["peft"], original=True)
    want = write(form, model, tmp_path / "in")
    assert loraconv.inspect(tmp_path / "in").dialect == "peft"
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers", family=model)
    same_deltas(deltas(FORMATS["diffusers"], model, tmp_path / "out"), want)


@pytest.mark.parametrize("target", sorted(READ_ONLY))
def test_a_dialect_that_is_only_read_is_not_written(target: str, tmp_path: Path) -> None:
    write(FORMATS["kohya"], "cogvideox", tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to=target, family="cogvideox")
    assert caught.value.slug == "read-only"
    assert "use --to " in caught.value.why or "with --to diffusers" in caught.value.why

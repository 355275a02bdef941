"""``split``: the parts have the bytes of the whole, each module once, and join again to the very same adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import FormatError, LoraconvError, ProofFailed, UsageError
from tests.cli_support import Cli, snapshot
from tests.reshape_support import MODULES, drawn, write
from tests.sat_run import build
from tests.support import LORA_FILE, header, same_bits, small

pytest_plugins = ["tests.cli_fixtures"]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.st", drawn(1, dtype=torch.bfloat16), alpha=3)


def parts(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.parent.name: load_file(file) for file in out.glob(f"*/{LORA_FILE}")}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"by": "layers"}, ["layers-0", "layers-1"]),
        ({"layers": ["1", "0"]}, ["layers-0", "layers-1"]),
        ({"layers": ["0-0", "1-41"]}, ["layers-0", "layers-1-41"]),
        ({"by": "module"}, ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "ff.net.0.proj"]),
    ],
    ids=str,
)
def test_the_parts_together_are_the_adapter_byte_for_byte(
    lora: Path, tmp_path: Path, options: dict[str, Any], names: list[str]
) -> None:
    result = loraconv.split(lora, out=tmp_path / "out", **options)
    made = parts(tmp_path / "out")
    assert sorted(made) == sorted(part.name for part in result.parts) == names
    assert sum(map(len, made.values())) == 2 * len(MODULES)
    same_bits({name: tensor for part in made.values() for name, tensor in part.items()}, load_file(lora))


def test_each_part_has_the_layers_that_its_name_says_and_the_scale_of_the_whole(lora: Path, tmp_path: Path) -> None:
    loraconv.split(lora, out=tmp_path / "out")
    for name, tensors in parts(tmp_path / "out").items():
        assert {tensor.split(".")[2] for tensor in tensors} == {name.removeprefix("layers-")}
        told = json.loads(header(tmp_path / "out" / name / LORA_FILE)["lora_adapter_metadata"])
        assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 3)


def test_merging_the_parts_gives_the_adapter_again(lora: Path, tmp_path: Path) -> None:
    loraconv.split(lora, out=tmp_path / "out", by="module")
    loraconv.merge(*sorted((tmp_path / "out").glob(f"*/{LORA_FILE}")), out=tmp_path / "again", to="peft")
    assert loraconv.verify(lora, tmp_path / "again").same


def test_modules_without_a_layer_are_a_part_of_their_own(tmp_path: Path) -> None:
    tensors = drawn(1, modules=[*MODULES, "proj_out"])
    result = loraconv.split(write(tmp_path / "lora.st", tensors), out=tmp_path / "out")
    assert {part.name: len(part.modules) for part in result.parts} == {"layers-0": 4, "layers-1": 4, "other": 1}


@pytest.mark.parametrize("to", ["peft", "sat", "diffusers"])
def test_every_format_is_split_into_adapters_of_its_own(tmp_path: Path, to: str) -> None:
    run = build(small(lora_alpha=3), tmp_path)
    loraconv.convert(run, out=tmp_path / "whole", to=to)
    result = loraconv.split(tmp_path / "whole", out=tmp_path / "out")
    assert result.to == to
    for part in result.parts:
        summary = loraconv.inspect(tmp_path / "out" / part.name)
        assert (summary.dialect, summary.adapter and summary.adapter.modules) == (to, len(part.modules))
        if to != "sat":
            back = loraconv.convert(tmp_path / "out" / part.name, out=tmp_path / f"{part.name}-sat", to="sat")
            assert back.source.adapter == summary.adapter


@pytest.mark.parametrize(
    ("options", "slug"),
    [
        ({"by": "component"}, "one-part"),
        ({"layers": ["0-1"]}, "one-part"),
        ({"layers": ["0"]}, "layers"),
        ({"layers": ["0-1", "1"]}, "layers"),
        ({"layers": ["0-1", "7"]}, "layers"),
        ({"layers": ["1-0"]}, "usage"),
        ({"layers": ["../x"]}, "usage"),
        ({"layers": ["0", "1"], "by": "module"}, "usage"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(lora: Path, tmp_path: Path, options: dict[str, Any], slug: str) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(LoraconvError) as caught:
        loraconv.split(lora, out=tmp_path / "out", **options)
    assert isinstance(caught.value, UsageError | FormatError)
    assert caught.value.slug == slug
    assert snapshot(tmp_path) == before


def test_a_strength_is_refused(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="strength"):
        loraconv.split(f"{lora}@0.5", out=tmp_path / "out")


def test_the_command_line_takes_ranges_with_commas(lora: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("split", lora, "-o", tmp_path / "out", "--layers", "0, 1-41", "--json")
    value = json.loads(done.out)
    assert [part["name"] for part in value["parts"]] == ["layers-0", "layers-1-41"]
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("wrong", ["lost", "twice", "moved", "scaled", "folded"])
def test_wrong_parts_do_not_pass_their_proof(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    from dataclasses import replace

    from loraconv.lazy import Scaled
    from loraconv.reshaping import splitting

    right = splitting._planned

    def spoilt(used: Any, name: str, factors: Any) -> Any:
        factors = list(factors)
        if name == "layers-1" and wrong == "lost":
            factors = factors[1:]
        elif name == "layers-1" and wrong == "twice":
            factors.append(used.adapter.factors[0])
        elif name == "layers-1" and wrong == "moved":
            factors[0] = replace(factors[0], down=factors[2].down)
        elif wrong == "folded":  # the same delta, in other bytes
            scale = replace(factors[0].scale, alpha=factors[0].scale.alpha / 2)
            factors[0] = replace(factors[0], up=Scaled(factors[0].up, 2.0, "BF16", True), scale=scale)
        elif wrong == "scaled":
            factors[0] = replace(factors[0], scale=replace(factors[0].scale, alpha=factors[0].scale.alpha * 2))
        return right(used, name, factors)

    monkeypatch.setattr(splitting, "_planned", spoilt)
    with pytest.raises(ProofFailed):
        loraconv.split(lora, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

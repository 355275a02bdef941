"""The bias of ``lora_B`` that peft's ``lora_bias`` makes: from its folders to diffusers' files and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError
from tests.support import LORA_FILE as LORA

Tensors = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft, about its own bias tensors


class Wan(torch.nn.Module):
    """Two modules with names that Wan has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].attn1 = torch.nn.Module()
        self.blocks[0].attn1.to_q, self.blocks[0].attn1.to_k = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)


def peft_folder(folder: Path, alpha: int, dtype: torch.dtype) -> tuple[Path, Tensors]:
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_k"], lora_bias=True)
    model = PeftModel(Wan(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter)) if "lora_" in name else None
    model.to(dtype).save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_that_goes_into_up_goes_into_its_bias_and_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    source, had = peft_folder(tmp_path / "in", 4, dtype)
    made = loraconv.convert(source, out=tmp_path / "out", to="diffusers", family="wan")
    assert [proof.passed for proof in made.proofs] == [True]
    got = load_file(tmp_path / "out" / LORA)
    for end in ("lora_B.weight", "lora_B.bias"):
        name = f"blocks.0.attn1.to_k.{end}"
        assert torch.equal(got[f"transformer.{name}"].double(), 2 * had[f"base_model.model.{name}"].double())
    assert loraconv.verify(source, tmp_path / "out").same
    loraconv.convert(tmp_path / "out", out=tmp_path / "back", to="peft", family="wan")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == had.keys()
    assert [n for n, t in had.items() if not torch.equal(back[n], t)] == []


def test_a_scale_that_cannot_be_folded_exactly_widens_the_bias_too(tmp_path: Path) -> None:
    source, had = peft_folder(tmp_path / "in", 3, torch.bfloat16)
    made = loraconv.convert(source, out=tmp_path / "out", to="diffusers", family="wan")
    assert [proof.passed for proof in made.proofs] == [True]
    got = load_file(tmp_path / "out" / LORA)
    assert {t.dtype for t in got.values()} == {torch.float32}
    bias = had["base_model.model.blocks.0.attn1.to_q.lora_B.bias"]
    assert torch.equal(got["transformer.blocks.0.attn1.to_q.lora_B.bias"], 1.5 * bias.float())


def test_a_bias_that_its_dtype_cannot_hold_at_the_scale_is_refused_and_not_rounded(tmp_path: Path) -> None:
    """Half of the smallest number above zero; the factors have none as small."""
    source, had = peft_folder(tmp_path / "in", 1, torch.float16)
    had["base_model.model.blocks.0.attn1.to_q.lora_B.bias"][3] = 2.0**-24
    save_file(had, source / "adapter_model.safetensors")
    convert = partial(loraconv.convert, source, out=tmp_path / "out", to="diffusers", family="wan")
    with pytest.raises(FormatError) as caught:
        convert()
    error = caught.value
    assert (error.slug, error.where) == ("cannot-carry", "blocks.0.attn1.to_q, times 0.5")
    assert "--scale-in metadata" in error.hint
    assert [proof.passed for proof in convert(scale_in="metadata").proofs] == [True]


def test_a_scale_that_stays_in_the_header_is_left_out_of_the_bias(tmp_path: Path) -> None:
    source, had = peft_folder(tmp_path / "in", 3, torch.bfloat16)
    loraconv.convert(source, out=tmp_path / "out", to="diffusers", family="wan", scale_in="metadata")
    got = load_file(tmp_path / "out" / LORA)
    name = "blocks.0.attn1.to_q.lora_B.bias"
    assert torch.equal(got[f"transformer.{name}"], had[f"base_model.model.{name}"])
    assert loraconv.verify(source, tmp_path / "out").same

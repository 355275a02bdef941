"""FLUX adapters of XLabs, fal and Black Forest Labs, against the functions by which diffusers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError
from tests.dialect_files import FORMATS

Tensors = dict[str, torch.Tensor]
RANK, HIDDEN = 4, 8
LORA = FORMATS["diffusers"].file


def xlabs(prefix: str = "") -> Tensors:
    noise = torch.Generator().manual_seed(3)
    sizes = {"qkv_lora": (HIDDEN, 3 * HIDDEN), "proj_lora": (HIDDEN, HIDDEN)}
    names = [f"double_blocks.{n}.processor.{kind}{side}" for n in (0, 18) for kind in sizes for side in (1, 2)]
    names += [f"single_blocks.{n}.processor.{kind}" for n in (0, 37) for kind in sizes]
    tensors = {}
    for name in names:
        columns, rows = sizes[name.rpartition(".")[2].rstrip("12")]
        tensors[f"{prefix}{name}.down.weight"] = torch.randn(RANK, columns, generator=noise)
        tensors[f"{prefix}{name}.up.weight"] = torch.randn(rows, RANK, generator=noise)
    return tensors


def converted(tensors: Tensors, folder: Path, **header: str) -> Tensors:
    """Our diffusers file of these tensors."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "x.safetensors", header)
    loraconv.convert(folder / "x.safetensors", out=folder / "out", to="diffusers")
    return load_file(folder / "out" / LORA)


def same(ours: Tensors, read: Tensors) -> None:
    assert sorted(ours) == sorted(read)
    assert [name for name, tensor in read.items() if not torch.equal(ours[name], tensor)] == []


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_file_of_xlabs_is_read_as_diffusers_reads_it_bit_for_bit(prefix: str, tmp_path: Path) -> None:
    """diffusers copies down and cuts up, as we do."""
    tensors = xlabs(prefix)
    ours = converted(tensors, tmp_path)
    assert loraconv.inspect(tmp_path / "x.safetensors").dialect == "xlabs"
    same(ours, theirs._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))


def test_xlabs_is_not_written(tmp_path: Path) -> None:
    save_file(xlabs(), tmp_path / "x.safetensors")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "out", to="xlabs")
    assert caught.value.slug == "read-only"


def test_a_tensor_that_xlabs_never_had_is_unknown(tmp_path: Path) -> None:
    tensors = xlabs() | {"double_blocks.0.processor.qkv_lora3.down.weight": torch.ones(RANK, HIDDEN)}
    with pytest.raises(FormatError) as caught:
        converted(tensors, tmp_path)
    assert caught.value.slug == "module-unknown"
    assert "double_blocks.0.processor.qkv_lora" in caught.value.why


WIDTH = 3072  # diffusers cuts linear1 at the width of the real model, whatever the tensors' own


def kontext() -> Tensors:
    """An adapter as fal's trainer writes it: peft's prefix before Black Forest Labs' names, on every block."""
    noise = torch.Generator().manual_seed(4)
    double = {"mod.lin": 48, "attn.qkv": 24, "attn.proj": 8, "mlp.0": 32, "mlp.2": 8}
    rows = {f"double_blocks.{n}.{side}_{m}": r for n in range(19) for side in ("img", "txt") for m, r in double.items()}
    single = {"modulation.lin": 24, "linear1": 7 * WIDTH, "linear2": 8}
    rows |= {f"single_blocks.{n}.{m}": r for n in range(38) for m, r in single.items()}
    rows["final_layer.linear"] = 8
    tensors = {}
    for name, count in rows.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=noise)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(count, 2, generator=noise)
    return tensors


def with_settings(tensors: Tensors, folder: Path, **settings: object) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_kontext_file_of_fal_is_read_as_diffusers_reads_it_bit_for_bit(tmp_path: Path) -> None:
    tensors = kontext()
    save_file(tensors, tmp_path / "x.safetensors")
    loraconv.convert(tmp_path / "x.safetensors", out=tmp_path / "out", to="diffusers", alpha=2)
    assert loraconv.inspect(tmp_path / "x.safetensors").dialect == "peft"
    same(load_file(tmp_path / "out" / LORA), theirs._convert_fal_kontext_lora_to_diffusers(dict(tensors)))


def small_kontext() -> Tensors:
    return {name: tensor for name, tensor in kontext().items() if ".double_blocks.0." in name}


def test_the_alpha_of_peft_s_settings_holds_for_original_names_too(tmp_path: Path) -> None:
    source = with_settings(small_kontext(), tmp_path / "in", lora_alpha=1)
    loraconv.convert(source, out=tmp_path / "out", to="diffusers", scale_in="fold")
    ours, was = load_file(tmp_path / "out" / LORA), small_kontext()
    name = "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight"
    assert torch.equal(ours[name], was["base_model.model.double_blocks.0.img_attn.proj.lora_B.weight"] / 2)


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_patterns_over_original_names_are_refused_and_not_passed_over(pattern: str, tmp_path: Path) -> None:
    source = with_settings(small_kontext(), tmp_path / "in", **{pattern: {"double_blocks.0.img_attn.proj": 2}})
    with pytest.raises(FormatError) as caught:
        loraconv.convert(source, out=tmp_path / "out", to="diffusers")
    assert caught.value.slug == "pattern"


def test_peft_is_written_with_diffusers_names(tmp_path: Path) -> None:
    source = with_settings(small_kontext(), tmp_path / "in")
    loraconv.convert(source, out=tmp_path / "out", to="peft")
    assert "base_model.model.transformer_blocks.0.attn.add_q_proj.lora_A.weight" in load_file(
        tmp_path / "out" / "adapter_model.safetensors"
    )

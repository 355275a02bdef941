"""Adapters of convolutions: fused as LyCORIS adds them, held by diffusers and peft where these can, else near to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loraconv
from loraconv import approximating, products
from loraconv.errors import FormatError, ProofFailed
from tests.lycoris_files import CONV, IN, OUT, delta_of, saved

WEIGHTS = "diffusion_pytorch_model.safetensors"
NAME = "lora_unet_patch_embedding"
FLAT = {"loha-conv"}  # its second factor is a matrix, from which the size of the kernel cannot be told


def a_base(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    folder.mkdir()
    torch.manual_seed(9)
    weight = torch.randn(shape).to(dtype)
    save_file(
        {"patch_embedding.weight": weight, "patch_embedding.bias": torch.zeros(OUT, dtype=dtype)}, folder / WEIGHTS
    )
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", sorted(CONV))
def test_a_fused_kernel_is_base_plus_what_lycoris_adds_rounded_once(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    (delta,) = saved(kind, tmp_path / "in").values()
    weight = a_base(tmp_path / "base", (OUT, IN, 3, 3), dtype)
    adapter = tmp_path / "in" / "lycoris.safetensors"
    result = loraconv.fuse(adapter, base=tmp_path / "base", out=tmp_path / "out")
    assert result.proofs[0].passed
    after = load_file(tmp_path / "out" / WEIGHTS)["patch_embedding.weight"]
    assert after.shape == weight.shape
    # LyCORIS' own delta is rounded in float64: a sum very near to a tie may fall to the other side.
    assert (after != (weight.double() + delta.reshape(weight.shape)).to(dtype)).sum() <= 1
    assert loraconv.verify(adapter, tmp_path / "out", base=tmp_path / "base").same
    other = {name: tensor * 1.01 if "lo" in name else tensor for name, tensor in load_file(adapter).items()}
    other = {name: tensor * 1.01 if name.endswith("w1_a") else tensor for name, tensor in other.items()}
    save_file(other, adapter)
    assert not loraconv.verify(adapter, tmp_path / "out", base=tmp_path / "base").same


@pytest.mark.parametrize("kind", ["locon", "tucker", "lokr"])
def test_kernels_of_three_dimensions(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = torch.nn.Conv3d(IN, OUT, (1, 2, 2), bias=False)
    if kind == "lokr":
        module = LokrModule("", base, lora_dim=2, alpha=1, factor=4)
    else:
        module = LoConModule("", base, lora_dim=4, alpha=2, use_tucker=kind == "tucker")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tensors = {f"{NAME}.{side}": t.detach().clone().contiguous() for side, t in module.custom_state_dict().items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "a.safetensors")
    weight = a_base(tmp_path / "base", (OUT, IN, 1, 2, 2), torch.bfloat16)
    loraconv.fuse(tmp_path / "in" / "a.safetensors", base=tmp_path / "base", out=tmp_path / "out")
    after = load_file(tmp_path / "out" / WEIGHTS)["patch_embedding.weight"]
    assert (after != (weight.double() + delta_of(module).reshape(weight.shape)).bfloat16()).sum() <= 1
    if kind == "lokr":
        return  # its second factor is a matrix, from which the size of the kernel cannot be told
    options = {} if kind == "locon" else {"approximate": "svd", "rank": 4}
    loraconv.convert(tmp_path / "in" / "a.safetensors", out=tmp_path / "peft", to="peft", family="wan", **options)
    made = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert [tuple(made[f"base_model.model.patch_embedding.lora_{side}.weight"].shape) for side in "AB"] == [
        (4, IN, 1, 2, 2),
        (OUT, 4, 1, 1, 1),
    ]


@pytest.mark.parametrize("kind", ["locon", "tucker"])
def test_a_kernel_that_was_turned_does_not_pass_the_proof(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"lora_down.weight": torch.randn(2, IN, 1, 2, 3), "lora_up.weight": torch.randn(OUT, 2, 1, 1, 1)}
    if kind == "tucker":
        core = {"lora_down.weight": torch.randn(2, IN, 1, 1, 1), "lora_mid.weight": torch.randn(2, 2, 1, 2, 3)}
        tensors |= core
    save_file({f"{NAME}.{side}": tensor for side, tensor in tensors.items()}, tmp_path / "a.safetensors")
    options = {} if kind == "locon" else {"approximate": "svd", "rank": 2}
    loraconv.convert(tmp_path / "a.safetensors", out=tmp_path / "right", to="peft", family="wan", **options)

    def turned(factor: Any, kernel: tuple[int, ...]) -> Any:
        return right(factor, kernel[::-1])

    right = products.with_kernel
    monkeypatch.setattr(products, "with_kernel", turned)
    monkeypatch.setattr(approximating, "with_kernel", turned)
    with pytest.raises(ProofFailed, match=r"shape|size"):
        loraconv.convert(tmp_path / "a.safetensors", out=tmp_path / "wrong", to="peft", family="wan", **options)


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    saved("locon", tmp_path / "in")
    a_base(tmp_path / "base", (OUT, IN, 2, 2), torch.float32)
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(tmp_path / "in" / "lycoris.safetensors", base=tmp_path / "base", out=tmp_path / "out")
    assert caught.value.slug == "base-mismatch"


@pytest.mark.parametrize("kind", ["locon", "tucker"])
@pytest.mark.parametrize("options", [{}, {"approximate": "svd", "rank": 4}], ids=["as it is", "approximated"])
def test_a_format_for_linear_layers_does_not_get_it(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    saved(kind, tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="diffsynth", **options)
    assert caught.value.slug == "cannot-carry"
    assert "--to comfyui" in caught.value.hint


class Patches(torch.nn.Module):
    """A convolution under diffusers' name for Wan."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = torch.nn.Conv2d(IN, OUT, 3)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_a_lora_of_a_convolution_is_held_byte_for_byte_there_and_back(target: str, tmp_path: Path) -> None:
    saved("locon", tmp_path / "in")
    adapter = tmp_path / "in" / "lycoris.safetensors"
    options = {"scale_in": "metadata"} if target == "diffusers" else {}
    loraconv.convert(adapter, out=tmp_path / "out", to=target, family="wan", **options)
    before = load_file(adapter)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    made = {name.partition("patch_embedding.")[2]: tensor for name, tensor in load_file(file).items()}
    assert torch.equal(made["lora_A.weight"], before[f"{NAME}.lora_down.weight"])
    assert torch.equal(made["lora_B.weight"], before[f"{NAME}.lora_up.weight"])
    assert loraconv.verify(adapter, tmp_path / "out").same
    loraconv.convert(tmp_path / "out", out=tmp_path / "back", to="kohya", family="wan")
    after = load_file(tmp_path / "back" / "kohya_lora.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def merged(folder: Path) -> torch.Tensor:
    """What peft adds to the convolution, in float64."""
    model = Patches().double()
    before = model.patch_embedding.weight.detach().clone()
    return PeftModel.from_pretrained(model, folder).double().merge_and_unload().patch_embedding.weight.detach() - before


def test_peft_merges_what_lycoris_adds(tmp_path: Path) -> None:
    (delta,) = saved("locon", tmp_path / "in").values()
    loraconv.convert(tmp_path / "in" / "lycoris.safetensors", out=tmp_path / "out", to="peft", family="wan")
    assert (merged(tmp_path / "out") - delta).norm() <= 1e-6 * delta.norm()


@pytest.mark.parametrize("kind", sorted(CONV - FLAT - {"locon"}))
def test_other_kinds_become_a_lora_of_a_convolution_as_near_as_was_asked_for(kind: str, tmp_path: Path) -> None:
    (delta,) = saved(kind, tmp_path / "in").values()
    adapter = tmp_path / "in" / "lycoris.safetensors"
    with pytest.raises(FormatError) as caught:
        loraconv.convert(adapter, out=tmp_path / "no", to="peft", family="wan")
    assert caught.value.slug == "cannot-carry"
    for error in (0.3, 1e-6):
        out = tmp_path / str(error)
        loraconv.convert(adapter, out=out, to="peft", family="wan", approximate="svd", max_error=error)
        gap = float((merged(out) - delta).norm() / delta.norm())
        assert gap <= error
        if error > 1e-3:
            rank = load_file(out / "adapter_model.safetensors")["base_model.model.patch_embedding.lora_A.weight"].shape[
                0
            ]
            values = torch.linalg.svdvals(delta.reshape(OUT, -1))
            assert gap == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-4)

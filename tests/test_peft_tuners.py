"""peft's own LoHa and LoKr, compared with what peft merges; adapters of other kinds are refused by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError
from tests.lycoris_files import MODULES
from tests.test_algebra import WEIGHTS, Wan, a_base, pairs_in, product

TARGETS = list(MODULES.values())
CONFIGS = {
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "loha-patterns": peft.LoHaConfig(
        r=3, alpha=5, target_modules=TARGETS, rank_pattern={"attn1.to_q": 2}, alpha_pattern={"ffn.net.0.proj": 1}
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=TARGETS, decompose_factor=4),
    "lokr-both": peft.LoKrConfig(r=1, alpha=5, target_modules=TARGETS, decompose_factor=4, decompose_both=True),
    "lokr-whole": peft.LoKrConfig(r=64, alpha=48, target_modules=TARGETS, decompose_factor=4),
}


def saved(config: Any, folder: Path, model: torch.nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Save an adapter with random numbers; returns what peft adds to each weight, in float64."""
    base = (model or Wan()).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.copy_(torch.randn_like(parameter).float())
    wrapped.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.float().contiguous() for name, tensor in load_file(file).items()}, file)
    after = wrapped.double().merge_and_unload().state_dict()
    return {name.removesuffix(".weight"): after[name] - before[name] for name in before if name.endswith(".weight")}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_weight_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    deltas = saved(CONFIGS[kind], tmp_path / "in")
    base = a_base(tmp_path / "base", torch.float32)
    assert loraconv.fuse(tmp_path / "in", base=base, out=tmp_path / "out").proofs[0].passed
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for module, delta in deltas.items():
        want = before[f"{module}.weight"].double() + delta
        assert (after[f"{module}.weight"] - want).norm() <= 1e-7 * want.norm()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "lokr-whole"])
@pytest.mark.parametrize("target", ["kohya", "comfyui"])
def test_lycoris_spelling_holds_it_with_an_alpha_of_the_same_scale(kind: str, target: str, tmp_path: Path) -> None:
    deltas = saved(CONFIGS[kind], tmp_path / "in")
    result = loraconv.convert(tmp_path / "in", out=tmp_path / "out", to=target, family="wan")
    assert result.proofs[0].passed
    (file,) = (tmp_path / "out").glob("*.safetensors")
    for module, pair in pairs_in(file).items():
        # peft holds the scale of a LoHa in float32.
        assert (torch.from_numpy(product(pair)) - deltas[module]).norm() <= 2.0**-24 * deltas[module].norm()
    assert loraconv.verify(tmp_path / "in", file).same
    assert not loraconv.verify(tmp_path / "in", file, alpha=6).same


def test_a_lokr_of_two_whole_matrices_has_no_scale_in_lycoris_spelling(tmp_path: Path) -> None:
    deltas = saved(CONFIGS["lokr-whole"], tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="kohya", family="wan")
    assert caught.value.slug == "cannot-carry"
    options = {"approximate": "svd", "max_error": 1e-6}
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="kohya", family="wan", **options)
    for module, pair in pairs_in(tmp_path / "out" / "kohya_lora.safetensors").items():
        assert (torch.from_numpy(product(pair)) - deltas[module]).norm() <= 1e-6 * deltas[module].norm()


def test_without_its_settings_the_scale_is_not_guessed(tmp_path: Path) -> None:
    saved(CONFIGS["loha"], tmp_path / "in")
    (tmp_path / "in" / "adapter_config.json").unlink()
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(tmp_path / "in", base=a_base(tmp_path / "base"), out=tmp_path / "out")
    assert caught.value.slug == "alpha-unknown"


OTHERS = {
    "OFT": peft.OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "VeRA": peft.VeraConfig(r=4, target_modules=["blocks.0.attn1.to_q"]),
    "FourierFT": peft.FourierFTConfig(target_modules=TARGETS, n_frequency=10),
    "HRA": peft.HRAConfig(r=2, target_modules=TARGETS),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
    "LN tuning": peft.LNTuningConfig(target_modules=TARGETS),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_another_tuner_of_peft_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    peft.get_peft_model(Wan(), OTHERS[kind]).save_pretrained(tmp_path / "in")
    refused(tmp_path / "in", kind, tmp_path)


LYCORIS = {
    "OFT": lambda name, layer: DiagOFTModule(name, layer, lora_dim=4),
    "IA3": lambda name, layer: IA3Module(name, layer),
    "GLoRA": lambda name, layer: GLoRAModule(name, layer, lora_dim=4),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_another_kind_of_lycoris_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    name = "lora_unet_blocks_0_self_attn_q"
    module = LYCORIS[kind](name, torch.nn.Linear(16, 24))
    tensors = {f"{name}.{side}": t.detach().clone().contiguous() for side, t in module.state_dict().items()}
    save_file(tensors, tmp_path / "in.safetensors")
    refused(tmp_path / "in.safetensors", kind, tmp_path)


def refused(adapter: Path, kind: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    a_base(base)
    for command in (
        lambda: loraconv.inspect(adapter),
        lambda: loraconv.convert(adapter, out=out, to="kohya"),
        lambda: loraconv.fuse(adapter, base=base, out=out),
        lambda: loraconv.verify(adapter, adapter),
    ):
        with pytest.raises(FormatError, match=f"another kind, {kind}, and no LoRA") as caught:
            command()
        assert caught.value.slug == "another-kind"
    assert not out.exists()

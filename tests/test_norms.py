"""Norm layers that LyCORIS trained: files of its own wrapper around real models, from reading to the fused weight."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed
from tests.lycoris_files import NormModule, wrapped
from tests.test_sdxl import pipeline

Tensors = dict[str, torch.Tensor]

FILE = "lycoris.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: Norms of CogVideoX: in the file, and what diffusers calls them.
NORMS = {
    **{
        f"lycoris_transformer_blocks_{i}_{name.replace('.', '_')}": f"transformer_blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("norm1.norm", "attn1.norm_q", "attn1.norm_k", "norm2.norm")
    },
    "lycoris_norm_final": "norm_final",
    "lycoris_norm_out_norm": "norm_out.norm",
}


def cogvideox() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=8,
        time_embed_dim=8,
        in_channels=4,
        out_channels=4,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@cache
def trained(kind: str) -> Tensors:
    """What LyCORIS saves of a LoKr with norms, all its numbers random."""
    network = wrapped(cogvideox() if kind == "cogvideox" else pipeline().unet)
    return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}


def saved(folder: Path, tensors: Tensors | None = None, kind: str = "cogvideox") -> Path:
    folder.mkdir()
    save_file(trained(kind) if tensors is None else tensors, folder / FILE)
    return folder / FILE


def norms_of(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_norm")}


def refused(action: Any) -> LoraconvError:
    with pytest.raises(LoraconvError) as caught:
        action()
    return caught.value


# --- reading and renaming ---------------------------------------------------------------------------------------------


def test_the_file_of_the_wrapper_has_every_norm_of_the_model() -> None:
    own = {
        f"lycoris_{n.replace('.', '_')}" for n, m in cogvideox().named_modules() if isinstance(m, torch.nn.LayerNorm)
    }
    assert {name.rpartition(".")[0] for name in norms_of(trained("cogvideox"))} == own == set(NORMS)


def test_inspect_counts_the_norms(tmp_path: Path) -> None:
    contents = loraconv.inspect(saved(tmp_path / "in")).contents
    assert {group.what: group.tensors for group in contents}["norm, 10 modules"] == 20


@pytest.mark.parametrize("kind", ["cogvideox", "sdxl"])
def test_norms_keep_their_bytes_through_every_dialect_that_has_them(kind: str, tmp_path: Path) -> None:
    first = before = saved(tmp_path / "in", kind=kind)
    want = sorted((n.rpartition(".")[2], t.numpy().tobytes()) for n, t in trained(kind).items())
    targets = ["kohya", "comfyui", *(["onetrainer"] if kind == "cogvideox" else []), "lycoris"]
    for target in targets:
        made = loraconv.convert(before, out=tmp_path / target, to=target)
        assert all(proof.passed for proof in made.proofs)
        assert loraconv.verify(first, tmp_path / target).same
        [before] = (tmp_path / target).glob("*.safetensors")
        got = load_file(before)
        assert sorted((n.rpartition(".")[2], t.numpy().tobytes()) for n, t in got.items()) == want
    assert got.keys() == trained(kind).keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in trained(kind).items())


def test_norms_of_sdxl_have_the_names_of_stability_s_unet_in_kohya_s_file(tmp_path: Path) -> None:
    """As in ``sd_xl_base_1.0.safetensors``: ``input_blocks.4.0.out_layers.0.weight`` and so on."""
    loraconv.convert(saved(tmp_path / "in", kind="sdxl"), out=tmp_path / "out", to="kohya")
    got = load_file(tmp_path / "out" / "kohya_lora.safetensors")
    names = {
        "down_blocks_0_resnets_0_norm1": "input_blocks_1_0_in_layers_0",
        "down_blocks_1_resnets_0_norm2": "input_blocks_4_0_out_layers_0",
        "down_blocks_2_attentions_1_norm": "input_blocks_8_1_norm",
        "mid_block_attentions_0_transformer_blocks_0_norm3": "middle_block_1_transformer_blocks_0_norm3",
        "mid_block_resnets_1_norm2": "middle_block_2_out_layers_0",
        "up_blocks_1_resnets_2_norm1": "output_blocks_5_0_in_layers_0",
    }
    for here, there in names.items():
        for side in ("w_norm", "b_norm"):
            assert torch.equal(got[f"lora_unet_{there}.{side}"], trained("sdxl")[f"lycoris_{here}.{side}"])


def test_a_norm_of_wan_is_another_number_in_its_own_names(tmp_path: Path) -> None:
    """Wan's third norm is the second in diffusers; those of queries and keys have no bias, so LyCORIS 4.1.3 passes over
    them, but ComfyUI reads differences of any weight."""
    file = saved(
        tmp_path / "in",
        {
            "diffusion_model.blocks.3.norm3.w_norm": torch.randn(24),
            "diffusion_model.blocks.3.norm3.b_norm": torch.randn(24),
            "diffusion_model.blocks.3.cross_attn.norm_k_img.w_norm": torch.randn(24),
            "diffusion_model.img_emb.proj.4.w_norm": torch.randn(24),
        },
    )
    loraconv.convert(file, out=tmp_path / "out", to="onetrainer")
    before, after = load_file(file), load_file(tmp_path / "out" / "onetrainer_lora.safetensors")
    names = {
        "blocks.3.norm3.w_norm": "blocks_3_norm2.w_norm",
        "blocks.3.norm3.b_norm": "blocks_3_norm2.b_norm",
        "blocks.3.cross_attn.norm_k_img.w_norm": "blocks_3_attn2_norm_added_k.w_norm",
        "img_emb.proj.4.w_norm": "condition_embedder_image_embedder_norm2.w_norm",
    }
    assert len(after) == len(names)
    for there, here in names.items():
        assert torch.equal(after[f"lora_transformer_{here}"], before[f"diffusion_model.{there}"])
    assert loraconv.verify(file, tmp_path / "out").same


@pytest.mark.parametrize("alone", [False, True])
def test_verify_tells_an_adapter_with_another_norm(alone: bool, tmp_path: Path) -> None:
    own = norms_of(trained("cogvideox")) if alone else trained("cogvideox")
    first = saved(tmp_path / "one", own)
    assert loraconv.verify(first, saved(tmp_path / "same", own)).same
    for number, side in enumerate(("w_norm", "b_norm")):
        name = f"lycoris_norm_final.{side}"
        other = {**own, name: own[name].clone()}
        other[name][3] += 0.5
        found = loraconv.verify(first, saved(tmp_path / str(number), other))
        assert not found.same
        assert [m.module for m in found.modules if not m.equal] == ["norm_final" + ".bias" * number]


@pytest.mark.parametrize("target", ["diffusers", "peft", "sat"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_format_without_names_for_norms_refuses_them(target: str, alone: bool, tmp_path: Path) -> None:
    """Beside a plain LoRA, which is what is left of it without them."""
    pairs = {
        f"lycoris_transformer_blocks_0_attn1_to_{q}.{side}": torch.randn(*shape)
        for q in "qkv"
        for side, shape in {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2)}.items()
    }
    norms = norms_of(trained("cogvideox"))
    file = saved(tmp_path / "in", norms if alone else {**pairs, **norms})
    error = refused(lambda: loraconv.convert(file, out=tmp_path / "out", to=target))
    assert error.slug == "cannot-carry"
    assert "10 norm" in error.what
    assert "norm layer" in error.why
    assert ("--drop '*_norm'" in error.hint) != alone
    assert "--to comfyui" in error.hint
    assert not (tmp_path / "out").exists()
    if not alone:
        made = loraconv.convert(file, out=tmp_path / "out", to=target, drop=["*_norm"])
        assert len(made.dropped) == 20


def test_a_norm_has_no_rank_to_be_approximated_by(tmp_path: Path) -> None:
    options = {"approximate": "svd", "rank": 2}
    error = refused(lambda: loraconv.convert(saved(tmp_path / "in"), out=tmp_path / "out", to="peft", **options))
    assert error.slug == "cannot-carry"
    assert "no rank" in error.why


# --- what no trainer writes -------------------------------------------------------------------------------------------


def test_differences_of_a_norm_that_the_model_does_not_have_are_refused_by_name(tmp_path: Path) -> None:
    strange = {f"lycoris_transformer_blocks_0_norm3_norm.{side}": torch.ones(32) for side in ("w_norm", "b_norm")}
    file = saved(tmp_path / "in", {**trained("cogvideox"), **strange})
    error = refused(lambda: loraconv.convert(file, out=tmp_path / "out", to="kohya"))
    assert error.slug == "module-unknown"
    assert "lycoris_transformer_blocks_0_norm2_norm" in error.why
    assert "--drop '*_norm'" in error.hint


@pytest.mark.parametrize(
    "name",
    [
        "lycoris_transformer_blocks_0_attn1_to_q.w_norm",
        "lycoris_norm_final.alpha",
        "lycoris_norm_final.diff",
        "lycoris_norm_final.diff_b",
        "lycoris_norm_final.lora_down.weight",
    ],
)
def test_a_norm_has_its_own_two_tensors_and_a_linear_layer_has_not(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "in", {**trained("cogvideox"), name: torch.ones(32)})
    error = refused(lambda: loraconv.convert(file, out=tmp_path / "out", to="kohya"))
    assert error.slug == "module-unknown"
    assert name in error.where


@pytest.mark.parametrize(
    ("change", "slug"),
    [
        ({"w_norm": None}, "factor-missing"),  # nothing would read what is left: LyCORIS and ComfyUI look for w_norm
        ({"w_norm": (31,)}, "factor-shape"),
        ({"b_norm": (32, 1), "w_norm": (32, 2)}, "factor-shape"),
    ],
    ids=str,
)
def test_a_norm_that_is_not_whole_is_refused(change: dict[str, Any], slug: str, tmp_path: Path) -> None:
    tensors = dict(trained("cogvideox"))
    for side, shape in change.items():
        tensors.pop(f"lycoris_norm_final.{side}")
        if shape is not None:
            tensors[f"lycoris_norm_final.{side}"] = torch.ones(*shape)
    error = refused(lambda: loraconv.convert(saved(tmp_path / "in", tensors), out=tmp_path / "out", to="kohya"))
    assert isinstance(error, CorruptCheckpoint)
    assert error.slug == slug


def test_a_renamed_norm_of_another_layer_does_not_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv import renaming

    def swapped(target: Any, module: str, side: str) -> str:
        swap = {"w_norm": "b_norm", "b_norm": "w_norm"} if module.endswith("norm_final") else {}
        return spelled(target, module, swap.get(side, side))

    spelled = renaming._spelled
    monkeypatch.setattr(renaming, "_spelled", swapped)
    with pytest.raises(ProofFailed, match="norm_final"):
        loraconv.convert(saved(tmp_path / "in"), out=tmp_path / "out", to="kohya")


# --- fuse -------------------------------------------------------------------------------------------------------------


def merged() -> Tensors:
    """What LyCORIS itself makes of the model, in float64."""
    model = cogvideox().double()
    network = wrapped(model).double()
    network.restore()
    network.load_state_dict(trained("cogvideox"), strict=False)
    network.merge_to(1.0)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def a_base(folder: Path, dtype: torch.dtype) -> Path:
    cogvideox().to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strength", [1, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_fused_norm_is_the_base_s_plus_its_difference_rounded_once(
    dtype: torch.dtype, strength: float, tmp_path: Path
) -> None:
    base, file = a_base(tmp_path / "base", dtype), saved(tmp_path / "in")
    made = loraconv.fuse(f"{file}@{strength}", base=base, out=tmp_path / "out", journal=True)
    assert made.proofs[0].passed
    assert loraconv.verify(f"{file}@{strength}", tmp_path / "out", base=base).same
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for there, here in NORMS.items():
        for side, param in (("w_norm", "weight"), ("b_norm", "bias")):
            name, difference = f"{here}.{param}", trained("cogvideox")[f"{there}.{side}"].double()
            want = before[name].double() + strength * difference
            assert torch.equal(after[name], want.to(dtype)), name
            assert not torch.equal(after[name], before[name])
    loraconv.unfuse(tmp_path / "out", out=tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())


def test_a_fused_model_is_what_lycoris_merges(tmp_path: Path) -> None:
    base, file = a_base(tmp_path / "base", torch.float32), saved(tmp_path / "in")
    loraconv.fuse(file, base=base, out=tmp_path / "out")
    after, before = load_file(tmp_path / "out" / WEIGHTS), load_file(base / WEIGHTS)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert {name.rpartition(".")[0] for name in changed} >= set(NORMS.values())
    want = {name: t for name, t in merged().items() if name.rpartition(".")[0] in NORMS.values()}
    assert len(want) == 2 * len(NORMS)
    assert [name for name, tensor in want.items() if not torch.equal(after[name], tensor.float())] == []


def test_the_difference_of_norms_has_no_scale_in_lycoris() -> None:
    """Neither alpha nor rank: only the multiplier that the user gives."""
    module = NormModule("norm", torch.nn.LayerNorm(4).double(), multiplier=0.5).double()
    with torch.no_grad():
        module.w_norm.copy_(torch.tensor([1.0, 2, 3, 4]))
        module.b_norm.copy_(torch.tensor([4.0, 3, 2, 1]))
    weight, bias = module.make_weight(module.multiplier)
    assert weight.tolist() == [1.5, 2, 2.5, 3]
    assert bias.tolist() == [2, 1.5, 1, 0.5]
    assert module.get_merged_weight(2)[0].tolist() == [3, 5, 7, 9]
    assert set(module.state_dict()) == {"w_norm", "b_norm"}


def test_a_wrongly_fused_norm_does_not_pass(tmp_path: Path) -> None:
    base, file = a_base(tmp_path / "base", torch.bfloat16), saved(tmp_path / "in")
    loraconv.fuse(file, base=base, out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for name in ("norm_out.norm.weight", "norm_out.norm.bias"):
        wrong = {**tensors, name: tensors[name] * 1.1}
        folder = tmp_path / name
        folder.mkdir()
        save_file(wrong, folder / WEIGHTS)
        assert not loraconv.verify(file, folder, base=base).same


def test_a_norm_without_a_bias_takes_no_difference_of_one(tmp_path: Path) -> None:
    base, file = a_base(tmp_path / "base", torch.float32), saved(tmp_path / "in")
    tensors = load_file(base / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if name != "norm_final.bias"}, base / WEIGHTS)
    error = refused(lambda: loraconv.fuse(file, base=base, out=tmp_path / "out"))
    assert isinstance(error, FormatError)
    assert error.slug == "no-home"
    assert error.where == "norm_final.bias"

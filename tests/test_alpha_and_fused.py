"""kohya's rules to the letter: where alpha stands, fused modules split and merged, names that nothing explains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError
from tests.dialect_files import FORMATS, deltas, write

Tensors = dict[str, torch.Tensor]
KOHYA = FORMATS["kohya"]
Q = "lora_unet_transformer_blocks_3_attn1_to_q"
QKV = "lora_unet_double_blocks_3_img_attn_qkv"
PARTS = [f"transformer_blocks.3.attn.{name}" for name in ("to_q", "to_k", "to_v")]


def pair(module: str, rank: int = 4, rows: int = 8, seed: int = 0, ends: str = "kohya") -> Tensors:
    noise = torch.Generator().manual_seed(seed)
    form = FORMATS[ends]
    down, up = torch.randn(rank, 8, generator=noise), torch.randn(rows, rank, generator=noise)
    return {module + form.down: down, module + form.up: up}


def saved(tmp_path: Path, tensors: Tensors, header: dict[str, str] | None = None) -> Path:
    save_file(tensors, tmp_path / "adapter.safetensors", header)
    return tmp_path / "adapter.safetensors"


def scale_of(file: Path, **options: float) -> tuple[str, str]:
    facts = loraconv.inspect(file, **options).adapter
    assert facts is not None
    (scale,), (source,) = facts.scales, facts.alpha_sources
    return scale, source


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_is_read_from_a_tensor_of_any_dtype(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    alpha = torch.full(shape, 2, dtype=getattr(torch, dtype))
    assert scale_of(saved(tmp_path, {**pair(Q), f"{Q}.alpha": alpha})) == ("1/2", "alpha tensors")


def test_alpha_in_bfloat16_is_the_rounded_number_that_kohya_reads(tmp_path: Path) -> None:
    alpha = torch.tensor(0.1, dtype=torch.bfloat16)
    scale, _ = scale_of(saved(tmp_path, {**pair(Q), f"{Q}.alpha": alpha}))
    top, bottom = scale.split("/")
    assert int(top) / int(bottom) == alpha.item() / 4 != 0.1 / 4


def test_without_alpha_kohya_takes_the_rank_and_that_is_said(tmp_path: Path) -> None:
    file = saved(tmp_path, pair(Q))
    assert scale_of(file) == ("1", "kohya default")
    assert any("alpha = rank" in notice for notice in loraconv.inspect(file).notices)
    with pytest.raises(FormatError) as caught:
        loraconv.convert(file, out=tmp_path / "out", to="diffusers", strict=True)
    assert caught.value.slug == "alpha-unknown"


def test_the_header_says_alpha_where_no_tensor_does(tmp_path: Path) -> None:
    assert scale_of(saved(tmp_path, pair(Q), {"ss_network_alpha": "1.0"})) == ("1/4", "header ss_network_alpha")


@pytest.mark.parametrize("word", ["Dynamic", "None", "", "nan", "1e9", "-1"])
def test_a_word_in_the_header_is_no_alpha(word: str, tmp_path: Path) -> None:
    assert scale_of(saved(tmp_path, pair(Q), {"ss_network_alpha": word})) == ("1", "kohya default")


def test_a_tensor_beats_the_header_and_the_caller_beats_both_with_a_notice(tmp_path: Path) -> None:
    file = saved(tmp_path, {**pair(Q), f"{Q}.alpha": torch.tensor(2.0)}, {"ss_network_alpha": "1"})
    assert scale_of(file) == ("1/2", "alpha tensors")
    assert any("alpha tensors says 2; header ss_network_alpha says 1" in n for n in loraconv.inspect(file).notices)
    assert scale_of(file, alpha=8) == ("2", "--alpha")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e30])
def test_an_alpha_that_cannot_be_meant_is_refused(value: float, tmp_path: Path) -> None:
    file = saved(tmp_path, {**pair(Q), f"{Q}.alpha": torch.tensor(value)})
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.convert(file, out=tmp_path / "out", to="diffusers")
    assert caught.value.slug == "alpha-implausible"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.ones(1, 1), torch.tensor(True), torch.ones(0)])
def test_a_tensor_that_is_not_one_number_is_no_alpha(alpha: torch.Tensor, tmp_path: Path) -> None:
    file = saved(tmp_path, {**pair(Q), f"{Q}.alpha": alpha})
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.convert(file, out=tmp_path / "out", to="diffusers")
    assert caught.value.slug == "alpha-shape"


@pytest.mark.parametrize("source", ["peft", "diffusers"])
@pytest.mark.parametrize("target", ["kohya", "comfyui", "videox-fun", "onetrainer"])
def test_where_every_consumer_reads_alpha_the_factors_keep_their_bytes(
    source: str, target: str, tmp_path: Path
) -> None:
    write(FORMATS[source], "wan", tmp_path / "in", torch.bfloat16)
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to=target, family="wan")
    first = load_file(tmp_path / "in" / FORMATS[source].file)
    last = load_file(tmp_path / "out" / FORMATS[target].file)
    factors = [t for name, t in last.items() if not name.endswith(".alpha")]
    assert sorted(t.view(torch.int16).tolist() for t in factors) == sorted(
        t.view(torch.int16).tolist() for t in first.values()
    )
    assert {(t.dtype, t.item()) for name, t in last.items() if name.endswith(".alpha")} == {(torch.float32, 2.0)}


def test_an_alpha_without_factors_is_not_passed_over(tmp_path: Path) -> None:
    file = saved(tmp_path, {**pair(Q), f"{Q.replace('to_q', 'to_k')}.alpha": torch.tensor(1.0)})
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.convert(file, out=tmp_path / "out", to="diffusers")
    assert caught.value.slug == "factor-missing"
    assert "attn1.to_k" in caught.value.where


# --- fused modules --------------------------------------------------------------------------------------------------


def diagonal(rank: int = 2) -> tuple[Tensors, list[torch.Tensor]]:
    """Three adapters side by side as sd-scripts' split_qkv saves them, and ``up @ down`` of each."""
    alone = [pair("x", rank=rank, seed=n) for n in range(3)]
    downs, ups = [a["x.lora_down.weight"] for a in alone], [a["x.lora_up.weight"] for a in alone]
    tensors = {f"{QKV}.lora_down.weight": torch.cat(downs), f"{QKV}.lora_up.weight": torch.block_diag(*ups)}
    return {**tensors, f"{QKV}.alpha": torch.tensor(float(rank))}, [
        u.double() @ d.double() for d, u in zip(downs, ups, strict=True)
    ]


def converted(file: Path, tmp_path: Path, **options: str) -> Tensors:
    loraconv.convert(file, out=tmp_path / "out", to="diffusers", **options)
    return load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")


def product(tensors: Tensors, module: str) -> torch.Tensor:
    up, down = (tensors[f"transformer.{module}.lora_{side}.weight"].double() for side in "BA")
    return up @ down


def test_a_fused_pair_splits_into_rows_of_up_and_copies_of_down(tmp_path: Path) -> None:
    fused = pair(QKV, rows=24)
    made = converted(saved(tmp_path, {**fused, f"{QKV}.alpha": torch.tensor(4)}), tmp_path)
    for n, module in enumerate(PARTS):
        assert torch.equal(made[f"transformer.{module}.lora_A.weight"], fused[f"{QKV}.lora_down.weight"])
        assert torch.equal(made[f"transformer.{module}.lora_B.weight"], fused[f"{QKV}.lora_up.weight"].chunk(3)[n])


def test_side_by_side_with_the_alpha_of_one_block_is_what_split_qkv_trained(tmp_path: Path) -> None:
    tensors, trained = diagonal()
    file = saved(tmp_path, tensors, {"ss_network_args": json.dumps({"split_qkv": "True"})})
    made = converted(file, tmp_path)
    for module, delta in zip(PARTS, trained, strict=True):
        torch.testing.assert_close(product(made, module), delta, rtol=1e-12, atol=0)
        assert made[f"transformer.{module}.lora_A.weight"].shape == (2, 8)


def test_side_by_side_without_that_mark_has_the_alpha_of_the_whole(tmp_path: Path) -> None:
    tensors, trained = diagonal()
    tensors[f"{QKV}.alpha"] *= 3
    made = converted(saved(tmp_path, tensors), tmp_path)
    for module, delta in zip(PARTS, trained, strict=True):
        torch.testing.assert_close(product(made, module), delta, rtol=1e-12, atol=0)


def test_one_number_outside_of_the_blocks_makes_it_an_ordinary_pair(tmp_path: Path) -> None:
    tensors, _ = diagonal()
    tensors[f"{QKV}.lora_up.weight"][23, 0] = 1.0
    made = converted(saved(tmp_path, tensors, {"ss_network_args": '{"split_qkv": "True"}'}), tmp_path)
    whole = (tensors[f"{QKV}.lora_up.weight"].double() @ tensors[f"{QKV}.lora_down.weight"].double()) / 3
    got = torch.cat([product(made, module) for module in PARTS])
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-7)  # a third is rounded once, in float32


def test_parts_that_share_nothing_are_merged_with_alpha_grown_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    want = write(FORMATS["diffusers"], "flux", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "kohya", to="kohya")
    fused = load_file(tmp_path / "kohya" / KOHYA.file)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert fused[f"{name}.lora_down.weight"].shape == (12, 8)
    assert fused[f"{name}.alpha"].item() == 6.0  # 2 of rank 4, three times
    assert fused["lora_unet_single_blocks_37_linear1.alpha"].item() == 8.0
    assert sorted(deltas(KOHYA, "flux", tmp_path / "kohya")) == sorted(want)
    loraconv.convert(tmp_path / "kohya", out=tmp_path / "back", to="diffusers", scale_in="metadata")
    first, last = (load_file(tmp_path / n / FORMATS["diffusers"].file) for n in ("in", "back"))
    assert sorted(first) == sorted(last)
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_parts_that_share_their_down_are_merged_without_growing_the_rank(tmp_path: Path) -> None:
    write(KOHYA, "flux", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "peft", to="peft")
    loraconv.convert(tmp_path / "peft", out=tmp_path / "back", to="kohya")
    first, last = (load_file(tmp_path / n / KOHYA.file) for n in ("in", "back"))
    assert sorted(first) == sorted(last)
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_missing_part_has_rows_of_zeros(tmp_path: Path) -> None:
    pairs = {k: v for m in PARTS[::2] for k, v in pair(f"transformer.{m}", seed=len(m), ends="diffusers").items()}
    single = pair("transformer.single_transformer_blocks.0.proj_out", ends="diffusers")
    loraconv.convert(saved(tmp_path, {**pairs, **single}), out=tmp_path / "out", to="kohya", family="flux")
    made = load_file(tmp_path / "out" / KOHYA.file)
    delta = made[f"{QKV}.lora_up.weight"].double() @ made[f"{QKV}.lora_down.weight"].double()
    assert made[f"{QKV}.alpha"].item() == made[f"{QKV}.lora_down.weight"].shape[0] == 12
    loraconv.convert(tmp_path / "out", out=tmp_path / "back", to="diffusers")
    back = load_file(tmp_path / "back" / FORMATS["diffusers"].file)
    assert sorted(back) == sorted([*pairs, *single])
    assert all(torch.equal(back[name], tensor) for name, tensor in (pairs | single).items())
    for n, rows in enumerate(delta.chunk(3)):
        want = product(pairs, PARTS[n]) if n != 1 else torch.zeros(8, 8, dtype=torch.float64)
        torch.testing.assert_close(rows, want, rtol=1e-12, atol=0)


def test_parts_of_different_strength_cannot_be_one_module(tmp_path: Path) -> None:
    pairs: Tensors = {}
    for rank, module in zip((4, 4, 2), PARTS, strict=True):
        pairs |= pair(f"transformer.{module}", rank=rank, ends="diffusers")
    config = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"to_v": 2}}
    file = saved(tmp_path, pairs, {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(FormatError) as caught:
        loraconv.convert(file, out=tmp_path / "out", to="kohya", family="flux")
    assert caught.value.slug == "cannot-carry"


# --- what nothing explains ------------------------------------------------------------------------------------------


Change = Callable[[Tensors], None]


def _dora(tensors: Tensors) -> None:
    tensors[f"{Q}.dora_scale"] = torch.ones(8, 1)


def _typo(tensors: Tensors) -> None:
    for name, tensor in pair("lora_unet_transformer_blocks_3_attn1_to_qq").items():
        tensors[name] = tensor


def _conv(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name][:, :, None, None].contiguous()


def _twice(tensors: Tensors) -> None:
    for name, tensor in pair("diffusion_model.blocks.0.self_attn.q", ends="comfyui").items():
        tensors[name] = tensor
        tensors[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor.clone()
    for name in [n for n in tensors if n.startswith("lora_")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "slug", "word"),
    [
        (_dora, "cannot-carry", "DoRA"),
        (_typo, "module-unknown", "transformer_blocks_0_attn1_to_q"),
        (_conv, "factor-shape", "linear layers in CogVideoX"),
        (_twice, "factor-twice", "spelled in two ways"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(change: Change, slug: str, word: str, tmp_path: Path) -> None:
    tensors = pair(Q)
    change(tensors)
    with pytest.raises(FormatError) as caught:
        loraconv.convert(saved(tmp_path, tensors), out=tmp_path / "out", to="diffusers")
    assert caught.value.slug == slug
    assert word in caught.value.why


def test_names_of_several_models_that_differ_in_the_target_need_the_family(tmp_path: Path) -> None:
    write(FORMATS["diffusers"], "cogvideox", tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="kohya")
    assert caught.value.slug == "family-ambiguous"
    loraconv.convert(tmp_path / "in", out=tmp_path / "mochi", to="kohya", family="mochi")
    assert "lora_unet_blocks_11_attn_qkv_x.alpha" in load_file(tmp_path / "mochi" / KOHYA.file)


def test_the_family_once_told_is_known_on_the_way_back(tmp_path: Path) -> None:
    write(KOHYA, "mochi", tmp_path / "in")
    loraconv.convert(tmp_path / "in", out=tmp_path / "mid", to="diffusers")
    loraconv.convert(tmp_path / "mid", out=tmp_path / "out", to="kohya")
    assert sorted(load_file(tmp_path / "in" / KOHYA.file)) == sorted(load_file(tmp_path / "out" / KOHYA.file))


def test_a_family_that_the_names_do_not_fit_is_refused(tmp_path: Path) -> None:
    write(KOHYA, "wan", tmp_path / "in")
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers", family="flux")
    assert caught.value.slug == "family"

"""FLUX control LoRAs of Black Forest Labs: against diffusers' own reader, in a real pipeline, and in other formats.

A control LoRA has factors and a bias for every linear layer, and whole norms that take the place of the base's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlPipeline, FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loraconv
from loraconv import algebra, beside, plan
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed
from loraconv.lazy import Zeros
from loraconv.written import write_vectors
from tests.public_lists import ends, every_step, public_lists

Tensors = dict[str, torch.Tensor]

LORA = "pytorch_lora_weights.safetensors"
CONTROL = "flux_control_lora.safetensors"
FINAL = "final_layer.adaLN_modulation.1"
#: A size of the real file -> one that is quick. diffusers cuts the rows of linear1 at the real width, so they stay.
SMALL = {128: 4, 256: 8, 768: 8, 3072: 8, 4096: 8, 6144: 16, 9216: 24, 12288: 32, 15360: 40, 18432: 48}


@cache
def depth(steps: Callable[[str], Sequence[str]] = every_step) -> Tensors:
    """Every key of FLUX.1-Depth-dev-lora, small. The ranks of its final layer are half of the others', as there."""
    (listed,) = (one for one in public_lists() if one.name == "bfl-control/flux-depth")
    noise = torch.Generator().manual_seed(6)
    shapes = {key: tuple(SMALL.get(size, size) for size in shape) for key, (_, shape) in listed.keys(steps).items()}
    for side, shape in {"A.weight": (2, 8), "B.weight": (64, 2), "B.bias": (64,)}.items():
        shapes[f"final_layer.linear.lora_{side}"] = shape
    return {key: torch.randn(shape, generator=noise).bfloat16() for key, shape in shapes.items()}


def few() -> Tensors:
    """The first and the last layers of :func:`depth`."""
    return depth(ends)


def saved(folder: Path, tensors: Tensors, name: str = CONTROL) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)
    return folder / name


def to_diffusers(original: Path) -> Path:
    made = loraconv.convert(original, out=original.parent.parent / "out", to="diffusers")
    assert [proof.passed for proof in made.proofs] == [True]
    return made.out / LORA


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file with every layer, and what it is converted to."""
    file = saved(tmp_path_factory.mktemp("whole") / "in", depth())
    return file, to_diffusers(file)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("control") / "in", few())


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    return to_diffusers(original)


def refused(action: Callable[[], object]) -> LoraconvError:
    with pytest.raises(LoraconvError) as caught:
        action()
    return caught.value


# --- reading, and the way back ----------------------------------------------------------------------------------------


def test_inspect_says_what_it_is_and_what_it_holds(original: Path) -> None:
    summary = loraconv.inspect(original)
    assert (summary.dialect, summary.next.rpartition(" ")[2]) == ("bfl-control", "diffusers")
    assert summary.model.startswith("FLUX.1")
    assert summary.problem == ""
    assert summary.adapter is not None
    assert (summary.adapter.ranks, summary.adapter.scales, summary.adapter.modules) == (
        (2, 4),
        ("1",),
        36 + 4 * 2 + 2 * 3,
    )
    assert {group.what: group.tensors for group in summary.contents} == {
        "LoRA with bias, 36 modules": 3 * 36,
        "whole norm, 12 modules": 12,
    }


def test_the_tensors_are_those_of_diffusers_own_reader_but_for_the_one_that_it_spoils(whole: tuple[Path, Path]) -> None:
    """It swaps the halves of norm_out's down, too, whose rows are ranks: see the next test."""
    ours, read = load_file(whole[1]), theirs._convert_bfl_flux_control_lora_to_diffusers(dict(depth()))
    assert ours.keys() == read.keys()
    assert [n for n, t in read.items() if t.dtype != ours[n].dtype] == []
    assert [n for n, t in read.items() if not torch.equal(t, ours[n])] == ["transformer.norm_out.linear.lora_A.weight"]
    assert torch.equal(ours["transformer.norm_out.linear.lora_A.weight"], depth()[f"{FINAL}.lora_A.weight"])


def test_only_the_rows_of_the_delta_are_swapped_in_norm_out(whole: tuple[Path, Path]) -> None:
    """diffusers has shift and scale the other way round, so W + B A becomes swap(W) + swap(B) A. swap(B) swap(A) is
    another delta: huggingface/diffusers#14001 mended the same for kohya's files (#13998)."""
    ours, read = load_file(whole[1]), theirs._convert_bfl_flux_control_lora_to_diffusers(dict(depth()))
    sides = [depth()[f"{FINAL}.lora_{side}.weight"].double() for side in "BA"]
    want = theirs.swap_scale_shift(sides[0] @ sides[1])
    delta, other = (
        t["transformer.norm_out.linear.lora_B.weight"].double()
        @ t["transformer.norm_out.linear.lora_A.weight"].double()
        for t in (ours, read)
    )
    assert torch.equal(delta, want)
    assert (other - want).norm() > 0.5 * want.norm()


def test_back_from_diffusers_every_byte_is_as_it_was(whole: tuple[Path, Path], tmp_path: Path) -> None:
    made = loraconv.convert(whole[1].parent, out=tmp_path / "back", to="bfl-control")
    assert [proof.passed for proof in made.proofs] == [True]
    back = load_file(tmp_path / "back" / CONTROL)
    assert back.keys() == depth().keys()
    assert [n for n, t in depth().items() if not torch.equal(t.view(torch.int16), back[n].view(torch.int16))] == []
    found = loraconv.verify(whole[0], tmp_path / "back")
    assert found.same
    assert len(found.modules) == 2 * (314 + 19 * 4 + 38 * 3) + 152  # of qkv three modules, of linear1 four
    assert all(control.caught for control in found.controls)


def test_the_header_says_that_there_are_biases_and_one_rank_of_the_last_layer_alone(converted: Path) -> None:
    """Without lora_bias peft makes no biases, and diffusers passes over them with a warning. ``proj_out`` is the end of
    other names, which peft would give its rank, too."""
    with safe_open(converted, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["transformer.lora_bias"] is True
    assert (header["transformer.r"], header["transformer.lora_alpha"]) == (4, 4)
    assert header["transformer.rank_pattern"] == header["transformer.alpha_pattern"] == {"^proj_out": 2}


def test_a_base_model_is_no_adapter_of_whole_norms(tmp_path: Path) -> None:
    norms = {name: tensor for name, tensor in few().items() if name.endswith(".scale")}
    base = {**norms, "img_in.weight": torch.ones(8, 8), "double_blocks.0.img_attn.qkv.weight": torch.ones(24, 8)}
    error = refused(lambda: loraconv.convert(saved(tmp_path / "in", base), out=tmp_path / "out", to="diffusers"))
    assert error.slug == "no-lora"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("img_in.lora_B.bias", (7,)), ("img_in.lora_B.bias", (8, 1)), ("single_blocks.0.norm.key_norm.scale", (4, 1))],
)
def test_a_vector_of_another_size_is_damage(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = saved(tmp_path / "in", {**few(), name: torch.ones(shape)})
    error = refused(lambda: loraconv.convert(file, out=tmp_path / "out", to="diffusers"))
    assert isinstance(error, CorruptCheckpoint)
    assert error.slug == "factor-shape"
    assert name.rpartition(".lora_B")[0] in error.what


def test_nan_in_a_whole_norm_is_refused(tmp_path: Path) -> None:
    name = "single_blocks.0.norm.key_norm.scale"
    file = saved(tmp_path / "in", {**few(), name: few()[name] * float("nan")})
    assert refused(lambda: loraconv.convert(file, out=tmp_path / "out", to="diffusers")).slug == "nonfinite"


# --- what other formats cannot hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["kohya", "comfyui", "peft", "onetrainer", "diffsynth"])
def test_a_format_without_biases_or_whole_norms_refuses_them_and_says_how_to_leave_them_behind(
    target: str, original: Path, tmp_path: Path
) -> None:
    error = refused(lambda: loraconv.convert(original, out=tmp_path / "out", to=target))
    assert error.slug == "cannot-carry"
    assert "36 LoRA with bias, 12 whole norm" in error.what
    assert "biases of lora_B" in error.why
    assert "--to diffusers" in error.hint
    drop = error.hint.replace("'", "").split(" --drop ")[1:]
    assert len(drop) == 3
    made = loraconv.convert(original, out=tmp_path / "out", to=target, drop=drop)
    assert [proof.passed for proof in made.proofs] == [True]
    assert len(made.dropped) == 36 + 12


def test_peft_takes_the_biases_where_the_norms_are_left_behind(original: Path, tmp_path: Path) -> None:
    made = loraconv.convert(original, out=tmp_path / "out", to="peft", drop=["*_norm.scale"])
    assert [proof.passed for proof in made.proofs] == [True]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize(
    "drop",
    [
        ["*_norm.scale"],
        ["*.scale", "*.bias"],
        ["txt_in.*"],
        ["single_blocks.*.linear2.*"],
        ["double_blocks.*.txt_mod*"],
    ],
)
def test_a_part_of_a_control_adapter_is_not_written_as_one(drop: list[str], original: Path, tmp_path: Path) -> None:
    """Its readers ask for every module, and know the file by its norms."""
    error = refused(lambda: loraconv.convert(original, out=tmp_path / "out", to="bfl-control", drop=drop))
    assert error.slug == "cannot-carry"
    assert "whole control adapters" in error.what
    loraconv.convert(original, out=tmp_path / "out", to="diffusers", drop=drop)


def test_a_bias_of_some_modules_alone_is_refused(original: Path, tmp_path: Path) -> None:
    error = refused(
        lambda: loraconv.convert(original, out=tmp_path / "out", to="diffusers", drop=["txt_in.lora_B.bias"])
    )
    assert (error.slug, error.where) == ("cannot-carry", "context_embedder")


@pytest.mark.parametrize(
    ("drop", "slug"),
    [
        (["txt_in.lora_A.*"], "half-pair"),
        (["txt_in.lora_B.weight"], "half-pair"),
        (["txt_in.*.weight"], "cannot-carry"),
    ],
)
def test_a_bias_without_its_factors_is_no_adapter(drop: list[str], slug: str, original: Path, tmp_path: Path) -> None:
    assert refused(lambda: loraconv.convert(original, out=tmp_path / "out", to="diffusers", drop=drop)).slug == slug


def test_what_needs_a_plain_lora_refuses_a_control_adapter(original: Path, converted: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    flux(4).save_pretrained(base)
    error = refused(lambda: loraconv.fuse(converted, base=base, out=tmp_path / "out"))
    assert "take the place of the base's" in error.why
    for action in (
        lambda: loraconv.fuse(original, base=base, out=tmp_path / "out"),
        lambda: loraconv.merge(original, original, out=tmp_path / "out"),
        lambda: loraconv.resize(original, out=tmp_path / "out", rank=1),
    ):
        error = refused(action)
        assert isinstance(error, FormatError)
        assert error.slug == "not-plain-lora"
        assert "whole norm" in error.what


# --- the proof --------------------------------------------------------------------------------------------------------


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


#: A mistake in the converted file -> the names that it changes, and what stands there instead (None: nothing).
BIAS, NORM = "transformer.norm_out.linear.lora_B.bias", "transformer.transformer_blocks.18.attn.norm_added_q.weight"
QKV = "transformer.single_transformer_blocks.37.attn.to_{}.lora_B.bias"
MISTAKES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "bias dropped": ("norm_out.linear.bias", lambda t: {n: x for n, x in t.items() if n != BIAS}),
    "bias not swapped": ("norm_out.linear.bias", lambda t: {**t, BIAS: _flip(t[BIAS])}),
    "bias doubled": ("norm_out.linear.bias", lambda t: {**t, BIAS: t[BIAS] * 2}),
    "biases of q and k swapped": (
        "single_transformer_blocks.37.attn.to_k.bias",
        lambda t: {**t, QKV.format("q"): t[QKV.format("k")], QKV.format("k"): t[QKV.format("q")]},
    ),
    "norm dropped": (
        "transformer_blocks.18.attn.norm_added_q.weight",
        lambda t: {n: x for n, x in t.items() if n != NORM},
    ),
    "norm changed": (
        "transformer_blocks.18.attn.norm_added_q.weight",
        lambda t: {**t, NORM: t[NORM] + torch.tensor([0, 0, 1, 0])},
    ),
    "norms of q and k swapped": (
        "transformer_blocks.18.attn.norm_added_k.weight",
        lambda t: {**t, NORM: t[NORM.replace("_q", "_k")], NORM.replace("_q", "_k"): t[NORM]},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_finds_every_mistake_with_a_bias_or_a_norm(
    mistake: str, original: Path, converted: Path, tmp_path: Path
) -> None:
    module, change = MISTAKES[mistake]
    wrong = saved(tmp_path / "wrong", change(load_file(converted)), LORA)
    found = loraconv.verify(original, wrong)
    assert not found.same
    unequal = [m.module for m in found.modules if not m.equal]
    dropped = mistake.endswith("dropped")
    assert (module in unequal) != dropped
    assert module in " ".join([*unequal, *(finding.sentence for finding in found.findings)])


def _not_swapped(vector: Any, one: Any, detected: Any) -> Any:
    return {"norm_out.linear": vector} if one.module == FINAL else algebra.rows_of(vector, one, detected)


def _a_norm_of_zeros(vector: Any, one: Any, detected: Any) -> Any:
    rows = algebra.rows_of(vector, one, detected)
    return {m: Zeros(v.dtype, v.shape) if m == "transformer_blocks.18.attn.norm_k" else v for m, v in rows.items()}


def _left_out(which: str) -> Any:
    def some(vectors: Any, columns: Any, naming: Any) -> Any:
        kept = {m: v for m, v in vectors.items() if not m.endswith(which)}
        return write_vectors(kept, columns, naming)

    return some


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rows_of", _not_swapped),
        ("rows_of", _a_norm_of_zeros),
        ("write_vectors", _left_out(".linear")),
        ("write_vectors", _left_out("to_q")),
        ("write_vectors", _left_out("norm_added_k")),
    ],
)
def test_a_wrong_conversion_does_not_pass_the_proof(
    name: str, wrong: Any, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, name, wrong)
    with pytest.raises(ProofFailed):
        loraconv.convert(original, out=tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()


def test_an_output_without_the_word_for_its_biases_does_not_pass(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers would make layers without them."""
    monkeypatch.setattr(beside, "_saying_so", lambda plan, target, family: plan)
    with pytest.raises(ProofFailed) as caught:
        loraconv.convert(original, out=tmp_path / "out", to="diffusers")
    assert "lora_bias" in caught.value.why


@pytest.mark.parametrize("left", ["*_norm.scale", "img_in.*"])
def test_a_control_file_that_its_readers_would_not_know_does_not_pass(
    left: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "refuse_parts_of_a_model", lambda target, modules: None)
    with pytest.raises(ProofFailed, match="would not load"):
        loraconv.convert(original, out=tmp_path / "out", to="bfl-control", drop=[left])


def test_norms_without_the_prefix_are_read_and_are_written_with_it(converted: Path, tmp_path: Path) -> None:
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(converted).items()}
    file = saved(tmp_path / "in", bare, LORA)
    made = loraconv.convert(file, out=tmp_path / "out", to="diffusers")
    assert [proof.passed for proof in made.proofs] == [True]
    assert load_file(tmp_path / "out" / LORA).keys() == load_file(converted).keys()


def test_whole_norms_written_without_the_prefix_do_not_pass(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers passes over them."""
    monkeypatch.setattr(beside, "fill", lambda _, fields: fields["module"].removeprefix("transformer.") + ".weight")
    with pytest.raises(ProofFailed) as caught:
        loraconv.convert(original, out=tmp_path / "out", to="diffusers")
    assert "without the prefix" in caught.value.why


def test_a_whole_norm_is_no_difference_of_one(tmp_path: Path) -> None:
    """LyCORIS adds ``w_norm`` to the base's weight."""
    pair = {
        f"diffusion_model.img_in.lora_{side}.weight": few()[f"img_in.lora_{side}.weight"].contiguous() for side in "AB"
    }
    norm = few()["single_blocks.0.norm.key_norm.scale"]
    one = saved(tmp_path / "one", {**pair, "diffusion_model.single_blocks.0.norm.key_norm.w_norm": norm})
    whole = {n.removeprefix("diffusion_model."): t for n, t in pair.items()}
    two = saved(tmp_path / "two", {**whole, "single_blocks.0.norm.key_norm.scale": norm})
    found = loraconv.verify(one, two)
    assert not found.same
    assert [m.module for m in found.modules] == ["x_embedder"]


# --- a real pipeline --------------------------------------------------------------------------------------------------


def flux(channels: int) -> FluxTransformer2DModel:
    torch.manual_seed(2)
    model = FluxTransformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model.double()


def fused_modules() -> dict[str, tuple[str, ...]]:
    """Black Forest Labs' modules of :func:`flux`, and the diffusers modules whose rows they have, one after another."""
    made: dict[str, tuple[str, ...]] = {
        "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
        FINAL: ("norm_out.linear",),
    }  # fmt: skip
    for there, here in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        made |= {
            f"{there}_in.{layer}_layer": (f"time_text_embed.{here}_embedder.linear_{number}",)
            for layer, number in (("in", 1), ("out", 2))
        }
    for n in (0, 1):
        here = f"transformer_blocks.{n}"
        for side, qkv, out, ff, norm in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
        ):
            begin = f"double_blocks.{n}.{side}"
            made[f"{begin}_attn.qkv"] = tuple(f"{here}.attn.{q}" for q in qkv)
            made[f"{begin}_attn.proj"] = (f"{here}.attn.{out}",)
            made[f"{begin}_mlp.0"], made[f"{begin}_mlp.2"] = (f"{here}.{ff}.net.0.proj",), (f"{here}.{ff}.net.2",)
            made[f"{begin}_mod.lin"] = (f"{here}.{norm}.linear",)
        single = f"single_{here}"
        made[f"single_blocks.{n}.linear1"] = (*(f"{single}.attn.to_{q}" for q in "qkv"), f"{single}.proj_mlp")
        made[f"single_blocks.{n}.linear2"] = (f"{single}.proj_out",)
        made[f"single_blocks.{n}.modulation.lin"] = (f"{single}.norm.linear",)
    return made


NORMS = {
    **{
        f"double_blocks.{n}.{side}_attn.norm.{word}_norm": f"transformer_blocks.{n}.attn.norm_{added}{word[0]}"
        for n in (0, 1)
        for side, added in (("img", ""), ("txt", "added_"))
        for word in ("query", "key")
    },
    **{
        f"single_blocks.{n}.norm.{word}_norm": f"single_transformer_blocks.{n}.attn.norm_{word[0]}"
        for n in (0, 1)
        for word in ("query", "key")
    },
}


def applied(base: Tensors) -> tuple[Tensors, Tensors]:
    """A control LoRA of the small model, and the model's weights with it by its definition, in float64: on Black Forest
    Labs' modules ``W + B A`` and ``bias + lora_B.bias``, W as wide as A; norms replaced."""
    noise, lora, made = torch.Generator().manual_seed(7), dict[str, torch.Tensor](), dict(base)
    for there, heres in fused_modules().items():
        weight = torch.cat([base[f"{here}.weight"] for here in heres])
        bias = torch.cat([base[f"{here}.bias"] for here in heres])
        columns, rank = 8 if there == "img_in" else weight.shape[1], 2 if there == "final_layer.linear" else 4
        a, b = torch.randn(rank, columns, generator=noise), torch.randn(len(weight), rank, generator=noise)
        c = torch.randn(len(weight), generator=noise)
        lora |= {f"{there}.lora_A.weight": a / columns, f"{there}.lora_B.weight": b, f"{there}.lora_B.bias": c}
        delta, more = b.double() @ (a / columns).double(), c.double()
        if there == FINAL:  # shift and scale there, scale and shift here
            delta, more = _flip(delta), _flip(more)
        wide = torch.nn.functional.pad(weight, (0, columns - weight.shape[1])) + delta
        rows = [len(base[f"{here}.weight"]) for here in heres]
        for here, w, o in zip(heres, wide.split(rows), (bias + more).split(rows), strict=True):
            made[f"{here}.weight"], made[f"{here}.bias"] = w, o
    for there, here in NORMS.items():
        lora[f"{there}.scale"] = torch.randn(16, generator=noise)
        made[f"{here}.weight"] = lora[f"{there}.scale"].double()
    return lora, made


def forward(model: FluxTransformer2DModel, channels: int = 8) -> torch.Tensor:
    noise = torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    with torch.no_grad():
        return model(
            hidden_states=drawn(1, 6, channels),
            encoder_hidden_states=drawn(1, 5, 24),
            pooled_projections=drawn(1, 20),
            timestep=torch.tensor([0.3], dtype=torch.float64),
            guidance=torch.tensor([3.5], dtype=torch.float64),
            img_ids=torch.arange(18.0).reshape(6, 3),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]


def pipeline(file: Path) -> FluxControlPipeline:
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    made = FluxControlPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=flux(4), **nothing)
    made.load_lora_weights(file.parent, weight_name=file.name)
    return made


def test_the_real_pipeline_computes_what_the_control_lora_says(tmp_path: Path) -> None:
    base = flux(4).state_dict()
    lora, weights = applied(base)
    file = saved(tmp_path / "in", lora)
    loraconv.convert(file, out=tmp_path / "out", to="diffusers")
    model = pipeline(tmp_path / "out" / LORA).transformer
    assert model.config.in_channels == 8
    want = flux(8)
    want.load_state_dict(weights)
    out, expected = forward(model), forward(want)
    assert (out - expected).norm() <= 1e-12 * expected.norm()
    # Each part of it moves the output by far more than that.
    for parts in ("lora_B.bias", "_norm.scale"):
        less = saved(tmp_path / parts, {n: t for n, t in lora.items() if not n.endswith(parts)})
        loraconv.convert(less, out=tmp_path / f"without {parts}", to="diffusers")
        other = forward(pipeline(tmp_path / f"without {parts}" / LORA).transformer)
        assert (other - expected).norm() > 1e-3 * expected.norm()

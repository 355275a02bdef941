"""Runs in every layout the trainer can leave: what converts, what is refused and why, and what is said."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError
from tests.forward import forward, make_transformer, relative_l2
from tests.sat_run import DIT, RunSpec, Variant, build, payload, rank_state, save
from tests.support import (
    BASE_FILE,
    DTYPE_NAMES,
    LORA_FILE,
    add_lora,
    expected,
    folded_adapter,
    inputs_of,
    load_transformer,
    merged,
    modules_of,
    no_warnings,
    rewrite,
    same_bits,
    scale_of,
    set_lora_params,
    small,
    written_deltas,
)

GENERATIONS = [
    ("2b", "early"),
    ("2b", "late"),
    ("5b", "early"),
    ("5b", "late"),
    ("5b-i2v", "early"),
    ("5b-i2v", "late"),
    ("1.5-5b", "late"),
    ("1.5-5b-i2v", "late"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)


def to_lora(source: Path, out: Path, **options: Any) -> loraconv.ConvertResult:
    return loraconv.sat2diffusers(source, out=out, **options)


def to_base(source: Path, out: Path, **options: Any) -> loraconv.ConvertResult:
    return loraconv.sat2diffusers(source, out=out, what="base", **options)


def refused(kind: type[LoraconvError], slug: str, action: Callable[[], object], folder: Path) -> LoraconvError:
    """Assert that ``action`` is refused with this slug, with a way on, and leaves nothing in ``folder``."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(kind) as caught:
        action()
    assert sorted(folder.rglob("*")) == before
    error = caught.value
    assert error.slug == slug, str(error)
    assert error.what
    assert error.hint
    return error


def check_lora(spec: RunSpec, out: Path) -> None:
    """The adapter is the trained one with its scale in ``up``, in the trained dtype, bit for bit."""
    same_bits(load_file(out / LORA_FILE), folded_adapter(expected(spec).adapter, scale_of(spec)))


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "generation"), GENERATIONS)
def test_every_model_and_code_generation_converts_and_computes_the_same(
    variant: Variant, generation: Any, tmp_path: Path
) -> None:
    spec = small(variant=variant, generation=generation)
    out = tmp_path / "out"
    to_lora(build(spec, tmp_path), out, what="all")
    check_lora(spec, out)
    same_bits(load_file(out / "transformer" / BASE_FILE), expected(spec).base)
    with no_warnings():
        transformer = load_transformer(out / "transformer")
        add_lora(transformer, out)
    got = forward(transformer, inputs_of(spec))
    truth = make_transformer(transformer.config, merged(expected(spec), scale_of(spec)))
    assert relative_l2(got, forward(truth, inputs_of(spec))) <= 1e-6


@pytest.mark.parametrize(("variant", "generation"), GENERATIONS)
def test_the_configuration_follows_the_model(variant: Variant, generation: Any, tmp_path: Path) -> None:
    spec = small(variant=variant, generation=generation)
    to_base(build(spec, tmp_path), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    frames, height, width = spec.video
    assert config["_class_name"] == "CogVideoXTransformer3DModel"
    assert config["num_layers"] == 2
    assert config["num_attention_heads"] * config["attention_head_dim"] == 64
    assert config["in_channels"] == (32 if variant.endswith("i2v") else 16)
    assert config["patch_size_t"] == (2 if variant.startswith("1.5") else None)
    assert config["ofs_embed_dim"] == (spec.time_embed_dim if variant == "1.5-5b-i2v" else None)
    assert config["use_rotary_positional_embeddings"] is (variant != "2b")
    assert config["use_learned_positional_embeddings"] is (variant == "5b-i2v")
    assert config["patch_bias"] is not variant.startswith("1.5")
    assert (config["sample_frames"], config["sample_height"], config["sample_width"]) == (frames, height, width)


@pytest.mark.parametrize(("variant", "layers"), [("2b", 30), ("5b", 42)])
def test_the_number_of_layers_is_what_the_file_holds(variant: Variant, layers: int, tmp_path: Path) -> None:
    spec = small(variant=variant, num_layers=layers, hidden=32, heads=2, time_embed_dim=4, rank=2)
    run = build(spec, tmp_path)
    result = to_lora(run, tmp_path / "out", what="all")
    assert len(load_file(tmp_path / "out" / LORA_FILE)) == 8 * layers
    check_lora(spec, tmp_path / "out")
    same_bits(load_file(tmp_path / "out" / "transformer" / BASE_FILE), expected(spec).base)
    assert result.source.adapter is not None
    assert result.source.adapter.layers == f"0...{layers - 1}"


@pytest.mark.parametrize(("layers", "named"), [((0, 2), "0, 2"), ((1,), "1"), ((3, 2, 1), "1...3"), ((11, 1), "1, 11")])
def test_only_the_layers_in_the_range_are_converted_and_named(
    layers: tuple[int, ...], named: str, tmp_path: Path
) -> None:
    spec = small(layer_range=layers, num_layers=max(layers) + 2)
    run, out = build(spec, tmp_path), tmp_path / "out"
    summary = loraconv.inspect(run)
    assert summary.adapter is not None
    assert summary.adapter.layers == named
    assert summary.adapter.modules == 4 * len(layers)
    to_lora(run, out, what="all")
    check_lora(spec, out)
    touched = {name.split(".")[1] for name in modules_of(load_file(out / LORA_FILE))}
    assert touched == {str(layer) for layer in layers}
    with no_warnings():
        transformer = load_transformer(out / "transformer")
        add_lora(transformer, out)
    truth = make_transformer(transformer.config, merged(expected(spec), scale_of(spec)))
    assert relative_l2(forward(transformer, inputs_of(spec)), forward(truth, inputs_of(spec))) <= 1e-6


# --- alpha and rank -------------------------------------------------------------------------------------------------


def test_alpha_is_taken_from_the_settings_without_a_notice(tmp_path: Path) -> None:
    spec = small(lora_alpha=16.0)
    result = to_lora(build(spec, tmp_path), tmp_path / "out", strict=True)
    check_lora(spec, tmp_path / "out")
    assert not any("alpha" in notice for notice in result.notices)
    assert result.source.adapter is not None
    assert result.source.adapter.alphas == ("16",)
    assert result.source.adapter.alpha_sources == ("training_config.yaml",)
    assert result.source.adapter.scales == ("4",)


@pytest.mark.parametrize("with_yaml", [True, False])
def test_alpha_is_one_with_a_notice_where_no_file_says_it(with_yaml: bool, tmp_path: Path) -> None:
    spec = small(yaml=with_yaml)
    result = to_lora(build(spec, tmp_path), tmp_path / "out")
    check_lora(spec, tmp_path / "out")
    (notice,) = (n for n in result.notices if "alpha" in n)
    assert "lora_alpha = 1" in notice
    assert "--alpha" in notice
    assert ("training_config.yaml does not set it" if with_yaml else "no settings file") in notice


@pytest.mark.parametrize("with_yaml", [True, False])
def test_a_mere_convention_is_refused_when_strict(with_yaml: bool, tmp_path: Path) -> None:
    run = build(small(yaml=with_yaml), tmp_path)
    error = refused(FormatError, "alpha-unknown", lambda: to_lora(run, tmp_path / "out", strict=True), tmp_path)
    assert "--alpha" in error.hint


def test_a_given_alpha_wins_and_a_disagreement_is_said(tmp_path: Path) -> None:
    spec = small(lora_alpha=16.0)
    run = build(spec, tmp_path)
    result = to_lora(run, tmp_path / "out", alpha=2.0, strict=True)
    check_lora(replace(spec, lora_alpha=2.0), tmp_path / "out")
    (notice,) = (n for n in result.notices if "alpha" in n)
    assert "training_config.yaml says 16" in notice
    assert "--alpha" in notice
    same = to_lora(run, tmp_path / "same", alpha=16.0)
    assert not any("alpha" in notice for notice in same.notices)


def test_a_given_alpha_fills_the_gap_without_a_notice(tmp_path: Path) -> None:
    spec = small(yaml=False)
    result = to_lora(build(spec, tmp_path), tmp_path / "out", alpha=8, strict=True)
    check_lora(replace(spec, lora_alpha=8), tmp_path / "out")
    assert not any("alpha" in notice for notice in result.notices)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_strength_is_refused(alpha: float, tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    with pytest.raises(LoraconvError) as caught:
        to_lora(run, tmp_path / "out", alpha=alpha)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", ["sixteen", [16], True, float("nan"), float("inf"), {"a": 1}])
def test_an_alpha_in_the_settings_that_is_no_number_is_refused(alpha: Any, tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    set_lora_params(run, lora_alpha=alpha)
    with pytest.raises(LoraconvError) as caught:
        to_lora(run, tmp_path / "out")
    assert caught.value.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [0, -4])
def test_an_alpha_in_the_settings_that_is_not_above_zero_is_not_passed_over(alpha: int, tmp_path: Path) -> None:
    """SAT would train with it, so the strength is zero or negative: kept exactly or refused, never replaced."""
    spec = small(lora_alpha=alpha)
    run = build(spec, tmp_path)
    with contextlib.suppress(LoraconvError):
        to_lora(run, tmp_path / "out")
        got = written_deltas(tmp_path / "out")
        pairs = modules_of(expected(spec).adapter)
        assert all(torch.equal(got[m], alpha / 4 * (up.double() @ down.double())) for m, (down, up) in pairs.items())


def test_a_declared_rank_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    run = build(small(rank=4), tmp_path)
    set_lora_params(run, r=8)
    error = refused(FormatError, "rank-contradiction", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    assert "8" in error.what
    assert "4" in error.what


def test_settings_with_tags_are_refused_and_not_executed(tmp_path: Path) -> None:
    run, canary = build(small(), tmp_path), tmp_path / "canary"
    file = run / "training_config.yaml"
    file.write_text(f"{file.read_text()}\nextra: !!python/object/apply:os.system ['touch {canary}']\n")
    with pytest.raises(LoraconvError) as caught:
        to_lora(run, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "training_config.yaml" in str(caught.value)
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_the_settings_beside_the_iteration_are_found_for_a_single_file(tmp_path: Path) -> None:
    spec = small(lora_alpha=16.0)
    run = build(spec, tmp_path)
    shutil.move(run / "training_config.yaml", run / "2" / "training_config.yaml")
    to_lora(run / "2" / "mp_rank_00_model_states.pt", tmp_path / "out", strict=True)
    check_lora(spec, tmp_path / "out")


# --- dtypes ---------------------------------------------------------------------------------------------------------


@by_dtype
def test_the_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    spec = small(dtype=dtype, lora_alpha=16.0)
    to_lora(build(spec, tmp_path), tmp_path / "out", what="all")
    check_lora(spec, tmp_path / "out")
    same_bits(load_file(tmp_path / "out" / "transformer" / BASE_FILE), expected(spec).base)


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours of ``dtype`` around each value."""
    digits, least = {torch.float16: (11, -24), torch.bfloat16: (8, -133), torch.float32: (24, -149)}[dtype]
    exponent = torch.frexp(value).exponent - digits
    return 0.5 * torch.exp2(exponent.clamp(min=least).double())


@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
@pytest.mark.parametrize("target", DTYPES, ids=DTYPE_NAMES.get)
@by_dtype
def test_a_cast_is_within_half_a_unit_of_the_last_place(
    dtype: torch.dtype, target: torch.dtype, scale_in: str, tmp_path: Path
) -> None:
    spec = small(dtype=dtype, rank=3, lora_alpha=5.0)
    to_lora(build(spec, tmp_path), tmp_path / "out", dtype=DTYPE_NAMES[target], scale_in=scale_in)
    got = load_file(tmp_path / "out" / LORA_FILE)
    for name, tensor in expected(spec).adapter.items():
        scale = 5 / 3 if scale_in == "fold" and ".lora_B." in name else 1.0
        exact = tensor.double() * scale
        assert got[name].dtype == target
        slack = 1 + 1e-9  # the float64 product above is itself rounded
        assert bool(((got[name].double() - exact).abs() <= slack * half_ulp(exact, target)).all()), name


@by_dtype
def test_a_cast_base_is_what_torch_makes_of_it(dtype: torch.dtype, tmp_path: Path) -> None:
    spec = small()
    to_base(build(spec, tmp_path), tmp_path / "out", dtype=DTYPE_NAMES[dtype])
    want = {name: tensor.to(dtype) for name, tensor in expected(spec).base.items()}
    same_bits(load_file(tmp_path / "out" / BASE_FILE), want)


def test_an_unknown_dtype_is_a_usage_error(tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    with pytest.raises(loraconv.LoraconvError) as caught:
        to_lora(run, tmp_path / "out", dtype="fp8")
    assert caught.value.exit_code == 2


def test_an_fp16_adapter_that_would_underflow_is_widened_and_exact(tmp_path: Path) -> None:
    spec = small(dtype=torch.float16, rank=128, b_std=1e-6)
    result = to_lora(build(spec, tmp_path), tmp_path / "out")
    want = folded_adapter({k: t.float() for k, t in expected(spec).adapter.items()}, 1 / 128)
    same_bits(load_file(tmp_path / "out" / LORA_FILE), want)
    in_half = folded_adapter(expected(spec).adapter, 1 / 128, torch.float16)
    assert any(not torch.equal(in_half[name].double(), tensor.double()) for name, tensor in want.items())
    assert any("F32" in notice for notice in result.notices)


@pytest.mark.parametrize("alpha", [1.0, 256.0])
@by_dtype
def test_a_power_of_two_that_fits_is_folded_without_widening(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    if dtype == torch.float16:
        alpha *= 128  # a factor below one would push the smallest of many fp16 numbers out of the range
    spec = small(dtype=dtype, rank=128, lora_alpha=alpha)
    result = to_lora(build(spec, tmp_path), tmp_path / "out")
    check_lora(spec, tmp_path / "out")
    assert not any("F32" in notice for notice in result.notices)


# --- odd contents ---------------------------------------------------------------------------------------------------


def test_unequal_parts_convert_as_a_lora_and_are_refused_as_a_base(tmp_path: Path) -> None:
    spec = small(partition=(2, 1, 1))
    run = build(spec, tmp_path)
    to_lora(run, tmp_path / "out")
    check_lora(spec, tmp_path / "out")
    found = {m.rpartition(".")[2]: tuple(up.shape) for m, (_, up) in modules_of(expected(spec).adapter).items()}
    assert found == {"to_q": (64, 4), "to_k": (32, 4), "to_v": (32, 4), "0": (64, 4)}
    error = refused(FormatError, "partition-unequal", lambda: to_base(run, tmp_path / "base"), tmp_path)
    assert "--what lora" in error.hint


def test_an_untrained_adapter_converts_and_is_said_to_do_nothing(tmp_path: Path) -> None:
    result = to_lora(build(small(zero_b=True), tmp_path), tmp_path / "out")
    assert any("does nothing" in notice for notice in result.notices)
    assert all(not up.any() for _, up in modules_of(load_file(tmp_path / "out" / LORA_FILE)).values())


def test_a_trained_adapter_is_not_said_to_do_nothing(tmp_path: Path) -> None:
    result = to_lora(build(small(), tmp_path), tmp_path / "out")
    assert not any("nothing" in notice for notice in result.notices)


@by_dtype
@pytest.mark.parametrize("part", ["layers.1.attention.dense.matrix_B", "layers.0.attention.query_key_value.matrix_A.2"])
def test_nan_in_a_factor_is_refused_by_name(dtype: torch.dtype, part: str, tmp_path: Path) -> None:
    run = build(small(nan_in=(part,), dtype=dtype), tmp_path)
    error = refused(CorruptCheckpoint, "nonfinite", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    assert error.exit_code == 4
    assert part in error.where
    assert "1 tensor" in error.what


def test_nan_in_the_frozen_base_does_not_stop_the_lora_but_stops_the_base(tmp_path: Path) -> None:
    spec = small(nan_in=("final_layernorm.weight",))
    run = build(spec, tmp_path)
    to_lora(run, tmp_path / "out")
    check_lora(spec, tmp_path / "out")
    refused(CorruptCheckpoint, "nonfinite", lambda: to_base(run, tmp_path / "base"), tmp_path)


def test_nan_converts_when_it_is_allowed_and_is_said(tmp_path: Path) -> None:
    spec = small(nan_in=("layers.1.attention.dense.matrix_B",))
    result = to_lora(build(spec, tmp_path), tmp_path / "out", allow_nonfinite=True)
    assert any("NaN" in notice for notice in result.notices)
    got, want = load_file(tmp_path / "out" / LORA_FILE), folded_adapter(expected(spec).adapter, scale_of(spec))
    for name, tensor in want.items():
        assert torch.equal(got[name].isnan(), tensor.isnan()), name
        assert torch.equal(got[name].nan_to_num(), tensor.nan_to_num()), name
    assert sum(bool(t.isnan().any()) for t in got.values()) == 1


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_a_full_fine_tune_is_no_lora_but_a_base(variant: Variant, tmp_path: Path) -> None:
    spec = small(kind="full", variant=variant, generation="late")
    run = build(spec, tmp_path)
    error = refused(FormatError, "no-lora", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    assert "full fine-tune" in error.what
    assert "--what base" in error.hint
    assert str(run) in error.hint
    to_base(run, tmp_path / "out")
    same_bits(load_file(tmp_path / "out" / BASE_FILE), expected(spec).base)


def test_tensors_trained_besides_the_lora_are_reported(tmp_path: Path) -> None:
    spec = small()
    run, name = build(spec, tmp_path), f"{DIT}transformer.final_layernorm.weight"

    def train_more(content: dict[str, Any]) -> None:
        content["param_shapes"][0][name] = content["module"][name].shape
        content["frozen_param_shapes"].pop(name)

    result = to_lora(rewrite(spec, run, train_more), tmp_path / "out")
    check_lora(spec, tmp_path / "out")
    assert any(name in notice and "trained" in notice for notice in result.notices)
    plain = to_lora(build(spec, tmp_path), tmp_path / "plain")
    assert not any("trained" in notice for notice in plain.notices)


def test_unknown_tensors_in_the_base_are_refused_by_name(tmp_path: Path) -> None:
    spec = small()
    run, name = build(spec, tmp_path), f"{DIT}transformer.layers.0.attention.memory.weight"

    def add(content: dict[str, Any]) -> None:
        content["module"][name] = torch.ones(2, 2)

    rewrite(spec, run, add)
    error = refused(FormatError, "keys-unknown", lambda: to_base(run, tmp_path / "base"), tmp_path)
    assert name in error.where
    assert any(name in " ".join(group.names) for group in loraconv.inspect(run).contents if "not" in group.what)
    to_lora(run, tmp_path / "out")
    check_lora(spec, tmp_path / "out")


def test_a_lora_on_a_module_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    spec = small()

    def add(content: dict[str, Any]) -> None:
        for side, shape in (("A", (4, 64)), ("B", (64, 4))):
            content["module"][f"{DIT}transformer.layers.0.cross_attention.dense.matrix_{side}.0"] = torch.ones(shape)

    run = rewrite(spec, build(spec, tmp_path), add)
    error = refused(FormatError, "module-unknown", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    assert "cross_attention" in error.where


@pytest.mark.parametrize("side", ["A", "B"])
def test_half_a_factor_pair_is_refused_by_name(side: str, tmp_path: Path) -> None:
    spec = small()

    def remove(content: dict[str, Any]) -> None:
        del content["module"][f"{DIT}transformer.layers.1.attention.dense.matrix_{side}.0"]

    run = rewrite(spec, build(spec, tmp_path), remove)
    error = refused(CorruptCheckpoint, "factor-missing", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    assert "1.attn1.to_out.0" in error.where


def test_a_missing_base_layer_is_refused(tmp_path: Path) -> None:
    spec = small(num_layers=3)

    def remove(content: dict[str, Any]) -> None:
        for name in [n for n in content["module"] if ".layers.1." in n]:
            del content["module"][name]

    run = rewrite(spec, build(spec, tmp_path), remove)
    with pytest.raises(LoraconvError) as caught:
        to_base(run, tmp_path / "out")
    assert caught.value.exit_code in (3, 4)


@pytest.mark.parametrize("name", ["mlp.dense_h_to_4h.bias", "attention.query_key_value.original.bias"])
def test_a_base_that_lacks_one_tensor_is_refused(name: str, tmp_path: Path) -> None:
    spec = small()

    def remove(content: dict[str, Any]) -> None:
        del content["module"][f"{DIT}transformer.layers.1.{name}"]

    run = rewrite(spec, build(spec, tmp_path), remove)
    with pytest.raises(LoraconvError) as caught:
        to_base(run, tmp_path / "out")
    assert caught.value.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()


# --- model parallelism and ZeRO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_the_base_of_several_ranks_is_the_unsplit_one(kind: Any, size: int, variant: Variant, tmp_path: Path) -> None:
    spec = small(kind=kind, mp_size=size, variant=variant, generation="late", mp_drift=kind == "lora")
    to_base(build(spec, tmp_path), tmp_path / "out")
    same_bits(load_file(tmp_path / "out" / BASE_FILE), expected(replace(spec, mp_size=1)).base)


@pytest.mark.parametrize("size", [2, 4])
def test_any_rank_file_stands_for_all_ranks(size: int, tmp_path: Path) -> None:
    run = build(small(kind="full", mp_size=size), tmp_path)
    for rank in range(size):
        to_base(run / "2" / f"mp_rank_{rank:02d}_model_states.pt", tmp_path / f"out-{rank}")
    made = {(tmp_path / f"out-{rank}" / BASE_FILE).read_bytes() for rank in range(size)}
    assert len(made) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_the_nearest_lora_of_ranks_that_did_not_drift_is_the_mean_of_what_they_added(size: int, tmp_path: Path) -> None:
    spec = small(mp_size=size)
    run = build(spec, tmp_path)
    refused(FormatError, "model-parallel-lora", lambda: to_lora(run, tmp_path / "out"), tmp_path)
    to_lora(run, tmp_path / "out", nearest=True)
    got = written_deltas(tmp_path / "out")
    for name, (down, up) in modules_of(expected(spec).adapter).items():
        share = 1 / size if name.endswith("to_out.0") else 1.0
        want = share * scale_of(spec) * (up.double() @ down.double())
        assert relative_l2(got[name], want) <= 2**-23, name


@pytest.mark.parametrize("missing", [0, 1, 3])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_missing_rank_is_refused_by_number(missing: int, kind: Any, tmp_path: Path) -> None:
    run = build(small(mp_size=4, kind=kind), tmp_path)
    (run / "2" / f"mp_rank_{missing:02d}_model_states.pt").unlink()
    for action in (lambda: to_base(run, tmp_path / "out"), lambda: to_lora(run, tmp_path / "out", nearest=True)):
        error = refused(FormatError, "rank-missing", action, tmp_path)
        assert f"rank {missing} of 4" in error.why


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_rank_that_is_a_copy_of_another_is_refused(kind: Any, tmp_path: Path) -> None:
    run = build(small(mp_size=2, kind=kind), tmp_path)
    shutil.copy(run / "2" / "mp_rank_00_model_states.pt", run / "2" / "mp_rank_01_model_states.pt")
    refused(CorruptCheckpoint, "rank-duplicate", lambda: to_base(run, tmp_path / "out"), tmp_path)
    if kind == "lora":
        with pytest.raises(CorruptCheckpoint):
            to_lora(run, tmp_path / "out", nearest=True)


def test_a_rank_under_two_names_is_refused(tmp_path: Path) -> None:
    run = build(small(mp_size=2, kind="full"), tmp_path)
    shutil.copy(run / "2" / "mp_rank_01_model_states.pt", run / "2" / "mp_rank_1_model_states.pt")
    refused(CorruptCheckpoint, "rank-duplicate", lambda: to_base(run, tmp_path / "out"), tmp_path)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_ranks_of_two_runs_are_refused(kind: Any, tmp_path: Path) -> None:
    run = build(small(mp_size=2, kind=kind, seed=1), tmp_path / "one")
    other = build(small(mp_size=2, kind=kind, seed=2), tmp_path / "two")
    shutil.copy(other / "2" / "mp_rank_01_model_states.pt", run / "2")
    refused(CorruptCheckpoint, "rank-mixed", lambda: to_base(run, tmp_path / "out"), tmp_path)
    if kind == "lora":
        with pytest.raises(CorruptCheckpoint):
            to_lora(run, tmp_path / "out", nearest=True)


def test_ranks_of_two_runs_on_one_base_are_refused_as_a_lora(tmp_path: Path) -> None:
    """Two runs on the same base model differ in their LoRA alone; drift between ranks of one run is a thousandth."""
    spec = small(mp_size=2, mp_drift=True)
    run = build(spec, tmp_path)
    module, other = rank_state(spec, 1), rank_state(replace(spec, seed=5), 1)
    for name in module:
        if ".matrix_" in name:
            module[name] = other[name]
    save(spec, payload(spec, module, 1), run / "2" / "mp_rank_01_model_states.pt")
    with pytest.raises(CorruptCheckpoint):
        to_lora(run, tmp_path / "out", nearest=True)


def test_ranks_of_runs_of_different_size_are_refused(tmp_path: Path) -> None:
    run = build(small(mp_size=2, kind="full"), tmp_path / "one")
    other = build(small(mp_size=4, kind="full"), tmp_path / "two")
    shutil.copy(other / "2" / "mp_rank_01_model_states.pt", run / "2")
    with pytest.raises(LoraconvError) as caught:
        to_base(run, tmp_path / "out")
    assert caught.value.exit_code in (3, 4)


def test_one_more_rank_than_the_run_had_is_refused(tmp_path: Path) -> None:
    run = build(small(kind="full"), tmp_path)
    shutil.copy(run / "2" / "mp_rank_00_model_states.pt", run / "2" / "mp_rank_01_model_states.pt")
    with pytest.raises(CorruptCheckpoint) as caught:
        to_base(run, tmp_path / "out")
    assert caught.value.slug in ("rank-extra", "rank-duplicate")


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_a_whole_zero_3_file_converts(kind: Any, variant: Variant, tmp_path: Path) -> None:
    spec = small(zero3="whole", kind=kind, variant=variant)
    run = build(spec, tmp_path)
    to_base(run, tmp_path / "base")
    same_bits(load_file(tmp_path / "base" / BASE_FILE), expected(spec).base)
    if kind == "lora":
        to_lora(run, tmp_path / "out")
        check_lora(spec, tmp_path / "out")


def test_a_part_of_a_zero_3_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    run = build(small(zero3="part"), tmp_path)
    for action in (
        lambda: to_lora(run, tmp_path / "out"),
        lambda: to_base(run, tmp_path / "out"),
        lambda: loraconv.convert(run, out=tmp_path / "out", to="peft"),
    ):
        error = refused(FormatError, "zero3-partial", action, tmp_path)
        assert "model.diffusion_model." in error.where
        assert "ZeRO" in error.why
    summary = loraconv.inspect(run)
    assert summary.adapter is None
    assert summary.problem


# --- everything else in a checkpoint --------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-0-fp16": {"zero_stage": 0, "dtype": torch.float16, "lora_alpha": 16.0},
    "zero-1": {"zero_stage": 1},
    "no-rng": {"rng": False},
    "ema": {"ema": True},
    "deepspeed-0.15": {"deepspeed_015": True},
    "extras": {"extras": True},
    "second-copy": {"second_copy": True},
    "on-a-gpu": {"location": "cuda:0"},
    "no-vae": {"vae_channels": 0},
    "with-vae": {"vae_channels": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_payload_converts(layout: str, tmp_path: Path) -> None:
    spec = small(**LAYOUTS[layout])
    to_lora(build(spec, tmp_path), tmp_path / "out", what="all")
    check_lora(spec, tmp_path / "out")
    same_bits(load_file(tmp_path / "out" / "transformer" / BASE_FILE), expected(spec).base)


def test_everything_in_the_file_is_named(tmp_path: Path) -> None:
    spec = small(extras=True, vae_channels=4, variant="5b", generation="early")
    run = build(spec, tmp_path)
    groups = {group.what: group for group in loraconv.inspect(run).contents}
    named = " ".join(name for group in groups.values() for name in group.names)
    content = payload(spec, rank_state(spec, 0))
    for key in content.keys() - {"module"}:
        assert key in named, key
    assert "Namespace" in named
    assert "LossScaler" in named
    assert groups["VAE"].tensors == sum(name.startswith("first_stage_model.") for name in content["module"])
    assert groups["text encoder"].tensors == sum(name.startswith("conditioner.") for name in content["module"])
    assert groups["LoRA factors"].tensors == 16
    counted = sum(g.tensors for g in groups.values() if "trainer" not in g.what)
    assert counted == len(content["module"])
    assert "freqs_sin" in " ".join(groups["known, not needed"].names)


SPY = """
    import sys
    bad = []
    watched = ("os.system", "subprocess.Popen", "socket.connect", "pickle.find_class", "os.exec", "os.posix_spawn")
    heavy = ("deepspeed", "torch", "diffusers", "peft")
    def spy(event, args):
        if event in watched or (event == "import" and args[0].partition(".")[0] in heavy):
            bad.append((event, str(args)[:80]))
    sys.addaudithook(spy)
    import loraconv
    run, out = sys.argv[1:3]
    for call in (
        lambda: loraconv.inspect(run),
        lambda: loraconv.sat2diffusers(run, out=out + "/lora"),
        lambda: loraconv.sat2diffusers(run, out=out + "/base", what="base"),
        lambda: loraconv.sat2diffusers(run, out=out + "/bf16", dtype="bf16"),
    ):
        call()
        assert "torch" not in sys.modules
    assert not bad, bad
"""


@pytest.mark.parametrize("layout", ["extras", "deepspeed-0.15", "zero-0"])
def test_nothing_in_the_file_is_executed_and_torch_is_not_imported(layout: str, tmp_path: Path) -> None:
    run = build(small(**LAYOUTS[layout]), tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SPY), str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["convert", "demo", "formats", "inspect", "sat2diffusers"])
def test_public_functions_stay_callable_after_each_other(first: str) -> None:
    code = f"""
        import loraconv
        getattr(loraconv, {first!r})
        import loraconv.cli
        names = ("convert", "demo", "formats", "inspect", "sat2diffusers")
        shadowed = [name for name in names if not callable(getattr(loraconv, name))]
        assert not shadowed, shadowed
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_origin_of_alpha_is_written_down(tmp_path: Path) -> None:
    for spec, source in ((small(lora_alpha=16.0), "training_config.yaml"), (small(), "sat default")):
        out = tmp_path / source.replace(" ", "-")
        to_lora(build(spec, tmp_path / "runs"), out)
        assert source in (out / "loraconv.json").read_text()
        shutil.rmtree(tmp_path / "runs")

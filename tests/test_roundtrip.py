"""There and back again: nothing changes on the way, and what a format cannot hold is refused."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import FormatError, LoraconvError
from loraconv.scale import _place
from loraconv.verifier.oracles import by_pattern
from tests.sat_run import DIT, RunSpec, build
from tests.support import (
    DTYPE_NAMES,
    LORA_FILE,
    LORA_PATH,
    add_lora,
    deltas,
    expected,
    module_of,
    modules_of,
    no_warnings,
    raw,
    same_bits,
    scale_of,
    small,
    written_deltas,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RANKS = (4, 3, 48, 128)
ALPHAS = (1.0, 16.0, 0.5, 10.0)
PEFT_FILE = "adapter_model.safetensors"
SAT_FILE = Path("1") / "mp_rank_00_model_states.pt"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]

# Every rank, alpha and dtype at least once; all of them together are marked slow.
SAMPLE = [(DTYPES[n % 3], rank, ALPHAS[(n + n // 4) % 4]) for n, rank in enumerate(RANKS * 3)]
EVERY = [(dtype, rank, alpha) for dtype in DTYPES for rank in RANKS for alpha in ALPHAS]


def case_id(value: object) -> str:
    return DTYPE_NAMES[value] if isinstance(value, torch.dtype) else str(value)


def narrow(**changes: Any) -> RunSpec:
    return small(**({"num_layers": 1, "hidden": 32} | changes))


def convert(source: Path, out: Path, to: str, **options: Any) -> Path:
    from loraconv import convert

    convert(source, out=out, to=to, **options)
    return out


def sat_params(run: Path) -> dict[str, Any]:
    """The LoRA settings that SAT itself would read."""
    value = yaml.safe_load((run / "training_config.yaml").read_text())
    for step in LORA_PATH:
        value = value[step]
    found: dict[str, Any] = value
    return found


def sat_deltas(run: Path) -> dict[str, torch.Tensor]:
    """What a written SAT run adds to each module, by SAT's own definition."""
    params = sat_params(run)
    state = torch.load(run / SAT_FILE, weights_only=True)["module"]
    found = {}
    for name, down in state.items():
        if ".matrix_A." not in name:
            continue
        up = state[name.replace("matrix_A", "matrix_B")]
        _, _, layer, _, linear, _, part = name.removeprefix(DIT).split(".")
        target = "to_out.0" if linear == "dense" else ("to_q", "to_k", "to_v")[int(part)]
        assert down.shape[0] == params["r"]
        scale = params["lora_alpha"] / params["r"]
        found[f"transformer_blocks.{layer}.attn1.{target}"] = scale * (up.double() @ down.double())
    return found


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> None:
    assert sorted(got) == sorted(want)
    for name, delta in want.items():
        assert (got[name].double() - delta.double()).norm() <= bound * delta.double().norm(), name


# --- SAT, diffusers and back ----------------------------------------------------------------------------------------


def check_there_and_back(spec: RunSpec, scale_in: str, folder: Path) -> None:
    run = build(spec, folder)
    first = folder / "first"
    loraconv.sat2diffusers(run, out=first, scale_in=scale_in)
    back = convert(first, folder / "back", "sat")
    again = folder / "again"
    loraconv.sat2diffusers(back, out=again)
    assert (again / LORA_FILE).read_bytes() == (first / LORA_FILE).read_bytes()
    want = deltas(expected(spec).adapter, scale_of(spec))
    close(sat_deltas(back), want, 2**-23)
    if scale_in == "metadata" or spec.dtype != torch.float32 or math.log2(scale_of(spec)).is_integer():
        # Nothing was rounded on the way, so that the trained tensors come back themselves, alpha included.
        trained = {k: t for k, t in module_of(run / "2" / "mp_rank_00_model_states.pt").items() if ".matrix_" in k}
        same_bits(torch.load(back / SAT_FILE, weights_only=True)["module"], trained)
        assert sat_params(back)["r"] == spec.rank
        assert sat_params(back)["lora_alpha"] == spec.lora_alpha


@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
@pytest.mark.parametrize(("dtype", "rank", "alpha"), SAMPLE, ids=case_id)
def test_sat_to_diffusers_to_sat_to_diffusers_gives_the_same_file(
    dtype: torch.dtype, rank: int, alpha: float, scale_in: str, tmp_path: Path
) -> None:
    check_there_and_back(narrow(dtype=dtype, rank=rank, lora_alpha=alpha), scale_in, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
@pytest.mark.parametrize(("dtype", "rank", "alpha"), EVERY, ids=case_id)
def test_every_dtype_rank_and_alpha_comes_back(
    dtype: torch.dtype, rank: int, alpha: float, scale_in: str, tmp_path: Path
) -> None:
    check_there_and_back(narrow(dtype=dtype, rank=rank, lora_alpha=alpha), scale_in, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (3, 10.0)])
def test_sat_to_peft_to_sat_keeps_the_trained_tensors(
    dtype: torch.dtype, rank: int, alpha: float, tmp_path: Path
) -> None:
    spec = narrow(dtype=dtype, rank=rank, lora_alpha=alpha)
    run = build(spec, tmp_path)
    peft = convert(run, tmp_path / "peft", "peft")
    want = {f"base_model.model.{k.removeprefix('transformer.')}": t for k, t in expected(spec).adapter.items()}
    same_bits(load_file(peft / PEFT_FILE), want)
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, alpha, False)
    back = convert(peft, tmp_path / "back", "sat")
    trained = {k: t for k, t in module_of(run / "2" / "mp_rank_00_model_states.pt").items() if ".matrix_" in k}
    same_bits(torch.load(back / SAT_FILE, weights_only=True)["module"], trained)
    assert sat_params(back)["lora_alpha"] == alpha


def test_every_road_from_sat_to_diffusers_ends_in_the_same_file(tmp_path: Path) -> None:
    run = build(narrow(lora_alpha=16.0), tmp_path)
    direct, peft = tmp_path / "direct", convert(run, tmp_path / "peft", "peft")
    loraconv.sat2diffusers(run, out=direct)
    over = convert(run, tmp_path / "converted", "diffusers")
    around = convert(peft, tmp_path / "around", "diffusers", scale_in="fold")
    assert (over / LORA_FILE).read_bytes() == (direct / LORA_FILE).read_bytes()
    same_bits(load_file(around / LORA_FILE), load_file(direct / LORA_FILE))


def test_a_layer_range_comes_back_as_it_was(tmp_path: Path) -> None:
    spec = narrow(num_layers=4, layer_range=(1, 3))
    first = convert(build(spec, tmp_path), tmp_path / "first", "diffusers")
    back = convert(first, tmp_path / "back", "sat")
    again = convert(back, tmp_path / "again", "diffusers")
    assert (again / LORA_FILE).read_bytes() == (first / LORA_FILE).read_bytes()
    layers = {name.split(".")[4] for name in torch.load(back / SAT_FILE, weights_only=True)["module"]}
    assert layers == {"1", "3"}
    # SAT puts LoRA on every layer unless the range says otherwise, and then leaves the others untrained.
    assert sorted(sat_params(back).get("layer_range", (1, 3))) == [1, 3]


def test_a_written_run_looks_like_one_and_torch_reads_it_safely(tmp_path: Path) -> None:
    out = convert(build(narrow(), tmp_path), tmp_path / "out", "sat")
    assert (out / "latest").read_text() == "1"
    content = torch.load(out / SAT_FILE, weights_only=True)
    assert all(isinstance(t, torch.Tensor) and t.is_contiguous() for t in content["module"].values())
    assert loraconv.inspect(out).dialect == "sat"
    assert content["mp_world_size"] == 1


# --- written by diffusers and by peft themselves --------------------------------------------------------------------


def tiny_model(layers: int = 2) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=layers,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=4,
    )


def with_adapter(config: LoraConfig, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    """A model with a trained adapter, as diffusers' own training scripts make it."""
    model = tiny_model()
    model.add_adapter(config)
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=noise).to(dtype)
    return model


def consumer_deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What peft itself says that each module's adapter adds, computed in float64."""
    found = {}
    for name, layer in model.double().named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A
            found[name.removeprefix("base_model.model.")] = layer.get_delta_weight(adapter).detach()
    return found


def saved_by_diffusers(model: CogVideoXTransformer3DModel, folder: Path, metadata: bool) -> Path:
    told = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()} if metadata else {}
    CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model), **told)
    return folder


def loaded_by_diffusers(folder: Path) -> dict[str, torch.Tensor]:
    model = tiny_model()
    with no_warnings():
        add_lora(model, folder)
    return consumer_deltas(model)


def peft_folder(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Path, dict[str, Any]]:
    """A folder written by peft, and what peft says that it adds."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **config}
    model = PeftModel(tiny_model(), LoraConfig(**config))
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=noise).to(dtype)
    model.save_pretrained(folder)
    return folder, consumer_deltas(PeftModel.from_pretrained(tiny_model(), folder))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("alpha", [4, 8, 1, 3])
@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_by_diffusers_comes_back_from_sat_bit_for_bit(
    metadata: bool, alpha: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = with_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=ATTENTION), dtype)
    source = saved_by_diffusers(model, tmp_path / "source", metadata)
    sat = convert(source, tmp_path / "sat", "sat")
    back = convert(sat, tmp_path / "back", "diffusers")
    same_bits(load_file(back / LORA_FILE), load_file(source / LORA_FILE))
    want = loaded_by_diffusers(source)
    close(loaded_by_diffusers(back), want, 1e-14)
    close(sat_deltas(sat), want, 1e-14)
    strength = (alpha if metadata else 4) / 4
    assert sat_params(sat) == {"r": 4, "lora_alpha": 4 * strength}


def test_a_file_without_metadata_has_alpha_equal_to_rank_with_a_notice_or_is_refused(tmp_path: Path) -> None:
    source = saved_by_diffusers(with_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION)), tmp_path, False)
    summary = loraconv.inspect(source)
    assert summary.adapter is not None
    assert summary.adapter.scales == ("1",)
    assert any("scale 1" in notice for notice in summary.notices)
    with pytest.raises(FormatError) as caught:
        convert(source, tmp_path / "out", "sat", strict=True)
    assert caught.value.slug == "alpha-unknown"


@pytest.mark.parametrize("scale_in", ["auto", "fold", "metadata"])
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_peft_to_diffusers_to_peft_keeps_tensors_and_strength(
    dtype: torch.dtype, scale_in: str, tmp_path: Path
) -> None:
    source, want = peft_folder(tmp_path / "source", dtype, lora_alpha=16)
    there = convert(source, tmp_path / "there", "diffusers", scale_in=scale_in)
    close(loaded_by_diffusers(there), want, 1e-14)
    back = convert(there, tmp_path / "back", "peft")
    same_bits(load_file(back / PEFT_FILE), load_file(source / PEFT_FILE))
    with no_warnings():
        model = PeftModel.from_pretrained(tiny_model(), back)
    close(consumer_deltas(model), want, 1e-14)
    assert json.loads((back / "adapter_config.json").read_text())["lora_alpha"] == 16


@pytest.mark.parametrize("rank", [4, 8, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_rslora_keeps_its_strength_in_diffusers(dtype: torch.dtype, rank: int, tmp_path: Path) -> None:
    source, want = peft_folder(tmp_path / "source", dtype, r=rank, lora_alpha=16, use_rslora=True)
    for scale_in in ("fold", "metadata"):
        there = convert(source, tmp_path / scale_in, "diffusers", scale_in=scale_in)
        close(loaded_by_diffusers(there), want, 2**-23)
    back = convert(tmp_path / "metadata", tmp_path / "back", "peft")
    same_bits(load_file(back / PEFT_FILE), load_file(source / PEFT_FILE))
    close(consumer_deltas(PeftModel.from_pretrained(tiny_model(), back)), want, 1e-14)


def test_rslora_is_refused_for_sat_where_its_scale_is_irrational(tmp_path: Path) -> None:
    source, _ = peft_folder(tmp_path / "source", r=8, lora_alpha=16, use_rslora=True)
    with pytest.raises(FormatError, match="cannot carry") as caught:
        convert(source, tmp_path / "out", "sat")
    assert "rsLoRA" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_rslora_with_a_rational_scale_reaches_sat_at_its_strength_or_not_at_all(tmp_path: Path) -> None:
    source, want = peft_folder(tmp_path / "source", r=4, lora_alpha=16, use_rslora=True)
    try:
        sat = convert(source, tmp_path / "sat", "sat")
    except FormatError:
        return
    close(sat_deltas(sat), want, 1e-14)


MIXED = {
    "ranks": {"rank_pattern": {"to_q": 8, "transformer_blocks.1.attn1.to_v": 2}},
    "alphas": {"alpha_pattern": {"to_k": 32}},
    "both": {"rank_pattern": {"to_q": 8}, "alpha_pattern": {"to_q": 32}},
    "expressions": {
        "alpha_pattern": {r"transformer_blocks\.0\.attn1\.to_(q|k)": 32, r"^transformer_blocks\.1\..*v": 2}
    },
    "rank-expressions": {"rank_pattern": {r".*\.to_[qk]": 8}},
    "dots-as-any-character": {"alpha_pattern": {"transformer_blocks.0.attn1.to.q": 32}},
    "anchored": {"rank_pattern": {"^transformer_blocks.0.attn1.to_q": 8}},
}


@pytest.mark.parametrize("pattern", MIXED)
def test_patterns_keep_their_strength_in_diffusers_and_peft_and_are_refused_for_sat(
    pattern: str, tmp_path: Path
) -> None:
    source, want = peft_folder(tmp_path / "source", **MIXED[pattern])
    for scale_in in ("fold", "metadata"):
        there = convert(source, tmp_path / scale_in, "diffusers", scale_in=scale_in)
        close(loaded_by_diffusers(there), want, 1e-14)
    back = convert(tmp_path / "metadata", tmp_path / "back", "peft")
    same_bits(load_file(back / PEFT_FILE), load_file(source / PEFT_FILE))
    close(consumer_deltas(PeftModel.from_pretrained(tiny_model(), back)), want, 1e-14)
    with pytest.raises(FormatError, match="cannot carry"):
        convert(source, tmp_path / "sat", "sat")


def test_layers_one_and_eleven_are_not_mistaken_for_each_other_in_patterns(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.attn1.to_q" for i in (1, 11)]
    model = PeftModel(tiny_model(12), LoraConfig(r=4, lora_alpha=8, target_modules=names, rank_pattern={names[1]: 2}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    want = consumer_deltas(PeftModel.from_pretrained(tiny_model(12), tmp_path / "source"))
    there = convert(tmp_path / "source", tmp_path / "there", "diffusers", scale_in="metadata")
    close(written_deltas(there), want, 1e-14)
    loaded = tiny_model(12)
    add_lora(loaded, there)
    close(consumer_deltas(loaded), want, 1e-14)


def test_an_adapter_of_one_layer_leaves_the_others_alone_in_every_consumer(tmp_path: Path) -> None:
    source, want = peft_folder(tmp_path / "source", target_modules=["transformer_blocks.1.attn1.to_q"])
    assert list(want) == ["transformer_blocks.1.attn1.to_q"]
    close(loaded_by_diffusers(convert(source, tmp_path / "there", "diffusers")), want, 1e-14)
    back = convert(source, tmp_path / "back", "peft")
    close(consumer_deltas(PeftModel.from_pretrained(tiny_model(), back)), want, 1e-14)


def test_feed_forward_modules_are_refused_for_sat_by_name_and_right_elsewhere(tmp_path: Path) -> None:
    source, want = peft_folder(tmp_path / "source", target_modules=[*ATTENTION, "ff.net.0.proj", "norm1.linear"])
    assert len(want) == 12
    with pytest.raises(FormatError, match="cannot carry 4") as caught:
        convert(source, tmp_path / "sat", "sat")
    assert caught.value.slug == "cannot-carry"
    assert "ff.net.0.proj" in caught.value.where
    assert not (tmp_path / "sat").exists()
    close(loaded_by_diffusers(convert(source, tmp_path / "there", "diffusers")), want, 1e-14)


FORMATS = ("diffusers", "peft", "sat")
UNHELD = {
    "dora": ({"use_dora": True}, "magnitude"),
    "bias-of-the-adapter": ({"lora_bias": True}, "bias"),
    "bias-of-the-base": ({"bias": "all"}, "bias"),
    "saved-modules": ({"modules_to_save": ["proj_out"]}, "proj_out"),
}
#: Formats that hold it after all.
HELD = {"dora": ("peft",), "bias-of-the-adapter": ("peft", "diffusers")}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft, about its own bias tensors
@pytest.mark.parametrize(("kind", "to"), [(k, to) for k in UNHELD for to in FORMATS if to not in HELD.get(k, ())])
def test_what_is_no_plain_lora_is_refused_and_never_dropped(kind: str, to: str, tmp_path: Path) -> None:
    config, named = UNHELD[kind]
    source, _ = peft_folder(tmp_path / "source", **config)
    with pytest.raises(LoraconvError) as caught:
        convert(source, tmp_path / "out", to)
    assert caught.value.exit_code == 3
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_dora_of_peft_stays_what_it_is_for_peft(tmp_path: Path) -> None:
    source, _ = peft_folder(tmp_path / "source", use_dora=True)
    out = convert(source, tmp_path / "out", "peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is True


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft, about its own bias tensors
@pytest.mark.parametrize("scale_in", ["fold", "metadata"])
def test_the_bias_of_an_adapter_adds_the_same_in_diffusers_as_in_peft(scale_in: str, tmp_path: Path) -> None:
    source, want = peft_folder(tmp_path / "source", lora_bias=True)
    there = convert(source, tmp_path / "there", "diffusers", scale_in=scale_in)
    close(loaded_by_diffusers(there), want, 1e-14)
    theirs, ours = PeftModel.from_pretrained(tiny_model(), source).base_model.model, tiny_model()
    with no_warnings():
        add_lora(ours, there)
    for name, layer in ours.named_modules():
        if isinstance(layer, LoraLayer):
            (one,), (other,) = layer.lora_B, theirs.get_submodule(name).lora_B
            bias = theirs.get_submodule(name).scaling[other] * theirs.get_submodule(name).lora_B[other].bias
            assert bias.abs().max() > 0
            assert torch.equal(layer.scaling[one] * layer.lora_B[one].bias, bias), name
    back = convert(there, tmp_path / "back", "peft")
    same_bits(load_file(back / PEFT_FILE), load_file(source / PEFT_FILE))


@pytest.mark.parametrize("to", ["peft", "sat", "diffusers"])
def test_tensors_that_nobody_knows_are_refused(to: str, tmp_path: Path) -> None:
    source = saved_by_diffusers(with_adapter(LoraConfig(target_modules=ATTENTION)), tmp_path / "source", True)
    tensors = load_file(source / LORA_FILE)
    tensors["transformer.transformer_blocks.0.attn1.to_q.lora_C.weight"] = torch.ones(2, 2)
    save_file(tensors, source / LORA_FILE)
    with pytest.raises(LoraconvError, match="lora_C"):
        convert(source, tmp_path / "out", to, alpha=8)


def test_a_header_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    source = saved_by_diffusers(with_adapter(LoraConfig(r=4, target_modules=ATTENTION)), tmp_path / "source", True)
    told = {"transformer.r": 8, "transformer.lora_alpha": 8}
    save_file(load_file(source / LORA_FILE), source / LORA_FILE, {"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(FormatError) as caught:
        convert(source, tmp_path / "out", "peft")
    assert caught.value.slug == "rank-contradiction"


def test_a_file_of_finetrainers_has_the_strength_it_was_trained_with(tmp_path: Path) -> None:
    """finetrainers writes ``lora_config``, which diffusers never reads: its own loader applies scale 1."""
    model = with_adapter(LoraConfig(r=8, lora_alpha=4, target_modules=ATTENTION))
    source = saved_by_diffusers(model, tmp_path / "source", False)
    told = {"r": 8, "lora_alpha": 4, "init_lora_weights": True, "target_modules": ATTENTION}
    save_file(load_file(source / LORA_FILE), source / LORA_FILE, {"lora_config": json.dumps(told)})
    there = convert(source, tmp_path / "there", "diffusers")
    close(loaded_by_diffusers(there), consumer_deltas(model), 1e-14)


def test_keys_without_the_prefix_get_one_and_then_load(tmp_path: Path) -> None:
    model = with_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    bare = {k: t.contiguous() for k, t in get_peft_model_state_dict(model).items()}
    file = tmp_path / LORA_FILE
    save_file(bare, file)
    assert any("prefix" in notice for notice in loraconv.inspect(file).notices)
    there = convert(file, tmp_path / "there", "diffusers")
    close(loaded_by_diffusers(there), consumer_deltas(model), 1e-14)


# --- any adapter ----------------------------------------------------------------------------------------------------

specs = st.builds(
    narrow,
    rank=st.integers(1, 24),
    lora_alpha=st.one_of(
        st.none(), st.integers(1, 512).map(float), st.floats(2**-20, 2**20, allow_nan=False, width=32)
    ),
    dtype=st.sampled_from(DTYPES),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    b_std=st.sampled_from([1.0, 1e-3, 1e-6]),
    hidden=st.just(16),
)


def bound_of(down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """How far a delta may move when ``up`` is rounded once to float32, and the check itself runs in float64."""
    size = abs(scale) * (up.double().abs() @ down.double().abs())
    subnormal = 2.0**-149 * down.double().abs().sum(0, keepdim=True)
    return (2**-24 + 2**-48) * size + subnormal


def check_any(spec: RunSpec, scale_in: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = build(spec, folder)
        there = convert(run, folder / "there", "diffusers", scale_in=scale_in)
        back = convert(there, folder / "back", "sat")
        ways = (written_deltas(there), sat_deltas(back))
    pairs, scale = modules_of(expected(spec).adapter), scale_of(spec)
    for got in ways:
        assert sorted(got) == sorted(pairs)
        for module, (down, up) in pairs.items():
            want = scale * (up.double() @ down.double())
            assert bool(((got[module] - want).abs() <= 2 * bound_of(down, up, scale)).all()), module


@given(specs, st.sampled_from(["auto", "fold", "metadata"]))
@settings(max_examples=40, deadline=None)
def test_any_adapter_keeps_its_delta_within_one_rounding(spec: RunSpec, scale_in: str) -> None:
    check_any(spec, scale_in)


@pytest.mark.slow
@given(specs, st.sampled_from(["auto", "fold", "metadata"]))
@settings(max_examples=1000, deadline=None)
def test_very_many_adapters_keep_their_delta_within_one_rounding(spec: RunSpec, scale_in: str) -> None:
    check_any(spec, scale_in)


def test_the_bound_is_sharp_enough_to_see_one_wrong_bit() -> None:
    pair = next(iter(modules_of(expected(narrow(dtype=torch.bfloat16)).adapter).values()))
    down, up = pair
    wrong = up.clone()
    wrong.view(torch.int16)[0, 0] ^= 1
    moved = ((wrong.double() - up.double()) @ down.double()).abs()
    assert bool((moved > 2 * bound_of(down, up, 1.0)).any())
    assert raw(wrong) != raw(up)


@pytest.mark.parametrize("module", ["blocks.1.attn1.to_q", "blocks.10.attn1.to_q", "blocks.1.attn1.to_k", "to_q"])
@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "q",
        "attn1.to_q",
        r"^blocks\.1",
        r"^blocks\.1\.attn1\.to_q",
        "blocks.1.attn1.to_q",
        r"blocks\.\d+\..*",
        "^to_q",
    ],
)
def test_a_pattern_fits_the_modules_that_it_fits_in_peft(pattern: str, module: str) -> None:
    from peft.utils.other import get_pattern_key

    fits = get_pattern_key([pattern], module) == pattern if pattern != module else True
    config = {"r": 4, "rank_pattern": {pattern: 8}}
    assert by_pattern(config, "r", module) == (8 if fits else 4)
    assert _place("here", config)(module).rank == (8 if fits else 4)

"""``fuse``: the exact sum rounded once, at the right scale, into a folder that diffusers loads; all else is refused.

Oracles: the outputs that the real training stack recorded, diffusers with the live adapter, and float64 mathematics.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UnsafeCheckpoint, UsageError, WriteFailed
from tests.cli_support import Cli, assert_clear_error, digests, launch, parsed_hint, snapshot
from tests.conftest import Converted
from tests.forward import forward, relative_l2
from tests.sat_run import RunSpec, build
from tests.support import (
    PARALLEL,
    RECORDED,
    Recorded,
    Tensors,
    add_lora,
    header,
    load_transformer,
    no_warnings,
    raw,
    same_bits,
    tensors_in,
)
from tests.test_forward import BOUND, error, native, tables

pytest_plugins = ["tests.cli_fixtures"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LAYERS, WIDTH, RANK = 3, 32, 4
TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
CONFIG = {"_class_name": "CogVideoXTransformer3DModel", "num_layers": LAYERS}


# --- what is fused ------------------------------------------------------------------------------------------------


def modules(layers: int = LAYERS) -> list[str]:
    return [f"transformer_blocks.{layer}.{target}" for layer in range(layers) for target in TARGETS]


def base_state(dtype: torch.dtype = torch.float32, width: int = WIDTH, layers: int = LAYERS) -> Tensors:
    """The weights of a transformer in diffusers' names, drawn here."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=noise) * 0.02).to(dtype)

    state = {"patch_embed.proj.weight": draw(width, 4, 2, 2), "norm_out.linear.bias": draw(2 * width)}
    for module in modules(layers):
        state |= {f"{module}.weight": draw(width, width), f"{module}.bias": draw(width)}
    for layer in range(layers):
        state[f"transformer_blocks.{layer}.ff.net.0.proj.weight"] = draw(4 * width, width)
    return state


def write_base(folder: Path, state: Tensors, shards: int = 1, config: Mapping[str, Any] = CONFIG) -> Path:
    """A transformer folder of one file, or of several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / WEIGHTS, {"format": "pt", "trained by": "somebody"})
        return folder
    names, listed = sorted(state), {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt", "shard": str(shard)})
        listed |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": listed}, indent=2))
    return folder


def factors(seed: int = 1, rank: int = RANK, width: int = WIDTH, layers: int = LAYERS, std: float = 0.1) -> Tensors:
    """A diffusers adapter."""
    noise, made = torch.Generator().manual_seed(seed), {}
    for module in modules(layers):
        made[f"transformer.{module}.lora_A.weight"] = torch.randn((rank, width), generator=noise) * std
        made[f"transformer.{module}.lora_B.weight"] = torch.randn((width, rank), generator=noise) * std
    return made


def write_adapter(file: Path, tensors: Tensors, alpha: float | None = 1.0, **more: Any) -> Path:
    """The adapter as a file, with alpha and rank in its header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rank = next(t.shape[0] for n, t in tensors.items() if ".lora_A." in n)
    told = {"r": rank, "lora_alpha": alpha, **more}
    config = {f"transformer.{key}": value for key, value in told.items()}
    metadata = {} if alpha is None else {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, file, {"format": "pt", **metadata})
    return file


def exact(state: Tensors, *adapters: tuple[Tensors, float]) -> dict[str, Any]:
    """``base + sum(factor * up @ down)`` in float64, by numpy."""
    made = {name: tensor.double().numpy() for name, tensor in state.items()}
    for tensors, factor in adapters:
        for name in [name for name in tensors if ".lora_A." in name]:
            down, up = tensors[name].double().numpy(), tensors[name.replace("lora_A", "lora_B")].double().numpy()
            weight = name.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
            made[weight] = made[weight] + factor * (up @ down)
    return made


def assert_rounded_once(got: Tensors, want: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Every number is as near to the float64 one as both of its neighbours in the dtype, or nearer."""
    kind = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}[dtype]
    assert sorted(got) == sorted(want)
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        truth = torch.from_numpy(want[name])
        off = (tensor.double() - truth).abs()
        for step in (-1, 1):
            other = (tensor.view(kind) + step).view(dtype).double().nan_to_num(nan=torch.inf)
            assert bool((off <= (other - truth).abs() + 1e-16).all()), name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", base_state())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora.safetensors", factors())


# --- the recorded runs --------------------------------------------------------------------------------------------

each_recorded = pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)


@each_recorded
def test_the_fused_model_computes_what_the_trainers_own_merge_computed(
    recorded: Recorded, converted: Converted, tmp_path: Path
) -> None:
    base = converted(recorded, what="base", **native(recorded))
    result = loraconv.fuse(recorded.run, base=base, out=tmp_path / "out")
    assert len(result.fused) == 12
    with no_warnings():
        fused = load_transformer(tmp_path / "out")
    assert error(fused, recorded, "out_merged") <= BOUND
    assert error(fused, recorded, "out_base") > 0.1


@each_recorded
def test_the_fused_model_computes_what_the_live_adapter_computes(
    recorded: Recorded, converted: Converted, tmp_path: Path
) -> None:
    base, lora = converted(recorded, what="base", **native(recorded)), converted(recorded, **native(recorded))
    loraconv.fuse(lora, base=base, out=tmp_path / "out")
    live = load_transformer(base)
    add_lora(live, lora)
    want = forward(live, recorded.reference, rotary=tables(recorded))
    got = forward(load_transformer(tmp_path / "out"), recorded.reference, rotary=tables(recorded))
    assert relative_l2(got, want) <= BOUND


def test_a_model_parallel_adapter_is_fused_as_the_mean_over_its_ranks(converted: Converted, tmp_path: Path) -> None:
    base = converted(PARALLEL, what="base")
    with pytest.raises(FormatError) as refused:
        loraconv.fuse(PARALLEL.run, base=base, out=tmp_path / "out")
    assert refused.value.slug == "model-parallel-lora"
    result = loraconv.fuse(PARALLEL.run, base=base, out=tmp_path / "out", nearest=True)
    assert any("nearest single adapter" in notice for notice in result.notices)
    ranks = [torch.load(file, weights_only=False)["module"] for file in sorted(PARALLEL.iteration.glob("*.pt"))]
    state = load_file(base / WEIGHTS)
    want = {name: tensor.double().numpy() for name, tensor in state.items()}
    for layer in range(3):
        place = f"model.diffusion_model.transformer.layers.{layer}.attention."
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            ups = torch.cat([rank[f"{place}query_key_value.matrix_B.{part}"].double() for rank in ranks])
            downs = sum(rank[f"{place}query_key_value.matrix_A.{part}"].double() for rank in ranks) / 2
            want[f"transformer_blocks.{layer}.attn1.{name}.weight"] += (ups @ downs / downs.shape[0]).numpy()
        ups = sum(rank[f"{place}dense.matrix_B.0"].double() for rank in ranks) / 2
        downs = torch.cat([rank[f"{place}dense.matrix_A.0"].double() for rank in ranks], dim=1)
        want[f"transformer_blocks.{layer}.attn1.to_out.0.weight"] += (ups @ downs / 2 / downs.shape[0]).numpy()
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, torch.float32)


def test_the_format_of_the_adapter_does_not_matter(converted: Converted, tmp_path: Path) -> None:
    recorded = RECORDED[0]
    base, found = converted(recorded, what="base"), set()
    for form in ("peft", "sat", "diffusers"):
        loraconv.convert(recorded.run, out=tmp_path / form, to=form)
        loraconv.fuse(tmp_path / form, base=base, out=tmp_path / f"fused-{form}")
        data = (tmp_path / f"fused-{form}" / WEIGHTS).read_bytes()
        found.add(data[8 + int.from_bytes(data[:8], "little") :])
    assert len(found) == 1


# --- scale, strength, selection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_several_adapters_are_added_with_their_strengths_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    state = base_state(dtype)
    base = write_base(tmp_path / "base", state)
    one, other = factors(1), factors(2, rank=7)
    a = write_adapter(tmp_path / "a.safetensors", one, alpha=3)
    b = write_adapter(tmp_path / "b.safetensors", other, alpha=7)
    result = loraconv.fuse(f"{a}@0.8", f"{b}@-.5", base=base, out=tmp_path / "out")
    want = exact(state, (one, 0.8 * 3 / RANK), (other, -0.5))
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, dtype)
    assert [x.strength for x in result.adapters] == [0.8, -0.5]


def test_alpha_and_rank_are_the_trainers_flags(tmp_path: Path, base: Path) -> None:
    tensors = factors()
    bare = write_adapter(tmp_path / "bare.safetensors", tensors, alpha=None)
    result = loraconv.fuse(bare, base=base, out=tmp_path / "out", alpha=2, rank=RANK)
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), exact(base_state(), (tensors, 2 / RANK)), torch.float32)
    (scale,) = result.adapters[0].scales
    assert (scale.value, scale.alpha, scale.rank, scale.told_by) == (0.5, 2, RANK, "--alpha")


def test_an_alpha_against_the_record_wins_and_is_reported(tmp_path: Path, base: Path, adapter: Path) -> None:
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out", alpha=3)
    want = exact(base_state(), (factors(), 3 / RANK))
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, torch.float32)
    assert any("says 1" in notice and "--alpha was taken" in notice for notice in result.notices)


def test_rslora_is_divided_by_the_root_of_the_rank(tmp_path: Path, base: Path) -> None:
    tensors = factors(rank=5)
    lora = write_adapter(tmp_path / "rs.safetensors", tensors, alpha=2, use_rslora=True)
    loraconv.fuse(lora, base=base, out=tmp_path / "out")
    want = exact(base_state(), (tensors, 2 / 5**0.5))
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, torch.float32)


def test_an_unknown_scale_is_said_aloud_and_refused_if_strict(tmp_path: Path, base: Path, cli: Cli) -> None:
    bare = write_adapter(tmp_path / "bare.safetensors", factors(), alpha=None)
    done = cli("fuse", bare, "--base", base, "-o", tmp_path / "out")
    assert "notice: alpha: the file says none; diffusers applies scale 1" in done.err
    assert "scale 1 = alpha 4 (diffusers default) / rank 4 (tensors)" in done.out
    refused = cli("fuse", bare, "--base", base, "-o", tmp_path / "other", "--strict")
    assert_clear_error(refused, {3})
    assert "--alpha" in refused.err


@pytest.mark.parametrize(
    ("alpha", "line"),
    [(1, "scale 0.25 = alpha 1 ("), (3, "scale 0.75 = alpha 3 ("), (0.1, "scale 0.025 = alpha 0.1 (")],
)
def test_every_run_says_the_scale_and_what_it_is_made_of(
    tmp_path: Path, base: Path, cli: Cli, alpha: float, line: str
) -> None:
    lora = write_adapter(tmp_path / "lora.safetensors", factors(), alpha=alpha)
    for more in ([], ["--dry-run"]):
        out = cli("fuse", lora, "--base", base, "-o", tmp_path / f"out{len(more)}", *more).out.splitlines()
        assert out[0] == f"{line}header lora_adapter_metadata) / rank 4 (tensors)"


def test_the_scale_of_a_run_is_that_of_its_settings_file(tmp_path: Path, cli: Cli) -> None:
    run = build(RunSpec(num_layers=2, rank=8, lora_alpha=1.0), tmp_path)
    loraconv.sat2diffusers(run, out=tmp_path / "base", what="base")
    done = cli("fuse", f"{run}@0.5", "--base", tmp_path / "base", "-o", tmp_path / "out")
    said = "scale 0.125 = alpha 1 (training_config.yaml) / rank 8 (tensors), strength 0.5"
    assert done.out.splitlines()[0] == said
    record = json.loads((tmp_path / "out" / "loraconv.json").read_text())
    (one,) = record["adapters"]
    told = {key: one[key] for key in ("scale", "alpha", "rank", "told_by", "strength", "format")}
    assert told == {
        "scale": "1/8", "alpha": 1, "rank": 8, "told_by": "training_config.yaml", "strength": 0.5, "format": "sat",
    }  # fmt: skip


def test_a_path_that_holds_an_at_sign_and_exists_is_a_path(tmp_path: Path, base: Path) -> None:
    lora = write_adapter(tmp_path / "step@2.5", factors())
    result = loraconv.fuse(lora, base=base, out=tmp_path / "out")
    assert (result.adapters[0].strength, result.adapters[0].path) == (1.0, "step@2.5")
    result = loraconv.fuse(f"{lora}@0.5", base=base, out=tmp_path / "other")
    assert (result.adapters[0].strength, result.adapters[0].path) == (0.5, "step@2.5")


PATTERNS: dict[str, tuple[list[str], Callable[[str], bool]]] = {
    "a range": (["transformer_blocks.{0-1}.*"], lambda m: m.split(".")[1] in "01"),
    "a list": (["transformer_blocks.{0,2}.*"], lambda m: m.split(".")[1] in "02"),
    "words": (["*.{to_q,to_out.0}"], lambda m: m.endswith(("to_q", "to_out.0"))),
    "both": (["*.{0-0,2}.attn1.to_{k,v}"], lambda m: m.split(".")[1] in "02" and m.endswith(("_k", "_v"))),
    "several": (["*.0.*to_q", "*.1.*to_k"], lambda m: ".0.attn1.to_q" in m or ".1.attn1.to_k" in m),
    "a plain name": (["transformer_blocks.1.attn1.to_q"], lambda m: m == "transformer_blocks.1.attn1.to_q"),
    "everything": (["*"], lambda m: True),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_only_the_chosen_modules_are_fused(tmp_path: Path, base: Path, adapter: Path, case: str) -> None:
    patterns, chosen = PATTERNS[case]
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out", modules=patterns)
    names = [module for module in modules() if chosen(module)]
    assert sorted(result.fused) == sorted(f"{name}.weight" for name in names)
    kept = {n: t for n, t in factors().items() if n.removeprefix("transformer.").rsplit(".", 2)[0] in names}
    want = exact(base_state(), (kept, 1 / RANK))
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, torch.float32)


@pytest.mark.parametrize(
    "pattern", ["transformer_blocks.{7-9}.*", "attn1.to_q", "transformer_blocks.{0-1.*", "{}x", "", "*.{9-3}.*", "}{"]
)
def test_a_pattern_that_fits_nothing_is_an_error(tmp_path: Path, base: Path, adapter: Path, pattern: str) -> None:
    with pytest.raises(UsageError) as refused:
        loraconv.fuse(adapter, base=base, out=tmp_path / "out", modules=["*", pattern])
    assert "--modules" in refused.value.hint


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_files_order_headers_and_untouched_tensors_are_those_of_the_base(
    tmp_path: Path, adapter: Path, shards: int
) -> None:
    state = base_state(torch.bfloat16)
    base = write_base(tmp_path / "base", state, shards)
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == sorted([*os.listdir(base), "loraconv.json"])
    for file in sorted(base.glob("*.safetensors")):
        before, after = offsets(file), offsets(out / file.name)
        assert before == after
        got = header(out / file.name)
        assert {k: v for k, v in got.items() if not k.startswith("loraconv.")} == header(file)
        assert json.loads(got["loraconv.fused"])[0]["adapter"] == adapter.name
    for name in ("config.json", INDEX) if shards > 1 else ("config.json",):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    got = tensors_in(*out.glob("*.safetensors"))
    untouched = {name for name in state if name not in result.fused}
    same_bits({n: got[n] for n in untouched}, {n: state[n] for n in untouched})
    assert_rounded_once(
        {n: got[n] for n in result.fused},
        {n: exact(state, (factors(), 1 / RANK))[n] for n in result.fused},
        torch.bfloat16,
    )
    assert loraconv.verify(out).same
    assert loraconv.verify(adapter, out, base=base).same


def offsets(file: Path) -> dict[str, Any]:
    """Every tensor's entry in the header."""
    data = file.read_bytes()
    entries = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


@pytest.mark.parametrize("size", ["20KB", "9KB", "1GB"])
@pytest.mark.parametrize("shards", [1, 3])
def test_new_shards_are_made_as_diffusers_makes_them(tmp_path: Path, adapter: Path, size: str, shards: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state = base_state(torch.float16)
    base = write_base(tmp_path / "base", state, shards)
    loraconv.fuse(adapter, base=base, out=tmp_path / "out", max_shard_size=size)
    want = split_torch_state_dict_into_shards(
        dict(sorted(state.items())), max_shard_size=size, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    found = {file.name: sorted(load_file(file)) for file in (tmp_path / "out").glob("*.safetensors")}
    assert found == {name: sorted(names) for name, names in want.filename_to_tensors.items()}
    index = tmp_path / "out" / INDEX
    assert index.exists() == want.is_sharded
    if want.is_sharded:
        told = json.loads(index.read_text())
        assert told == {"metadata": want.metadata, "weight_map": want.tensor_to_filename}
    fine = exact(state, (factors(), 1 / RANK))
    assert_rounded_once(tensors_in(*(tmp_path / "out").glob("*.safetensors")), fine, torch.float16)


def write_in_order(file: Path, state: Tensors) -> None:
    """A safetensors file with the tensors in the order given, which no library writes but every one reads."""
    at, entries = 0, {}
    for name, tensor in state.items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(raw, state.values())))


@pytest.mark.parametrize("size", [None, "20KB"])
def test_tensors_may_stand_in_any_order_in_the_base(tmp_path: Path, adapter: Path, size: str | None) -> None:
    state = {name: base_state()[name] for name in sorted(base_state(), reverse=True)}
    base = write_base(tmp_path / "base", state)
    write_in_order(base / WEIGHTS, state)
    loraconv.fuse(adapter, base=base, out=tmp_path / "out", max_shard_size=size, prove=False)
    got = tensors_in(*(tmp_path / "out").glob("*.safetensors"))
    assert_rounded_once(got, exact(state, (factors(), 1 / RANK)), torch.float32)
    if size is None:
        assert offsets(tmp_path / "out" / WEIGHTS) == offsets(base / WEIGHTS)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_dtype_is_for_every_floating_tensor_and_rounds_once(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    state = base_state(stored)
    steps = torch.arange(5)
    base = write_base(tmp_path / "base", {**state, "steps": steps}, shards=2)
    lora = write_adapter(tmp_path / "lora.safetensors", factors())
    loraconv.fuse(lora, base=base, out=tmp_path / "out", dtype=dtype)
    got = tensors_in(*(tmp_path / "out").glob("*.safetensors"))
    assert torch.equal(got.pop("steps"), steps)
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert_rounded_once(got, exact(state, (factors(), 1 / RANK)), kind)
    total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in (*got.values(), steps))


def pipeline(folder: Path, state: Tensors, shards: int = 1) -> Path:
    """A pipeline's folder with parts that are not fused."""
    write_base(folder / "transformer", state, shards)
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    for part in ("vae", "text_encoder", "scheduler"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(f'{{"part": "{part}"}}')
    save_file({"decoder.weight": torch.ones(3)}, folder / "vae" / WEIGHTS)
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "README.md").write_text("# a model")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"stale")
    return folder


@pytest.mark.parametrize("rest", ["copy", "link"])
@pytest.mark.parametrize("shards", [1, 2])
def test_of_a_pipeline_only_the_transformer_is_written_anew(
    tmp_path: Path, adapter: Path, rest: Any, shards: int
) -> None:
    state = base_state(torch.bfloat16)
    base, out = pipeline(tmp_path / "base", state, shards), tmp_path / "out"
    before = snapshot(base)
    result = loraconv.fuse(adapter, base=base, out=out, rest=rest)
    for file in (
        "model_index.json",
        "README.md",
        "vae/config.json",
        f"vae/{WEIGHTS}",
        "text_encoder/pytorch_model.bin",
    ):
        assert (out / file).read_bytes() == (base / file).read_bytes()
        assert (out / file).is_symlink() == (rest == "link")
    for file in (out / "transformer").iterdir():
        assert not file.is_symlink()
    assert not (out / "transformer" / "diffusion_pytorch_model.bin").exists()
    assert not (out / ".cache").exists()
    assert {notice.partition(":")[0] for notice in result.notices} == {"left behind, as it is not fused", "left behind"}
    want = exact(state, (factors(), 1 / RANK))
    assert_rounded_once(tensors_in(*(out / "transformer").glob("*.safetensors")), want, torch.bfloat16)
    assert loraconv.verify(out).same
    assert loraconv.verify(adapter, out, base=base).same
    assert snapshot(base) == before
    again = loraconv.fuse(adapter, base=base, out=out, rest=rest, overwrite=True)
    assert again.fused == result.fused


def test_a_fused_pipeline_loads_in_diffusers(converted: Converted, tmp_path: Path) -> None:
    recorded = RECORDED[1]
    folder = tmp_path / "pipe"
    shutil.copytree(converted(recorded, what="base"), folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    loraconv.fuse(recorded.run, base=folder, out=tmp_path / "out")
    with no_warnings():
        fused = load_transformer(tmp_path / "out" / "transformer")
    assert error(fused, recorded, "out_merged") <= BOUND


@pytest.mark.parametrize("settings", [True, False])
def test_a_single_file_stays_one(tmp_path: Path, adapter: Path, settings: bool) -> None:
    state = base_state()
    folder = write_base(tmp_path / "base", state)
    file = (folder / WEIGHTS).rename(folder / "model@fp32.safetensors")
    if not settings:
        (folder / "config.json").unlink()
    loraconv.fuse(adapter, base=file, out=folder / "out")
    wanted = {"loraconv.json", file.name} | ({"config.json"} if settings else set())
    assert set(os.listdir(folder / "out")) == wanted
    assert_rounded_once(load_file(folder / "out" / file.name), exact(state, (factors(), 1 / RANK)), torch.float32)


def test_a_model_of_the_hub_cache_is_fused_by_its_id(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    state = base_state()
    made = write_base(tmp_path / "made", state)
    repository = tmp_path / "hub" / "models--acme--video"
    snapshot_folder = repository / "snapshots" / "abc" / "transformer"
    for folder in (snapshot_folder, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    for number, file in enumerate(made.iterdir()):
        file.rename(repository / "blobs" / str(number))
        (snapshot_folder / file.name).symlink_to(f"../../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loraconv.fuse(adapter, base="acme/video", out=tmp_path / "out")
    want = exact(state, (factors(), 1 / RANK))
    assert_rounded_once(load_file(tmp_path / "out" / WEIGHTS), want, torch.float32)
    with pytest.raises(UsageError) as refused:
        loraconv.fuse(adapter, base="acme/video", in_place=True)
    assert refused.value.slug == "in-place"


def test_an_adapter_that_is_partly_zero_is_noticed(tmp_path: Path, base: Path) -> None:
    tensors = factors()
    for name in tensors:
        if ".1.attn1.to_q.lora_B" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    lora = write_adapter(tmp_path / "lora.safetensors", tensors)
    result = loraconv.fuse(lora, base=base, out=tmp_path / "out")
    assert any("up is zero" in n and "transformer_blocks.1.attn1.to_q" in n for n in result.notices)
    got = load_file(tmp_path / "out" / WEIGHTS)
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert raw(got[name]) == raw(base_state()[name])


def test_without_the_proof_the_header_says_so(tmp_path: Path, base: Path, adapter: Path, cli: Cli) -> None:
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out", "--no-proof")
    assert "proof   none" in done.out
    assert "not asked for" in header(tmp_path / "out" / WEIGHTS)["loraconv.proof"]
    loraconv.fuse(adapter, base=base, out=tmp_path / "proved")
    assert "rounded once" in header(tmp_path / "proved" / WEIGHTS)["loraconv.proof"]
    for name in set(base_state()):
        assert raw(load_file(tmp_path / "out" / WEIGHTS)[name]) == raw(load_file(tmp_path / "proved" / WEIGHTS)[name])


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path: Path, base: Path, adapter: Path, cli: Cli) -> None:
    before = snapshot(tmp_path)
    done = cli("fuse", adapter, "--base", base, "-o", tmp_path / "out", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "would fuse 12 of 29 tensors" in done.out
    assert "transformer_blocks.{0...2}.attn1.to_q.weight (3 keys)" in done.out
    assert snapshot(tmp_path) == before


def test_the_record_holds_what_the_other_commands_need(tmp_path: Path, adapter: Path) -> None:
    import hashlib
    import zlib

    state = base_state(torch.float16)
    base = write_base(tmp_path / "base", state, shards=2)
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "loraconv.json").read_text())
    assert (record["schema"], record["kind"], record["journal"]) == (1, "fused", None)
    assert record["fused"] == list(result.fused)
    assert record["base"]["files"] == [
        {"name": f.name, "bytes": f.stat().st_size} for f in sorted(base.glob("*.safetensors"))
    ]
    got = tensors_in(*(tmp_path / "out").glob("*.safetensors"))
    assert record["crc32"] == {name: f"{zlib.crc32(raw(tensor)):08x}" for name, tensor in got.items()}
    assert record["base"]["crc32"] == {name: f"{zlib.crc32(raw(state[name])):08x}" for name in result.fused}
    assert record["adapters"][0]["sha256"] == [hashlib.sha256(adapter.read_bytes()).hexdigest()]
    files = {file["name"]: file for file in record["files"]}
    assert set(files) == set(os.listdir(tmp_path / "out")) - {"loraconv.json"}
    assert all(file["bytes"] == (tmp_path / "out" / name).stat().st_size for name, file in files.items())
    (proof,) = record["proofs"]
    assert proof["subject"] == "fused"
    assert all(check["passed"] for check in proof["checks"])
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_the_bytes_do_not_depend_on_threads_seeds_or_places(tmp_path: Path, stored: torch.dtype) -> None:
    state = base_state(stored, width=256)
    base = write_base(tmp_path / "base", state, shards=2)
    lora = write_adapter(tmp_path / "lora.safetensors", factors(width=256, rank=64))
    found = set()
    for number, threads in enumerate(("1", "2", "2")):
        out = tmp_path / f"place{number}" / "out"
        env = {
            "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": str(number),
            "LC_ALL": "C" if number else "C.UTF-8",
        }  # fmt: skip
        words = ["fuse", lora, "--base", base if number else os.path.relpath(base, tmp_path), "-o", out]
        assert launch(words, env=env, cwd=None if number else tmp_path).returncode == 0
        found.add(json.dumps(digests(out)))
    assert len(found) == 1


# --- in place and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_in_place_replaces_the_base_and_the_journal_brings_it_back(tmp_path: Path, adapter: Path, shards: int) -> None:
    state = base_state(torch.bfloat16)
    base = write_base(tmp_path / "base", state, shards)
    (base / "README.md").write_text("mine")
    (base / "config.json").chmod(0o600)
    before = digests(base)
    result = loraconv.fuse(adapter, base=base, in_place=True)
    assert result.out == base
    assert set(os.listdir(base)) == {*before, "loraconv.json", "loraconv.journal"}
    assert (base / "config.json").stat().st_mode & 0o777 == 0o600
    assert (base / "README.md").read_text() == "mine"
    want = exact(state, (factors(), 1 / RANK))
    assert_rounded_once(tensors_in(*base.glob("*.safetensors")), want, torch.bfloat16)
    assert loraconv.verify(base).same
    assert sorted(os.listdir(tmp_path)) == ["base", adapter.name]
    loraconv.unfuse(base, out=tmp_path / "back")
    after = digests(tmp_path / "back")
    assert {name: after[name] for name in before} == before


def test_with_a_journal_the_base_comes_back_from_another_folder(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = digests(base)
    result = loraconv.fuse(adapter, base=base, out=tmp_path / "out", journal=True)
    assert result.journal == "loraconv.journal"
    loraconv.unfuse(tmp_path / "out", out=tmp_path / "back")
    after = digests(tmp_path / "back")
    assert {name: after[name] for name in before} == before
    assert digests(base) == before


def test_in_place_of_a_pipeline_replaces_its_transformer(tmp_path: Path, adapter: Path) -> None:
    base = pipeline(tmp_path / "base", base_state())
    (base / "transformer" / "diffusion_pytorch_model.bin").unlink()
    before = digests(base)
    loraconv.fuse(adapter, base=base, in_place=True)
    after = digests(base)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"transformer/{name}" for name in (WEIGHTS, "loraconv.json", "loraconv.journal")}
    loraconv.unfuse(base / "transformer", out=tmp_path / "back")
    assert digests(tmp_path / "back")[WEIGHTS] == before[f"transformer/{WEIGHTS}"]


def test_a_second_fusion_in_place_does_not_delete_the_way_back(tmp_path: Path, base: Path, adapter: Path) -> None:
    loraconv.fuse(adapter, base=base, in_place=True)
    other = write_adapter(tmp_path / "other.safetensors", factors(2))
    before = snapshot(tmp_path)
    with pytest.raises(FormatError) as refused:
        loraconv.fuse(other, base=base, in_place=True)
    assert refused.value.slug == "in-place-loss"
    assert "loraconv.journal" in refused.value.where
    assert snapshot(tmp_path) == before


def test_in_place_is_refused_where_something_would_be_lost(tmp_path: Path, base: Path, adapter: Path) -> None:
    (base / "diffusion_pytorch_model.bin").write_bytes(b"other weights")
    before = snapshot(tmp_path)
    with pytest.raises(FormatError) as refused:
        loraconv.fuse(adapter, base=base, in_place=True)
    assert refused.value.slug == "in-place-loss"
    with pytest.raises(UsageError) as single:
        loraconv.fuse(adapter, base=base / WEIGHTS, in_place=True)
    assert single.value.slug == "in-place"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("change", ["a new file", "a settings file", "the weights"])
def test_a_base_that_changes_meanwhile_is_not_replaced(
    tmp_path: Path, base: Path, adapter: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv.fusion import running

    def disturb(*arguments: Any, **options: Any) -> Any:
        if change == "a new file":
            (base / "notes.txt").write_text("keep me")
        elif change == "a settings file":
            (base / "config.json").write_text("{}")
        else:
            os.utime(base / WEIGHTS, ns=(1, 1))
        return write(*arguments, **options)

    write = running.write_shards
    monkeypatch.setattr(running, "write_shards", disturb)
    with pytest.raises(CorruptCheckpoint) as refused:
        loraconv.fuse(adapter, base=base, in_place=True)
    assert refused.value.slug == "input-changed"
    same_bits(load_file(base / WEIGHTS), base_state())
    assert sorted(p for p in os.listdir(tmp_path) if p.startswith(".")) == []


def test_a_journal_needs_the_base_dtypes(tmp_path: Path, base: Path, adapter: Path) -> None:
    for options in ({"in_place": True}, {"journal": True, "out": tmp_path / "out"}):
        with pytest.raises(FormatError) as refused:
            loraconv.fuse(adapter, base=base, dtype="bf16", **options)  # type: ignore[arg-type]
        assert refused.value.slug == "journal-dtype"


# --- what is refused ----------------------------------------------------------------------------------------------


def test_an_adapter_is_not_fused_twice(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    loraconv.fuse(adapter, base=base, out=out)
    copy = shutil.copy(adapter, tmp_path / "copy.safetensors")
    for model in (out, out / WEIGHTS):
        with pytest.raises(UsageError) as twice:
            loraconv.fuse(f"{copy}@0.5", base=model, out=tmp_path / "again")
        assert twice.value.slug == "fused-twice"
        assert twice.value.hint == "take the original base"  # without a journal there is no way back
    loraconv.fuse(adapter, base=base, out=tmp_path / "with", journal=True)
    with pytest.raises(UsageError) as twice:
        loraconv.fuse(adapter, base=tmp_path / "with", out=tmp_path / "again")
    assert f"loraconv unfuse {tmp_path / 'with'} -o BASE" in twice.value.hint
    with pytest.raises(UsageError) as named:
        loraconv.fuse(adapter, copy, base=base, out=tmp_path / "again")
    assert named.value.slug == "fused-twice"
    other = write_adapter(tmp_path / "other.safetensors", factors(2))
    result = loraconv.fuse(other, base=out, out=tmp_path / "both")
    assert any("fused before, with lora.safetensors@1" in notice for notice in result.notices)
    listed = json.loads(header(tmp_path / "both" / WEIGHTS)["loraconv.fused"])
    assert [entry["adapter"] for entry in listed] == ["lora.safetensors", "other.safetensors"]
    with pytest.raises(UsageError):
        loraconv.fuse(adapter, base=tmp_path / "both", out=tmp_path / "thrice")


def _narrow(folder: Path) -> Sequence[Any]:
    return [write_adapter(folder / "x.safetensors", factors(width=16))]


def _deeper(folder: Path) -> Sequence[Any]:
    return [write_adapter(folder / "x.safetensors", factors(layers=5))]


def _nan(value: float) -> Callable[[Path], Sequence[Any]]:
    def make(folder: Path) -> Sequence[Any]:
        tensors = factors()
        next(iter(tensors.values()))[0, 0] = value
        return [write_adapter(folder / "x.safetensors", tensors)]

    return make


def _zero(folder: Path) -> Sequence[Any]:
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in factors().items()}
    return [write_adapter(folder / "x.safetensors", tensors)]


def _whole_model(folder: Path) -> Sequence[Any]:
    return [build(RunSpec(num_layers=1, kind="full"), folder)]


def _fine(folder: Path) -> Path:
    return write_adapter(folder / "fine.safetensors", factors())


Bad = tuple[Callable[[Path], Sequence[Any]], dict[str, Any], type[LoraconvError], str, str]

#: What is passed as adapters, options, the error, its slug, a word that the user must see.
BAD: dict[str, Bad] = {
    "no adapter": (lambda f: [], {}, UsageError, "usage", "loraconv fuse"),
    "no such adapter": (lambda f: [f / "no"], {}, UsageError, "not-found", "no such file"),
    "a strength that is no number": (lambda f: [f"{_fine(f)}@much"], {}, UsageError, "strength", "@0.8"),
    "a strength that is a bomb": (lambda f: [f"{_fine(f)}@1e999999999"], {}, UsageError, "strength", "@0.8"),
    "a strength of nothing": (lambda f: [f"{_fine(f)}@0"], {}, UsageError, "strength", "0"),
    "not a number as strength": (lambda f: [f"{_fine(f)}@nan"], {}, UsageError, "strength", "nan"),
    "a rank against the tensors": (
        lambda f: [_fine(f)], {"rank": 8}, FormatError, "rank-contradiction", "it says 8, they say 4",
    ),
    "a rank in the record against the tensors": (
        lambda f: [write_adapter(f / "x.safetensors", factors(), r=8)], {}, FormatError, "rank-contradiction", "says 8",
    ),
    "alpha of two adapters": (
        lambda f: [_fine(f), write_adapter(f / "y", factors(2))], {"alpha": 1}, UsageError, "usage", "several",
    ),
    "alpha of zero": (lambda f: [_fine(f)], {"alpha": 0}, UsageError, "usage", "above 0"),
    "a dtype with a typo": (lambda f: [_fine(f)], {"dtype": "f16"}, UsageError, "usage", "fp16"),
    "a size without a unit": (lambda f: [_fine(f)], {"max_shard_size": "5"}, UsageError, "usage", "10GB"),
    "narrower than the base": (_narrow, {}, FormatError, "base-mismatch", "base 32x32, adapter 16x16"),
    "deeper than the base": (_deeper, {}, FormatError, "no-home", "transformer_blocks.{3...4}.attn1.to_q"),
    "not a number": (_nan(np.nan), {}, CorruptCheckpoint, "nonfinite", "transformer_blocks.0"),
    "infinity": (_nan(np.inf), {}, CorruptCheckpoint, "nonfinite", "transformer_blocks.0"),
    "untrained": (_zero, {}, FormatError, "adapter-zero", "does nothing"),
    "a whole model": (_whole_model, {}, FormatError, "no-lora", "no LoRA"),
    "in place and elsewhere": (lambda f: [_fine(f)], {"in_place": True}, UsageError, "usage", "--in-place"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fused_is_refused_before_a_byte_is_written(tmp_path: Path, base: Path, case: str) -> None:
    make, options, kind, slug, word = BAD[case]
    adapters = make(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(kind) as refused:
        loraconv.fuse(*adapters, base=base, out=tmp_path / "out", **options)
    assert refused.value.slug == slug
    assert word in str(refused.value)
    hint = refused.value.hint
    assert hint
    if hint.startswith("loraconv "):
        parsed_hint(hint)
    assert snapshot(tmp_path) == before


def test_a_module_without_a_home_is_told_with_the_nearest_names(tmp_path: Path, adapter: Path) -> None:
    state = {name.replace("attn1.to_q", "attn1.to_query"): tensor for name, tensor in base_state().items()}
    base = write_base(tmp_path / "base", state)
    with pytest.raises(FormatError) as refused:
        loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert refused.value.slug == "no-home"
    assert "transformer_blocks.{0...2}.attn1.to_q (3 keys)" in refused.value.where
    assert "attn1.to_query" in refused.value.why


def _of(**changes: torch.Tensor) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_base(folder / "base", {**base_state(), **changes})

    return make


def _config(folder: Path) -> Path:
    return write_base(folder / "base", base_state(), config={"quantization_config": {"quant_method": "torchao"}})


def _gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    return folder / "model.gguf"


def _linked(folder: Path) -> Path:
    made = write_base(folder / "made", base_state())
    (folder / "base").mkdir()
    for file in made.iterdir():
        (folder / "base" / file.name).symlink_to(file)
    return folder / "base"


FIRST = "transformer_blocks.0.attn1.to_q.weight"
BASES: dict[str, tuple[Callable[[Path], Path], type[LoraconvError], str]] = {
    "4 bit": (_of(**{f"{FIRST}.absmax": torch.ones(3)}), FormatError, "base-quantised"),
    "8 bit": (_of(**{FIRST: torch.ones(WIDTH, WIDTH, dtype=torch.int8)}), FormatError, "base-quantised"),
    "fp8": (_of(**{FIRST: torch.ones(WIDTH, WIDTH).to(torch.float8_e4m3fn)}), FormatError, "base-quantised"),
    "by its settings": (_config, FormatError, "base-quantised"),
    "GGUF": (_gguf, FormatError, "base-quantised"),
    "float64": (_of(**{FIRST: torch.ones(WIDTH, WIDTH).double()}), FormatError, "dtype-unsupported"),
    "a bias of another shape": (_of(**{FIRST: torch.ones(WIDTH)}), FormatError, "base-mismatch"),
    "links that lead out": (_linked, UnsafeCheckpoint, "link-outside"),
    "nothing": (lambda f: f / "nothing", UsageError, "not-found"),
    "an empty folder": (lambda f: f, FormatError, "no-weights"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_fused_into_is_refused_before_a_byte_is_written(
    tmp_path: Path, adapter: Path, case: str
) -> None:
    make, kind, slug = BASES[case]
    (tmp_path / "b").mkdir()
    base = make(tmp_path / "b")
    before = snapshot(tmp_path)
    with pytest.raises(kind) as refused:
        loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert refused.value.slug == slug
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_base_with_numbers_that_are_none_is_refused_and_nothing_is_left(
    tmp_path: Path, adapter: Path, bad: float
) -> None:
    state = base_state(torch.float16)
    state[FIRST][3, 4] = bad
    base = write_base(tmp_path / "base", state)
    with pytest.raises(CorruptCheckpoint) as refused:
        loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert refused.value.slug == "nonfinite"
    assert FIRST in refused.value.what
    assert sorted(os.listdir(tmp_path)) == ["base", adapter.name]


def test_a_sum_that_the_dtype_cannot_hold_is_an_error_that_names_the_tensor(tmp_path: Path, cli: Cli) -> None:
    base = write_base(tmp_path / "base", base_state(torch.float16))
    lora = write_adapter(tmp_path / "lora.safetensors", factors(std=100), alpha=4000)
    done = cli("fuse", lora, "--base", base, "-o", tmp_path / "out")
    assert_clear_error(done, {4})
    assert "transformer_blocks.0.attn1" in done.err
    assert "fp16" in done.err
    assert not (tmp_path / "out").exists()
    assert cli("fuse", lora, "--base", base, "-o", tmp_path / "out", "--dtype", "bf16").code == 0


def test_an_output_is_replaced_only_if_it_is_ours_and_asked_for(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    loraconv.fuse(adapter, base=base, out=out)
    with pytest.raises(WriteFailed) as there:
        loraconv.fuse(adapter, base=base, out=out)
    assert there.value.slug == "output-exists"
    loraconv.fuse(f"{adapter}@0.5", base=base, out=out, overwrite=True)
    (out / "mine.txt").write_text("")
    with pytest.raises(WriteFailed) as foreign:
        loraconv.fuse(adapter, base=base, out=out, overwrite=True)
    assert foreign.value.slug == "output-foreign"
    for inside in (base, base / "sub", base / ".." / "base"):
        with pytest.raises(UsageError) as same:
            loraconv.fuse(adapter, base=base, out=inside, overwrite=True)
        assert same.value.slug == "output-is-input"


@pytest.mark.parametrize("where", ["fused", "untouched", "header"])
def test_a_wrong_output_is_not_left_behind(
    tmp_path: Path, base: Path, adapter: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changes between the writing and the proof."""
    from loraconv.errors import ProofFailed
    from loraconv.fusion import running

    def spoil(*arguments: Any, **options: Any) -> Any:
        written = write(*arguments, **options)
        (file,) = written.files.values()
        data = bytearray(file.path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        name = {"fused": FIRST, "untouched": "norm_out.linear.bias", "header": FIRST}[where]
        entry = json.loads(data[8:start])[name]
        at = start + entry["data_offsets"][0] + 6  # the last bit of the mantissa's high byte
        data[20 if where == "header" else at] ^= 0x40
        with file.path.open("r+b") as opened:
            opened.write(data)
        return written

    write = running.write_shards
    monkeypatch.setattr(running, "write_shards", spoil)
    with pytest.raises((ProofFailed, CorruptCheckpoint)):
        loraconv.fuse(adapter, base=base, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["base", adapter.name]


# --- the command line ---------------------------------------------------------------------------------------------


def test_the_json_of_a_fusion_has_schema_1_and_the_documented_keys(
    tmp_path: Path, base: Path, adapter: Path, cli: Cli
) -> None:
    value = json.loads(cli("fuse", adapter, "--base", base, "-o", tmp_path / "out", "--json").out)
    assert set(value) == {
        "schema", "kind", "out", "dry_run", "base", "adapters", "fused", "beside", "tensors", "files", "crc32", "kept",
        "proofs", "notices", "options", "journal",
    }  # fmt: skip
    assert (value["schema"], value["kind"], value["tensors"]) == (1, "fused", 29)


def test_progress_goes_to_a_terminal_and_nowhere_else(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loraconv.cli import progress, run

    words = ["fuse", str(adapter), "--base", str(base), "--no-prove", "-o"]
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    monkeypatch.setattr(progress, "_NEXT", 0.0)
    assert run([*words, str(tmp_path / "pipe")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run([*words, str(tmp_path / "terminal")]) == 0
    said = capsys.readouterr().err
    assert "100 %" in said
    assert " s left" in said
    assert said.endswith("\r\x1b[K")
    for more, env in ((["--json"], {}), (["-q"], {}), ([], {"TERM": "dumb"})):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert run([*words, str(tmp_path / f"quiet{len(more)}{len(env)}{more}"), *more]) == 0
        assert capsys.readouterr().err == ""

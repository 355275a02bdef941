"""Checkpoints of the real training stack become exactly what was worked out from them by other means."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import FormatError
from tests.conftest import Converted
from tests.forward import forward, relative_l2
from tests.sat_run import build, peer_mapping
from tests.support import (
    BASE_FILE,
    FIXTURES,
    LORA_FILE,
    PARALLEL,
    RECORDED,
    Recorded,
    add_lora,
    expected,
    folded_adapter,
    header,
    load_transformer,
    merge_ranks,
    module_of,
    raw,
    same_bits,
    scale_of,
    sha256,
    small,
    stated,
    tensors_in,
)

each_recorded = pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
LATE_BASE = FIXTURES / "sat" / "cogvideox-5b-t2v-late-base" / "transformer"
LATE = next(r for r in RECORDED if r.name == "cogvideox-5b-t2v-late")


def expected_base(recorded: Recorded) -> dict[str, tuple[list[int], str, str]]:
    text = (recorded.folder / "expected_base_diffusers.json").read_text()
    return {name: (shape, dtype, digest) for name, (shape, dtype, digest) in json.loads(text).items()}


def described(folder: Path) -> dict[str, tuple[list[int], str, str]]:
    tensors = tensors_in(*folder.glob("*.safetensors"))
    return {name: (list(t.shape), str(t.dtype), sha256(t)) for name, t in tensors.items()}


# --- the LoRA -------------------------------------------------------------------------------------------------------


@each_recorded
def test_the_down_factors_are_the_trained_bytes(recorded: Recorded, converted: Converted) -> None:
    got = load_file(converted(recorded) / LORA_FILE)
    want = load_file(recorded.folder / "expected_lora_diffusers.safetensors")
    assert sorted(got) == sorted(want)
    downs = [name for name in want if ".lora_A." in name]
    assert len(downs) == 12
    for name in downs:
        assert got[name].dtype == want[name].dtype
        assert raw(got[name]) == raw(want[name])


@each_recorded
def test_the_up_factors_hold_the_scale_without_rounding(recorded: Recorded, converted: Converted) -> None:
    source = recorded.folder / "expected_lora_diffusers.safetensors"
    got, want, scale = load_file(converted(recorded) / LORA_FILE), load_file(source), float(header(source)["scale"])
    assert scale == 0.25
    for name in (name for name in want if ".lora_B." in name):
        assert got[name].dtype == want[name].dtype
        assert torch.equal(got[name].double(), want[name].double() * scale)


@each_recorded
def test_the_header_says_scale_one_once_the_scale_is_folded(recorded: Recorded, converted: Converted) -> None:
    told = stated(converted(recorded))
    assert told["transformer.r"] == told["transformer.lora_alpha"] == 4
    assert told["transformer.use_rslora"] is False
    assert told["transformer.alpha_pattern"] == told["transformer.rank_pattern"] == {}
    assert set(told["transformer.target_modules"]) == {
        f"transformer_blocks.{i}.attn1.{t}" for i in range(3) for t in ("to_q", "to_k", "to_v", "to_out.0")
    }


@each_recorded
def test_the_header_keeps_the_scale_and_the_factors_their_bytes_on_request(
    recorded: Recorded, converted: Converted
) -> None:
    out = converted(recorded, scale_in="metadata")
    same_bits(load_file(out / LORA_FILE), load_file(recorded.folder / "expected_lora_diffusers.safetensors"))
    told = stated(out)
    assert told["transformer.lora_alpha"] / told["transformer.r"] == 0.25


@each_recorded
def test_the_manifest_names_every_file_and_its_sum(recorded: Recorded, converted: Converted) -> None:
    out = converted(recorded)
    manifest = json.loads((out / "loraconv.json").read_text())
    assert {f["name"] for f in manifest["files"]} | {"loraconv.json"} == {p.name for p in out.iterdir()}
    for file in manifest["files"]:
        data = (out / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert all(check["passed"] for proof in manifest["proofs"] for check in proof["checks"])
    assert [c for p in manifest["proofs"] for c in p["controls"] if c["caught"]]


# --- the base -------------------------------------------------------------------------------------------------------


@each_recorded
def test_the_base_has_the_expected_names_shapes_dtypes_and_bytes(recorded: Recorded, converted: Converted) -> None:
    assert described(converted(recorded, what="base")) == expected_base(recorded)


@each_recorded
def test_the_base_has_the_configuration_that_makes_diffusers_equal(recorded: Recorded, converted: Converted) -> None:
    assert json.loads((converted(recorded, what="base") / "config.json").read_text()) == recorded.config


def test_a_released_base_converts_like_the_base_inside_a_run(tmp_path: Path) -> None:
    loraconv.sat2diffusers(LATE_BASE, out=tmp_path / "out", what="base")
    assert described(tmp_path / "out") == expected_base(LATE)


def test_a_released_base_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no LoRA") as caught:
        loraconv.sat2diffusers(LATE_BASE, out=tmp_path / "out")
    assert caught.value.slug == "no-lora"
    assert "--what base" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_all_writes_both_parts_with_the_bytes_of_each_alone(tmp_path: Path, converted: Converted) -> None:
    recorded = RECORDED[0]
    out = converted(recorded, what="all")
    assert (out / LORA_FILE).read_bytes() == (converted(recorded) / LORA_FILE).read_bytes()
    base = converted(recorded, what="base")
    for name in (BASE_FILE, "config.json"):
        assert (out / "transformer" / name).read_bytes() == (base / name).read_bytes()


def test_a_sharded_base_is_the_same_model(converted: Converted) -> None:
    recorded = RECORDED[0]
    out = converted(recorded, what="base", max_shard_size="200KB")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / f"{BASE_FILE}.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(expected_base(recorded))
    assert {p.name for p in shards} == set(index["weight_map"].values())
    assert described(out) == expected_base(recorded)
    loaded = load_transformer(out).state_dict()
    want = load_file(converted(recorded, what="base") / BASE_FILE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in want.items())


def test_the_positions_of_the_2b_are_left_out_and_those_of_the_image_model_kept(converted: Converted) -> None:
    for name, kept in (("cogvideox-2b-t2v", False), ("cogvideox-5b-i2v", True)):
        recorded = next(r for r in RECORDED if r.name == name)
        found = load_file(converted(recorded, what="base") / BASE_FILE)
        assert ("patch_embed.pos_embedding" in found) is kept


# --- model parallelism ------------------------------------------------------------------------------------------------


def parallel_modules() -> list:
    return [module_of(file) for file in sorted(PARALLEL.iteration.glob("*.pt"))]


def test_the_base_of_two_ranks_merges_bit_for_bit(converted: Converted) -> None:
    out = converted(PARALLEL, what="base")
    same_bits(load_file(out / BASE_FILE), peer_mapping(merge_ranks(parallel_modules()), variant="5b").base)
    assert json.loads((out / "config.json").read_text()) == PARALLEL.config


def test_the_base_of_two_ranks_computes_what_the_ranks_computed_together(converted: Converted) -> None:
    reference = PARALLEL.reference
    output = forward(load_transformer(converted(PARALLEL, what="base")), reference)
    assert relative_l2(output, reference["out_base"]) <= 1e-6


def test_a_lora_of_two_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no single adapter") as caught:
        loraconv.sat2diffusers(PARALLEL.run, out=tmp_path / "out")
    assert caught.value.slug == "model-parallel-lora"
    assert "--nearest" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_adapter_of_two_ranks_is_as_near_as_measured(converted: Converted) -> None:
    reference = PARALLEL.reference
    transformer = load_transformer(converted(PARALLEL, what="base"))
    add_lora(transformer, converted(PARALLEL, nearest=True))
    output = forward(transformer, reference)
    first, second = (relative_l2(output, reference[f"out_lora_rank{rank}"]) for rank in (0, 1))
    assert 0.02 < first < 0.06
    assert 0.02 < second < 0.075
    undivided = [relative_l2(reference["out_lora_cat_form_diffusers"], reference[f"out_lora_rank{r}"]) for r in (0, 1)]
    assert (first + second) / 2 < sum(undivided) / 2
    # and it is far better than leaving the output projection out, or the whole adapter
    for other in ("out_lora_qkv_only", "out_base"):
        assert relative_l2(reference[other], reference["out_lora_rank0"]) > first


def test_the_nearest_merge_says_that_it_is_one_and_how_far_off(tmp_path: Path) -> None:
    result = loraconv.sat2diffusers(PARALLEL.run, out=tmp_path / "out", nearest=True)
    said = " ".join(result.notices)
    assert "nearest" in said
    assert any(mark in said for mark in ("%", "relative"))


# --- where the checkpoint is looked for -------------------------------------------------------------------------------


@pytest.fixture
def run_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED[0].run, tmp_path / "run"))


def lora_bytes(source: Path, out: Path, **options: object) -> bytes:
    loraconv.sat2diffusers(source, out=out, **options)  # type: ignore[arg-type]
    return (out / LORA_FILE).read_bytes()


def test_run_folder_iteration_folder_and_file_give_the_same_bytes(run_copy: Path, tmp_path: Path) -> None:
    file = run_copy / "2" / "mp_rank_00_model_states.pt"
    renamed = shutil.copy(file, run_copy / "2" / "my lora.pt")
    alone = tmp_path / "elsewhere" / "renamed.bin"
    alone.parent.mkdir()
    shutil.copy(file, alone)
    made = [
        lora_bytes(source, tmp_path / f"out-{number}")
        for number, source in enumerate((run_copy, run_copy / "2", file, Path(renamed), alone))
    ]
    assert len(made) == 5
    # The last one has no settings beside it; they name no alpha, so the bytes of the tensors are the same ones.
    assert len(set(made[:4])) == 1
    same_bits(load_file(tmp_path / "out-4" / LORA_FILE), load_file(tmp_path / "out-0" / LORA_FILE))


def test_an_ema_folder_named_like_the_iteration_gives_the_same_bytes(run_copy: Path, tmp_path: Path) -> None:
    shutil.copytree(run_copy / "2", run_copy / "2-ema")
    plain = lora_bytes(run_copy, tmp_path / "plain")
    assert lora_bytes(run_copy / "2-ema", tmp_path / "ema") == plain


def test_the_ema_folder_is_converted_only_when_it_is_named(tmp_path: Path) -> None:
    spec = small(ema=True)
    run = build(spec, tmp_path)
    for source, ema in ((run, False), (run / "2", False), (run / "2-ema", True)):
        out = tmp_path / f"out-{source.name}"
        loraconv.sat2diffusers(source, out=out)
        want = folded_adapter(expected(spec, ema=ema).adapter, scale_of(spec))
        same_bits(load_file(out / LORA_FILE), want)


def test_the_pointer_chooses_the_iteration(tmp_path: Path) -> None:
    early, late = small(iteration=2, seed=1), small(iteration=10, seed=2)
    run = build(early, tmp_path)
    build(late, tmp_path)
    for spec in (early, late):
        (run / "latest").write_text(f"{spec.iteration}\n")
        out = tmp_path / f"out-{spec.iteration}"
        loraconv.sat2diffusers(run, out=out)
        same_bits(load_file(out / LORA_FILE), folded_adapter(expected(spec).adapter, scale_of(spec)))


def test_the_same_conversion_gives_the_same_bytes_in_every_file(run_copy: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        loraconv.sat2diffusers(run_copy, out=tmp_path / name, what="all")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_dry_run_says_the_same_and_writes_nothing(run_copy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    planned = loraconv.sat2diffusers(run_copy, out=tmp_path / "out", what="all", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert planned.files == ()
    done = loraconv.sat2diffusers(run_copy, out=tmp_path / "out", what="all")
    assert planned.to_dict()["plan"] == done.to_dict()["plan"]
    assert planned.notices == done.notices

"""DeepSpeed's ZeRO checkpoints. Real ones (``fixtures/zero``) become what DeepSpeed's own ``zero_to_fp32.py`` makes of
them, bit for bit; what a broken copy of one looks like is laid out by ``zero_files``, and refused by name."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, UsageError
from loraconv.gathered import cut, gathered
from loraconv.io.input_file import InputFile
from loraconv.io.torch_read import read_torch
from loraconv.lazy import Lazy, TensorRef, decode
from loraconv.source import open_source
from tests.sat_run import RunSpec, build
from tests.zero_files import MODULES, Root, frozen, trained, write

FIXTURES = Path(__file__).parent.parent / "fixtures" / "zero"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16}


def tensor_of(lazy: Lazy) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(lazy.pieces())), dtype=TORCH[lazy.dtype]).reshape(lazy.shape)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, those of the base, too."""
    with open_source(path) as source:
        return {name: tensor_of(ref) for name, ref in {**source.tensors, **source.frozen}.items()}


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_deepspeed_s_own_script(case: str) -> None:
    truth = load_file(FIXTURES / case / "truth.safetensors")
    got = read(FIXTURES / case)
    assert truth
    assert equal(got, truth)
    factors = {name for name in truth if "lora_" in name}
    assert len(factors) == 4
    assert {got[name].dtype for name in factors} == {torch.float32}


@pytest.mark.parametrize("case", [case for case in CASES if "stage3" not in case])
def test_the_fp32_copies_round_to_the_weights_that_the_model_ran_with(case: str) -> None:
    """A second oracle for the order of the parts, which DeepSpeed's script shares with ours: the model file."""
    ran = read(FIXTURES / case / "global_step3" / "mp_rank_00_model_states.pt")
    copies = read(FIXTURES / case)
    factors = [name for name in copies if "lora_" in name]
    assert len(factors) == 4
    for name in factors:
        assert torch.equal(copies[name].to(ran[name].dtype), ran[name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_converted_and_verified(case: str, tmp_path: Path) -> None:
    truth = load_file(FIXTURES / case / "truth.safetensors")
    drop = ["*.modules_to_save.*"] if any("modules_to_save" in name for name in truth) else []
    result = loraconv.convert(FIXTURES / case, out=tmp_path / "out", to="peft", alpha=6, drop=drop)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    want = {name.replace(".default", ""): tensor for name, tensor in truth.items() if "lora_" in name}
    assert set(made) == set(want)
    assert equal(made, want)
    said = "\n".join(result.notices)
    assert "fp32 copies" in said
    assert f"ZeRO {case[5]}" in said
    assert "12 tensors are the base's own" in said
    if not drop:
        assert loraconv.verify(FIXTURES / case, tmp_path / "out", alpha=6).same


def test_the_whole_tensors_in_the_training_dtype_are_read_where_their_file_is_named(tmp_path: Path) -> None:
    step = FIXTURES / "stage2-3ranks" / "global_step3"
    file = step / "mp_rank_00_model_states.pt"
    result = loraconv.convert(file, out=tmp_path / "out", to="peft", alpha=6)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert any("training dtype" in notice and str(step) in notice for notice in result.notices)
    assert any(str(file) in notice for notice in loraconv.inspect(step).notices), "the way there is told"
    rounded = loraconv.convert(step, out=tmp_path / "rounded", to="peft", alpha=6, dtype="bf16")
    assert equal(load_file(rounded.out / "adapter_model.safetensors"), made)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_tensors(stage: int, ranks: int, tmp_path: Path) -> None:
    step = write(tmp_path, stage, ranks=ranks)
    for path in (step, step.parent):
        assert equal(read(path), {**trained(), **frozen()})


def test_what_deepspeed_0_19_puts_behind_a_parameter_is_not_part_of_the_next(tmp_path: Path) -> None:
    behind = [n % 3 for n in range(len(trained()))]

    def padded(root: Root, kind: str, rank: int) -> None:
        if kind == "optim":
            numbers = [pad(t.flatten(), (0, n), value=9) for t, n in zip(trained().values(), behind, strict=True)]
            groups(root)[0] = torch.cat(numbers).tensor_split(2)[rank].clone()
            state(root)["param_alignment_paddings"] = [behind]

    assert equal(read(write(tmp_path, 2, change=padded)), {**trained(), **frozen()})


def test_more_is_left_over_than_fills_up_the_ranks(tmp_path: Path) -> None:
    """168 numbers and 5 ranks: 170 are 17 times 10, and 180 are not what DeepSpeed makes of them."""

    def longer(root: Root, kind: str, rank: int) -> None:
        if (kind, rank) == ("optim", 4):
            groups(root)[0] = pad(groups(root)[0], (0, 10))

    error = refused(write(tmp_path, 2, ranks=5, change=longer), "zero-parts")
    assert "17 blocks of 10 numbers, and there are 18" in error.why


def test_a_number_that_was_changed_on_the_disk_is_found_by_its_checksum(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "stage3-3ranks", tmp_path / "run")
    with open_source(tmp_path / "run") as source:
        leaf = list(source.tensors[f"{MODULES[0]}.lora_B.default.weight"].leaves())[1]
    raw = bytearray(leaf.file.path.read_bytes())
    raw[leaf.offset] ^= 1
    leaf.file.path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.convert(tmp_path / "run", out=tmp_path / "out", to="peft", alpha=6, drop=["*.modules_to_save.*"])
    assert caught.value.slug == "checksum"
    assert leaf.file.path.name in caught.value.where


@pytest.mark.parametrize("case", CASES)
def test_every_file_that_is_missing_or_cut_short_is_named(case: str, tmp_path: Path) -> None:
    for file in sorted((FIXTURES / case / "global_step3").iterdir()):
        shutil.copytree(FIXTURES / case, tmp_path / "run")
        copy = tmp_path / "run" / "global_step3" / file.name
        copy.write_bytes(copy.read_bytes()[:-100])
        with pytest.raises(CorruptCheckpoint, match=file.name):
            loraconv.inspect(tmp_path / "run")
        copy.unlink()
        with pytest.raises(LoraconvError) as caught:
            loraconv.inspect(tmp_path / "run")
        assert caught.value.slug in ("rank-missing", "zero-shards")
        assert f"{file.name.rpartition('_rank_00_')[2] or file.name}" in caught.value.why
        shutil.rmtree(tmp_path / "run")


def refused(path: Path, slug: str) -> LoraconvError:
    with pytest.raises(LoraconvError) as caught:
        loraconv.inspect(path)
    assert caught.value.slug == slug
    return caught.value


BROKEN: dict[str, tuple[int, str, str, Any]] = {
    "another step": (2, "rank-mixed", "step", lambda r: state(r)["base_optimizer_state"]["state"][0].update(step=8)),
    "another stage": (2, "rank-mixed", "zero_stage", lambda r: state(r).update(zero_stage=1)),
    "another release": (3, "rank-mixed", "ds_version", lambda r: r.update(ds_version="0.16")),
    "fewer ranks": (3, "rank-mixed", "partition_count", lambda r: state(r).update(partition_count=1)),
    "experts": (2, "zero-shards", "experts", lambda r: state(r).update(partition_count=[2, 1])),
    "no number": (2, "zero-shards", "partition_count", lambda r: state(r).update(partition_count="2")),
    "no parts": (2, "zero-shards", "optim", lambda r: r.pop("optimizer_state_dict")),
    "a matrix": (2, "zero-shards", "flat", lambda r: groups(r).__setitem__(0, groups(r)[0].reshape(2, -1))),
    "whole numbers": (2, "zero-shards", "flat", lambda r: groups(r).__setitem__(0, groups(r)[0].long())),
    "too short, ZeRO 2": (2, "zero-parts", "", lambda r: groups(r).__setitem__(0, groups(r)[0][:-4].clone())),
    "too short, ZeRO 3": (3, "zero-parts", "", lambda r: groups(r).__setitem__(0, groups(r)[0][:-1].clone())),
    "too long, ZeRO 2": (2, "zero-parts", "", lambda r: groups(r).__setitem__(0, pad(groups(r)[0], (0, 4)))),
    "too long, ZeRO 3": (3, "zero-parts", "", lambda r: groups(r).__setitem__(0, pad(groups(r)[0], (0, 1)))),
    "another group": (2, "zero-parts", "", lambda r: groups(r).append(groups(r)[0])),
    "half precision": (2, "zero-parts", "", lambda r: groups(r).__setitem__(0, groups(r)[0].half())),
}  # fmt: skip


def state(root: Root) -> Root:
    found: Root = root["optimizer_state_dict"]
    return found


def groups(root: Root) -> list[torch.Tensor]:
    found = state(root)
    held: list[torch.Tensor] = found[next(key for key in found if "fp32" in key)]
    return held


@pytest.mark.parametrize("what", BROKEN)
def test_an_optimizer_file_that_is_not_of_the_run_is_refused_by_name(what: str, tmp_path: Path) -> None:
    stage, slug, why, breaks = BROKEN[what]
    step = write(tmp_path, stage, change=lambda root, *which: breaks(root) if which == ("optim", 1) else None)
    error = refused(step, slug)
    assert why in error.why
    assert error.hint
    if slug == "rank-mixed":
        assert "of zero_pp_rank_0_mp_rank_00_" in error.why
        assert "of zero_pp_rank_1_mp_rank_00_optim_states.pt" in error.why


MODELS: dict[str, tuple[int, str, str, Any]] = {
    "another step": (3, "rank-mixed", "global_steps", lambda r: r.update(global_steps=8)),
    "other shapes": (3, "rank-mixed", "shapes", lambda r: r["param_shapes"][0].popitem()),
    "a frozen part too short": (3, "zero-parts", "", lambda r: shorten(r["frozen_param_fragments"])),
    "no frozen parts": (3, "zero-parts", "", lambda r: r.update(frozen_param_fragments=None)),
    "no frozen part": (3, "zero-parts", "", lambda r: r["frozen_param_fragments"].popitem()),
}


def shorten(fragments: dict[str, torch.Tensor]) -> None:
    name = next(iter(fragments))
    fragments[name] = fragments[name][:-2].clone()


@pytest.mark.parametrize("what", MODELS)
def test_a_model_file_that_is_not_of_the_run_is_refused_by_name(what: str, tmp_path: Path) -> None:
    stage, slug, why, breaks = MODELS[what]
    step = write(tmp_path, stage, change=lambda root, *which: breaks(root) if which == ("model", 1) else None)
    assert why in refused(step, slug).why


@pytest.mark.parametrize("key", ["param_shapes", "module"])
def test_a_model_file_that_does_not_name_its_tensors_is_refused(key: str, tmp_path: Path) -> None:
    step = write(tmp_path, 2, change=lambda root, kind, rank: None if kind == "optim" else root.update({key: None}))
    assert "mp_rank_00_model_states.pt" in refused(step, "zero-shards").why


def test_the_number_of_ranks_is_what_the_run_says(tmp_path: Path) -> None:
    step = write(tmp_path / "a", 3, ranks=3)
    for kind in ("model", "optim"):
        (step / f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt").unlink()
    assert "rank 2 of 3" in refused(step, "rank-missing").why
    step = write(tmp_path / "b", 3, ranks=2)
    for kind in ("model", "optim"):
        first = step / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
        shutil.copy(first, step / f"zero_pp_rank_2_mp_rank_00_{kind}_states.pt")
    assert "3 ranks have files, and the run had 2" in refused(step, "rank-extra").why


def test_the_files_of_two_stages_in_one_folder_are_refused(tmp_path: Path) -> None:
    step = write(tmp_path, 3)
    shutil.copy(write(tmp_path / "other", 2) / "mp_rank_00_model_states.pt", step)
    assert "ZeRO 3" in refused(step, "rank-mixed").why
    for file in step.glob("*_rank_*_model_states.pt"):
        if file.name.startswith("zero"):
            file.unlink()
    assert "ZeRO 3" in refused(step, "rank-mixed").why


def test_one_rank_under_two_names_is_refused(tmp_path: Path) -> None:
    step = write(tmp_path, 2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(step / name, step / f"bf16_{name}")
    assert f"bf16_{name}" in refused(step, "rank-duplicate").why


def test_parts_of_model_parallel_ranks_are_refused(tmp_path: Path) -> None:
    step = write(tmp_path, 3)
    for file in list(step.iterdir()):
        shutil.copy(file, step / file.name.replace("mp_rank_00", "mp_rank_01"))
    assert "model-parallel" in refused(step, "zero-shards").why


def test_fp32_copies_of_other_weights_than_those_beside_them_are_refused(tmp_path: Path) -> None:
    def other(root: Root, kind: str, rank: int) -> None:
        if kind == "model":
            root["module"][f"{MODULES[1]}.lora_B.default.weight"][3, 1] += 1

    step = write(tmp_path, 2, change=other)
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.convert(step, out=tmp_path / "out", to="peft", alpha=3)
    assert caught.value.slug == "rank-mixed"
    assert f"{MODULES[1]}.lora_B" in caught.value.where
    with pytest.raises(CorruptCheckpoint) as caught:
        loraconv.resize(step, out=tmp_path / "out", rank=2, alpha=3)
    assert caught.value.slug == "rank-mixed"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_part_alone_is_refused_with_the_way_to_the_folder(kind: str, tmp_path: Path) -> None:
    step = write(tmp_path, 3)
    error = refused(step / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt", "zero-shards")
    assert str(step) in error.hint


def test_the_step_is_the_one_that_latest_names(tmp_path: Path) -> None:
    run = write(tmp_path, 3).parent
    shutil.copytree(run / "global_step7", run / "global_step10")
    (run / "latest").write_text("global_step10")
    with open_source(run) as source:
        assert {file.path.parent.name for file in source.files} == {"global_step10"}
    (run / "latest").unlink()
    with pytest.raises(UsageError, match="several steps"):
        loraconv.inspect(run)
    shutil.rmtree(run / "global_step10")
    assert any("global_step7, was taken" in notice for notice in loraconv.inspect(run).notices)


def test_an_adapter_that_was_saved_whole_is_preferred_to_the_shards_beside_it(tmp_path: Path) -> None:
    """As the Trainer of transformers saves: adapter and shards in one ``checkpoint-N``."""
    step = write(tmp_path, 3)
    whole = {name.replace(".default", ""): tensor for name, tensor in trained().items()}
    save_file(whole, step.parent / "adapter_model.safetensors")
    (step.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 12}))
    assert loraconv.inspect(step.parent).container == "safetensors file"
    summary = loraconv.inspect(step)
    assert summary.container == "DeepSpeed ZeRO 3 checkpoint"
    assert summary.adapter is not None
    assert summary.adapter.scales == ("4",), "alpha is in adapter_config.json beside the step"


def test_a_factor_that_was_not_trained_is_a_factor_all_the_same(tmp_path: Path) -> None:
    """LoRA-FA trains B alone."""
    frozen_a = f"{MODULES[0]}.lora_A.default.weight"

    def freeze(root: Root, kind: str, rank: int) -> None:
        if kind == "model":
            root["param_shapes"][0] = {name: t.shape for name, t in trained().items() if name != frozen_a}
        else:
            groups(root)[0] = torch.cat([t.flatten() for n, t in trained().items() if n != frozen_a])

    step = write(tmp_path, 2, ranks=1, change=freeze)
    loraconv.convert(step, out=tmp_path / "out", to="peft", alpha=3)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(made[frozen_a.replace(".default", "")], trained()[frozen_a].bfloat16().to(torch.float32))
    assert len(made) == len(trained())


def test_a_shared_parameter_is_the_one_that_it_shares(tmp_path: Path) -> None:
    source, shared = f"{MODULES[0]}.lora_B.default.weight", f"{MODULES[0]}.lora_B.second.weight"
    step = write(tmp_path, 3, change=lambda root, kind, rank: root.update(shared_params={shared: source}))
    got = read(step)
    assert torch.equal(got[shared], trained()[source])


def test_what_became_of_the_frozen_base_is_still_told(tmp_path: Path) -> None:
    def other(root: Root, kind: str, rank: int) -> None:
        if kind == "model":
            root["module"][f"{MODULES[0]}.base_layer.weight"][0, 0] = 2

    before, after = write(tmp_path / "a", 2), write(tmp_path / "b", 2, change=other)
    (group,) = [one for one in loraconv.inspect(before).contents if one.what == "frozen base, left out"]
    assert (group.tensors, group.bytes) == (len(frozen()), sum(t.nbytes for t in frozen().values()))
    for place in ("", "mp_rank_00_model_states.pt"):
        assert loraconv.verify(before=before / place, after=before / place).same
        assert not loraconv.verify(before=before / place, after=after / place, expect="only-lora").same


def test_a_sat_run_is_read_from_its_fp32_copies(tmp_path: Path) -> None:
    """Everything trained, LoRA and base: fused projections are cut, numbers of several files joined and proved."""
    run = build(RunSpec(dtype=torch.bfloat16, zero_stage=2), tmp_path)
    file = next(run.glob("*/mp_rank_00_model_states.pt"))
    root = torch.load(file, weights_only=False)
    # The table of positions is computed, and trained by nobody.
    dit = {n: t for n, t in root["module"].items() if n.startswith("model.diffusion_model.") and "pos_embed" not in n}
    noise = torch.Generator().manual_seed(3)
    exact = {n: t.float() * (1 + 2e-3 * (torch.rand(t.shape, generator=noise) - 0.5)) for n, t in dit.items()}
    kept = {n: t.bfloat16() == dit[n] for n, t in exact.items()}  # a copy that rounds to another number is no copy
    exact = {n: torch.where(kept[n], t, dit[n].float()) for n, t in exact.items()}
    assert all(kept[n].any() for n in exact if n.endswith("query_key_value.original.weight"))
    root["param_shapes"] = [{name: tensor.shape for name, tensor in exact.items()}]
    torch.save(root, file)
    flat = torch.cat([tensor.flatten() for tensor in exact.values()])
    for rank, part in enumerate(flat.chunk(3)):
        held = {"zero_stage": 2, "partition_count": [3], "single_partition_of_fp32_groups": [part.clone()]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": held, "ds_version": root["ds_version"]}, file.with_name(name))
    loraconv.sat2diffusers(run, out=tmp_path / "out", what="all")
    torch.save({**root, "module": {**root["module"], **exact}}, file)
    for part in file.parent.glob("*optim*"):
        part.unlink()
    loraconv.sat2diffusers(run, out=tmp_path / "want", what="all")
    for made in ("pytorch_lora_weights.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        got, want = load_file(tmp_path / "out" / made), load_file(tmp_path / "want" / made)
        assert set(got) == set(want)
        assert {t.dtype for n, t in want.items() if "pos_embedding" not in n} == {torch.float32}
        assert equal(got, want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_and_columns_of_a_gathered_tensor_are_those_of_the_matrix(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 6))
    ends = data.draw(st.lists(st.integers(0, rows * width), max_size=4))
    want = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    bounds = [0, *sorted(ends), rows * width]
    folder = tmp_path_factory.mktemp("parts")
    flats = []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        torch.save([torch.from_numpy(want.reshape(-1)[start:stop].copy())], folder / f"{n}.pt")
        root = read_torch(InputFile(folder / f"{n}.pt"))
        assert isinstance(root, list)
        assert isinstance(root[0], TensorRef)
        flats.append(root[0])
    tensor = gathered("t", (rows, width), cut(flats, 0, rows * width))
    top, left = data.draw(st.integers(0, rows)), data.draw(st.integers(0, width))
    bottom, right = data.draw(st.integers(top, rows)), data.draw(st.integers(left, width))
    for got, part in (
        (tensor, want),
        (tensor.rows(top, bottom), want[top:bottom]),
        (tensor.columns(left, right), want[:, left:right]),
        (tensor.rows(top, bottom).columns(left, right), want[top:bottom, left:right]),
    ):
        assert got.shape == part.shape
        assert np.array_equal(decode(b"".join(got.pieces()), got.dtype).reshape(got.shape), part)


def test_more_numbers_than_there_are_cannot_be_cut_out(tmp_path: Path) -> None:
    torch.save([torch.zeros(4)], tmp_path / "a.pt")
    root: Any = read_torch(InputFile(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="numbers 2:5 of 4"):
        cut([root[0]], 2, 5)
    with pytest.raises(ValueError, match="4 numbers"):
        gathered("t", (5,), [root[0]])


def test_formats_are_not_mistaken(tmp_path: Path) -> None:
    """A folder of other torch files is no ZeRO checkpoint."""
    (tmp_path / "global_step3").mkdir()
    torch.save({}, tmp_path / "global_step3" / "zero_pp_rank_x_mp_rank_00_optim_states.pt")
    with pytest.raises(FormatError) as caught:
        loraconv.inspect(tmp_path)
    assert caught.value.slug == "no-checkpoint"

"""``verify --before --after``: what became of every tensor is told right, and a cause is named where there is one.

Expected figures are computed here with numpy and torch; the runs are recorded ones or laid out like them.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch_file

import loraconv
from loraconv.cli import run as cli
from loraconv.errors import CorruptCheckpoint, FormatError, UsageError
from loraconv.verification.changes import ChangesResult
from tests.cli_support import parsed_hint
from tests.sat_run import DIT, RunSpec, build
from tests.support import BASE_FILE, FIXTURES, RECORDED, module_of, rewrite, small

Arrays = dict[str, Any]
LAYERS = 3
POSITIONS = DIT + "mixins.pos_embed.pos_embedding"
BASE = FIXTURES / "sat" / "cogvideox-5b-t2v-late-base" / "transformer"
(AFTER,) = [recorded for recorded in RECORDED if recorded.name == "cogvideox-5b-t2v-late"]


def verify(before: Path, after: Path, expect: str | None = None) -> ChangesResult:
    result = loraconv.verify(before=before, after=after, expect=expect)
    assert isinstance(result, ChangesResult)
    assert result.same == (not result.findings)
    words = ["verify", "--before", str(before), "--after", str(after), *(["--expect", expect] if expect else [])]
    assert cli([*words, "-q"]) == (0 if result.same else 5)
    return result


def weights(seed: int = 0) -> Arrays:
    """A small transformer with a learned table of positions, in SAT's names."""
    rng = np.random.default_rng(seed)
    made = {POSITIONS: rng.normal(size=(1, 20, 16)) * 0.02, DIT + "time_embed.0.weight": rng.normal(size=(8, 16))}
    for layer in range(LAYERS):
        place = f"{DIT}transformer.layers.{layer}.attention"
        made[f"{place}.query_key_value.weight"] = rng.normal(size=(48, 16))
        made[f"{place}.dense.weight"] = rng.normal(size=(16, 16))
        made[f"{place}.dense.bias"] = rng.normal(size=16)
    return {name: np.asarray(array, dtype=np.float32) for name, array in made.items()}


def adapted(arrays: Arrays, up: float = 1.0) -> Arrays:
    """The same with LoRA on the output projections, as SAT puts it in."""
    rng = np.random.default_rng(7)
    made = {}
    for name, array in arrays.items():
        wrapped = ".attention.dense." in name
        made[name.replace(".dense.", ".dense.original.") if wrapped else name] = array
        if name.endswith(".dense.weight"):
            module = name.removesuffix(".weight")
            made[f"{module}.matrix_A.0"] = rng.normal(size=(2, 16)).astype(np.float32)
            made[f"{module}.matrix_B.0"] = (rng.normal(size=(16, 2)) * up).astype(np.float32)
    return made


def waves(rows: int = 20, width: int = 16, scale: float = 1.0, dtype: type = np.float32) -> Any:
    """Sines beside cosines of the same angles, the first two rows (text) zero."""
    frequencies = dtype(10000) ** -(np.arange(width // 2, dtype=dtype) / dtype(width // 2))
    angles = np.outer(np.arange(rows, dtype=dtype) / dtype(scale), frequencies)
    assert angles.dtype == dtype
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    table[:2] = 0
    return table[None]


def write(path: Path, arrays: Arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


def as_bf16(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}


def touched(arrays: Arrays, part: str, how: Callable[[Any], Any]) -> Arrays:
    assert any(part in name for name in arrays)
    return {n: np.asarray(how(a), dtype=a.dtype) if part in n else a for n, a in arrays.items()}


def without(arrays: Arrays, part: str) -> Arrays:
    assert any(part in name for name in arrays)
    return {n: a for n, a in arrays.items() if part not in n}


def with_nan(array: Any) -> Any:
    spoilt = array.copy()
    spoilt.flat[3] = np.nan
    return spoilt


def with_waves(arrays: Arrays, table: Any) -> Arrays:
    return {**arrays, POSITIONS: table}


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expect", [None, "identical", "only-lora"])
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
def test_a_run_is_identical_to_its_copy(tmp_path: Path, recorded: Any, expect: str | None) -> None:
    copy = shutil.copytree(recorded.run, tmp_path / "copy")
    result = verify(recorded.run, copy, expect)
    assert result.same
    assert result.counts == {"identical": len(recorded.module)}


def test_the_recorded_training_of_a_lora_left_its_base_alone() -> None:
    result = verify(BASE, AFTER.run, "only-lora")
    assert result.same
    before, after = module_of(BASE / "1" / "mp_rank_00_model_states.pt"), AFTER.module
    marked = {n: n.replace(".original.", ".") for n in after if ".original." in n}
    assert all(torch.equal(after[n], before[bare]) for n, bare in marked.items())
    assert {c.other: c.name for c in result.changes if c.kind == "renamed"} == marked
    assert {c.name for c in result.changes if c.kind == "new"} == {
        n for n in after if n not in before and n not in marked
    }
    assert result.counts["identical"] == len(before) - len(marked)
    assert any("text encoder and the VAE" in notice for notice in result.notices)


def test_the_same_recording_is_not_identical_and_the_reasons_are_told_apart() -> None:
    result = verify(BASE, AFTER.run, "identical")
    assert not result.same
    assert [f.slug for f in result.findings] == ["lora-inserted", "component", "component", "new"]
    assert len(result.findings[0].modules) == 12
    (factors,) = [f for f in result.findings if f.slug == "new"]
    assert len(factors.modules) == 24
    assert all(".matrix_" in name for name in factors.modules)


@pytest.mark.parametrize("up", [0.0, 1.0])
def test_a_lora_that_never_moved_is_said_and_no_reason_to_object(tmp_path: Path, up: float) -> None:
    before, after = write(tmp_path / "a", weights()), write(tmp_path / "b", adapted(weights(), up))
    result = verify(before, after, "only-lora")
    assert result.same
    assert any("never moved" in notice for notice in result.notices) == (up == 0)


def test_trained_factors_may_change_and_nothing_else(tmp_path: Path) -> None:
    before = write(tmp_path / "a", adapted(weights()))
    after = write(tmp_path / "b", touched(adapted(weights()), "matrix_", lambda a: a * 1.5 + 1))
    assert verify(before, after, "only-lora").same
    assert not verify(before, after, "identical").same


@pytest.mark.parametrize("name", ["model_ema.decay", "optimizer.state.0.step", "weight.exp_avg"])
def test_what_a_trainer_keeps_beside_the_weights_may_appear(tmp_path: Path, name: str) -> None:
    before = write(tmp_path / "a", weights())
    after = write(tmp_path / "b", {**adapted(weights()), name: np.ones(1, np.float32)})
    assert verify(before, after, "only-lora").same
    assert not verify(before, after).same


# --- what is wrong, made on purpose -----------------------------------------------------------------------------------

BEFORE, LORA = weights(), adapted(weights())
RANDOM = np.random.default_rng(3).normal(size=(1, 20, 16)).astype(np.float32) * np.float32(0.02)
WRONG: dict[str, tuple[Arrays, Arrays, str, str, str]] = {
    "positions lost": (BEFORE, without(BEFORE, "pos_embedding"), "identical", "table-lost", "learned table"),
    "positions random": (BEFORE, with_waves(BEFORE, RANDOM), "identical", "table-remade", "made anew"),
    "positions zero": (BEFORE, with_waves(BEFORE, RANDOM * 0), "identical", "table-remade", "made anew"),
    "positions computed": (BEFORE, with_waves(BEFORE, waves()), "identical", "table-remade", "made anew"),
    "positions of another size": (BEFORE, with_waves(BEFORE, RANDOM[:, :12]), "only-lora", "table-remade", "anew"),
    "a table computed again": (
        with_waves(BEFORE, waves()), with_waves(BEFORE, waves(dtype=np.float64)), "identical", "table-recomputed",
        "rounding alone",
    ),
    "a table of another scale": (
        with_waves(BEFORE, waves()), with_waves(BEFORE, waves(scale=1.875)), "identical", "table-resized",
        "another size or scale",
    ),
    "a table of another size": (
        with_waves(BEFORE, waves()), with_waves(BEFORE, waves(rows=30)), "identical", "table-resized", "another size",
    ),
    "a table of several pieces": (
        with_waves(BEFORE, waves(2000, 48)), with_waves(BEFORE, waves(2000, 48, dtype=np.float64)), "identical",
        "table-recomputed", "rounding alone",
    ),
    "a table of zeros lost": (
        with_waves(BEFORE, RANDOM * 0), without(BEFORE, "pos_embedding"), "identical", "table-lost", "learned table",
    ),
    "a computed table is missing": (
        with_waves(BEFORE, waves()), without(BEFORE, "pos_embedding"), "identical", "table-uncomputed", "does without",
    ),
    "base moved": (
        BEFORE, touched(adapted(BEFORE), "1.attention.dense.original.weight", lambda a: a * 1.01), "only-lora",
        "base-moved", "1 of 11 tensors, by up to 1.0e-02 relative",
    ),
    "everything trained": (
        BEFORE, touched(BEFORE, "", lambda a: a + 0.001), "identical", "changed", "11 tensors changed",
    ),
    "NaN": (BEFORE, touched(BEFORE, "layers.1", with_nan), "identical", "nonfinite", "3 numbers became NaN"),
    "a prefix more": (
        BEFORE, {f"module.{n}": a for n, a in BEFORE.items()}, "identical", "prefix", "'module.' instead of ''",
    ),
    "a prefix less": (
        BEFORE, {n.removeprefix(DIT): a for n, a in BEFORE.items()}, "only-lora", "prefix", "'' instead of",
    ),
    "another prefix": (
        BEFORE, {n.replace(DIT, "net."): a for n, a in BEFORE.items()}, "identical", "prefix", "'net.' instead of",
    ),
    "LoRA taken off": (
        LORA, {n.replace(".original.", "."): a for n, a in without(LORA, "matrix_").items()}, "only-lora",
        "original-lost", "was not merged",
    ),
    "LoRA merged": (
        LORA,
        touched({n.replace(".original.", "."): a for n, a in without(LORA, "matrix_").items()}, "dense.weight",
                lambda a: a + 0.1),
        "only-lora", "original-lost", "as merging does",
    ),
    "LoRA lost": (LORA, without(LORA, "matrix_"), "only-lora", "lora-lost", "6 LoRA factors are gone"),
    "LoRA untrained": (
        BEFORE, touched(adapted(BEFORE, 0.0), "time_embed", lambda a: a + 1), "only-lora", "untrained",
        "all 3 up factors are zero",
    ),
    "a tensor missing": (BEFORE, without(BEFORE, "time_embed"), "only-lora", "missing", "1 tensors are not in the"),
    "a tensor more": (without(BEFORE, "time_embed"), BEFORE, "only-lora", "new", "only in the second"),
    "another name": (
        BEFORE, {n.replace("time_embed.0.weight", "clock"): a for n, a in BEFORE.items()}, "identical", "renamed",
        "under another name",
    ),
    "a patch projection in another shape": (
        BEFORE, touched(BEFORE, "time_embed", lambda a: a.reshape(8, 4, 2, 2)), "identical", "reshaped", "in the same",
    ),
    "another size": (BEFORE, touched(BEFORE, "time_embed", lambda a: a[:4]), "identical", "reshaped", "another shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_change_that_should_not_be_is_named(tmp_path: Path, case: str) -> None:
    before, after, expect, slug, words = WRONG[case]
    result = verify(write(tmp_path / "a", before), write(tmp_path / "b", after), expect)
    assert not result.same
    (found,) = [f for f in result.findings if f.slug == slug]
    assert words in found.sentence
    # Only what is lost or moved together with the cause has a finding of its own.
    beside = {"LoRA taken off": {"lora-lost"}, "LoRA merged": {"lora-lost"}, "LoRA untrained": {"base-moved"}}
    assert {f.slug for f in result.findings} - {slug} == beside.get(case, set())
    assert found.mend
    assert "{" not in found.mend
    for line in found.mend.split(": "):
        if line.startswith("loraconv "):
            parsed_hint(line.partition(" reads ")[0])


@pytest.mark.parametrize(
    ("name", "slug"), [("cogvideox-2b-t2v", "table-uncomputed"), ("cogvideox-5b-i2v", "table-lost")]
)
def test_of_the_recorded_tables_only_the_learned_one_is_called_lost(tmp_path: Path, name: str, slug: str) -> None:
    (recorded,) = [r for r in RECORDED if r.name == name]
    left = {n: tensor.clone() for n, tensor in recorded.module.items() if n != POSITIONS}
    save_torch_file(left, tmp_path / "after")
    result = verify(recorded.run, tmp_path / "after", "identical")
    assert [(f.slug, f.modules) for f in result.findings] == [(slug, (POSITIONS,))]


def test_a_fine_tune_that_lost_its_learned_positions_is_explained_and_mended(tmp_path: Path) -> None:
    """The shape of zai-org/CogVideo#374: image-to-video, learning rate zero, noise after save and load."""
    spec = small(variant="5b-i2v", kind="full")
    run = build(spec, tmp_path / "before")
    broken = rewrite(spec, build(spec, tmp_path / "after"), lambda content: content["module"].pop(POSITIONS))
    (found,) = verify(run, broken, "identical").findings
    assert found.slug == "table-lost"
    command = found.mend.partition("loraconv ")[2].replace(" -o transformer", f" -o {tmp_path / 'transformer'} -q")
    assert cli(command.split()) == 0
    assert "patch_embed.pos_embedding" in load_file(tmp_path / "transformer" / BASE_FILE)


def test_the_same_bytes_under_more_names_than_before_are_nobodys_new_name(tmp_path: Path) -> None:
    one, other = np.ones((3, 3), np.float32), np.arange(9, dtype=np.float32).reshape(3, 3)
    before = write(tmp_path / "a", {"kept": one[0], "gone.x": one, "gone.y": one, "gone.z": other})
    after = write(tmp_path / "b", {"kept": one[0], "p.a": one, "q.b": one, "r.c": one, "s.d": other})
    renamed = {c.name: c.other for c in verify(before, after).changes if c.kind == "renamed"}
    assert renamed == {"gone.z": "s.d"}


@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_weights_rounded_on_save_are_called_so(tmp_path: Path, stored: str) -> None:
    before = write(tmp_path / "a", BEFORE)
    rounded = as_bf16(BEFORE)
    if stored == "F32":
        rounded = {name: tensor.float() for name, tensor in rounded.items()}
    save_torch_file(rounded, tmp_path / "b")
    result = verify(before, tmp_path / "b", "identical")
    (found,) = result.findings
    assert found.slug == "rounded"
    assert set(found.modules) == set(BEFORE)
    assert f"rounded once to BF16, stored as {stored}" in found.sentence


def test_a_rounding_to_another_number_is_a_change_and_no_rounding(tmp_path: Path) -> None:
    rounded = as_bf16(BEFORE)
    name = DIT + "time_embed.0.weight"
    bits = rounded[name].view(torch.int16)
    bits[0, 0] += 1  # the neighbour of the nearest number
    save_torch_file(rounded, tmp_path / "b")
    result = verify(write(tmp_path / "a", BEFORE), tmp_path / "b")
    assert [(f.slug, name in f.modules) for f in result.findings] == [("rounded", False), ("changed", True)]


def test_the_same_numbers_in_a_wider_dtype_are_retyped(tmp_path: Path) -> None:
    narrow = as_bf16(BEFORE)
    save_torch_file(narrow, tmp_path / "a")
    save_torch_file({name: tensor.float() for name, tensor in narrow.items()}, tmp_path / "b")
    result = verify(tmp_path / "a", tmp_path / "b")
    assert result.counts == {"retyped": len(BEFORE)}
    (found,) = result.findings
    assert found.slug == "retyped"
    assert "stored as F32 now instead of BF16" in found.sentence


def test_a_prefix_and_a_rounding_together_are_both_told(tmp_path: Path) -> None:
    save_torch_file({f"module.{n}": t for n, t in as_bf16(BEFORE).items()}, tmp_path / "b")
    result = verify(write(tmp_path / "a", BEFORE), tmp_path / "b")
    assert {f.slug for f in result.findings} == {"rounded", "prefix"}


def test_the_moving_average_of_a_run_is_told_from_the_weights(tmp_path: Path) -> None:
    run = build(small(ema=True), tmp_path)
    result = verify(run / "2", run / "2-ema", "identical")
    (found,) = result.findings
    assert found.slug == "ema"
    raw, averaged = (module_of(run / i / "mp_rank_00_model_states.pt") for i in ("2", "2-ema"))
    assert set(found.modules) == {n for n in raw if not torch.equal(raw[n], averaged[n])}
    assert any("moving average" in notice for notice in verify(run / "2", run / "2-ema", "only-lora").notices)


def test_a_base_that_moved_is_no_moving_average(tmp_path: Path) -> None:
    run = build(small(ema=True), tmp_path)
    file = run / "2-ema" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["module"][DIT + "time_embed.0.weight"] += 1
    torch.save(content, file)
    moved = [f for f in verify(run / "2", run / "2-ema").findings if f.slug != "ema"]
    assert [(f.slug, f.modules) for f in moved] == [("base-moved", (DIT + "time_embed.0.weight",))]


def test_a_component_that_was_there_before_may_not_grow(tmp_path: Path) -> None:
    vae = {"first_stage_model.a": np.ones(3, np.float32)}
    grown = {**vae, "first_stage_model.b": np.zeros(3, np.float32)}
    result = verify(write(tmp_path / "a", {**BEFORE, **vae}), write(tmp_path / "b", {**LORA, **grown}), "only-lora")
    assert [(f.slug, f.modules) for f in result.findings] == [("new", ("first_stage_model.b",))]
    assert verify(write(tmp_path / "c", BEFORE), write(tmp_path / "d", {**LORA, **grown}), "only-lora").same


@pytest.mark.parametrize("moved", [False, True])
def test_tensors_that_were_one_and_are_two_are_noticed(tmp_path: Path, moved: bool) -> None:
    one = torch.arange(12.0).reshape(3, 4)
    torch.save({"a.weight": one, "b.weight": one, "c.weight": one + 1}, tmp_path / "a.pt")
    torch.save({"a.weight": one, "b.weight": one + (1 if moved else 0), "c.weight": one + 1}, tmp_path / "b.pt")
    result = verify(tmp_path / "a.pt", tmp_path / "b.pt")
    assert result.same is not moved
    assert [f.slug for f in result.findings] == (["split"] if moved else [])
    assert any("a.weight; b.weight were one tensor" in notice for notice in result.notices)
    assert not verify(tmp_path / "a.pt", tmp_path / "a.pt").notices


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_the_figures_are_those_of_numpy(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    one = (rng.normal(size=(300, 700)) * 100).astype(dtype)  # more than one piece
    two = np.where(rng.random(one.shape) < 0.3, one, (one - np.abs(one) * 0.1 - 1).astype(dtype)).astype(dtype)
    result = verify(write(tmp_path / "a", {"w": one}), write(tmp_path / "b", {"w": two}))
    (change,) = result.changes
    assert change.figures is not None
    gap = two.astype(np.float64) - one.astype(np.float64)
    assert change.figures.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(one.astype(float)), rel=1e-9)
    assert change.figures.greatest == np.max(np.abs(gap))
    assert change.figures.changed == np.count_nonzero(one != two)
    assert (change.figures.count, change.figures.nonfinite, change.figures.rounded) == (one.size, 0, "")


def test_numbers_that_are_none_are_counted_and_kept_out_of_the_figures(tmp_path: Path) -> None:
    one = np.array([1, 2, np.nan, np.inf, 5, -0.0], dtype=np.float32)
    two = np.array([np.nan, 2, np.nan, 4, 8, 0.0], dtype=np.float32)
    (change,) = verify(write(tmp_path / "a", {"w": one}), write(tmp_path / "b", {"w": two})).changes
    assert change.figures is not None
    assert (change.figures.nonfinite, change.figures.changed, change.figures.greatest) == (1, 3, 3.0)
    assert change.figures.relative == pytest.approx(3 / np.sqrt(4 + 25))


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    one = np.zeros((1024, 4096), np.float32)
    before = write(tmp_path / "a", {"w": one, "same": one, "old": one + 5})
    after = write(tmp_path / "b", {"w": one + 1, "same": one, "new": one + 5})
    verify(before, after)  # imports
    tracemalloc.start()
    result = loraconv.verify(before=before, after=after)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(result, ChangesResult)
    assert result.counts == {"changed": 1, "identical": 1, "renamed": 1}
    assert peak < 12 << 20  # one tensor has 16 MiB, all of them 96


# --- containers -------------------------------------------------------------------------------------------------------


def test_the_same_tensors_in_another_container_are_identical(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in LORA.items()}
    places = [write(tmp_path / "a.safetensors", LORA), *(tmp_path / n for n in ("b.pt", "c.bin", "d.ckpt"))]
    torch.save(tensors, places[1])
    torch.save({"state_dict": tensors}, places[2])
    torch.save({"module": tensors, "iteration": 3}, places[3])
    for before in places:
        for after in places:
            assert verify(before, after).same


def test_the_shards_of_a_model_are_one_checkpoint(tmp_path: Path) -> None:
    run = build(RunSpec(variant="2b", num_layers=2), tmp_path)
    loraconv.sat2diffusers(run, out=tmp_path / "one", what="base")
    loraconv.sat2diffusers(run, out=tmp_path / "many", what="base", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert verify(tmp_path / "one", tmp_path / "many").same
    (whole,) = (tmp_path / "one").glob("*.safetensors")
    assert verify(whole, tmp_path / "many").same
    loraconv.sat2diffusers(run, out=tmp_path / "half", what="base", dtype="bf16")
    assert [f.slug for f in verify(tmp_path / "many", tmp_path / "half").findings] == ["rounded"]


def test_peft_folders_are_compared(tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    loraconv.convert(run, out=tmp_path / "a", to="peft")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert verify(tmp_path / "a", tmp_path / "b").same


@pytest.mark.parametrize("spoilt", [False, True])
def test_every_rank_of_a_parallel_run_is_compared(tmp_path: Path, spoilt: bool) -> None:
    run = build(small(variant="5b", mp_size=2), tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    if spoilt:
        file = copy / "2" / "mp_rank_01_model_states.pt"
        content = torch.load(file, weights_only=False)
        content["module"][DIT + "time_embed.0.weight"] += 1
        torch.save(content, file)
    result = verify(run, copy)
    assert result.same is not spoilt
    assert [(c.name, c.rank) for c in result.changes if c.kind == "changed"] == (
        [(DIT + "time_embed.0.weight", 1)] if spoilt else []
    )


# --- what cannot be compared ------------------------------------------------------------------------------------------


def test_sat_against_diffusers_is_refused_with_the_commands_that_make_them_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(small(variant="2b"), tmp_path)
    loraconv.sat2diffusers(run, out=tmp_path / "base", what="base")
    for before, after in ((run, tmp_path / "base"), (tmp_path / "base", run)):
        with pytest.raises(FormatError) as error:
            loraconv.verify(before=before, after=after)
        assert (error.value.exit_code, error.value.slug) == (3, "not-comparable")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "transformer", ignore_errors=True)
        for line in error.value.hint.split(" && "):
            words = line.split()
            assert words[0] == "loraconv"
            assert cli([*words[1:], "-q"]) == 0


def test_adapters_in_two_formats_are_sent_to_the_comparison_of_adapters(tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    loraconv.convert(run, out=tmp_path / "lora", to="diffusers")
    with pytest.raises(FormatError) as error:
        loraconv.verify(before=run, after=tmp_path / "lora")
    parsed_hint(error.value.hint)
    assert "--before" not in error.value.hint


def test_checkpoints_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a", {"p.q.w": np.ones((3, 4), np.float32)})
    two = write(tmp_path / "b", {"r.s.v": np.zeros((5,), np.float32)})
    assert cli(["verify", "--before", str(one), "--after", str(two)]) == 3


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    one, two = build(small(variant="5b"), tmp_path / "1"), build(small(variant="5b", mp_size=2), tmp_path / "2")
    with pytest.raises(FormatError, match="not two states"):
        loraconv.verify(before=one, after=two)


def test_a_damaged_file_is_no_change(tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "2" / "mp_rank_00_model_states.pt"
    data = bytearray(file.read_bytes())
    start = data.find(module_of(file)[DIT + "time_embed.0.weight"].numpy().tobytes())
    assert start > 0
    data[start + 40] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="checksum"):
        loraconv.verify(before=run, after=copy)
    assert cli(["verify", "--before", str(run), "--after", str(copy)]) == 4


@pytest.mark.parametrize(
    "words",
    [
        {"before": "a"},
        {"after": "a"},
        {"expect": "identical"},
        {"before": "a", "after": "b", "expect": "anything"},
        {"before": "a", "after": "b", "alpha": 1.0},
        {"before": "a", "after": "b", "bound": 1.0},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_usage_errors(words: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        loraconv.verify(**words)
    with pytest.raises(UsageError):
        loraconv.verify("c", **words)


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_text_says_verdict_changes_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = write(tmp_path / "a", BEFORE), write(tmp_path / "b", touched(LORA, "time_embed", lambda a: a + 1))
    assert cli(["verify", "--before", str(before), "--after", str(after), "--expect", "only-lora"]) == 5
    text = capsys.readouterr().out
    assert text.startswith("verdict MORE than LoRA changed: 4 identical, 6 renamed, 1 changed, 6 new\n")
    assert "attention.dense.weight (3 keys) -> " in text
    assert f"changed: {DIT}time_embed.0.weight, relative change up to" in text
    assert "why     the base under the LoRA moved: 1 of 11 tensors" in text


def test_a_hostile_name_is_printed_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", {"w": np.ones(3, np.float32), "x\x1b[31m{before}": np.ones(4, np.float32)})
    after = write(tmp_path / "b", {"w": np.ones(3, np.float32), "{oops}\x07y.z": np.ones(4, np.float32)})
    assert cli(["verify", "--before", str(before), "--after", str(after)]) == 5
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert cli(["verify", "--before", str(before), "--after", str(after), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["counts"] == {"identical": 1, "renamed": 1}

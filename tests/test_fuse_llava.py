"""``fuse`` of a LLaVA run: adapter and projector into a real LLaMA, told by the files and not by the folder's name.

Oracles: peft's ``merge_and_unload``, float64 sums of the same factors, and the classes of transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import loraconv
from loraconv.errors import FormatError, LoraconvError, UnsafeCheckpoint, UsageError
from tests.cli_support import Cli, assert_clear_error, digests
from tests.llava_runs import HIDDEN, LLAVA, VOCABULARY, WIDE, WRAPPER, Made, Tensors, make, pickled, projector
from tests.support import raw
from tests.test_fuse import assert_rounded_once

pytest_plugins = ["tests.cli_fixtures"]


def written(out: Path) -> Tensors:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check(got: Tensors, made: Made, dtype: torch.dtype, beside: Tensors | None = None) -> None:
    """Each number is the nearest to base + delta, or to what was trained whole; what no adapter touches is copied."""
    whole = made.beside if beside is None else beside
    want = {name: tensor.double().numpy() for name, tensor in (made.exact | whole).items()}
    assert_rounded_once(got, want, dtype)
    for name, tensor in whole.items():
        if tensor.dtype == dtype:
            assert raw(got[name]) == raw(tensor), name


# --- what is fused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_model_is_pefts_merge_rounded_once_with_the_runs_projector(tmp_path: Path, dtype: torch.dtype) -> None:
    made = make(tmp_path, dtype)
    result = loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    got = written(tmp_path / "out")
    check(got, made, dtype)
    bound = 4 * torch.finfo(dtype).eps  # peft rounds the delta and the sum
    for name, tensor in made.merged.items():
        assert torch.allclose(got[name].double(), tensor.double(), rtol=bound, atol=bound * 0.1), name
    assert sorted(result.beside) == sorted(made.beside)
    assert result.proofs[0].passed


def test_the_output_loads_in_transformers_and_computes_what_pefts_merge_computes(tmp_path: Path) -> None:
    made = make(tmp_path, torch.float32)
    loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == set(made.beside)  # LLaMA's class has no projector
    oracle = LlamaForCausalLM.from_pretrained(made.base)
    oracle.load_state_dict({name: tensor.float() for name, tensor in made.summed.items()})
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, oracle(tokens).logits)  # the same weights, bit for bit
        before = LlamaForCausalLM.from_pretrained(made.base)(tokens).logits
    assert not torch.allclose(oracle(tokens).logits, before, atol=1e-3)


@pytest.mark.parametrize("torch_files", [False, True])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_the_base_may_be_sharded_and_may_be_torch_files(tmp_path: Path, shards: str, torch_files: bool) -> None:
    made = make(tmp_path, shards=shards)
    assert (len(list(made.base.glob("model-*"))) > 1) == (shards == "20KB")
    if torch_files:
        pickled(made.base)
    before = digests(made.base)
    out = tmp_path / "out"
    loraconv.fuse(made.run, base=made.base, out=out)
    check(written(out), made, torch.float16)
    assert digests(made.base) == before
    _, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)  # index and headers fit
    assert not info["missing_keys"]
    assert not list(out.glob("*.bin"))


@pytest.mark.parametrize("settings", [False, True])
def test_the_base_may_be_one_torch_file_by_its_name(tmp_path: Path, settings: bool) -> None:
    made = make(tmp_path)
    base = pickled(made.base) / "pytorch_model.bin"
    if not settings:
        shutil.move(base, tmp_path / "pytorch_model.bin")
        base = tmp_path / "pytorch_model.bin"
    before = base.read_bytes()
    loraconv.fuse(made.run, base=base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)
    assert base.read_bytes() == before
    LlamaForCausalLM.from_pretrained(tmp_path / "out")  # the run has settings
    assert loraconv.verify(made.run, tmp_path / "out", base=base).same


def test_new_shards_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    made = make(tmp_path)
    out = tmp_path / "out"
    loraconv.fuse(made.run, base=made.base, out=out, max_shard_size="20KB")
    assert "model.safetensors.index.json" in {path.name for path in out.iterdir()}
    check(written(out), made, torch.float16)
    LlamaForCausalLM.from_pretrained(out)


def test_numbers_of_another_dtype_are_rounded_once_to_that_of_the_base_and_it_is_said(tmp_path: Path, cli: Cli) -> None:
    made = make(tmp_path, torch.bfloat16, projector(torch.float32), {"dtype": "float32"})
    done = cli("fuse", made.run, "--base", made.base, "-o", tmp_path / "out")
    assert done.code == 0
    assert "rounded once to bf16" in done.err
    check(written(tmp_path / "out"), made, torch.bfloat16)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_dtype_that_is_asked_for_is_that_of_all_tensors_and_of_the_settings(tmp_path: Path) -> None:
    made = make(tmp_path, torch.bfloat16)
    loraconv.fuse(made.run, base=made.base, out=tmp_path / "out", dtype="fp32")
    check(written(tmp_path / "out"), made, torch.float32)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_settings_and_tokenizer_are_the_runs_where_it_has_its_own(tmp_path: Path) -> None:
    made = make(tmp_path)
    for folder, text in ((made.base, "base"), (made.run, "run")):
        (folder / "tokenizer_config.json").write_text(json.dumps({"of": text}))
    (made.base / "tokenizer.model").write_bytes(b"pieces")
    out = tmp_path / "out"
    loraconv.fuse(made.run, base=made.base, out=out)
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in LLAVA} == LLAVA
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"of": "run"}
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert loraconv.verify(out).same


def test_a_vocabulary_that_grew_replaces_the_bases(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(9)
    grown = {
        name: torch.randn(VOCABULARY + 3, HIDDEN, generator=noise).half()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    made = make(tmp_path, beside=projector(torch.float16) | grown, config={"vocab_size": VOCABULARY + 3})
    loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (VOCABULARY + 3, HIDDEN)


def test_a_llava_model_as_the_base_gets_the_runs_projector_in_place_of_its_own(tmp_path: Path) -> None:
    made = make(tmp_path)
    old = {name: tensor * 2 for name, tensor in made.beside.items()}
    file = made.base / "model.safetensors"
    save_file(load_file(file) | old, file, {"format": "pt"})
    result = loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)
    assert not [notice for notice in result.notices if "projector" in notice]
    caught = {control.name: control.caught for control in result.proofs[0].controls}
    assert caught["the base's own tensor in place of the run's"] is True


@pytest.mark.parametrize("name", ["foo", "checkpoint-7", "vicuna"])
def test_the_name_of_the_folder_decides_nothing(tmp_path: Path, name: str) -> None:
    made = make(tmp_path, run=name)
    loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)


def test_the_adapter_may_be_a_torch_file_too(tmp_path: Path) -> None:
    made = make(tmp_path)
    torch.save(load_file(made.run / "adapter_model.safetensors"), made.run / "adapter_model.bin")
    (made.run / "adapter_model.safetensors").unlink()
    loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)


def test_a_plain_lora_of_a_language_model_needs_no_projector(tmp_path: Path) -> None:
    made = make(tmp_path)
    for name in ("non_lora_trainables.bin", "config.json"):
        (made.run / name).unlink()
    result = loraconv.fuse(made.run, base=made.base, out=tmp_path / "out")
    got = written(tmp_path / "out")
    check(got, made, torch.float16, {})
    assert result.beside == ()
    assert (tmp_path / "out" / "config.json").read_bytes() == (made.base / "config.json").read_bytes()


def test_a_plain_lora_on_a_llava_model_leaves_its_projector_and_it_is_said(tmp_path: Path, cli: Cli) -> None:
    made = make(tmp_path)
    file = made.base / "model.safetensors"
    save_file(load_file(file) | made.beside, file, {"format": "pt"})
    shutil.copy(made.run / "config.json", made.base / "config.json")
    for name in ("non_lora_trainables.bin", "config.json"):
        (made.run / name).unlink()
    done = cli("fuse", made.run, "--base", made.base, "-o", tmp_path / "out")
    assert "the projector is that of the base" in done.err
    check(written(tmp_path / "out"), made, torch.float16)


def test_a_strength_is_for_the_adapter_and_not_for_the_projector(tmp_path: Path, cli: Cli) -> None:
    made = make(tmp_path)
    done = cli("fuse", f"{made.run}@0.5", "--base", made.base, "-o", tmp_path / "out")
    assert "taken as it is" in done.err
    before = load_file(made.base / "model.safetensors")
    half = {name: (tensor + before[name].double()) / 2 for name, tensor in made.exact.items()}
    check(written(tmp_path / "out"), replace(made, exact=half), torch.float16)


def test_the_adapters_file_stands_for_the_run_that_it_lies_in(tmp_path: Path) -> None:
    made = make(tmp_path)
    loraconv.fuse(made.run / "adapter_model.safetensors", base=made.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), made, torch.float16)


def test_a_language_model_fused_in_place_comes_back_from_its_journal(tmp_path: Path) -> None:
    made = make(tmp_path, shards="20KB")
    for name in ("non_lora_trainables.bin", "config.json"):
        (made.run / name).unlink()
    before = digests(made.base)
    loraconv.fuse(made.run, base=made.base, in_place=True)
    check(written(made.base), made, torch.float16, {})
    loraconv.unfuse(made.base, out=tmp_path / "back")
    after = digests(tmp_path / "back")
    assert {name: after[name] for name in before} == before


# --- what is refused ----------------------------------------------------------------------------------------------


def _bare(folder: Path) -> None:
    for name in ("non_lora_trainables.bin", "config.json"):
        (folder / name).unlink()


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The run's own tensors, changed."""
    state = torch.load(folder / "non_lora_trainables.bin")
    change(state)
    torch.save(state, folder / "non_lora_trainables.bin")


def _settings(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _no_tensors(folder: Path) -> None:
    (folder / "non_lora_trainables.bin").unlink()


def _no_settings(folder: Path) -> None:
    (folder / "config.json").unlink()


def _trainers_arguments(folder: Path) -> None:
    """What LLaVA's trainer leaves in ``checkpoint-N``: its arguments, pickled."""
    _bare(folder)
    torch.save({"mm_projector_lr": None, "group_by_modality_length": True}, folder / "training_args.bin")


def _misspelt(folder: Path) -> None:
    _rewrite(
        folder, lambda s: s.update({f"{WRAPPER}model.mm_projectr.0.bias": s.pop(f"{WRAPPER}model.mm_projector.0.bias")})
    )


def _empty(folder: Path) -> None:
    _rewrite(folder, lambda s: s.update({f"{WRAPPER}model.mm_projector.0.weight": torch.empty(0)}))


def _empty_factors(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)


def _half(folder: Path) -> None:
    _rewrite(folder, lambda s: s.pop(f"{WRAPPER}model.mm_projector.2.weight"))


def _narrow(folder: Path) -> None:
    _rewrite(folder, lambda s: s.update({f"{WRAPPER}model.mm_projector.0.weight": torch.zeros(HIDDEN, WIDE - 1)}))


def _integers(folder: Path) -> None:
    _rewrite(
        folder, lambda s: s.update({f"{WRAPPER}model.mm_projector.0.bias": torch.zeros(HIDDEN, dtype=torch.int32)})
    )


def _doubled(folder: Path) -> None:
    _rewrite(folder, lambda s: s.update({"model.mm_projector.0.bias": torch.zeros(HIDDEN)}))


def _transposed(folder: Path) -> None:
    _rewrite(folder, lambda s: s.update({f"{WRAPPER}model.mm_projector.2.weight": torch.zeros(HIDDEN, HIDDEN).T}))


def _half_grown(folder: Path) -> None:
    _rewrite(folder, lambda s: s.update({f"{WRAPPER}lm_head.weight": torch.zeros(VOCABULARY + 1, HIDDEN)}))


def _not_tensors(folder: Path) -> None:
    torch.save({"step": 3}, folder / "non_lora_trainables.bin")


def _deeper(folder: Path) -> None:
    _settings(folder, num_hidden_layers=3)


def _other_projector(folder: Path) -> None:
    _settings(folder, mm_projector_type="ldpnet")


REFUSED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "checkpoint of llava's trainer":  (_trainers_arguments, "projector-missing", "only when the training ends"),
    "settings without tensors":       (_no_tensors, "projector-missing", "non_lora_trainables.bin"),
    "tensors without settings":       (_no_settings, "projector-missing", "config.json"),
    "a misspelt name":                (_misspelt, "no-home", "model.mm_projector.0.bias"),
    "not gathered under zero-3":      (_empty, "zero3-empty", "model.mm_projector.0.weight"),
    "an adapter not gathered":        (_empty_factors, "factor-shape", "ZeRO-3 without being gathered"),
    "half of a projector":            (_half, "projector-incomplete", "model.mm_projector.2.weight"),
    "another width":                  (_narrow, "base-mismatch", "[32, 24]"),
    "integers":                       (_integers, "base-mismatch", "I32"),
    "twice":                          (_doubled, "doubled", "prefix"),
    "a transposed view":              (_transposed, "strided", "model.mm_projector.2.weight"),
    "a vocabulary that half grew":    (_half_grown, "vocabulary", "vocab_size 64"),
    "no tensors":                     (_not_tensors, "no-state-dict", "step"),
    "the settings of another base":   (_deeper, "base-mismatch", "num_hidden_layers: run 3, base 2"),
    "a projector that llava has not": (_other_projector, "projector-type", "ldpnet"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("llava"))


def copied(whole: Made, place: Path, name: str = "foo") -> Path:
    return Path(shutil.copytree(whole.run, place / name))


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_is_not_whole_or_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, whole: Made, cli: Cli, case: str
) -> None:
    spoil, slug, said = REFUSED[case]
    run = copied(whole, tmp_path)
    spoil(run)
    with pytest.raises(LoraconvError) as caught:
        loraconv.fuse(run, base=whole.base, out=tmp_path / "out")
    assert caught.value.slug == slug
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert_clear_error(cli("fuse", run, "--base", whole.base, "-o", tmp_path / "out"))


def test_a_checkpoint_inside_a_finished_run_is_told_by_what_is_around_it(tmp_path: Path, whole: Made) -> None:
    finished = copied(whole, tmp_path)
    step = Path(shutil.copytree(whole.run, finished / "five"))
    _bare(step)
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(step, base=whole.base, out=tmp_path / "out")
    assert caught.value.slug == "projector-missing"
    assert str(finished) in caught.value.hint


def test_a_pretrained_projector_alone_is_named_as_what_it_is(tmp_path: Path, whole: Made) -> None:
    folder = tmp_path / "pretrain"
    folder.mkdir()
    torch.save(projector(), folder / "mm_projector.bin")
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(folder, base=whole.base, out=tmp_path / "out")
    assert caught.value.slug == "projector-only"
    assert "pretrained projector and no LoRA" in caught.value.what


def test_an_adapter_with_its_projector_as_mm_projector_bin_is_a_run_too(tmp_path: Path, whole: Made) -> None:
    run = copied(whole, tmp_path)
    (run / "non_lora_trainables.bin").unlink()
    torch.save(whole.beside, run / "mm_projector.bin")
    loraconv.fuse(run, base=whole.base, out=tmp_path / "out")
    check(written(tmp_path / "out"), whole, torch.float16)


@pytest.mark.parametrize("name", ["tokenizer.json", "non_lora_trainables.bin", "config.json"])
def test_a_link_out_of_the_runs_folder_is_not_followed(tmp_path: Path, whole: Made, name: str) -> None:
    run = copied(whole, tmp_path)
    other = tmp_path / "secret"
    (run / name).rename(other) if (run / name).exists() else other.write_text("{}")
    (run / name).symlink_to(other)
    with pytest.raises(UnsafeCheckpoint) as caught:
        loraconv.fuse(run, base=whole.base, out=tmp_path / "out")
    assert caught.value.slug == "link-outside"


def test_two_runs_cannot_both_bring_a_projector(tmp_path: Path, whole: Made) -> None:
    other = copied(whole, tmp_path, "bar")
    factors = {name: tensor * 2 for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(factors, other / "adapter_model.safetensors")
    with pytest.raises(UsageError) as caught:
        loraconv.fuse(whole.run, other, base=whole.base, out=tmp_path / "out")
    assert caught.value.slug == "run-ambiguous"


def test_no_journal_is_promised_where_it_could_not_bring_the_base_back(tmp_path: Path, whole: Made) -> None:
    with pytest.raises(FormatError) as caught:
        loraconv.fuse(whole.run, base=whole.base, out=tmp_path / "out", journal=True)
    assert caught.value.slug == "journal-run"


def test_a_torch_file_whose_bytes_changed_is_refused_by_its_checksum(tmp_path: Path, whole: Made) -> None:
    base = pickled(Path(shutil.copytree(whole.base, tmp_path / "base")))
    file = base / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    at = content.find(raw(load_file(whole.base / "model.safetensors")["model.norm.weight"]))
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(LoraconvError) as caught:
        loraconv.fuse(whole.run, base=base, out=tmp_path / "out")
    assert caught.value.slug == "checksum"
    assert not (tmp_path / "out").exists()


# --- what verify says of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_verify_compares_the_fused_model_with_the_base_the_adapter_and_what_was_trained_whole(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    made = make(tmp_path, torch.float16, projector(dtype))
    out = tmp_path / "out"
    loraconv.fuse(made.run, base=made.base, out=out)
    assert loraconv.verify(made.run, out, base=made.base).same
    state = written(out)
    state["model.mm_projector.2.bias"] = state["model.mm_projector.2.bias"] + 1
    save_file(state, out / "model.safetensors", {"format": "pt"})
    result = loraconv.verify(made.run, out, base=made.base)
    assert not result.same
    assert "what was trained whole is" in " ".join(
        check.name for check in result.report.proof.checks if not check.passed
    )


def test_verify_sees_a_projector_that_was_left_out(tmp_path: Path, whole: Made) -> None:
    """LLaVA's loader drops what it has no name for; a merge by peft alone has no projector."""
    out = tmp_path / "merged"
    shutil.copytree(whole.base, out)
    state = {name: tensor.half() for name, tensor in whole.exact.items()}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    result = loraconv.verify(whole.run, out, base=whole.base)
    assert not result.same
    assert "mm_projector" in json.dumps(result.to_dict())

"""A key without a rule is an error, and --drop and --keep-unknown are the only ways past it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loraconv
from loraconv.cli import run as cli
from loraconv.errors import FormatError, LoraconvError, UsageError
from loraconv.io import safetensors_write
from loraconv.verifier.aside import SetAside, check_aside
from tests.dialect_files import FORMATS, deltas, write
from tests.sat_run import build
from tests.support import small
from tests.test_schema import CHECK, CONTROL, STRINGS, documented, faults, keys

KOHYA = FORMATS["kohya"].file
#: What no rule knows: a text encoder's adapter, and two tensors of other kinds.
STRANGE = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.arange(8, dtype=torch.float16).reshape(2, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3, 2, dtype=torch.bfloat16),
    "emb_params": torch.tensor([[1.5, float("nan")]]),
    "steps": torch.tensor(1234567890123),
}


def strange_file(folder: Path, more: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A kohya file of CogVideoX with more in it; the deltas of the adapter."""
    want = write(FORMATS["kohya"], "cogvideox", folder)
    tensors = load_file(folder / KOHYA)
    save_file({**tensors, **(STRANGE if more is None else more)}, folder / KOHYA)
    return want


def refused(kind: type[LoraconvError], slug: str, folder: Path, **options: Any) -> LoraconvError:
    with pytest.raises(kind) as caught:
        loraconv.convert(folder / "in", out=folder / "out", **{"to": "diffusers", **options})
    assert caught.value.slug == slug, caught.value
    assert not (folder / "out").exists()
    return caught.value


def same_deltas(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for module, delta in want.items():
        torch.testing.assert_close(got[module], delta, rtol=1e-12, atol=1e-12, msg=module)


def record(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "loraconv.json").read_text())
    return value


def test_an_unknown_key_is_an_error_that_names_both_ways_past_it(tmp_path: Path) -> None:
    strange_file(tmp_path / "in")
    error = refused(FormatError, "module-unknown", tmp_path)
    assert "--drop" in error.hint
    assert "--keep-unknown" in error.hint


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora_unet_transformer_blocks_0_attn1_to_qq.lora_up.weight", "lora_unet_transformer_blocks_0_attn1_to_q"),
        ("lora_unet_norm_out_linear.lora_upp", "lora_unet_norm_out_linear.lora_up.weight"),
    ],
)  # fmt: skip
def test_the_names_nearest_to_an_unknown_key_are_shown(wrong: str, right: str, tmp_path: Path) -> None:
    strange_file(tmp_path / "in", {wrong: torch.ones(8, 4)})
    with pytest.raises(FormatError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers")
    assert right in caught.value.why.removeprefix("names near to it: ").split(", ")


def test_dropped_keys_are_left_behind_and_on_record(tmp_path: Path) -> None:
    want = strange_file(tmp_path / "in")
    patterns = ["lora_te1_*", "{emb_params,steps}"]
    result = loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers", drop=patterns)
    same_deltas(deltas(FORMATS["diffusers"], "cogvideox", tmp_path / "out"), want)
    assert sorted(result.dropped) == sorted(STRANGE)
    assert result.kept == ()
    told = record(tmp_path / "out")
    assert sorted(told["dropped"]) == sorted(STRANGE)
    assert told["options"]["drop"] == patterns
    (check,) = [c for c in result.proofs[0].checks if c.name == "keys left behind on purpose"]
    assert (check.passed, check.count) == (True, len(STRANGE))
    assert any("4 tensors were left behind" in notice for notice in result.notices)


def test_unknown_tensors_are_kept_byte_for_byte(tmp_path: Path) -> None:
    want = strange_file(tmp_path / "in")
    result = loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="peft", keep_unknown=True)
    file = tmp_path / "out" / FORMATS["peft"].file
    tensors = load_file(file)
    for name, tensor in STRANGE.items():
        kept = tensors.pop(name)
        assert (kept.dtype, kept.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(kept.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    save_file(tensors, file)
    same_deltas(deltas(FORMATS["peft"], "cogvideox", tmp_path / "out"), want)
    assert sorted(result.kept) == sorted(record(tmp_path / "out")["kept"]) == sorted(STRANGE)
    (check,) = [c for c in result.proofs[0].checks if c.name == "bytes of unknown tensors that are kept"]
    assert (check.level, check.passed, check.count) == ("L1", True, len(STRANGE))


def test_what_is_dropped_is_not_kept(tmp_path: Path) -> None:
    strange_file(tmp_path / "in")
    result = loraconv.convert(
        tmp_path / "in", out=tmp_path / "out", to="diffusers", drop=["lora_te1_*"], keep_unknown=True
    )
    assert sorted(result.kept) == ["emb_params", "steps"]
    with safe_open(tmp_path / "out" / FORMATS["diffusers"].file, "pt") as opened:
        assert {"emb_params", "steps"} == {n for n in opened.keys() if not n.startswith("transformer.")}  # noqa: SIM118
        assert json.loads(opened.metadata()["loraconv.proof"])["tensors"] == len(opened.keys())


def test_a_whole_pair_may_be_dropped(tmp_path: Path) -> None:
    want = strange_file(tmp_path / "in", {})
    loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers", drop=["*_blocks_11_*"])
    left = load_file(tmp_path / "out" / FORMATS["diffusers"].file)
    modules = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in left}
    assert modules == {module for module in want if ".11." not in module}


@pytest.mark.parametrize("end", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_half_of_a_pair_may_not_be_dropped(end: str, tmp_path: Path) -> None:
    strange_file(tmp_path / "in", {})
    error = refused(FormatError, "half-pair", tmp_path, drop=[f"*_blocks_11_attn1_to_q.{end}"])
    assert "lora_unet_transformer_blocks_11_attn1_to_q.*" in error.hint


def test_a_pattern_that_fits_no_key_is_refused(tmp_path: Path) -> None:
    strange_file(tmp_path / "in")
    error = refused(UsageError, "drop-none", tmp_path, drop=["lora_te1_*", "lora_te2_*"])
    assert "lora_te2_" in error.what


def test_a_sat_run_has_no_room_for_unknown_tensors(tmp_path: Path) -> None:
    strange_file(tmp_path / "in")
    error = refused(FormatError, "cannot-carry", tmp_path, to="sat", keep_unknown=True)
    assert "no room" in error.why


def test_a_kept_tensor_may_not_have_the_name_of_an_output(tmp_path: Path) -> None:
    strange_file(tmp_path / "in", {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)})
    refused(FormatError, "kept-twice", tmp_path, keep_unknown=True)


def test_a_kept_tensor_that_was_damaged_on_its_way_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange_file(tmp_path / "in")
    write_safetensors = safetensors_write.write_safetensors

    def swapped(file: Any, tensors: Any, metadata: Any) -> None:
        made = dict(tensors)
        made["steps"] = replace(made["steps"], offset=made["steps"].offset - 8)
        write_safetensors(file, made.items(), metadata)

    monkeypatch.setattr("loraconv.conversion.write_safetensors", swapped)
    with pytest.raises(LoraconvError) as caught:
        loraconv.convert(tmp_path / "in", out=tmp_path / "out", to="diffusers", keep_unknown=True)
    assert "bytes of unknown tensors" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dropped", "left", "passed"),
    [
        (("x.lora_A.weight", "x.lora_B.weight"), ("y.lora_A.weight",), True),
        (("x.lora_A.weight",), ("x.lora_B.weight",), False),
        (("x.alpha",), ("x.lora_up.weight",), False),
        (("x.dora_scale",), ("x.lora_up.weight",), True),
        (("x.processor.to_q_lora.down.weight",), ("x.processor.to_q_lora.up.weight",), False),
        (("x.processor.to_q_lora.down.weight",), ("x.processor.to_k_lora.up.weight",), True),
        (("a.lora_A.default.weight",), ("a.lora_B.default.weight",), False),
        (("a.matrix_A.0",), ("a.matrix_B.0",), False),
        (("a.matrix_A.0", "a.matrix_B.0"), ("a.matrix_A.1", "a.matrix_B.1"), True),
        (("not.there",), (), False),
    ],
)  # fmt: skip
def test_the_proof_sees_a_pair_taken_apart(dropped: tuple[str, ...], left: tuple[str, ...], passed: bool) -> None:
    source: dict[str, Any] = dict.fromkeys([*dropped, *left])
    source.pop("not.there", None)
    (check,) = check_aside(SetAside(dropped), source, {})
    assert check.passed is passed


def test_a_run_may_lose_layers_too(tmp_path: Path) -> None:
    run = build(small(), tmp_path / "run")
    result = loraconv.convert(run, out=tmp_path / "out", to="diffusers", drop=["*.layers.0.*.matrix_*"])
    left = load_file(tmp_path / "out" / FORMATS["diffusers"].file)
    assert left
    assert not any(".transformer_blocks.0." in name for name in left)
    assert len(result.dropped) == 8


def test_the_plan_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange_file(tmp_path / "in")
    words = ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--to", "diffusers", "--dry-run"]
    assert cli([*words, "--drop", "lora_te1_*", "--keep-unknown"]) == 0
    text = capsys.readouterr().out
    assert "left behind: 2 tensors" in text
    assert "steps: I64 , kept as it is" in text
    assert not (tmp_path / "out").exists()


SCHEMA: dict[str, Any] = {
    "schema": int,
    "out": str,
    "to": str,
    "dry_run": bool,
    "source": dict,
    "files": [{"name": str, "bytes": int, "sha256": (str, None)}],
    "plan": [{"file": str, "name": str, "dtype": str, "shape": [int], "how": str, "exact": bool}],
    "dropped": STRINGS,
    "kept": STRINGS,
    "crc32": dict,
    "notices": STRINGS,
    "proofs": [{"subject": str, "checks": [CHECK], "controls": [CONTROL]}],
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=str)
def test_the_json_has_the_keys_of_the_schema(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange_file(tmp_path / "in")
    words = ["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--to", "diffusers", "--json", *dry]
    assert cli([*words, "--drop", "lora_te1_*", "--keep-unknown"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert list(faults(value, SCHEMA)) == []
    assert len(value["dropped"]) == len(value["kept"]) == 2
    if not dry:
        assert record(tmp_path / "out").keys() ^ value.keys() == {"out", "dry_run", "versions", "options"}


def test_the_page_names_every_key_of_a_conversion() -> None:
    assert documented("`convert` and `sat2diffusers`") == set(keys(SCHEMA))

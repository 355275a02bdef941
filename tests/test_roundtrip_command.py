"""``roundtrip``: an adapter that went through other formats is the same bit for bit, or what changed is told.

The bytes are compared here with torch, on conversions that are made a second time.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraconv
from loraconv import roundtripping
from loraconv.cli import run as cli
from loraconv.errors import FormatError, ProofFailed, UsageError
from loraconv.roundtripping import RoundtripResult
from tests.cli_support import parsed_hint
from tests.sat_run import build
from tests.support import LORA_FILE, RECORDED, header, module_of, small
from tests.test_fuse import factors, write_adapter

FORMATS = ("diffusers", "peft", "sat")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert os.listdir(place) == []


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda r: r.name)
def test_a_recorded_run_comes_back_bit_for_bit(recorded: Any) -> None:
    result = loraconv.roundtrip(recorded.run)
    assert result.same
    assert [hop.to for hop in result.hops] == ["diffusers", "peft", "sat"]
    factors = [name for name in recorded.module if ".matrix_" in name]
    assert (result.identical, result.factors, result.alpha) == (len(factors), len(factors), True)
    for hop in result.hops:
        assert hop.same
        assert hop.proof.passed
        assert (hop.equal, hop.modules, hop.error) == (len(factors) // 2, len(factors) // 2, 0.0)
        assert hop.controls == "8/8"


@pytest.mark.parametrize("start", FORMATS)
@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_every_format_comes_back_to_itself_through_all_others(tmp_path: Path, start: str, alpha: float | None) -> None:
    run = build(small(rank=8, lora_alpha=alpha), tmp_path)
    loraconv.convert(run, out=tmp_path / "start", to=start)
    result = loraconv.roundtrip(tmp_path / "start", through=FORMATS)
    assert result.same
    assert result.format == start
    assert result.hops[-1].to == start
    assert len(result.hops) == (3 if start == "sat" else 4)


def test_a_diffusers_file_with_its_scale_in_the_header_comes_back(tmp_path: Path) -> None:
    run = build(small(rank=8, lora_alpha=3), tmp_path)
    loraconv.convert(run, out=tmp_path / "start", to="diffusers", scale_in="metadata")
    result = loraconv.roundtrip(tmp_path / "start", through=("peft",))
    assert (result.same, result.identical, result.factors) == (True, 16, 16)


def test_a_product_that_was_rounded_is_told_with_where_and_what_keeps_every_bit(tmp_path: Path) -> None:
    run = build(small(rank=4, lora_alpha=3), tmp_path)
    result = loraconv.roundtrip(run, through=("peft", "diffusers"))
    # The same by hand: what the way back gives differs from the run in the up factors, and there alone.
    loraconv.convert(run, out=tmp_path / "1", to="peft")
    loraconv.convert(tmp_path / "1", out=tmp_path / "2", to="diffusers")
    loraconv.convert(tmp_path / "2", out=tmp_path / "3", to="sat")
    (back,) = (tmp_path / "3").rglob("mp_rank_00_model_states.pt")
    start, end = module_of(run / "2" / "mp_rank_00_model_states.pt"), module_of(back)
    changed = [name for name in end if not torch.equal(end[name], start[name])]
    assert changed
    assert (result.factors - result.identical, result.alpha, result.same) == (len(changed), True, False)
    (finding,) = result.findings
    assert finding.slug == "bytes"
    assert all(name.endswith(".up") for name in finding.modules)
    assert "on the way to diffusers" in finding.sentence
    assert all(hop.same for hop in result.hops)
    parsed_hint(finding.mend.partition(" keeps ")[0])


def test_an_alpha_of_the_callers_own_is_used_and_kept(tmp_path: Path) -> None:
    run = build(small(rank=4, lora_alpha=None, yaml=False), tmp_path)
    assert loraconv.roundtrip(run, alpha=8).same
    assert not loraconv.roundtrip(run, alpha=3).same


def spoilt(monkeypatch: pytest.MonkeyPatch, number: int, change: Any) -> None:
    """Let the ``number``-th conversion of the way write something else than it proved."""
    real, count = roundtripping.convert, iter(range(10))

    def convert(src: Any, *, out: Any, **options: Any) -> Any:
        result = real(src, out=out, **options)
        if next(count) == number:
            change(Path(out))
        return result

    monkeypatch.setattr(roundtripping, "convert", convert)


def test_bytes_that_change_on_the_way_are_found_at_the_end_and_at_the_hop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit(out: Path) -> None:
        told, tensors = header(out / LORA_FILE), load_file(out / LORA_FILE)
        name = next(n for n in tensors if ".lora_A." in n)
        tensors[name].view(torch.int32)[0, 0] ^= 1 << 20
        save_file(tensors, out / LORA_FILE, told)

    run = build(small(rank=4, lora_alpha=4), tmp_path)
    spoilt(monkeypatch, 0, one_bit)
    result = loraconv.roundtrip(run)
    assert not result.same
    assert (result.factors - result.identical, result.alpha) == (1, True)
    assert [hop.same for hop in result.hops] == [False, False, False]
    assert "on the way" not in result.findings[0].sentence


def test_an_alpha_that_changes_on_the_way_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_alpha(out: Path) -> None:
        path = out / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 2}))

    spoilt(monkeypatch, 0, other_alpha)
    run = build(small(rank=4, lora_alpha=4), tmp_path)
    result = loraconv.roundtrip(run, through=("peft",))
    assert not result.same
    assert (result.identical, result.alpha) == (result.factors, False)
    assert {f.slug for f in result.findings} == {"alpha"}


def test_a_module_that_is_lost_on_the_way_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(out: Path) -> None:
        path = out / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if ".0.attn1.to_q." not in n}, path)

    spoilt(monkeypatch, 0, drop)
    run = build(small(rank=4, lora_alpha=4), tmp_path)
    result = loraconv.roundtrip(run, through=("peft", "diffusers", "peft"))
    assert not result.same
    assert result.factors - result.identical == 2


@pytest.mark.parametrize("through", ["petf", ["diffusers", "petf"], [], "diffusers,peft"])
def test_formats_that_are_none_are_refused(tmp_path: Path, through: Any) -> None:
    run = build(small(), tmp_path)
    with pytest.raises((FormatError, UsageError)):
        loraconv.roundtrip(run, through=through)


def test_what_a_format_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = build(small(rank=4, lora_alpha=4), tmp_path)
    loraconv.convert(run, out=tmp_path / "lora", to="diffusers")
    tensors = load_file(tmp_path / "lora" / LORA_FILE)
    mixed = {
        n: (t[:2] if ".lora_A." in n else t[:, :2]).contiguous() if ".0.attn1.to_q." in n else t
        for n, t in tensors.items()
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    assert loraconv.roundtrip(tmp_path / "mixed.safetensors", through=("peft",)).same
    with pytest.raises(FormatError) as error:
        loraconv.roundtrip(tmp_path / "mixed.safetensors", through=("sat",))
    assert error.value.exit_code == 3


def test_a_conversion_that_fails_its_proof_ends_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ProofFailed("no")

    monkeypatch.setattr(roundtripping, "convert", fails)
    assert cli(["roundtrip", str(build(small(), tmp_path))]) == 5


def test_the_command_says_every_hop_and_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build(small(rank=4, lora_alpha=3), tmp_path)
    assert cli(["roundtrip", str(run), "--through", "peft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "verdict the same again, bit for bit: sat -> peft -> sat"
    assert [line.split(",")[0] for line in lines[2:4]] == ["  peft", "  sat"]
    assert lines[-1] == "end     16/16 factors have the bytes of the start; the same alpha"
    assert cli(["roundtrip", str(run), "--through", "diffusers, peft", "--json"]) == 5
    value = json.loads(capsys.readouterr().out)
    assert (value["mode"], value["same"], [hop["to"] for hop in value["hops"]]) == (
        "roundtrip",
        False,
        ["diffusers", "peft", "sat"],
    )
    assert cli(["roundtrip", str(run)]) == 5
    assert "NOT the same again: sat -> diffusers -> peft -> sat" in capsys.readouterr().out


def test_the_result_is_public() -> None:
    assert loraconv.RoundtripResult is RoundtripResult


def test_names_that_fit_several_models_come_back_when_the_family_is_named(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(width=64, layers=2), alpha=8.0)
    with pytest.raises(FormatError) as caught:
        loraconv.roundtrip(adapter, through=("kohya",))
    assert caught.value.hint == "--family cogvideox"
    result = loraconv.roundtrip(adapter, through=("kohya",), family="cogvideox")
    assert result.same
    assert [hop.to for hop in result.hops] == ["kohya", "diffusers"]

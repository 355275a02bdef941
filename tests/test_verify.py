"""``verify``: right pairs are proved in any formats, wrong ones are told apart and explained, a changed byte is found.

The wrong files are made here with safetensors and numpy, from adapters whose factors are drawn here too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loraconv
from loraconv.cli import run as cli
from loraconv.errors import FormatError, LoraconvError
from tests.sat_run import RunSpec, build

Arrays = dict[str, Any]
BLOCK = "transformer.transformer_blocks."
RANK, ALPHA, WIDTH = 4, 1, 24


def factors(layers: int = 3, seed: int = 0) -> Arrays:
    """A diffusers adapter as trained: factors for q, k, v and the output projection, to be applied at alpha / rank."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer in range(layers):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            module = f"{BLOCK}{layer}.attn1.{name}"
            made[f"{module}.lora_A.weight"] = rng.normal(size=(RANK, WIDTH)).astype(np.float32)
            made[f"{module}.lora_B.weight"] = rng.normal(size=(WIDTH, RANK)).astype(np.float32)
    return made


def write(path: Path, arrays: Arrays, alpha: float = ALPHA, rank: int = RANK) -> Path:
    config = {"transformer.r": rank, "transformer.lora_alpha": alpha}
    save_file(
        {n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, {"lora_adapter_metadata": json.dumps(config)}
    )
    return path


def ups(arrays: Arrays, how: Callable[[Any], Any]) -> Arrays:
    return {n: how(a).astype(a.dtype) if ".lora_B." in n else a for n, a in arrays.items()}


def renamed(arrays: Arrays, *pairs: tuple[str, str]) -> Arrays:
    def name_of(name: str) -> str:
        for old, new in pairs:
            if old in name:
                return name.replace(old, new)
        return name

    return {name_of(n): a for n, a in arrays.items()}


def transposed(arrays: Arrays) -> Arrays:
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {n.replace(s, other[s]): a.T for n, a in arrays.items() for s in other if s in n}


def rotated(arrays: Arrays) -> Arrays:
    """The same deltas by other factors: an orthogonal matrix between the two."""
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(RANK, RANK)))[0]
    return {n: (turn @ a if ".lora_A." in n else a @ turn.T).astype(np.float32) for n, a in arrays.items()}


def through_bf16(arrays: Arrays) -> Arrays:
    return {n: (a.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for n, a in arrays.items()}


MISTAKES: dict[str, tuple[Callable[[Arrays], Arrays], str, str]] = {
    "times the rank": (lambda a: ups(a, lambda x: x * RANK), "scale", "multiplied by the rank"),
    "over the rank": (lambda a: ups(a, lambda x: x / RANK), "scale", "divided by the rank"),
    "doubled": (lambda a: ups(a, lambda x: x * 2), "scale", "doubled"),
    "some constant": (lambda a: ups(a, lambda x: x * np.float32(0.3)), "scale", "0.3 times"),
    "zero": (lambda a: ups(a, lambda x: x * 0), "zero", "does nothing"),
    "q and k": (lambda a: renamed(a, ("to_q", "to_k"), ("to_k", "to_q")), "swapped", "to_q and to_k"),
    "layers": (
        lambda a: renamed(a, ("blocks.0", "blocks.1"), ("blocks.1", "blocks.2"), ("blocks.2", "blocks.0")),
        "shifted",
        "layers are shifted",
    ),
    "transposed": (transposed, "transposed", "transposed"),
    "bfloat16": (through_bf16, "precision", "BF16"),
    "not a number": (lambda a: ups(a, lambda x: x + np.nan), "nonfinite", "NaN"),
    "modules missing": (lambda a: {n: x for n, x in a.items() if "blocks.1" not in n}, "missing", "blocks.1"),
    "modules too many": (lambda a: {**a, **renamed(a, ("blocks.0", "blocks.8"))}, "extra", "blocks.8"),
    "another adapter": (lambda a: factors(seed=9), "other", "different adapters"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_adapter_is_told_apart_and_explained(tmp_path: Path, mistake: str) -> None:
    spoil, slug, words = MISTAKES[mistake]
    right, wrong = write(tmp_path / "a.safetensors", factors()), write(tmp_path / "b.safetensors", spoil(factors()))
    result = loraconv.verify(right, wrong)
    assert not result.same
    assert slug in {f.slug for f in result.findings}
    assert any(words in f.sentence for f in result.findings)
    assert all(f.mend for f in result.findings)
    assert cli(["verify", str(right), str(wrong)]) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_give_plain_json_and_no_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, bad: float
) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    right = write(tmp_path / "a.safetensors", factors())
    wrong = write(tmp_path / "b.safetensors", ups(factors(), lambda x: np.where(x == x.flat[0], bad, x)))
    for pair in ((right, wrong), (wrong, right), (wrong, wrong)):
        cli(["verify", *map(str, pair), "--json"])
        json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert not recwarn.list


def test_alpha_ignored_is_called_so(tmp_path: Path) -> None:
    right = write(tmp_path / "a.safetensors", factors(), alpha=1, rank=4)
    wrong = write(tmp_path / "b.safetensors", factors(), alpha=RANK)
    (finding,) = loraconv.verify(right, wrong).findings
    assert "4 times as strong" in finding.sentence
    assert "alpha ignored" in finding.sentence


@pytest.mark.parametrize("same", [lambda a: a, rotated], ids=["factors", "deltas"])
def test_the_same_adapter_is_proved_and_has_no_finding(tmp_path: Path, same: Callable[[Arrays], Arrays]) -> None:
    one, other = write(tmp_path / "a.safetensors", factors()), write(tmp_path / "b.safetensors", same(factors()))
    result = loraconv.verify(one, other)
    assert result.same
    assert result.findings == ()
    assert cli(["verify", str(one), str(other)]) == 0


@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
@pytest.mark.parametrize("alpha", [None, 16, 3])
def test_every_conversion_is_proved_again(tmp_path: Path, to: str, alpha: float | None) -> None:
    run = build(RunSpec(variant="2b", num_layers=2, rank=4, lora_alpha=alpha), tmp_path / "run")
    loraconv.convert(run, out=tmp_path / "out", to=to)
    result = loraconv.verify(run, tmp_path / "out")
    assert result.same
    assert len(result.modules) == 8
    assert loraconv.verify(tmp_path / "out").same


def test_a_bound_replaces_that_of_the_dtypes(tmp_path: Path) -> None:
    one = write(tmp_path / "a.safetensors", factors())
    other = write(tmp_path / "b.safetensors", ups(factors(), lambda x: x * np.float32(1.001)))
    assert not loraconv.verify(one, other).same
    assert loraconv.verify(one, other, bound=2e-3).same
    assert not loraconv.verify(one, other, bound=5e-4).same


def test_the_error_is_that_of_the_full_products(tmp_path: Path) -> None:
    first, second = factors(), factors(seed=3)
    one, other = write(tmp_path / "a.safetensors", first), write(tmp_path / "b.safetensors", second)
    for result in loraconv.verify(one, other).modules:
        a, b = (x[f"transformer.{result.module}.lora_A.weight"].astype(np.float64) for x in (first, second))
        c, d = (x[f"transformer.{result.module}.lora_B.weight"].astype(np.float64) for x in (first, second))
        exact = np.linalg.norm(c @ a - d @ b) / np.linalg.norm(c @ a)
        assert result.error == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["lora", "base"])
def test_every_flipped_bit_of_a_tensor_is_found(tmp_path: Path, what: str, count: int) -> None:
    run = build(RunSpec(variant="2b", num_layers=1, hidden=32, heads=2), tmp_path / "run")
    loraconv.sat2diffusers(run, out=tmp_path / "out", what=what)
    assert loraconv.verify(tmp_path / "out").same
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    data = weights.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    for _ in range(count):
        at, bit = draw.randrange(start, len(data)), 1 << draw.randrange(8)
        with weights.open("r+b") as file:
            file.seek(at)
            file.write(bytes([data[at] ^ bit]))
        assert not loraconv.verify(tmp_path / "out").same
        with weights.open("r+b") as file:
            file.seek(at)
            file.write(data[at : at + 1])
    assert loraconv.verify(weights).same


@pytest.mark.parametrize("change", ["truncated", "deleted", "longer", "settings"])
def test_other_changes_are_found_too(tmp_path: Path, change: str) -> None:
    run = build(RunSpec(variant="2b", num_layers=1), tmp_path / "run")
    loraconv.convert(run, out=tmp_path / "out", to="peft")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    if change == "deleted":
        weights.unlink()
    elif change == "settings":
        path = tmp_path / "out" / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 1', '"lora_alpha": 2'))
    else:
        data = weights.read_bytes()
        weights.write_bytes(data[:-1] if change == "truncated" else data + b"x")
    result = loraconv.verify(tmp_path / "out")
    assert [bool(f.difference) for f in result.files] == [
        f.name.endswith("json") == (change == "settings") for f in result.files
    ]
    assert cli(["verify", str(tmp_path / "out")]) == 5


RECORDS = {
    "absent": None,
    "not JSON": b"{",
    "a list": b"[]",
    "no files": b"{}",
    "outside": b'{"files": [{"name": "../secret"}]}',
    "absolute": b'{"files": [{"name": "/etc/passwd"}]}',
    "odd checksums": b'{"files": [{"name": "x"}], "crc32": 3}',
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_is_none_is_an_error_and_leads_nowhere(tmp_path: Path, record: str) -> None:
    raw = RECORDS[record]
    if raw is not None:
        (tmp_path / "loraconv.json").write_bytes(raw)
    with pytest.raises(LoraconvError) as error:
        loraconv.verify(tmp_path)
    assert error.value.exit_code in (3, 4)


def test_what_holds_no_adapter_cannot_be_compared(tmp_path: Path) -> None:
    lora = build(RunSpec(variant="2b", num_layers=1), tmp_path / "lora")
    full = build(RunSpec(variant="2b", num_layers=1, kind="full"), tmp_path / "full")
    with pytest.raises(FormatError) as error:
        loraconv.verify(lora, full)
    assert error.value.exit_code == 3


def test_the_json_of_a_comparison_has_schema_1_and_the_documented_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write(tmp_path / "a.safetensors", factors())
    other = shutil.copy(one, tmp_path / "b.safetensors")
    assert cli(["verify", str(one), str(other), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"schema", "mode", "one", "other", "same", "bound", "modules", "findings"}
    assert value["schema"] == 1
    assert set(value["modules"][0]) == {"module", "equal", "error", "bound", "norm", "same"}

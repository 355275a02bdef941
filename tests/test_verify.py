"""``verify``: right pairs are proved in any formats, wrong ones are told apart and explained, a changed byte is found.

The wrong files are made here with safetensors and numpy, from adapters whose factors are drawn here too.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
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
from loraconv.adapter import layer_of, natural
from loraconv.cli import run as cli
from loraconv.errors import FormatError, LoraconvError
from loraconv.verification.adapters import AdaptersResult
from tests.cli_support import parsed_hint
from tests.sat_run import RunSpec, build
from tests.support import LORA_FILE, add_lora, expected, header, load_transformer, small

Arrays = dict[str, Any]
BLOCK = "transformer.transformer_blocks."
RANK, ALPHA, WIDTH = 4, 1, 24


def verify(one: Path, other: Path) -> AdaptersResult:
    result = loraconv.verify(one, other)
    assert isinstance(result, AdaptersResult)
    return result


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


def truncated(arrays: Arrays, rank: int = 2) -> Arrays:
    """The best approximation of a lower rank, by the singular value decomposition of the whole product."""
    made = {}
    for name in arrays:
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            left, values, right = np.linalg.svd(arrays[other].astype(np.float64) @ arrays[name].astype(np.float64))
            # At alpha / rank with the lower rank, which doubles the scale.
            half = RANK // rank
            made[name] = right[:rank].astype(np.float32)
            made[other] = (left[:, :rank] * values[:rank] / half).astype(np.float32)
    return made


def copied(arrays: Arrays, source: str, target: str) -> Arrays:
    """Every module named ``target`` holds the factors of its neighbour as well."""
    return {n: arrays[n.replace(target, source)] for n in arrays}


def only_layer(arrays: Arrays, layer: int, made: Arrays) -> Arrays:
    return {n: made[n] if f"blocks.{layer}." in n else a for n, a in arrays.items()}


MISTAKES: dict[str, tuple[Callable[[Arrays], Arrays], str, str]] = {
    "times the rank": (lambda a: ups(a, lambda x: x * RANK), "scale", "multiplied by the rank"),
    "over the rank": (lambda a: ups(a, lambda x: x / RANK), "scale", "divided by the rank"),
    "doubled": (lambda a: ups(a, lambda x: x * 2), "scale", "doubled"),
    "the scale squared": (lambda a: ups(a, lambda x: x * np.float32(ALPHA / RANK)), "scale", "the scale squared"),
    "the sign": (lambda a: ups(a, lambda x: -x), "scale", "the sign turned"),
    "some constant": (lambda a: ups(a, lambda x: x * np.float32(0.3)), "scale", "0.3 times"),
    "zero": (lambda a: ups(a, lambda x: x * 0), "zero", "does nothing"),
    "zero in one": (
        lambda a: only_layer(a, 1, ups(a, lambda x: x * 0)), "zero", "does nothing: a factor or the scale is zero, in",
    ),
    "a lower rank": (truncated, "rank", "rank 2 of 4"),
    "k copied to q": (
        lambda a: copied(a, "to_k", "to_q"), "duplicated",
        "transformer_blocks.0.attn1.to_q those of transformer_blocks.0.attn1.to_k",
    ),
    "layer 2 copied to 1": (
        lambda a: copied(a, "blocks.2", "blocks.1"), "duplicated",
        "transformer_blocks.1.attn1.to_k those of transformer_blocks.2.attn1.to_k",
    ),
    "q and k": (lambda a: renamed(a, ("to_q", "to_k"), ("to_k", "to_q")), "swapped", "to_q and to_k"),
    "layers": (
        lambda a: renamed(a, ("blocks.0", "blocks.1"), ("blocks.1", "blocks.2"), ("blocks.2", "blocks.0")),
        "shifted",
        "layers are shifted",
    ),
    "transposed": (transposed, "transposed", "transposed"),
    "bfloat16": (through_bf16, "precision", "BF16"),
    "float16": (
        lambda a: {n: x.astype(np.float16).astype(np.float32) for n, x in a.items()}, "precision", "F16",
    ),
    "not a number": (lambda a: ups(a, lambda x: x + np.nan), "nonfinite", "the second holds NaN"),
    "one infinity": (
        lambda a: ups(a, lambda x: np.where(x == x.flat[0], np.inf, x)), "nonfinite", "the second holds NaN or Inf",
    ),
    "modules missing": (lambda a: {n: x for n, x in a.items() if "blocks.1" not in n}, "missing", "blocks.1"),
    "modules too many": (lambda a: {**a, **renamed(a, ("blocks.0", "blocks.8"))}, "extra", "blocks.8"),
    "another adapter": (lambda a: factors(seed=9), "other", "different adapters"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_adapter_is_told_apart_and_explained(tmp_path: Path, mistake: str) -> None:
    spoil, slug, words = MISTAKES[mistake]
    right, wrong = write(tmp_path / "a.safetensors", factors()), write(tmp_path / "b.safetensors", spoil(factors()))
    result = loraconv.verify(right, wrong)
    assert not result.same
    # The last layer of a shift stands in the place of the first.
    assert {f.slug for f in result.findings} == {slug, *(["moved"] if mistake == "layers" else [])}
    assert any(words in f.sentence for f in result.findings)
    for finding in result.findings:
        if finding.mend.startswith("loraconv "):
            parsed_hint(finding.mend.partition("; ")[0].partition(", with")[0].replace("ALPHA", "1"))
        assert finding.mend
        assert "{" not in finding.mend
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
    assert value["schema"] == 1
    assert set(value["modules"][0]) == {"module", "equal", "error", "bound", "norm", "same"}
    assert [control["caught"] for control in value["controls"]] == [True] * 8


# --- pairs in different formats ---------------------------------------------------------------------------------------


def exported(run: Path, path: Path, scale: float = 1.0, header: bool = False) -> Path:
    """The adapter of a run as a plain exporter writes it: diffusers names, the factors as they are times ``scale``, and
    no word about alpha, or the alpha of the run in the header."""
    adapter = expected(SPEC).adapter
    made = {n: (t * (scale if ".lora_B." in n else 1)).contiguous() for n, t in adapter.items()}
    config = {"transformer.r": SPEC.rank, "transformer.lora_alpha": SPEC.lora_alpha}
    save_torch_file(made, path, {"lora_adapter_metadata": json.dumps(config)} if header else {})
    return path


SPEC = small(variant="2b", rank=8, lora_alpha=2.0)
SCALE = 2.0 / 8


def test_alpha_lost_by_an_exporter_is_told_whichever_comes_first(tmp_path: Path) -> None:
    run = build(SPEC, tmp_path)
    wrong = exported(run, tmp_path / "wrong.safetensors")
    (finding,) = verify(run, wrong).findings
    assert "4 times as strong (alpha ignored in the second)" in finding.sentence
    (finding,) = verify(wrong, run).findings
    assert "0.25 times as strong (alpha ignored in the first" in finding.sentence


@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
def test_a_scale_applied_twice_is_told_whatever_the_first_is_written_in(tmp_path: Path, to: str) -> None:
    run = build(SPEC, tmp_path)
    loraconv.convert(run, out=tmp_path / to, to=to)
    twice = exported(run, tmp_path / "twice.safetensors", SCALE, header=True)
    (finding,) = verify(tmp_path / to, twice).findings
    assert "0.25 times as strong (the scale squared: applied twice in the second)" in finding.sentence
    (finding,) = verify(twice, tmp_path / to).findings
    assert "4 times as strong" in finding.sentence
    assert "ignored in the second" in finding.sentence  # which is what it looks like from there


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("to", ["diffusers", "peft", "sat"])
def test_a_cast_that_was_asked_for_is_the_same_within_its_dtype_and_every_control_is_caught(
    tmp_path: Path, to: str, dtype: str
) -> None:
    run = build(RunSpec(variant="2b", num_layers=2, rank=16, hidden=64, lora_alpha=3), tmp_path / "run")
    loraconv.convert(run, out=tmp_path / "out", to=to, dtype=dtype)
    for pair in ((run, tmp_path / "out"), (tmp_path / "out", run)):
        result = verify(*pair)
        assert result.same
        assert [c.caught for c in result.controls] == [True] * 8


def test_a_cast_is_told_of_the_one_that_was_cast(tmp_path: Path) -> None:
    fine, cast = write(tmp_path / "a", factors()), write(tmp_path / "b", through_bf16(factors()))
    assert [f.sentence[:20] for f in verify(fine, cast).findings] == ["the second was cast "]
    assert [f.sentence[:20] for f in verify(cast, fine).findings] == ["the first was cast t"]


def test_a_lower_rank_is_told_of_the_one_that_has_it_and_how_much_it_holds(tmp_path: Path) -> None:
    whole, part = factors(), truncated(factors())
    one, other = write(tmp_path / "a", whole), write(tmp_path / "b", part)
    shares = []
    for name in (n for n in whole if ".lora_A." in n):
        delta = whole[name.replace("_A", "_B")].astype(np.float64) @ whole[name].astype(np.float64)
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        shares.append(np.sum(squares[:2]) / np.sum(squares))
    (finding,) = verify(one, other).findings
    assert f"the second has rank 2 of 4: the best approximation of that rank, which holds {min(shares):.2%}" in (
        finding.sentence
    )
    assert verify(other, one).findings[0].sentence.startswith("the first has rank 2 of 4")


def test_a_lower_rank_that_is_not_the_best_one_is_not_called_so(tmp_path: Path) -> None:
    cut = {n: (a[:2] if ".lora_A." in n else a[:, :2] / 2).copy() for n, a in factors().items()}
    result = verify(write(tmp_path / "a", factors()), write(tmp_path / "b", cut))
    assert [f.slug for f in result.findings] == ["other"]


def test_an_adapter_with_an_infinity_is_never_the_same_as_one_without(tmp_path: Path) -> None:
    spoilt = ups(factors(), lambda x: np.where(x == x.flat[0], np.inf, x))
    one, other = write(tmp_path / "a", factors()), write(tmp_path / "b", spoilt)
    for pair in ((one, other), (other, one)):
        assert not verify(*pair).same
    assert verify(other, other).same


# --- keys that consumers pass over ------------------------------------------------------------------------------------

SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "in memory": (lambda n: n.replace(".weight", ".default.weight"), "in-memory-names", "diffusers loads nothing"),
    "no prefix": (lambda n: n.removeprefix("transformer."), "no-prefix", "diffusers 0.33 and later"),
    "peft's prefix": (lambda n: n.replace("transformer.", "base_model.model.", 1), "foreign-prefix", "peft cannot"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_keys_that_diffusers_passes_over_are_named_and_it_does(tmp_path: Path, case: str) -> None:
    spell, slug, words = SPELLINGS[case]
    run = build(SPEC, tmp_path)
    loraconv.sat2diffusers(run, out=tmp_path / "right", what="all")
    right = load_file(tmp_path / "right" / LORA_FILE)
    (tmp_path / "wrong").mkdir()
    wrong = {spell(name): tensor for name, tensor in right.items()}
    save_torch_file(wrong, tmp_path / "wrong" / LORA_FILE, header(tmp_path / "right" / LORA_FILE))
    for first in (run, tmp_path / "right"):
        result = verify(first, tmp_path / "wrong")
        (finding,) = result.findings
        assert (finding.slug, set(finding.modules)) == (slug, set(wrong))
        assert words in finding.sentence
        assert all(module.same for module in result.modules)
    for folder, loaded in (("right", 8), ("wrong", 0)):
        transformer = load_transformer(tmp_path / "right" / "transformer")
        add_lora(transformer, tmp_path / folder)
        ups = [p for n, p in transformer.named_parameters() if ".lora_B." in n]
        assert sum(bool(p.any()) for p in ups) == loaded
    assert (str(tmp_path / "wrong") in finding.mend) == (case == "no prefix")  # only that one can be read as it is
    command = finding.mend.replace("OUT", str(tmp_path / "mended")).split()[1:]
    assert cli([*command, "-q"]) == 0
    assert verify(run, tmp_path / "mended").same


@pytest.mark.parametrize(
    ("spell", "slug"),
    [
        (lambda n: n.replace(".weight", ".default.weight"), ""),
        (lambda n: n.replace(".weight", ".mine.weight"), "in-memory-names"),
        (lambda n: n.replace("base_model.model.", "transformer.", 1), "peft-prefix"),
    ],
    ids=["default", "mine", "diffusers"],
)
def test_keys_that_peft_passes_over_are_named_and_it_does(
    tmp_path: Path, spell: Callable[[str], str], slug: str
) -> None:
    from peft import PeftModel

    run = build(SPEC, tmp_path)
    loraconv.sat2diffusers(run, out=tmp_path / "base", what="base")
    loraconv.convert(run, out=tmp_path / "right", to="peft")
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    weights = tmp_path / "wrong" / "adapter_model.safetensors"
    save_torch_file({spell(n): t for n, t in load_file(weights).items()}, weights)
    result = verify(run, tmp_path / "wrong")
    # What is named as diffusers names it is applied without the alpha in peft's settings.
    assert [f.slug for f in result.findings] == ([slug] if slug else []) + (["scale"] if slug == "peft-prefix" else [])
    for folder, loaded in (("right", 8), ("wrong", 0 if slug else 8)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(load_transformer(tmp_path / "base"), tmp_path / folder)
        ups = [p for n, p in model.named_parameters() if ".lora_B." in n]
        assert sum(bool(p.any()) for p in ups) == loaded


@pytest.mark.parametrize("case", SPELLINGS)
def test_keys_that_both_spell_alike_are_no_difference(tmp_path: Path, case: str) -> None:
    wrong = {SPELLINGS[case][0](name): array for name, array in factors().items()}
    one = write(tmp_path / "a.safetensors", wrong, alpha=RANK)  # a header that only diffusers reads must say nothing
    assert verify(one, one).same
    assert verify(one, write(tmp_path / "b.safetensors", factors(), alpha=RANK)).same


# --- DoRA -------------------------------------------------------------------------------------------------------------


def dora(folder: Path) -> Path:
    """A DoRA as peft saves it, on modules with the names of a CogVideoX transformer."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(0)
    names = ("to_q", "to_k", "to_v")
    attention = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([nn.ModuleDict({"attn1": attention})])})
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, init_lora_weights=False, target_modules=list(names))
    get_peft_model(model, config).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def changed_copy(folder: Path, copy: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "adapter_model.safetensors"
    save_torch_file(change(load_file(file)), file)
    return copy


def test_a_dora_is_the_same_as_its_copy_and_the_magnitudes_were_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = dora(tmp_path / "a")
    other = shutil.copytree(one, tmp_path / "b")
    result = verify(one, other)
    assert result.same
    assert result.magnitudes is not None
    assert (result.magnitudes.one, result.magnitudes.other, result.magnitudes.equal) == (3, 3, 3)
    assert cli(["verify", str(one), str(other)]) == 0
    assert "DoRA magnitudes: 3 in the first, 3 in the second, 3 equal; the deltas above are those of the factors" in (
        capsys.readouterr().out
    )


DORA: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str]] = {
    "lost": (
        lambda t: {n: x for n, x in t.items() if "magnitude" not in n}, "dora-lost", "the second lost the DoRA magni",
    ),
    "moved": (
        lambda t: {n: x * 1.01 if "q.lora_magnitude" in n else x for n, x in t.items()}, "dora-differs",
        "differ in transformer_blocks.0.attn1.to_q",
    ),
    "factors too": (
        lambda t: {n: x * 2 if "lora_B" in n else x for n, x in t.items() if "magnitude" not in n}, "scale", "doubled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DORA)
def test_a_dora_that_lost_something_is_told(tmp_path: Path, case: str) -> None:
    change, slug, words = DORA[case]
    one = dora(tmp_path / "a")
    assert any("lora_magnitude_vector" in name for name in load_file(one / "adapter_model.safetensors"))
    other = changed_copy(one, tmp_path / "b", change)
    result = verify(one, other)
    assert not result.same
    assert any(f.slug == slug and words in f.sentence for f in result.findings)
    assert cli(["verify", str(one), str(other)]) == 5
    if case == "lost":
        assert [f.slug for f in verify(other, one).findings] == ["dora-gained"]


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"])
def test_every_spelling_of_a_magnitude_is_known(tmp_path: Path, key: str) -> None:
    modules = [n.removesuffix(".lora_A.weight") for n in factors() if ".lora_A." in n]
    sizes = {f"{module}.{key}": np.full(WIDTH, 2, np.float32) for module in modules}
    one, other = write(tmp_path / "a", {**factors(), **sizes}), write(tmp_path / "b", factors())
    (lost,) = verify(one, other).findings
    assert lost.slug == "dora-lost"
    assert lost.mend == f"keep {one}, or fuse it into its base: loraconv fuse {one} --base BASE -o OUT"
    assert verify(one, one).same


def test_an_adapter_with_more_than_factors_and_magnitudes_cannot_be_compared(tmp_path: Path) -> None:
    more = {**factors(), "transformer.proj_out.weight": np.ones((3, 4), np.float32)}
    with pytest.raises(FormatError) as error:
        verify(write(tmp_path / "a", more), write(tmp_path / "b", factors()))
    assert (error.value.exit_code, error.value.slug) == (3, "not-comparable")


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_text_says_how_many_controls_were_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a", factors())
    assert cli(["verify", str(one), str(one)]) == 0
    assert "  controls 8/8 caught\n" in capsys.readouterr().out
    assert cli(["verify", str(one), str(write(tmp_path / "b", factors(seed=4)))]) == 5
    assert "controls" not in capsys.readouterr().out


@pytest.mark.parametrize("same", [lambda a: a, rotated], ids=["factors", "deltas"])
def test_an_untrained_adapter_is_the_same_and_its_controls_change_nothing(
    tmp_path: Path, same: Callable[[Arrays], Arrays]
) -> None:
    untrained = ups(factors(), lambda x: x * 0)
    result = verify(write(tmp_path / "a", untrained), write(tmp_path / "b", same(untrained)))
    assert result.same
    assert {c.caught for c in result.controls} == {True, None}


def test_a_comparison_that_would_miss_a_mistake_gives_no_verdict(tmp_path: Path) -> None:
    one = write(tmp_path / "a", factors())
    other = write(tmp_path / "b", ups(factors(), lambda x: x * np.float32(1.001)))
    with pytest.raises(FormatError) as error:
        loraconv.verify(one, other, bound=0.9)
    assert (error.value.exit_code, error.value.slug) == (3, "controls")
    for mistake in ("scale divided by rank", "stored in a lower precision"):
        assert mistake in error.value.why
    parsed_hint(error.value.hint)
    assert cli(["verify", str(one), str(other), "--bound", "0.9"]) == 3


def test_factors_that_nearly_cancel_are_never_called_the_same_on_the_strength_of_a_loose_bound(tmp_path: Path) -> None:
    """All rows of A are one row, and the columns of B nearly sum up to zero: rounding moves the delta by more than it
    is, so that even twice the delta is within what the dtype allows."""
    fine = factors()
    for name in fine:
        if ".lora_A." in name:
            fine[name] = np.tile(fine[name][:1], (RANK, 1))
        else:
            fine[name] = (fine[name] - fine[name].mean(axis=1, keepdims=True) * np.float32(0.9999)).astype(np.float32)
    cast = {n: torch.from_numpy(a).to(torch.bfloat16) for n, a in fine.items()}
    config = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})}
    one = write(tmp_path / "a", fine)
    save_torch_file(cast, tmp_path / "b", config)
    result = verify(one, tmp_path / "b")
    assert result.same
    assert max(module.bound for module in result.modules) > 1
    for module in result.modules:
        name = f"transformer.{module.module}.lora_"
        down, up = (fine[f"{name}{side}.weight"].astype(np.float64) for side in "AB")
        assert module.norm == pytest.approx(np.linalg.norm(up @ down) * ALPHA / RANK, rel=1e-10)
    for checked in (result, verify(tmp_path / "b", one)):
        assert checked.same
        assert [c.caught for c in checked.controls] == [True] * 8
    save_torch_file({n: t * 2 if ".lora_B." in n else t for n, t in cast.items()}, tmp_path / "c", config)
    with pytest.raises(FormatError) as error:
        verify(one, tmp_path / "c")
    assert error.value.slug == "controls"


def test_numbers_that_were_coarse_from_the_start_were_not_cast_on_the_way(tmp_path: Path) -> None:
    coarse = through_bf16(factors())
    beside = {n: a.copy() for n, a in coarse.items()}
    for array in beside.values():
        array.view(np.uint32)[0, 0] += 0x10000  # the next bfloat16: less than a cast of every number could do
    result = verify(write(tmp_path / "a", coarse), write(tmp_path / "b", beside))
    assert [f.slug for f in result.findings] == ["other"]


def test_two_adapters_that_both_do_nothing_are_not_told_by_that(tmp_path: Path) -> None:
    one = ups(factors(), lambda x: x * 0)
    other = {n: (a[:, :12] if ".lora_A." in n else a[:12]).copy() for n, a in one.items()}
    result = verify(write(tmp_path / "a", one), write(tmp_path / "b", other))
    assert [f.slug for f in result.findings] == ["other"]


def test_the_bound_is_what_half_a_unit_of_every_stored_number_can_do(tmp_path: Path) -> None:
    """``|| X Y ||_F <= || X ||_F || Y ||_2``, with the whole norms and singular values, in float64."""
    one, other = factors(), rotated(factors())

    def room(arrays: Arrays, name: str) -> float:
        down, up = (arrays[f"transformer.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        off_down, off_up = np.linalg.norm(down) * 2.0**-24, np.linalg.norm(up) * 2.0**-24
        total = off_up * np.linalg.norm(down, 2) + np.linalg.norm(up, 2) * off_down + off_up * off_down
        return float(total) * ALPHA / RANK

    result = verify(write(tmp_path / "a", one), write(tmp_path / "b", other))
    assert result.same
    for module in result.modules:
        expected_bound = max(room(one, module.module), room(other, module.module)) / module.norm
        assert module.bound == pytest.approx(expected_bound, rel=1e-4)


def test_a_key_without_the_prefix_of_its_format_is_refused_and_no_defect(tmp_path: Path) -> None:
    run = build(small(), tmp_path)
    loraconv.convert(run, out=tmp_path / "a", to="peft")
    more = {"elsewhere.lora_A.weight": torch.ones(2, 3), "elsewhere.lora_B.weight": torch.ones(3, 2)}
    odd = changed_copy(tmp_path / "a", tmp_path / "b", lambda tensors: {**tensors, **more})
    assert cli(["verify", str(tmp_path / "a"), str(odd)]) == 3


def test_a_digit_that_is_no_number_is_a_name_like_any_other() -> None:
    assert layer_of("blocks.².7.x") == 7
    assert sorted(["b.10", "b.2", "b.²"], key=natural) == ["b.2", "b.10", "b.²"]

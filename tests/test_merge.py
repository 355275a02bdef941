"""``merge``: the delta of the output is the sum of the deltas, exactly or as near as its rank allows.

Oracles: float64 mathematics in numpy, peft's own ``cat``, ``svd`` and ``linear``, and the recorded runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed, UsageError, WriteFailed
from tests.cli_support import Cli, assert_clear_error, digests, snapshot
from tests.reshape_support import MODULES, apart, delta, drawn, in_diffusers, in_peft, total, write
from tests.sat_run import build
from tests.support import LORA_FILE, small

pytest_plugins = ["tests.cli_fixtures"]

#: Each number of up is rounded once, to 2**-24 of itself. Side by side the parts of up are at most about as large as
#: the delta needs them to be; the factor 16 is for parts that cancel each other, as drawn here they do not.
ONCE = 2.0**-24 * 16


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Any, Any]:
    """Two adapters of different rank, scales 1/2 and 2, on modules that they share in part."""
    one, other = drawn(1, rank=4, modules=MODULES[:6]), drawn(2, rank=3, modules=MODULES[2:])
    return write(tmp_path / "a.st", one, alpha=2), write(tmp_path / "b.st", other, alpha=6), one, other


# --- exact ------------------------------------------------------------------------------------------------------------


def test_the_delta_is_the_sum_of_the_deltas_at_their_strengths(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    result = loraconv.merge(f"{a}@0.8", f"{b}@-0.5", out=tmp_path / "out")
    want = total(delta(one, 0.8 * 0.5), delta(other, -0.5 * 2))
    assert apart(in_diffusers(tmp_path / "out"), want) < ONCE
    assert {m.module: m.rank for m in result.modules} == {
        module: 4 * (module in MODULES[:6]) + 3 * (module in MODULES[2:]) for module in MODULES
    }
    assert result.error == 0


def test_powers_of_two_leave_every_bit(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    result = loraconv.merge(a, f"{b}@0.5", out=tmp_path / "out")
    made = load_file(tmp_path / "out" / LORA_FILE)
    name = f"transformer.{MODULES[3]}.lora_"
    assert torch.equal(made[f"{name}A.weight"], torch.cat([one[f"{name}A.weight"], other[f"{name}A.weight"]]))
    up = torch.cat([one[f"{name}B.weight"] / 2, other[f"{name}B.weight"]], dim=1)
    assert torch.equal(made[f"{name}B.weight"], up)
    assert result.proofs[0].checks[1].figure == 0


def test_peft_keeps_the_bytes_of_the_first_adapter_and_says_its_scale_in_alpha(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    loraconv.merge(f"{a}@0.8", f"{b}@0.5", out=tmp_path / "out", to="peft")
    assert apart(in_peft(tmp_path / "out"), total(delta(one, 0.4), delta(other, 1.0))) < ONCE
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    up = made[f"base_model.model.{MODULES[3]}.lora_B.weight"]
    assert torch.equal(up[:, :4], one[f"transformer.{MODULES[3]}.lora_B.weight"])
    assert not torch.equal(up[:, 4:], other[f"transformer.{MODULES[3]}.lora_B.weight"])


def test_a_negative_strength_turns_the_sign_of_up_and_nothing_else(two: Any, tmp_path: Path) -> None:
    a, _, one, _ = two
    loraconv.merge(f"{a}@-0.8", out=tmp_path / "out", to="peft")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in one.items():
        sign = -1 if "lora_B" in name else 1
        assert torch.equal(made[name.replace("transformer.", "base_model.model.", 1)], sign * tensor)
    assert apart(in_peft(tmp_path / "out"), delta(one, -0.4)) < 1e-15


@pytest.mark.parametrize("strength", ["0.5", "0.8"])
def test_half_precision_stays_only_where_nothing_is_rounded(tmp_path: Path, strength: str) -> None:
    one, other = drawn(1, dtype=torch.bfloat16), drawn(2, dtype=torch.bfloat16)
    a, b = write(tmp_path / "a.st", one), write(tmp_path / "b.st", other)
    result = loraconv.merge(a, f"{b}@{strength}", out=tmp_path / "out")
    made = load_file(tmp_path / "out" / LORA_FILE)
    assert {t.dtype for t in made.values()} == {torch.bfloat16 if strength == "0.5" else torch.float32}
    assert bool(result.notices) == (strength == "0.8")
    want = total(delta(one), delta(other, float(strength)))
    assert apart(in_diffusers(tmp_path / "out"), want) < (1e-15 if strength == "0.5" else ONCE)


def test_a_dtype_is_kept_to(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    loraconv.merge(a, b, out=tmp_path / "out", dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "out" / LORA_FILE).values()} == {torch.bfloat16}
    error = apart(in_diffusers(tmp_path / "out"), total(delta(one, 0.5), delta(other, 2.0)))
    assert 2.0**-12 < error < 2.0**-7


def test_a_training_run_and_a_file_become_one(tmp_path: Path) -> None:
    run = build(small(rank=4, lora_alpha=2), tmp_path)
    loraconv.convert(run, out=tmp_path / "lora", to="diffusers")
    lora = in_diffusers(tmp_path / "lora")
    file = drawn(5, modules=sorted(lora), width=64)
    loraconv.merge(run, f"{write(tmp_path / 'b.st', file)}@2", out=tmp_path / "out", to="sat")
    loraconv.convert(tmp_path / "out", out=tmp_path / "back", to="diffusers")
    assert apart(in_diffusers(tmp_path / "back"), total(lora, delta(file, 2))) < ONCE


def test_the_order_of_two_adapters_does_not_change_the_delta(two: Any, tmp_path: Path) -> None:
    a, b, *_ = two
    loraconv.merge(f"{a}@0.8", b, out=tmp_path / "ab")
    loraconv.merge(b, f"{a}@0.8", out=tmp_path / "ba", to="peft")
    assert loraconv.verify(tmp_path / "ab", tmp_path / "ba").same


# --- peft -------------------------------------------------------------------------------------------------------------


def added_by_peft(one: Any, other: Any, kind: str, **more: Any) -> dict[str, Any]:
    """Module -> the delta of peft's ``add_weighted_adapter`` of two adapters at 0.8 and 0.5, both of scale 1."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraModel

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for module, value in delta(one).items():
                setattr(self, module.replace(".", "_"), torch.nn.Linear(value.shape[1], value.shape[0], bias=False))

    model = Model()
    names = [name for name, _ in model.named_children()]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=names)
    wrapped = LoraModel(model, config, "one")
    inject_adapter_in_model(config, model, "other")
    wrapped.peft_config["other"] = config
    for name, tensors in (("one", one), ("other", other)):
        for module in delta(one):
            layer = model.get_submodule(module.replace(".", "_"))
            layer.lora_A[name].weight.data = tensors[f"transformer.{module}.lora_A.weight"]
            layer.lora_B[name].weight.data = tensors[f"transformer.{module}.lora_B.weight"]
    wrapped.add_weighted_adapter(["one", "other"], [0.8, 0.5], "both", combination_type=kind, **more)
    layers = {module: model.get_submodule(module.replace(".", "_")) for module in delta(one)}
    return {module: layer.get_delta_weight("both").detach().double().numpy() for module, layer in layers.items()}


@pytest.fixture
def alike(tmp_path: Path) -> tuple[Path, Path, Any, Any]:
    """Two adapters of one rank and one list of modules, at scale 1."""
    one, other = drawn(1), drawn(2)
    return write(tmp_path / "a.st", one), write(tmp_path / "b.st", other), one, other


def test_peft_cat_gives_the_same_and_peft_linear_does_not(alike: Any, tmp_path: Path) -> None:
    a, b, one, other = alike
    result = loraconv.merge(f"{a}@0.8", f"{b}@0.5", out=tmp_path / "out")
    made = in_diffusers(tmp_path / "out")
    assert apart(made, added_by_peft(one, other, "cat")) < 1e-6
    assert apart(made, added_by_peft(one, other, "linear")) > 0.1
    crossed = next(c for c in result.proofs[0].controls if "cross terms" in c.name)
    assert crossed.caught


def test_peft_svd_of_the_full_delta_is_no_nearer(alike: Any, tmp_path: Path) -> None:
    a, b, one, other = alike
    loraconv.merge(f"{a}@0.8", f"{b}@0.5", out=tmp_path / "out", rank=3)
    theirs, ours = added_by_peft(one, other, "svd", svd_rank=3), in_diffusers(tmp_path / "out")
    for module, exact in total(delta(one, 0.8), delta(other, 0.5)).items():
        size = np.linalg.norm(exact)
        gap = np.linalg.norm(theirs[module] - exact) - np.linalg.norm(ours[module] - exact)
        assert -(2.0**-22) * size < gap < 1e-5 * size  # theirs is computed in float32


# --- with a smaller rank ----------------------------------------------------------------------------------------------


def test_a_smaller_rank_gives_the_best_approximation_and_states_its_error(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    result = loraconv.merge(f"{a}@0.8", f"{b}@0.5", out=tmp_path / "out", rank=4)
    want, made = total(delta(one, 0.4), delta(other, 1.0)), in_diffusers(tmp_path / "out")
    for fact in result.modules:
        values = np.linalg.svd(want[fact.module], compute_uv=False)
        least = np.linalg.norm(values[4:]) / np.linalg.norm(values)
        error = np.linalg.norm(made[fact.module] - want[fact.module]) / np.linalg.norm(values)
        assert fact.error == pytest.approx(least, abs=1e-12)
        assert error == pytest.approx(least, abs=1e-6)
        assert fact.norm == pytest.approx(np.linalg.norm(values))
        assert (fact.rank, fact.error > 0) == (min(4, fact.rank_before), fact.rank_before > 4)
    gaps = sum(float(np.linalg.norm(made[m] - want[m])) ** 2 for m in want)
    assert result.error == pytest.approx((gaps / sum(float(np.linalg.norm(w)) ** 2 for w in want.values())) ** 0.5)


def test_a_rank_that_nothing_reaches_cuts_nothing(two: Any, tmp_path: Path) -> None:
    a, b, *_ = two
    loraconv.merge(a, b, out=tmp_path / "cut", rank=7)
    loraconv.merge(a, b, out=tmp_path / "whole")
    assert load_file(tmp_path / "cut" / LORA_FILE).keys() == load_file(tmp_path / "whole" / LORA_FILE).keys()
    assert loraconv.verify(tmp_path / "cut", tmp_path / "whole").same


# --- refused ----------------------------------------------------------------------------------------------------------


def spoil(kind: str, a: Path, tmp_path: Path) -> list[str | Path]:
    """The arguments of a merge that cannot be."""
    tensors = drawn(3)
    if kind == "nan":
        tensors[f"transformer.{MODULES[0]}.lora_A.weight"][0, 0] = float("nan")
    elif kind == "zero":
        return [write(tmp_path / "z.st", {n: t * 0 for n, t in tensors.items()})]
    elif kind == "shape":
        tensors = drawn(3, width=32)
    elif kind == "magnitude":
        tensors["transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"] = torch.ones(24)
    elif kind == "twice":
        return [a, f"{a}@0.5"]
    elif kind == "strength":
        return [f"{a}@much"]
    elif kind == "missing":
        return [a, tmp_path / "nowhere"]
    return [a, write(tmp_path / "b.st", tensors)]


@pytest.mark.parametrize(
    ("kind", "error", "slug"),
    [
        ("nan", CorruptCheckpoint, "nonfinite"),
        ("zero", FormatError, "adapter-zero"),
        ("shape", FormatError, "merge-mismatch"),
        ("magnitude", FormatError, "not-plain-lora"),
        ("twice", UsageError, "merged-twice"),
        ("strength", UsageError, "strength"),
        ("missing", UsageError, "not-found"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    two: Any, tmp_path: Path, kind: str, error: type[LoraconvError], slug: str
) -> None:
    given = spoil(kind, two[0], tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(error) as caught:
        loraconv.merge(*given, out=tmp_path / "out")
    assert caught.value.slug == slug
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"dtype": "int8"}, {"alpha": 2.0}, {"out": "."}, {"to": "nothing"}], ids=str
)
def test_a_senseless_option_is_refused(two: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"out": tmp_path / "out", **{k: tmp_path if k == "out" else v for k, v in options.items()}}
    with pytest.raises((UsageError, FormatError)):
        loraconv.merge(two[0], two[1], **given)
    assert not (tmp_path / "out").exists()


def test_model_parallel_ranks_are_refused_with_a_way_out(tmp_path: Path) -> None:
    from tests.support import PARALLEL

    with pytest.raises(FormatError, match="no single adapter") as caught:
        loraconv.merge(PARALLEL.run, out=tmp_path / "out")
    assert "convert RUN --nearest" in caught.value.hint


def test_no_adapter_at_all_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        loraconv.merge(out=tmp_path / "out")


# --- output, command line ---------------------------------------------------------------------------------------------


def test_an_output_is_replaced_only_when_told_to(two: Any, tmp_path: Path) -> None:
    a, b, *_ = two
    loraconv.merge(a, b, out=tmp_path / "out")
    with pytest.raises(WriteFailed):
        loraconv.merge(b, a, out=tmp_path / "out")
    loraconv.merge(b, a, out=tmp_path / "out", overwrite=True)
    assert loraconv.verify(tmp_path / "out").same


def test_the_same_merge_gives_the_same_bytes_elsewhere(two: Any, tmp_path: Path) -> None:
    a, b, *_ = two
    for place in ("x", "y/deep"):
        loraconv.merge(f"{a}@0.8", b, out=tmp_path / place, rank=3)
    assert digests(tmp_path / "x") == digests(tmp_path / "y/deep")


def test_a_dry_run_states_the_same_errors_and_writes_nothing(two: Any, tmp_path: Path) -> None:
    a, b, *_ = two
    before = snapshot(tmp_path)
    dry = loraconv.merge(a, b, out=tmp_path / "out", rank=3, dry_run=True)
    assert snapshot(tmp_path) == before
    wet = loraconv.merge(a, b, out=tmp_path / "out", rank=3)
    assert (dry.modules, dry.files, dry.proofs) == (wet.modules, (), ())


def test_the_command_line_says_what_was_merged(two: Any, tmp_path: Path, cli: Cli) -> None:
    a, b, *_ = two
    done = cli("merge", f"{a}@0.8", b, "-o", tmp_path / "out", "--rank", "3")
    assert done.code == 0
    assert "strength 0.8" in done.out
    assert "3 to 7 -> 3 in 8 modules" in done.out
    assert "controls caught 10/10" in done.out
    assert_clear_error(cli("merge", a, b, "-o", tmp_path / "out"), {6})
    quiet = cli("merge", a, b, "-o", tmp_path / "other", "--json")
    value = json.loads(quiet.out)
    assert (value["kind"], value["schema"]) == ("merged", 1)
    assert json.loads((tmp_path / "other" / "loraconv.json").read_text())["files"] == value["files"]


# --- the proof --------------------------------------------------------------------------------------------------------


def test_factors_of_two_dtypes_do_not_pass_the_proof(two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number would be right, but no consumer multiplies a float32 by a float64 matrix."""
    from loraconv.lazy import Scaled
    from loraconv.reshaping import summing

    monkeypatch.setattr(summing, "folded", lambda tensor, factor, _: Scaled(tensor, float(factor), "F64"))
    with pytest.raises(ProofFailed, match="its size and dtype"):
        loraconv.merge(two[0], two[1], out=tmp_path / "out")


def test_a_rounding_to_half_precision_that_nobody_asked_for_does_not_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv.reshaping import summing

    a, b = (write(tmp_path / f"{seed}.st", drawn(seed, dtype=torch.bfloat16)) for seed in (1, 2))
    monkeypatch.setattr(summing, "_keeping", lambda *_: "BF16")
    with pytest.raises(ProofFailed, match="numbers of modules"):
        loraconv.merge(f"{a}@0.8", b, out=tmp_path / "out")


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("wrong", ["strength", "order", "dropped", "noise"])
def test_a_wrong_sum_does_not_pass_its_proof(
    alike: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None, wrong: str
) -> None:
    """The converter adds up something else than what the proof is told."""
    from loraconv.reshaping import summing

    a, b, *_ = alike
    right = summing._terms

    def spoilt(used: Any) -> Any:
        terms = right(used)
        changed = dict(terms)
        first = MODULES[0]
        one, two = terms[first]
        if wrong == "strength":
            changed[first] = [one, summing.Term(two.up, two.down, two.factor * 2)]
        elif wrong == "order":
            changed[first] = [summing.Term(one.up, two.down, one.factor), summing.Term(two.up, one.down, two.factor)]
        elif wrong == "dropped":
            changed[first] = [one]
        else:
            changed[first] = [summing.Term(one.up, one.down, one.factor * 1000001 / 1000000), two]
        return changed

    monkeypatch.setattr(summing, "_terms", spoilt)
    with pytest.raises(ProofFailed):
        loraconv.merge(f"{a}@0.8", f"{b}@0.5", out=tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()

"""``extract``: what a fine-tune changed in linear weights, as near as the rank allows; everything else it says aloud.

Oracle: numpy's SVD of the difference of the weights in float64. Bounds follow from the dtype of the fine-tune: a weight
is the nearest number to base plus delta, so that it is off by half a unit in its last place at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loraconv
from loraconv.errors import CorruptCheckpoint, FormatError, LoraconvError, ProofFailed, UsageError
from tests.cli_support import Cli, snapshot
from tests.reshape_support import MODULES, delta, drawn, in_diffusers, in_peft, write
from tests.support import Tensors
from tests.test_fuse import write_base

pytest_plugins = ["tests.cli_fixtures"]

RANK = 4
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def base_state(dtype: torch.dtype = torch.float32) -> Tensors:
    """A model with the modules of the drawn adapters, and tensors that no LoRA can hold."""
    noise = torch.Generator().manual_seed(0)
    state = {f"{m}.weight": torch.randn(d.shape, generator=noise) for m, d in delta(drawn(1)).items()}
    state |= {
        "patch_embed.proj.weight": torch.randn((24, 4, 2, 2), generator=noise),
        "transformer_blocks.0.attn1.to_q.bias": torch.randn(24, generator=noise),
        "transformer_blocks.0.norm1.norm.weight": torch.randn(24, generator=noise),
    }
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def tune(state: Tensors, *, other: bool = False, noise: float = 0.0) -> Tensors:
    """The state after a fine-tune of the attention weights of layer 1."""
    drawer, made = torch.Generator().manual_seed(9), dict(state)
    for name in (f"{module}.weight" for module in MODULES if "blocks.1.attn1" in module):
        drift = drawn(3)[f"transformer.{name.removesuffix('.weight')}.lora_B.weight"] @ torch.randn(
            (4, 24), generator=drawer
        )
        made[name] = (state[name] + drift + noise * torch.randn(drift.shape, generator=drawer)).to(state[name].dtype)
    if other:
        made["transformer_blocks.0.norm1.norm.weight"] = state["transformer_blocks.0.norm1.norm.weight"] + 1
    return made


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """``(tuned, base)``: three weights differ, by noise on top of a rank of 4."""
    return (
        write_base(tmp_path / "tuned", tune(base_state(), noise=0.05)),
        write_base(tmp_path / "base", base_state(), shards=2),
    )


def differences() -> dict[str, Any]:
    before, after = base_state(), tune(base_state(), noise=0.05)
    made = {n.removesuffix(".weight"): (after[n].double() - before[n].double()).numpy() for n in before}
    return {module: value for module, value in made.items() if value.any()}


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_a_fused_adapter_comes_back_within_what_its_fusion_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """``T = round(B + D)``, so ``|T - B - D|`` is at most half a unit of T, number by number: ``gap`` in the norm. The
    nearest X of D's rank is no farther from T - B than D is, so that X is at most twice that from D."""
    lora, base = write(tmp_path / "lora.st", drawn(1)), write_base(tmp_path / "base", base_state(dtype))
    loraconv.fuse(lora, base=base, out=tmp_path / "tuned")
    result = loraconv.extract(tmp_path / "tuned", base=base, out=tmp_path / "out", rank=RANK)
    assert [fact.module for fact in result.modules] == sorted(MODULES)
    made = in_diffusers(tmp_path / "out")
    for module, exact in delta(drawn(1)).items():
        fused = base_state(dtype)[f"{module}.weight"].double().numpy() + exact
        gap = np.linalg.norm(np.abs(fused)) * HALF_ULP[dtype] * (1 + HALF_ULP[dtype])
        stored = np.linalg.norm(exact) * 2.0**-24 * 2 * 2 * RANK**0.5
        assert np.linalg.norm(made[module] - exact) <= 2 * gap + stored


def test_a_rank_gives_the_nearest_delta_and_states_its_error(models: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = models
    result = loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=RANK, to="peft")
    made, facts = in_peft(tmp_path / "out"), {fact.module: fact for fact in result.modules}
    assert sorted(made) == sorted(differences()) == sorted(facts)
    for module, exact in differences().items():
        values = np.linalg.svd(exact, compute_uv=False)
        least = np.linalg.norm(values[RANK:]) / np.linalg.norm(values)
        assert np.linalg.norm(made[module] - exact) / np.linalg.norm(values) == pytest.approx(least, abs=1e-6)
        assert facts[module].error == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize(("option", "value"), [("energy", 0.98), ("max_error", 0.05)])
def test_energy_and_error_take_the_smallest_rank(
    models: tuple[Path, Path], tmp_path: Path, option: str, value: float
) -> None:
    tuned, base = models
    result = loraconv.extract(tuned, base=base, out=tmp_path / "out", **{option: value})
    allowed = value if option == "max_error" else (1 - value) ** 0.5
    for fact in result.modules:
        values = np.linalg.svd(differences()[fact.module], compute_uv=False)
        left = [np.linalg.norm(values[rank:]) / np.linalg.norm(values) for rank in range(25)]
        assert left[fact.rank] <= allowed < left[fact.rank - 1]


def large(shape: tuple[int, int], fade: float) -> Any:
    """A matrix whose singular values are about 1, fade, fade**2, ... and never below a floor of noise."""
    noise = np.random.default_rng(5)
    rank = 64
    left, right = (np.linalg.qr(noise.standard_normal((size, rank)))[0] for size in shape)
    return (left * fade ** np.arange(rank)) @ right.T + 1e-4 * noise.standard_normal(shape) / shape[0] ** 0.5


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as large is small here: LAPACK would take seconds for the oracle."""
    from loraconv.reshaping import approximation

    monkeypatch.setattr(approximation, "_SMALL", 64)


@pytest.mark.parametrize(("wanted", "shape"), [({"rank": 8}, (150, 220)), ({"error": 0.02}, (220, 150))], ids=str)
def test_the_sketch_of_a_large_matrix_is_as_good_as_its_svd(
    sketched: None, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], shape: tuple[int, int]
) -> None:
    from loraconv.lazy import read
    from loraconv.reshaping import approximation
    from loraconv.truncation import Wanted

    exact = large(shape, 0.8)
    with monkeypatch.context() as whole:
        whole.setattr(approximation, "_from_svd", lambda *_: pytest.fail("this is large enough for a sketch"))
        made = approximation.approximate(exact, Wanted(**wanted), "F32")
    values = np.linalg.svd(exact, compute_uv=False)
    rank, size = made.down.shape[0], np.linalg.norm(values)
    least = np.linalg.norm(values[rank:]) / size
    error = np.linalg.norm(exact - read(made.up) @ read(made.down)) / size
    assert error == pytest.approx(made.error, abs=1e-6)
    assert least - 1e-9 <= made.error <= least * (1 + 1e-3)
    if "error" in wanted:
        assert error <= wanted["error"] < np.linalg.norm(values[rank - 1 :]) / size
    else:
        assert rank == wanted["rank"]


def test_an_error_that_needs_many_directions_is_met_all_the_same(sketched: None) -> None:
    from loraconv.reshaping.approximation import approximate
    from loraconv.truncation import Wanted

    noise = np.random.default_rng(6).standard_normal((120, 140))
    made = approximate(noise, Wanted(error=0.1), "F32")
    values = np.linalg.svd(noise, compute_uv=False)
    assert np.linalg.norm(values[made.down.shape[0] :]) <= 0.1 * np.linalg.norm(values)
    assert made.down.shape[0] > 60


# --- what is not in it ------------------------------------------------------------------------------------------------


def test_changes_that_no_lora_holds_are_an_error_until_they_are_ignored(tmp_path: Path) -> None:
    tuned = write_base(tmp_path / "tuned", tune(base_state(), other=True))
    base = write_base(tmp_path / "base", base_state())
    with pytest.raises(FormatError, match="no LoRA can hold") as caught:
        loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=2)
    assert (caught.value.slug, "norm1.norm.weight" in caught.value.where) == ("other-changed", True)
    result = loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=2, ignore_other=True)
    assert result.other == ("transformer_blocks.0.norm1.norm.weight",)
    assert any("NOT in the adapter" in notice for notice in result.notices)


def test_a_module_pattern_takes_some_and_names_the_rest(models: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = models
    result = loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=2, modules=["*.attn1.to_{q,k}"])
    assert [fact.module.rpartition(".")[2] for fact in result.modules] == ["to_k", "to_q"]
    assert any("to_out.0" in notice for notice in result.notices)


def test_a_base_in_a_wider_dtype_is_compared_by_its_numbers(tmp_path: Path) -> None:
    state = base_state(torch.bfloat16)
    base = write_base(tmp_path / "base", {name: tensor.float() for name, tensor in state.items()})
    tuned = write_base(tmp_path / "tuned", tune(state))
    result = loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=4)
    assert len(result.modules) == 3


def test_the_same_bytes_in_another_dtype_are_other_numbers(tmp_path: Path) -> None:
    before = base_state(torch.float16)
    name = f"{MODULES[0]}.weight"
    base = write_base(tmp_path / "base", before)
    tuned = write_base(tmp_path / "tuned", {**before, name: before[name].view(torch.bfloat16)})
    (fact,) = loraconv.extract(tuned, base=base, out=tmp_path / "out", max_error=1e-3).modules
    exact = (before[name].view(torch.bfloat16).double() - before[name].double()).numpy()
    assert (fact.module, fact.norm) == (MODULES[0], pytest.approx(np.linalg.norm(exact)))


def test_an_embedding_is_no_linear_layer() -> None:
    from loraconv.reshaping.comparing import _is_embedding

    assert all(map(_is_embedding, ["model.embed_tokens", "shared", "encoder.token_embedding", "wte"]))
    linear = ["context_embedder", "time_embedding.linear_1", "patch_embed.text_proj", "x_embedder"]
    assert not any(map(_is_embedding, linear))


# --- refused ----------------------------------------------------------------------------------------------------------


def spoilt(kind: str) -> tuple[Tensors, Tensors]:
    """``(tuned, base)`` of which nothing can be extracted."""
    before, after = base_state(), tune(base_state())
    name = "transformer_blocks.1.attn1.to_q.weight"
    if kind == "same":
        after = before
    elif kind == "nan":
        after[name][0, 0] = float("nan")
    elif kind == "shape":
        after[name] = torch.zeros(24, 48)
    elif kind == "name":
        after["more.weight"] = torch.zeros(2, 2)
    elif kind == "unknown":
        before["strange.weight"], after["strange.weight"] = torch.zeros(2, 2), torch.ones(2, 2)
    return after, before


@pytest.mark.parametrize(
    ("kind", "error", "slug"),
    [
        ("same", FormatError, "no-difference"),
        ("nan", CorruptCheckpoint, "nonfinite"),
        ("shape", FormatError, "base-mismatch"),
        ("name", FormatError, "base-mismatch"),
        ("unknown", FormatError, "module-unknown"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path: Path, kind: str, error: type[LoraconvError], slug: str) -> None:
    after, before = spoilt(kind)
    tuned, base = write_base(tmp_path / "tuned", after), write_base(tmp_path / "base", before)
    untouched = snapshot(tmp_path)
    with pytest.raises(error) as caught:
        loraconv.extract(tuned, base=base, out=tmp_path / "out", rank=2)
    assert caught.value.slug == slug
    assert snapshot(tmp_path) == untouched


def test_the_output_may_not_be_a_model(models: tuple[Path, Path]) -> None:
    tuned, base = models
    for place in (tuned, base, base / "lora"):
        with pytest.raises(LoraconvError):
            loraconv.extract(tuned, base=base, out=place, rank=2, overwrite=True)


def test_one_of_three_options_is_needed(models: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = models
    with pytest.raises(UsageError):
        loraconv.extract(tuned, base=base, out=tmp_path / "out")


# --- command line, proof ----------------------------------------------------------------------------------------------


def test_the_command_line_says_what_is_lost(tmp_path: Path, cli: Cli) -> None:
    tuned = write_base(tmp_path / "tuned", tune(base_state(), other=True))
    base = write_base(tmp_path / "base", base_state())
    words = ["extract", tuned, "--base", base, "-o", tmp_path / "out", "--rank", "2"]
    assert cli(*words).code == 3
    done = cli(*words, "--ignore-other")
    assert (done.code, "LOST    1 changed tensors" in done.out) == (0, True)
    value = json.loads(cli(*words, "--ignore-other", "--overwrite", "--json").out)
    assert value["other"] == ["transformer_blocks.0.norm1.norm.weight"]
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("wrong", ["forgotten", "transposed", "error", "sign"])
def test_a_wrong_extraction_does_not_pass_its_proof(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    from dataclasses import replace

    from loraconv.reshaping import extracting

    right, found = extracting.approximate, extracting.changes

    def approximate(value: Any, how: Any, dtype: str) -> Any:
        if wrong == "transposed":
            value = value.T
        elif wrong == "sign":
            value = -value
        made = right(value, how, dtype)
        return replace(made, error=made.error / 2) if wrong == "error" else made

    def changes(tuned: Any, base: Any) -> Any:
        made = found(tuned, base)
        return replace(made, modules=made.modules[1:]) if wrong == "forgotten" else made

    monkeypatch.setattr(extracting, "approximate", approximate)
    monkeypatch.setattr(extracting, "changes", changes)
    with pytest.raises(ProofFailed):
        loraconv.extract(models[0], base=models[1], out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()

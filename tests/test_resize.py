"""``resize``: the nearest delta of a smaller rank, its error stated and kept to, whatever the factors look like.

Oracle: numpy's SVD of the full delta in float64.
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
from loraconv.errors import CorruptCheckpoint, ProofFailed, UsageError
from tests.cli_support import Cli, snapshot
from tests.reshape_support import MODULES, apart, delta, drawn, in_diffusers, in_peft, write
from tests.support import LORA_FILE

pytest_plugins = ["tests.cli_fixtures"]

RANK = 8
#: Both factors are rounded to float32 once, of at most 8 columns; twice what that can change.
STORED = 2.0**-24 * 2 * 2 * RANK**0.5


def fading(seed: int = 1, fade: float = 0.4, **more: Any) -> dict[str, torch.Tensor]:
    """An adapter whose singular values fade about as fast as ``fade ** n``."""
    tensors = drawn(seed, rank=RANK, **more)
    weights = fade ** torch.arange(RANK)
    return {n: t * weights.to(t.dtype) if ".lora_B." in n else t for n, t in tensors.items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora.st", fading(), alpha=4)


def truth(tensors: Any, scale: float = 0.5) -> dict[str, tuple[Any, Any]]:
    """Module -> the delta and its singular values."""
    return {m: (d, np.linalg.svd(d, compute_uv=False)) for m, d in delta(tensors, scale).items()}


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_rank_gives_the_nearest_delta_of_that_rank(lora: Path, tmp_path: Path, rank: int) -> None:
    result = loraconv.resize(lora, out=tmp_path / "out", rank=rank)
    made, facts = in_diffusers(tmp_path / "out"), {m.module: m for m in result.modules}
    for module, (exact, values) in truth(fading()).items():
        size = np.linalg.norm(values)
        least = np.linalg.norm(values[rank:]) / size
        assert np.linalg.norm(made[module] - exact) / size == pytest.approx(least, abs=STORED)
        assert facts[module].error == pytest.approx(least, rel=1e-9)
        assert (facts[module].rank_before, facts[module].rank) == (RANK, rank)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_an_energy_takes_the_smallest_rank_that_keeps_it(lora: Path, tmp_path: Path, energy: float) -> None:
    result = loraconv.resize(lora, out=tmp_path / "out", energy=energy)
    for fact in result.modules:
        shares = np.cumsum(truth(fading())[fact.module][1] ** 2)
        assert fact.rank == int(np.argmax(shares / shares[-1] >= energy)) + 1


@pytest.mark.parametrize("error", [0.3, 5e-2, 5e-3])
def test_an_error_takes_the_smallest_rank_that_keeps_to_it(lora: Path, tmp_path: Path, error: float) -> None:
    result = loraconv.resize(lora, out=tmp_path / "out", max_error=error)
    made = in_diffusers(tmp_path / "out")
    for fact in result.modules:
        exact, values = truth(fading())[fact.module]
        size = np.linalg.norm(values)
        assert np.linalg.norm(made[fact.module] - exact) <= error * size
        assert np.linalg.norm(values[fact.rank - 1 :]) > error * size - STORED * size


def test_an_error_below_what_the_dtype_rounds_cuts_nothing(tmp_path: Path) -> None:
    lora = write(tmp_path / "lora.st", fading(fade=0.01))
    with pytest.raises(UsageError, match="nothing would be cut"):
        loraconv.resize(lora, out=tmp_path / "out", max_error=1e-3, dtype="bf16")
    result = loraconv.resize(lora, out=tmp_path / "out", max_error=1e-3)
    assert {fact.rank for fact in result.modules} == {2}


def test_the_format_stays_unless_another_is_asked_for(lora: Path, tmp_path: Path) -> None:
    loraconv.convert(lora, out=tmp_path / "peft", to="peft")
    loraconv.resize(tmp_path / "peft", out=tmp_path / "small", rank=2)
    loraconv.resize(lora, out=tmp_path / "other", rank=2, to="peft")
    loraconv.resize(lora, out=tmp_path / "same", rank=2)
    assert apart(in_peft(tmp_path / "small"), in_diffusers(tmp_path / "same")) < STORED
    assert apart(in_peft(tmp_path / "other"), in_diffusers(tmp_path / "same")) < STORED


def test_a_module_of_a_smaller_rank_keeps_it(tmp_path: Path) -> None:
    tensors = {**fading(modules=MODULES[:4]), **drawn(2, rank=2, modules=MODULES[4:])}
    result = loraconv.resize(write_mixed(tmp_path, tensors), out=tmp_path / "out", rank=4, to="diffusers")
    made = load_file(tmp_path / "out" / LORA_FILE)
    for fact in result.modules:
        name = f"transformer.{fact.module}.lora_A.weight"
        kept = fact.module in MODULES[4:]
        assert (fact.rank, fact.error == 0) == ((2, True) if kept else (4, False))
        assert torch.equal(made[name], tensors[name]) == kept


def write_mixed(folder: Path, tensors: Any) -> Path:
    """A peft folder whose modules have several ranks, all at scale 1."""
    from safetensors.torch import save_file

    folder = folder / "mixed"
    folder.mkdir()
    ranks = {n.removesuffix(".lora_A.weight"): t.shape[0] for n, t in tensors.items() if ".lora_A." in n}
    ranks = {name.removeprefix("transformer."): rank for name, rank in ranks.items()}
    config = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": list(ranks),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    spelled = {n.replace("transformer.", "base_model.model.", 1): t for n, t in tensors.items()}
    save_file(spelled, folder / "adapter_model.safetensors")
    return folder


def test_a_rank_that_is_only_on_paper_is_cut_without_loss(tmp_path: Path) -> None:
    """The columns of up repeat, so that the delta has half the rank of its factors."""
    tensors = drawn(1, rank=4)
    twice = {n: torch.cat([t, t], dim=1 if ".lora_B." in n else 0) for n, t in tensors.items()}
    result = loraconv.resize(write(tmp_path / "lora.st", twice), out=tmp_path / "out", max_error=1e-5)
    assert {(fact.rank_before, fact.rank) for fact in result.modules} == {(8, 4)}
    assert apart(in_diffusers(tmp_path / "out"), delta(twice)) < STORED


def test_a_module_of_zeros_stays_zero(tmp_path: Path) -> None:
    tensors = fading()
    tensors[f"transformer.{MODULES[0]}.lora_B.weight"].zero_()
    for option in ({"rank": 2}, {"energy": 0.9}):
        result = loraconv.resize(write(tmp_path / "z.st", tensors), out=tmp_path / "out", overwrite=True, **option)
        assert not in_diffusers(tmp_path / "out")[MODULES[0]].any()
        (fact,) = (fact for fact in result.modules if fact.module == MODULES[0])
        assert (fact.norm, fact.error) == (0, 0)
        assert 0 < result.error < 1


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_very_small_and_very_large_numbers_keep_their_accuracy(tmp_path: Path, size: float) -> None:
    tensors = {n: t * size if ".lora_B." in n else t for n, t in fading().items()}
    loraconv.resize(write(tmp_path / "lora.st", tensors), out=tmp_path / "out", max_error=1e-2)
    assert apart(in_diffusers(tmp_path / "out"), delta(tensors)) <= 1e-2


def test_nan_is_refused(tmp_path: Path) -> None:
    tensors = fading()
    tensors[f"transformer.{MODULES[0]}.lora_B.weight"][0, 0] = float("inf")
    with pytest.raises(CorruptCheckpoint):
        loraconv.resize(write(tmp_path / "lora.st", tensors), out=tmp_path / "out", rank=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 2, "energy": 0.9},
        {"rank": 0},
        {"rank": RANK},
        {"rank": RANK + 1},
        {"energy": 1.0},
        {"energy": 0.0},
        {"max_error": 0.0},
        {"max_error": float("nan")},
        {"max_error": 1.0},
    ],
    ids=str,
)
def test_a_senseless_option_is_a_usage_error(lora: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(UsageError):
        loraconv.resize(lora, out=tmp_path / "out", **options)
    assert snapshot(tmp_path) == before


def test_the_command_line_states_the_error_of_every_module(lora: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("resize", lora, "-o", tmp_path / "out", "--energy", "0.9")
    assert done.code == 0
    assert sum(f"  {module}" in done.out for module in MODULES) == len(MODULES)
    value = json.loads(cli("resize", lora, "-o", tmp_path / "x", "--rank", "2", "--dry-run", "--json").out)
    assert [module["module"] for module in value["modules"]] == sorted(MODULES)
    assert not (tmp_path / "x").exists()


def second_best(up: Any, down: Any) -> Any:
    """A cut to rank 2 that leaves out the greatest singular value, and says honestly what that costs."""
    from loraconv.lazy import InMemory
    from loraconv.truncation import Cut

    left, values, right = np.linalg.svd(up @ down, full_matrices=False)
    made_up = (left[:, 1:3] * values[1:3]).astype(np.float32)
    made_down = right[1:3].astype(np.float32)
    size = float(np.linalg.norm(values))
    error = float(np.linalg.norm(np.delete(values, [1, 2]))) / size
    held = [InMemory(array.tobytes(), "F32", array.shape) for array in (made_down, made_up)]
    return Cut(held[0], held[1], size, error)


def test_a_cut_that_is_not_the_best_does_not_pass_its_proof(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv.reshaping import summing

    monkeypatch.setattr(summing, "cut", lambda up, down, *_: second_best(up, down))
    with pytest.raises(ProofFailed, match="no adapter of that rank is nearer"):
        loraconv.resize(lora, out=tmp_path / "out", rank=2)


def test_an_error_above_what_was_asked_for_does_not_pass_its_proof(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraconv import truncation

    monkeypatch.setattr(truncation.Wanted, "rank_of", lambda *_: 1)
    with pytest.raises(ProofFailed, match="error that was asked for"):
        loraconv.resize(lora, out=tmp_path / "out", max_error=0.01)


@pytest.mark.parametrize("wrong", ["rank", "error", "basis"])
def test_a_wrong_cut_does_not_pass_its_proof(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    from loraconv import truncation
    from loraconv.reshaping import summing

    right = truncation.cut

    def spoilt(up: Any, down: Any, how: Any, dtype: str) -> Any:
        if wrong == "rank":  # the weakest directions instead of the strongest
            return right(up[:, ::-1][:, : RANK // 2], down[::-1][: RANK // 2], how, dtype)
        made = right(up, down, how, dtype)
        if wrong == "error":
            return truncation.Cut(made.down, made.up, made.norm, made.error * 0.99)
        return right(up, np.roll(down, 1, axis=1), how, dtype)

    monkeypatch.setattr(summing, "cut", spoilt)
    with pytest.raises(ProofFailed):
        loraconv.resize(lora, out=tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
